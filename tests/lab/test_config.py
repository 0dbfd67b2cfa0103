import json

import pytest

from relflat.errors import ConfigError
from relflat.lab.train.algorithms import ALGORITHMS
from relflat.lab.train.config import make, read_file


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
    others = [
        make({"task": "digits", key: value}) for key, value in (("seed", 1), ("lr", 0.1), ("epochs", 3))
    ]
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
