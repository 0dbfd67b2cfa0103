"""What ``make test-gpu`` relies on: where tensors of tests and of the library are made, and what it runs."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import device

GPU = Path(__file__).parents[1] / "gpu.py"


@pytest.fixture
def elsewhere(monkeypatch):
    """Tests run on the device meta."""
    monkeypatch.setattr(device, "DEVICE", torch.device("meta"))
    for name in ("zeros", "randn", "from_numpy", "randint", "empty"):
        monkeypatch.setattr(torch, name, device.made(getattr(torch, name), moved=name in device.DRAWING))
    for name in device.FILLING:
        monkeypatch.setattr(torch.Tensor, name, device.filled(getattr(torch.Tensor, name)))


def kind(code: str, name: str = "test_x") -> str:
    """The device of what an expression of a module makes."""
    given = {"__name__": name, "torch": torch, "nn": nn, "g": torch.Generator()}
    return eval(code, given).device.type


@pytest.mark.parametrize(
    ("code", "name", "at"),
    [
        ("torch.zeros(2)", "test_x", "meta"),
        ("torch.zeros(2)", "relflat.rng", "cpu"),
        ("torch.zeros(2, device='cpu')", "test_x", "cpu"),
        ("torch.randn(2, generator=g)", "test_x", "meta"),
        ("torch.randn(2, requires_grad=True)", "test_x", "meta"),
        ("torch.randint(3, (2,), generator=g)", "relflat.rng", "cpu"),
        ("torch.from_numpy(torch.ones(2, device='cpu').numpy())", "test_x", "meta"),
        ("nn.Linear(2, 2).weight", "relflat.reference", "meta"),
        ("nn.init.normal_(nn.Linear(2, 2).weight)", "test_x", "meta"),
    ],
)
def test_tensors_of_tests_and_layers_are_made_on_the_device_and_those_of_the_library_are_not(
    elsewhere, code, name, at
):
    assert kind(code, name) == at


def test_numbers_are_those_of_the_cpu(monkeypatch):
    expected = [torch.randn(3, generator=torch.Generator().manual_seed(1)), nn.Linear(3, 2)]
    torch.manual_seed(0)
    expected[1].reset_parameters()
    drawn, fill = device.made(torch.randn, moved=True), device.filled(torch.Tensor.uniform_)
    monkeypatch.setattr(device, "DEVICE", torch.device("cpu", 0))  # another one by its name, with numbers to see
    assert torch.equal(drawn(3, generator=torch.Generator().manual_seed(1)), expected[0])
    monkeypatch.setattr(torch.Tensor, "uniform_", fill)
    torch.manual_seed(0)
    assert torch.equal(nn.Linear(3, 2).weight, expected[1].weight)


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(str(GPU), run_name="__main__")
    assert capsys.readouterr().out.startswith("make test-gpu: skipped, as torch ")


def test_the_lane_and_what_is_left_out_of_it_exist():
    names = runpy.run_path(str(GPU))
    assert all((names["ROOT"] / path).is_dir() for path in names["LANE"])
    assert all((names["ROOT"] / path).is_file() and path.startswith(names["LANE"]) for path in names["LEFT_OUT"])
