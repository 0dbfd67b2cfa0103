import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from relflat import __version__
from relflat.cli.console import print_table
from relflat.cli.main import COMMANDS, main, option_names
from relflat.lab.compare.arms import ARMS
from relflat.lab.tasks import TASKS
from relflat.measure.api import _DEFAULT_PROBES, _DEFAULT_XTRACE
from relflat.papers.catalogue import EXPERIMENTS

SHORT = ["--epochs", "1", "--train-size", "100"]


@pytest.fixture
def relflat(capsys, tmp_path, monkeypatch):
    """Run the command in this process; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
        text = capsys.readouterr()
        return code, text.out, text.err

    return run


def test_a_table_in_a_pipe_has_a_line_for_each_row(capsys, monkeypatch):
    """Names of layers are long, and what reads the table cuts it into lines."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "encoder.layer.0.attention.output.dense." * 6
    print_table("kappa", ("layer", "value"), [(name, "1.5 ± 0.1"), ("head", "2")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if name in line] == [["│", name, "│", "1.5", "±", "0.1", "│"]]


@pytest.mark.parametrize(
    "way",
    [["plain"], ["sam", "--rho", "0.1"], ["fam", "--strength", "0.2", "--adaptive", "True"]],
    ids=lambda w: w[0],
)
def test_train_prints_one_json_object(relflat, way, tmp_path):
    code, out, err = relflat("train", "digits", "--algorithm", *way, "--seed", "3", *SHORT, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["config"]["algorithm"] == way[0]
    assert answer["config"]["seed"] == 3
    assert answer["result"]["status"] == "finished"
    assert 0 < answer["result"]["test"]["accuracy"] < 1
    assert (tmp_path / answer["run"] / "result.json").is_file()


def test_train_for_people_names_the_run(relflat, tmp_path):
    code, out, _ = relflat("train", "digits", *SHORT, "--name", "mine")
    assert code == 0
    assert "validation accuracy" in out
    assert "kappa" in out
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").is_file()


def test_no_test_leaves_the_test_split_alone(relflat):
    _, out, _ = relflat("train", "digits", *SHORT, "--no-test", "--json")
    assert json.loads(out)["result"]["test"] is None


def test_a_finished_run_says_so_and_fresh_trains_it_again(relflat):
    _, out, err = relflat("train", "digits", *SHORT, "--name", "mine", "--json")
    assert err == ""
    _, again, err = relflat("train", "digits", *SHORT, "--name", "mine", "--json")
    assert "runs/mine was finished before: nothing was trained. Give --fresh" in err
    assert json.loads(again) == json.loads(out)
    assert relflat("train", "digits", *SHORT, "--name", "mine", "--fresh", "--json")[2] == ""


def test_bins_of_the_calibration_error_are_kept_but_not_printed(relflat, tmp_path):
    _, out, _ = relflat("train", "digits", *SHORT, "--json")
    assert "bins" not in out
    kept = json.loads((tmp_path / json.loads(out)["run"] / "result.json").read_text())
    assert kept["test"].pop("bins")
    assert kept["test"] == json.loads(out)["result"]["test"]


def test_config_file_and_options_over_it(relflat, tmp_path):
    (tmp_path / "run.toml").write_text('algorithm = "sam"\nrho = 0.2\nseed = 4\n')
    _, out, _ = relflat("train", "digits", *SHORT, "--config", "run.toml", "--seed", "5", "--json")
    config = json.loads(out)["config"]
    assert (config["algorithm"], config["rho"], config["seed"]) == ("sam", 0.2, 5)


def test_measure_agrees_with_training(relflat):
    _, out, _ = relflat("train", "digits", *SHORT, "--json")
    trained = json.loads(out)
    code, out, err = relflat("measure", trained["run"], "--json")
    assert (code, err) == (0, "")
    measured = json.loads(out)
    assert measured["layer"] == "output"
    assert measured["value"] == pytest.approx(trained["result"]["flatness"]["value"], rel=1e-6)
    code, out, _ = relflat("measure", trained["run"], "--layer", "fc2", "--curvature", "ggn")
    assert code == 0
    assert "kappa(fc2)" in out


def test_measure_several_layers_with_a_bound_on_the_error(relflat):
    _, out, _ = relflat("train", "digits", *SHORT, "--json")
    run = json.loads(out)["run"]
    ways = ("--curvature", "ggn", "--method", "probe", "--rtol", "0.05", "--samples", "64", "--json")
    code, out, err = relflat("measure", run, "--layer", "fc*,output", *ways)
    assert (code, err) == (0, "")
    layers = json.loads(out)["layers"]
    assert list(layers) == ["fc1", "fc2", "output"]
    assert all(0 < flat["stderr"] <= 0.05 * flat["value"] for flat in layers.values())
    assert {flat["samples"] for flat in layers.values()} == {64}


def test_measure_by_xtrace(relflat):
    _, out, _ = relflat("train", "digits", *SHORT, "--json")
    ways = ("--layer", "fc2", "--curvature", "ggn", "--method", "xtrace", "--probes", "8", "--samples", "64")
    code, out, err = relflat("measure", json.loads(out)["run"], *ways, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["method"] == "xtrace(ggn, 8)"


def test_measure_convolutions_and_parameters(relflat, tmp_path):
    """Fresh weights of the small CNN stand in for a trained run: no data set but digits is needed."""
    task = tmp_path / "cnn.py"
    task.write_text(
        "from dataclasses import replace\nfrom relflat.lab.tasks.models import small_cnn\n"
        "from relflat.lab.tasks import TASKS\ntask = replace(TASKS['digits'], model=small_cnn)\n"
    )
    _, out, _ = relflat("train", "cnn.py:task", *SHORT, "--json")
    ways = ("--samples", "20", "--probes", "2", "--curvature", "ggn", "--json")
    _, out, _ = relflat("measure", json.loads(out)["run"], "--layer", "conv*,fc.weight", *ways)
    layers = json.loads(out)["layers"]
    assert list(layers) == ["conv1", "conv2", "conv3", "fc.weight"]
    assert all(flat["value"] > 0 for flat in layers.values())


TINY = ["--seeds", "1", "--search-seeds", "1", "--trials", "1", "--workers", "1", *SHORT]


def test_compare_and_report_for_people_and_machines(relflat, tmp_path):
    ways = ("compare", "digits", "--arms", "plain", "fam", *TINY)
    code, out, _ = relflat(*ways, "--out", "out")
    assert code == 0
    assert "FAM against plain: no difference shown" in out
    assert "Report: out/report.html" in out
    code, out, err = relflat("report", "out", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert [line["arm"] for line in answer["arms"]] == ["plain", "fam"]
    assert answer["folder"] == "out"
    _, again, _ = relflat(*ways, "--json")  # in its own folder, out of the same runs
    folder = tmp_path / json.loads(again)["folder"]
    assert folder.parent == tmp_path / "runs"
    assert json.loads(again)["tested"] == answer["tested"]
    assert (folder / "report.tex").is_file()


def test_compare_with_both_tables_and_a_recipe(relflat, tmp_path):
    ways = ("compare", "digits", "--arms", "plain", "smoothing", "fam-default", "fam", *TINY)
    code, out, _ = relflat(*ways, "--also-untuned", "--recipe", "--out", "out")
    assert code == 0
    assert "Tuned: FAM against plain: no difference shown" in out
    assert "Untuned: FAM default against plain: no difference shown" in out
    assert "under every arm: label smoothing 0." in out
    made = (tmp_path / "out" / "report.md").read_text()
    assert "Left out, as part of it: smoothing." in made
    code, again, err = relflat("report", "out")
    assert (code, again, err) == (0, out, "")
    assert (tmp_path / "out" / "report.md").read_text() == made


def test_values_of_all_arms(relflat):
    values = ("--batch-size", "16", "--lr", "0.01", "--weight-decay", "0.001", "--precision", "bf16")
    code, out, err = relflat("compare", "digits", "--arms", "plain", "fam", *TINY, *values, "--json")
    assert (code, err) == (0, "")
    configs = [
        json.loads((run / "config.json").read_text())
        for run in Path("runs").iterdir()
        if (run / "config.json").exists()
    ]
    assert len(configs) == 4
    assert {(c["batch_size"], c["lr"], c["precision"]) for c in configs} == {(16, 0.01, "bf16")}
    # plain searches the weight decay, and keeps what it tries
    assert {(c["algorithm"], c["weight_decay"]) for c in configs} == {("plain", 5e-4), ("fam", 0.001)}
    assert json.loads(out)["plan"]["common"]["lr"] == 0.01


DIVERGES = """
from dataclasses import replace

from relflat.lab.tasks import SGD, TASKS

digits = TASKS["digits"]


def splits(**values):
    print("reading")
    if BROKEN and values["seed"] == 0:
        raise KeyError("no such column")
    return digits.splits(**values)


task = replace(digits, splits=splits)
wild = replace(digits, optimizer=SGD(lr=1e12))
"""


def test_a_task_file_that_raises_in_the_middle(relflat, tmp_path):
    """Its own traceback and no other; what was finished is kept, and mended it goes on."""
    (tmp_path / "mine.py").write_text(DIVERGES.replace("BROKEN", "(HERE / 'broken').exists()"))
    text = "from pathlib import Path\nHERE = Path(__file__).parent\n" + (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "broken").touch()
    ways = ("compare", "mine.py:task", "--arms", "plain", "fam", *TINY, "--json")
    code, out, err = relflat(*ways)
    assert (code, out) == (2, "")
    assert "mine.py raises an error; mend it, and the same command goes on" in err
    assert "in splits" in err
    assert "KeyError: 'no such column'" in err
    assert "site-packages" not in err
    assert "training.py" not in err
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert len(kept) == 2  # the search
    (tmp_path / "broken").unlink()
    code, out, err = relflat(*ways)
    assert code == 0
    assert json.loads(out)["tested"]
    assert set(err.split()) == {"reading"}  # what the file prints does not mix with the answer
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_trials_that_diverge_are_recorded_and_counted(relflat, tmp_path):
    (tmp_path / "mine.py").write_text(DIVERGES.replace("BROKEN", "False"))
    code, out, _ = relflat("compare", "mine.py:wild", "--arms", "plain", "fam", *TINY, "--json")
    assert code == 0
    answer = json.loads(out)
    assert [candidate["diverged"] for candidate in answer["search"]] == [1, 1]
    assert [line["diverged"] for line in answer["arms"]] == [1, 1]
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/result.json")]
    assert [result["status"] for result in results] == ["diverged"] * 4
    assert all("lower lr or strength" in result["reason"] for result in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "digits", "--engine", "raay"], "Unknown engine 'raay'; did you mean 'ray'"),
        (["compare", "digits", "--address", "10.0.0.1:6379"], "--address 10.0.0.1:6379 belongs to a Ray cluster"),
        (["compare", "digits", "--gpus", "1"], "--gpus 1.0 belongs to a Ray cluster; add --engine ray"),
        (["compare", "digits", "--workers", "0"], "workers=0 must be above 0"),
        (["compare", "digits", "--precision", "bf17"], "Unknown precision 'bf17'; did you mean 'bf16'"),
        (["compare", "digits", "--lr", "0"], "lr=0.0 must be above 0"),
        (["compare", "digits", "--batch-size", "0"], "batch_size=0 must be above 0"),
        (["compare", "digits", "--sedes", "1"], "--seeds"),
        (["compare", "fashion-mnist", "--workers", "1"], "relflat data get fashion-mnist"),
        (["train", "digits", "--precision", "fp8"], "Unknown precision 'fp8'"),
        (["compare", "digist"], "did you mean 'digits'"),
        (["compare", "digits", "--arms", "plain"], "two arms or more"),
        (["compare", "digits", "--arms", "plain", "famm"], "did you mean 'fam'"),
        (["compare", "digits", "--trials", "-1"], "trials=-1"),
        (["compare", "none.py:task"], "Cannot read the task file"),
        (["report", "nowhere"], "nowhere is not a comparison"),
        (["train", "digist"], "Unknown task 'digist'; did you mean 'digits'"),
        (["train", "digits", "--algorithm", "famm"], "did you mean 'fam'"),
        (["train", "digits", "--rho", "1"], "'rho' is a setting of algorithm sam"),
        (["train", "digits", "--strenght", "1"], "--strength"),
        (["train", "digits", "--algorithm", "fam", "--layer", "fc9"], "fc9"),
        (["train", "digits", "--algorithm", "fam", "--probes", "0"], "probes"),
        (["train", "digits", "--epochs", "two"], "two"),
        (["train", "digits", "--train-size", "5000"], "train_size=5000"),
        (["train", "digits", "--config", "none.toml"], "Cannot read the config file none.toml"),
        (["train", "fashion-mnist"], "relflat data get fashion-mnist"),
        (["trian", "digits"], "train"),
        (["measure", "nowhere"], "nowhere is not a run"),
        (["data", "get", "fashion"], "did you mean 'fashion-mnist'"),
        (["data", "get"], "Name at least one data set"),
        (["data"], "list"),
        ([], "train"),
    ],
    ids=" ".join,
)
def test_user_errors_leave_with_2_and_no_traceback(relflat, arguments, message, monkeypatch, tmp_path):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    code, out, err = relflat(*arguments)
    assert code == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/*/config.json"))  # no run was begun


def test_unknown_key_in_config_file(relflat, tmp_path):
    (tmp_path / "run.toml").write_text("sede = 4\n")
    code, _, err = relflat("train", "digits", "--config", "run.toml")
    assert code == 2
    assert "Unknown config key 'sede'; did you mean 'seed'" in err


def test_another_run_under_the_same_name(relflat):
    relflat("train", "digits", *SHORT, "--name", "mine")
    code, _, err = relflat("train", "digits", *SHORT, "--name", "mine", "--seed", "1")
    assert code == 2
    assert "other values of seed" in err
    assert relflat("train", "digits", *SHORT, "--name", "mine", "--seed", "1", "--fresh")[0] == 0


def test_unwritable_runs_folder(relflat, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = relflat("train", "digits", *SHORT, "--runs", "file")
    assert code == 2
    assert "Cannot write" in err


def test_data_list_prints_licences(relflat):
    code, out, _ = relflat("data", "list")
    assert code == 0
    assert "MIT" in out
    _, out, _ = relflat("data", "list", "--json")
    assert json.loads(out)["digits"]["here"] is True


def test_data_get_of_an_embedded_set_does_nothing(relflat):
    code, out, _ = relflat("data", "get", "digits")
    assert code == 0
    assert "nothing to fetch" in out


def test_interrupt_leaves_with_130(relflat, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("relflat.lab.train.loop.train", interrupted)
    code, _, err = relflat("train", "digits", *SHORT)
    assert code == 130
    assert "goes on after the last finished epoch" in err


def test_help_names_every_command(relflat):
    code, out, _ = relflat("--help")
    assert code == 0
    assert all(name in out for name in ("train", "measure", "compare", "report", "data"))


def test_version(relflat):
    assert relflat("--version") == (0, f"relflat {__version__}\n", "")
    assert "--version" in relflat("--help")[1]


@pytest.mark.parametrize(
    ("command", "start", "end", "known"),
    [
        ("compare", "Known (docs/compare.md): ", ". (", ARMS),
        ("compare", "built-in one (docs/tasks.md): ", ". (", TASKS),
        ("train", "built-in one (docs/tasks.md): ", ". (", TASKS),
    ],
)
def test_help_lists_the_names(relflat, command, start, end, known):
    """All of them, and no others."""
    _, out, _ = relflat(command, "--help")
    text = " ".join(re.sub(r"[│╭╰─╮╯]", " ", out).split())
    listed = text.partition(start)[2].partition(end)[0]
    assert listed.split(", ") == list(known)


def test_help_of_reproduce_lists_the_experiments(relflat):
    listed = re.search(r"\[NAME\] +(.*?)\. \(", relflat("reproduce", "--help")[1])
    assert listed is not None
    assert re.split(", | or ", listed[1]) == list(EXPERIMENTS)


def test_help_gives_the_numbers_of_probes(relflat):
    _, out, _ = relflat("measure", "--help")
    assert f"(default: {_DEFAULT_PROBES}; xtrace: {_DEFAULT_XTRACE})" in " ".join(out.replace("│", " ").split())


def test_a_path_without_the_name_of_a_task_gets_it(relflat, tmp_path):
    (tmp_path / "my_task.py").write_text(DIVERGES.replace("BROKEN", "False"))
    for command in ("compare", "train"):
        code, out, err = relflat(command, "my_task.py")
        assert (code, out) == (2, "")
        assert "Did you mean my_task.py:digits or my_task.py:task or my_task.py:wild?" in err


def test_module_is_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["relflat", "data", "list", "--json"])
    runpy.run_module("relflat", run_name="__main__")
    assert json.loads(capsys.readouterr().out)["fashion-mnist"]["licence"].startswith("MIT")


@pytest.mark.parametrize(
    ("command", "nearest"),
    [
        (["compare", "digits", "--sede", "3"], "Unknown option of relflat compare '--sede'; did you mean '--seeds'?"),
        (["train", "digits", "--layer_per_step=1"], "did you mean '--layers-per-step'?"),
        (["measure", "runs/x", "--sample", "3"], "did you mean '--samples'?"),
        (["report", "x", "--jsno"], "did you mean '--json'?"),
        (["train", "digits", "--regularize", "output"], "--regularize is called --layer now."),
        (["measure", "runs/x", "--estimator=probe"], "--estimator is called --method now."),
        (["train", "digits", "--method", "fam"], "give --algorithm fam (in a file: algorithm)"),
    ],
)
def test_a_misspelt_option_gets_the_nearest_of_its_own_command(relflat, command, nearest):
    code, out, err = relflat(*command)
    assert (code, out) == (2, "")
    assert nearest in err


@pytest.mark.parametrize("command", ["train", "compare", "measure", "report", "reproduce"])
def test_every_option_that_help_lists_is_known(relflat, command):
    _, out, _ = relflat(command, "--help")
    listed = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", out))
    assert listed == {f"--{name.replace('_', '-')}" for name in option_names(COMMANDS[command])} | {"--help"}
