"""Table 3 with a random BERT of two layers and made-up sentences: the code, not the numbers."""

import io
import tarfile
from itertools import islice, product
from statistics import mean, stdev

import pytest
import torch

from relflat.lab.data import fetch, reviews
from relflat.lab.data.sources import SOURCES
from relflat.lab.tasks import text
from relflat.papers import sentences, table3
from relflat.papers.table3 import SIZES, Size, config

transformers = pytest.importorskip("transformers", reason="extra 'transformers' is not installed")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "dull", "plot", "!"]


def tiny_bert(folder) -> None:
    folder.mkdir(parents=True)
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **shape)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def many_reviews(folder) -> None:
    """Seven hundred sentences of five words and one that is too long; those with more "fine" than "dull" are good."""
    lines = []
    for words in islice(product(WORDS[5:], repeat=5), 700):
        rating = 2 if words.count("fine") > words.count("dull") else -2
        lines.append(f"1\t{rating}\t{' '.join(words)}")
    lines.append(f"1\t2\t{'a ' * 20}")
    folder.mkdir(parents=True)
    with tarfile.open(folder / reviews.ARCHIVE, "w:gz") as packed:
        for domain, file in reviews.FILES.items():
            content = "\n".join(lines if domain == "films" else [f"1\t2\tnothing but {domain}"]).encode()
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{file}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))


@pytest.fixture
def cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    for name, make in (("minilm", tiny_bert), ("reviews", many_reviews)):
        make(fetch.home(SOURCES[name]) / SOURCES[name].folder)
    capsys.readouterr()  # transformers reports what it saves
    return tmp_path / "cache"


def test_a_tiny_table(reproduced, cache, monkeypatch):
    tiny = Size((0, 1), {"task": "sentences.py:few", "train_size": 64, "epochs": 1}, (0.1, 1.0), (0,))
    monkeypatch.setitem(SIZES, "small", tiny)
    values = reproduced("table3", "--out", "out")
    data, rows = values["data"], values["tables"][0]["rows"]
    assert [row[0] for row in rows] == [
        "plain",
        f"FAM, strength {data['strength']:g}",
        "FAM, strength 3e6",
        "FAM, strength 3e6, gradient of the layer only",
    ]
    best = max(data["search"], key=lambda trial: (trial["validation"], -trial["loss"]))
    assert data["strength"] == best["strength"]
    for row, runs in zip(rows, data["runs"].values(), strict=True):
        accuracies = [run["test"]["accuracy"] for run in runs]
        assert row[4] == f"{mean(accuracies):.4f}"
        assert row[6] == f"{max(accuracies):.4f}"
        if len(accuracies) > 1:
            assert row[5] == f"{stdev(accuracies):.4f}"
    assert rows[0][1:4] == ["0.6736", "0.0180", "0.6931"]
    plain, printed = data["runs"]["plain"][0], data["runs"]["fam-printed"][0]
    assert printed["flatness"]["value"] < plain["flatness"]["value"]
    assert "the paper has +2.5" in values["findings"][0]
    assert "lies at the end of the grid" in values["findings"][-1]  # with two strengths it always does


def test_only_short_sentences(cache):
    raw = sentences.read_short()
    assert len(raw.pool) == 700
    assert int(raw.pool.inputs["attention_mask"].sum(1).max()) <= sentences.SHORT
    assert not raw.shifts


def test_the_papers_settings():
    size = SIZES["paper"]
    fam = config(size, "fam", table3.PRINTED_STRENGTH, 3)
    assert (fam.lr, fam.epochs, fam.batch_size, fam.seed) == (2e-5, 20, 32, 3)
    assert (fam.settings.strength, fam.settings.gradient, fam.settings.bound) == (3e6, "full", None)
    assert config(size, "fam-code", 3e6, 0).settings.gradient == "weights"
    assert len(size.seeds) == 5
    assert text.PAIR_TOKENS == 128


def test_the_papers_bert_is_asked_for(relflat, cache):
    code, _, err = relflat("reproduce", "table3", "--scale", "paper")
    assert code == 2
    assert "pretrained BERT-base" in err
    assert "google-bert/bert-base-uncased" in err
    tiny_bert(sentences.bert_folder())
    code, _, err = relflat("reproduce", "table3", "--scale", "paper")
    assert code == 2
    assert "relflat data get rte" in err


def test_bert_has_a_pooler_dropout_and_an_output_layer(cache):
    tiny_bert(sentences.bert_folder())
    model = sentences.bert().eval()
    output = model.model.classifier
    coded = text.encode(["a fine film", "dull"], ["plot", "!"], tokens=12)
    pooled = model.model.bert(**coded).pooler_output
    expected = pooled @ output.weight.T + output.bias
    assert torch.allclose(model(**coded), expected, atol=1e-6)
    assert output.weight.shape == (2, 8)
    saved = transformers.BertModel.from_pretrained(sentences.bert_folder(), local_files_only=True)
    assert torch.equal(saved.pooler.dense.weight, model.model.bert.pooler.dense.weight)
