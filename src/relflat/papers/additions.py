"""The small task of the grokking experiment: a table of sums that is generalised from within minutes on one core.

It is the experiment's own, named by this file: ``relflat train path/to/additions.py:small`` trains it alone.
"""

from dataclasses import replace
from functools import partial

from relflat.lab.tasks import AdamW, Task
from relflat.papers.modular_addition import ADDITION, AdditionMLP, splits

MODULUS = 47

small: Task = replace(
    ADDITION,
    name="small",
    summary=f"(a + b) mod {MODULUS}, MLP that generalises long after it knows its 1,104 training sums by heart",
    splits=partial(splits, modulus=MODULUS, fraction=0.5),
    model=partial(AdditionMLP, MODULUS, width=64, hidden=128),
    optimizer=AdamW(lr=3e-3, weight_decay=1.0, betas=(0.9, 0.98)),
    epochs=650,
    batch_size=184,
)
