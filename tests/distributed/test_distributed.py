"""FAM and relative_flatness on 2 and 4 ranks give the numbers of one process on all of the data."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, CLASSES, Net, alone, data, ddp, dying, fsdp, head_alone, measure, precision, probes
from torch import nn

from processes import run
from relflat import relative_flatness, relative_flatness_by_layer

pytestmark = pytest.mark.xdist_group("processes")


def on(work, ranks, *args, **limits):
    found = run(work, ranks, ranks, *args, **limits)
    assert all(isinstance(x, dict) for x in found), found
    return found


def assert_gradients_equal(found, case, name):
    expected = head_alone() if case == "head" else alone(case)
    tolerance = 1e-6 if name == "float32" else 1e-10
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("work", [ddp, fsdp])
def test_gradients_are_those_of_one_process(work, ranks):
    for rank in on(work, ranks):
        for name, entry in rank.items():
            if isinstance(entry, tuple):
                assert_gradients_equal(entry[1], entry[0], name)
        if work is fsdp:
            x, y = data()
            assert rank["measure after a step"]
            for layer in ("output", "hidden"):
                expected = relative_flatness(Net(), nn.CrossEntropyLoss(), (x, y), layer=layer)
                assert rank[f"measure {layer}"].value == pytest.approx(expected.value, rel=1e-10)


def test_mixed_precision():
    found = on(precision, 2)
    expected = alone("output")
    for rank in found:
        for dtype in (torch.bfloat16, torch.float16):
            for a, b in zip(rank[str(dtype)], expected, strict=True):
                assert float((a.double() - b).norm() / b.norm()) < 4 * torch.finfo(dtype).eps
        assert rank["skipped"]


def test_ranks_draw_different_probes_and_rank_0_those_of_one_process():
    found = [rank["values"] for rank in on(probes, 2)]
    assert found[0][0] == found[0][1]
    assert found[1][0] == found[1][1]
    assert found[0][0] != found[1][0]
    assert found[0] == probes(0, 1)["values"]


def test_measuring_shares_of_any_size():
    found = on(measure, 2) + on(measure, 3)
    net, loss_fn, (x, y) = Net(), nn.CrossEntropyLoss(), data()
    for rank in found:
        for layer in ("output", "hidden"):
            for normalize in (False, True):
                method = "exact" if layer == "hidden" else "auto"
                expected = relative_flatness(
                    net, loss_fn, (x, y), layer=layer, method=method, normalize_features=normalize
                )
                got = rank[f"{layer} {normalize}"]
                assert got.samples == expected.samples
                for field in ("value", "trace", "loss", "feature_norm2", "confidence", "weight_norm"):
                    assert getattr(got, field) == pytest.approx(getattr(expected, field), rel=1e-10), field
        expected = relative_flatness_by_layer(net, loss_fn, (x, y), layer="*")
        assert list(rank["all"]) == list(expected)
        assert rank["probes"].stderr <= 0.2 * rank["probes"].value
        alone = relative_flatness(net, loss_fn, (x, y), layer="hidden", method="xtrace", probes=8)
        assert rank["xtrace"].value == pytest.approx(alone.value, rel=1e-6)
        assert rank["xtrace"].stderr == pytest.approx(alone.stderr, rel=1e-6)
        exact = rank["hidden False"].value
        assert abs(rank["probes"].value - exact) < 5 * rank["probes"].stderr
        assert "rank 1" in rank["errors"]["bad on rank 1"] or "NonFinite" in rank["errors"]["bad on rank 1"]
        assert rank["errors"]["empty"].startswith("DataError: the data is empty")
        assert "two batches" in rank["errors"]["one batch of an unknown loss"]
    for same in (found[:2], found[2:]):
        assert len({rank["probes"].value for rank in same}) == 1
        assert len({rank["output False"].value for rank in same}) == 1
    parts = [(x[:9], y[:9] % CLASSES), *[(x[9:], y[9:] % CLASSES)] * 2]
    joined = tuple(torch.cat(t) for t in zip(*parts, strict=True))
    expected = relative_flatness(net, F.cross_entropy, joined, layer="output").value
    assert found[0]["unknown"].value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("what", "within"), [("dies", 8), ("hangs", 8)])
def test_a_lost_rank_is_noticed(what, within):
    """A dead neighbour is noticed at once, a silent one within the timeout of the process group."""
    found = run(dying, 2, 2, what, wait=5, limit=60)
    seconds, reason = found[0].split(" s: ", 1)
    assert int(seconds) <= within
    assert any(word in reason.lower() for word in ("closed", "timed out", "timeout", "reset")), reason


def test_cases_are_all_different():
    firsts = [torch.cat([g.flatten() for g in alone(case)]) for case in CASES]
    assert all(not torch.allclose(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
