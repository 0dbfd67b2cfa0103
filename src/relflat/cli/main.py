"""The command ``relflat``."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from inspect import Parameter, signature
from io import TextIOWrapper
from typing import get_type_hints, is_typeddict

import tyro
from tyro.extras import SubcommandApp

from relflat import __version__
from relflat.cli.compare import compare, report
from relflat.cli.console import fail
from relflat.cli.data import data
from relflat.cli.measure import measure
from relflat.cli.reproduce import reproduce
from relflat.cli.train import train
from relflat.errors import ConfigError, RelflatError
from relflat.lab.common.names import unknown

COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command for command in (train, measure, compare, report, reproduce)
}
RENAMED = {"--regularize": "--layer", "--estimator": "--method"}  # what options were called once
EXIT_CODES = (
    "Exit codes: 0 done; 1 nobody reads what is printed; 2 something to correct, said on stderr; 3 compared without "
    "an arm that cannot run on the task; 130 interrupted."
)
app = SubcommandApp()
for command in COMMANDS.values():
    app.command(command)
app.command(data, name="data", help="List and fetch data sets.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with an exit code of `EXIT_CODES`."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ± shows ? and no error
    try:
        run(list(sys.argv[1:] if arguments is None else arguments))
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
        fail("interrupted; the same command goes on after the last finished epoch.")
        sys.exit(130)


def run(arguments: list[str]) -> None:
    """Run one command, and write all of stdout out before leaving, so that a reader who is gone is noticed here."""
    try:
        if arguments == ["--version"]:
            print(f"relflat {__version__}")
            return
        require_known_options(arguments)
        require_one_model(arguments)
        app.cli(
            prog="relflat",
            description="Relative flatness of PyTorch networks: measure it, train with it. "
            f"relflat --version prints the version. {EXIT_CODES}",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        )
    finally:
        sys.stdout.flush()


def require_known_options(arguments: Sequence[str]) -> None:
    """Name the nearest option of the command itself to one it has not; tyro would name those of others."""
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None:
        return
    known = {f"--{name.replace('_', '-')}" for name in option_names(command)} | {"--help"}
    for argument in arguments[1:]:
        option = argument.partition("=")[0].replace("_", "-")
        if option in RENAMED and RENAMED[option] in known:
            raise ConfigError(f"{option} is called {RENAMED[option]} now.")
        if option.startswith("--") and option not in known:
            raise unknown(f"option of relflat {arguments[0]}", option, known)


def require_one_model(arguments: Sequence[str]) -> None:
    """Say where files of weights go that stand behind the model as if they were models."""
    named = [argument for argument in arguments[1:3] if not argument.startswith("-")]
    if arguments[:1] == ["measure"] and len(named) == 2:
        raise ConfigError(f"relflat measure takes one run or function; weights go with --checkpoint {named[1]}")


def option_names(command: Callable[..., None]) -> list[str]:
    """The names of a command's options; those of a record or a dictionary of values each by itself."""
    hints = get_type_hints(command)
    found = []
    for name, parameter in signature(command).parameters.items():
        if parameter.kind is Parameter.KEYWORD_ONLY:
            several = is_typeddict(hints[name]) or is_dataclass(hints[name])
            found += list(hints[name].__annotations__) if several else [name]
    return found


def discard_output() -> None:
    """Leave nothing that Python would try to write out once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
