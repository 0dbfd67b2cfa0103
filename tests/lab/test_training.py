import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fetched import fashion_mnist
from relflat.errors import ConfigError, DataError
from relflat.lab.data import splits
from relflat.lab.train import checkpoint, store
from relflat.lab.train.algorithms import ALGORITHMS
from relflat.lab.train.config import make
from relflat.lab.train.loop import build, train
from relflat.lab.train.measuring import measure_run

# random probes at every other step, growing strength: everything FAM keeps between steps is in use
BUSY = {"algorithm": "fam", "layer": "fc2", "size": 0.1, "every": 2, "method": "probe"}
NOISE = {"algorithm": "fam", "strength": 1.0, "radius": 0.5, "layer": "fc*"}
WAYS = {
    "sam": {"algorithm": "sam", "rho": 0.1},
    "looksam": {"algorithm": "looksam", "rho": 0.1, "period": 4},
    "probes": BUSY,
    "radius": NOISE,
    "radius and sam": {**NOISE, "algorithm": "fam-sam"},
    "dropout": {"algorithm": "dropout"},
}


def without_times(record):
    return {key: value for key, value in record.items() if key != "seconds_per_step"}


def weights(folder):
    return load_file(checkpoint.checkpoints(folder)[-1] / store.WEIGHTS)


@pytest.fixture
def config():
    """Build a short run on digits; any value can be changed."""

    def build(**values):
        return make({"task": "digits", "epochs": 3, "train_size": 200, "label_noise": 0.2, **values})

    return build


class Killed(Exception):
    """Stands for the process being killed right after an epoch."""


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_resumed_run_equals_uninterrupted_one_bit_for_bit_and_no_other_seeds(tmp_path, config, way):
    run = config(**way)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = train(run, whole, tensorboard=False)

    def stop(record):
        if record["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(run, broken, tensorboard=False, on_epoch=stop)
    assert store.result_of(broken) is None
    torch.manual_seed(999)  # whatever the new process has done before
    again = train(run, broken, tensorboard=False)
    assert without_times(again) == without_times(result)
    assert list(map(without_times, store.metrics_of(broken))) == list(map(without_times, store.metrics_of(whole)))
    left, right = weights(whole), weights(broken)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    other = train(config(**way, seed=6), tmp_path / "other", tensorboard=False)
    assert other["validation"] != result["validation"]


def test_run_folder_holds_what_it_promises(tmp_path, config):
    seen = []
    result = train(config(), tmp_path / "run", on_epoch=seen.append)
    folder = tmp_path / "run"
    assert {entry.name for entry in folder.iterdir()} == {
        "relflat-run.lock",
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "result.json",
        "tensorboard",
        "checkpoint-0003",
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == seen
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    wanted = {"loss", "penalty", "train_accuracy", "validation_accuracy", "kappa", "seconds_per_step"}
    assert wanted <= lines[0].keys()
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["lr"] == pytest.approx(0, abs=1e-9)
    assert json.loads((folder / "result.json").read_text()) == result
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"] == torch.__version__


def test_tensorboard_holds_the_metrics(tmp_path, config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    written = [event.value for event in events.Scalars("kappa")]
    assert written == pytest.approx([line["kappa"] for line in store.metrics_of(tmp_path / "run")], rel=1e-5)


def before_the_test_split(monkeypatch, do):
    """Have something done whenever the test split is made."""
    original = splits.Splits

    def watched(*, test, **others):
        def made():
            do()
            return test()

        return original(test=made, **others)

    monkeypatch.setattr(splits, "Splits", watched)


def test_test_split_is_touched_once_and_only_at_the_end(tmp_path, config, monkeypatch):
    seen, touched = [], []
    before_the_test_split(monkeypatch, lambda: touched.append(len(seen)))
    train(config(), tmp_path / "run", tensorboard=False, on_epoch=seen.append)
    assert touched == [3]


def test_search_trials_never_touch_the_test_split(tmp_path, config, monkeypatch):
    def forbidden():
        raise AssertionError("the test split was evaluated")

    before_the_test_split(monkeypatch, forbidden)
    result = train(config(), tmp_path / "run", test=False, tensorboard=False)
    assert result["test"] is None
    monkeypatch.undo()
    tested = train(config(), tmp_path / "run", tensorboard=False)  # no further training, only the test
    assert tested["validation"] == result["validation"]
    assert tested["test"]["loss"] > 0


def test_finished_run_is_read_and_fresh_one_replaces_it(tmp_path, config):
    train(config(), tmp_path / "run", tensorboard=False)
    seen = []
    train(config(), tmp_path / "run", tensorboard=False, on_epoch=seen.append)
    assert seen == []
    with pytest.raises(ConfigError, match="other values of seed"):
        train(config(seed=1), tmp_path / "run", tensorboard=False)
    train(config(seed=1), tmp_path / "run", tensorboard=False, fresh=True, on_epoch=seen.append)
    assert len(seen) == 3
    assert store.config_of(tmp_path / "run").seed == 1


def test_folder_of_something_else_is_left_alone(tmp_path, config):
    (tmp_path / "precious").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="is not a run's folder"):
            train(config(), tmp_path, tensorboard=False, fresh=fresh)
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]


def test_missing_data_leaves_no_folder(tmp_path, monkeypatch, config):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="relflat data get fashion-mnist"):
        train(config(task="fashion-mnist"), tmp_path / "run", tensorboard=False)
    assert not (tmp_path / "run").exists()


def test_diverged_run_is_recorded_as_such(tmp_path, config):
    result = train(config(lr=1e12), tmp_path / "run", tensorboard=False)
    assert result["status"] == "diverged"
    assert result["test"] is None
    assert "training loss" in result["reason"]
    assert store.result_of(tmp_path / "run") == result


def test_damaged_checkpoint_is_an_error_with_a_remedy(tmp_path, config):
    folder = tmp_path / "run"
    train(config(), folder, tensorboard=False)
    (folder / "result.json").unlink()
    (folder / "checkpoint-0003" / store.STATE).write_bytes(b"junk")
    with pytest.raises(DataError, match="--fresh"):
        train(config(), folder, tensorboard=False)


def test_half_written_checkpoint_is_ignored(tmp_path, config):
    folder = tmp_path / "run"
    expected = train(config(), folder, tensorboard=False)
    (folder / "result.json").unlink()
    shutil.copytree(folder / "checkpoint-0003", folder / ".checkpoint-0004-abc")
    assert without_times(train(config(), folder, tensorboard=False)) == without_times(expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns_digits(tmp_path, config, algorithm):
    epochs = {"looksam": 20}.get(algorithm, 15)  # it is slower: after 15, .835 on one thread and .875 on two
    run = config(algorithm=algorithm, epochs=epochs, train_size=None, label_noise=0.0)
    result = train(run, tmp_path / "run", test=False, tensorboard=False)
    assert result["validation"]["accuracy"] > 0.85


def test_digits_train_above_the_sanity_bar(tmp_path):
    result = train(make({"task": "digits"}), tmp_path / "run", test=False, tensorboard=False)
    assert result["validation"]["accuracy"] > 0.965  # .97 to .975 over seeds


def test_measuring_a_run_agrees_with_its_result(tmp_path, config):
    result = train(config(), tmp_path / "run", tensorboard=False)
    flat = measure_run(tmp_path / "run")["output"]
    assert flat.value == pytest.approx(result["flatness"]["value"], rel=1e-6)
    assert flat.samples == 200
    assert measure_run(tmp_path / "run", split="validation")["output"].samples == 400
    assert list(measure_run(tmp_path / "run", layer="fc2", samples=50)) == ["fc2"]
    assert list(measure_run(tmp_path / "run", layer="fc2,output", samples=50)) == ["fc2", "output"]
    with pytest.raises(ConfigError, match="samples=0"):
        measure_run(tmp_path / "run", samples=0)


def test_measuring_something_else_is_an_error(tmp_path):
    with pytest.raises(DataError, match="is not a run"):
        measure_run(tmp_path)


def test_batches_of_an_epoch_are_a_permutation(config):
    session = build(config(train_size=201))
    session.order.epoch = 4
    seen = torch.cat([targets for _, targets in session.loader])
    assert len(session.order) == 6
    assert len(seen) == 192  # the ragged rest waits for another epoch
    session.order.epoch = 5
    assert not torch.equal(seen, torch.cat([targets for _, targets in session.loader]))


@pytest.mark.data
def test_fashion_mnist_learns(tmp_path, config):
    fashion_mnist()
    run = config(task="fashion-mnist", train_size=1000, epochs=3, label_noise=0.0, algorithm="fam", strength=0.01)
    result = train(run, tmp_path / "run", tensorboard=False)
    assert result["test"]["accuracy"] > 0.6
    assert result["flatness"]["value"] > 0
