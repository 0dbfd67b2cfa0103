"""``make test-gpu``: every test of numbers on a GPU, or one line that says why not."""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LANE = ("tests/unit", "tests/oracles", "tests/networks", "tests/properties", "tests/architectures")
LEFT_OUT = {
    "tests/unit/test_hooks_and_records.py": "records and hooks, no numbers",
    "tests/unit/test_options.py": "values of options, no numbers",
    "tests/networks/test_stress.py": "memory of the process and the allocator of the CPU",
    "tests/properties/test_fuzz.py": "messages about malformed calls, no numbers",
}


def main() -> None:
    if not torch.cuda.is_available():
        print(f"make test-gpu: skipped, as torch {torch.__version__} finds no CUDA device on this machine")
        return
    print(f"make test-gpu: on {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for path, reason in LEFT_OUT.items():
        print(f"  without {path}: {reason}", flush=True)
    workers = str(max(2, min(8, (os.cpu_count() or 2) - 1)))
    command = [sys.executable, "-m", "pytest", "-n", workers, "--dist", "loadgroup", *LANE]
    command += [f"--ignore={path}" for path in LEFT_OUT]
    os.chdir(ROOT)
    os.environ |= {"RELFLAT_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    os.execv(sys.executable, [*command, *sys.argv[1:]])


if __name__ == "__main__":
    main()
