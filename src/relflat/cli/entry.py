"""Where the command begins: it says what to install where the extra it needs is missing."""

import sys

from relflat import __version__

EXTRAS = {"monai": "skulls", "datasets": "hub", "ray": "ray"}  # what is not in the extra lab


def main() -> None:
    """Run the command; or name the extra that is missing, with exit code 2; 130 if interrupted before it began."""
    if sys.argv[1:] == ["--version"]:
        print(f"relflat {__version__}")
        return
    try:
        from relflat.cli.main import main as command

        command()
    except KeyboardInterrupt:
        print("error: interrupted before anything was done.", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = (error.name or "relflat").partition(".")[0]
        if package == "relflat":
            raise
        extra = EXTRAS.get(package, "lab")
        print(f"error: this command needs {package}: pip install 'relflat[{extra}]'", file=sys.stderr)
        sys.exit(2)
