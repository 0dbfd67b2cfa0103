import json
from dataclasses import dataclass

import pytest

from processes import python
from relflat.cli.train import read_file
from relflat.errors import ConfigError, DataError
from relflat.lab.train import store
from relflat.lab.train.algorithms import ALGORITHMS, Algorithm, register
from relflat.lab.train.config import SCHEMA, make


def test_defaults_come_from_task_and_method():
    config = make({"task": "digits", "algorithm": "sam"})
    assert (config.epochs, config.batch_size, config.lr, config.seed) == (80, 32, 0.05, 0)
    assert config.settings.rho == 0.05


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_flat_form_round_trips_through_json(algorithm):
    config = make({"task": "fashion-mnist", "algorithm": algorithm, "seed": 7, "train_size": 4000})
    assert make(json.loads(json.dumps(config.flat()))) == config


def test_digest_depends_on_every_value():
    base = make({"task": "digits"})
    others = [make({"task": "digits", key: value}) for key, value in (("seed", 1), ("lr", 0.1), ("epochs", 3))]
    assert len({base.digest, *(other.digest for other in others)}) == 4
    assert make({"task": "digits", "seed": 0}).digest == base.digest


def test_whole_numbers_are_accepted_for_fractions():
    assert make({"task": "digits", "algorithm": "fam", "strength": 1}).settings.strength == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "No task given"),
        ({"task": "digist"}, "Unknown task 'digist'; did you mean 'digits'"),
        ({"task": "digits", "algorithm": "fma"}, "Unknown algorithm 'fma'; did you mean 'fam'"),
        ({"task": "digits", "sede": 1}, "Unknown config key 'sede'; did you mean 'seed'"),
        (
            {"task": "digits", "rho": 0.1},
            "'rho' is a setting of algorithm sam and fam-sam and looksam, not of 'plain'",
        ),
        ({"task": "digits", "algorithm": "fam", "gradient": "froze"}, "did you mean 'frozen'"),
        ({"task": "digits", "seed": 1.5}, "seed=1.5 is not a valid value; expected int"),
        ({"task": "digits", "seed": True}, "seed=True is not a valid value; expected int"),
        ({"task": "digits", "lr": "fast"}, "lr='fast' is not a valid value; expected float"),
        ({"task": "digits", "lr": 0.0}, "lr=0.0 must be above 0"),
        ({"task": "digits", "lr": float("nan")}, "lr=nan must be above 0"),
        ({"task": "digits", "epochs": 0}, "epochs=0 must be above 0"),
        ({"task": "digits", "weight_decay": -1.0}, "weight_decay=-1.0 must not be negative"),
        ({"task": "digits", "label_noise": 1.5}, "label_noise=1.5 is not a probability"),
        ({"task": "digits", "seed": -1}, "seed=-1 must lie between"),
        ({"task": 3}, "task=3 is not a name"),
        ({"task": "digits", "method": "fam"}, "give --algorithm fam (in a file: algorithm)"),
        ({"task": "digits", "regularize": "output"}, "'regularize' is called 'layer' now"),
        ({"task": "digits", "algorithm": "fam", "estimator": "probe"}, "'estimator' is called 'method' now"),
        (
            {"task": "digits", "algorithm": "fam", "temperature": 2.0},
            "'temperature' is a setting of algorithm fam-grokking, not of 'fam'",
        ),
    ],
)
def test_wrong_values_are_named(given, message):
    with pytest.raises(ConfigError) as caught:
        make(given)
    assert message in str(caught.value)


def test_config_files(tmp_path):
    toml, js, bad = tmp_path / "a.toml", tmp_path / "a.json", tmp_path / "bad.toml"
    toml.write_text('algorithm = "sam"\nrho = 0.2\n')
    js.write_text('{"algorithm": "sam", "rho": 0.2}')
    bad.write_text("algorithm = ")
    assert read_file(toml) == read_file(js) == {"algorithm": "sam", "rho": 0.2}
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid toml"):
        read_file(bad)
    with pytest.raises(ConfigError, match="Cannot read"):
        read_file(tmp_path / "none.toml")


def test_a_registered_algorithm_is_known_by_its_name(monkeypatch):
    @dataclass(frozen=True)
    class Mine(Algorithm):
        size: float = 2.0

    monkeypatch.setattr("relflat.lab.train.algorithms.ALGORITHMS", dict(ALGORITHMS))
    register("mine", Mine)
    config = make({"task": "digits", "algorithm": "mine", "size": 3})
    assert config.settings == Mine(size=3.0)
    assert config.flat()["size"] == 3.0


@pytest.mark.xdist_group("bare")
def test_algorithms_of_the_papers_are_imported_when_they_are_named():
    code = (
        "import sys, relflat.lab.train.algorithms as a\n"
        "assert 'relflat.papers.knobs' not in sys.modules and 'fam-grokking' not in a.ALGORITHMS\n"
        "print(a.algorithm_named('fam-grokking').__module__)\n"
    )
    assert python(code) == (0, "relflat.papers.knobs\n", "")


OLD = {"task": "digits", "method": "fam", "seed": 3, "epochs": 2, "batch_size": 32, "lr": 0.05}
OLD |= {"weight_decay": 5e-4, "train_size": None, "label_noise": 0.0, "strength": 0.2, "regularize": "fc2"}


UNBOUNDED = {"bound": None, "every": 1}  # as all penalties were up to schema 2


@pytest.mark.parametrize("schema", [2, 1])
def test_runs_of_an_older_schema_can_be_read_but_not_gone_on_with(tmp_path, schema):
    older = {**OLD, "estimator": "probe"}
    if schema == 2:
        names = {"method": "algorithm", "regularize": "layer", "estimator": "method"}
        older = {names.get(k, k): v for k, v in older.items()} | {"schema": 2, "warmup_steps": 3}
    store.write_json(tmp_path / store.CONFIG, older)
    config = make(
        {"task": "digits", "algorithm": "fam", "seed": 3, "epochs": 2, "strength": 0.2, "layer": "fc2"} | UNBOUNDED
    )
    assert store.config_of(tmp_path) == make({**config.flat(), "method": "probe"})
    with pytest.raises(
        ConfigError, match=rf"has schema {schema}; runs of this version have 3\..*replace it with --fresh"
    ):
        store.check_folder(tmp_path, config)


def test_a_schema_that_is_not_known_is_named(tmp_path):
    store.write_json(tmp_path / store.CONFIG, {"schema": SCHEMA + 1, "task": "digits"})
    with pytest.raises(DataError, match=r"config\.json has schema 4; this version reads 1 to 3"):
        store.config_of(tmp_path)
