"""Half precision: what training computes in, never what a run is judged by."""

import pytest
import torch

from relflat.errors import ConfigError
from relflat.lab.train import store
from relflat.lab.train.config import make
from relflat.lab.train.loop import build, train
from relflat.lab.train.measuring import measure_run


def short(**values):
    return make({"task": "digits", "epochs": 6, **values})


@pytest.mark.parametrize(
    "way",
    [
        {"algorithm": "plain"},
        {"algorithm": "sam"},
        {"algorithm": "fam"},
        {"algorithm": "fam", "layer": "fc*", "method": "probe"},
        {"algorithm": "fam", "radius": 0.5, "strength": 1.0, "layer": "fc*"},
    ],
    ids=["plain", "sam", "fam", "probes", "radius"],
)
def test_bf16_trains_as_float32_does_and_differs(tmp_path, way):
    results = {
        precision: train(short(**way, precision=precision), tmp_path / precision, tensorboard=False)
        for precision in ("no", "bf16")
    }
    assert results["bf16"]["validation"]["loss"] != results["no"]["validation"]["loss"]
    for result in results.values():
        assert result["validation"]["accuracy"] > 0.5
    assert results["bf16"]["validation"]["loss"] == pytest.approx(results["no"]["validation"]["loss"], rel=0.2)
    # measured again by other code, which knows no precision but float32
    measured = measure_run(tmp_path / "bf16")["output"]
    assert results["bf16"]["flatness"]["value"] == pytest.approx(measured.value, rel=1e-6)


def test_only_training_is_cast():
    session = build(short(precision="bf16"))
    inputs = session.splits.train.inputs[:4]
    seen = []
    session.model.get_submodule("fc1").register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    session.learner.model(inputs)
    with session.full_precision():
        exact = session.model(inputs)
    session.learner.model(inputs)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    torch.testing.assert_close(exact, session.model.float()(inputs), rtol=0.05, atol=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in session.model.parameters())


def test_interrupted_in_bf16_it_goes_on_bit_for_bit(tmp_path):
    config = short(precision="bf16", algorithm="fam", epochs=3, train_size=100)
    whole = train(config, tmp_path / "whole", tensorboard=False)

    class Stop(Exception):
        pass

    def stop(record):
        raise Stop

    with pytest.raises(Stop):
        train(config, tmp_path / "broken", tensorboard=False, on_epoch=stop)
    again = train(config, tmp_path / "broken", tensorboard=False)
    assert {**again, "seconds_per_step": 0} == {**whole, "seconds_per_step": 0}


def test_precision_is_part_of_the_hash(tmp_path):
    assert make({"task": "digits"}).digest == make({"task": "digits", "precision": "no"}).digest
    assert make({"task": "digits", "precision": "bf16"}).digest != make({"task": "digits"}).digest
    config = short(precision="bf16")
    store.open_run(tmp_path / "run", config)
    assert store.config_of(tmp_path / "run") == config


def test_fp16_and_what_it_needs():
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="precision='fp16' needs a GPU; use precision='bf16'"):
            build(short(precision="fp16"))
    with pytest.raises(ConfigError, match="two passes a step cannot"):
        short(precision="fp16", algorithm="sam")
