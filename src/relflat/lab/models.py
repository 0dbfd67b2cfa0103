"""An older path of `relflat.lab.tasks.models`."""

from relflat.lab.tasks.models import *  # noqa: F403
