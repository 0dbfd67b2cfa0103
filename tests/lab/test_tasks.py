"""Tasks on texts through the whole training loop: a tiny random BERT and made-up sentences stand in."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_text import WORDS, archive, tiny_bert

from relflat.lab.data import fetch
from relflat.lab.data.sources import SOURCES
from relflat.lab.tasks import TASKS
from relflat.lab.train.config import make
from relflat.lab.train.loop import build, train
from relflat.lab.train.measuring import measure_run

pytest.importorskip("transformers", reason="extra 'transformers' is not installed")

FAM = {"algorithm": "fam", "strength": 0.1, "epochs": 1, "batch_size": 16, "lr": 1e-3}


@pytest.fixture
def minilm(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    tiny_bert(fetch.home(SOURCES["minilm"]) / SOURCES["minilm"].folder)


def sentences(number: int) -> list[str]:
    """Different sentences of known words: a number written in base three."""
    words = WORDS[5:8]
    return [" ".join(words[place // 3**digit % 3] for digit in range(8)) for place in range(number)]


def test_reviews_train_and_are_tested_in_four_domains(tmp_path, minilm):
    films, other = sentences(3040)[:-10], sentences(3040)[-10:]
    lines = "\n".join(f"{place}\t{1 - 2 * (place % 2)}\t{text}" for place, text in enumerate(films))
    domains = {
        name: f"1\t2\t{other[place]}\n2\t-2\t{other[-place]}" for place, name in enumerate(("amazon", "news"), 1)
    }
    archive(
        fetch.home(SOURCES["reviews"]) / SOURCES["reviews"].folder, films=lines, tweets=f"1\t2\t{other[5]}", **domains
    )
    result = train(make({"task": "reviews", **FAM}), tmp_path / "run", tensorboard=False)
    assert result["status"] == "finished"
    assert result["flatness"]["method"] == "closed_form"
    assert list(result["shifts"]) == ["amazon", "news", "tweets"]
    assert result["shifts"]["amazon"]["accuracy"] in {0.0, 0.5, 1.0}
    assert measure_run(tmp_path / "run")["output"].value == pytest.approx(result["flatness"]["value"], rel=1e-4)


def test_pairs_of_glue_are_cut_into_splits(minilm, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="extra 'hub' is not installed")

    def rows(first: list[str]):
        columns = {"sentence1": first, "sentence2": first[::-1], "label": [place % 2 for place in range(len(first))]}
        return datasets.Dataset.from_dict(columns)

    everything = sentences(450)
    found = {"train": rows(everything[:440]), "validation": rows(everything[440:])}
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: datasets.DatasetDict(found))
    small = replace(SOURCES["mrpc"], rows={"train": 440, "validation": 10})
    monkeypatch.setitem(SOURCES, "mrpc", small)
    fetch.get("mrpc")
    session = build(make({"task": "mrpc", **FAM}))
    try:
        assert len(session.splits.train) == 40
        assert len(session.splits.validation) == 400
        assert len(session.splits.test()) == 10
        inputs, targets = next(iter(session.loader))
        assert session.model(**inputs).shape == (len(targets), 2)
    finally:
        session.close()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_row_in_its_page(name):
    page = Path(__file__).parents[2] / "docs" / "tasks.md"
    assert f"| `{name}` |" in page.read_text()
