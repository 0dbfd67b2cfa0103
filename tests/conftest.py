"""What all tests share: one thread, a fixed seed for each test, reproducible hypothesis examples, the device."""

import pytest
import torch
from hypothesis import HealthCheck, settings

import device

settings.register_profile(
    "relflat", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("relflat")
torch.set_num_threads(1)
device.use()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
