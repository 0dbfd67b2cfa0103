"""Kappa of every weight matrix of a model by plain double backward, without relflat.

With ``W W' = F F'``, kappa is the sum of ``d2L/dW2`` along ``f_i e_j'`` over the columns of F and all j. Double
backward itself is held against differences of gradients, along one direction of all parameters.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from published import Published
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

EXACT_UP_TO = 1500  # directions


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Weight:
    """A parameter of two or more dimensions.

    Attributes:
        view: the parameter as matrices (k, d, m).
    """

    name: str
    parameter: Tensor
    view: Callable[[Tensor], Tensor]

    @functools.cached_property
    def entries(self) -> Tensor:
        """Where in the flat parameter the entries of the matrices are, (k, d, m)."""
        return self.view(torch.arange(self.parameter.numel()).reshape(self.parameter.shape))

    @property
    def count(self) -> int:
        """Of the directions."""
        k, d, m = self.entries.shape
        return k * min(d, m) * m

    def probe(self, generator: torch.Generator) -> Tensor:
        """A random sum of the directions, with signs for factors: its quadratic form has the mean kappa."""
        V = torch.zeros(self.parameter.numel(), dtype=self.parameter.dtype)
        W = self.view(self.parameter.detach())
        signs = torch.randint(2, W.shape, generator=generator) * 2 - 1
        U, s, _ = torch.linalg.svd(W, full_matrices=False)
        V[self.entries] = (U * s[:, None]) @ signs[:, : s.shape[1]].to(V.dtype)
        return V.reshape(self.parameter.shape)

    def directions(self) -> Tensor:
        """All ``f_i e_j'`` as flat parameters."""
        found = []
        for where, W in zip(self.entries, self.view(self.parameter.detach()), strict=True):
            U, s, _ = torch.linalg.svd(W, full_matrices=False)
            for f in (U * s).mT:
                for column in where.mT:
                    v = torch.zeros(self.parameter.numel(), dtype=W.dtype)
                    v[column] = f
                    found.append(v)
        return torch.stack(found)


class Elementary(TorchFunctionMode):
    """Leave in float64 what a forward pass would compute in float32 (norms, positions, routers).

    And spell out what PyTorch differentiates wrongly when it does so twice.

    Attributes:
        narrow: whether something would have been computed in float32.
    """

    narrow = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float and args[0].dtype == torch.float64:
            self.narrow = True
            return args[0]
        if function is torch._weight_norm:
            v, g, dim = args
            return v * (g / v.square().sum([i for i in range(v.ndim) if i != dim % v.ndim], keepdim=True).sqrt())
        if function in (F.hardsigmoid, F.hardswish):
            x, gate = args[0], (args[0] / 6 + 0.5).clamp(0, 1)
            return gate if function is F.hardsigmoid else x * gate
        self.narrow = self.narrow or any(x is torch.float32 for x in tree_leaves((args, kwargs)))
        swap = lambda x: torch.float64 if x is torch.float32 else x
        return function(*tree_map(swap, args), **tree_map(swap, kwargs or {}))


class Held:
    """An architecture with the second derivatives of its loss.

    Frozen weights count like others, and those computed by a parametrization as what they are computed to.

    Args:
        case: the architecture.
        alone: a layer that gets a weight of its own, if it shares one.
    """

    def __init__(self, case: Published, alone: str = "") -> None:
        self.case, self.model = case, case.model().requires_grad_()
        for module in list(self.model.modules()):
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):
                    parametrize.remove_parametrizations(module, name)
        if alone:
            module = self.model.get_submodule(alone)
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(p.detach().clone()))
        self.batch = case.data
        self.uses = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.loss = self._loss_of(self.model)
        found = grad(self.loss, list(self.parameters.values()), create_graph=True, allow_unused=True)
        self.slopes = {n: g for n, g in zip(self.parameters, found, strict=True) if g is not None}

    def weights(self) -> dict[str, Weight]:
        """Every weight matrix that the loss depends on, by the name of its parameter, once each."""
        return {
            n: self.weight(n)
            for n, p in self.parameters.items()
            if n in self.slopes and p.ndim > 1 and not matches(n, self.case.besides)
        }

    def weight(self, name: str) -> Weight:
        """One of them: as the module that owns it multiplies by it."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        kind = type(module).__name__
        view: Callable[[Tensor], Tensor] = lambda w: w.flatten(1)[None]
        given = [v for pattern, v in self.case.views if fnmatchcase(name, pattern)]
        if given:
            view = given[0]
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            view = functools.partial(_transposed_kernel, module.groups)
        elif kind == "Conv1D" or (isinstance(module, nn.Embedding) and self.uses[id(self.parameters[name])] == 1):
            view = lambda w: w.mT[None]
        return Weight(name, self.parameters[name], view)

    def kappa(self, weight: Weight) -> float:
        """Definition 3 of one of the weights."""
        slope = self.slopes[weight.name]
        if not slope.requires_grad:
            return 0.0
        V = weight.directions()
        grads = V.reshape(-1, *weight.parameter.shape)
        try:
            products = grad(
                slope, weight.parameter, grads, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
        except RuntimeError:  # an operation that cannot be batched
            products = [torch.stack([self._product(weight, v) for v in grads])]
        return 0.0 if products[0] is None else float((products[0].flatten(1) * V).sum())

    def count(self) -> int:
        """Directions of all the weights."""
        return sum(w.count for w in self.weights().values())

    def kappas(self) -> dict[str, tuple[float, float]]:
        """Definition 3 of all weights with a standard error: 0 in small networks, of shared probes in others."""
        weights = self.weights()
        if self.count() <= EXACT_UP_TO:
            return {n: (self.kappa(w), 0.0) for n, w in weights.items()}
        names, forms = self._forms(64)
        means, errors = forms.mean(0).tolist(), (forms.std(0) / len(forms) ** 0.5).tolist()
        return dict.fromkeys(weights, (0.0, 0.0)) | dict(zip(names, zip(means, errors, strict=True), strict=True))

    def sum_by_probes(self) -> tuple[float, float]:
        """The sum of all kappas with its standard error."""
        forms = self._forms(16)[1].sum(1)
        return float(forms.mean()), float(forms.std() / len(forms) ** 0.5)

    def _forms(self, probes: int) -> tuple[list[str], Tensor]:
        """Of probes of all weights at once, what each weight's has the mean kappa: (probes, weights)."""
        generator = torch.Generator().manual_seed(4)
        weights = self.weights()
        names = [n for n in weights if self.slopes[n].requires_grad]
        slopes, at = [self.slopes[n] for n in names], [weights[n].parameter for n in names]
        found = []
        for _ in range(probes):
            V = [weights[n].probe(generator) for n in names]
            products = grad(slopes, at, V, retain_graph=True, materialize_grads=True)
            found.append([float((v * p).sum()) for v, p in zip(V, products, strict=True)])
        return names, torch.tensor(found, dtype=torch.float64)

    def _product(self, weight: Weight, v: Tensor) -> Tensor:
        found = grad(self.slopes[weight.name], weight.parameter, v, retain_graph=True, materialize_grads=True)
        return found[0]

    def slip(self) -> float:
        """Relative difference between ``H v`` and the difference of gradients along v, over all parameters."""
        step = 1e-6  # of a unit direction, so small that hardly a unit with a kink crosses it
        names = list(self.slopes)
        at = [self.parameters[n] for n in names]
        generator = torch.Generator().manual_seed(3)
        v = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in at]
        length = torch.stack([u.norm() for u in v]).norm()
        v = [u / length for u in v]
        bent = [(g, u) for g, u in zip(self.slopes.values(), v, strict=True) if g.requires_grad]
        product = grad([g for g, _ in bent], at, [u for _, u in bent], retain_graph=True, materialize_grads=True)
        ends = [self._moved(names, v, sign * step) for sign in (1, -1)]
        difference = torch.cat([((a - b) / (2 * step)).flatten() for a, b in zip(*ends, strict=True)])
        exact = torch.cat([p.flatten() for p in product])
        return float((difference - exact).norm() / exact.norm())

    def _moved(self, names: list[str], v: list[Tensor], by: float) -> list[Tensor]:
        at = [self.parameters[n] for n in names]
        kept = [p.detach().clone() for p in at]
        with torch.no_grad():
            for p, u in zip(at, v, strict=True):
                p.data = p + by * u  # not in place: the graph of the second derivatives keeps the old values
        found = list(grad(self._loss_of(self.model), at, materialize_grads=True))
        for p, old in zip(at, kept, strict=True):
            p.data = old
        return found

    def _loss_of(self, model: nn.Module) -> Tensor:
        mode = Elementary()
        with sdpa_kernel(SDPBackend.MATH), mode:  # the other kernels have no second derivative
            loss = self.case.loss(*self.case.run(model, self.batch))
        self.narrow = mode.narrow
        return loss


def _transposed_kernel(groups: int, w: Tensor) -> Tensor:
    w = w.reshape(groups, w.shape[0] // groups, *w.shape[1:]).transpose(1, 2)
    return w.flatten(0, 1).flatten(1)[None]


def parameter_of(model: nn.Module, name: str) -> Any:
    """The parameter that a name among the layers of relflat stands for."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters[name if name in parameters else f"{name}.weight"]
