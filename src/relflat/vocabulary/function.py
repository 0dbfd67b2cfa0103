r"""Cross-entropy and kappa of a large output layer, without the (tokens x vocabulary) matrix.

The layer computes ``z_p = W phi_p + b`` for tokens p and classes c, W of shape (d, m); ``pi_p = softmax(z_p)``,
``t_p`` is the smoothed target and ``a_p`` the weight of a token in the reduction (``1 / tokens`` for the mean). Then

    L     = sum_p a_p (log sum_c exp z_pc - sum_c t_pc z_pc)
    kappa = sum_p a_p ||phi_p||^2 v_p        v_p = sum_c pi_pc ||w_c||^2 - ||mu_p||^2        mu_p = sum_c pi_pc w_c

(identity I1 of docs/concepts.md), and what is returned is ``L + strength * kappa``. The formulas of the value, of its
gradients and of a sketch stand with the lines that compute them, in ``softmax.py``, ``gradients.py`` and ``rows.py``.

**Cost**, in products of n d m multiplications, of which plain logits and cross-entropy take three:

                                    value                gradient                                        together
    "frozen", "weights"             logits, pi W         D' (a phi - 2 beta mu); D W costs no more       3
    "full"                          logits, pi W         mu W', (d/dz) W, (d/dz)' phi, pi' (beta mu)     6
    any, k probes                   logits, pi V: k/m    nu V': k/m, (d/dz) W, (d/dz)' phi, pi' nu: k/m  3 + 3 k/m

The three of ``"full"`` cannot be folded into the others: K W is the covariance of the rows of W under pi, applied to
a vector, for which both products need the finished mu. Gradients are made in the forward pass, while a chunk of
probabilities is at hand, which saves computing the logits twice; backward multiplies them by the incoming scalar.
``reduction="none"`` has no such scalar and goes through everything again in backward: 2 products more.

**Memory** beyond inputs and gradients: one buffer of ``chunk_tokens`` x d, one or two of ``chunk_tokens`` x
``chunk_classes``, and for a sketch two of d x k; in float32 (float64 for such inputs). Half-precision inputs are
widened a chunk at a time.
"""

from typing import Any, NamedTuple, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relflat.errors import ConfigError, DataError, GraphError, LayerError
from relflat.options import Gradient, Reduction, checked
from relflat.rng import Rng
from relflat.vocabulary.sweep import Fixed, Inputs, Options, sweep


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


@checked
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
    probes: int | None = None,
    seed: int = 0,
    step: int | None = None,
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
        probes: kappa seen along so many random directions of the features, at most m: value and gradients
            unbiased, the full gradient at the cost of cross-entropy alone. None: exact.
        seed: of the directions.
        step: number of this step, which the directions depend on (and on the rank of the process), so that each
            step sees others and a resumed run the same; needed with ``probes``.
        chunk_tokens: tokens at a time; by default as many as make a buffer of 2^26 probabilities.
        chunk_classes: classes at a time.

    Returns:
        ``(total, task, kappa)``, in float32 (float64 for such inputs). As in ``F.cross_entropy`` a mean over no token
        is not a number, with zero gradients.

    Raises:
        ConfigError: an option has no such value.
        LayerError: the shapes of features, weight and bias do not fit.
        DataError: the targets are no class indices of the right shape and range.
        GraphError: in backward, if the gradient is differentiated again.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> phi, W, y = torch.randn(6, 4), torch.randn(10, 4, requires_grad=True), torch.randint(10, (6,))
        >>> loss = linear_cross_entropy_fam(phi, W, y, strength=0.1)
        >>> loss.total.backward()
        >>> bool(torch.isclose(loss.task, torch.nn.functional.cross_entropy(phi @ W.T, y)))
        True

    Cost: ``gradient="full"`` twice the multiplications of logits and cross-entropy, forward and backward, with exact
    gradients; ``"frozen"`` and ``"weights"`` as many as those; any with k probes 1 + k/m times as many. The relative
    standard error of an estimate is at most ``sqrt(2 / k)``, and ``sqrt(2 / (k r))`` where the weights are spread
    over r directions. See the module for the count and the formulas.
    """
    if callable(strength):
        raise ConfigError(f"strength={strength!r}: a finite number is needed, that of this step")
    options = Options(strength, gradient, reduction, label_smoothing, chunk_tokens, chunk_classes)
    _check_tensors(features, weight, bias, targets)
    _check_shapes(features, weight, bias, targets)
    _check_probes(probes, step, weight)
    d, m = weight.shape
    phi, y = features.reshape(-1, m), targets.reshape(-1).long()
    counted = y != ignore_index
    count = int(counted.sum())
    if count < len(y):
        phi, y = phi[counted], y[counted]
    if count and not 0 <= int(y.min()) <= int(y.max()) < d:
        raise DataError(
            f"targets reach from {int(y.min())} to {int(y.max())} and there are {d} classes; mend the labels or set "
            "ignore_index"
        )
    g = None if probes is None or step is None else _directions(probes, weight, Rng(seed, step))
    total, task, kappa = _apply(phi, weight, bias, Fixed(y, g, options), torch.is_grad_enabled())
    if reduction != "none":
        return LinearCrossEntropy(total, task, kappa)
    everywhere = [x.new_zeros(len(counted)).masked_scatter(counted, x) for x in (total, task, kappa)]
    return LinearCrossEntropy(*(x.reshape(targets.shape) for x in everywhere))


def _check_tensors(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    given = {"features": features, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in given.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise DataError(f"{name} must be a tensor of real numbers, not {getattr(x, 'dtype', type(x).__name__)}")
    if not isinstance(targets, Tensor):
        raise DataError(f"targets must be a tensor, not {type(targets).__name__}; convert it with torch.as_tensor")


def _check_shapes(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
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
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.shape != features.shape[:-1]:
        raise DataError(
            f"targets of shape {tuple(targets.shape)} and type {targets.dtype} for features of shape "
            f"{tuple(features.shape)}: one class index a token is needed"
        )


def _check_probes(probes: int | None, step: int | None, weight: Tensor) -> None:
    if probes is None:
        return
    if not 1 <= probes <= weight.shape[1]:
        raise ConfigError(
            f"probes={probes}: from 1 to {weight.shape[1]}, the number of features, or None for the exact value"
        )
    if step is None:
        raise ConfigError(
            f"probes={probes} without step: pass step=, the number of the training step; with the same directions "
            "in all steps only these would become flat"
        )


def _directions(k: int, weight: Float[Tensor, "d m"], rng: Rng) -> Float[Tensor, "m k"]:
    """``G = sqrt(m / k) Q``, Q the first k columns of a random rotation."""
    m, wide = weight.shape[1], torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        q = torch.linalg.qr(rng.normal(weight.new_empty(m, k, dtype=wide)))[0]
    return q * (m / k) ** 0.5  # E[Q Q'] = k / m I, so that E[G G'] = I


def _apply(*args: Any) -> Any:
    if torch.compiler.is_compiling():  # not as a decorator: that would import the compiler along with relflat
        return torch.compiler.disable(_eagerly)(*args)  # type: ignore[no-untyped-call]
    return _eagerly(*args)


def _eagerly(*args: Any) -> Any:
    return _LinearCrossEntropy.apply(*args)  # type: ignore[no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    """Sweeps, and hands the gradients to autograd.

    Those of a loss of one number are made in the forward pass, and backward multiplies them by the incoming scalar.
    With ``reduction="none"`` each token has an incoming number of its own, so backward sweeps a second time.
    """

    @staticmethod
    def forward(
        ctx: Any, phi: Tensor, weight: Tensor, bias: Tensor | None, fixed: Fixed, differentiate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The total, the task loss and kappa."""
        options, inputs = fixed.options, Inputs(phi, weight, bias)
        each = options.reduction == "none"
        wanted = ctx.needs_input_grad[:3] if differentiate and not each else (False,) * 3
        a = 1 / max(len(fixed.y), 1) if options.reduction == "mean" else 1.0
        task, kappa, gradients = sweep(inputs, fixed, a, wanted)
        ctx.fixed = fixed
        ctx.save_for_backward(*inputs, *gradients)
        if not each:
            reduce = torch.mean if options.reduction == "mean" else torch.sum
            task, kappa = reduce(task), reduce(kappa)
        ctx.mark_non_differentiable(task, kappa)
        return task + options.strength * kappa, task, kappa

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the incoming one, in the types of the inputs."""
        inputs, saved = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        with torch.no_grad():
            if ctx.fixed.options.reduction == "none":
                grads = sweep(Inputs(*inputs), ctx.fixed, grad, ctx.needs_input_grad[:3]).gradients
            else:
                grads = tuple(None if g is None else g * grad for g in saved)
            narrow = [None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True
            narrow = [None if g is None else _Once.apply(g, grad, *inputs) for g in narrow]  # type: ignore[no-untyped-call]
        return (*narrow, None, None)


class _Once(torch.autograd.Function):
    """Passes a gradient on as one that depends on all inputs, in a way that is not known."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        """The gradient."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> NoReturn:
        """Say so."""
        raise GraphError(
            "linear_cross_entropy_fam can be differentiated once, and its gradient was differentiated again; where "
            "second derivatives are needed (kappa of a hidden layer, a gradient penalty) write the logits out: "
            "FAM(nn.CrossEntropyLoss(), model, [layers])(logits, targets)"
        )
