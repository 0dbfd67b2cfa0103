"""Where trials run: processes of this machine, or a Ray cluster; either way a `concurrent.futures.Executor`."""

import os
import socket
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from relflat.errors import ConfigError
from relflat.lab.common.names import look_up

LOCAL, RAY = "local", "ray"
ENGINES = {LOCAL: "processes of this machine", RAY: "a Ray cluster"}
PATIENCE = 5.0  # seconds until an address that does not answer is given up


@dataclass(frozen=True)
class Engine:
    """What does the trials. Its fields are options of ``relflat compare``, with the texts below.

    Attributes:
        workers: processes, one thread each; a running Ray cluster decides that itself.
        engine: local, or ray for a Ray cluster; its machines must share the folder of runs under the same path, and
            the task's file and data must be on all of them.
        address: HOST:PORT of a running Ray cluster; by default $RAY_ADDRESS, else a Ray of its own on this machine.
        gpus: GPUs a trial takes of a Ray cluster, or a share of one; 0 trains on CPUs.
    """

    workers: int = 2
    engine: str = LOCAL
    address: str | None = None
    gpus: float = 0.0

    def pool(self, runs: Path) -> Executor:
        """Start it; use it in a ``with`` block."""
        look_up("engine", self.engine, ENGINES)
        if self.engine == LOCAL:
            for option, value in (("--address", self.address), ("--gpus", self.gpus or None)):
                if value is not None:
                    raise ConfigError(
                        f"{option} {value} belongs to a Ray cluster; add --engine ray, or leave it out."
                    )
            from relflat.lab.compare.trials import workers

            return workers(self.workers)
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers} must be above 0.")
        if not self.gpus >= 0:
            raise ConfigError(f"gpus={self.gpus} must not be negative.")
        from relflat.integrations.ray import OnRay

        address = self.address or os.environ.get("RAY_ADDRESS")
        if address and address != "auto":
            require_answer(address)
        return OnRay(runs, address, self.workers, self.gpus)


def require_answer(address: str) -> None:
    """See, before Ray tries for minutes, whether this is an address and anything listens there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16 or "/" in host:
        raise ConfigError(f"address={address!r} is not of the form HOST:PORT, as in 10.0.0.1:6379; or give auto.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise ConfigError(
            f"No Ray cluster answers at {address} ({error.strerror or error}). "
            "Start one with: ray start --head, and give the address it prints."
        ) from error
