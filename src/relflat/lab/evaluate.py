"""An older path of `relflat.lab.tasks.metrics`."""

from relflat.lab.tasks.metrics import *  # noqa: F403
