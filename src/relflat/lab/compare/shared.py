"""What a worker on another machine must have in common with the process that started the trials."""

import platform
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

import relflat
from relflat.errors import ConfigError
from relflat.lab.train import store

MARK = ".relflat-shared"  # in the folder of runs: by it a worker knows that it sees the same folder


@dataclass(frozen=True)
class Shared:
    """The folder of runs, and the versions that numbers depend on most.

    Attributes:
        runs: the folder, by its full path.
        mark: content of a file in it.
        versions: of packages.
    """

    runs: Path
    mark: str
    versions: dict[str, str]

    @classmethod
    def of(cls, runs: Path) -> "Shared":
        """What this process has; the mark is made if it is not there.

        Raises:
            ConfigError: the folder cannot be written.
        """
        with store.writing(runs):
            runs.mkdir(parents=True, exist_ok=True)
            if not (runs / MARK).is_file():
                store.write_text(runs / MARK, uuid.uuid4().hex)
            return cls(runs, (runs / MARK).read_text(), versions())

    def check(self) -> None:
        """See, on a worker, that all of it is the same here.

        Raises:
            ConfigError: it is not.
        """
        here, path = platform.node(), self.runs / MARK
        if not path.is_file() or path.read_text() != self.mark:
            raise ConfigError(
                f"The worker on {here} does not see the folder {self.runs} of the machine that started the trials. "
                "Choose a folder with --runs that all machines share under the same path, on a network file system."
            )
        if versions() != self.versions:
            ours, theirs = (" and ".join(map(" ".join, both.items())) for both in (versions(), self.versions))
            raise ConfigError(
                f"The worker on {here} has {ours}, but trials were started with {theirs}. "
                "Install the same versions on all machines."
            )


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on most."""
    return {"relflat": relflat.__version__, "torch": torch.__version__}
