"""Relative flatness of layers over a data set, with its error."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from relflat.capture.resolve import Layer
from relflat.errors import ConfigError, LayerError
from relflat.estimate.choose import Curvature, Method, Spec
from relflat.measure import xtrace
from relflat.measure.batches import Batch, ForwardFn
from relflat.measure.sweep import measuring
from relflat.result import Flatness

_DEFAULT_PROBES, _DEFAULT_XTRACE = 16, 32
_MOST_PROBES = 4096


def relative_flatness(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    *,
    layer: Layer,
    curvature: Curvature = "hessian",
    method: Method = "auto",
    probes: int | None = None,
    rtol: float | None = None,
    adaptive: bool = False,
    normalize_features: bool = False,
    temperature: float = 1.0,
    unit_features: bool = False,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    process_group: Any = None,
) -> Flatness:
    """Relative flatness of one layer: Petzka et al. 2021, Def. 3, of the loss over all of the data.

    ``kappa(W) = sum_{s,s'} <w_s, w_s'> Tr(H_{s,s'})``, of the scalar that ``loss_fn`` would give on the whole data
    set at once, however it is cut into batches: for means, batches count by their samples (class weights, tokens
    not ignored), for sums they are added. The model runs in evaluation mode, without touching its mode,
    gradients, buffers or the global random number generators.

    Args:
        model: the network.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar, or one value a row (taken as a mean).
        data: batches ``(inputs, targets)``, one such tuple, or mappings with ``labels``. ``"xtrace"`` needs the same
            samples in each pass (no augmentation), in any order.
        layer: as for :class:`relflat.FAM`, but exactly one layer.
        curvature: ``"hessian"`` (may be negative for a hidden layer) or ``"ggn"``.
        method: ``"auto"`` takes a closed form where there is one, a sum over a basis where that is short, and
            probes else. ``"closed_form"``, ``"exact"``, ``"probe"``, ``"finite_difference"`` insist.
            ``"xtrace"`` takes kappa as the trace of one operator over all of the data (Epperly et al. 2024, see
            :mod:`relflat.measure.xtrace`):
            on trained networks more precise than probes from about 24 products on, at more
            memory, without ``Tr H``. ``"auto"`` never takes it, as it is less precise before training.
        probes: random directions a batch (default 16); for ``"xtrace"`` products with the curvature (default 32).
        rtol: if given, goes over the data again with more probes until ``stderr <= rtol * |value|``. ``"xtrace"``
            then starts from 32 products or more, as fewer do not tell the error.
        adaptive: the adaptive form (``W' A W`` weighted feature by feature).
        normalize_features: measure the layer with features divided by their standard deviation over the data
            and its weight multiplied by it. Features that never vary are left out with their columns of the
            weight, as the limit of small deviations has it for a dead feature (0 throughout); a constant other
            than 0 acts as a bias. Goes over the data twice.
        temperature: the softmax of the closed form is that of ``logits / temperature`` (Han et al. 2025).
        unit_features: features in the closed form have norm 1 (Han et al. 2025).
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

    Cost: one forward pass over the data with a closed form; see :mod:`relflat.estimate.probes` for the others.
    ``"xtrace"``: two passes over the data, for each doubling of ``rtol`` two more, ``probes`` products in all;
    memory of 18 bytes for each product, feature and output (or feature again, if there are fewer features than
    outputs), 21 if ``rtol`` has them doubled.
    """
    by_layer = relative_flatness_by_layer(
        model,
        loss_fn,
        data,
        layer=layer,
        curvature=curvature,
        method=method,
        probes=probes,
        rtol=rtol,
        adaptive=adaptive,
        normalize_features=normalize_features,
        temperature=temperature,
        unit_features=unit_features,
        forward=forward,
        device=device,
        seed=seed,
        process_group=process_group,
    )
    if len(by_layer) > 1:
        raise LayerError(
            f"layer={layer!r} matches {list(by_layer)}; name one, or use relative_flatness_by_layer for all"
        )
    return next(iter(by_layer.values()))


def relative_flatness_by_layer(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Iterable[Batch] | Batch,
    *,
    layer: Layer,
    curvature: Curvature = "hessian",
    method: Method = "auto",
    probes: int | None = None,
    rtol: float | None = None,
    adaptive: bool = False,
    normalize_features: bool = False,
    temperature: float = 1.0,
    unit_features: bool = False,
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    process_group: Any = None,
) -> dict[str, Flatness]:
    """Relative flatness of several layers in one go; arguments as for :func:`relative_flatness`.

    Returns:
        ``{qualified name: Flatness}`` in order of registration.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = (torch.randn(32, 4), torch.randint(3, (32,)))
        >>> list(relative_flatness_by_layer(model, nn.CrossEntropyLoss(), data, layer=["0", "2"]))
        ['0', '2']
    """
    if rtol is not None and not rtol > 0:
        raise ConfigError(f"rtol={rtol}: a positive number is needed")
    default = _DEFAULT_XTRACE if method == "xtrace" else _DEFAULT_PROBES
    count = default if probes is None else probes
    if rtol is not None and method != "xtrace":
        count = max(count, 2) if count > 0 else count  # one probe has no error
    spec = Spec(
        curvature,
        method,
        count,
        adaptive,
        normalize_features,
        gradient=None,
        trace=True,
        exact_up_to=64,
        temperature=temperature,
        unit_features=unit_features,
    )
    if method == "finite_difference" and curvature != "hessian":
        raise ConfigError("method='finite_difference' estimates the Hessian: curvature must be 'hessian'")
    if method == "xtrace":
        xtrace.check(spec)
    with measuring(
        model, loss_fn, data, layer, spec, forward=forward, device=device, seed=seed
    ) as measurement:
        measurement.group = process_group
        if rtol is not None or method == "xtrace":
            measurement.batches.must_be_repeatable("rtol" if method != "xtrace" else "method='xtrace'")
        if normalize_features:
            measurement.scales = measurement.feature_scales()
        if method == "xtrace":
            return xtrace.measure(measurement, rtol=rtol, most=_MOST_PROBES).results(spec)
        sums = measurement.sweep_all(0)
        sums.check()
        while rtol is not None and (short := sums.short_of(rtol)):
            needed = sums.needed(rtol)
            if sums.probes * 2 > _MOST_PROBES or needed > 4 * _MOST_PROBES:  # the prediction is a rough one
                raise ConfigError(
                    f"rtol={rtol} is out of reach: after {sums.probes} probes {next(iter(short.values()))}, so it "
                    f"takes about {needed:.2g} probes, and {_MOST_PROBES:,} are the most; ask for less, or use "
                    "method='xtrace' or 'exact'"
                )
            sums.merge(measurement.sweep_all(sums.probes, probes=sums.probes))
        return sums.results(spec)
