"""Relative flatness of layers over a data set, with its error."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from relflat.capture.resolve import Layer
from relflat.errors import LayerError
from relflat.measure.adaptive import by_probes, by_xtrace
from relflat.measure.batches import Batch, ForwardFn
from relflat.measure.sweep import measuring
from relflat.options import Curvature, Options, checked
from relflat.plot.shown import ByLayer
from relflat.result import Flatness

_DEFAULT_PROBES, _DEFAULT_XTRACE = 16, 32
P = ParamSpec("P")
T = TypeVar("T")


@checked
def relative_flatness_by_layer(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    *,
    layer: Layer,
    curvature: Curvature = "hessian",
    method: str = "auto",
    probes: int | None = None,
    rtol: float | None = None,
    adaptive: bool = False,
    normalize_features: bool = False,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    process_group: Any = None,
) -> ByLayer:
    """Relative flatness of several layers in one go; arguments as for :func:`relative_flatness`.

    Returns:
        ``{qualified name: Flatness}`` in order of registration: a dictionary that prints and renders as a table.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = (torch.randn(32, 4), torch.randint(3, (32,)))
        >>> list(relative_flatness_by_layer(model, nn.CrossEntropyLoss(), data, layer=["0", "2"]))
        ['0', '2']
    """
    xtrace = method == "xtrace"
    probes = probes or (_DEFAULT_XTRACE if xtrace else _DEFAULT_PROBES)
    if rtol is not None and not xtrace:
        probes = 2 if probes == 1 else probes  # one has no error
    repeated = "method='xtrace'" if xtrace else "rtol" if rtol is not None else None
    options = Options(curvature, method, probes, adaptive, normalize_features, measuring=True, trace=True)
    with measuring(model, loss_fn, data, layer, options, forward, device, seed, process_group) as measurement:
        measurement.prepare(repeated)
        return ByLayer((by_xtrace if xtrace else by_probes)(measurement, rtol).results(curvature))


def _arguments_of(function: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Give a function of ``(*args, **kwargs)`` the arguments of another, to readers and type checkers alike."""

    def decorate(of_those: Callable[..., T]) -> Callable[P, T]:
        returned = inspect.signature(of_those).return_annotation
        signature = inspect.signature(function).replace(return_annotation=returned)
        of_those.__signature__ = signature  # type: ignore[attr-defined]
        return of_those

    return decorate


@_arguments_of(relative_flatness_by_layer)
def relative_flatness(*args: Any, **kwargs: Any) -> Flatness:  # noqa: D417 they are those above
    """Relative flatness of one layer: Petzka et al. 2021, Def. 3, of the loss over all of the data.

    ``kappa(W) = sum_{s,s'} <w_s, w_s'> Tr(H_{s,s'})``, of the scalar that ``loss_fn`` would give on the whole data
    set at once, however it is cut into batches: for means, batches count by their samples (class weights, tokens
    not ignored), for sums they are added. The model runs in evaluation mode, without touching its mode,
    gradients, buffers or the global random number generators.

    Args:
        model: the network.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar, or one value a row (taken as a mean).
        data: batches ``(inputs, targets)``, one such tuple, or mappings with ``labels``; a progress bar goes around
            them: ``tqdm(loader)``. ``"xtrace"`` needs the same samples in each pass (no augmentation), in any order.
        layer: as for :class:`relflat.FAM`, but exactly one layer.
        curvature: ``"hessian"`` (may be negative for a hidden layer) or ``"ggn"``.
        method: ``"auto"`` takes a closed form where there is one, a sum over a basis where that is short, and
            probes else. ``"closed_form"``, ``"exact"``, ``"probe"``, ``"finite_difference"`` insist.
            ``"xtrace"`` takes kappa as the trace of one operator over all of the data (Epperly et al. 2024, see
            :mod:`relflat.measure.xtrace`): on trained networks more precise than probes from about 24 products on,
            at more memory, without ``Tr H``. ``"auto"`` never takes it, as it is less precise before training.
        probes: random directions a batch (default 16); for ``"xtrace"`` products with the curvature (default 32).
        rtol: if given, goes over the data again with more probes until ``stderr <= rtol * |value|``. ``"xtrace"``
            then starts from 32 products or more, as fewer do not tell the error.
        adaptive: the adaptive form (``W' A W`` weighted feature by feature).
        normalize_features: measure the layer with features divided by their standard deviation over the data
            and its weight multiplied by it. Features that never vary are left out with their columns of the
            weight, as the limit of small deviations has it for a dead feature (0 throughout); a constant other
            than 0 acts as a bias. Goes over the data twice.
        forward: ``forward(model, batch) -> (outputs, targets)``, for batches of another kind.
        device: where to move batches; by default where the model's parameters are.
        seed: of the probes; ranks draw different ones.
        process_group: a process group of ``torch.distributed``, each rank of which gives its own share of the data:
            the sums are added up over the ranks, so that all get the value of all the data, whatever the sizes of
            the shares. None: this process's data are all there is.

    Returns:
        The value with its standard error and companions; see :class:`relflat.Flatness`.

    Raises:
        LayerError, LossError, DataError, ConfigError, GraphError: if something does not fit.
        NonFiniteError: if the loss or kappa is not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = (torch.randn(32, 4), torch.randint(3, (32,)))
        >>> flat = relative_flatness(model, nn.CrossEntropyLoss(), data, layer="output")
        >>> flat.method, flat.stderr
        ('closed_form', 0.0)
        >>> flat.value > 0
        True

    Cost: one forward pass over the data with a closed form; see :mod:`relflat.estimate.products` for the others.
    ``"xtrace"``: two passes over the data, for each doubling of ``rtol`` two more; memory of 18
    bytes for each product, feature and output (or feature again, if there are fewer features than outputs).
    """
    found = relative_flatness_by_layer(*args, **kwargs)
    if len(found) > 1:
        raise LayerError(f"layer= matches {list(found)}; name one, or use relative_flatness_by_layer for all")
    return next(iter(found.values()))
