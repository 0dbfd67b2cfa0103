"""The tasks of table 3: few short sentences and MiniLM for two cores; RTE and BERT-base as in the FAM paper.

They are the experiment's own, named by this file: ``relflat train path/to/sentences.py:few`` trains one alone.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor, nn

from relflat.errors import DataError
from relflat.lab.data.arrays import RawData
from relflat.lab.data.fetch import cache_folder
from relflat.lab.data.splits import classification
from relflat.lab.tasks import AdamW, Task, text
from relflat.lab.tasks.records import RECORDS

SHORT = 16  # most tokens of a sentence of the small task
BERT = "bert-base-uncased"


def read_short() -> RawData:
    """The film sentences of at most ``SHORT`` tokens, without the test sets from elsewhere."""
    pool = text.read_reviews().pool
    assert isinstance(pool.inputs, dict)
    return RawData(pool.take(pool.inputs["attention_mask"].sum(1) <= SHORT), None, 2)


few: Task = replace(
    RECORDS["reviews"],
    name="few",
    summary="short sentences of film reviews, good or bad, pretrained MiniLM",
    splits=partial(classification, read_short, validation=200, test=400, standardise=False),
)


class Bert(nn.Module):
    """BERT with its pooler, dropout and a new output layer, as it is fine-tuned on GLUE (Devlin et al. 2019)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **tokens: Int[Tensor, "n tokens"]) -> Float[Tensor, "n d"]:
        """Return the logits."""
        return self.model(**tokens).logits


def bert_folder() -> Path:
    """Where the pretrained BERT is looked for."""
    return cache_folder() / BERT


def require_bert() -> None:
    """See that it is there; else say what is needed, and where."""
    missing = [name for name in ("config.json", "model.safetensors") if not (bert_folder() / name).is_file()]
    if missing:
        raise DataError(
            f"Table 3 at the paper's scale fine-tunes the pretrained BERT-base, uncased (110 M parameters), and "
            f"{bert_folder()} has no {' and no '.join(missing)}. Save it there (440 MB): "
            f"hf download google-bert/{BERT} config.json model.safetensors --local-dir {bert_folder()}"
        )


def bert() -> Bert:
    """The pretrained BERT-base under a new output layer."""
    require_bert()
    made = text.library().AutoModelForSequenceClassification
    return Bert(made.from_pretrained(bert_folder(), num_labels=2, local_files_only=True).float())


rte_bert: Task = replace(
    RECORDS["rte"],
    name="rte-bert",
    summary="does a sentence follow from another, pretrained BERT-base, the FAM paper's budget",
    splits=partial(classification, partial(text.read_glue, "rte"), validation=40, test=None, standardise=False),
    model=bert,
    layer="model.classifier",
    optimizer=AdamW(lr=2e-5),
    epochs=20,
    batch_size=32,
)
