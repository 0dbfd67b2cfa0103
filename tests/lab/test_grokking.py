import pytest
import torch
from torch import nn

from relflat import relative_flatness
from relflat.errors import ConfigError
from relflat.lab.data.arrays import Arrays
from relflat.lab.tasks import TASKS
from relflat.papers.modular_addition import AdditionMLP, AdditionTransformer, additions, learnt_at, splits
from relflat.reference import at_layer, kappa


def test_the_table_holds_every_sum_once():
    raw = additions(7)
    assert len(raw.pool) == 49
    assert len({tuple(pair.tolist()) for pair in raw.pool.inputs}) == 49
    for (a, b), total in zip(raw.pool.inputs.tolist(), raw.pool.targets.tolist(), strict=True):
        assert total == (a + b) % 7


def test_splits_are_disjoint_and_have_the_fraction():
    cut = splits(train_size=None, label_noise=0, seed=0, modulus=11, fraction=0.4)
    parts = [cut.train, cut.validation, cut.test()]
    assert [len(part) for part in parts] == [48, 36, 37]
    seen = [tuple(pair.tolist()) for part in parts for pair in part.inputs]
    assert len(set(seen)) == 121
    again = splits(train_size=None, label_noise=0, seed=5, modulus=11, fraction=0.4)
    assert torch.equal(again.validation.inputs, cut.validation.inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modulus": 1}, "modulus=1: there are no sums"),
        ({"fraction": 1.0}, "fraction=1.0 of the pairs must lie between"),
    ],
)
def test_sums_that_cannot_be_cut_are_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        splits(train_size=None, label_noise=0, seed=0, **options)


@pytest.mark.parametrize("network", [AdditionMLP, AdditionTransformer])
def test_networks_answer_with_the_output_layer(network):
    torch.manual_seed(0)
    model = network(7, width=8).double()
    pairs = additions(7).pool.inputs
    outputs = []
    model.output.register_forward_hook(lambda module, args, out: outputs.append(out))
    logits = model(pairs)
    assert logits.shape == (49, 7)
    assert outputs[0] is logits
    assert logits.std(0).min() > 0
    alone = torch.cat([model(pair[None]) for pair in pairs])
    torch.testing.assert_close(alone, logits)  # no sample sees another


def test_the_order_of_the_residues_can_be_seen_by_both_networks():
    """Places are told apart, so that commutativity is learnt and not built in."""
    torch.manual_seed(0)
    for model in (AdditionMLP(7, 8), AdditionTransformer(7, 8)):
        one, other = model(torch.tensor([[2, 5], [5, 2]]))
        assert not torch.allclose(one, other)


def test_kappa_of_the_transformers_output_is_the_definition():
    torch.manual_seed(0)
    model, data = AdditionTransformer(5, width=8, heads=2).double(), additions(5).pool
    found = relative_flatness(model, nn.CrossEntropyLoss(), [(data.inputs, data.targets)], layer="output")
    expected = kappa(*at_layer(model, nn.CrossEntropyLoss(), data.inputs, data.targets, "output"))
    assert found.method == "closed_form"
    assert found.value == pytest.approx(expected.item(), rel=1e-8)


def history(train: list[float], validation: list[float]) -> list[dict]:
    return [
        {"epoch": number, "train_accuracy": one, "validation_accuracy": other}
        for number, (one, other) in enumerate(zip(train, validation, strict=True), 1)
    ]


def test_learnt_is_when_accuracy_stays_up():
    records = history([0.5, 1, 1, 1, 1, 1], [0, 0, 0.995, 0.2, 0.99, 1])
    assert learnt_at(records, "train") == 2
    assert learnt_at(records, "validation") == 5
    assert learnt_at(records[:4], "validation") is None
    assert learnt_at(records, "validation", level=0.1) == 3


@pytest.mark.slow
def test_generalisation_comes_long_after_memorising():
    """The task's own network and optimiser: all training sums known while validation is still at chance."""
    task = TASKS["addition"]
    cut = task.splits(train_size=None, label_noise=0, seed=0)
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def accuracy(part: Arrays) -> float:
        with torch.no_grad():
            return (model(part.inputs).argmax(1) == part.targets).float().mean().item()

    records = []
    for epoch in range(1, 401):
        order = torch.randperm(len(cut.train), generator=generator)
        for index in order.split(task.batch_size)[:-1]:
            part = cut.train.take(index)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(part.inputs), part.targets).backward()
            optimizer.step()
        if epoch % 10 == 0:
            found = {"train_accuracy": accuracy(cut.train), "validation_accuracy": accuracy(cut.validation)}
            records.append({"epoch": epoch, **found})
            if min(r["validation_accuracy"] for r in records[-3:]) > 0.98:  # and stays
                break
    memorised = learnt_at(records, "train")
    assert memorised is not None
    assert memorised <= 80
    assert records[memorised // 10 - 1]["validation_accuracy"] < 0.05
    assert records[-1]["validation_accuracy"] > 0.98
    generalised = learnt_at(records, "validation", 0.95)
    assert generalised is not None
    assert generalised - learnt_at(records, "train", 0.95) > 2 * memorised
