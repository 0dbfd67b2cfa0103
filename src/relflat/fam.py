"""FAM: relative flatness aware minimization (Adilova et al. 2023), as a criterion around the criterion."""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relflat.capture.calls import Forward, depends_on, step_of
from relflat.capture.graph import ancestors
from relflat.capture.hooks import undisturbed
from relflat.capture.outputs import output_tensor
from relflat.capture.resolve import Layer
from relflat.capture.tap import Tap
from relflat.errors import ConfigError, warn
from relflat.estimate.contributions import shaped
from relflat.estimate.estimator import Estimator
from relflat.estimate.radius import Noise, perturb_passes
from relflat.estimate.replay import Replay
from relflat.estimate.scene import Scene, calls_behind
from relflat.guards import Guards
from relflat.loss.criterion import Criterion, keep_state_dict_of_criterion
from relflat.options import Curvature, Gradient, Number, Options, check, checked
from relflat.result import step_in_numbers
from relflat.rng import subset
from relflat.sizing import BOUND, Sizing


class FAM(nn.Module):
    r"""Task loss plus a penalty on relative flatness, ``L + lambda kappa(W)`` of the paper.

    ``FAM(loss_fn, model)`` needs no tuning: kappa of every weight matrix, now and then, of a size that fits networks
    of all depths, and bounded. Wraps the criterion and watches the model through forward hooks, so one line of a
    training loop changes. In evaluation mode of the model it is the plain criterion, and so is its
    ``state_dict``; a backward pass then warns.

    Args:
        loss_fn: the criterion, called as ``loss_fn(outputs, *targets, **kwargs)``; None for :meth:`penalty` alone.
        model: the module that is called in the training loop.
        layer: a module of the model, a qualified name, a glob, a list of those, or ``"output"``, the one that the
            loss is computed from; by default ``"*"``, every weight matrix that it depends on. Their kappas are added.
            A parameter is turned as its product has it, else rows come first. A weight shared with another module
            counts as used in this layer only; if that is recurrent too, or with ``"finite_difference"``, all uses do.
        strength: the paper's lambda, on the paper's kappa (not divided by m) of a layer that is named. May be
            negative. Or a function of the step (calls in training, from 0), which estimates nothing where it is 0.
        size: in place of a strength: lambda times the number of layers, so that it is on their mean kappa. It has no
            unit and fits shallow and deep networks. Or a function of the step.
        bound: the largest penalty of a step as a share of its task loss; a larger one is scaled down by a factor, a
            constant. None for no bound, as for a loss around 0. Not of ``radius``.
        radius: if given, the penalty is ``E[L(phi + radius ||phi|| u) - L(phi)]``, u a random unit vector at each
            position, in place of kappa; about ``radius^2 / (2 m) kappa`` if small (Petzka et al., Def. 2). Kin of
            Gaussian noise injection (Camuto et al. 2020); with ``adaptive`` Gaussian dropout of that variance.
        curvature: ``"ggn"`` (never negative for losses convex in the outputs) or ``"hessian"``; they agree for an
            output layer, and where the network is piecewise linear after the layer.
        gradient: ``"full"`` differentiates all of kappa (Lemma 1); ``"frozen"`` holds the curvature constant;
            ``"weights"`` lets the gradient reach this layer's weight only.
        method: ``"auto"`` or one of :mod:`relflat.estimate.methods`.
        probes: random directions a step, where the method is stochastic.
        adaptive: the adaptive form, invariant to rescaling of single features too.
        every: the penalty is added on every so-many-th call only, multiplied by that number: its mean is what it
            would be at each. By default 1 with ``strength`` or ``radius``, else 8.
        layers_per_step: draw so many of n layers for each step, uniformly, the same on all ranks, and multiply their
            kappas by ``n / k``, which adds ``n (n - k) / k`` times the variance between layers. Not with ``radius``.
        normalize_features: kappa with features divided by their standard deviation over the batch, a constant,
            without those that do not vary in it.
        seed: of the probes. By default ``torch.initial_seed()``. No global random numbers are used.
        warmup_steps: deprecated; give ``strength`` as a function of the step.

    Cost: output layer with a known loss: no extra pass. Others, ``"ggn"``: one more backward of what comes after the
    deepest layer, and its derivative. ``radius``: one more forward; for hidden layers with ``strength=1`` none.

    Raises:
        LayerError, ConfigError: here, if arguments do not fit; GraphError, LossError: when called.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> criterion = FAM(nn.CrossEntropyLoss(), model)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> loss = criterion(model(x), y)
        >>> loss.backward()
        >>> criterion.layers
        ['0', '2']
    """

    @checked
    def __init__(
        self,
        loss_fn: Callable[..., Any] | None,
        model: nn.Module,
        layer: Layer | None = None,
        *,
        strength: Number | None = None,
        size: Number | None = None,
        bound: float | None = BOUND,
        radius: float | None = None,
        curvature: Curvature = "ggn",
        gradient: Gradient = "full",
        method: str = "auto",
        probes: int = 1,
        adaptive: bool = False,
        every: int | None = None,
        layers_per_step: int | None = None,
        normalize_features: bool = False,
        seed: int | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        options = curvature, method, probes, adaptive, normalize_features, gradient, radius, layers_per_step
        self.options, self.loss_fn, self.step = Options(*options), loss_fn, 0
        given = {"layer": layer, "strength": strength, "size": size, "radius": radius}
        self._sizing = Sizing(given, bound, every, warmup_steps)
        self._estimator = Estimator(self.options, torch.initial_seed() if seed is None else seed)
        self._guards = Guards()
        self._last: dict[str, Any] = {}
        self._tap = Tap(model, "*" if layer is None else layer)
        self._tap.needs_features = normalize_features or radius is not None
        try:
            self._estimator.must_suit(self._tap)
        except Exception:  # whatever it was, the model keeps no hooks of a criterion that was not built
            self._tap.close()
            raise
        self._tap.keep_rng = self._estimator.repeats or self._estimator.may_repeat
        me = weakref.ref(self)  # no cycle: dropping the criterion removes its hooks at once
        self._tap.rests = lambda: (fam := me()) is not None and fam._will_rest()
        if self.strength == 1 and radius is not None and self._sizing.every == 1 and probes == 1:
            perturb_passes(self._tap, lambda: None if (fam := me()) is None else fam._noise())
        keep_state_dict_of_criterion(self)

    @property
    def strength(self) -> Number | None:
        """The paper's lambda, or that of each step, which may be changed between steps; None if a size is used."""
        return None if self._sizing.by_layers else self._sizing.number

    @strength.setter
    def strength(self, strength: Number) -> None:
        self._sizing.change("strength", strength)

    @property
    def size(self) -> Number | None:
        """Lambda times the number of layers, likewise; None if a strength is used."""
        return self._sizing.number if self._sizing.by_layers else None

    @size.setter
    def size(self, size: Number) -> None:
        self._sizing.change("size", size)

    def forward(self, outputs: Any, *targets: Any, **kwargs: Any) -> Tensor:
        """Task loss of ``outputs``, plus the penalty while the model trains.

        Args:
            outputs: what the model returned (or a part of it); losses of one pass before its backward are one step.
            *targets: passed on to the criterion.
            **kwargs: passed on to the criterion.

        Returns:
            A scalar, or one loss a sample if the criterion does not reduce; then each carries its own share.

        Raises:
            GraphError: if the loss was not computed from a forward pass whose backward pass is yet to come.
            LossError: if the loss has no curvature, or a target lies outside the classes.
        """
        if (loss_fn := self.loss_fn) is None:
            raise ConfigError("loss_fn=None: a criterion is needed; without one only penalty(loss) works")
        criterion, active = Criterion(loss_fn, targets, kwargs), self._active()
        task, tensor = criterion(outputs), output_tensor(outputs)
        if not active:
            self._last = {"task": task.detach(), "penalty": 0.0}
            return self._plain(task)
        if self._perturbs():
            return self._perturbed(task, tensor)
        forwards = self._tap.take(task)
        if self._rests(forwards, task):
            return task
        known = criterion.known(outputs)
        if self._tap.unsettled:
            calls_behind(forwards, task)
            self._tap.settle(forwards, task, tensor)
        eager, loss = criterion.eager, task
        if eager is not criterion and (known is None or self.options.curvature == "hessian"):
            loss = eager(outputs)  # what is compiled cannot be differentiated twice
        scene = Scene.of(
            forwards,
            loss,
            outputs=None if known is None and criterion.trained_through else tensor,
            given=outputs,
            known=known,
            replay=Replay(self._tap, forwards, outputs, eager),
        )
        penalty = self._penalty(scene.read(), step := step_of(forwards, self.step))
        return self._left(forwards, task if penalty is None else task + penalty.to(task.dtype), step)

    def penalty(self, loss: Tensor) -> Tensor:
        """The penalty for a loss that was computed elsewhere: add it to that loss.

        ``kappa(c L) = c kappa(L)``, so the scale of the loss carries over. The criterion given to FAM is not used: a
        loss that is, up to a constant, a cross-entropy, BCE with logits or squared error is recognised by its graph
        (:mod:`relflat.loss.reading`) and has the same closed forms. In evaluation mode it is zero.

        Args:
            loss: any scalar that the model's last forward pass led to, or what was run since :meth:`watch`.
        """
        check(**{"penalty of loss": loss})
        if not self._active():
            return self._plain(loss).new_zeros(())
        if self._estimator.repeats:
            raise ConfigError(
                "penalty(loss) cannot compute the loss of a perturbed pass; use criterion(outputs, targets) with "
                "radius= or method='finite_difference'"
            )
        forwards = self._tap.take(loss)
        if self._tap.watching and not forwards[-1].parameters and not depends_on(loss, forwards[-1].calls):
            return loss.new_zeros(())  # one of several losses, and not one of these layers
        if self._rests(forwards, loss):
            return loss.new_zeros(())
        penalty = self._penalty(Scene.of_loss(self._tap, forwards, loss), step := step_of(forwards, self.step))
        self._left(forwards, loss, step)
        return loss.new_zeros(()) if penalty is None else penalty.to(loss.dtype)

    @property
    def last(self) -> dict[str, Any]:
        """The last step in numbers.

        Keys: ``task``, ``penalty`` (as added: ``every * factor * strength * kappa``; 0 in evaluation), ``total``; of
        training so far ``size``, ``factor`` (of the bound at the last penalty), ``bounded`` (how many of all
        ``penalties`` it made smaller), ``skipped`` (penalties left out as they were not finite) and ``collapsed``
        (features or outputs that did not depend on the input at the last tenth penalty); of a training step also
        ``strength`` (its lambda), and of one with a penalty ``kappa`` (or the loss increase, with ``radius``),
        ``by_layer`` and ``method``. With ``layers_per_step``, ``layers`` are drawn, ``by_layer`` has theirs, and
        ``kappa`` estimates the sum over all. Where the pass itself was perturbed ``task`` and ``penalty`` are nan.
        """
        if not self._last:
            return {}
        guards = {"collapsed": self._guards.collapsed, "skipped": self._guards.skipped}
        return step_in_numbers(**self._last) | self._sizing.report() | guards

    @property
    def layers(self) -> list[str]:
        """Qualified names of the regularised layers; ``"output"`` is settled by the first forward pass."""
        return list(self._tap.layers)

    def watch(self) -> None:
        """Record from now on whatever calls the layers, and keep it, until :meth:`reset`.

        For trainers that run parts of the model; then only :meth:`penalty` may follow, once for each loss.
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
        return f"layer={'output' if self._tap.searching else self.layers!r}, {self._sizing}, {self.options}"

    def _active(self) -> bool:
        return self.training and self._tap.training

    def _plain(self, loss: Tensor) -> Tensor:
        if not (self._tap.copied or self._tap.watching):
            self._tap.reset()
        if self.training and self._tap.tapped:
            self._guards.look_for_training(loss)
        return loss

    def _left(self, forwards: Sequence[Forward], loss: Tensor, step: int) -> Tensor:
        self._tap.leave(forwards, loss, step)
        self.step = max(self.step, step + 1)
        return loss

    def _strength_of(self, step: int) -> float:
        return self._sizing.strength_at(step, len(self._tap.layers))

    def _will_rest(self) -> bool:
        """Whether no pass that begins now can be one of a step with a penalty."""
        steps = range(self.step, self.step + self._tap.pending + 1)  # passes that wait may have calls of their own
        return len(steps) < 8 and all(self._strength_of(step) == 0 for step in steps)

    def _rests(self, forwards: Sequence[Forward], loss: Tensor) -> bool:
        step = step_of(forwards, self.step)
        wanted, recorded = self._strength_of(step) != 0, all(f.recorded for f in forwards)
        if self._tap.unsettled or (wanted and recorded):
            return False
        if wanted:
            warn(f"strength was 0 when the forward pass of step {step} began, so this step has no penalty")
        self._last = {"task": loss.detach(), "penalty": 0.0, "strength": 0.0}
        self._left(forwards, loss, step)
        return True

    def _penalty(self, scene: Scene, step: int) -> Tensor | None:
        """``strength * kappa`` in the shape of the loss, or None where there is none; reports in ``last``."""
        strength, loss = self._strength_of(step), scene.loss
        self._last = report = {"task": loss.detach(), "penalty": 0.0, "strength": strength}
        if not self._guards.finite("the task loss", loss, step) or strength == 0:
            return None
        self._estimator.must_suit(self._tap)  # "output" may have been settled since
        scene, scale = self._drawn(scene, step, report)
        parts = self._estimator(scene, step, around=functools.partial(undisturbed, self._tap.model))
        self._tap.keep_rng |= self._estimator.plain
        kappas = {layer: part.kappa for layer, part in parts.items()}
        report["kappas"] = values = {layer: kappa.detach() for layer, kappa in kappas.items()}
        report["method"] = ", ".join(dict.fromkeys(p.method for p in parts.values()))
        convex = scene.known is not None and self.options.curvature == "ggn"
        may_be_negative = not convex and self.options.radius is None and strength > 0
        self._guards.look(scene.watched, values if may_be_negative else {})
        kappa, lost = shaped(kappas, loss, scale), [*filter(lambda layer: parts[layer].lost, parts)]
        added, report["kappa"] = self._sizing.penalty(strength, kappa, loss), kappa.detach()
        penalty = self._guards.judge(added, kappas, step, lost=lost, beyond=lambda: set(ancestors(loss.grad_fn)))
        if penalty is not None:
            report["penalty"] = penalty.detach()
        return penalty

    def _drawn(self, scene: Scene, step: int, report: dict[str, Any]) -> tuple[Scene, float]:
        """The layers of this step, and what makes their sum unbiased for that of all."""
        names, size = self.layers, self.options.layers_per_step
        if size is None:
            return scene, 1.0
        report["layers"] = drawn = [names[i] for i in subset(self._estimator.seed, step, len(names), size)]
        return scene.only(drawn), len(names) / size

    def _noise(self) -> Noise | None:
        if not self._perturbs():
            return None
        return Noise.of(self.options, self._estimator.seed, self.step + (self._tap.pending << 40))

    def _perturbed(self, loss: Tensor, outputs: Tensor | None) -> Tensor:
        forwards, method = self._tap.take(loss), f"radius({self.options.radius:g}), perturbed forward"
        lost = dict.fromkeys(("task", "penalty"), math.nan)
        self._last = {**lost, "total": loss.detach(), "strength": 1.0, "method": method}
        self._guards.look(lambda: {} if outputs is None else {"the outputs": outputs}, {})
        return self._left(forwards, loss, step_of(forwards, self.step))

    def _perturbs(self) -> bool:
        return self._tap.injector is not None and self.training and self.strength == 1
