"""Deliberately awkward networks, one table: value, probes and gradients against Definition 3; nothing disturbed."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import Dense
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from relflat import FAM, LayerError, reference, relative_flatness

VALUE, GRADIENT = 1e-9, 1e-7
N, IN, CLASSES = 5, 4, 3
CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings("ignore:kappa of layer")
Loss = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Some parts and a forward pass written as a function of them."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


@dataclass(frozen=True)
class Architecture:
    """One awkward network.

    Attributes:
        build: makes it (with the global seed set).
        layers: the layers and parameters whose kappa is asked for.
        call: ``(model, x) -> outputs``.
        x: makes the data.
        y: the targets.
        loss: ``(outputs, targets) -> scalar``.
        weight: the layer's weight, where that is not in the layer.
        dtype: what it is cast to.
        precision: relative error of its arithmetic; 0 for float64.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]
    call: Callable[[Any, Any], Any] = lambda model, x: model(x)
    x: Callable[[], Any] = lambda: torch.randn(N, IN)
    y: Callable[[], Any] = lambda: torch.tensor([0, 2, 1, 1, 0])
    loss: Loss = CE
    weight: Callable[[Any], Tensor] | None = None
    dtype: torch.dtype | None = torch.float64
    precision: float = 0.0


TABLE: list[Architecture] = []


def architecture(
    *layers: str, **options: Any
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def enter(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        TABLE.append(Architecture(build.__name__, build, layers, **options))
        return build

    return enter


def image(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape)


# -- sharing -------------------------------------------------------------------------------------------------


@architecture("a", "b", "a.weight")
def tied_between_two_modules() -> nn.Module:
    a, b = nn.Linear(IN, IN), nn.Linear(IN, IN)
    b.weight = a.weight
    return Net(lambda m, x: m.head(m.b(m.a(x).tanh()).tanh()), a=a, b=b, head=nn.Linear(IN, CLASSES))


@architecture(
    "decode", "embed", "embed.weight", x=lambda: torch.tensor([[0, 3], [1, 1], [2, 0], [3, 3], [1, 2]])
)
def embedding_tied_to_the_output() -> nn.Module:
    embed, decode = nn.Embedding(4, CLASSES), nn.Linear(CLASSES, 4, bias=False)
    decode.weight = embed.weight
    return Net(lambda m, x: m.decode(m.embed(x).tanh().mean(1)), embed=embed, decode=decode)


@architecture("fc")
def called_twice_in_a_chain() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.fc(m.fc(x).tanh()).tanh()), fc=nn.Linear(IN, IN), head=nn.Linear(IN, CLASSES)
    )


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

    return Net(
        run, trunk=nn.Sequential(nn.Linear(IN, 3), nn.Tanh()), one=nn.Linear(3, CLASSES), two=nn.Linear(3, 2)
    )


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


# -- inputs and outputs --------------------------------------------------------------------------------------


@architecture("fc", "head", loss=lambda z, y: CE(z["scores"], y) + z["aux"].exp().mean())
def dict_outputs() -> nn.Module:
    def run(m: Any, x: Tensor) -> dict[str, Tensor]:
        h = m.fc(x).tanh()
        return {"aux": h.sum(1), "scores": m.head(h)}

    return Net(run, fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES))


@architecture("fc", "head", loss=lambda z, y: CE(z[1][0], y))
def nested_tuple_outputs() -> nn.Module:
    return Net(
        lambda m, x: (x, [m.head(m.fc(x).tanh()), None], "meta"),
        fc=nn.Linear(IN, 3),
        head=nn.Linear(3, CLASSES),
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


@architecture(
    "fc", call=lambda m, x: m({"left": x, "right": x.flip(1)}, scale=torch.tensor(2.0), mask=None, power=2)
)
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
    return Net(
        lambda m, x: m.head(input=m.fc(input=x).tanh()), fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES)
    )


@architecture("fc", "head", x=lambda: torch.randn(IN), y=lambda: torch.tensor(1))
def no_batch_dimension() -> nn.Module:
    return Net(lambda m, x: m.head(m.fc(x).tanh()), fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES))


@architecture("conv", x=lambda: torch.randn(1, 3, 3), y=lambda: torch.tensor(1))
def convolution_without_batch() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.conv(x).tanh().flatten()), conv=nn.Conv2d(1, 2, 2), head=nn.Linear(8, CLASSES)
    )


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
    inner = Net(
        lambda m, x: m.tail(m.body(x)), body=nn.Sequential(nn.Linear(IN, 3), nn.Tanh()), tail=nn.Linear(3, 2)
    )
    outer = Net(lambda m, x: m.inner(x).tanh(), inner=inner)
    return Net(lambda m, x: m.head(m.outer(x)), outer=outer, inner=inner, head=nn.Linear(2, CLASSES))


@architecture(
    "2",
    call=lambda m, x: functional_call(m, {n: 1.5 * p for n, p in m.named_parameters()}, (x,)),
    weight=lambda m: 1.5 * m[2].weight,
)
def functional_call_on_top() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, 3), nn.Tanh(), nn.Linear(3, CLASSES))


# -- frozen, parametrized, computed ------------------------------------------------------------------------------


@architecture("0", "2", "4")
def everything_frozen_but_the_head() -> nn.Module:
    net = nn.Sequential(nn.Linear(IN, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, CLASSES))
    net[:4].requires_grad_(False)
    return net


@architecture("body.0")
def frozen_tail() -> nn.Module:
    net = Net(
        lambda m, x: m.tail(m.body(x)),
        body=nn.Sequential(nn.Linear(IN, 3), nn.Tanh()),
        tail=nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, CLASSES)),
    )
    net.tail.requires_grad_(False)
    return net


@architecture("fc", "head")
def weight_norm_parametrization() -> nn.Module:
    fc = parametrizations.weight_norm(nn.Linear(IN, 3))
    return Net(lambda m, x: m.head(m.fc(x).tanh()), fc=fc, head=nn.Linear(3, CLASSES))


@architecture("fc", "conv", x=image(1, 3))
def weight_norm_by_hooks() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fc, conv = nn.utils.weight_norm(nn.Linear(4, 3)), nn.utils.weight_norm(nn.Conv1d(1, 2, 2))
    return Net(
        lambda m, x: m.head(m.fc(m.conv(x).tanh().flatten(1)).tanh()),
        fc=fc,
        conv=conv,
        head=nn.Linear(3, CLASSES),
    )


@architecture("fc", "head")
def spectral_norm_in_training() -> nn.Module:
    fc = parametrizations.spectral_norm(nn.Linear(IN, 3))
    for vector in fc.parametrizations.weight[0].buffers():
        vector.copy_(F.normalize(torch.randn_like(vector), dim=0))  # far from converged
    return Net(lambda m, x: m.head(m.fc(x).tanh()), fc=fc, head=nn.Linear(3, CLASSES))


@architecture("fc")
def orthogonal_parametrization() -> nn.Module:
    fc = parametrizations.orthogonal(nn.Linear(IN, 3))
    return Net(lambda m, x: m.head(m.fc(x).tanh()), fc=fc, head=nn.Linear(3, CLASSES))


class Positive(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return F.softplus(w)


@architecture("conv", "head", x=image(1, 4))
def parametrization_of_our_own() -> nn.Module:
    conv = nn.Conv1d(1, 2, 2)
    parametrize.register_parametrization(conv, "weight", Positive())
    return Net(lambda m, x: m.head(m.conv(x).tanh().flatten(1)), conv=conv, head=nn.Linear(6, CLASSES))


def hypernet() -> nn.Module:
    fc = nn.Linear(IN, 3)
    del fc.weight

    def run(m: Any, x: Tensor) -> Tensor:
        m.fc.weight = m.generator(m.code).reshape(3, IN)
        return m.head(m.fc(x).tanh())

    net = Net(run, fc=fc, generator=nn.Linear(1, 3 * IN), head=nn.Linear(3, CLASSES))
    net.code = nn.Parameter(torch.ones(1))
    return net


@architecture("fc", weight=lambda m: m.generator(m.code).reshape(3, IN))
def hypernetwork() -> nn.Module:
    """The weight of ``fc`` is the output of another layer."""
    return hypernet()


@architecture("generator")
def generator_of_a_hypernetwork() -> nn.Module:
    return hypernet()


class LoRA(nn.Module):
    """A dense layer with adapters, as ``peft`` wraps it."""

    def __init__(self, base: nn.Linear, ranks: dict[str, int]) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({k: nn.Linear(base.in_features, r, bias=False) for k, r in ranks.items()})
        self.lora_B = nn.ModuleDict(
            {k: nn.Linear(r, base.out_features, bias=False) for k, r in ranks.items()}
        )
        self.scaling = {k: 2.0 / r for k, r in ranks.items()}
        self.active_adapters = list(ranks)
        self.disable_adapters = self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        z = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return z
        for k in self.active_adapters:
            z = z + self.lora_B[k](self.lora_A[k](x)) * self.scaling[k]
        return z


@architecture("fc", "head")
def lora_adapters() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.fc(x).tanh()),
        fc=LoRA(nn.Linear(IN, 3), {"a": 1, "b": 2}),
        head=LoRA(nn.Linear(3, CLASSES), {"a": 1}),
    )


# -- normalisation and noise ---------------------------------------------------------------------------------


@architecture("fc")
def batch_norm_after_the_layer_in_training() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.fc(x)).tanh()),
        fc=nn.Linear(IN, 2),
        norm=nn.BatchNorm1d(2),
        head=nn.Linear(2, CLASSES),
    )


class FrozenBatchNorm(nn.BatchNorm1d):
    """Stays in evaluation mode, as for fine-tuning."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


@architecture("fc")
def batch_norm_after_the_layer_in_evaluation() -> nn.Module:
    norm = FrozenBatchNorm(3)
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 2)
    return Net(
        lambda m, x: m.head(m.norm(m.fc(x)).tanh()),
        fc=nn.Linear(IN, 3),
        norm=norm,
        head=nn.Linear(3, CLASSES),
    )


@architecture("conv", x=image(1, 3, 3))
def convolution_and_batch_norm_in_training() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.conv(x)).tanh().mean((2, 3))),
        conv=nn.Conv2d(1, 2, 3, padding=1, stride=2, bias=False),
        norm=nn.BatchNorm2d(2),
        head=nn.Linear(2, CLASSES),
    )


@architecture("conv", x=image(2, 3))
def group_norm() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.conv(x)).tanh().flatten(1)),
        conv=nn.Conv1d(2, 4, 2),
        norm=nn.GroupNorm(2, 4),
        head=nn.Linear(8, CLASSES),
    )


@architecture("fc")
def layer_norm() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.fc(x)).tanh()),
        fc=nn.Linear(IN, 3),
        norm=nn.LayerNorm(3),
        head=nn.Linear(3, CLASSES),
    )


@architecture("conv", x=image(1, 4))
def instance_norm() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.conv(x)).tanh().flatten(1)),
        conv=nn.Conv1d(1, 2, 2),
        norm=nn.InstanceNorm1d(2, affine=True),
        head=nn.Linear(6, CLASSES),
    )


@architecture("fc", "head")
def dropout_before_and_after() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.drop(m.fc(m.drop(x)).tanh())),
        fc=nn.Linear(IN, 6),
        drop=nn.Dropout(0.4),
        head=nn.Linear(6, CLASSES),
    )


# -- sequences -----------------------------------------------------------------------------------------------


@architecture("cell.weight_hh", "cell.weight_ih", x=image(3, 2))
def rnn_cell_unrolled() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 3)
        for t in range(x.shape[1]):
            h = m.cell(x[:, t], h)
        return m.head(h)

    return Net(run, cell=nn.RNNCell(2, 3), head=nn.Linear(3, CLASSES))


@architecture("rnn.weight_hh_l0", "rnn.weight_ih_l0", "head", x=image(3, 2))
def lstm() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.rnn(x)[0][:, -1]),
        rnn=nn.LSTM(2, 2, batch_first=True),
        head=nn.Linear(2, CLASSES),
    )


@architecture("rnn.weight_hh_l0_reverse", x=lambda: torch.randn(3, N, 2))
def gru_time_first_both_ways() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.rnn(x)[0].mean(0)),
        rnn=nn.GRU(2, 2, bidirectional=True),
        head=nn.Linear(4, CLASSES),
    )


@architecture("attention.in_proj_weight", "attention.out_proj.weight", x=image(3, 2))
def multihead_attention() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.attention(x, x, x)[0].tanh().mean(1)),
        attention=nn.MultiheadAttention(2, 2, batch_first=True),
        head=nn.Linear(2, CLASSES),
    )


@architecture("q", "v", x=image(3, 2))
def attention_by_the_math_kernel() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            z = F.scaled_dot_product_attention(
                m.q(x)[:, None], m.k(x)[:, None], m.v(x)[:, None], is_causal=True
            )
        return m.head(z[:, 0, -1])

    return Net(run, q=nn.Linear(2, 2), k=nn.Linear(2, 2), v=nn.Linear(2, 2), head=nn.Linear(2, CLASSES))


def encoder(batch_first: bool) -> nn.Module:
    block = lambda: nn.TransformerEncoderLayer(
        2, 1, 3, dropout=0.0, batch_first=batch_first, activation=F.gelu
    )

    def run(m: Any, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return m.head(m.two(m.one(x)).mean(1 if batch_first else 0))

    return Net(run, one=block(), two=block(), head=nn.Linear(2, CLASSES))


@architecture("one.linear1", "two.linear2", x=image(2, 2))
def transformer_encoder_batch_first() -> nn.Module:
    return encoder(batch_first=True)


@architecture("one.linear2", "two.linear1", x=lambda: torch.randn(2, N, 2))
def transformer_encoder_time_first() -> nn.Module:
    """The first dimension is time: what looks like samples is coupled, and is found to be."""
    return encoder(batch_first=False)


@architecture("frame", x=lambda: torch.randn(4 * 2, IN), y=lambda: torch.tensor([0, 2, 1, 1]))
def frames_pooled_in_neighbours() -> nn.Module:
    """Rows 2 i and 2 i + 1 are one sample: coupled, though not the first half of the rows with the second."""
    return Net(
        lambda m, x: m.head(m.frame(x).reshape(4, 2, 2).prod(1).tanh()),
        frame=nn.Linear(IN, 2),
        head=nn.Linear(2, CLASSES),
    )


@architecture("embed", x=lambda: torch.tensor([[0, 3], [1, 1], [2, 0], [3, 3], [1, 2]]))
def embedding_with_sparse_gradients() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.embed(x).tanh().mean(1)),
        embed=nn.Embedding(4, 2, sparse=True),
        head=nn.Linear(2, CLASSES),
    )


# -- checkpoints and compilers -------------------------------------------------------------------------------


@architecture("one.0", "two.0")
def checkpointing_around_the_layer() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = checkpoint(m.one, x, use_reentrant=False)
        return m.head(checkpoint(m.two, x, use_reentrant=False))

    block = lambda: nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Dropout(0.2))
    return Net(run, one=block(), two=block(), head=nn.Linear(IN, CLASSES))


@architecture("fc")
def checkpointing_around_the_tail() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return checkpoint(m.tail, m.fc(x), use_reentrant=False)

    tail = nn.Sequential(nn.Tanh(), nn.Linear(3, 3), nn.GELU(), nn.Linear(3, CLASSES))
    return Net(run, fc=nn.Linear(IN, 3), tail=tail)


@architecture("block.0")
def checkpointing_around_a_frozen_block() -> nn.Module:
    net = Net(
        lambda m, x: m.head(checkpoint(m.block, x, use_reentrant=False)),
        block=nn.Sequential(nn.Linear(IN, 3), nn.Tanh(), nn.Linear(3, 3), nn.Sigmoid()),
        head=nn.Linear(3, CLASSES),
    )
    net.block.requires_grad_(False)
    return net


@architecture("fc", "head")
def compiled_trunk() -> nn.Module:
    trunk = nn.Sequential(nn.Linear(IN, 4), nn.Tanh())
    return Net(
        lambda m, x: m.head(m.fc(m.compiled(x)).tanh()),
        compiled=torch.compile(trunk, backend="aot_eager"),
        fc=nn.Linear(4, 3),
        head=nn.Linear(3, CLASSES),
    )


# -- shapes of networks --------------------------------------------------------------------------------------


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

    return Net(
        run, down=nn.Conv1d(1, 2, 2, stride=2), up=nn.Conv1d(2, 1, 3, padding=1), out=nn.Conv1d(2, 2, 1)
    )


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
        run,
        router=router,
        experts=nn.ModuleList([nn.Linear(IN, 3) for _ in range(2)]),
        head=nn.Linear(3, CLASSES),
    )


@architecture("fc.weight")
def bilinear() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.fc(x[:, :2], x[:, 2:]).tanh()),
        fc=nn.Bilinear(2, 2, 2),
        head=nn.Linear(2, CLASSES),
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
        lambda m, x: m.head(torch.einsum("nm,dm->nd", x, m.table).tanh() @ m.table),
        head=nn.Linear(IN, CLASSES),
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


# -- precisions ----------------------------------------------------------------------------------------------


@architecture("fc", "head", dtype=None, precision=1e-5, x=lambda: torch.randn(N, IN).double())
def float64_trunk_and_float32_head() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.fc(x).tanh().float()), fc=nn.Linear(IN, 3).double(), head=nn.Linear(3, CLASSES)
    )


@architecture("fc", "head", dtype=None, precision=1e-9, x=lambda: torch.randn(N, IN))
def float32_inputs_and_float64_trunk() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.fc(x.double()).tanh()),
        fc=nn.Linear(IN, 3).double(),
        head=nn.Linear(3, CLASSES).double(),
    )


@architecture("fc", "head", dtype=torch.bfloat16, precision=0.1, loss=lambda z, y: CE(z.float(), y))
def bfloat16() -> nn.Module:
    return Net(lambda m, x: m.head(m.fc(x).tanh()), fc=nn.Linear(IN, 3), head=nn.Linear(3, CLASSES))


# -- the checks ----------------------------------------------------------------------------------------------

PAIRS = [pytest.param(a, layer, id=f"{a.name}-{layer}") for a in TABLE for layer in a.layers]


@dataclass
class Stage:
    """A model with data, its dense twin, and a forward pass that always meets the same state."""

    case: Architecture
    layer: str
    train: bool = True
    model: nn.Module = field(init=False)
    x: Any = field(init=False)
    y: Any = field(init=False)
    dense: Dense = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        torch.manual_seed(1)
        self.x, self.y = case.x(), case.y()
        if case.dtype is not None and self.x.is_floating_point():
            self.x = self.x.to(case.dtype)
        self.model, twin = self.fresh(), self.fresh()
        self.buffers = [b.clone() for b in self.model.buffers()]
        for part in twin.modules():
            if isinstance(part, nn.Embedding):
                part.sparse = False
        self.dense = Dense(twin, self.layer, self.run, None if case.weight is None else case.weight(twin))

    def fresh(self) -> nn.Module:
        torch.manual_seed(2)
        model = self.case.build().train(self.train)
        return model if self.case.dtype is None else model.to(self.case.dtype)

    def run(self, model: Any) -> Any:
        torch.manual_seed(7)
        return self.case.call(model, self.x)

    def forward(self) -> Any:
        for b, start in zip(self.model.buffers(), self.buffers, strict=True):
            b.copy_(start)
        return self.run(self.model)

    def loss(self, outputs: Any) -> Tensor:
        return self.case.loss(outputs, self.y)

    def close_to(self, want: float, tolerance: float) -> Any:
        tolerance = max(tolerance, self.case.precision)
        return pytest.approx(want, rel=0, abs=tolerance * max(1.0, abs(want)))

    def fam(self, **options: Any) -> FAM:
        return FAM(self.case.loss, self.model, self.layer, strength=1.0, **options)


@pytest.mark.parametrize(("case", "layer"), PAIRS)
def test_value_and_gradients(case: Architecture, layer: str) -> None:
    stage = Stage(case, layer)
    want = stage.dense.kappa(stage.loss)
    gradients = stage.dense.gradients(want)
    with stage.fam(curvature="hessian", method="exact") as fam:
        outputs = stage.forward()
        total = fam(outputs, stage.y)
        got = torch.autograd.grad(
            total - stage.loss(outputs),
            [p for p in stage.model.parameters() if p.requires_grad],
            materialize_grads=True,
        )
    assert fam.last["kappa"] == stage.close_to(want.item(), VALUE)
    for a, (name, b) in zip(got, gradients.items(), strict=True):
        error = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
        assert error <= max(GRADIENT, case.precision), name


@pytest.mark.parametrize(("case", "layer"), PAIRS)
def test_probes_have_kappa_for_their_mean(case: Architecture, layer: str) -> None:
    stage = Stage(case, layer)
    want = stage.dense.kappa(stage.loss).item()
    with stage.fam(curvature="hessian", method="probe", probes=4, seed=0) as fam:
        within_four_standard_errors(stage, fam, want)


@pytest.mark.parametrize(("case", "layer"), PAIRS)
def test_gauss_newton(case: Architecture, layer: str) -> None:
    stage = Stage(case, layer)
    if not isinstance(stage.run(stage.dense.model), Tensor):
        pytest.skip("no single tensor of outputs")
    stage = Stage(case, layer)
    want = stage.dense.kappa_ggn(stage.loss).item()
    with stage.fam(method="exact") as fam:
        fam(stage.forward(), stage.y)
    assert fam.last["kappa"] == stage.close_to(want, VALUE)
    with stage.fam(method="probe", probes=4, seed=0) as fam:
        within_four_standard_errors(stage, fam, want)


def within_four_standard_errors(stage: Stage, fam: FAM, want: float, repeats: int = 25) -> None:
    values = []
    for _ in range(repeats):
        fam(stage.forward(), stage.y)
        values.append(fam.last["kappa"])
    values = torch.tensor(values, dtype=torch.float64)
    stderr = float(values.std()) / math.sqrt(repeats)
    slack = max(VALUE, stage.case.precision) * max(1.0, abs(want))
    assert abs(float(values.mean()) - want) <= 4 * stderr + slack


@pytest.mark.parametrize(("case", "layer"), PAIRS)
def test_measured_in_evaluation_mode(case: Architecture, layer: str) -> None:
    stage = Stage(case, layer, train=False)
    want = stage.dense.kappa(stage.loss).item()
    stage.forward()
    before = snapshot(stage.model)
    options: dict[str, Any] = {
        "layer": layer,
        "forward": lambda model, batch: (case.call(model, stage.x), batch[1]),
    }
    for method in ("exact", "auto"):
        flat = relative_flatness(
            stage.model, case.loss, (stage.y, stage.y), method=method, probes=200, **options
        )
        if flat.method.startswith(("exact", "closed_form")):
            assert flat.value == stage.close_to(want, VALUE)
        else:
            assert abs(flat.value - want) <= 4 * flat.stderr
    assert_equal(snapshot(stage.model), before)


@pytest.mark.parametrize(("case", "layer"), PAIRS)
def test_nothing_else_is_touched(case: Architecture, layer: str) -> None:
    """Modes, buffers, gradients, hooks and random numbers are those of a run without FAM."""
    stage, plain = Stage(case, layer), Stage(case, layer)
    for s in (stage, plain):
        for p in s.model.parameters():
            p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
    fam = stage.fam(curvature="hessian", method="probe")
    outputs, plain_outputs = stage.forward(), plain.forward()
    state = torch.get_rng_state()
    fam(outputs, stage.y)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(tensors(outputs), tensors(plain_outputs))
    fam.close()
    assert_equal(snapshot(stage.model), snapshot(plain.model))


def tensors(outputs: Any) -> dict[str, Any]:
    outputs = vars(outputs) if isinstance(outputs, Prediction) else outputs
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return {str(i): t.detach() for i, t in enumerate(leaves) if isinstance(t, Tensor)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"rng": torch.get_rng_state()}
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found[f"{name} module"] = (module.training, hooks, sorted(module.__dict__), torch.is_grad_enabled())
    for name, p in model.named_parameters():
        found |= {name: p.detach().clone(), f"{name} grad": None if p.grad is None else p.grad.clone()}
    return found | {f"{name} buffer": b.clone() for name, b in model.named_buffers()}


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for key, a in one.items():
        b = two[key]
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, key


# -- on paper --------------------------------------------------------------------------------------------------


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


class TestTiedAndFeedingItself:
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


def test_adapters_on_a_frozen_base_can_be_trained_by_their_weight() -> None:
    net = lora_adapters().double()
    x, y = torch.randn(N, IN).double(), torch.tensor([0, 2, 1, 1, 0])
    fam = FAM(CE, net, "fc", strength=1.0, gradient="weights")
    outputs = net(x)
    added = fam(outputs, y) - CE(outputs, y)
    factors = [net.fc.lora_B["a"].weight, net.fc.lora_A["a"].weight]
    assert all(bool(g.any()) for g in torch.autograd.grad(added, factors))


@pytest.mark.parametrize("switch", ["disable_adapters", "merged"])
def test_adapters_that_are_off_add_nothing(switch: str) -> None:
    net = lora_adapters().double()
    setattr(net.fc, switch, True)
    x, y = torch.randn(N, IN).double(), torch.tensor([0, 2, 1, 1, 0])
    plain = Net(net.run, fc=net.fc.base_layer, head=net.head)
    plain.fc.weight.requires_grad_()
    want = Dense(plain, "fc", lambda m: m(x)).kappa(lambda z: CE(z, y)).item()
    flat = relative_flatness(net, CE, (x, y), layer="fc", method="exact")
    assert flat.value == pytest.approx(want, rel=1e-9)


def test_a_checkpointed_model_leaves_no_record_behind() -> None:
    net = nn.Sequential(nn.Linear(IN, 3), nn.Tanh(), nn.Linear(3, CLASSES))
    fam = FAM(CE, net, "0", strength=1.0, curvature="hessian", method="exact")
    x, y = torch.randn(N, IN), torch.tensor([0, 2, 1, 1, 0])
    for _ in range(12):
        fam(checkpoint(net, x, use_reentrant=False), y).backward()
    assert fam.last["method"] == "exact"
