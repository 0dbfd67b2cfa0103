"""Text and speech models of transformers."""

from collections.abc import Callable
from typing import Any

import torch
from published import Batch, Published, View, at_right, cross_entropy, labels, stack, stack_at_right
from torch import nn

N, T, VOCABULARY = 2, 4, 10
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokens() -> Any:
    return torch.randint(3, VOCABULARY, (N, T))


def classified() -> Batch:
    return (), {"input_ids": tokens()}, labels(N)


def continued() -> Batch:
    return (), {"input_ids": tokens(), "use_cache": False}, tokens()


def tagged() -> Batch:
    return (), {"input_ids": tokens()}, labels(N, T)


def made(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A class of transformers of a configuration; imported when it is built."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


def case(
    model: str,
    output: str,
    hidden: str,
    batch: Callable[[], Batch] = continued,
    *,
    config: str | None = None,
    base: dict[str, Any] = BASE,
    without: tuple[str, ...] = (),
    besides: tuple[str, ...] = (),
    views: tuple[tuple[str, View], ...] = (),
    outputs: Callable[[Any], Any] = lambda returned: returned.logits,
    **options: Any,
) -> Published:
    config = config or model.split("For")[0].removesuffix("LMHeadModel") + "Config"
    given = {k: v for k, v in base.items() if k not in without} | options
    return Published(
        model,
        "transformers",
        made(model, config, **given),
        batch,
        output,
        hidden,
        cross_entropy,
        outputs,
        besides,
        views,
    )


CLASSES = {"num_labels": 3}
GROUPED = {"num_key_value_heads": 1}
LANGUAGE = [
    case(
        "BertForSequenceClassification",
        "classifier",
        "bert.encoder.layer.0.attention.self.query",
        classified,
        **CLASSES,
    ),
    case("BertForMaskedLM", "cls.predictions.decoder", "bert.encoder.layer.0.output.dense", tagged),
    case(
        "RobertaForTokenClassification",
        "classifier",
        "roberta.encoder.layer.0.attention.output.dense",
        tagged,
        **CLASSES,
    ),
    case(
        "DistilBertForSequenceClassification",
        "classifier",
        "distilbert.transformer.layer.0.ffn.lin1",
        classified,
        dim=8,
        hidden_dim=6,
        n_layers=1,
        n_heads=2,
        **CLASSES,
    ),
    case(
        "AlbertForSequenceClassification",
        "classifier",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",
        classified,
        embedding_size=4,
        num_hidden_layers=2,
        **CLASSES,
    ),
    case(
        "ElectraForSequenceClassification",
        "classifier.out_proj",
        "classifier.dense",
        classified,
        embedding_size=4,
        **CLASSES,
    ),
    case(
        "DebertaV2ForSequenceClassification",
        "classifier",
        "deberta.encoder.layer.0.attention.self.query_proj",
        classified,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=4,
        pooler_hidden_size=8,
        **CLASSES,
    ),
    case(
        "XLNetForSequenceClassification",
        "logits_proj",
        "transformer.layer.0.ff.layer_1",
        classified,
        config="XLNetConfig",
        base={},
        vocab_size=VOCABULARY,
        d_model=8,
        n_layer=1,
        n_head=2,
        d_inner=6,
        besides=("*_bias",),
        views=(("*.rel_attn.[qkvr]", at_right),),
        **CLASSES,
    ),
    case(
        "FNetForSequenceClassification",
        "classifier",
        "fnet.encoder.layer.0.intermediate.dense",
        classified,
        **CLASSES,
    ),
    case(
        "ConvBertForSequenceClassification",
        "classifier.out_proj",
        "convbert.encoder.layer.0.intermediate.dense",
        classified,
        embedding_size=8,
        head_ratio=1,
        conv_kernel_size=3,
        besides=("*.bias",),
        **CLASSES,
    ),
    case(
        "MobileBertForSequenceClassification",
        "classifier",
        "mobilebert.encoder.layer.0.intermediate.dense",
        classified,
        embedding_size=4,
        intra_bottleneck_size=4,
        num_feedforward_networks=1,
        true_hidden_size=4,
        **CLASSES,
    ),
    case(
        "ModernBertForSequenceClassification",
        "classifier",
        "model.layers.0.mlp.Wi",
        classified,
        **CLASSES,
        cls_token_id=1,
        sep_token_id=2,
    ),
    case(
        "GPT2LMHeadModel",
        "lm_head",
        "transformer.h.0.mlp.c_fc",
        base={},
        vocab_size=VOCABULARY,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_inner=6,
        bos_token_id=1,
        eos_token_id=2,
    ),
    case("GPTNeoXForCausalLM", "lm_head", "gpt_neox.layers.0.attention.query_key_value"),
    case("OPTForCausalLM", "lm_head", "model.decoder.layers.0.fc1", ffn_dim=6, word_embed_proj_dim=4),
    case("BloomForCausalLM", "lm_head", "transformer.h.0.self_attention.query_key_value", n_layer=1, n_head=2),
    case("FalconForCausalLM", "lm_head", "transformer.h.0.mlp.dense_h_to_4h", alibi=False),
    case("LlamaForCausalLM", "lm_head", "model.layers.0.mlp.down_proj", **GROUPED),
    case("MistralForCausalLM", "lm_head", "model.layers.0.self_attn.v_proj", sliding_window=2, **GROUPED),
    case("Qwen3ForCausalLM", "lm_head", "model.layers.0.self_attn.k_proj", head_dim=4, **GROUPED),
    case("Gemma2ForCausalLM", "lm_head", "model.layers.0.mlp.gate_proj", head_dim=4, **GROUPED),
    case("PhiForCausalLM", "lm_head", "model.layers.0.mlp.fc1"),
    case(
        "MixtralForCausalLM",
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        num_local_experts=3,
        num_experts_per_tok=2,
        views=(("*.experts.*", stack),),
        experts_implementation="eager",
        **GROUPED,
    ),
    case(
        "Qwen3MoeForCausalLM",
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=4,
        head_dim=4,
        views=(("*.experts.*", stack),),
        experts_implementation="eager",
        **GROUPED,
    ),
    case(
        "GptOssForCausalLM",
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        num_local_experts=3,
        num_experts_per_tok=2,
        head_dim=4,
        views=(("*.experts.*_proj", stack_at_right),),
        besides=("*.experts.*_bias",),
        experts_implementation="eager",
        **GROUPED,
    ),
    case(
        "DeepseekV3ForCausalLM",
        "lm_head",
        "model.layers.0.self_attn.kv_b_proj",
        q_lora_rank=4,
        kv_lora_rank=4,
        qk_rope_head_dim=2,
        qk_nope_head_dim=4,
        v_head_dim=4,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_group=2,
        num_key_value_heads=2,
        experts_implementation="eager",
        views=(("*.experts.*", stack),),
    ),
    case(
        "MambaForCausalLM",
        "lm_head",
        "backbone.layers.0.mixer.out_proj",
        state_size=2,
        time_step_rank=2,
        besides=("*.A_log",),
    ),
    case(
        "Mamba2ForCausalLM",
        "lm_head",
        "backbone.layers.0.mixer.out_proj",
        state_size=2,
        num_heads=4,
        head_dim=4,
        n_groups=1,
        chunk_size=2,
    ),
    case(
        "RwkvForCausalLM",
        "head",
        "rwkv.blocks.0.feed_forward.key",
        attention_hidden_size=8,
        num_hidden_layers=2,
        context_length=8,
        besides=("*.time_mix_*",),
    ),
    case(
        "RecurrentGemmaForCausalLM",
        "lm_head",
        "model.layers.0.mlp_block.up_proj",
        lru_width=8,
        head_dim=4,
        num_key_value_heads=1,
        attention_window_size=4,
        besides=("*_gate_bias",),
        views=(("*_gate_weight", stack_at_right),),
    ),
]
