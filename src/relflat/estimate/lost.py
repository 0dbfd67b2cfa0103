"""Whether the gradient of kappa is finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from relflat.capture.graph import ancestors, leaves_between, singular
from relflat.curvature.operators import differentiate
from relflat.estimate.contributions import Contributions
from relflat.estimate.subject import Subject


def lost_gradients(subjects: Sequence[Subject], found: Mapping[str, Contributions]) -> list[str]:
    """The layers whose kappa has a gradient that is not finite in their outputs or in what comes after them.

    Asked once a layer, and each time where an operation after it has derivatives that are no numbers at 0; all
    layers at once, and one by one only where that is not finite.
    """
    asked = [s for s in subjects if s.key not in s.memory.finite and found[s.layer].kappa.requires_grad]
    none = not asked or _finite_gradients(asked, found)
    lost = [] if none else [s for s in asked if not _finite_gradients([s], found)]
    for s in asked:
        if s not in lost and not any(map(singular, ancestors(s.scene.loss.grad_fn, without=s.ends()))):
            s.memory.finite.add(s.key)
    return [s.layer for s in lost]


def _finite_gradients(subjects: Sequence[Subject], found: Mapping[str, Contributions]) -> bool:
    edges = [c.edge for s in subjects for c in s.space.calls if c.edge is not None]
    leaves = {id(x): x for s in subjects for x in leaves_between(s.scene.loss.grad_fn, s.ends())}
    of: list[Tensor] = [found[s.layer].kappa.sum() for s in subjects]
    inputs: list[Any] = [*edges, *leaves.values()]
    gradients = differentiate(of, inputs, None, create_graph=False)
    return all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)
