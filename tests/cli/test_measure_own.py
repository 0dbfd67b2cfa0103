"""``relflat measure path/to/file.py:make``: a model of the user's own, at checkpoints, none of which runs code."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from relflat import relative_flatness_by_layer
from relflat.cli import console
from relflat.cli.main import main

MINE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    return model, nn.CrossEntropyLoss(), [(x[:20], y[:20]), (x[20:], y[20:])]

def number():
    return 3

def two():
    return make()[:2]

def swapped():
    return make()[::-1]

def no_loss():
    return make()[0], None, make()[2]

def used_up():
    model, loss, data = make()
    return model, loss, iter(data)

def needs(width):
    return make()

def layer():
    return nn.Linear(6, 3), *make()[1:]

def failing():
    raise KeyError("mine")

def wrong_data():
    model, loss, data = make()
    return model, loss, [(torch.randn(4, 5), torch.zeros(4).long())]
"""


@pytest.fixture
def relflat(capsys, tmp_path, monkeypatch):
    """Run the command in a folder with the user's file; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text(MINE)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(["measure", *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        text = capsys.readouterr()
        return code, text.out, text.err

    return run


def made():
    spec = importlib.util.spec_from_file_location("mine", "mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make()


def scaled(factor: float) -> nn.Module:
    model, _, _ = made()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


def test_the_model_as_it_is_made(relflat) -> None:
    code, out, err = relflat("mine.py:make", "--layer", "*", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    model, loss, data = made()
    want = relative_flatness_by_layer(model, loss, data, layer="*").to_dict()
    assert answer == {"model": "mine.py:make", "measured": [{"checkpoint": None, "layers": want}]}
    assert f"{want['2']['value']:.5g}" in relflat("mine.py:make")[1]


WAYS = {
    "plain.pt": lambda state: torch.save(state, "plain.pt"),
    "trainer.pt": lambda state: torch.save({"epoch": 3, "model_state_dict": state, "lr": 0.1}, "trainer.pt"),
    "lightning.ckpt": lambda state: torch.save(
        {"state_dict": {"loss.weight": torch.ones(3), **{f"net.{k}": v for k, v in state.items()}}}, "lightning.ckpt"
    ),
    "ddp.bin": lambda state: torch.save({f"module.{k}": v for k, v in state.items()}, "ddp.bin"),
    "hub.safetensors": lambda state: save_file(state, "hub.safetensors"),
}


def test_a_sweep_gives_relative_flatness_at_each_checkpoint(relflat) -> None:
    want = {}
    for place, (name, save) in enumerate(WAYS.items()):
        model = scaled(1 + 0.2 * place)
        save(model.state_dict())
        want[name] = relative_flatness_by_layer(model, *made()[1:], layer="*").to_dict()
    code, out, err = relflat("mine.py:make", "--layer", "*", "--json", "--plot", "kappa.svg", "--checkpoint", *WAYS)
    assert (code, err) == (0, "drew kappa.svg\n")
    assert {one["checkpoint"]: one["layers"] for one in json.loads(out)["measured"]} == want
    assert all(f">{name}<" in Path("kappa.svg").read_text() for name in WAYS)
    code, out, err = relflat("mine.py:make", "--layer", "*", "--checkpoint", *WAYS)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == list(WAYS)
    for row in rows:
        kappas = [want[row[0]][layer]["value"] for layer in ("0", "2")]
        assert [float(cell) for cell in row[1:4]] == pytest.approx([*kappas, sum(kappas)], rel=1e-4)


def test_a_model_that_is_one_layer_has_a_name(relflat) -> None:
    assert relflat("mine.py:layer")[1].splitlines()[1].startswith("(the model)")


def test_options_reach_the_measurement(relflat) -> None:
    ways = ("--layer", "0", "--curvature", "ggn", "--method", "probe", "--probes", "3", "--seed", "5")
    model, loss, data = made()
    want = relative_flatness_by_layer(model, loss, data, layer="0", curvature="ggn", method="probe", probes=3, seed=5)
    found = json.loads(relflat("mine.py:make", *ways, "--json")[1])["measured"][0]["layers"]["0"]
    assert found == want["0"].to_dict()


def test_a_bar_counts_batches_of_each_pass_on_a_terminal_alone(relflat, monkeypatch) -> None:
    relflat("mine.py:make")  # which writes the file
    model, loss, data = made()
    with console.watching() as watched:
        assert watched(data) is data
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True)
    with console.watching() as watched:
        shown = watched(data, " a.pt")
        (task,) = shown.bar.tasks
        counted = [task.completed for _ in shown]
        assert (counted, task.completed, task.total) == ([0, 1], 2, 2)
        found = relative_flatness_by_layer(model, loss, shown, layer="*", method="xtrace", probes=4)
        assert (task.completed, task.description) == (2, " a.pt")
        assert watched(data[0]) is data[0]
    unseen = relative_flatness_by_layer(model, loss, data, layer="*", method="xtrace", probes=4)
    assert [float(flat) for flat in found.values()] == [float(flat) for flat in unseen.values()]


class Bomb:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("boom",)


def test_nothing_is_unpickled_unless_it_is_trusted(relflat) -> None:
    torch.save({"state_dict": made()[0].state_dict(), "extra": Bomb()}, "bomb.pt")
    code, out, err = relflat("mine.py:make", "--checkpoint", "bomb.pt")
    assert (code, out) == (2, "")
    assert "bomb.pt holds more than tensors" in err
    assert "--unsafe" in err
    assert not Path("boom").exists()
    assert relflat("mine.py:make", "--checkpoint", "bomb.pt", "--unsafe")[0] == 0
    assert Path("boom").exists()


def test_a_whole_model_that_is_trusted(relflat) -> None:
    torch.save(made()[0], "model.pt")
    assert "--unsafe" in relflat("mine.py:make", "--checkpoint", "model.pt")[2]
    assert relflat("mine.py:make", "--checkpoint", "model.pt", "--unsafe")[0] == 0


def _spoil(change) -> dict[str, torch.Tensor]:
    state = made()[0].state_dict()
    change(state)
    return state


SPOILT = {
    "missing": (lambda s: s.pop("2.bias"), "'2.bias' of the model are missing in it"),
    "other": (lambda s: s.update(head=torch.ones(2)), "'head' in it are not in the model"),
    "shape": (
        lambda s: s.update({"2.weight": torch.ones(4, 8)}),
        "'2.weight' is (4, 8) in it and (3, 8) in the model",
    ),
    "empty": (lambda s: s.clear(), "holds no weights by name"),
}


@pytest.mark.parametrize(("change", "message"), SPOILT.values(), ids=SPOILT)
def test_weights_that_are_not_the_models(relflat, change, message) -> None:
    torch.save(_spoil(change), "a.pt")
    code, out, err = relflat("mine.py:make", "--checkpoint", "a.pt")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.py"], "name the function in it that returns (model, loss, data): mine.py:make"),
        (["mine.py:mke"], "did you mean 'make'? Known: failing, layer, make, needs, no_loss, number, swapped, two,"),
        (["mine.py:make", "a.pt", "--json"], "one run or function; weights go with --checkpoint a.pt"),
        (["none.py:make"], "none.py: no such file"),
        (["mine:make"], "mine:make is not a run"),
        (["mine"], "a function of yours that returns (model, loss, data): path/to/file.py:make"),
        (["mine.py:needs"], "mine.py:needs is called without arguments, and it needs width"),
        (["syntax.py:make"], "mend it: File"),
        (["mine.py:make", "--checkpoint"], "--checkpoint names no file"),
        (["mine.py:number"], "it returned int"),
        (["mine.py:two"], "it returned tuple of length 2"),
        (["mine.py:swapped"], "the first is list, not a torch.nn.Module"),
        (["mine.py:no_loss"], "the second is NoneType, not a function"),
        (["mine.py:failing"], "KeyError: 'mine'"),
        (["mine.py:wrong_data"], "cannot take the inputs of a batch"),
        (["mine.py:used_up", "--checkpoint", "cut.pt", "cut.safetensors"], "return a list or loader"),
        (["mine.py:make", "--checkpoint", "none.pt"], "none.pt: no such file"),
        (["not_there.py:make", "--checkpoint", "none.pt"], "none.pt: no such file"),  # before anything is made
        (["mine.py:make", "--checkpoint", "."], "it is a folder"),
        (["mine.py:make", "--checkpoint", "mine.py"], "no checkpoint that torch.load can read"),
        (["mine.py:make", "--checkpoint", "cut.pt"], "no checkpoint that torch.load can read"),
        (["mine.py:make", "--checkpoint", "cut.safetensors"], "Cannot read the checkpoint cut.safetensors"),
        (["mine.py:make", "--layer", "fc"], "no layer named 'fc'"),
        (["mine.py:make", "--plot", "x.gif"], "choose one of .svg, .png, .pdf"),
        (["mine.py:make", "--plot", "none/x.svg"], "there is no folder none"),
        (["mine.py:make", "--samples", "3"], "--samples is for runs"),
        (["runs/x", "--checkpoint", "a.pt"], "path/to/file.py:make, not runs/x"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_said(relflat, arguments, message) -> None:
    Path("syntax.py").write_text("def make(:")
    Path("cut.pt").write_bytes(b"PK\x03\x04half")
    Path("cut.safetensors").write_bytes(b"half")
    code, out, err = relflat(*arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback (most" not in err
