"""What a model returned: which tensor of it a loss takes."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from relflat.capture.graph import ancestors, operation
from relflat.errors import GraphError


def output_tensor(outputs: Any, other_than: Tensor | None = None) -> Tensor | None:
    """The one tensor among a model's outputs that a loss is computed from: itself, ``logits``, or the only one.

    Not the loss itself, ``other_than``, nor what has its graph.
    """
    if other_than is not None:
        found = output_tensor(outputs)
        return None if found is None or found.grad_fn is other_than.grad_fn else found
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    return tensors[0] if len(tensors) == 1 else None


def read_by(loss: Tensor, given: Any) -> list[Tensor]:
    """The tensors that a loss was computed from, not by way of one another; none if one of them leads to another."""
    leaves = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.grad_fn not in (None, loss.grad_fn)]
    ends = {t.grad_fn for t in leaves}
    read = {parent for node in ancestors(loss.grad_fn, ends) for parent, _ in node.next_functions if parent in ends}
    if any(read.intersection(ancestors(parent)) - {parent} for parent in read):
        return []
    return list({(t.grad_fn, t.output_nr): t for t in leaves if t.grad_fn in read}.values())


def same_part(recorded: Any, given: Any, replayed: Any) -> Any:
    """The part of a replayed output that ``given`` was of the recorded one."""
    if _passed_on(recorded, given):
        return replayed
    for leaf, replacement in zip(tree_leaves(recorded), tree_leaves(replayed), strict=True):
        if _passed_on(leaf, given):
            return replacement
        if isinstance(given, Tensor) and isinstance(leaf, Tensor) and _views(given, leaf):
            start = replacement.storage_offset() + given.storage_offset() - leaf.storage_offset()
            if replacement.stride() == leaf.stride():
                return replacement.as_strided(given.shape, given.stride(), start)
    raise GraphError(
        "the criterion was given something computed from the model's outputs, which a perturbed forward pass "
        "cannot repeat; move that computation into the model or the loss function"
    )


def _views(given: Tensor, leaf: Tensor) -> bool:
    """Whether a tensor reads the memory of another, in another order or in part."""
    same = given.dtype == leaf.dtype and given.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
    return same and leaf.numel() > 0 and given._version == leaf._version


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
