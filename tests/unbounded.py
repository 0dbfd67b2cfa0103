"""FAM whose penalty is lambda kappa however large beside the loss, for the tests that hold it against formulas."""

from typing import Any

import relflat


class FAM(relflat.FAM):
    """As relflat.FAM, without a bound if none is given."""

    def __init__(self, *args: Any, bound: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, bound=bound, **kwargs)
