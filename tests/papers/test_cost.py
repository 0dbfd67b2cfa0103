import math
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import nn

from relflat.lab.train.timing import clock_of, in_turns
from relflat.papers import cost
from relflat.papers.cost import SIZES, measure
from relflat.papers.forms import FORMS, STATUS, Value, deviations, loss_at, peak, problem

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """Layers of 4 and 8, and training steps on digits."""
    size = replace(
        SIZES["small"],
        widths=(4, 8),
        hessian_gigabytes=2e-4,
        reference_to=8,
        rounds=1,
        task="digits",
        data="digits",
        hidden="fc2",
        common={"train_size": 64, "batch_size": 16},
        step_rounds=1,
        block=1,
    )
    monkeypatch.setitem(SIZES, "small", size)
    return size


def test_a_tiny_study(reproduced, tiny, tmp_path):
    values = reproduced("cost", "--out", "out")
    # 6 forms at the output and 7 hidden at 4; without full Hessians 3 and 4 at 8
    assert values["findings"][0].startswith("All 20 values agree")
    layers = values["data"]["layers"]
    assert [(layer["where"], layer["width"]) for layer in layers] == [
        ("output", 4),
        ("output", 8),
        ("hidden", 4),
        ("hidden", 8),
    ]
    assert set(layers[0]["forms"]) == {"rows", "vectorised", "func", "trace", "closed", "exact"}
    assert values["data"]["steps"]["plain"]["ratio"] == 1
    assert all(step["seconds"] > 0 for step in values["data"]["steps"].values())
    time = (tmp_path / "runs" / "cost-small" / "steps.json").stat().st_mtime_ns
    assert reproduced("cost", "--out", "out")["data"] == values["data"]
    assert (tmp_path / "runs" / "cost-small" / "steps.json").stat().st_mtime_ns == time


def test_every_form_is_held_against_the_definition(tiny):
    for where in ("output", "hidden"):
        record = measure(where, 4, tiny, CPU)
        assert set(record["reference"]) == {"kappa", "trace"}
        found = deviations(record)
        assert set(found) == set(record["forms"])
        assert all(ratio <= 1 for ratio in found.values()), found


def test_a_form_that_is_wrong_is_reported(reproduced, tiny, monkeypatch):
    form = FORMS["exact"]
    monkeypatch.setitem(FORMS, "exact", replace(form, of=lambda p: Value(1.01 * form.of(p).value)))
    assert "4 of 20 values do not agree" in reproduced("cost")["findings"][0]


def test_hessians_that_do_not_fit_are_left_out(tiny):
    record = measure("output", 8, replace(tiny, hessian_gigabytes=1e-9), CPU)
    assert set(record["forms"]) == {"trace", "closed", "exact"}
    subject = problem("output", 8, CPU)
    loss = nn.functional.cross_entropy(subject.model(subject.inputs), subject.targets).detach()
    assert float(loss_at(subject, subject.model.get_parameter("0.weight")).detach()) == pytest.approx(
        float(loss), rel=1e-6
    )


def test_the_papers_settings():
    size = SIZES["paper"]
    assert {16, 64, 256, 1024} <= set(size.widths)
    assert cost.gigabytes(256) < size.hessian_gigabytes
    configs = cost.step_configs(size)
    assert configs["plain"].task == "cifar10-resnet18"
    assert configs["FAM, output, closed form"].settings.layer == "output"
    assert configs["FAM, output, closed form"].batch_size == 64
    assert configs["FAM, hidden layer, one probe"].settings.layer == "features"


@pytest.mark.skipif(not STATUS.is_file(), reason="only Linux tells a process its peak memory")
def test_peak_memory_sees_what_was_freed_again():
    size = 20_000_000
    kept = [torch.ones(5000) for _ in range(4000)]  # small enough for the heap, which the allocator keeps
    del kept
    megabytes = peak(lambda: float(torch.ones(size).sum()), CPU)
    assert megabytes == pytest.approx(4 * size / 2**20, rel=0.1)


def test_times_are_processor_times():
    works = [lambda: [math.sqrt(i) for i in range(200_000)], lambda: None]
    slow, none = in_turns(works, 3, clock=clock_of(CPU))
    assert median(slow) > 20 * median(none)
