r"""The definitions, written as the papers write them: dense, float64, slow, and easy to check by eye.

Everything here is a function of two things: ``loss``, the training loss as a function of one layer's weight
matrix, and ``W``, that matrix, of shape (d, m): d outputs, m features. :func:`relflat.reference.at_layer` makes
both from a model and data. No fast path of relflat imports this module; the tests compare every fast path with it.

All functions are differentiable in ``W`` and, through ``loss``, in every other parameter of the model.

Sources: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 ("theory paper"); Adilova et al.,
*FAM: Relative Flatness Aware Minimization*, TAG-ML 2023 ("FAM paper"). I1 to I9 are the identities of
docs/concepts.md.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import hessian, jacrev

from relflat.errors import DataError
from relflat.options import checked
from relflat.theory.at_layer import LossOfWeight, OutputsOfWeight

# Hessians


@checked
def layer_hessian(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, "d m d m"]:
    """Return H, ``H[s, t, s', t'] = d2 L / dw_{s,t} dw_{s',t'}`` (FAM paper, section 3).

    Cost: d m Hessian-vector products and (d m)^2 numbers.

    Example:
        >>> layer_hessian(lambda W: (W**2).sum(), torch.ones(2, 3)).shape
        torch.Size([2, 3, 2, 3])
    """
    return hessian(loss)(W)  # H[s, t, s', t'] = d2 L / dw_{s,t} dw_{s',t'}


@checked
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
    z = outputs(W)
    J = jacrev(outputs)(W).reshape(z.numel(), W.numel())  # dz_i / dw_j
    A = hessian(loss_of_outputs)(z).reshape(z.numel(), z.numel())  # d2 L / dz_i dz_j
    return (J.T @ A @ J).reshape(*W.shape, *W.shape)


# Relative flatness


@checked
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


@checked
def kappa_of_hessian(W: Float[Tensor, "d m"], H: Float[Tensor, "d m d m"]) -> Float[Tensor, ""]:
    """Return the double sum of Definition 3 for a Hessian at hand (or a Gauss-Newton matrix).

    Example:
        >>> W = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> H = torch.eye(4).reshape(2, 2, 2, 2)  # H_{s,s'} is the identity for s = s', else 0
        >>> kappa_of_hessian(W, H)  # (1 * 2) + (2 * 2)
        tensor(6.)
    """
    d, m = W.shape
    if H.shape != (d, m, d, m):
        raise DataError(f"H has shape {tuple(H.shape)}: the Hessian in W has {(d, m, d, m)}")
    total = W.new_zeros(())
    for s in range(d):
        for s_ in range(d):
            total = total + (W[s] @ W[s_]) * torch.trace(H[s, :, s_, :])  # Def. 3: <w_s, w_s'> Tr(H_{s,s'})
    return total


@checked
def kappa_ggn(outputs: OutputsOfWeight, loss_of_outputs: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    """Relative flatness with the Gauss-Newton matrix in the place of the Hessian.

    Arguments and cost are those of :func:`layer_ggn`.

    Example:
        >>> W = torch.tensor([[3.0, 4.0]])
        >>> phi = torch.tensor([1.0, 2.0])
        >>> kappa_ggn(lambda W: W @ phi, lambda z: (z**2).sum(), W)
        tensor(250.)
    """
    return kappa_of_hessian(W, layer_ggn(outputs, loss_of_outputs, W))


@checked
def kappa_adaptive(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    """The adaptive form: the Laplacian at r = 0 of ``L(W (I + diag r))``, r in R^m.

    kappa is the Laplacian over all matrices R of ``L(W (I + R))``; here only diagonal ones count, which makes
    the value invariant to rescaling single input features (theory paper, Definition 2, with diagonal feature
    matrices). It is I9 with its expectation carried out.

    Cost: m Hessian-vector products.

    Example:
        >>> phi = torch.tensor([1.0, 2.0])
        >>> kappa_adaptive(lambda W: ((W @ phi) ** 2).sum(), torch.tensor([[3.0, 4.0]]))  # 2 (3^2 + 8^2)
        tensor(146.)
    """
    # W (I + diag r) multiplies column t by 1 + r_t. The trace is the sum of d2 L / dr_t^2 at r = 0, which is
    # I9: E_r <W diag(r), H [W diag(r)]> over independent signs r_t.
    return torch.trace(hessian(lambda r: loss(W * (1 + r)))(W.new_zeros(W.shape[1])))


@checked
def kappa_normalized(loss: LossOfWeight, W: Float[Tensor, "d m"], std: Float[Tensor, " m"]) -> Float[Tensor, ""]:
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
    # V = W diag(std) reads phi / std: L as a function of V is L(V diag(1 / std)), the other columns held constant.
    return kappa(lambda V: loss(W.index_copy(1, varying, V / std)), W[:, varying] * std)


# Its relatives


@checked
def trace(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    """Tr H of the layer, not relative to anything: it changes when the layer is rescaled.

    Example:
        >>> trace(lambda W: (W**2).sum(), torch.ones(2, 3))
        tensor(12.)
    """
    return torch.trace(layer_hessian(loss, W).reshape(W.numel(), W.numel()))


@checked
def layerwise(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    """The layerwise measure ``||W||_F^2 Tr H`` of the FAM paper, section 3.

    It bounds kappa from above where the Hessian is positive semi-definite.

    Example:
        >>> layerwise(lambda W: (W**2).sum(), torch.ones(2, 3))
        tensor(72.)
    """
    return (W**2).sum() * trace(loss, W)


@checked
def max_eigenvalue(loss: LossOfWeight, W: Float[Tensor, "d m"]) -> Float[Tensor, ""]:
    """The maximum-eigenvalue measure ``sum_s ||w_s||^2 lambda_max(H_{s,s})`` (theory paper, section 4).

    Example:
        >>> max_eigenvalue(lambda W: (W**2).sum(), torch.ones(2, 3))
        tensor(12.)
    """
    H = layer_hessian(loss, W)
    rows = [(W[s] @ W[s]) * torch.linalg.eigvalsh(H[s, :, s, :])[-1] for s in range(W.shape[0])]
    return torch.stack(rows).sum()


@checked
def feature_robustness(
    loss: LossOfWeight, W: Float[Tensor, "d m"], matrices: Iterable[Float[Tensor, "m m"]], delta: float
) -> Float[Tensor, ""]:
    """Feature robustness, theory paper Definition 2: the mean over A of ``L(W (I + delta A)) - L(W)``.

    A perturbation ``phi -> phi + delta A phi`` of the features is one of the weight, ``W -> W + delta W A``.
    Over random orthogonal A it tends to ``delta^2 / (2 m) kappa`` (theory paper, section 4; I8 for noise of the
    features), plus a term of first order in delta, which cancels when ``-A`` is among the matrices for each A.

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
    differences = [loss(W + delta * W @ A) - loss(W) for A in matrices]  # Def. 2: L(W (I + delta A)) - L(W)
    if not differences:
        raise DataError("matrices is empty: feature robustness is a mean over at least one feature matrix A")
    return torch.stack(differences).mean()


# The same quantities in the layer's output space


@checked
def kappa_in_output_space(
    W: Float[Tensor, "d m"], phi: Float[Tensor, "*positions m"], H_z: Float[Tensor, "nd nd"]
) -> Float[Tensor, ""]:
    """Relative flatness from the curvature with respect to a dense layer's outputs ``z = phi W' + b`` (I5).

    For the basis direction ``E_{t,t'}`` of all feature matrices R the outputs move along ``u = phi (W E)'``,
    and kappa is the sum of ``<u, H_z u>`` over the basis: I5 with its expectation carried out. Holding ``H_z``
    constant while differentiating in W and phi is the library's ``gradient="frozen"``.

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
            total = total + u @ H_z @ u  # I5: <u, H_z u>
    return total
