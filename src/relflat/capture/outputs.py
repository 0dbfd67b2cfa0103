"""What a model returned: which tensor of it a loss takes, and which layer made that."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from relflat.capture.calls import Call, Forward, same_values
from relflat.capture.graph import operation
from relflat.errors import GraphError, LayerError


def output_tensor(outputs: Any) -> Tensor | None:
    """The one tensor among a model's outputs that a loss is computed from: itself, ``logits``, or the only one."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    return tensors[0] if len(tensors) == 1 else None


def output_layer(record: Forward, names: Iterable[str]) -> str:
    """The layer among the recorded calls whose output the model returned; the last one called if none was."""
    tensors = [t for t in tree_leaves(record.outputs) if isinstance(t, Tensor)]
    ends = {c.layer for c in record.calls if any(_ends_in(c, t) for t in tensors)}
    ends = ends or {c.layer for c in record.calls[-1:]}
    if len(ends) != 1:
        raise LayerError(
            f"'output' is ambiguous: {sorted(ends) or list(names)} "
            f"{'all feed' if ends else 'were not called, none feeds'} the output; name one of them"
        )
    return ends.pop()


def _ends_in(call: Call, tensor: Tensor) -> bool:
    """Whether the tensor is the output of the call, perhaps with the classes moved."""
    moved = tensor.movedim(1, -1) if tensor.ndim > 2 else tensor
    pairs = ((tensor, call.output), (moved, call.output), (moved, call.outputs_last()))
    return any(same_values(call, mine, other) for mine, other in pairs)


def same_part(recorded: Any, given: Any, replayed: Any) -> Any:
    """The part of a replayed output that ``given`` was of the recorded one."""
    if _passed_on(recorded, given):
        return replayed
    for leaf, replacement in zip(tree_leaves(recorded), tree_leaves(replayed), strict=True):
        if _passed_on(leaf, given):
            return replacement
    raise GraphError(
        "the criterion was given something computed from the model's outputs, which a perturbed forward pass "
        "cannot repeat; move that computation into the model or the loss function"
    )


def _passed_on(made: Any, given: Any) -> bool:
    """Whether what is given is what was made, as it is or as DDP hands it on."""
    if made is given:
        return True
    (ours, shape), (theirs, same) = tree_flatten(made), tree_flatten(given)
    return shape == same and all(a is b or _through_ddp(a, b) for a, b in zip(ours, theirs, strict=True))


def _through_ddp(made: Any, given: Any) -> bool:
    node = getattr(given, "grad_fn", None)
    if node is None or operation(node) != "_DDPSink":
        return False
    return node.next_functions[given.output_nr] == (made.grad_fn, made.output_nr)
