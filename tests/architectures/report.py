"""Run every architecture and write what was held against what to docs/architectures.md."""

import importlib.metadata
import time
import warnings
from pathlib import Path

import comparisons
import torch
from published import Published
from test_architectures import CASES

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Published architectures

Each with random weights in a small configuration, in float64, run by its library's own forward, written by
`make architectures` ({versions}). For each, relflat's numbers are held against Definition 3 from double backward
(`tests/architectures/held.py`), and that against differences of gradients:

- *output*: what `layer="output"` was found to be, and its kappa by the method named;
- *hidden*: one hidden layer, `method="exact"`;
- *`"*"`*: that the layers are every weight matrix the loss depends on, once each, and the kappa of each (within six
  standard errors where a side is estimated);
- *step*: the gradient of a training step with FAM on the output layer is finite;
- *default*: training with `FAM(loss_fn, model)`, nothing chosen, in float32, until after its second penalty (nine
  steps): penalties and gradients are finite, the penalty is positive and has a gradient in the weight of every layer
  with a kappa that is not frozen, and each of those is trained. How many of the layers of `"*"` that are.

{count} architectures, {right} of them right in everything.

| library | architecture | output | by | hidden | by | layers in "*" | step | default |
|---|---|---|---|---|---|---|---|---|
"""


def outcome(check: object, case: Published) -> str:
    try:
        return str(check(case) or "right")  # type: ignore[operator]
    except Exception as error:  # whatever it is, the page says so
        print(f"{case.library}:{case.name}: {check.__name__}: {type(error).__name__}: {error}", flush=True)
        return f"**{type(error).__name__}**"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows, right, began = [], 0, time.time()
    for case in CASES:
        found = [outcome(c, case) for c in CHECKS]
        right += not any("**" in f for f in found)
        oracle, output, hidden, star, step, default = found
        names = f"`{case.output}` | {output} | `{case.hidden}` | {hidden if oracle == 'right' else oracle}"
        rows.append(f"| {case.library} | {case.name} | {names} | {star} | {step} | {default} |")
    libraries = dict.fromkeys(["torch", *(case.library for case in CASES)])
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    PAGE.write_text(HEAD.format(versions=versions, count=len(CASES), right=right) + "\n".join(rows) + "\n")
    print(f"{right} of {len(CASES)} right, {time.time() - began:.0f} s")


CHECKS = (
    comparisons.check_oracle,
    comparisons.check_output,
    comparisons.check_hidden,
    comparisons.check_star,
    comparisons.check_step,
    comparisons.check_default,
)

if __name__ == "__main__":
    main()
