"""Relative flatness of layers over a data set, with its error."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from relflat import perturb
from relflat.errors import ConfigError, DataError, LayerError, LossError, NonFiniteError
from relflat.layers import rows
from relflat.losses import KnownLoss, known_loss
from relflat.penalty import Curvature, Estimator, Method, Scene, Spec, output_tensor
from relflat.probes import Contributions
from relflat.result import Flatness
from relflat.rng import generator, rng_preserved
from relflat.site import safe_std
from relflat.tap import Forward, Layer, Tap

Batch = Any
ForwardFn = Callable[[nn.Module, Batch], tuple[Any, Any]]

_DEFAULT_PROBES = 16
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
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Flatness:
    """Relative flatness of one layer: Petzka et al. 2021, Def. 3, of the loss over all of the data.

    ``kappa(W) = sum_{s,s'} <w_s, w_s'> Tr(H_{s,s'})``, of the scalar that ``loss_fn`` would give on the whole data
    set at once, however it is cut into batches: for means, batches count by their samples (class weights, tokens
    not ignored), for sums they are added. The model runs in evaluation mode, without touching its mode,
    gradients, buffers or the global random number generators.

    Args:
        model: the network.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar, or one value a row (taken as a mean).
        data: batches ``(inputs, targets)``, one such tuple, or mappings with ``labels``.
        layer: as for :class:`relflat.FAM`, but exactly one layer.
        curvature: ``"hessian"`` (may be negative for a hidden layer) or ``"ggn"``.
        method: ``"auto"`` takes a closed form where there is one, a sum over a basis where that is short, and
            probes else. ``"closed_form"``, ``"exact"``, ``"probe"``, ``"finite_difference"`` insist.
        probes: random directions a batch (default 16).
        rtol: if given, goes over the data again with more probes until ``stderr <= rtol * |value|``.
        adaptive: the adaptive form (``W' A W`` weighted feature by feature).
        normalize_features: measure the layer with features divided by their standard deviation over the data
            and its weight multiplied by it. Goes over the data twice.
        forward: ``forward(model, batch) -> (outputs, targets)``, for batches of another kind.
        device: where to move batches; by default where the model's parameters are.
        seed: of the probes.

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

    Cost: one forward pass over the data with a closed form; see :mod:`relflat.probes` for the others.
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
        forward=forward,
        device=device,
        seed=seed,
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
    forward: ForwardFn | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
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
    count = _DEFAULT_PROBES if probes is None else probes
    spec = Spec(
        curvature, method, count, adaptive, normalize_features, gradient=None, trace=True, exact_up_to=64
    )
    if method == "finite_difference" and curvature != "hessian":
        raise ConfigError("method='finite_difference' estimates the Hessian: curvature must be 'hessian'")
    recording = _Switch()
    tap = Tap(model, layer, when=lambda: recording.on)
    tap.keep_rng = method == "finite_difference"
    place = _device_of(model) if device is None else torch.device(device)
    batches = _Batches(data, forward or default_forward, place)
    try:
        with _undisturbed(model), recording:
            measurement = _Measurement(model, loss_fn, tap, batches, spec, seed)
            if normalize_features:
                measurement.scales = measurement.feature_scales()
            sums = measurement.sweep(0)
            while rtol is not None and (short := sums.short_of(rtol)):
                if sums.probes * 2 > _MOST_PROBES:
                    raise ConfigError(
                        f"rtol={rtol} is out of reach: after {sums.probes} probes {short}; ask for less, or "
                        "use method='exact'"
                    )
                sums.merge(measurement.sweep(sums.probes, probes=sums.probes))
            return sums.results(tap, spec, measurement.scales)
    finally:
        tap.close()


def default_forward(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Run the model on ``(inputs, targets)`` or on a mapping with ``labels``; returns outputs and targets."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise DataError(f"the batch is a mapping without 'labels' (keys {list(batch)}); pass forward=")
        outputs = model(**{k: v for k, v in batch.items() if k != "labels"})
        return getattr(outputs, "logits", outputs), batch["labels"]
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise DataError(
            f"a batch must be (inputs, targets) or a mapping with 'labels', not {type(batch).__name__}"
            f"{f' of length {len(batch)}' if isinstance(batch, list | tuple) else ''}; pass forward="
        )
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        return model(**inputs), targets
    return (model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)), targets


# -- one pass over the data ----------------------------------------------------------------------------------


@dataclass
class _Layer:
    """Running sums for one layer, in float64, each already weighted as the whole loss is."""

    kappa: float = 0.0
    kappa_var: float = 0.0
    trace: float = 0.0
    trace_var: float = 0.0
    energy: float = 0.0
    method: str = ""
    exact: bool = True


@dataclass
class _Sums:
    """What a sweep over the data adds up."""

    layers: dict[str, _Layer]
    probes: int
    loss: float = 0.0
    confidence: float = 0.0
    known: KnownLoss | None = None
    samples: int = 0
    weight: float = 0.0  # what a mean reduction divides by, or 0 for sums
    batches: int = 0

    def short_of(self, rtol: float) -> str:
        """Say which layer's error is too large, or nothing."""
        for name, x in self.layers.items():
            value, error = self._scaled(x.kappa), self._error(x.kappa_var)
            if error > rtol * abs(value):
                return f"kappa({name}) = {value:.4g} ± {error:.2g}"
        return ""

    def _scaled(self, total: float) -> float:
        return total / self.weight if self.weight else total

    def _error(self, variance: float) -> float:
        return self._scaled(math.sqrt(max(variance, 0.0)))

    def merge(self, other: "_Sums") -> None:
        """Average with a sweep that used other probes, by number of probes."""
        a = self.probes / (self.probes + other.probes)
        for name, x in self.layers.items():
            y = other.layers[name]
            x.kappa, x.trace = a * x.kappa + (1 - a) * y.kappa, a * x.trace + (1 - a) * y.trace
            x.kappa_var = a**2 * x.kappa_var + (1 - a) ** 2 * y.kappa_var
            x.trace_var = a**2 * x.trace_var + (1 - a) ** 2 * y.trace_var
            x.method = x.method.replace(f"{self.probes})", f"{self.probes + other.probes})")
        self.probes += other.probes

    def results(self, tap: Tap, spec: Spec, scales: Mapping[str, Tensor]) -> dict[str, Flatness]:
        """Divide by what the loss divides by, and check."""
        found = {}
        for name, x in self.layers.items():
            weight: Any = tap.layers[name].weight
            w = weight.detach().double() * scales.get(name, torch.ones(())).double().to(weight.device)
            norm = float(torch.linalg.vector_norm(w))
            trace = self._scaled(x.trace)
            found[name] = Flatness(
                value=self._scaled(x.kappa),
                stderr=0.0 if x.exact else self._error(x.kappa_var),
                method=x.method,
                layer=name,
                curvature=spec.curvature,
                trace=trace,
                trace_stderr=0.0 if x.exact else self._error(x.trace_var),
                layerwise=norm**2 * trace,
                weight_norm=norm,
                feature_norm2=x.energy / self.samples,
                loss=self._scaled(self.loss),
                confidence=self.confidence / self.samples if self.known and self.known.confidence else None,
                samples=self.samples,
            )
            if not math.isfinite(found[name].value):
                raise NonFiniteError(
                    f"kappa of layer {name!r} is {found[name].value}: check the model's weights and the inputs"
                )
        return found


@dataclass
class _Measurement:
    model: nn.Module
    loss_fn: Callable[..., Any]
    tap: Tap
    batches: "_Batches"
    spec: Spec
    seed: int
    scales: dict[str, Tensor] = field(default_factory=dict)
    _additive: str | None = None  # how an unknown loss adds up over batches

    def sweep(self, first_probe: int, probes: int | None = None) -> _Sums:
        """Go over the data once."""
        spec = self.spec if probes is None else replace(self.spec, probes=probes)
        estimator = Estimator(spec, self.seed)
        sums = _Sums({}, spec.probes)
        graph = True
        for i, (batch, is_only) in enumerate(self.batches):
            with torch.set_grad_enabled(graph):
                outputs, targets, loss, record = self._forward(batch)
            tensor = output_tensor(outputs)
            known = known_loss(self.loss_fn, outputs, (targets,), {})
            scale = self._weight(outputs, targets, loss, known, is_only)
            scene = Scene(record.calls, loss, tensor, known, targets if known else None, self.scales)
            step = (first_probe << 32) + i
            parts = self._estimate(estimator, scene, record, targets, outputs, step)
            graph = graph and not all(p.method == "closed_form" for p in parts.values())
            self._add(sums, scene, parts, scale, _samples(tensor, record))
        if sums.batches == 0:
            raise DataError("the data is empty: no batch to measure on")
        return sums

    def _forward(self, batch: Batch) -> tuple[Any, Any, Tensor, Forward]:
        outputs, targets = self.batches.forward(self.model, batch)
        record = self.tap.take()[-1]
        return outputs, targets, self._loss(outputs, targets), record

    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        try:
            loss = self.loss_fn(outputs, targets)
        except IndexError as error:
            raise LossError(
                f"{error}: a target lies outside the classes; mend the labels or set ignore_index"
            ) from error
        if not isinstance(loss, Tensor):
            raise LossError(f"the loss is {type(loss).__name__}, not a tensor")
        if not bool(torch.isfinite(loss.detach()).all()):
            raise NonFiniteError(
                f"the loss is {float(loss.detach().sum())} on a batch: check the model's weights, inputs, targets"
            )
        return loss

    def _estimate(
        self, estimator: Estimator, scene: Scene, record: Forward, targets: Any, outputs: Any, step: int
    ) -> dict[str, Contributions]:
        if self.spec.method != "finite_difference":
            return estimator(scene, step)

        def run(inject: perturb.Inject) -> Tensor:
            with torch.no_grad():
                replayed = self.tap.replay(record, inject)
                same = replayed if outputs is record.outputs else output_tensor(replayed)
                return self._loss(same, targets)

        rng = generator(self.seed, step, scene.loss.device)
        return perturb.finite_difference(
            run,
            scene.loss.detach(),
            scene.calls,
            probes=estimator.spec.probes,
            adaptive=self.spec.adaptive,
            scales=self.scales,
            rng=rng,
        )

    def _weight(
        self, outputs: Any, targets: Any, loss: Tensor, known: KnownLoss | None, is_only: bool
    ) -> tuple[float, float]:
        """What the batch's loss is multiplied by, and what the sum is divided by for it (0: it is not).

        A mean is turned back into a sum; the division follows at the end.
        """
        if known is not None and known.reduction != "sum":
            divisor = float(known.normaliser(outputs, targets))
            return (divisor, divisor) if known.reduction == "mean" else (1.0, divisor)
        if known is not None or is_only:
            return (1.0, 0.0) if loss.ndim == 0 else (1.0, float(loss.numel()))
        if loss.ndim > 0:
            return 1.0, float(loss.numel())
        if self._additive is None:
            self._additive = self._how_it_adds_up(outputs, targets, float(loss))
        n = float(_length(outputs))
        return (n, n) if self._additive == "mean" else (1.0, 0.0)

    def _how_it_adds_up(self, outputs: Any, targets: Any, loss: float) -> str:
        """Whether an unknown loss of a batch is the mean or the sum over its samples; tried on two halves."""
        n = _length(outputs)
        if n >= 2:
            cut = (n + 2) // 3
            pieces = [slice(0, cut), slice(cut, n)]
            with torch.no_grad():
                parts = [float(self.loss_fn(_take(outputs, p, n), _take(targets, p, n))) for p in pieces]
            size = max(abs(loss), max(map(abs, parts)), 1e-12)
            close = 1e-4 * size
            if abs((cut * parts[0] + (n - cut) * parts[1]) / n - loss) < close:
                return "mean"
            if abs(sum(parts) - loss) < close:
                return "sum"
        raise LossError(
            "this loss over a batch is neither the mean nor the sum over its samples (or batches hold one sample), "
            "so its value over several batches is undefined; give all data as one batch, or use a known loss"
        )

    def _add(
        self,
        sums: _Sums,
        scene: Scene,
        parts: Mapping[str, Contributions],
        scale: tuple[float, float],
        samples: int,
    ) -> None:
        factor, divisor = scale
        for name, part in parts.items():
            x = sums.layers.setdefault(name, _Layer())
            kappa, kappa_var = _mean_and_variance(part.kappa)
            trace, trace_var = _mean_and_variance(part.trace)
            x.kappa, x.kappa_var = x.kappa + factor * kappa, x.kappa_var + factor**2 * kappa_var
            x.trace, x.trace_var = x.trace + factor * trace, x.trace_var + factor**2 * trace_var
            x.method, x.exact = part.method, part.exact
            for call in scene.calls:
                if call.layer == name:
                    x.energy += float(self._scaled_features(call.phi, name).double().square().sum())
        sums.loss += factor * float(scene.loss.detach().sum())
        if scene.known is not None and scene.known.confidence and scene.outputs is not None:
            sums.known = scene.known
            sums.confidence += samples * float(scene.known.confidence(scene.outputs))
        sums.samples, sums.weight, sums.batches = (
            sums.samples + samples,
            sums.weight + divisor,
            sums.batches + 1,
        )

    def _scaled_features(self, phi: Tensor, name: str) -> Tensor:
        phi = phi.detach()
        return phi / self.scales[name] if name in self.scales else phi

    def feature_scales(self) -> dict[str, Tensor]:
        """Standard deviation of each layer's features over the data, by one extra pass."""
        self.batches.must_be_repeatable("normalize_features")
        moments: dict[str, list[Any]] = {}
        for batch, _ in self.batches:
            with torch.no_grad():
                self.batches.forward(self.model, batch)
            for call in self.tap.take()[-1].calls:
                phi = rows(call.module, call.phi).flatten(0, 1).double()
                count, mean, m2 = moments.setdefault(
                    call.layer, [0, torch.zeros_like(phi[0]), torch.zeros_like(phi[0])]
                )
                delta, n = phi.mean(0) - mean, phi.shape[0]
                moments[call.layer] = [
                    count + n,
                    mean + delta * n / (count + n),
                    m2 + phi.var(0, correction=0) * n + delta.square() * count * n / (count + n),
                ]
        return {name: safe_std(m2 / count) for name, (count, _, m2) in moments.items()}


def _mean_and_variance(values: Tensor | None) -> tuple[float, float]:
    """Sum over groups of the mean over probes, and the variance of that sum (probes independent)."""
    if values is None:
        return math.nan, math.nan
    v = values.detach().double()
    k = v.shape[0]
    variance = float(v.var(0).sum()) / k if k > 1 else math.nan
    return float(v.mean(0).sum()), variance


# -- data ------------------------------------------------------------------------------------------------------


class _Batches:
    """The data as batches on a device; knows of each whether it is the only one."""

    def __init__(self, data: Any, forward: ForwardFn, device: torch.device | None) -> None:
        single = isinstance(data, tuple | Mapping)
        self.data: Iterable[Batch] = [data] if single else data
        self.forward, self.device = forward, device
        if not isinstance(self.data, Iterable):
            raise DataError(f"data must be batches or one (inputs, targets) tuple, not {type(data).__name__}")

    def must_be_repeatable(self, why: str) -> None:
        """Refuse one-shot iterators."""
        if isinstance(self.data, Iterator):
            raise DataError(
                f"{why} goes over the data more than once, and it is an iterator; give a list or loader"
            )

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        ahead = iter(self.data)
        for i in itertools.count():
            window = list(itertools.islice(ahead, 2 if i == 0 else 1))
            if i == 0:
                for batch in window:
                    yield self._move(batch), len(window) == 1
            elif window:
                yield self._move(window[0]), False
            if not window:
                return

    def _move(self, batch: Batch) -> Batch:
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) and self.device else x, batch)


class _Switch:
    """Says whether forwards are recorded."""

    on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *exc: object) -> None:
        self.on = False


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in evaluation mode; restore modes and global random numbers after it."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        with rng_preserved(), torch.enable_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _device_of(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device


def _length(outputs: Any) -> int:
    tensor = output_tensor(outputs)
    if tensor is None or tensor.ndim == 0:
        raise LossError("the outputs hold no tensor with a batch dimension, so batches cannot be weighted")
    return tensor.shape[0]


def _samples(tensor: Tensor | None, record: Forward) -> int:
    if tensor is not None and tensor.ndim:
        return tensor.shape[0] if tensor.ndim > 1 or record.calls[0].phi.ndim > 1 else 1
    return rows(record.calls[0].module, record.calls[0].phi).shape[0]


def _take(tree: Any, piece: slice, n: int) -> Any:
    return tree_map(lambda t: t[piece] if isinstance(t, Tensor) and t.ndim and t.shape[0] == n else t, tree)
