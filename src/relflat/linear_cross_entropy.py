r"""Cross-entropy and kappa of a large output layer, without the (tokens x vocabulary) matrix.

The layer computes ``z_p = W phi_p + b`` for tokens p and classes c, W of shape (d, m); ``pi_p = softmax(z_p)``,
``t_p`` is the smoothed target and ``a_p`` the weight of a token in the reduction (``1 / tokens`` for the mean). Then

    L     = sum_p a_p (log sum_c exp z_pc - sum_c t_pc z_pc)
    kappa = sum_p a_p ||phi_p||^2 v_p        v_p = sum_c pi_pc ||w_c||^2 - ||mu_p||^2        mu_p = sum_c pi_pc w_c

(identity I1 of the design), and what is returned is ``L + strength * kappa``.

**Value.** With k the most likely class and ``q = pi - e_k``, ``delta = mu - w_k = q W``. With ``~`` for "minus the
mean row of W", which kappa does not see, ``v = q . ||w~||^2 - delta . (2 w~_k + delta)``. All entries of q are of the
size of what is missing to certainty, so nothing cancels when a token is certain, or rows share a large part.

**Gradient.** Write ``D = pi - t``, ``beta_p = strength a_p ||phi_p||^2``, and for the third derivatives
``K_pc = pi_pc (||w_c - mu_p||^2 - v_p)``, which is ``d v_p / d z_pc``. Then

    dL/dphi                = a (D W) = a (mu - t W)
    dL/dW                  = D' (a phi)
    strength dkappa/dphi   = 2 strength a v phi  +  beta (K W)
    strength dkappa/dw_c   = 2 sum_p beta_p pi_pc (w_c - mu_p)  +  (K' (beta phi))_c
    d/db                   = D' a + K' beta

The terms with K are the part of Lemma 1 that goes through the third derivatives: ``gradient="full"``. Without them
the curvature is constant (``"frozen"``), and without ``2 strength a v phi`` too, only W sees kappa (``"weights"``).

**Cost**, in products of n d m multiplications, of which plain logits and cross-entropy take three:

    logits; mu                                              2   all there is to do under torch.no_grad()
    D' (a phi - 2 beta mu), one product for both losses     1   frozen and weights end here: 3, as plain
    W mu for K; K W; K' (beta phi)                          3   full: 6, twice plain

``D W`` costs nothing, as mu is there already. The three of ``"full"`` cannot be folded into the others: K W is the
covariance of the rows of W under pi, applied to a vector, for which both products need the finished mu, and K' and D'
are two different matrices applied to two different ones. Gradients are made in the forward pass, while a chunk of
probabilities is at hand, which saves computing the logits twice; backward multiplies them by the incoming scalar.
``reduction="none"`` has no such scalar and goes through everything again in backward: 2 products more.

**Memory** beyond inputs and gradients: one buffer of ``chunk_tokens`` x d and a few of ``chunk_tokens`` x
``chunk_classes``, in float32 (float64 for such inputs). Half-precision inputs are widened a chunk at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from relflat.errors import ConfigError, DataError, LayerError
from relflat.probes import Gradient

Reduction = Literal["mean", "sum", "none"]

_BUFFER = (
    2**26
)  # entries of the buffer of probabilities unless chunk_tokens says otherwise: 256 MiB in float32


class LinearCrossEntropy(NamedTuple):
    """What :func:`linear_cross_entropy_fam` returns.

    Attributes:
        total: ``task + strength * kappa``, the one to call ``backward()`` on.
        task: the cross-entropy, detached.
        kappa: relative flatness of the output layer, reduced as the loss is, detached.
    """

    total: Tensor
    task: Tensor
    kappa: Tensor


def linear_cross_entropy_fam(
    features: Float[Tensor, "... m"],
    weight: Float[Tensor, "d m"],
    targets: Int[Tensor, "..."],
    *,
    strength: float,
    bias: Float[Tensor, " d"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    gradient: Gradient = "full",
    chunk_tokens: int | None = None,
    chunk_classes: int = 4096,
) -> LinearCrossEntropy:
    """Cross-entropy of ``features @ weight.T + bias`` plus ``strength`` times kappa of that layer, in chunks.

    The same numbers as ``FAM(nn.CrossEntropyLoss(), ...)`` on an output layer, for vocabularies so large that the
    logits of all tokens do not fit. Differentiable once, in features, weight and bias.

    Args:
        features: input of the layer, any leading shape; float64, float32, bfloat16 or float16.
        weight: of the layer, read where it is whole (inside the forward pass of the module that FSDP shards).
        targets: class indices, shaped as the features without the last dimension.
        strength: the paper's lambda, on the paper's kappa. May be negative or 0.
        bias: of the layer.
        ignore_index: target of tokens that do not count.
        reduction: ``"mean"`` over tokens not ignored, ``"sum"``, or ``"none"``: one value a token, 0 where ignored.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        gradient: ``"full"``, ``"frozen"`` or ``"weights"``, as in :class:`relflat.FAM`.
        chunk_tokens: tokens at a time; by default as many as make a buffer of 2^26 probabilities.
        chunk_classes: classes at a time.

    Returns:
        ``(total, task, kappa)``, in float32 (float64 for such inputs). As in ``F.cross_entropy`` a mean over no token
        is not a number, with zero gradients.

    Raises:
        ConfigError: an option has no such value.
        LayerError: the shapes of features, weight and bias do not fit.
        DataError: the targets are no class indices of the right shape and range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> phi, W, y = torch.randn(6, 4), torch.randn(10, 4, requires_grad=True), torch.randint(10, (6,))
        >>> loss = linear_cross_entropy_fam(phi, W, y, strength=0.1)
        >>> loss.total.backward()
        >>> bool(torch.isclose(loss.task, torch.nn.functional.cross_entropy(phi @ W.T, y)))
        True

    Cost: ``gradient="full"`` twice the multiplications of logits and cross-entropy, forward and backward, with exact
    gradients; ``"frozen"`` and ``"weights"`` as many as those. See the module for the count and the formulas.
    """
    _check(features, weight, bias, targets, reduction, label_smoothing, gradient, chunk_tokens, chunk_classes)
    d, m = weight.shape
    phi, y = features.reshape(-1, m), targets.reshape(-1)
    counted = y != ignore_index
    count = int(counted.sum())
    if count < len(y):
        phi, y = phi[counted], y[counted]
    if count and not 0 <= int(y.min()) <= int(y.max()) < d:
        raise DataError(
            f"targets reach from {int(y.min())} to {int(y.max())} and there are {d} classes; mend the labels or set "
            "ignore_index"
        )
    size = chunk_tokens or max(1, _BUFFER // d)
    differentiate = torch.is_grad_enabled()
    options = _Options(strength, label_smoothing, gradient, size, chunk_classes, reduction, differentiate)
    total, task, kappa = _apply(phi, weight, bias, y, options)
    if reduction != "none":
        return LinearCrossEntropy(total, task, kappa)
    everywhere = [x.new_zeros(len(counted)).masked_scatter(counted, x) for x in (total, task, kappa)]
    return LinearCrossEntropy(*(x.reshape(targets.shape) for x in everywhere))


def _check(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    reduction: str,
    label_smoothing: float,
    gradient: str,
    chunk_tokens: int | None,
    chunk_classes: int,
) -> None:
    for name, value, allowed in (("reduction", reduction, Reduction), ("gradient", gradient, Gradient)):
        if value not in get_args(allowed):
            raise ConfigError(f"{name}={value!r}: choose one of {list(get_args(allowed))}")
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(f"label_smoothing={label_smoothing}: a number from 0 to 1 is needed")
    if chunk_classes < 1 or (chunk_tokens is not None and chunk_tokens < 1):
        raise ConfigError(f"chunk_tokens={chunk_tokens}, chunk_classes={chunk_classes}: at least 1 is needed")
    if hasattr(weight, "full_tensor"):
        raise LayerError(
            "the weight is sharded (DTensor) here; call linear_cross_entropy_fam inside the forward pass of the "
            "module that fully_shard wraps, where it is whole"
        )
    if weight.ndim != 2 or features.ndim < 1 or features.shape[-1] != weight.shape[1]:
        raise LayerError(
            f"features {tuple(features.shape)} and weight {tuple(weight.shape)} do not fit: they must be (..., m) "
            "and (d, m)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise LayerError(f"the bias has shape {tuple(bias.shape)}, not {tuple(weight.shape[:1])}")
    if targets.is_floating_point() or targets.shape != features.shape[:-1]:
        raise DataError(
            f"targets of shape {tuple(targets.shape)} and type {targets.dtype} for features of shape "
            f"{tuple(features.shape)}: one class index a token is needed"
        )


@dataclass(frozen=True)
class _Options:
    strength: float
    smoothing: float
    gradient: Gradient
    chunk_tokens: int
    chunk_classes: int
    reduction: Reduction
    differentiate: bool


def _apply(*args: Any) -> Any:
    if torch.compiler.is_compiling():  # not as a decorator: that would import the compiler along with relflat
        return torch.compiler.disable(_eagerly)(*args)  # type: ignore[no-untyped-call]
    return _eagerly(*args)


def _eagerly(*args: Any) -> Any:
    return _LinearCrossEntropy.apply(*args)  # type: ignore[no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    """Runs the sweep below and hands its gradients to autograd."""

    @staticmethod
    def forward(
        ctx: Any, phi: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value, and unless ``reduction="none"`` the gradients too."""
        ctx.options, wanted = options, ctx.needs_input_grad[:3]
        ctx.types = [None if x is None else x.dtype for x in (phi, weight, bias)]
        each = options.reduction == "none"
        later = each or not options.differentiate
        size = 1 / max(len(y), 1) if options.reduction == "mean" else 1.0
        sweep = _Sweep(phi, weight, bias, y, options, (False,) * 3 if later else wanted)
        sweep.run(torch.full_like(sweep.task, size))
        ctx.save_for_backward(*((phi, weight, bias, y) if each else sweep.gradients))
        task, kappa = sweep.task, sweep.kappa
        if not each:
            reduce = torch.mean if options.reduction == "mean" else torch.sum
            task, kappa = reduce(task), reduce(kappa)
        ctx.mark_non_differentiable(task, kappa)
        return task + options.strength * kappa, task, kappa

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the incoming one, in the types of the inputs."""
        if ctx.options.reduction == "none":
            phi, weight, bias, y = ctx.saved_tensors
            sweep = _Sweep(phi, weight, bias, y, ctx.options, ctx.needs_input_grad[:3])
            sweep.run(grad)
            grads = sweep.gradients
        else:
            grads = [None if g is None else g * grad for g in ctx.saved_tensors]
        return (*(None if g is None else g.to(t) for g, t in zip(grads, ctx.types, strict=True)), None, None)


class _Sweep:
    """One pass over tokens and classes; names are those of the module's docstring.

    Attributes:
        task: cross-entropy of each token, not weighted.
        kappa: ``||phi||^2 v`` of each token, not weighted.
        gradients: of the weighted total in features, weight and bias; None where not wanted.
    """

    def __init__(
        self,
        phi: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        options: _Options,
        wanted: tuple[bool, ...],
    ) -> None:
        self.phi, self.weight, self.bias, self.y, self.options = phi, weight, bias, y, options
        wide = torch.promote_types(torch.promote_types(phi.dtype, weight.dtype), torch.float32)
        self.task, self.kappa = (torch.empty(len(y), dtype=wide, device=phi.device) for _ in range(2))
        blanks = [None if x is None else torch.zeros_like(x, dtype=wide) for x in (phi, weight, bias)]
        self.gradients = [x if wants else None for x, wants in zip(blanks, wanted, strict=True)]
        self.wide = wide

    def run(self, mass: Float[Tensor, " n"]) -> None:
        """Fill the attributes, with ``mass`` as the weights a."""
        with torch.autocast(self.phi.device.type, enabled=False), torch.no_grad():
            self.centre = self.weight.mean(0, dtype=self.wide)
            centred = ((self._rows(c) - self.centre).square_().sum(1) for c in self._classes())
            self.norms = torch.cat(list(centred))
            self.scales = torch.zeros_like(self.norms)  # D' beta, and below what smoothing adds to all rows
            self.pull = torch.zeros_like(self.centre)
            n, size = len(self.y), min(self.options.chunk_tokens, len(self.y))
            buffer = self.norms.new_empty(size, len(self.norms))
            for tokens in _slices(n, size or 1):
                self._tokens(tokens, mass[tokens], buffer[: tokens.stop - tokens.start])
            if self.gradients[1] is not None and self.options.strength:
                for c in self._classes():
                    self.gradients[1][c] += (
                        2 * self.scales[c, None] * (self._rows(c) - self.centre) - self.pull
                    )

    def _tokens(self, at: slice, a: Float[Tensor, " p"], z: Float[Tensor, "p d"]) -> None:
        x = self._softmax(at, z)
        if any(g is not None for g in self.gradients):
            self._gradients(at, x, a[:, None])

    def _softmax(self, at: slice, z: Float[Tensor, "p d"]) -> "_Softmax":
        """Losses and kappas of some tokens; their probabilities, not divided by the largest, end up in z."""
        o, phi = self.options, self.phi[at].to(self.wide)
        for c in self._classes():
            torch.mm(phi, self._rows(c).mT, out=z[:, c])
        if self.bias is not None:
            z += self.bias.to(self.wide)
        top, k = (x[:, None] for x in z.max(1))
        expected = z.gather(1, self.y[at, None])  # logit under the target
        if o.smoothing:
            expected = (1 - o.smoothing) * expected + o.smoothing * z.mean(1, keepdim=True)
        z.scatter_(1, k, -torch.inf)  # class k apart: what it adds to the sums is known without rounding
        others, second, delta = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(phi)
        for c in self._classes():
            e = z[:, c].sub_(top).exp_()
            others += e.sum(1, keepdim=True)
            second += e @ self.norms[c, None]
            delta.addmm_(e, self._rows(c))
        z.scatter_(1, k, 1.0)
        largest, w_k = 1 / (1 + others), self.weight[k[:, 0]].to(self.wide)
        delta = largest * (delta - others * w_k)
        around = delta * (2 * (w_k - self.centre) + delta)
        v = largest * (second - others * self.norms[k]) - around.sum(1, keepdim=True)
        self.task[at] = (top - expected + others.log1p())[:, 0]
        self.kappa[at] = phi.square().sum(1) * v[:, 0]
        return _Softmax(z, largest, k, w_k, delta, v)

    def _gradients(self, at: slice, x: "_Softmax", a: Float[Tensor, "p 1"]) -> None:
        """Add what some tokens, of weights ``a``, give to the gradients."""
        o, y, phi = self.options, self.y[at], self.phi[at].to(self.wide)
        d_phi, d_weight, d_bias = self.gradients
        beta = o.strength * a * phi.square().sum(1, keepdim=True)
        w_y = self.weight[y].to(self.wide)
        mu, past = x.w_k - self.centre + x.delta, x.w_k - w_y + x.delta  # mu - centre, mu - w_y
        if d_phi is not None:
            d_phi[at] = a * (past + o.smoothing * (w_y - self.centre))  # D W
            if o.gradient != "weights":
                d_phi[at] += 2 * o.strength * a * x.v * phi
        even, both = o.smoothing / len(self.norms), a * phi - 2 * beta * mu
        for c in self._classes():
            pi = x.scaled[:, c].mul_(x.largest)
            if o.gradient == "full" and o.strength:
                third = beta * self._third(x, mu, pi, c)
                if d_phi is not None:
                    d_phi[at].addmm_(third, self._rows(c))
                if d_weight is not None:
                    d_weight[c].addmm_(third.mT, phi)
                if d_bias is not None:
                    d_bias[c] += third.sum(0)
            difference = _add(pi, y[:, None], c, o.smoothing - 1).sub_(even)
            if d_weight is not None:
                d_weight[c].addmm_(difference.mT, both)
                self.scales[c] += (difference.mT @ beta)[:, 0]
            if d_bias is not None:
                d_bias[c] += (difference.mT @ a)[:, 0]
        if d_weight is not None and o.strength:  # pi = D + t: what t has of 2 beta pi (w - mu)
            d_weight.index_add_(0, y, (2 * o.smoothing - 2) * beta * past)
            self.scales += even * beta.sum()
            self.pull += 2 * even * (beta * mu).sum(0)

    def _third(
        self, x: "_Softmax", mu: Float[Tensor, "p m"], pi: Float[Tensor, "p c"], c: slice
    ) -> Float[Tensor, "p c"]:
        """``K = pi (||w - mu||^2 - v)`` of a chunk of classes."""
        offset = 2 * (mu @ self.centre[:, None]) + mu.square().sum(1, keepdim=True) - x.v
        distance = torch.addmm(self.norms[c], mu, self._rows(c).mT, alpha=-2).add_(offset)
        _set(distance, x.k, c, x.delta.square().sum(1, keepdim=True) - x.v)  # the same, without cancellation
        return distance.mul_(pi)

    def _rows(self, c: slice) -> Float[Tensor, "c m"]:
        return self.weight[c].to(self.wide)

    def _classes(self) -> Iterator[slice]:
        return _slices(len(self.weight), self.options.chunk_classes)


class _Softmax(NamedTuple):
    """Softmax of a chunk of tokens.

    Attributes:
        scaled: probabilities divided by the largest; overwritten as they are used.
        largest: the largest probability.
        k: its class.
        w_k: the weight of that class.
        delta: ``mu - w_k``.
        v: as in the module's docstring.
    """

    scaled: Float[Tensor, "p d"]
    largest: Float[Tensor, "p 1"]
    k: Int[Tensor, "p 1"]
    w_k: Float[Tensor, "p m"]
    delta: Float[Tensor, "p m"]
    v: Float[Tensor, "p 1"]


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _within(chunk: Float[Tensor, "p c"], column: Int[Tensor, "p 1"], at: slice) -> tuple[Tensor, Tensor]:
    """Whether a row's column lies in this chunk of columns, and where; anywhere in it if not."""
    return (column >= at.start) & (column < at.stop), (column - at.start).clamp(0, chunk.shape[1] - 1)


def _set(chunk: Float[Tensor, "p c"], column: Int[Tensor, "p 1"], at: slice, value: Tensor) -> None:
    inside, i = _within(chunk, column, at)
    chunk.scatter_(1, i, torch.where(inside, value, chunk.gather(1, i)))


def _add(chunk: Float[Tensor, "p c"], column: Int[Tensor, "p 1"], at: slice, value: float) -> Tensor:
    inside, i = _within(chunk, column, at)
    return chunk.scatter_add_(1, i, value * inside.to(chunk.dtype))
