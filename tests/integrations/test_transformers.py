"""FAM in the Trainer: kappa of the loss it optimises, for every kind of head; everything else as it was."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_same, gradients
from torch import nn

from relflat import reference, relative_flatness
from relflat.errors import ConfigError, DataError, GraphError, LayerError, LossError
from unbounded import FAM

transformers = pytest.importorskip("transformers")
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from relflat.integrations.transformers import FAMMixin, FAMTrainer, FlatnessCallback

transformers.utils.logging.set_verbosity_error()
VOCAB, WIDTH, TOKENS, SAMPLES = 20, 8, 6, 16


def bert(**options) -> BertConfig:
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=TOKENS, **(none | options),
    )  # fmt: skip


def gpt2() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCAB, n_positions=TOKENS, n_embd=WIDTH, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def llama(**options) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip


HEADS = {
    "sequence": lambda: BertForSequenceClassification(bert(num_labels=3)),
    "several labels": lambda: BertForSequenceClassification(
        bert(num_labels=3, problem_type="multi_label_classification")
    ),
    "regression": lambda: BertForSequenceClassification(bert(num_labels=1)),
    "tokens": lambda: BertForTokenClassification(bert(num_labels=3)),
    "language (GPT-2)": lambda: GPT2LMHeadModel(gpt2()),
    "language (Llama)": lambda: LlamaForCausalLM(llama()),
    "sequence (Llama, last token)": lambda: LlamaForSequenceClassification(llama(num_labels=3)),
}


def build(head: str, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = HEADS[head]().to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # as large as in a trained network, or kappa would be next to nothing
            if p.ndim > 1:
                p.mul_(10)
    return model


def rows(head: str, dtype=torch.float64) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (SAMPLES, TOKENS), generator=generator)
    if head == "several labels":
        labels = torch.randint(2, (SAMPLES, 3), generator=generator).to(dtype)
    elif head == "regression":
        labels = torch.randn(SAMPLES, generator=generator, dtype=dtype)
    elif head == "tokens" or head.startswith("language"):
        labels = torch.randint(3, ids.shape, generator=generator) if head == "tokens" else ids.clone()
        for i in range(SAMPLES):  # micro-batches with different numbers of tokens
            labels[i, TOKENS - i // 4 :] = -100
    else:
        labels = torch.randint(3, (SAMPLES,), generator=generator)
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


def batch(head: str, dtype=torch.float64) -> dict:
    data = rows(head, dtype)
    return {k: torch.stack([row[k] for row in data]) for k in data[0]}


class Keep(TrainerCallback):
    """Keeps the gradients of the first optimiser step."""

    def __init__(self) -> None:
        self.found = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = self.found or gradients(model)


def arguments(folder, accumulate: int = 1, **options) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": SAMPLES // accumulate,
        "gradient_accumulation_steps": accumulate, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1,
        "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**(settings | options))


def trained(head, folder, accumulate=1, dtype=torch.float64, trainer=FAMTrainer, *, attributes=None, **options):
    """Train for one step; the trainer and its gradients."""
    extra = (
        {} if trainer is Trainer else {"fam": options.pop("fam", {"layer": "output", "strength": 0.5, "bound": None})}
    )
    extra |= {k: options.pop(k) for k in ["compute_loss_func"] if k in options}
    args, keep = arguments(folder, accumulate, **options), Keep()
    run = trainer(build(head, dtype), args, train_dataset=rows(head, dtype), callbacks=[keep], **extra)
    for name, value in (attributes or {}).items():
        setattr(run, name, value)
    run.train()
    return run, keep.found


def rows_and_targets(head: str, logits: torch.Tensor, y: torch.Tensor):
    """The loss of every head written out by hand."""
    if head == "several labels":
        return nn.BCEWithLogitsLoss(), logits, y
    if head == "regression":
        return nn.MSELoss(), logits.squeeze(1), y
    if head == "tokens":
        return nn.CrossEntropyLoss(), logits.reshape(-1, 3), y.reshape(-1)
    if head.startswith("language"):
        return nn.CrossEntropyLoss(), logits[:, :-1].reshape(-1, VOCAB), y[:, 1:].reshape(-1)
    return nn.CrossEntropyLoss(), logits, y


def by_hand(head: str) -> list[torch.Tensor]:
    """Gradient of loss + strength kappa of all samples in one batch, kappa from double backward."""
    model, inputs = build(head).train(), batch(head)
    fam = FAM(None, model, "output", strength=0.5, curvature="hessian", method="exact")
    loss_fn, z, y = rows_and_targets(head, model(input_ids=inputs["input_ids"]).logits, inputs["labels"])
    loss = loss_fn(z, y) + 0.0 * z.sum()  # not recognised, so differentiated
    if head == "language (GPT-2)":  # the Trainer counts the first token too, for classes not called ...ForCausalLM
        loss = loss * (y != -100).sum() / (inputs["labels"] != -100).sum()
    (loss + fam.penalty(loss)).backward()
    return gradients(model)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_the_full_batch(head, tmp_path) -> None:
    run, found = trained(head, tmp_path)
    assert run.criterion.last["method"] == "closed_form"
    assert run.criterion.last["penalty"] > 0.01
    inside = torch.float32 if head.startswith("language") or "Llama" in head else torch.float64  # of the models
    assert_same(found, by_hand(head), inside)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head", ["language (GPT-2)", "language (Llama)", "sequence"])
def test_accumulation_adds_up_to_the_full_batch(head, dtype, tmp_path) -> None:
    """With ragged numbers of tokens, through ``num_items_in_batch``."""
    # Transformers 5.23 takes the loss of a BERT head for scaled when it is not, and then it is 4 times too large.
    fixed = {"loss_is_scaled_for_ga": False} if head == "sequence" else {}
    _, found = trained(head, tmp_path, 4, dtype, attributes=fixed)
    _, full = trained(head, tmp_path, 1, dtype)
    assert_same(found, full, dtype)


def test_accumulation_scales_as_the_trainers_own_loss_does(tmp_path) -> None:
    """Also where the Trainer is wrong: kappa is that of the loss which is minimised."""
    _, plain = trained("sequence", tmp_path, 4, trainer=Trainer)
    _, whole = trained("sequence", tmp_path, 1, trainer=Trainer)
    _, found = trained("sequence", tmp_path, 4)
    _, full = trained("sequence", tmp_path, 1)
    assert_same(
        [a - b for a, b in zip(found, plain, strict=True)], [4 * (a - b) for a, b in zip(full, whole, strict=True)]
    )


def test_loss_given_as_a_function(tmp_path) -> None:
    def loss_fn(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    _, found = trained("sequence", tmp_path, 4, compute_loss_func=loss_fn)
    assert_same(found, by_hand("sequence"))


def test_label_smoothing_is_read_from_the_graph(tmp_path) -> None:
    run, _ = trained("sequence", tmp_path, label_smoothing_factor=0.1)
    assert run.criterion.last["method"] == "closed_form"
    assert run.criterion.last["kappa"] > 0


def test_kappa_is_the_definition(tmp_path) -> None:
    """Against the dense Hessian of :mod:`relflat.reference`."""
    run, _ = trained("sequence", tmp_path)
    model, inputs = build("sequence"), batch("sequence")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids).logits

    loss, weight = reference.at_layer(
        Logits(), nn.CrossEntropyLoss(), inputs["input_ids"], inputs["labels"], "model.classifier"
    )
    kappa = reference.kappa(loss, weight)
    assert run.criterion.last["kappa"] == pytest.approx(float(kappa), rel=1e-9)


def test_hidden_layers_use_probes_of_the_right_loss(tmp_path) -> None:
    fam = {"layer": "bert.encoder.layer.0.output.dense", "strength": 0.5, "bound": None, "probes": 3, "seed": 5}
    run, found = trained("tokens", tmp_path, fam=fam, train_sampling_strategy="sequential")
    assert run.criterion.last["method"] == "probe(ggn, 3)"
    assert run.criterion.last["kappa"] > 0.01
    model, inputs = build("tokens").train(), batch("tokens")
    fam = FAM(nn.CrossEntropyLoss(), model, fam.pop("layer"), **fam)
    z = model(input_ids=inputs["input_ids"]).logits
    fam(z.movedim(-1, 1), inputs["labels"]).backward()
    assert_same(found, gradients(model))


def test_own_trainers_loss_is_regularised_as_it_is(tmp_path) -> None:
    class Doubled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"])
            loss = 2 * F.cross_entropy(outputs.logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    class Mine(FAMMixin, Doubled):
        pass

    run, found = trained("sequence", tmp_path, trainer=Mine)
    assert run.criterion.last["method"] == "closed_form"
    assert_same(found, [2 * g for g in by_hand("sequence")])


def test_a_loss_fused_with_the_head_names_the_way_out(tmp_path) -> None:
    class Fused(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(input_ids=inputs["input_ids"]).logits.square().square().mean()
            return (loss, {"loss": loss}) if return_outputs else loss

    class Mine(FAMMixin, Fused):
        pass

    with pytest.raises(GraphError, match=r"gave no logits.*compute_loss_func="):
        trained("sequence", tmp_path, trainer=Mine, fam={"layer": "*", "strength": 0.5})


def test_evaluation_saving_and_loading_are_untouched(tmp_path) -> None:
    run, _ = trained("sequence", tmp_path)
    plain = Trainer(run.model, arguments(tmp_path), eval_dataset=rows("sequence"))
    mine = run.evaluate(rows("sequence"))
    assert mine["eval_loss"] == plain.evaluate()["eval_loss"]
    run.save_model(str(tmp_path / "saved"))
    again = BertForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert set(again.state_dict()) == set(build("sequence").state_dict())
    for a, b in zip(again.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_share_of_the_penalty_is_logged(tmp_path) -> None:
    run, _ = trained("sequence", tmp_path, 4, logging_strategy="steps", logging_steps=1)
    share = next(line["fam_share"] for line in run.state.log_history if "loss" in line)
    fam = FAM(nn.CrossEntropyLoss(), model := build("sequence"), "output", strength=0.5)
    inputs = batch("sequence")
    fam(model.train()(input_ids=inputs["input_ids"]).logits, inputs["labels"])
    assert share == pytest.approx(fam.last["penalty"] / fam.last["total"], rel=1e-6)


def test_bf16(tmp_path) -> None:
    run, found = trained("sequence", tmp_path, dtype=torch.float32, bf16=True)
    assert run.criterion.last["method"] == "closed_form"
    for mine, other in zip(found, by_hand("sequence"), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0.1, atol=0.02)


def test_features_that_overflow_leave_the_penalty_out(tmp_path) -> None:
    model = build("sequence", torch.float32)
    with torch.no_grad():
        model.bert.pooler.dense.weight.mul_(1e30)  # tanh saturates
        model.classifier.weight.mul_(1e25)  # and kappa, of order the square, is infinite
    before = [p.detach().clone() for p in model.parameters()]
    args = arguments(tmp_path, learning_rate=1e-30)
    run = FAMTrainer(
        model, args, train_dataset=rows("sequence"), fam={"layer": "output", "strength": 0.5, "bound": None}
    )
    with pytest.warns(UserWarning, match="left out of this step"):
        run.train()
    assert run.criterion.last["skipped"] == 1
    for old, new in zip(before, model.parameters(), strict=True):
        assert bool(torch.isfinite(new).all()), (old, new)


def test_a_new_model_for_each_trial(tmp_path) -> None:
    keep = Keep()
    run = FAMTrainer(
        None, arguments(tmp_path), model_init=lambda: build("sequence"), train_dataset=rows("sequence"),
        callbacks=[keep], fam={"layer": "output", "strength": 0.5, "bound": None},
    )  # fmt: skip
    run.train()
    assert_same(keep.found, by_hand("sequence"))
    run.train()


class TestLora:
    @pytest.mark.parametrize("target", [["query", "value"], ["query", "classifier"]])
    def test_gradients(self, target, tmp_path) -> None:
        peft = pytest.importorskip("peft")

        def adapted() -> nn.Module:
            torch.manual_seed(3)
            task = None if "classifier" in target else "SEQ_CLS"
            config = peft.LoraConfig(task_type=task, r=2, target_modules=target, init_lora_weights=False)
            return peft.get_peft_model(build("sequence"), config).double()

        keep, model = Keep(), adapted()
        run = FAMTrainer(
            model, arguments(tmp_path), train_dataset=rows("sequence"), callbacks=[keep],
            fam={"layer": "output", "strength": 0.5, "bound": None},
        )  # fmt: skip
        run.train()
        assert run.criterion.last["method"] == "closed_form"
        assert "classifier" in run.criterion.layers[0]
        other, inputs = adapted().train(), batch("sequence")
        fam = FAM(None, other, run.criterion.layers[0], strength=0.5, curvature="hessian", method="exact")
        z = other(input_ids=inputs["input_ids"]).logits
        loss = F.cross_entropy(z, inputs["labels"]) + 0.0 * z.sum()
        (loss + fam.penalty(loss)).backward()
        assert_same(keep.found, gradients(other))


class TestBadInput:
    def trainer(self, folder, data=None, layer="output", head="sequence", **options):
        fam = {"layer": layer, "strength": 0.5, "bound": None} | options
        return FAMTrainer(build(head), arguments(folder), train_dataset=data or rows(head), fam=fam)

    def test_head_not_found(self, tmp_path) -> None:
        with pytest.raises(LayerError, match=r"'head'.*classifier"):
            self.trainer(tmp_path, layer="head")

    def test_labels_missing(self, tmp_path) -> None:
        data = [{"input_ids": row["input_ids"]} for row in rows("sequence")]
        with pytest.raises(LossError, match=r"no 'labels' \(it has \['input_ids'\]\)"):
            self.trainer(tmp_path, data).train()

    def test_radius(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match=r"FAMTrainer: radius=0.1"):
            self.trainer(tmp_path, radius=0.1)

    def test_incomplete_options(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match="name the layer"):
            FAMTrainer(build("sequence"), arguments(tmp_path), fam={"strength": 0.5})


class TestFlatnessCallback:
    @pytest.mark.parametrize("head", HEADS)
    def test_logs_what_relative_flatness_measures(self, head, tmp_path) -> None:
        args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, per_device_eval_batch_size=8)
        run = Trainer(build(head), args, train_dataset=rows(head), eval_dataset=rows(head))
        layer = next(n for n, m in run.model.named_modules() if m is list(run.model.modules())[-1])
        run.add_callback(FlatnessCallback(run, layer, every=2, method="exact" if "last" in head else "auto"))
        run.train()
        logged = [line for line in run.state.log_history if f"flatness/{layer}" in line]
        assert len(logged) == 1
        assert logged[0]["epoch"] == 2
        inputs = batch(head)
        loss_fn, *_ = rows_and_targets(head, torch.zeros(2, TOKENS, VOCAB), torch.zeros(2, TOKENS))

        def forward(model, everything):
            z = model(input_ids=everything["input_ids"]).logits
            return rows_and_targets(head, z, everything["labels"])[1:]

        flat = relative_flatness(run.model, loss_fn, inputs, layer=layer, forward=forward, method="exact")
        assert logged[0][f"flatness/{layer}"] == pytest.approx(flat.value, rel=1e-6)
        assert logged[0]["flatness/loss"] == pytest.approx(flat.loss, rel=1e-6)

    def test_no_data(self, tmp_path) -> None:
        run = Trainer(build("sequence"), arguments(tmp_path), train_dataset=rows("sequence"))
        run.add_callback(FlatnessCallback(run, "output"))
        with pytest.raises(DataError, match="data="):
            run.train()
