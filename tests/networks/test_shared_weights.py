"""Weights used more than once: tied, recurrent, in parallel, shared trunks and replicas."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import CE, CLASSES, IN, Family, N, Net
from checks import EachArchitecture
from dense import Dense
from torch import Tensor, nn
from torch.nn.utils import parametrize

from relflat import LayerError, reference, relative_flatness
from unbounded import FAM

architecture = Family()


@architecture("a", "b", "a.weight")
def tied_between_two_modules() -> nn.Module:
    a, b = nn.Linear(IN, IN), nn.Linear(IN, IN)
    b.weight = a.weight
    return Net(lambda m, x: m.head(m.b(m.a(x).tanh()).tanh()), a=a, b=b, head=nn.Linear(IN, CLASSES))


@architecture("decode", "embed", "embed.weight", x=lambda: torch.tensor([[0, 3], [1, 1], [2, 0], [3, 3], [1, 2]]))
def embedding_tied_to_the_output() -> nn.Module:
    embed, decode = nn.Embedding(4, CLASSES), nn.Linear(CLASSES, 4, bias=False)
    decode.weight = embed.weight
    return Net(lambda m, x: m.decode(m.embed(x).tanh().mean(1)), embed=embed, decode=decode)


@architecture("fc")
def called_on_parts_of_the_batch() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cat([m.fc(x[:2]), m.fc(x[2:]).sin()]).tanh())

    return Net(run, fc=nn.Linear(IN, IN), head=nn.Linear(IN, CLASSES))


@architecture("fc")
def called_twice_in_a_chain() -> nn.Module:
    return Net(lambda m, x: m.head(m.fc(m.fc(x).tanh()).tanh()), fc=nn.Linear(IN, IN), head=nn.Linear(IN, CLASSES))


@architecture("fc")
def called_three_times_in_a_chain() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + m.fc(x).sigmoid()
        return m.head(x)

    return Net(run, fc=nn.Linear(IN, IN), head=nn.Linear(IN, CLASSES))


@architecture("fc", "head")
def called_twice_in_parallel() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.fc(x).tanh() * m.fc(x.flip(1)).sigmoid()),
        fc=nn.Linear(IN, 3),
        head=nn.Linear(3, CLASSES),
    )


@architecture("fc")
def called_on_batches_of_two_sizes() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.fc(x).tanh() + m.fc(x[:2]).tanh().mean(0)),
        fc=nn.Linear(IN, 3),
        head=nn.Linear(3, CLASSES),
    )


@architecture("fc")
def called_on_vectors_and_on_tokens() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x.square(), x.flip(1)], dim=1)
        return m.head(m.fc(x).tanh() + m.fc(tokens).tanh().prod(1))

    return Net(run, fc=nn.Linear(IN, 2), head=nn.Linear(2, CLASSES))


@architecture("trunk.0", "one", "two", loss=lambda z, y: CE(z[0], y) + 0.3 * z[1].square().mean())
def two_heads_on_a_shared_trunk() -> nn.Module:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.trunk(x)
        return m.one(h), m.two(h).tanh()

    return Net(run, trunk=nn.Sequential(nn.Linear(IN, 3), nn.Tanh()), one=nn.Linear(3, CLASSES), two=nn.Linear(3, 2))


@architecture(
    "net.0",
    "net.2",
    call=lambda m, x: (m(x), m(x.flip(0) + 1)),
    loss=lambda z, y: F.cosine_similarity(*z).exp().mean(),
)
def siamese_with_two_forwards() -> nn.Module:
    return Net(lambda m, x: m.net(x), net=nn.Sequential(nn.Linear(IN, 3), nn.Tanh(), nn.Linear(3, 2)))


@architecture("fc", "head")
def replicas_that_share_their_parameters() -> nn.Module:
    fc = nn.Linear(IN, 3)
    replica = copy.deepcopy(fc)
    replica.weight, replica.bias = fc.weight, fc.bias

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cat([m.fc(x[:2]), m.replica(x[2:])]).tanh())

    return Net(run, fc=fc, replica=replica, head=nn.Linear(3, CLASSES))


class TestSharedWeights(EachArchitecture):
    family = architecture


class TestTiedAndRecurrent:
    """Called in a chain and tied to another module: kappa of the parameter, wherever it is used."""

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        step, other = nn.Linear(IN, IN), nn.Linear(IN, IN)
        other.weight = step.weight

        def run(m: Any, x: Tensor) -> Tensor:
            return m.head(m.other(m.step(m.step(x).tanh()).tanh()).tanh())

        return Net(run, step=step, other=other, head=nn.Linear(IN, CLASSES)).double()

    @pytest.mark.parametrize("curvature", ["hessian", "ggn"])
    @pytest.mark.parametrize("loss_fn", [CE, lambda z, y: F.nll_loss(z.log_softmax(1), y)])
    def test_equals_the_reference(self, curvature: str, loss_fn: Any) -> None:
        net, x, y = self.network(), torch.randn(N, IN).double(), torch.tensor([0, 2, 1, 1, 0])
        outputs, W = reference.outputs_at_layer(net, x, "step")
        if curvature == "hessian":
            want = reference.kappa(lambda V: loss_fn(outputs(V), y), W).item()
        else:
            want = reference.kappa_ggn(outputs, lambda z: loss_fn(z, y), W).item()
        own = Dense(self.network(), "step", lambda m: m(x))
        loss_of = lambda z: loss_fn(z, y)
        alone = (own.kappa(loss_of) if curvature == "hessian" else own.kappa_ggn(loss_of)).item()
        assert abs(alone - want) > 0.1 * abs(want)  # the uses in this layer alone are something else
        options: dict[str, Any] = {"layer": "step", "curvature": curvature}
        flat = relative_flatness(net, loss_fn, (x, y), method="exact", **options)
        assert flat.value == pytest.approx(want, rel=1e-9)
        assert flat.method == "exact(weight)"
        flat = relative_flatness(net, loss_fn, (x, y), method="xtrace", probes=IN * IN + 4, **options)
        assert flat.value == pytest.approx(want, rel=1e-9)
        flat = relative_flatness(net, loss_fn, (x, y), method="probe", probes=400, **options)
        assert abs(flat.value - want) <= 4 * flat.stderr
        with FAM(loss_fn, net, "step", strength=1.0, curvature=curvature, method="exact") as fam:
            fam(net(x), y)
        assert fam.last["kappa"] == pytest.approx(want, rel=1e-9)

    def test_a_parametrization_does_not_hide_the_tie(self) -> None:
        """An effective weight cannot be moved in both places as one, and counting one of them would be wrong."""

        class Doubled(nn.Module):
            def forward(self, w: Tensor) -> Tensor:
                return 2 * w

        def value(parametrization: nn.Module | None) -> float:
            net = self.network()
            if parametrization is not None:
                for module in (net.step, net.other):
                    parametrize.register_parametrization(module, "weight", parametrization)
                net.other.parametrizations.weight.original = net.step.parametrizations.weight.original
            return relative_flatness(net, CE, (x, y), layer="step", curvature="ggn", method="exact").value

        x, y = torch.randn(N, IN).double(), torch.tensor([0, 2, 1, 1, 0])
        assert value(nn.Identity()) == pytest.approx(value(None), rel=1e-9)
        with pytest.raises(LayerError, match="computed from other parameters"):
            value(Doubled())
