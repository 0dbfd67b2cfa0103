import numpy as np
import pytest
import torch

from relflat import reference
from relflat.errors import DataError
from relflat.papers import correlation
from relflat.papers.correlation import CHOSEN, OF_LAYER, VIEWS, conclude, measure, recipes
from relflat.papers.experiment import Context
from relflat.papers.measures import MEASURES
from relflat.papers.trained import Source, grid, samples, trained

DIGITS = Source("digits", 150, 300, held_out=500)
TINY = grid(
    DIGITS, "mlp-8x8", batch_sizes=(10, 30), lrs=(0.01, 0.02), weight_decays=(0.0, 1e-3), seeds=(0,), most_epochs=60
)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    network = trained(TINY[0], folder)
    return network, measure(network.network, TINY[0])


def test_kappa_is_that_of_the_dense_definition_in_every_view(one):
    network, measures = one
    train = samples(DIGITS).train
    with torch.no_grad():
        phi = network.network[:-1](train.inputs).double()
    W = network.network[-1].weight.detach().double()
    bias = network.network[-1].bias.detach().double()

    def loss(V, features):
        return torch.nn.functional.cross_entropy(features @ V.T + bias, train.targets)

    plain = reference.kappa(lambda V: loss(V, phi), W)
    std = phi.std(0, correction=0)
    varies = std > 0  # the others are dead here, so their weights do not matter
    assert not phi[:, ~varies].any()
    scaled = reference.kappa(lambda V: loss(V, phi[:, varies] / std[varies]), (W * std)[:, varies])
    assert measures["as trained"]["kappa"] == pytest.approx(float(plain), rel=1e-6)
    assert measures["normalised"]["kappa"] == pytest.approx(float(scaled), rel=1e-6)
    assert measures["normalised"]["kappa"] != pytest.approx(float(plain), rel=0.01)


def test_largest_eigenvalues_are_those_that_lanczos_finds(one):
    network, measures = one
    train = samples(DIGITS).train
    subject = correlation.output_layer(network.network, train.inputs, train.targets, normalise=True)
    assert measures["normalised"]["kappa_max"] == pytest.approx(MEASURES["kappa_max"].of(subject), rel=1e-5)


def test_rescaling_moves_exactly_the_measures_that_are_not_invariant(one):
    _, measures = one
    before, after = measures["as trained"], measures["rescaled"]
    moved = {name for name in before if after[name] != pytest.approx(before[name], rel=0.02)}
    invariant = {"kappa", "kappa_adaptive", "kappa_max", "layerwise", "fisher_rao"}
    assert invariant.isdisjoint(moved)
    assert {"trace", "lambda_max", "weight_norm", "pac_bayes", "sam"} <= moved
    factor = after["weight_norm"] / before["weight_norm"]
    assert 5 <= factor < 25  # of the last pair of layers
    assert before["trace"] / after["trace"] == pytest.approx(factor**2, rel=1e-4)


def test_normalised_features_undo_the_rescaling(one):
    _, measures = one
    for name in OF_LAYER:
        assert measures["rescaled, normalised"][name] == pytest.approx(measures["normalised"][name], rel=1e-3)
    assert set(measures["normalised"]) == set(OF_LAYER)


def never(*args):
    raise AssertionError("what is kept is not measured again")


def test_the_command_trains_measures_reports_and_does_nothing_twice(reproduced, monkeypatch, tmp_path):
    monkeypatch.setattr(correlation, "recipes", lambda scale: [*TINY, replace_epochs(TINY[0])])
    values = reproduced("correlation")
    networks = values["data"]["networks"]
    assert sum(network["reached"] for network in networks) == len(TINY)
    gaps = [network["gap"] for network in networks[:-1]]
    kappas = [network["measures"]["as trained"]["kappa"] for network in networks[:-1]]
    found = values["data"]["associations"]["as trained"]["kappa"]
    assert found["n"] == len(TINY)
    assert found["r"][0] == pytest.approx(np.corrcoef(kappas, gaps)[0, 1])
    assert "1 of 9 networks did not reach" in values["findings"][-1]
    assert len(values["tables"][0]["rows"]) == len(CHOSEN) + 1
    monkeypatch.setattr(correlation, "measure", never)
    assert reproduced("correlation")["data"] == values["data"]
    assert "Tr H against the gap" in (tmp_path / values["folder"] / "report.html").read_text()


def replace_epochs(recipe):
    return grid(
        recipe.source,
        recipe.network,
        batch_sizes=[recipe.batch_size],
        lrs=[recipe.lr],
        weight_decays=[recipe.weight_decay],
        seeds=[1],
        most_epochs=1,
    )[0]


def record(kappa, gap, rescaled):
    """A network whose kappa is invariant and whose other measures go with the gap until they are rescaled."""
    measures = {
        name: {
            measure: kappa if measure == "kappa" else rescaled if view.rescaled and not view.normalised else gap
            for measure in (OF_LAYER if view.normalised else CHOSEN)
        }
        for name, view in VIEWS.items()
    }
    recipe = {"batch_size": 10, "lr": gap, "weight_decay": 0.0}
    return {"reached": True, "gap": gap, "recipe": recipe, "train_loss": 0.05 + gap / 1000, "measures": measures}


def outcome(kappas, gaps):
    random = np.random.default_rng(0).normal(size=len(gaps))
    records = [record(*values) for values in zip(kappas, gaps, random, strict=True)]
    return conclude([TINY[0]] * len(gaps), records, "small")


def test_findings_follow_the_numbers():
    gaps = [1 + number / 10 for number in range(20)]
    with_gap = outcome([gap**2 for gap in gaps], gaps).findings
    assert "; reproduced: kappa goes with" in with_gap[0]
    assert "unchanged: kappa (+1.00 to +1.00)" in with_gap[2]
    assert "Association no longer shown: kappa, adaptive" in with_gap[2]
    assert "undoes the rescaling for every measure" in with_gap[3]
    assert "the opposite of the paper" in outcome([-gap for gap in gaps], gaps).findings[0]
    random = np.random.default_rng(7).normal(size=20)
    assert "not reproduced" in outcome(list(random), gaps).findings[0]


def test_too_few_networks_are_an_error():
    with pytest.raises(DataError, match=r"1 of 2 networks reached a training loss of 0\.1, too few"):
        conclude(TINY[:2], [record(1.0, 1.0, 1.0), {"reached": False}], "small")


def test_the_paper_scale_has_all_pictures_and_ten_runs_of_each_setting():
    networks = recipes("paper")
    assert len(networks) == 270
    assert {each.source for each in networks} == {Source("cifar10")}
    assert {each.network for each in networks} == {"lenet5"}
    assert {each.level for each in networks} == {0.1}
    settings = [(each.batch_size, each.lr, each.weight_decay) for each in networks]
    assert {settings.count(each) for each in settings} == {10}


@pytest.mark.data
def test_without_the_pictures_the_error_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "empty"))
    samples.cache_clear()
    with pytest.raises(DataError, match="relflat data get cifar10"):
        correlation.run(Context("paper", tmp_path, tmp_path))
