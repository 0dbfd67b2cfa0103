"""The command ``relflat``."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tyro
from tyro.extras import SubcommandApp

from relflat.cli.compare import compare, report
from relflat.cli.console import fail
from relflat.cli.data import data
from relflat.cli.measure import measure
from relflat.cli.reproduce import reproduce
from relflat.cli.train import train
from relflat.errors import RelflatError

app = SubcommandApp()
app.command(name="train")(train)
app.command(name="measure")(measure)
app.command(name="compare")(compare)
app.command(name="report")(report)
app.command(name="reproduce")(reproduce)
app.command(data, name="data", help="List and fetch data sets.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with 0, 1 (nobody reads on), 2 (something to correct) or 130 (interrupted)."""
    try:
        with flushed():
            app.cli(
                prog="relflat",
                description="Relative flatness of PyTorch networks: measure it, train with it.",
                args=list(sys.argv[1:] if arguments is None else arguments),
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except BrokenPipeError:  # as after | head
        discard_output()
        sys.exit(1)
    except RelflatError as error:
        fail(error)
        sys.exit(2)
    except OSError as error:  # no space left for what is printed, data that may not be read, ...
        fail(error)
        discard_output()
        sys.exit(2)
    except KeyboardInterrupt:
        fail(KeyboardInterruptMessage())
        sys.exit(130)


@contextmanager
def flushed() -> Iterator[None]:
    """Write all of stdout out before leaving, so that a reader who is gone is noticed here."""
    try:
        yield
    finally:
        sys.stdout.flush()


def discard_output() -> None:
    """Leave nothing that Python would try to write out once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class KeyboardInterruptMessage(Exception):
    """What is said when the user interrupts."""

    def __str__(self) -> str:
        return "interrupted; the same command goes on after the last finished epoch."


if __name__ == "__main__":
    main()
