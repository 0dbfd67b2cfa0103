"""Where numbers were taken: versions, machine, command line."""

import os
import platform
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("relflat", "torch", "numpy", "scikit-learn", "accelerate", "pytorch_optimizer", "safetensors")
CPUS = Path("/proc/cpuinfo")  # names the processor's model, on Linux


def describe() -> dict[str, Any]:
    """Describe this process and its machine as plain values."""
    models = (
        re.findall(r"^model name\s*:\s*(.*)$", CPUS.read_text("utf-8", "replace"), re.M) if CPUS.is_file() else []
    )
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
