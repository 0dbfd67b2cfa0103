"""Where trials run: processes of this machine, or a Ray cluster; either way a `concurrent.futures.Executor`."""

import os
import socket
from concurrent.futures import Executor
from pathlib import Path

from relflat.errors import ConfigError
from relflat.lab.compare.cluster import OnRay
from relflat.lab.compare.trials import workers
from relflat.lab.names import look_up

LOCAL, RAY = "local", "ray"
ENGINES = {LOCAL: "processes of this machine", RAY: "a Ray cluster"}
PATIENCE = 5.0  # seconds until an address that does not answer is given up


def engine_named(
    name: str, *, processes: int, runs: Path, address: str | None = None, gpus: float = 0.0
) -> Executor:
    """What does the trials; use it in a ``with`` block.

    Args:
        name: ``"local"`` or ``"ray"``.
        processes: how many trials at a time, on one thread each; a cluster decides that itself.
        runs: folder that keeps the runs.
        address: ``host:port`` of a running Ray cluster; None: $RAY_ADDRESS, else a Ray of its own on this machine.
        gpus: GPUs a trial takes of a Ray cluster, or a share of one.

    Raises:
        ConfigError: no such engine, values that do not fit it, Ray is not installed or does not answer.
    """
    look_up("engine", name, ENGINES)
    if name == LOCAL:
        for option, value in (("--address", address), ("--gpus", gpus or None)):
            if value is not None:
                raise ConfigError(
                    f"{option} {value} belongs to a Ray cluster; add --engine ray, or leave it out."
                )
        return workers(processes)
    if processes < 1:
        raise ConfigError(f"workers={processes} must be above 0.")
    if not gpus >= 0:
        raise ConfigError(f"gpus={gpus} must not be negative.")
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "auto":
        require_answer(address)
    return OnRay(runs, address, processes, gpus)


def require_answer(address: str) -> None:
    """See, before Ray tries for minutes, whether anything listens there.

    Raises:
        ConfigError: it does not, or this is not an address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16 or "/" in host:
        raise ConfigError(
            f"address={address!r} is not of the form HOST:PORT, as in 10.0.0.1:6379; or give auto."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise ConfigError(
            f"No Ray cluster answers at {address} ({error.strerror or error}). "
            "Start one with: ray start --head, and give the address it prints."
        ) from error
