"""Inputs and outputs of every form: mappings, tuples, dataclasses, keywords, models inside models."""

from dataclasses import dataclass
from typing import Any

import torch
from architectures import CE, CLASSES, IN, Family, Net
from checks import EachArchitecture
from torch import Tensor, nn
from torch.func import functional_call

architecture = Family()


@architecture("fc", "head", loss=lambda z, y: CE(z["scores"], y) + z["aux"].exp().mean())
def dict_outputs() -> nn.Module:
    def run(m: Any, x: Tensor) -> dict[str, Tensor]:
        h = m.fc(x).tanh()
        return {"aux": h.sum(1), "scores": m.head(h)}

    return Net(run, fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES))


@architecture("fc", "head", loss=lambda z, y: CE(z[1][0], y))
def nested_tuple_outputs() -> nn.Module:
    return Net(
        lambda m, x: (x, [m.head(m.fc(x).tanh()), None], "meta"), fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES)
    )


@dataclass
class Prediction:
    logits: Tensor
    hidden: Tensor


@architecture("fc", "head", loss=lambda z, y: CE(z.logits, y))
def dataclass_outputs() -> nn.Module:
    def run(m: Any, x: Tensor) -> Prediction:
        h = m.fc(x).tanh()
        return Prediction(m.head(h), h)

    return Net(run, fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES))


@architecture("fc", call=lambda m, x: m({"left": x, "right": x.flip(1)}, scale=torch.tensor(2.0), mask=None, power=2))
def dict_inputs_and_keywords() -> nn.Module:
    def run(m: Any, batch: dict[str, Tensor], *, scale: Tensor, mask: None, power: int) -> Tensor:
        return m.head(m.fc(batch["left"] * batch["right"] ** power * scale).tanh())

    return Net(run, fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES))


@dataclass
class Example:
    values: Tensor
    note: str


@architecture("fc", call=lambda m, x: m(Example(x, "no tensor among the arguments")))
def forward_takes_a_dataclass() -> nn.Module:
    return Net(lambda m, e: m.head(m.fc(e.values).tanh()), fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES))


@architecture("fc", "head")
def layers_called_with_a_keyword() -> nn.Module:
    return Net(lambda m, x: m.head(input=m.fc(input=x).tanh()), fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES))


@architecture("fc", "head", x=lambda: torch.randn(IN), y=lambda: torch.tensor(1))
def no_batch_dimension() -> nn.Module:
    return Net(lambda m, x: m.head(m.fc(x).tanh()), fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES))


@architecture("conv", x=lambda: torch.randn(1, 3, 3), y=lambda: torch.tensor(1))
def convolution_without_batch() -> nn.Module:
    return Net(lambda m, x: m.head(m.conv(x).tanh().flatten()), conv=nn.Conv2d(1, 2, 2), head=nn.Linear(8, CLASSES))


class Classifier(nn.Sequential):
    """A subclass of Sequential with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = part(x)
        return x - x.logsumexp(1, keepdim=True)


@architecture("0", "2")
def sequential_subclass() -> nn.Module:
    return Classifier(nn.Linear(IN, 3), nn.Softplus(), nn.Linear(3, CLASSES))


@architecture("inner.body.0", "inner.tail")
def model_inside_a_model() -> nn.Module:
    inner = Net(lambda m, x: m.tail(m.body(x)), body=nn.Sequential(nn.Linear(IN, 3), nn.Tanh()), tail=nn.Linear(3, 2))
    outer = Net(lambda m, x: m.inner(x).tanh(), inner=inner)
    return Net(lambda m, x: m.head(m.outer(x)), outer=outer, inner=inner, head=nn.Linear(2, CLASSES))


@architecture(
    "2",
    call=lambda m, x: functional_call(m, {n: 1.5 * p for n, p in m.named_parameters()}, (x,)),
    weight=lambda m: 1.5 * m[2].weight,
)
def functional_call_on_top() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, 3), nn.Tanh(), nn.Linear(3, CLASSES))


class TestInputsAndOutputs(EachArchitecture):
    family = architecture
