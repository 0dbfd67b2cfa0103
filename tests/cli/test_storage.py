"""A full disk, a folder that may not be written: an error that says so, and the same command goes on later."""

import json
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from processes import python, relflat
from relflat.cli.main import main

TRAIN = ["train", "digits", "--epochs", "3", "--train-size", "100", "--json"]
COMPARE = ["compare", "digits", "--arms", "plain", "fam", "--seeds", "1", "--search-seeds", "1", "--trials", "1"]
COMPARE += ["--workers", "1", "--epochs", "2", "--train-size", "100", "--json"]


def clean(folder: Path) -> bool:
    """Nothing half-written: no temporary names, and every JSON file can be read."""
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    return not [path for path in folder.rglob(".*") if path.name != "runs"]


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key != "seconds_per_step"}
    return value


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KiB, where one may be mounted; a checkpoint of digits takes 380."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("command", [TRAIN, COMPARE], ids=lambda command: command[0])
def test_full_disk(small_disk, tmp_path, capsys, command):
    ways = [*command, "--runs", str(small_disk / "runs")] + (["--out", str(tmp_path / "out")] * (command is COMPARE))
    with pytest.raises(SystemExit) as stop:
        main(ways)
    text = capsys.readouterr()
    assert stop.value.code == 2
    assert "No space left on device" in text.err
    assert "the same command goes on" in text.err
    assert "Traceback" not in text.err
    assert text.out == ""
    assert clean(small_disk)
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    main(ways)
    answer = json.loads(capsys.readouterr().out)
    main([*command, "--runs", str(tmp_path / "runs")])
    expected = json.loads(capsys.readouterr().out)
    key = "result" if command is TRAIN else "tested"
    assert without_times(answer[key]) == without_times(expected[key])


@contextmanager
def small_files(kilobytes: int) -> Iterator[None]:
    """Files may not grow beyond a size, as on a disk with a quota."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(("command", "kilobytes"), [(TRAIN, 100), (COMPARE, 100), (COMPARE, 1)])
def test_files_that_may_not_grow(tmp_path, command, kilobytes, capsys):
    """Checkpoints of digits are larger than 100 KiB, the plan of a comparison is larger than 1."""
    ways = [*command, "--runs", str(tmp_path / "runs")]
    ways += ["--out", str(tmp_path / "out")] * (command is COMPARE)
    done = relflat(*ways, within=partial(small_files, kilobytes))
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert clean(tmp_path)
    main(ways)
    assert json.loads(capsys.readouterr().out)


def test_a_report_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main([*COMPARE, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


PRINTING_TO = "import os\n{}\nos.dup2(place, 1)\nfrom relflat.cli.entry import main\nmain()"


@pytest.mark.xdist_group("bare")
def test_a_reader_that_leaves_gets_no_traceback():
    """As in ``relflat --help | head -1``: the pipe is closed before anything is written."""
    left = PRINTING_TO.format("read, place = os.pipe(); os.close(read)")
    assert python(left, "--help") == (1, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.xdist_group("bare")
def test_no_space_for_what_is_printed():
    done = python(PRINTING_TO.format("place = os.open('/dev/full', os.O_WRONLY)"), "data", "list", "--json")
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
