"""FAM: relative flatness aware minimization (Adilova et al. 2023), as a criterion around the criterion."""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from relflat.capture.calls import Call, Forward, depends_on
from relflat.capture.kinds import supported_layers
from relflat.capture.resolve import Layer
from relflat.capture.tap import Inject, Tap
from relflat.curvature.output_space import feature_std
from relflat.curvature.weight_space import Matrix
from relflat.errors import ConfigError, GraphError, LayerError, LossError, SecondDerivativeError
from relflat.estimate import differences as perturb
from relflat.estimate.choose import Curvature, Estimator, Method, Scene, Spec, output_tensor, scene_calls
from relflat.estimate.probes import Contributions, Gradient
from relflat.estimate.radius import Rise
from relflat.guards import Guards
from relflat.loss.known import known_loss
from relflat.loss.reading import read_loss
from relflat.rng import Rng, subset
from relflat.sharding import kept_whole

Again = Callable[..., Tensor]


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
            layer also feeds itself (as in a recurrence), or with ``"finite_difference"``, all its uses count.
        strength: the paper's lambda, on the paper's kappa (not divided by m). May be negative.
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
        method: ``"auto"``, ``"closed_form"``, ``"exact"``, ``"probe"`` or ``"finite_difference"``.
        probes: random directions a step, where the method is stochastic.
        adaptive: the adaptive form, invariant to rescaling of single features too.
        every: the penalty is added on every so-many-th call only, not rescaled.
        warmup_steps: the strength rises linearly from 0 over so many calls.
        layers_per_step: of several layers, draw so many for each step, uniformly without replacement, and multiply
            their kappas by the number of layers over this: unbiased for the sum. ``k`` of ``n`` add a variance of
            ``n (n - k) / k`` times that of kappa between the layers, so layers should have like kappas. Seed and
            step decide the draw, the same on all ranks. Not with ``radius``, which moves all layers at once.
        normalize_features: kappa of the layer with its features divided by their standard deviation over the
            batch (taken as a constant) and its weight multiplied by it; features that do not vary in the batch
            (dead ones, constants) and their columns of the weight are left out of it.
        temperature: for an output layer with cross-entropy: kappa with the softmax of ``logits / temperature``,
            so that confidence hides less of it (Han et al. 2025 use 2).
        unit_features: for an output layer with a known loss: kappa with features of norm 1 (Han et al. 2025).
        seed: of the probes. By default ``torch.initial_seed()``. No global random numbers are used.

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
        strength: float,
        radius: float | None = None,
        curvature: Curvature = "ggn",
        gradient: Gradient = "full",
        method: Method = "auto",
        probes: int = 1,
        adaptive: bool = False,
        every: int = 1,
        warmup_steps: int = 0,
        layers_per_step: int | None = None,
        normalize_features: bool = False,
        temperature: float = 1.0,
        unit_features: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        spec = Spec(
            curvature,
            method,
            probes,
            adaptive,
            normalize_features,
            gradient,
            temperature=temperature,
            unit_features=unit_features,
        )
        ignored = {
            "gradient": gradient != "full",
            "method": method != "auto",
            "temperature": temperature != 1,
        }
        ignored |= {"unit_features": unit_features, "layers_per_step": layers_per_step is not None}
        for name in [k for k, v in ignored.items() if v and radius is not None]:
            raise ConfigError(
                f"{name} has no meaning with radius={radius}, which moves all layers at once and needs no curvature; "
                "leave it out"
            )
        if method == "finite_difference" and gradient != "full":
            raise ConfigError(f"gradient={gradient!r}: finite differences have the full gradient only")
        if gradient is None:
            raise ConfigError("gradient=None: choose one of ['full', 'frozen', 'weights']")
        if not math.isfinite(strength):
            raise ConfigError(f"strength={strength}: a finite number is needed")
        if radius is not None and not radius > 0:
            raise ConfigError(f"radius={radius}: a positive number is needed, or None for kappa itself")
        if every < 1 or warmup_steps < 0:
            raise ConfigError(
                f"every={every}, warmup_steps={warmup_steps}: need every >= 1, warmup_steps >= 0"
            )
        if method == "finite_difference" and curvature != "hessian":
            raise ConfigError("method='finite_difference' estimates the Hessian: add curvature='hessian'")
        self.loss_fn = loss_fn
        self.strength, self.radius, self.every, self.warmup_steps = strength, radius, every, warmup_steps
        self.step, self.layers_per_step = 0, layers_per_step
        self._tap = Tap(model, layer)
        self._estimator = Estimator(spec, torch.initial_seed() if seed is None else seed)
        with ExitStack() as on_error:
            on_error.callback(self._tap.close)
            self._check_layers_per_step()
            if not self._tap.searching:
                self._check_trainable(gradient)
                if normalize_features:
                    self._tap.must_have_features("normalize_features")
            self._rise = None if radius is None else Rise(radius, spec, self._estimator.seed, self._tap)
            on_error.pop_all()
        self._replays = radius is not None or method == "finite_difference"
        self._tap.keep_rng = self._replays or (method == "auto" and curvature == "hessian")
        if self._rise is not None and strength == 1 and every == 1 and warmup_steps == 0 and probes == 1:
            self._inject_noise(self._rise)
        self._guards = Guards()
        self._last: dict[str, Any] = {}
        self._register_state_dict_hook(_without_wrapper)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_wrapper)  # type: ignore[no-untyped-call]

    def _check_trainable(self, gradient: Gradient) -> None:
        for name, target in self._tap.layers.items():
            parameters = [target] if isinstance(target, nn.Parameter) else list(target.parameters())
            if gradient == "weights" and not any(p.requires_grad for p in parameters if p.ndim > 1):
                raise LayerError(
                    f"gradient='weights' reaches the weight of layer {name!r} only, and that is frozen "
                    "(requires_grad=False); unfreeze it or use gradient='full'"
                )

    def _check_layers_per_step(self) -> None:
        wanted, count = self.layers_per_step, len(self._tap.layers)
        if wanted is not None and not 1 <= wanted <= count:
            raise ConfigError(
                f"layers_per_step={wanted}: a number from 1 to {count} is needed, as the layers are "
                f"{list(self._tap.layers)}; None takes all of them"
            )

    def _drawn(self, scene: Scene, step: int) -> tuple[Scene, list[str]]:
        """The part of a pass that belongs to this step's layers, and their names."""
        names = list(self._tap.layers)
        if self.layers_per_step is None:
            return scene, names
        self._check_layers_per_step()  # "output" may have been settled since
        seed = self._estimator.seed
        names = [names[i] for i in subset(seed, step, len(names), self.layers_per_step)]
        calls = [c for c in scene.calls if c.layer in names]
        return replace(
            scene, calls=calls, parameters={n: p for n, p in scene.parameters.items() if n in names}
        ), names

    def _inject_noise(self, rise: Rise) -> None:
        """Perturb the forward pass itself, unless the last layer is meant: its head alone is as cheap."""
        last = list(supported_layers(self._tap.model))[-1:]
        if list(self._tap.layers) != last and not self._tap.searching:
            me = weakref.ref(self)  # no cycle: dropping the criterion removes its hooks at once

            def injector() -> Inject | None:
                fam = me()
                return rise.inject(fam.step + (fam._tap.pending << 40)) if fam and fam._injects() else None

            self._tap.injector = injector

    def _injects(self) -> bool:
        """Whether this step's forward pass is perturbed itself; ``strength`` and the mode may have changed."""
        return self._tap.injector is not None and self.training and self.strength == 1

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
        if self._injects() and self._active():
            return self._injected_loss(outputs, targets, kwargs)
        task = self._task_loss(outputs, targets, kwargs)
        if not self._active():
            self._forget()
            self._last = {"task": task.detach().mean(), "penalty": 0.0, "total": task.detach().mean()}
            return task
        forwards = self._tap.take()

        def again(inject: Inject | None = None, change: tuple[Tensor, Tensor] | None = None) -> Tensor:
            replayed = self._tap.replay(_single(forwards), inject, change)
            return self._task_loss(_same_part(forwards[-1].outputs, outputs, replayed), targets, kwargs)

        tensor = output_tensor(outputs)
        known = known_loss(self.loss_fn, outputs, targets, kwargs)
        if known is None and any(isinstance(t, Tensor) and t.requires_grad for t in targets):
            tensor = None  # the loss depends on the model through its targets too: no Gauss-Newton matrix
        target = targets[0] if known else None
        calls, last = scene_calls(forwards, task), forwards[-1]
        scene = Scene(calls, task, tensor, known, target, last.parameters, last.mode)
        head = (lambda out: self._task_loss(out, targets, kwargs)) if isinstance(outputs, Tensor) else None
        penalty = self._penalty(scene, again, head)
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
        if self._replays:
            raise ConfigError(
                "penalty(loss) cannot compute the loss of a perturbed pass; use criterion(outputs, targets) with "
                "radius= or method='finite_difference'"
            )
        forwards = self._tap.take()
        if self._tap.watching and not forwards[0].parameters and not depends_on(loss, forwards[0].calls):
            return loss.new_zeros(())  # one of several losses, and not one of these layers
        calls = scene_calls(forwards, loss)
        reading = read_loss(loss, calls)
        if self._tap.searching:
            calls = self._tap.settle(calls, None if reading is None else reading.call)
        outputs = output_tensor(forwards[-1].outputs) if len(forwards) == 1 else None
        scene = Scene(calls, loss, outputs, parameters=forwards[-1].parameters, mode=forwards[-1].mode)
        if reading is not None:
            scene.outputs, scene.known, scene.targets = reading.outputs, reading.known, reading.targets
        penalty = self._penalty(scene, None, None)
        return loss.new_zeros(()) if penalty is None else penalty.to(loss.dtype)

    @property
    def last(self) -> dict[str, Any]:
        """The last step in numbers.

        Keys: ``task``, ``penalty`` (``strength * kappa`` as added), ``total``; in training also ``kappa`` (or
        the loss increase, with ``radius``), ``by_layer``, ``method``, ``strength`` (after warm-up), ``skipped``
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
        what = f"radius={self.radius}" if self.radius else f"curvature={self._estimator.spec.curvature!r}"
        return f"layer={self.layers}, strength={self.strength}, {what}"

    # -- how -----------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop forward passes of a training model that this criterion, in evaluation mode, will not use."""
        if not (self._tap.copied or self._tap.watching):
            self._tap.reset()

    def _active(self) -> bool:
        return self.training and self._tap.training

    def _task_loss(self, outputs: Any, targets: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        try:
            loss = self.loss_fn(outputs, *targets, **kwargs)
        except IndexError as error:
            if "arget" not in str(error):
                raise
            raise LossError(
                f"{str(error).rstrip('.')}: a target lies outside the classes (outputs of shape "
                f"{tuple(getattr(outputs, 'shape', ()))}); mend the labels or set ignore_index"
            ) from error
        if not isinstance(loss, Tensor):
            raise LossError(
                f"the criterion returned {type(loss).__name__}, not a tensor; wrap it to return its loss"
            )
        return loss

    def _strength_now(self) -> float:
        if self.step % self.every:
            return 0.0
        return self.strength * min(1.0, (self.step + 1) / (self.warmup_steps + 1))

    def _penalty(
        self, scene: Scene, again: Again | None, head: Callable[[Tensor], Tensor] | None
    ) -> Tensor | None:
        """``strength * kappa``, or None where this step has none; reports in ``last``."""
        strength, step, task = self._strength_now(), self.step, scene.loss.detach().mean()
        self.step += 1
        penalty: Tensor | None = None
        report: dict[str, Any] = {"task": task, "penalty": 0.0, "total": task, "strength": strength}
        if self._guards.finite("the task loss", scene.loss, step) and strength != 0:
            self._check_trainable(self._estimator.spec.mode)
            drawn, names = self._drawn(scene, step)
            parts = self._contributions(drawn, names, step, again, head)
            kappas = {layer: part.kappa for layer, part in parts.items()}
            if self._guards.all_finite({f"kappa of layer {k!r}": v for k, v in kappas.items()}, step):
                value = _shaped(kappas, scene.loss)
                if self.layers_per_step is not None:
                    value = len(self._tap.layers) / self.layers_per_step * value
                    report["layers"] = names
                penalty = strength * value
                report["penalty"] = penalty.detach().mean()
                report["total"] = task + report["penalty"]
                report["kappa"] = value.detach().mean()
            convex = scene.known is not None and self._estimator.spec.curvature == "ggn"
            if not convex and self._rise is None and strength > 0:
                for layer, kappa in kappas.items():
                    self._guards.negative(layer, kappa)
            rows = max(1, scene.loss.numel())  # shares of samples average as their losses do
            report["by_layer"] = {k: v.detach().mean(0).sum() / rows for k, v in kappas.items()}
            report["method"] = ", ".join(dict.fromkeys(p.method for p in parts.values()))
        self._guards.collapse(step, _watched(scene))
        self._last = report | {"skipped": self._guards.skipped, "collapsed": self._guards.collapsed}
        return penalty

    def _contributions(
        self,
        scene: Scene,
        names: Sequence[str],
        step: int,
        again: Again | None,
        head: Callable[[Tensor], Tensor] | None,
    ) -> dict[str, Contributions]:
        spec = self._estimator.spec
        if again is None or not self._replays:
            try:
                with kept_whole(self._tap.model):
                    return self._estimator(scene, step)
            except SecondDerivativeError as error:
                plain = spec.method == "auto" and spec.curvature == "hessian" and spec.gradient == "full"
                if again is None or not plain:
                    raise
                self._guards.falls_back(error)
                self._replays = True
        if self._rise is not None:
            return self._rise(scene, step, again, head)
        calls: dict[str, list[Call]] = {}
        for call in scene.calls:
            calls.setdefault(call.layer, []).append(call)
        return perturb.finite_difference(
            lambda old, new: again(change=(old, new)),
            scene.loss,
            [Matrix.of(name, self._tap.layers[name]) for name in names],
            probes=spec.probes,
            adaptive=spec.adaptive,
            scales={name: feature_std(group) for name, group in calls.items()} if spec.normalize else {},
            rng=Rng(self._estimator.seed, step),
        )

    def _injected_loss(self, outputs: Any, targets: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Strength 1: the forward pass was perturbed itself, and task loss plus penalty is its loss."""
        self._tap.take()
        total = self._task_loss(outputs, targets, kwargs)
        tensor = output_tensor(outputs)
        self._guards.collapse(self.step, {} if tensor is None else {"the outputs": tensor})
        self.step += 1
        self._last = {
            "task": math.nan,
            "penalty": math.nan,
            "total": total.detach().mean(),
            "strength": 1.0,
            "method": f"radius({self.radius:g}), perturbed forward",
            "skipped": self._guards.skipped,
            "collapsed": self._guards.collapsed,
        }
        return total


def _watched(scene: Scene) -> dict[str, Tensor]:
    """What should depend on the input."""
    found = {f"the features of layer {c.layer!r}": c.phi for c in scene.calls}
    return found if scene.outputs is None else found | {"the outputs": scene.outputs}


def _shaped(kappas: Mapping[str, Tensor], task: Tensor) -> Tensor:
    """Mean over probes, summed to the shape of the task loss: all of it, or each sample's share."""
    total: Tensor | None = None
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
        total = share if total is None else total + share
    return torch.zeros_like(task.detach()) if total is None else total


def _single(forwards: list[Forward]) -> Forward:
    if len(forwards) != 1:
        raise GraphError(
            f"radius and finite differences repeat one forward pass, and there were {len(forwards)} since the last "
            "call of the criterion; call it once after each"
        )
    return forwards[0]


def _same_part(recorded: Any, given: Any, replayed: Any) -> Any:
    """The part of a replayed output that ``given`` was of the recorded one."""
    if given is recorded:
        return replayed
    leaves, leaves_again = tree_leaves(recorded), tree_leaves(replayed)
    for leaf, again in zip(leaves, leaves_again, strict=True):
        if leaf is given:
            return again
    raise GraphError(
        "the criterion was given something computed from the model's outputs, which a perturbed forward pass "
        "cannot repeat; move that computation into the model or the loss function"
    )


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
