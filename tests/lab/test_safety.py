"""Nothing that a run did not write is removed, replaced, imported or read as markup; every fault ends in one line."""

import ast
import json
import math
import os
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import relflat
from processes import relflat as in_a_process
from relflat.cli.main import main
from relflat.errors import ConfigError, DataError
from relflat.lab.common.sums import SUMS
from relflat.lab.compare.trials import each, workers
from relflat.lab.data import fetch
from relflat.lab.report.document import Document, Section, Table, as_text
from relflat.lab.report.drawing import draw, inline
from relflat.lab.report.report import latex_text
from relflat.lab.tasks import own
from relflat.lab.tasks.metrics import calibration
from relflat.lab.train import checkpoint, store
from relflat.lab.train.config import make
from relflat.lab.train.loop import train

SMALL = {"task": "digits", "epochs": 1, "train_size": 40}
TASK = """
from dataclasses import replace
from torch import nn
from relflat.lab.tasks import TASKS
base = TASKS["digits"]
task = replace(base, epochs=1, {changes})
"""
ARMS = ["--arms", "plain", "fam", "--seeds", "1", "--search-seeds", "1", "--trials", "1", "--train-size", "60"]


def command(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    code = 0
    try:
        main([str(each) for each in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def tree(folder):
    """All files below a folder with their contents."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def task_file(folder, changes, before=""):
    path = folder / "mine.py"
    path.write_text(before + TASK.format(changes=changes))
    return f"{path}:task"


def trained(folder, **values):
    train(make({**SMALL, **values}), folder, tensorboard=False)
    return folder


# what is not a run's stays


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp/x", "a\\b", "c:x"])
def test_a_name_is_no_path(capsys, tmp_path, name):
    code, _, err = command(capsys, "train", "digits", "--epochs", 1, "--runs", tmp_path / "runs", "--name", name)
    assert code == 2
    assert "--runs" in err
    assert tree(tmp_path) == {}


FOREIGN = [
    {"config.json": '{"architectures": ["BertModel"]}', "model.safetensors": "weights"},
    {"config.json": "not JSON"},
    {".git/HEAD": "ref", ".env": "secret"},
    {"checkpoint-0001/model.safetensors": "weights"},
    {"report.html": "mine"},
]


@pytest.mark.parametrize("files", FOREIGN, ids=lambda files: next(iter(files)))
@pytest.mark.parametrize("way", ["run", "fresh", "compare", "reproduce"])
def test_folders_of_others_are_refused_and_left_as_they_are(capsys, tmp_path, files, way):
    for name, text in files.items():
        (tmp_path / "theirs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / name).write_text(text)
    before = tree(tmp_path)
    ways = {
        "run": ["train", "digits", "--runs", tmp_path, "--name", "theirs"],
        "fresh": ["train", "digits", "--runs", tmp_path, "--name", "theirs", "--fresh"],
        "compare": ["compare", "digits", *ARMS, "--out", tmp_path / "theirs", "--runs", tmp_path / "runs"],
        "reproduce": ["reproduce", "table1", "--out", tmp_path / "theirs", "--runs", tmp_path / "runs"],
    }
    code, _, err = command(capsys, *ways[way])
    assert code == 2
    assert "choose another" in err
    assert tree(tmp_path) == before


def test_what_was_put_into_a_runs_folder_survives_all_of_it(tmp_path):
    folder = trained(tmp_path / "run")
    mine = ["notes.md", "checkpoint-best/state.pt", "checkpoint-0001/notes.md", ".git/HEAD", ".x-1", "state.pt"]
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    (folder / f".result.json-{'0' * 32}").write_text("left by a killed process")
    train(make({**SMALL, "epochs": 2}), folder, tensorboard=False, fresh=True)
    assert [name for name in mine if (folder / name).read_text() != "mine"] == []
    assert [place.name for place in checkpoint.checkpoints(folder)] == ["checkpoint-0002"]
    assert not list(folder.glob(".result*"))


def test_fresh_is_refused_while_the_run_is_held_and_removes_nothing(tmp_path):
    folder = trained(tmp_path / "run")
    before = tree(folder)
    with store.alone_in(folder), pytest.raises(ConfigError, match="Another process is training"):
        train(make(SMALL), folder, tensorboard=False, fresh=True)
    assert tree(folder) == before


def test_the_lock_is_the_same_file_for_good(tmp_path):
    folder = trained(tmp_path / "run")
    held = (folder / store.LOCK).stat().st_ino
    train(make({**SMALL, "seed": 1}), folder, tensorboard=False, fresh=True)
    assert (folder / store.LOCK).stat().st_ino == held


def test_a_run_finished_by_another_process_meanwhile_is_read(tmp_path, monkeypatch):
    folder, config = tmp_path / "run", make(SMALL)
    original = store.open_run

    def slow(*args, **values):
        monkeypatch.undo()
        original(*args, **values)
        shutil.copytree(trained(tmp_path / "other"), folder, dirs_exist_ok=True)

    monkeypatch.setattr(store, "open_run", slow)
    seen = []
    train(config, folder, tensorboard=False, on_epoch=seen.append)
    assert seen == []


# checkpoints


def save(run, epoch, value):
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.save(run, epoch=epoch, model=model, criterion=nn.MSELoss(), optimizer=optimizer, history=[])


def weight(run):
    model = nn.Linear(1, 1)
    checkpoint.load_weights(run, model)
    return model.weight.item()


def test_checkpoints_go_by_number_and_copies_do_not_count(tmp_path):
    for epoch in (9, 9999, 10000, 10001):
        save(tmp_path, epoch, epoch)
        for copy in ("best", "0009-copy", "12", "00012"):
            shutil.copytree(tmp_path / f"checkpoint-{epoch:04d}", tmp_path / f"checkpoint-{copy}", dirs_exist_ok=True)
        assert weight(tmp_path) == epoch
    assert len(list(tmp_path.glob("checkpoint-*"))) == 5


@pytest.mark.parametrize("name", [store.WEIGHTS, store.STATE, SUMS])
def test_a_checkpoint_without_all_of_its_files_or_with_others_is_not_believed(capsys, tmp_path, name):
    trained(tmp_path / "run")
    place = tmp_path / "run" / "checkpoint-0001" / name
    os.truncate(place, place.stat().st_size // 2)
    code, _, err = command(capsys, "measure", tmp_path / "run")
    assert code == 2
    assert re.search(r"is damaged .*Remove .*train again", " ".join(err.split()))
    if name != SUMS:
        place.unlink()
        assert checkpoint.checkpoints(tmp_path / "run") == []


# text


def test_every_text_file_has_its_encoding_written_down():
    """``read_text`` and ``write_text``, ``open`` in text mode, pipes of other programs."""
    found = []
    for path in Path(relflat.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            words = {word.arg for word in node.keywords}
            modes = {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
            texts = name in ("read_text", "write_text")
            encoded = "encoding" in words or (texts and len(node.args) > (name == "write_text"))
            opens = name == "open" and (isinstance(node.func, ast.Name) or modes & set("rwax"))
            if not encoded and (texts or opens or ("text" in words and name == "run")):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


# numbers that are none


def test_calibration_of_nan_counts_and_does_not_raise():
    table = calibration(torch.tensor([[math.nan, 1.0], [0.0, math.inf]]), torch.tensor([0, 1]))
    assert table[:, 0].sum() == 2


@pytest.mark.parametrize(("lr", "reason"), [(1e30, "lower lr"), (1e12, "kappa of layer 'output' is nan")])
def test_divergence_is_a_status_also_in_the_last_step_of_an_epoch(tmp_path, lr, reason):
    result = train(make({**SMALL, "lr": lr}), tmp_path / "run", tensorboard=False)
    assert result["status"] == "diverged"
    assert reason in result["reason"]


NAN = (
    "metric=replace(base.metric, name='own', "
    "evaluate=lambda *args: base.metric.evaluate(*args) | {'own': float('nan')})"
)


def test_a_metric_that_is_nan_is_named_and_nothing_is_chosen_by_it(capsys, tmp_path):
    name = task_file(tmp_path, NAN)
    code, out, err = command(capsys, "train", name, "--runs", tmp_path, "--train-size", 60)
    assert (code, "metric own is nan on train data" in err) == (0, True)
    code, out, _ = command(capsys, "compare", name, *ARMS, "--workers", 1, "--runs", tmp_path, "--json")
    assert code == 0
    assert "Nothing can be compared" in json.loads(out)["verdict"][0]


# arms that cannot run

ONE_BAD = "model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softplus()), layer='1'"
BREAKS = """
from relflat import FAM
original = FAM.forward
def forward(self, *args): raise ValueError("no FAM $here$ <b>|")
FAM.forward = forward
"""


def test_an_arm_that_cannot_run_is_left_out_and_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(relflat.FAM, "forward", relflat.FAM.forward)  # put back afterwards
    name, out = task_file(tmp_path, ONE_BAD, BREAKS), tmp_path / "out"
    common = ["compare", name, *ARMS[:2], "sam", *ARMS[2:], "--workers", 1, "--runs", tmp_path / "runs", "--out", out]
    code, shown, err = command(capsys, *common, "--json")
    answer = json.loads(shown)
    assert code == 3
    assert list(answer["failed"]) == ["fam"]
    assert "FAM (fam)" in err or "FAM cannot run" in err
    assert "no FAM $here$" in err
    assert [line["arm"] for line in answer["arms"]] == ["plain", "sam"]
    assert r"no FAM \$here\$ &lt;b\>\|" in (out / "report.md").read_text()
    assert "&lt;b&gt;" in (out / "report.html").read_text()
    before = (out / "report.csv").read_text()
    code, _, _ = command(capsys, "report", out)
    assert (code, (out / "report.csv").read_text()) == (0, before)


def test_where_no_arm_can_run_the_reason_is_said(capsys, tmp_path):
    name = task_file(tmp_path, "model=lambda: nn.Linear(3, 3)")
    code, _, err = command(capsys, "compare", name, *ARMS, "--workers", 1, "--runs", tmp_path)
    assert (code, "No arm can run on this task" in err) == (2, True)


# workers


def test_a_killed_worker_is_an_error_with_a_remedy():
    with workers(2) as pool, pytest.raises(ConfigError, match="fewer --workers"):
        each(pool, os._exit, [1], print)


# files of others


def test_a_run_from_elsewhere_imports_nothing_until_its_file_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    trained(tmp_path / "run")
    evil = tmp_path / "mine.py"
    task_file(tmp_path, "", f"open({str(tmp_path / 'EXECUTED')!r}, 'w').close()")
    config = json.loads((tmp_path / "run" / store.CONFIG).read_text())
    config |= {"task": f"{evil}:task", "source": own.digest_of(evil)[:12]}
    (tmp_path / "run" / store.CONFIG).write_text(json.dumps(config))
    code, _, err = command(capsys, "measure", tmp_path / "run")
    assert (code, f"add --task {evil}:task" in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "EXECUTED").exists()
    code, _, _ = command(capsys, "measure", tmp_path / "run", "--task", f"{evil}:task")
    assert (code, (tmp_path / "EXECUTED").exists()) == (0, True)
    evil.write_text(evil.read_text() + "\n")  # other content is another file
    with pytest.raises(DataError, match="not imported"):
        own.require_known(f"{evil}:task", "it")


@pytest.mark.parametrize("end", ["import sys; sys.exit(0)", "raise SystemExit", "1 / 0"])
def test_a_task_file_that_ends_is_named(capsys, tmp_path, end):
    (tmp_path / "mine.py").write_text(end)
    code, _, err = command(capsys, "compare", f"{tmp_path / 'mine.py'}:task")
    assert (code, "mine.py raises an error" in " ".join(err.split())) == (2, True)


@pytest.mark.xdist_group("processes")
def test_what_a_task_file_prints_by_whatever_means_is_no_part_of_the_answer(tmp_path):
    says = 'print("hello")\nimport os\nos.system("echo hello")\n'
    arguments = ["train", task_file(tmp_path, "", says), "--train-size", "40", "--runs", str(tmp_path), "--json"]
    done = in_a_process(*arguments)
    assert json.loads(done.stdout)["result"]["status"] == "finished"
    assert done.stderr.count("hello") == 2


def test_files_of_the_cache_that_changed_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path))
    place = fetch.home(fetch.SOURCES["minilm"])
    place.mkdir()
    (place / "a").write_text("one")
    (place / SUMS).write_text(fetch.sums(place, ["a"]))
    assert fetch.files("minilm")
    fetch.unlike.cache_clear()
    (place / "a").write_text("two")
    with pytest.raises(DataError, match="not those that were fetched"):
        fetch.files("minilm")


def test_a_cache_that_no_library_can_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path))
    place = fetch.home(fetch.SOURCES["fashion-mnist"]) / fetch.SOURCES["fashion-mnist"].folder
    place.mkdir(parents=True)
    for content in (b"", b"\x1f\x8b\x08\x00cut"):
        (place / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(DataError, match="Delete it"):
            fetch.read("fashion-mnist")


# what a report shows

EVIL = 'a" onload="x() <script>|$\\frac{$ *b* [c](d) `e` _f_ &lt; {} % # ~ ^'


def test_everything_in_a_report_is_text():
    where = {"time": "", "processor": EVIL, "cores": 1, "device": "", "python": "", "packages": {}}
    table = Table(EVIL, [EVIL], [[EVIL]], EVIL)
    files = Document(EVIL, f"# {EVIL}", [Section(EVIL, EVIL, [EVIL], table)], where).files()
    assert "<script" not in files["report.html"]
    assert "<script" not in files["report.md"]
    assert not re.search(r"(?<!\\)[*`\[|$](?![^\n]*---)", files["report.md"].replace("| ", "").replace(" |", ""))
    svg = inline(draw(lambda axes: axes.set_ylabel(EVIL), EVIL), EVIL)
    assert 'onload="' not in svg.split(">")[0].replace("&#34;", "")
    assert "<script" not in svg


def test_markup_is_escaped_and_numbers_are_not():
    assert as_text("weight_decay 0.1, -2.0 (+1.0) [3]") == r"weight_decay 0.1, -2.0 (+1.0) \[3\]"
    assert as_text("1. no list", begins=True) != "1. no list"
    assert latex_text(r"a\b {c} $d$ ~e^") == (r"a\textbackslash{}b \{c\} \$d\$ \textasciitilde{}e\textasciicircum{}")


# paths of before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("store", "train.store"),
        ("lock", "train.store"),
        ("checkpoint", "train.checkpoint"),
        ("fetch", "data.fetch"),
        ("splits", "data.splits"),
        ("arms", "compare.arms"),
        ("models", "tasks.models"),
        ("evaluate", "tasks.metrics"),
        ("figures", "report.drawing"),
    ],
)
def test_modules_are_found_under_their_older_paths_too(old, new):
    assert import_module(f"relflat.lab.{old}") is import_module(f"relflat.lab.{new}")
