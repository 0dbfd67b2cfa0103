"""The command where extras are missing, and the package as it is published."""

import tomllib
from pathlib import Path

import pytest

import relflat
from fetched import have
from processes import Done, python

pytestmark = pytest.mark.xdist_group("bare")
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(missing: str, *arguments: str) -> Done:
    """The command in a process of its own, where importing a package fails as if it were not installed."""
    code = f"import sys; sys.modules[{missing!r}] = None; from relflat.cli.entry import main; main()"
    return python(code, *arguments)


@pytest.mark.parametrize("missing", ["tyro", "rich"])
def test_without_the_lab_it_says_what_to_install(missing) -> None:
    done = run(missing, "train", "digits")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: this command needs {missing}: pip install 'relflat[lab]'\n"


def test_ctrl_c_while_it_imports_is_said_in_a_line() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def __getattr__(self, name): raise KeyboardInterrupt\n"
        "sys.modules['relflat.cli.main'] = Interrupted()\n"
        "from relflat.cli.entry import main; main()"
    )
    done = python(code, "train", "digits")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted before anything was done.\n")


def test_every_command_says_so_and_no_traceback() -> None:
    commands = ["train", "measure", "compare", "report", "reproduce", "data", "data list", "--help", ""]
    code = (
        "import sys; sys.modules['tyro'] = None; from relflat.cli.entry import main\n"
        "for line in sys.argv[1:]:\n"
        "    sys.argv = ['relflat', *line.split()]\n"
        "    try: main()\n"
        "    except SystemExit as stop: print(stop.code)"
    )
    done = python(code, *commands)
    assert done.stdout.split() == ["2"] * len(commands)
    assert done.stderr.splitlines() == ["error: this command needs tyro: pip install 'relflat[lab]'"] * len(commands)


def test_an_extra_beside_the_lab_is_named(tmp_path) -> None:
    have("skulls")
    done = run("monai", "train", "skulls-unet", "--runs", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.endswith("pip install 'relflat[skulls]'\n")
    assert "Traceback" not in done.stderr


def test_the_version_needs_no_extra() -> None:
    done = run("tyro", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"relflat {relflat.__version__}\n", "")


def test_a_module_of_the_package_itself_is_a_traceback() -> None:
    assert "ModuleNotFoundError" in run("relflat.cli.console", "data", "list").stderr


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/relflat/__init__.py"


def test_all_is_every_extra_for_use_and_no_more() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(everything.removeprefix("relflat[").removesuffix("]").split(",")) == set(extras) - {"all"}
    assert not {"test", "docs"} & set(extras)
