"""An older path of `relflat.lab.data.splits`."""

from relflat.lab.data.splits import *  # noqa: F403
