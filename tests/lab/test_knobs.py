import copy

import pytest
import torch
from test_algorithms import batch, learner
from torch import nn

from relflat.errors import ConfigError
from relflat.lab.tasks.models import mlp
from relflat.lab.train.algorithms import ALGORITHMS
from relflat.lab.train.config import make
from relflat.lab.train.steps import get_counter, set_counter
from relflat.papers.knobs import KnobbedFAM

KNOBS = "fam-grokking"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(64, hidden=(16,))


def run(algorithm: str, steps: int, **settings) -> tuple[nn.Sequential, list[float]]:
    """The network after so many steps on one batch, and the penalty of each."""
    model, penalties = network(), []
    one = learner(algorithm, model, **settings)
    for _ in range(steps):
        penalties.append(ALGORITHMS[algorithm].step(one, *batch()).penalty)
    return model, penalties


def test_the_penalty_is_taken_away_after_so_many_steps():
    model, penalties = run(KNOBS, 5, strength=-0.1, remove_after=3)
    assert all(penalty < 0 for penalty in penalties[:3])
    assert penalties[3:] == [0, 0]
    kept, all_penalties = run("fam", 5, strength=-0.1)
    assert penalties[:3] == all_penalties[:3]
    assert all_penalties[4] < 0
    assert not torch.equal(model.output.weight, kept.output.weight)


def test_after_the_removal_training_is_plain():
    inputs, targets = batch()
    model = network()
    one = learner(KNOBS, model, strength=0.3, remove_after=2)
    for _ in range(2):
        ALGORITHMS[KNOBS].step(one, inputs, targets)
    plain = copy.deepcopy(model)
    ALGORITHMS[KNOBS].step(one, inputs, targets)
    ALGORITHMS["plain"].step(learner("plain", plain), inputs, targets)
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_resumed_run_knows_that_the_penalty_is_gone():
    one = learner(KNOBS, network(), strength=0.3, remove_after=2)
    for _ in range(2):
        ALGORITHMS[KNOBS].step(one, *batch())
    resumed = learner(KNOBS, network(), strength=0.3, remove_after=2)
    set_counter(resumed.criterion, get_counter(one.criterion))
    assert ALGORITHMS[KNOBS].step(resumed, *batch()).penalty == 0


def test_removed_from_a_perturbed_forward_pass_too():
    """With strength 1 on a hidden layer the pass itself carries the noise: after the removal it must not."""
    model = network()
    one = learner(KNOBS, model, layer="fc1", radius=0.5, strength=1.0, remove_after=1)
    ALGORITHMS[KNOBS].step(one, *batch())
    plain = copy.deepcopy(model)
    found = ALGORITHMS[KNOBS].step(one, *batch())
    expected = ALGORITHMS["plain"].step(learner("plain", plain), *batch())
    torch.testing.assert_close(found.total, expected.total)


def test_weights_stay_within_the_cap_while_the_penalty_is_there():
    free, _ = run("fam", 3, strength=-0.5, bound=None)
    assert free.output.weight.norm() > 2.0
    capped, _ = run(KNOBS, 3, strength=-0.5, weight_cap=2.0)
    assert capped.output.weight.norm().item() == pytest.approx(2.0, rel=1e-5)
    torch.testing.assert_close(run(KNOBS, 0)[0].fc1.weight.norm(), network().fc1.weight.norm())
    loose, _ = run(KNOBS, 3, strength=-0.5, weight_cap=1e6)
    assert torch.equal(loose.output.weight, free.output.weight)


def test_temperature_and_unit_features_reach_the_criterion():
    """The penalty is I1 with the softmax of the halved logits and features of norm 1, written out."""
    model, inputs, targets = network(), *batch()
    by_hand = copy.deepcopy(model)
    losses = ALGORITHMS[KNOBS].step(
        learner(KNOBS, model, strength=1.0, temperature=2.0, unit_features=True), inputs, targets
    )
    weight = by_hand.output.weight
    p = (by_hand(inputs) / 2).softmax(1)
    kappa = (p @ weight.square().sum(1) - (p @ weight).square().sum(1)).mean()
    assert losses.penalty == pytest.approx(kappa.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("knob", "message"),
    [({"remove_after": -1}, "remove_after=-1: give a number"), ({"weight_cap": 0.0}, "weight_cap=0.0: the norm")],
)
def test_knobs_that_do_not_fit_are_rejected(knob, message):
    with pytest.raises(ConfigError, match=message):
        learner(KNOBS, network(), strength=0.1, **knob)


def test_the_criterion_does_not_own_the_model():
    criterion = learner(KNOBS, network(), strength=0.1, weight_cap=1.0).criterion
    assert isinstance(criterion, KnobbedFAM)
    assert list(criterion.parameters()) == []
    assert criterion.state_dict() == {}
    assert make({"task": "digits", "algorithm": KNOBS, "remove_after": None}).settings.remove_after is None
