"""What stands under every algorithm, and what a trained network is tested on besides."""

import pytest
import torch
from torch import nn

from relflat.errors import ConfigError
from relflat.lab.data.corrupt import CORRUPTIONS, corruptions
from relflat.lab.train import store
from relflat.lab.train.config import make
from relflat.lab.train.loop import train
from relflat.lab.train.session import build

SHORT = {"task": "digits", "epochs": 1, "train_size": 100}


def trained(steps=3, **values):
    """The weights after some steps on real digits, and the criterion."""
    session = build(make({**SHORT, **values}))
    session.training()
    session.order.epoch = 0
    for _, (inputs, targets) in zip(range(steps), session.loader, strict=False):
        session.config.settings.step(session.learner, inputs, targets)
    session.close()
    return torch.cat([weight.detach().flatten() for weight in session.model.parameters()]), session.learner.criterion


@pytest.mark.parametrize(
    ("recipe", "same_as", "unlike"),
    [
        ({"recipe_smoothing": 0.2}, {"algorithm": "smoothing", "smoothing": 0.2}, {}),
        ({"recipe_dropout": 0.2}, {"algorithm": "dropout", "rate": 0.2}, {}),
        ({"recipe_augment": "shift"}, {}, {"recipe_augment": "none"}),  # what digits does by itself
        ({"recipe_augment": "crop-flip"}, {"recipe_augment": "crop-flip"}, {}),
    ],
)
def test_a_recipe_under_plain_is_what_the_algorithm_of_its_name_does(recipe, same_as, unlike):
    weights, _ = trained(**recipe)
    assert torch.equal(weights, trained(**same_as)[0])
    assert not torch.equal(weights, trained(**unlike)[0])


def test_fam_over_a_recipe_knows_its_loss():
    """Label smoothing and dropout leave the closed form of the output layer as it is."""
    recipe = {"recipe_smoothing": 0.2, "recipe_dropout": 0.1}
    _, fam = trained(1, algorithm="fam", strength=0.1, **recipe)
    assert fam.last["method"].startswith("closed_form")
    assert fam.loss_fn.label_smoothing == 0.2
    assert type(fam.loss_fn) is nn.CrossEntropyLoss


def test_a_recipe_is_in_the_hash_of_a_run_only_where_there_is_one(tmp_path):
    plain, under = make(SHORT), make({**SHORT, "recipe_smoothing": 0.1})
    assert make({**SHORT, "recipe_smoothing": 0.0, "recipe_augment": "task"}).digest == plain.digest
    assert not any(key.startswith("recipe") for key in plain.flat())
    assert under.digest != plain.digest
    assert make(under.flat()) == under
    store.write_json(tmp_path / store.CONFIG, {"schema": 3, **under.flat()})
    assert store.config_of(tmp_path) == under


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "smoothing", "recipe_smoothing": 0.1}, "algorithm 'smoothing' is that already"),
        ({"algorithm": "dropout", "recipe_dropout": 0.1}, "algorithm 'dropout' is that already"),
        ({"recipe_augment": "flip"}, "Unknown recipe_augment 'flip'"),
        ({"task": "addition", "train_size": None, "recipe_augment": "shift"}, "is for pictures with class labels"),
    ],
)
def test_a_recipe_that_makes_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        build(make({**SHORT, **values}))


def test_a_tested_run_says_what_corruptions_leave(tmp_path):
    result = train(make(SHORT), tmp_path / "digits", tensorboard=False)
    assert {name: len(found) for name, found in result["corrupted"].items()} == dict.fromkeys(CORRUPTIONS, 2)
    assert all(0 <= each["accuracy"] <= 1 for found in result["corrupted"].values() for each in found)
    session = build(make(SHORT))
    session.model.load_state_dict(trained_weights(tmp_path / "digits"))
    test = session.splits.test()
    half = test.inputs.mean((2, 3), keepdim=True) * 0.5 + test.inputs * 0.5
    with torch.no_grad():
        right = (session.model.eval()(half).argmax(1) == test.targets).double().mean().item()
    assert result["corrupted"]["contrast"][0]["accuracy"] == pytest.approx(right)
    other = {"task": "addition", "epochs": 1}
    assert train(make(other), tmp_path / "sums", tensorboard=False)["corrupted"] == {}
    assert "corrupted" not in train(make(SHORT), tmp_path / "untested", test=False, tensorboard=False)


def trained_weights(folder):
    from safetensors.torch import load_file

    return load_file(next(folder.glob("checkpoint-*")) / "model.safetensors")


def test_corruptions_do_what_they_say():
    pictures = torch.rand(200, 3, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 3
    found = {}
    for name, changed in corruptions(pictures):
        assert changed.shape == pictures.shape
        found.setdefault(name, []).append(changed)
    for name, severities in found.items():
        strong, mild = ((pictures - changed).square().mean() for changed in reversed(severities))
        assert 0 < mild < strong or name == "shift", (
            name
        )  # to pixels that know nothing of each other all shifts are one
    for changed, share in zip(found["noise"], (0.3, 0.6), strict=True):
        assert float((changed - pictures).std() / pictures.std()) == pytest.approx(share, rel=0.01)
    for changed, pixels in zip(found["shift"], (2, 5), strict=True):
        assert torch.equal(changed[..., pixels:, pixels:], pictures[..., :-pixels, :-pixels])
        assert torch.equal(changed[..., 0, 0], pictures[..., 0, 0])
    flat = torch.full((2, 1, 8, 8), 0.7)
    assert all(torch.allclose(changed, flat, atol=1e-6) for name, changed in corruptions(flat) if name != "noise")
    again = dict(corruptions(pictures))
    assert all(torch.equal(again[name], found[name][-1]) for name in found)
    point = torch.zeros(1, 1, 27, 27)
    point[..., 13, 13] = 1.0
    place = torch.arange(27.0) - 13
    for changed, share in zip([c for n, c in corruptions(point) if n == "blur"], (0.025, 0.05), strict=True):
        assert float(changed.sum()) == pytest.approx(1.0, rel=1e-5)
        spread = float((changed[0, 0].sum(0) * place.square()).sum()) ** 0.5
        assert spread == pytest.approx(share * 27, rel=0.1)  # cut at three deviations, taken at whole pixels
