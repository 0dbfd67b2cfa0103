"""Residual, dense, gated, routed and U-shaped networks, in-place operations and memory formats."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import CE, CLASSES, IN, Family, N, Net, image
from checks import EachArchitecture
from torch import Tensor, nn

from relflat import reference, relative_flatness

architecture = Family()


@architecture("one", "two")
def residual_blocks() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = x + m.one(x).tanh()
        x = x + m.two(x).tanh()
        return m.head(x)

    return Net(run, one=nn.Linear(IN, IN), two=nn.Linear(IN, IN), head=nn.Linear(IN, CLASSES))


@architecture("one", "two", x=image(1, 3))
def dense_blocks() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([x, m.one(x).tanh()], 1)
        x = torch.cat([x, m.two(x).tanh()], 1)
        return m.head(x.mean(2))

    return Net(run, one=nn.Conv1d(1, 2, 3, padding=1), two=nn.Conv1d(3, 2, 1), head=nn.Linear(5, CLASSES))


@architecture("conv", "squeeze", x=image(1, 3, 2))
def squeeze_and_excite() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        gate = m.excite(m.squeeze(x.mean((2, 3), keepdim=True)).tanh()).sigmoid()
        return m.head((x * gate).tanh().flatten(1))

    return Net(
        run,
        conv=nn.Conv2d(1, 2, 2),
        squeeze=nn.Conv2d(2, 1, 1),
        excite=nn.Conv2d(1, 2, 1),
        head=nn.Linear(4, CLASSES),
    )


@architecture("depth", "point", x=image(2, 2, 3))
def depthwise_separable() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.point(m.depth(x).tanh()).tanh().mean((2, 3))),
        depth=nn.Conv2d(2, 4, 2, groups=2, padding=(1, 0)),
        point=nn.Conv2d(4, 2, 1),
        head=nn.Linear(2, CLASSES),
    )


@architecture("down", "up", "out", x=image(1, 4), y=lambda: torch.randint(2, (N, 4)))
def u_net_with_a_skip() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        low = m.down(x).tanh()
        return m.out(torch.cat([x, m.up(F.interpolate(low, scale_factor=2, mode="linear")).tanh()], 1))

    return Net(run, down=nn.Conv1d(1, 2, 2, stride=2), up=nn.Conv1d(2, 1, 3, padding=1), out=nn.Conv1d(2, 2, 1))


@architecture("experts.0", "experts.1", "router")
def mixture_of_experts() -> nn.Module:
    """Each expert sees the samples routed to it: batches of other sizes than the model's."""

    def run(m: Any, x: Tensor) -> Tensor:
        gates = m.router(x).softmax(1)
        best = gates.argmax(1)
        z = x.new_zeros(x.shape[0], 3)
        for i, expert in enumerate(m.experts):
            mine = (best == i).nonzero().squeeze(1)
            z = z.index_add(0, mine, gates[mine, i, None] * expert(x[mine]).tanh())
        return m.head(z)

    router = nn.Linear(IN, 2)
    return Net(
        run, router=router, experts=nn.ModuleList([nn.Linear(IN, 3) for _ in range(2)]), head=nn.Linear(3, CLASSES)
    )


@architecture("fc.weight")
def bilinear() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.fc(x[:, :2], x[:, 2:]).tanh()), fc=nn.Bilinear(2, 2, 2), head=nn.Linear(2, CLASSES)
    )


@architecture("fc", "mid")
def in_place_operations_everywhere() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x).mul_(2).add_(1).tanh_()
        z = m.mid(h)
        z += h
        return m.head(F.elu(z, inplace=True)).sub_(0.5)

    return Net(run, fc=nn.Linear(IN, 3), mid=nn.Linear(3, 3), head=nn.Linear(3, CLASSES))


@architecture("table")
def a_parameter_of_the_model_itself() -> nn.Module:
    net = Net(
        lambda m, x: m.head(torch.einsum("nm,dm->nd", x, m.table).tanh() @ m.table), head=nn.Linear(IN, CLASSES)
    )
    net.table = nn.Parameter(torch.randn(2, IN))
    return net


@architecture("conv", "last", x=lambda: torch.randn(N, 2, 3, 3).contiguous(memory_format=torch.channels_last))
def channels_last() -> nn.Module:
    net = Net(
        lambda m, x: m.head(m.last(m.conv(x).tanh()).tanh().flatten(1)),
        conv=nn.Conv2d(2, 2, 2),
        last=nn.Conv2d(2, 1, 2, padding=1),
        head=nn.Linear(9, CLASSES),
    )
    return net.to(memory_format=torch.channels_last)


class TestTopologies(EachArchitecture):
    family = architecture


def test_convolution_average_pool_linear_on_paper() -> None:
    """Taleghani et al.: logits ``V mean_t (W phi_t + b) + c`` see the pooled features alone.

    With ``psi_i = mean_t phi_it`` they are ``V W psi_i + ...``, so ``H_z,i`` in the pooled output is ``V' A_i V``
    and ``kappa = mean_i ||psi_i||^2 Tr(W W' V' A_i V)``, ``A_i = diag p_i - p_i p_i'``.
    """
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(2, 3, 2).double(), nn.Linear(3, CLASSES).double()
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    x, y = torch.randn(N, 2, 3, 4).double(), torch.tensor([0, 2, 1, 1, 0])
    psi = F.unfold(x, 2).mean(2)
    W, V, p = conv.weight.flatten(1), linear.weight, model(x).softmax(1)
    A = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    on_paper = (psi.square().sum(1) * torch.einsum("de,ce,ncb,bd->n", W @ W.T, V, A, V)).mean().item()
    loss, W = reference.at_layer(model, CE, x, y, "0")
    assert reference.kappa(loss, W).item() == pytest.approx(on_paper, rel=1e-9)
    for curvature in ("hessian", "ggn"):
        flat = relative_flatness(model, CE, (x, y), layer="0", method="exact", curvature=curvature)
        assert flat.value == pytest.approx(on_paper, rel=1e-9)


def test_a_convolution_unrolled_to_a_dense_layer_has_another_kappa() -> None:
    """The view of the paper's code: every weight of the Toeplitz matrix is free, so zeros have curvature too."""
    torch.manual_seed(0)
    conv, linear = nn.Conv1d(2, 3, 2).double(), nn.Linear(9, CLASSES).double()
    model = nn.Sequential(conv, nn.Flatten(), nn.Tanh(), linear)
    x, y = torch.randn(N, 2, 4).double(), torch.tensor([0, 2, 1, 1, 0])
    dense = nn.Linear(8, 9).double()
    with torch.no_grad():
        dense.bias.copy_(conv.bias.repeat_interleave(3))
        basis = torch.eye(8).double().reshape(8, 2, 4)
        dense.weight.copy_((F.conv1d(basis, conv.weight)).flatten(1).T)
    unrolled = nn.Sequential(nn.Flatten(), dense, nn.Tanh(), linear)
    torch.testing.assert_close(unrolled(x), model(x), rtol=1e-12, atol=1e-12)
    values = []
    for net, layer in ((model, "0"), (unrolled, "1")):
        want = reference.kappa(*reference.at_layer(net, CE, x, y, layer)).item()
        flat = relative_flatness(net, CE, (x, y), layer=layer, method="exact")
        assert flat.value == pytest.approx(want, rel=1e-9)
        values.append(want)
    assert abs(values[0] - values[1]) > 0.1 * abs(values[0])
