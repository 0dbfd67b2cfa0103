"""What an estimate gives: shares of kappa, by probe and group."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Values = Float[Tensor, "k g"]


@dataclass(frozen=True, eq=False)
class Contributions:
    """Shares of kappa and of ``Tr H``: a number for each probe and group of samples, to be summed over groups.

    The mean over probes is kappa, exactly or in expectation. Groups draw independent directions, so one product
    serves as many probes as there are samples.

    Attributes:
        kappa: shares of kappa.
        trace: likewise for ``Tr H``, or None if it was not asked for.
        method: what was done, in words.
        exact: whether a single row holds the exact value.
    """

    kappa: Values
    trace: Values | None
    method: str
    exact: bool
