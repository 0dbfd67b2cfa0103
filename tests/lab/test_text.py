import io
import json
import tarfile
from dataclasses import replace

import pytest
import torch

from fetched import have
from relflat import relative_flatness
from relflat.errors import DataError
from relflat.lab.data import fetch, reviews
from relflat.lab.data.sources import SOURCES
from relflat.lab.tasks import text

transformers = pytest.importorskip("transformers", reason="extra 'transformers' is not installed")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "dull", "plot", "!"]


def archive(folder, **domains: str) -> None:
    """The package's inner archive, with these lines in its files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / reviews.ARCHIVE, "w:gz") as packed:
        for domain, file in reviews.FILES.items():
            content = domains.get(domain, "").replace("\n", "\r\n").encode()
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{file}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))


def tiny_bert(folder) -> None:
    """A random BERT of two layers with its tokenizer, in the files that the package has."""
    folder.mkdir(parents=True)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path / "cache"))
    tiny_bert(fetch.home(SOURCES["minilm"]) / SOURCES["minilm"].folder)
    return tmp_path / "cache"


def test_sentences_clear_of_neutral_with_the_sign_of_their_rating(tmp_path):
    archive(tmp_path, films="1\t0.5\ta fine film\n2\t-0.5\tdull\tplot\n3\t0.49\tso so\n4\t-0.49\tso so again")
    films = reviews.sentences(tmp_path)["films"]
    assert films == reviews.Sentences(["a fine film", "dull\tplot"], [1, 0])


def test_a_sentence_is_kept_once_over_all_domains(tmp_path):
    archive(
        tmp_path,
        films="1\t2\tA  fine film\n2\t1\ta fine film",
        amazon="1\t3\tA FINE FILM\n2\t-1\tdull",
        tweets="1\t-2\tdull\n2\t2\tnew",
    )
    texts = {domain: part.texts for domain, part in reviews.sentences(tmp_path).items()}
    assert texts == {"films": ["A  fine film"], "amazon": ["dull"], "news": [], "tweets": ["new"]}


def test_damaged_reviews_are_named(tmp_path):
    with pytest.raises(DataError, match="movieReviewSnippets"):
        reviews.sentences(tmp_path)
    archive(tmp_path, news="1\t2\tgood\n2\tno number\tbad")
    with pytest.raises(DataError, match="Line 2 of nytEditorialSnippets"):
        reviews.sentences(tmp_path)


def test_reviews_are_read_with_the_other_domains_as_shifts(cache):
    folder = fetch.home(SOURCES["reviews"]) / SOURCES["reviews"].folder
    archive(
        folder,
        films="1\t2\ta fine film\n2\t-2\tdull",
        amazon="1\t2\tfine !",
        news="1\t2\tfine plot",
        tweets="1\t-2\tdull plot",
    )
    raw = text.read_reviews()
    assert raw.test is None
    assert raw.pool.targets.tolist() == [1, 0]
    assert raw.pool.inputs["input_ids"].shape == (2, text.TOKENS)
    assert raw.pool.inputs["input_ids"][0, :6].tolist() == [2, 5, 6, 7, 3, 0]
    assert raw.pool.inputs["attention_mask"].sum(1).tolist() == [5, 3]
    assert list(raw.shifts) == ["amazon", "news", "tweets"]
    assert raw.shifts["tweets"].targets.tolist() == [0]


def test_glue_pairs_are_read_with_their_segments(cache, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="extra 'hub' is not installed")
    rows = {"sentence1": ["a film", "dull !"], "sentence2": ["fine", "plot"], "label": [1, 0], "idx": [0, 1]}
    found = {"train": datasets.Dataset.from_dict(rows), "validation": datasets.Dataset.from_dict(rows)}
    monkeypatch.setitem(SOURCES, "mrpc", replace(SOURCES["mrpc"], rows={"train": 2, "validation": 2}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: datasets.DatasetDict(found))
    fetch.get("mrpc")
    raw = text.read_glue("mrpc")
    assert raw.test is not None
    assert raw.test.targets.tolist() == [1, 0]
    assert raw.pool.inputs["input_ids"].shape == (2, text.PAIR_TOKENS)
    assert raw.pool.inputs["input_ids"][0, :7].tolist() == [2, 5, 7, 3, 6, 3, 0]
    assert raw.pool.inputs["token_type_ids"][0, :7].tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert text.minilm()(**raw.pool.inputs).shape == (2, 2)


def test_missing_files_are_asked_for_in_one_command(tmp_path, monkeypatch):
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="relflat data get reviews minilm"):
        text.read_reviews()


def test_classifier_averages_the_encoders_tokens(cache):
    """Without the shortcut over columns that are padding in all rows, one sentence at a time."""
    model = text.minilm(3).double().eval()
    inputs = text.encode(["a fine film !", "dull"], tokens=12)
    logits = model(**inputs)
    for row in range(2):
        length = int(inputs["attention_mask"][row].sum())
        alone = model.encoder(inputs["input_ids"][row : row + 1, :length]).last_hidden_state[0].mean(0)
        assert torch.allclose(logits[row], model.output(alone), atol=1e-12)


def test_weights_are_the_packaged_ones_or_refused(cache):
    from safetensors.torch import load_file, save_file

    folder = fetch.files("minilm")
    weights = load_file(folder / "model.safetensors")
    state = text.load_encoder(folder).state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in state if name in weights)
    assert set(weights) - set(state) == {"pooler.dense.weight", "pooler.dense.bias"}
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"no weights for encoder\.layer\.1\.output\.dense\.weight"):
        text.load_encoder(folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="holds no usable encoder"):
        text.load_encoder(folder)


def test_flatness_of_the_output_layer_is_closed_form(cache):
    model = text.minilm().eval()
    inputs = text.encode(["a fine film", "dull plot !"], tokens=8)
    batch = {**inputs, "labels": torch.tensor([1, 0])}

    def forward(model, batch):
        return model(**{name: batch[name] for name in inputs}), batch["labels"]

    flat = relative_flatness(model, torch.nn.CrossEntropyLoss(), [batch], layer="output", forward=forward)
    assert flat.method == "closed_form"
    assert flat.value > 0


@pytest.mark.data
def test_the_published_reviews():
    """Counts from the README of the data set, and of the sentences clear of neutral that are there once."""
    have("reviews")
    folder = fetch.files("reviews")
    lines = {domain: reviews.read_lines(folder / reviews.ARCHIVE, file) for domain, file in reviews.FILES.items()}
    assert {d: len(rows) for d, rows in lines.items()} == {
        "films": 10_605,
        "amazon": 3_708,
        "news": 5_190,
        "tweets": 4_200,
    }
    found = reviews.sentences(folder)
    assert {d: len(part.texts) for d, part in found.items()} == {
        "films": 10_070,
        "amazon": 2_976,
        "news": 2_930,
        "tweets": 3_372,
    }
    assert len({t for part in found.values() for t in part.texts}) == 10_070 + 2_976 + 2_930 + 3_372


@pytest.mark.data
def test_the_pretrained_encoder_knows_meanings():
    have("minilm")
    said = ["The film was wonderful.", "What a great movie!", "The invoice is due on Tuesday."]
    model = text.minilm().eval()
    inputs = text.encode(said, tokens=16)
    features = []
    model.output.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    model(**inputs)
    alike = torch.nn.functional.cosine_similarity(features[0][:1], features[0][1:])
    assert alike[0] > 0.6
    assert alike[1] < 0.2
    assert json.loads((fetch.files("minilm") / "config.json").read_text())["hidden_size"] == 384
