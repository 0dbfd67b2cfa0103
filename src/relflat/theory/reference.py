r"""The definitions, written as the papers write them: dense, float64, slow, and easy to check by eye.

Everything here is a function of two things: ``loss``, the training loss as a function of one layer's weight
matrix, and ``W``, that matrix, of shape (d, m): d outputs, m features. :func:`at_layer` makes both from a
model and data. No fast path of relflat imports this module; the tests compare every fast path with it.

All functions are differentiable in ``W`` and, through ``loss``, in every other parameter of the model.

Sources: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 ("theory paper"); Adilova et al.,
*FAM: Relative Flatness Aware Minimization*, TAG-ML 2023 ("FAM paper").
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from relflat.errors import DataError, LayerError

LossOfWeight = Callable[[Tensor], Tensor]
"""The loss as a function of one weight matrix: Float[Tensor, "d m"] -> Float[Tensor, ""]."""

OutputsOfWeight = Callable[[Tensor], Tensor]
"""The network's outputs as a function of one weight matrix: Float[Tensor, "d m"] -> Float[Tensor, "..."]."""


# From a model to a function of one weight matrix


def at_layer(
    model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, layer: str
) -> tuple[LossOfWeight, Float[Tensor, "d m"]]:
    """Return the loss as a function of one layer's weight, and that weight: what the functions below take.

    Args:
        model: any module whose forward pass is deterministic in its present mode.
        loss_fn: maps ``(model(inputs), targets)`` to a scalar.
        inputs: what the model is called with.
        targets: what ``loss_fn`` is called with, beside the outputs.
        layer: name of a module (its ``weight`` is meant) or of a parameter. It may be used several times in
            one forward pass, or be tied: the definition only sees the parameter.

    Returns:
        ``(loss, W)``: ``loss`` takes a (d, m) matrix, and ``W`` is the present one. A weight of more than two
        dimensions is flattened to (out, everything else), a convolution's to (out, in * k * k). Both are
        float64 and connected to the model's own parameters, whatever their dtype.

    Raises:
        LayerError: the model has no such parameter.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> loss, W = at_layer(model, nn.MSELoss(), torch.ones(4, 3), torch.zeros(4, 2), "weight")
        >>> W.shape, W.dtype, loss(W).shape
        (torch.Size([2, 3]), torch.float64, torch.Size([]))
    """
    outputs, W = outputs_at_layer(model, inputs, layer)

    def loss(V: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
        return _in_float64(loss_fn)(outputs(V), _double(targets))

    return loss, W


def outputs_at_layer(
    model: nn.Module, inputs: Any, layer: str
) -> tuple[OutputsOfWeight, Float[Tensor, "d m"]]:
    """Return the model's outputs as a function of one layer's weight, and that weight.

    Arguments and errors are those of :func:`at_layer`.

    Example:
        >>> outputs, W = outputs_at_layer(nn.Linear(3, 2), torch.ones(4, 3), "weight")
        >>> outputs(W).shape
        torch.Size([4, 2])
    """
    name, parameter = _find_parameter(model, layer)

    def outputs(V: Float[Tensor, "d m"]) -> Tensor:
        state = _double_state(model) | {name: V.reshape(parameter.shape)}
        return functional_call(model, state, (_double(inputs),))

    return outputs, parameter.double().reshape(parameter.shape[0], -1)


def _find_parameter(model: nn.Module, layer: str) -> tuple[str, Tensor]:
    """Return the first name of the parameter that ``layer`` means, and the parameter."""
    aliases = dict(model.named_parameters(remove_duplicate=False))
    for name in (layer, f"{layer}.weight"):
        if name in aliases:
            return next((n, p) for n, p in model.named_parameters() if p is aliases[name])
    raise LayerError(
        f"the model has no parameter {layer!r} or {layer + '.weight'!r}; "
        f"it has: {', '.join(aliases) or 'none'}. "
        "Pass one of these names, or the name of a module that has a weight."
    )


def _double_state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers in float64, still connected to the originals."""
    return {name: _double(t) for name, t in [*module.named_parameters(), *module.named_buffers()]}


def _double(value: Any) -> Any:
    """Return a floating-point tensor in float64, anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _in_float64(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss with its own tensors (class weights) in float64."""
    if not isinstance(loss_fn, nn.Module):
        return loss_fn
    return lambda *args: functional_call(loss_fn, _double_state(loss_fn), args)


# Hessians


def layer_hessian(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, "d m d m"]:
    """Return H, ``H[s, t, s', t'] = d2 L / dw_{s,t} dw_{s',t'}`` (FAM paper, section 3).

    Cost: d m Hessian-vector products and (d m)^2 numbers.

    Example:
        >>> layer_hessian(lambda W: (W**2).sum(), torch.ones(2, 3)).shape
        torch.Size([2, 3, 2, 3])
    """
    return hessian(loss)(W)


def layer_ggn(
    outputs: OutputsOfWeight, loss_of_outputs: LossOfWeight, W: Float[Tensor, "d m"]
) -> Float[Tensor, "d m d m"]:
    r"""Return the generalised Gauss-Newton matrix ``J' A J`` of the layer (Schraudolph 2002).

    J is the Jacobian of all outputs of the network over the whole batch with respect to W, and A the Hessian
    of the loss with respect to these outputs. It leaves out the curvature of the network itself, so it is
    positive semi-definite for a convex loss, and it equals the Hessian where the outputs are linear in W.

    Args:
        outputs: the network's outputs as a function of W, as from :func:`outputs_at_layer`.
        loss_of_outputs: the loss as a function of these outputs.
        W: the weight.

    Cost: one backward pass an output, and the dense Hessian of the loss in its outputs.

    Example:
        >>> W = torch.ones(1, 2)
        >>> layer_ggn(lambda W: W.tanh(), lambda z: (z**2).sum() / 2, W).shape
        torch.Size([1, 2, 1, 2])
    """
    J = jacrev(outputs)(W).reshape(-1, W.numel())
    z = outputs(W)
    A = hessian(loss_of_outputs)(z).reshape(z.numel(), z.numel())
    return (J.T @ A @ J).reshape(*W.shape, *W.shape)


# Relative flatness


def kappa(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    r"""Relative flatness, theory paper Definition 3 and FAM paper section 3.

    ``kappa(W) = sum_{s,s'=1..d} <w_s, w_s'> Tr(H_{s,s'})``, w_s the rows of W.

    Not divided by m, as in the papers. It can be negative where the Hessian is indefinite.

    Cost: that of :func:`layer_hessian`.

    Example:
        For one output and ``L = (w . phi)^2`` the Hessian is ``2 phi phi'``, and kappa is
        ``2 ||w||^2 ||phi||^2``:

        >>> phi = torch.tensor([1.0, 2.0])
        >>> kappa(lambda W: ((W @ phi) ** 2).sum(), torch.tensor([[3.0, 4.0]]))
        tensor(250.)
    """
    return kappa_of_hessian(W, layer_hessian(loss, W))


def kappa_of_hessian(W: Float[Tensor, "d m"], H: Float[Tensor, "d m d m"]) -> Float[Tensor, ""]:
    """Return the double sum of Definition 3 for a Hessian at hand (or a Gauss-Newton matrix).

    Example:
        >>> W = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> H = torch.eye(4).reshape(2, 2, 2, 2)  # H_{s,s'} is the identity for s = s', else 0
        >>> kappa_of_hessian(W, H)  # (1 * 2) + (2 * 2)
        tensor(6.)
    """
    d, _ = W.shape
    total = W.new_zeros(())
    for s in range(d):
        for s_ in range(d):
            total = total + (W[s] @ W[s_]) * torch.trace(H[s, :, s_, :])
    return total


def kappa_ggn(
    outputs: OutputsOfWeight, loss_of_outputs: LossOfWeight, W: Float[Tensor, "d m"]
) -> Float[Tensor, ""]:
    """Relative flatness with the Gauss-Newton matrix in the place of the Hessian.

    Arguments and cost are those of :func:`layer_ggn`.

    Example:
        >>> W = torch.tensor([[3.0, 4.0]])
        >>> phi = torch.tensor([1.0, 2.0])
        >>> kappa_ggn(lambda W: W @ phi, lambda z: (z**2).sum(), W)
        tensor(250.)
    """
    return kappa_of_hessian(W, layer_ggn(outputs, loss_of_outputs, W))


def kappa_adaptive(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    """The adaptive form: the Laplacian at r = 0 of ``L(W (I + diag r))``, r in R^m.

    kappa is the Laplacian over all matrices R of ``L(W (I + R))``; here only diagonal ones count, which makes
    the value invariant to rescaling single input features (theory paper, Definition 2, with diagonal feature
    matrices).

    Cost: m Hessian-vector products.

    Example:
        >>> phi = torch.tensor([1.0, 2.0])
        >>> kappa_adaptive(lambda W: ((W @ phi) ** 2).sum(), torch.tensor([[3.0, 4.0]]))  # 2 (3^2 + 8^2)
        tensor(146.)
    """
    return torch.trace(hessian(lambda r: loss(W * (1 + r)))(W.new_zeros(W.shape[1])))


def kappa_normalized(
    loss: LossOfWeight, W: Float[Tensor, "d m"], std: Float[Tensor, " m"]
) -> Float[Tensor, ""]:
    """Relative flatness of the same function, written in normalised features (theory paper, section 5).

    The features are divided by ``std`` and the columns of the weight are multiplied by it:
    ``W phi = (W diag(std)) (phi / std)``. kappa is that of the layer ``V = W diag(std)``.

    A feature that never varies (``std`` 0) is left out: its column of the weight is not one of V and is held
    constant. For a dead feature, 0 throughout, that is the limit of small deviations, in which the column of V
    goes to 0 and the feature has no effect. A constant other than 0 acts as a bias; its ``phi / std`` would be
    infinite, and kappa takes no notice of biases.

    Args:
        loss: the loss as a function of W.
        W: the weight.
        std: standard deviation of each feature over the data, 0 for those that never vary.

    Raises:
        DataError: a feature's standard deviation is negative or not a number.

    Cost: that of :func:`kappa`.

    Example:
        >>> phi, std = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
        >>> kappa_normalized(lambda W: ((W @ phi) ** 2).sum(), torch.tensor([[3.0, 4.0]]), std)  # 2 * 73 * 2
        tensor(292.)
    """
    if not bool((std >= 0).all()):
        raise DataError(f"std has values that are no standard deviation ({std.tolist()}): negative or nan")
    (varying,) = (std > 0).nonzero(as_tuple=True)
    std = std[varying]
    if not len(std):
        return (0 * W).sum()
    return kappa(lambda V: loss(W.index_copy(1, varying, V / std)), W[:, varying] * std)


# Its relatives


def trace(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    """Tr H of the layer, not relative to anything: it changes when the layer is rescaled.

    Example:
        >>> trace(lambda W: (W**2).sum(), torch.ones(2, 3))
        tensor(12.)
    """
    return torch.trace(layer_hessian(loss, W).reshape(W.numel(), W.numel()))


def layerwise(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    """The layerwise measure ``||W||_F^2 Tr H`` of the FAM paper, section 3.

    It bounds kappa from above where the Hessian is positive semi-definite.

    Example:
        >>> layerwise(lambda W: (W**2).sum(), torch.ones(2, 3))
        tensor(72.)
    """
    return (W**2).sum() * trace(loss, W)


def max_eigenvalue(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    """The maximum-eigenvalue measure ``sum_s ||w_s||^2 lambda_max(H_{s,s})`` (theory paper, section 4).

    Example:
        >>> max_eigenvalue(lambda W: (W**2).sum(), torch.ones(2, 3))
        tensor(12.)
    """
    H = layer_hessian(loss, W)
    rows = [(W[s] @ W[s]) * torch.linalg.eigvalsh(H[s, :, s, :])[-1] for s in range(W.shape[0])]
    return torch.stack(rows).sum()


def feature_robustness(
    loss: LossOfWeight, W: Float[Tensor, "d m"], matrices: Iterable[Float[Tensor, "m m"]], delta: float
) -> Float[Tensor, ""]:
    """Feature robustness, theory paper Definition 2: the mean over A of ``L(W (I + delta A)) - L(W)``.

    A perturbation ``phi -> phi + delta A phi`` of the features is one of the weight, ``W -> W + delta W A``.
    Over random orthogonal A it tends to ``delta^2 / (2 m) kappa`` (theory paper, section 4), plus a term of
    first order in delta, which cancels when ``-A`` is among the matrices for each A.

    Args:
        loss: the loss as a function of W.
        W: the weight.
        matrices: the feature matrices A.
        delta: size of the perturbation relative to the features.

    Raises:
        DataError: ``matrices`` is empty.

    Cost: one forward pass a matrix.

    Example:
        >>> I = torch.eye(2)
        >>> feature_robustness(lambda W: (W**2).sum(), torch.ones(1, 2), [I, -I], delta=0.5)  # 2 * 0.5^2
        tensor(0.5000)
    """
    differences = [loss(W + delta * W @ A) - loss(W) for A in matrices]
    if not differences:
        raise DataError("matrices is empty: feature robustness is a mean over at least one feature matrix A")
    return torch.stack(differences).mean()


# The same quantities in the layer's output space


def kappa_in_output_space(
    W: Float[Tensor, "d m"], phi: Float[Tensor, "*positions m"], H_z: Float[Tensor, "nd nd"]
) -> Float[Tensor, ""]:
    """Relative flatness from the curvature with respect to a dense layer's outputs ``z = phi W' + b``.

    For the basis direction ``E_{t,t'}`` of all feature matrices R the outputs move along ``u = phi (W E)'``,
    and kappa is the sum of ``<u, H_z u>`` over the basis. Holding ``H_z`` constant while differentiating in W
    and phi is the library's ``gradient="frozen"``.

    Args:
        W: the weight.
        phi: the layer's inputs, any number of leading dimensions.
        H_z: d2 L / dz2 for all positions together, z flattened.

    Cost: m^2 products with H_z.

    Example:
        >>> W, phi = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]])
        >>> kappa_in_output_space(W, phi, torch.tensor([[2.0]]))
        tensor(250.)
    """
    total = W.new_zeros(())
    for t in range(W.shape[1]):
        for t_ in range(W.shape[1]):
            u = (phi[..., t_, None] * W[:, t]).reshape(-1)  # W E_{t,t'} phi = (column t of W) * phi_t'
            total = total + u @ H_z @ u
    return total
