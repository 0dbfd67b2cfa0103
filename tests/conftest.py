"""What all tests share: one thread, a fixed seed for each test, reproducible examples of hypothesis, the device."""

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

import device

settings.register_profile(
    "relflat", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("relflat")
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what tests fetch, they fetch from registries
device.use()


@pytest.fixture(autouse=True, scope="session")
def _timed_briefly() -> None:
    if "relflat.lab.train.timing" in sys.modules:
        from processes import timed_briefly  # imports the command

        timed_briefly()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
