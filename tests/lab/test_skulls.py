import io
import json
import plistlib
import tarfile
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import directed_hausdorff
from torch import nn

from fetched import have
from relflat import FAM
from relflat.errors import ConfigError, DataError
from relflat.lab.data.fetch import files
from relflat.lab.tasks import TASKS
from relflat.lab.train.config import make
from relflat.lab.train.loop import train
from relflat.papers import skull_metrics, skulls
from relflat.papers.skull_tasks import Autoencoder, Completion, dice_cross_entropy, dice_loss
from relflat.papers.skulls import LARGE, SIDE, SMALL, Sizes

FEW = Sizes(train=4, validation=2, evaluation=2)
pytestmark = pytest.mark.xdist_group("monai")  # takes 15 s to import


@pytest.fixture(scope="module")
def scan() -> skulls.Scan:
    have("skulls")
    return skulls.read_project(files("skulls") / skulls.PROJECT)


@pytest.fixture(scope="module")
def made(scan) -> skulls.Skulls:
    return skulls.make(scan, FEW)


@pytest.fixture
def few(made, monkeypatch, tmp_path) -> Sizes:
    """The few skulls in a cache of their own."""
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path))
    skulls.arrays.cache_clear()
    skulls.write(skulls.kept(FEW), made)
    yield FEW
    skulls.arrays.cache_clear()


# -- the CT ------------------------------------------------------------------------------------------------------


def project(path, volume: np.ndarray, **changes) -> None:
    """Write an InVesalius project as version 3 of the program does."""
    matrix = {"filename": "matrix.dat", "dtype": "int16", "shape": list(volume.shape), **changes}
    parts = {
        "matrix.dat": volume.astype(np.int16).tobytes(),
        "main.plist": plistlib.dumps({"matrix": matrix, "spacing": [0.9, 0.8, 1.5]}),
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in parts.items():
            entry = tarfile.TarInfo(f"tmpabc/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_only_the_largest_piece_of_bone_is_kept(tmp_path):
    volume = np.full((6, 8, 10), -500)
    volume[1:4, 2:5, 3:7] = 700  # the skull
    volume[5, 7, 8:] = 900  # the table the patient lies on
    project(tmp_path / "a.inv3", volume)
    scan = skulls.read_project(tmp_path / "a.inv3")
    assert scan.spacing == (1.5, 0.8, 0.9)
    np.testing.assert_allclose(scan.centre, [2, 3, 4.5])
    assert (scan.hounsfield == 700).sum() == 3 * 3 * 4
    assert (scan.hounsfield == 900).sum() == 0
    assert scan.hounsfield[0, 3, 4] == -500  # next to the skull: its partial volume is kept
    assert scan.hounsfield[0, 0, 0] == 0


@pytest.mark.parametrize("changes", [{"shape": [7, 8, 10]}, {"filename": "absent.dat"}])
def test_a_damaged_project_is_named(tmp_path, changes):
    project(tmp_path / "a.inv3", np.full((6, 8, 10), 700), **changes)
    with pytest.raises(DataError, match=r"a\.inv3 is not an InVesalius project.*relflat data get skulls"):
        skulls.read_project(tmp_path / "a.inv3")


def test_a_scan_without_bone_is_refused(tmp_path):
    project(tmp_path / "a.inv3", np.zeros((6, 8, 10)))
    with pytest.raises(DataError, match="no voxel of 226 HU"):
        skulls.read_project(tmp_path / "a.inv3")


@pytest.mark.data
def test_the_real_scan_is_a_head(scan):
    """The box around the skull is as large as a head, and resampling keeps it where it was, in mm."""
    bone = scan.hounsfield >= skulls.BONE
    assert scan.hounsfield.shape == (108, 256, 256)
    assert bone.sum() == 432_593
    fine = skulls.resampled(scan)
    assert fine.spacing == (2.0, 2.0, 2.0)
    centre, after = (ndimage.center_of_mass(each.hounsfield) * np.array(each.spacing) for each in (scan, fine))
    np.testing.assert_allclose(after, centre, atol=0.5)


# -- skulls ------------------------------------------------------------------------------------------------------


def test_rotations_are_rotations():
    matrix = skulls.rotation(np.array([0.3, -0.2, 1.0]))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)
    assert not np.allclose(matrix, np.eye(3))


@pytest.mark.data
def test_skulls_have_a_hole_in_the_vault_and_nowhere_else(made):
    removed = made.complete & ~made.defective
    assert (made.defective <= made.complete).all()
    assert made.complete.shape == (8, SIDE, SIDE, SIDE)
    share = removed.sum((1, 2, 3)) / made.complete.sum((1, 2, 3))
    assert (share > 0.005).all()
    assert (share < 0.2).all()
    for skull, hole in zip(made.complete, removed, strict=True):
        height = np.flatnonzero(skull.any((1, 2)))
        assert np.argwhere(hole)[:, 0].mean() > (height[0] + height[-1]) / 2


@pytest.mark.data
def test_the_second_evaluation_set_has_the_same_skulls_with_larger_holes(made):
    complete = made.complete[-FEW.evaluation :]
    assert (made.other <= complete).all()
    assert made.other.sum() < made.defective[-FEW.evaluation :].sum()
    assert LARGE[0] > SMALL[0]


@pytest.mark.data
def test_each_skull_is_a_function_of_the_seed_and_its_number(scan, made):
    fewer = skulls.make(scan, Sizes(1, 1, 1))
    assert np.array_equal(fewer.complete, made.complete[:3])
    assert np.array_equal(fewer.defective, made.defective[:3])
    other = skulls.make(scan, Sizes(1, 0, 0 + 1), seed=1)
    assert not np.array_equal(other.complete[0], made.complete[0])
    for one, two in combinations(made.complete, 2):
        assert 0.1 < 2 * (one & two).sum() / (one.sum() + two.sum()) < 0.95


@pytest.mark.data
def test_what_is_kept_reads_back_as_it_was(made, tmp_path):
    path = tmp_path / "set.npz"
    skulls.write(path, made)
    for found, expected in zip(skulls.read(path), made, strict=True):
        assert np.array_equal(found, expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.npz"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"set\.npz is damaged.*Delete it"):
        skulls.read(path)


@pytest.mark.data
def test_splits_are_disjoint_and_ready_for_the_network(few, made):
    cut = skulls.splits(train_size=3, label_noise=0, seed=0, sizes=few)
    parts = [cut.train, cut.validation, cut.test(), cut.shifts["larger-defects"]()]
    assert [len(part) for part in parts] == [3, 2, 2, 2]
    for part in parts:
        assert part.inputs.shape[1:] == (1, SIDE, SIDE, SIDE)
        assert part.inputs.dtype == part.targets.dtype == torch.float32
    held_out = torch.cat([cut.validation.targets, cut.test().targets])
    assert not any(torch.equal(a, b) for a in cut.train.targets for b in held_out)
    assert torch.equal(cut.test().targets, cut.shifts["larger-defects"]().targets)
    assert torch.equal(cut.test().inputs[0, 0] > 0, torch.from_numpy(made.defective[-2]))
    with pytest.raises(ConfigError, match="the targets are shapes"):
        skulls.splits(train_size=None, label_noise=0.1, seed=0, sizes=few)


def test_without_the_scan_the_error_has_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="relflat data get skulls"):
        skulls.skulls(FEW)


# -- scores ------------------------------------------------------------------------------------------------------


def volumes(count: int, seed: int, share: float = 0.3) -> torch.Tensor:
    return torch.rand(count, 1, 6, 5, 4, generator=torch.Generator().manual_seed(seed)) < share


def test_dice_by_counting():
    one, other = volumes(3, 0), volumes(3, 1)
    one[2], other[2] = False, False
    for found, a, b in zip(skull_metrics.dice(one, other), one[:2], other, strict=False):
        first, second = ({tuple(p) for p in v.nonzero().tolist()} for v in (a, b))
        assert found.item() == pytest.approx(2 * len(first & second) / (len(first) + len(second)))
    assert skull_metrics.dice(one, other)[2] == 1


def test_spread_by_pairs():
    predictions, targets = volumes(5, 0, 0.2), volumes(5, 1)

    def mean(values: torch.Tensor) -> float:
        return float(np.mean([(a != b).sum().item() for a, b in combinations(values, 2)]))

    assert skull_metrics.spread(predictions, targets) == pytest.approx(mean(predictions) / mean(targets))
    assert skull_metrics.spread(predictions[:1].expand(5, -1, -1, -1, -1), targets) == 0
    assert skull_metrics.spread(targets, targets) == pytest.approx(1)
    with pytest.raises(DataError, match="these 2 are all the same"):
        skull_metrics.spread(predictions[:2], targets[:1].expand(2, -1, -1, -1, -1))


def test_hausdorff_distance_of_points():
    one, other = torch.zeros(2, 1, 8, 8, 8, dtype=torch.bool), torch.zeros(2, 1, 8, 8, 8, dtype=torch.bool)
    one[0, 0, 1, 1, 1] = one[0, 0, 4, 1, 1] = True
    other[0, 0, 1, 5, 4] = True
    a, b = (values[0, 0].nonzero().numpy() * skulls.SPACING for values in (one, other))
    expected = max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0])
    found = skull_metrics.hausdorff(one, other)
    assert found[0].item() == pytest.approx(expected)
    assert found[1].item() == pytest.approx(skulls.SPACING * 7 * 3**0.5)  # both empty: the diagonal


def test_implant_is_what_was_added():
    """Half of the hole filled and as much added elsewhere: Dice of the implant is a half, of its piece two thirds."""
    complete = torch.zeros(2, 1, 6, 6, 6, dtype=torch.bool)
    complete[:, :, 0] = True
    complete[1, :, 1] = True
    defective = complete.clone()
    defective[:, :, 0, 0, :4] = False
    prediction = defective.clone()
    prediction[:, :, 0, 0, :2] = True
    prediction[:, :, 5, 5, 4] = prediction[:, :, 5, 3, 2] = True
    found = skull_metrics.scores(prediction, defective, complete)
    assert found["implant_dice"] == pytest.approx(2 * 2 / (4 + 4))
    assert found["implant_piece_dice"] == pytest.approx(2 * 2 / (2 + 4))
    perfect = skull_metrics.scores(complete, defective, complete)
    assert (perfect["dice"], perfect["implant_dice"], perfect["hd"], perfect["spread"]) == (1, 1, 0, 1)


@pytest.mark.data
def test_mean_shape_is_the_best_cut_of_the_mean(few):
    cut = skulls.splits(train_size=None, label_noise=0, seed=0, sizes=few)
    baseline = skull_metrics.mean_shape(cut)
    defective, complete = cut.validation.inputs > 0.5, cut.validation.targets > 0.5

    def quality(shape: torch.Tensor) -> float:
        return skull_metrics.dice(shape & ~defective, complete & ~defective).mean().item()

    mean = cut.train.targets.mean(0)
    assert quality(baseline) == max(quality(mean >= number / 20) for number in range(1, 20))
    prediction = baseline.expand_as(complete)
    assert skull_metrics.scores(prediction, defective, complete)["spread"] == 0


# -- networks ----------------------------------------------------------------------------------------------------


def test_autoencoder_is_the_papers_on_a_smaller_grid():
    torch.manual_seed(0)
    model = Autoencoder()
    assert model.from_latent.weight.shape == (64, 8)
    sides, inputs = [], (torch.rand(2, 1, SIDE, SIDE, SIDE) < 0.1).float()
    for block in [*model.encoder, *model.decoder]:
        block.register_forward_hook(lambda module, args, out: sides.append(out.shape[-1]))
    logits = model(inputs)
    assert logits.shape == inputs.shape
    assert sides == [24, 12, 6, 3, 2, 3, 6, 12, 24, 48]
    torch.testing.assert_close(model(inputs[:1]), logits[:1], rtol=1e-4, atol=1e-5)  # not coupled


def test_completion_never_removes_what_was_given():
    torch.manual_seed(0)
    model, inputs = Completion(), (torch.rand(2, 1, SIDE, SIDE, SIDE) < 0.1).float()
    logits = model(inputs)
    assert (logits[inputs > 0] > 0).all()
    assert (logits[inputs == 0] > 0).float().mean() < 0.05


@pytest.mark.parametrize("loss", [dice_loss(), dice_cross_entropy()])
def test_losses_take_logits(loss):
    target = (torch.rand(1, 1, 4, 4, 4) < 0.5).float()
    assert loss(40 * target - 20, target) < 1e-3 < loss(torch.zeros_like(target), target)


@pytest.mark.data
def test_the_second_linear_layer_can_be_regularised(few):
    """One step with FAM moves all of the network, and kappa is that of the layer in double precision."""
    torch.manual_seed(0)
    cut = skulls.splits(train_size=2, label_noise=0, seed=0, sizes=few)
    inputs, targets = cut.train.inputs[:1].double(), cut.train.targets[:1].double()
    model = Autoencoder((2, 2, 2, 2, 8)).double()
    with torch.no_grad():
        for module in model.decoder.modules():
            if isinstance(module, nn.ConvTranspose3d):
                module.weight.mul_(5)  # else outputs hardly depend on the layer, and differences drown in rounding
            elif isinstance(module, nn.PReLU):
                module.weight.fill_(1)  # differences across a kink see a curvature that derivatives do not
    criterion = FAM(dice_loss(), model, "from_latent", strength=0.1, method="exact", curvature="hessian")
    criterion(model(inputs), targets).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    found = criterion.last["kappa"]
    criterion.close()
    loss, weight, step = dice_loss(), model.from_latent.weight, 1e-3

    def at(change: torch.Tensor) -> float:
        with torch.no_grad():
            moved = {"from_latent.weight": weight + change}
            return loss(torch.func.functional_call(model, moved, inputs), targets).item()

    here = at(torch.zeros_like(weight))
    second = 0.0  # the Laplacian of R -> L(W (I + R)), by central differences
    for row in range(8):
        for column in range(8):
            change = torch.zeros_like(weight)
            change[:, column] = step * weight[:, row].detach()
            second += (at(change) - 2 * here + at(-change)) / step**2
    assert found == pytest.approx(second, rel=1e-4)


@pytest.mark.data
def test_a_run_of_the_task(few, monkeypatch, tmp_path):
    small = {"model": partial(Autoencoder, (2, 2, 2, 2, 8)), "splits": partial(skulls.splits, sizes=few)}
    monkeypatch.setitem(TASKS, "skulls", replace(TASKS["skulls"], **small))
    config = make({"task": "skulls", "epochs": 1, "batch_size": 2})
    result = train(config, tmp_path / "run", tensorboard=False)
    assert set(result["validation"]) == {
        "loss", "dice", "implant_dice", "implant_piece_dice", "hd", "hd95", "spread"
    }  # fmt: skip
    assert result["test"]["dice"] == pytest.approx(result["shifts"]["larger-defects"]["dice"], abs=0.05)
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(history[-1]["kappa"])
