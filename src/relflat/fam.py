"""FAM: relative flatness aware minimization (Adilova et al. 2023), as a criterion around the criterion."""

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relflat.capture.calls import depends_on
from relflat.capture.outputs import output_tensor
from relflat.capture.resolve import Layer, supported_layers
from relflat.capture.tap import Inject, Tap
from relflat.distributed import kept_whole
from relflat.errors import ConfigError, LayerError, LossError
from relflat.estimate.contributions import Contributions
from relflat.estimate.estimator import Estimator
from relflat.estimate.radius import perturbation
from relflat.estimate.replay import Replay
from relflat.estimate.scene import Scene, calls_behind
from relflat.guards import Guards
from relflat.loss.criterion import Criterion
from relflat.loss.reading import read_loss
from relflat.options import Curvature, Gradient, Options, finite_strength
from relflat.rng import subset


class FAM(nn.Module):
    r"""Task loss plus ``strength * kappa`` of one layer or several: ``L + lambda kappa(W)`` of the paper.

    Wraps the criterion and watches the model through forward hooks, so one line of a training loop changes. In
    evaluation mode of the model it is the plain criterion. It has no parameters of its own and its
    ``state_dict`` is that of the criterion.

    Args:
        loss_fn: the criterion, called as ``loss_fn(outputs, *targets, **kwargs)``.
        model: the module that is called in the training loop.
        layer: a module of the model, a qualified name, a glob, a list of those, or ``"output"``. The kappas of
            several layers are added. A weight shared with another module counts as used in this layer only; if the
            layer is recurrent too, or with ``"finite_difference"``, all its uses count.
        strength: the paper's lambda, on the paper's kappa (not divided by m). May be negative. Or a function of the
            step, ``strength(step) -> float``, step counting calls of the criterion in training from 0; at a strength
            of 0 nothing is estimated.
        radius: if given, the penalty is ``E[L(phi + radius ||phi|| u) - L(phi)]``, u a random unit vector, in
            place of kappa; for small radius and a layer with one position a sample it is ``radius^2 / (2 m) kappa``
            (Petzka et al., Def. 2); tokens and pixels move independently. Kin of
            Gaussian noise injection (Camuto et al. 2020); with ``adaptive`` it is Gaussian dropout of variance
            ``radius^2``.
        curvature: ``"ggn"`` (never negative for losses convex in the outputs) or ``"hessian"``. They agree for
            an output layer, and where the network is piecewise linear after the layer. For ``radius`` neither is
            used.
        gradient: ``"full"`` differentiates all of kappa (Lemma 1); ``"frozen"`` holds the curvature constant;
            ``"weights"`` lets the gradient reach this layer's weight only.
        method: ``"auto"``, ``"closed_form"``, ``"exact"``, ``"probe"``, ``"finite_difference"``, or one that was
            registered (:mod:`relflat.estimate.methods`).
        probes: random directions a step, where the method is stochastic.
        adaptive: the adaptive form, invariant to rescaling of single features too.
        every: the penalty is added on every so-many-th call only, not rescaled.
        layers_per_step: of several layers, draw so many for each step, uniformly without replacement, and multiply
            their kappas by the number of layers over this: unbiased for the sum. ``k`` of ``n`` add a variance of
            ``n (n - k) / k`` times that of kappa between the layers, so layers should have like kappas. Seed and
            step decide the draw, the same on all ranks. Not with ``radius``, which moves all layers at once.
        normalize_features: kappa of the layer with its features divided by their standard deviation over the
            batch (taken as a constant) and its weight multiplied by it; features that do not vary in the batch
            (dead ones, constants) and their columns of the weight are left out of it.
        seed: of the probes. By default ``torch.initial_seed()``. No global random numbers are used.
        warmup_steps: deprecated; give ``strength`` as a function of the step.

    Cost: output layer with a known loss: no extra pass. Other layers, ``"ggn"``: one more backward of the part
    after the layer, and its derivative (with ``layers_per_step`` of what comes after the deepest layer
    drawn). ``radius``: one more forward from a stored batch; for hidden layers
    with ``strength=1`` none, as the forward pass itself is perturbed.

    Raises:
        LayerError, ConfigError: here, if the arguments do not fit; GraphError, LossError: when called.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> criterion = FAM(nn.CrossEntropyLoss(), model, "output", strength=0.1)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> loss = criterion(model(x), y)
        >>> loss.backward()
        >>> criterion.last["method"]
        'closed_form'
        >>> abs(criterion.last["total"] - criterion.last["task"] - criterion.last["penalty"]) < 1e-6
        True
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        model: nn.Module,
        layer: Layer,
        *,
        strength: float | Callable[[int], float],
        radius: float | None = None,
        curvature: Curvature = "ggn",
        gradient: Gradient = "full",
        method: str = "auto",
        probes: int = 1,
        adaptive: bool = False,
        every: int = 1,
        layers_per_step: int | None = None,
        normalize_features: bool = False,
        seed: int | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.options = Options(
            curvature=curvature,
            method=method,
            probes=probes,
            adaptive=adaptive,
            normalize_features=normalize_features,
            gradient=gradient,
            radius=radius,
            every=every,
            layers_per_step=layers_per_step,
        )
        self.loss_fn, self.step = loss_fn, 0
        self.strength = _warmed_up(strength, warmup_steps) if warmup_steps else strength
        if not callable(strength):
            finite_strength(strength)
        self._estimator = Estimator(self.options, torch.initial_seed() if seed is None else seed)
        self._guards = Guards()
        self._last: dict[str, Any] = {}
        self._tap = Tap(model, layer)
        try:
            self._check_layers()
        except Exception:
            self._tap.close()
            raise
        self._tap.keep_rng = self._estimator.repeats or self._estimator.may_repeat
        if self.strength == 1 and radius is not None and every == 1 and probes == 1:
            self._perturb_the_forward_pass()
        self._register_state_dict_hook(_without_wrapper)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_wrapper)  # type: ignore[no-untyped-call]

    def _check_layers(self) -> None:
        """See that the layers go with the options; ``"output"`` may be settled later."""
        options, count = self.options, len(self._tap.layers)
        wanted = options.layers_per_step
        if wanted is not None and not 1 <= wanted <= count:
            raise ConfigError(
                f"layers_per_step={wanted}: a number from 1 to {count} is needed, as the layers are "
                f"{list(self._tap.layers)}; None takes all of them"
            )
        if self._tap.searching:
            return
        if options.normalize_features:
            self._tap.must_have_features("normalize_features")
        if options.radius is not None:
            self._tap.must_have_features("radius=")
        for name, target in self._tap.layers.items() if options.gradient == "weights" else ():
            parameters = [target] if isinstance(target, nn.Parameter) else list(target.parameters())
            if not any(p.requires_grad for p in parameters if p.ndim > 1):
                raise LayerError(
                    f"gradient='weights' reaches the weight of layer {name!r} only, and that is frozen "
                    "(requires_grad=False); unfreeze it or use gradient='full'"
                )

    # -- use -----------------------------------------------------------------------------------------

    def forward(self, outputs: Any, *targets: Any, **kwargs: Any) -> Tensor:
        """Task loss of ``outputs``, plus the penalty while the model trains.

        Args:
            outputs: what the model returned in its last forward pass (or the part of it the criterion takes).
            *targets: passed on to the criterion.
            **kwargs: passed on to the criterion.

        Returns:
            A scalar, or one loss a sample if the criterion does not reduce; then each carries its own share.

        Raises:
            GraphError: if there was no forward pass since the last call, or the outputs are not its.
            LossError: if the loss has no curvature, or a target lies outside the classes.
        """
        criterion = Criterion(self.loss_fn, targets, kwargs)
        if self._perturbs() and self._active():
            return self._loss_of_perturbed(criterion, outputs)
        task = criterion(outputs)
        if not self._active():
            self._forget()
            self._last = {"task": task.detach().mean(), "penalty": 0.0, "total": task.detach().mean()}
            return task
        forwards = self._tap.take()
        calls, last, known = calls_behind(forwards, task), forwards[-1], criterion.known(outputs)
        scene = Scene(
            loss=task,
            calls=calls,
            outputs=None if known is None and criterion.trained_through else output_tensor(outputs),
            known=known,
            targets=targets[0] if known else None,
            parameters=last.parameters,
            mode=last.mode,
            replay=Replay(self._tap, forwards, outputs, criterion),
        )
        penalty = self._penalty(scene)
        return task if penalty is None else task + penalty.to(task.dtype)

    def penalty(self, loss: Tensor) -> Tensor:
        """The penalty for a loss that was computed elsewhere: add it to that loss.

        ``strength * kappa(c L) = c strength * kappa(L)``, so the scale of the loss carries over. The criterion
        given to FAM is not used: a loss that is, up to a constant, a cross-entropy, BCE with logits or squared
        error is recognised by its graph (:mod:`relflat.loss.reading`) and gets the same closed forms; any other is
        differentiated. In evaluation mode it is zero.

        Args:
            loss: any scalar that the model's last forward pass led to, or what was run since :meth:`watch`.

        Returns:
            A scalar.
        """
        if not self._active():
            self._forget()
            return loss.new_zeros(())
        if self._estimator.repeats:
            raise ConfigError(
                "penalty(loss) cannot compute the loss of a perturbed pass; use criterion(outputs, targets) with "
                "radius= or method='finite_difference'"
            )
        forwards = self._tap.take()
        last = forwards[-1]
        if self._tap.watching and not last.parameters and not depends_on(loss, last.calls):
            return loss.new_zeros(())  # one of several losses, and not one of these layers
        calls = calls_behind(forwards, loss)
        reading = read_loss(loss, calls)
        if self._tap.searching:
            calls = self._tap.settle(calls, None if reading is None else reading.call)
        returned = output_tensor(last.outputs) if len(forwards) == 1 else None
        scene = Scene(
            loss=loss,
            calls=calls,
            outputs=returned if reading is None else reading.outputs,
            known=None if reading is None else reading.known,
            targets=None if reading is None else reading.targets,
            parameters=last.parameters,
            mode=last.mode,
        )
        penalty = self._penalty(scene)
        return loss.new_zeros(()) if penalty is None else penalty.to(loss.dtype)

    @property
    def last(self) -> dict[str, Any]:
        """The last step in numbers.

        Keys: ``task``, ``penalty`` (``strength * kappa`` as added), ``total``; in training also ``kappa`` (or
        the loss increase, with ``radius``), ``by_layer``, ``method``, ``strength`` (of this step), ``skipped``
        (penalties left out so far as they were not finite) and ``collapsed`` (features or outputs that did not
        depend on the input when last looked at, every tenth step). With ``layers_per_step``, ``layers`` are those
        drawn, ``by_layer`` has their kappas, and ``kappa`` is the estimate of the sum over all. Where the forward
        pass itself was perturbed (``radius`` on a hidden layer with strength 1) only ``total`` is known: ``task``
        and ``penalty`` are nan.
        """
        return {k: _number(v) for k, v in self._last.items()}

    @property
    def layers(self) -> list[str]:
        """Qualified names of the regularised layers; ``"output"`` is settled by the first forward pass."""
        return list(self._tap.layers)

    def watch(self) -> None:
        """Record from now on whatever calls the layers, until :meth:`reset`.

        For trainers that run parts of the model, not the model itself; then only :meth:`penalty` may follow, as
        often as there are losses, and is 0 for a loss that does not depend on the layers. Tensors recorded are
        kept until :meth:`reset`.
        """
        self._tap.watch()

    def reset(self) -> None:
        """Forget forward passes that were not followed by a call of the criterion; stop watching."""
        self._tap.reset()

    def close(self) -> None:
        """Remove the hooks; from now on the criterion is the plain one."""
        self._tap.close()

    def __enter__(self) -> "FAM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def extra_repr(self) -> str:
        """Show what is regularised and how."""
        radius = self.options.radius
        what = f"radius={radius}" if radius else f"curvature={self.options.curvature!r}"
        return f"layer={self.layers}, strength={self.strength}, {what}"

    # -- how -----------------------------------------------------------------------------------------

    def _active(self) -> bool:
        return self.training and self._tap.training

    def _forget(self) -> None:
        """Drop forward passes of a training model that this criterion, in evaluation mode, will not use."""
        if not (self._tap.copied or self._tap.watching):
            self._tap.reset()

    def _strength_now(self) -> float:
        if self.step % self.options.every:
            return 0.0
        return finite_strength(self.strength(self.step)) if callable(self.strength) else self.strength

    def _penalty(self, scene: Scene) -> Tensor | None:
        """``strength * kappa``, or None where this step has none; reports in ``last``."""
        strength, step, task = self._strength_now(), self.step, scene.loss.detach().mean()
        self.step += 1
        penalty: Tensor | None = None
        report: dict[str, Any] = {"task": task, "penalty": 0.0, "total": task, "strength": strength}
        if self._guards.finite("the task loss", scene.loss, step) and strength != 0:
            self._check_layers()  # "output" may have been settled since
            scene = self._drawn(scene, step, report)
            with kept_whole(self._tap.model):
                parts = self._estimator(scene, step)
            value = self._judged(scene, parts, strength, step, report)
            if value is not None:
                penalty = strength * value
                report["kappa"], report["penalty"] = value.detach().mean(), penalty.detach().mean()
                report["total"] = task + report["penalty"]
        self._guards.collapse(step, scene.watched())
        self._last = report | {"skipped": self._guards.skipped, "collapsed": self._guards.collapsed}
        return penalty

    def _drawn(self, scene: Scene, step: int, report: dict[str, Any]) -> Scene:
        """The part of a pass that belongs to this step's layers."""
        size = self.options.layers_per_step
        if size is None:
            return scene
        names = self.layers
        report["layers"] = [names[i] for i in subset(self._estimator.seed, step, len(names), size)]
        return scene.only(report["layers"])

    def _judged(
        self,
        scene: Scene,
        parts: Mapping[str, Contributions],
        strength: float,
        step: int,
        report: dict[str, Any],
    ) -> Tensor | None:
        """Kappa in the shape of the loss, or None where it is not finite; what was found goes into the report."""
        kappas = {layer: part.kappa for layer, part in parts.items()}
        convex = scene.known is not None and self.options.curvature == "ggn"
        if not convex and self.options.radius is None and strength > 0:
            for layer, kappa in kappas.items():
                self._guards.negative(layer, kappa)
        rows = max(1, scene.loss.numel())  # shares of samples average as their losses do
        report["by_layer"] = {k: v.detach().mean(0).sum() / rows for k, v in kappas.items()}
        report["method"] = ", ".join(dict.fromkeys(p.method for p in parts.values()))
        if not self._guards.all_finite({f"kappa of layer {k!r}": v for k, v in kappas.items()}, step):
            return None
        drawn = self.options.layers_per_step
        value = _shaped(kappas, scene.loss)
        return value if drawn is None else len(self._tap.layers) / drawn * value

    # -- radius with strength 1: the forward pass itself is perturbed -----------------------------------

    def _perturb_the_forward_pass(self) -> None:
        """Do so, unless the last layer is meant, whose perturbed loss is as cheap computed from its output."""
        last = list(supported_layers(self._tap.model))[-1:]
        if self.layers == last or self._tap.searching:
            return
        me = weakref.ref(self)  # no cycle: dropping the criterion removes its hooks at once

        def injector() -> Inject | None:
            fam = me()
            if fam is None or not fam._perturbs():
                return None
            return perturbation(fam.options, fam._estimator.seed, fam.step + (fam._tap.pending << 40))

        self._tap.injector = injector

    def _perturbs(self) -> bool:
        """Whether this step's forward pass is perturbed itself; ``strength`` and the mode may have changed."""
        return self._tap.injector is not None and self.training and self.strength == 1

    def _loss_of_perturbed(self, criterion: Criterion, outputs: Any) -> Tensor:
        """Task loss plus penalty, which is the loss of the perturbed pass."""
        self._tap.take()
        total = criterion(outputs)
        tensor = output_tensor(outputs)
        self._guards.collapse(self.step, {} if tensor is None else {"the outputs": tensor})
        self.step += 1
        self._last = {
            "task": math.nan,
            "penalty": math.nan,
            "total": total.detach().mean(),
            "strength": 1.0,
            "method": f"radius({self.options.radius:g}), perturbed forward",
            "skipped": self._guards.skipped,
            "collapsed": self._guards.collapsed,
        }
        return total


def _warmed_up(strength: float | Callable[[int], float], steps: int) -> Callable[[int], float]:
    if steps < 0 or callable(strength):
        raise ConfigError(
            f"warmup_steps={steps}: give strength as a function of the step alone, such as "
            "strength=lambda step: 0.1 * min(1, step / 1000)"
        )
    warnings.warn(
        "warmup_steps is deprecated; give strength as a function of the step: "
        f"strength=lambda step: {strength} * min(1, (step + 1) / {steps + 1})",
        DeprecationWarning,
        stacklevel=3,
    )
    return lambda step: strength * min(1.0, (step + 1) / (steps + 1))


def _shaped(kappas: Mapping[str, Tensor], task: Tensor) -> Tensor:
    """Mean over probes, summed to the shape of the task loss: all of it, or each sample's share."""
    total = torch.zeros_like(task.detach())
    for layer, values in kappas.items():
        share = values.mean(0)
        if task.ndim == 0:
            share = share.sum()
        elif share.numel() == task.numel():
            share = share.reshape(task.shape)
        else:
            raise LossError(
                f"the criterion returns losses of shape {tuple(task.shape)} and kappa of layer {layer!r} has "
                f"{share.numel()} shares (samples coupled, or not one loss a row); use a criterion that reduces"
            )
        total = total + share
    return total


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value)
    return {k: _number(v) for k, v in value.items()} if isinstance(value, dict) else value


def _without_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}loss_fn.")]:
        state[prefix + key.removeprefix(f"{prefix}loss_fn.")] = state.pop(key)


def _with_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    loss_fn = getattr(module, "loss_fn", None)
    if isinstance(loss_fn, nn.Module):
        for key in loss_fn.state_dict():
            if prefix + key in state:
                state[f"{prefix}loss_fn.{key}"] = state.pop(prefix + key)
