"""Encoders with decoders, and models of speech, of transformers."""

import torch
from published import Batch, labels
from published_language import BASE, CLASSES, VOCABULARY, N, case, tokens


def translated() -> Batch:
    return (), {"input_ids": tokens(), "decoder_input_ids": tokens()}, tokens()


def heard() -> Batch:
    return (), {"input_values": torch.randn(N, 40, dtype=torch.float64)}, labels(N)


T5 = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 6, "num_layers": 1, "num_heads": 2}
T5 |= {"relative_attention_num_buckets": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "max_position_embeddings": 8,
}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 6, "decoder_ffn_dim": 6}
WHISPER = BART | {
    "num_mel_bins": 4,
    "max_source_positions": 5,
    "max_target_positions": 8,
    "decoder_start_token_id": 1,
}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WAV2VEC = {k: v for k, v in BASE.items() if k != "max_position_embeddings"} | {
    "conv_dim": (4, 4),
    "conv_kernel": (4, 3),
    "conv_stride": (4, 2),
    "num_conv_pos_embeddings": 2,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 6,
    "mask_time_prob": 0.0,
    "num_feat_extract_layers": 2,
}

SEQUENCES = [
    case("T5ForConditionalGeneration", "lm_head", "encoder.block.0.layer.1.DenseReluDense.wi", translated, base=T5),
    case(
        "BartForConditionalGeneration",
        "lm_head",
        "model.decoder.layers.0.encoder_attn.q_proj",
        translated,
        base=BART,
        decoder_start_token_id=2,
    ),
    case(
        "SwitchTransformersForConditionalGeneration",
        "lm_head",
        "decoder.block.0.layer.2.mlp.router.classifier",
        translated,
        base=T5,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=2,
        expert_capacity=8,
        num_decoder_layers=1,
    ),
    case(
        "Wav2Vec2ForSequenceClassification",
        "classifier",
        "wav2vec2.encoder.layers.0.attention.k_proj",
        heard,
        base=WAV2VEC,
        **CLASSES,
    ),
    case(
        "WhisperForConditionalGeneration",
        "proj_out",
        "model.encoder.conv1",
        lambda: (
            (),
            {"input_features": torch.randn(N, 4, 10, dtype=torch.float64), "decoder_input_ids": tokens()},
            tokens(),
        ),
        base=WHISPER,
    ),
]
