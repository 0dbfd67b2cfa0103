"""Models of pictures, of transformers."""

from collections.abc import Callable
from typing import Any

import torch
from published import Batch, Published, View, cross_entropy, labels, logits, picture
from published_language import made

N = 2
CLASSES = {"num_labels": 3}
SQUARE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6, "image_size": 8}
SQUARE |= {"patch_size": 4}
EMBEDDED = (
    "*cls_token",
    "*position_embeddings",
    "*mask_token",
    "*distillation_token",
    "*.grn.weight",
    "*.grn.bias",
    "*relative_position_bias_table",
)


def seen(size: int = 8) -> Callable[[], Batch]:
    return lambda: ((), {"pixel_values": picture(N, size=size)}, labels(N))


def case(
    model: str,
    output: str,
    hidden: str,
    batch: Callable[[], Batch] | None = None,
    *,
    size: int = 8,
    besides: tuple[str, ...] = (),
    views: tuple[tuple[str, View], ...] = (),
    outputs: Callable[[Any], Any] = logits,
    **options: Any,
) -> Published:
    config = model.rpartition("For")[0] + "Config"
    return Published(
        model,
        "transformers",
        made(model, config, **CLASSES, **options),
        batch or seen(size),
        output,
        hidden,
        cross_entropy,
        outputs,
        EMBEDDED + besides,
        views,
    )


def segmented(size: int = 16, scale: int = 4) -> Callable[[], Batch]:
    return lambda: ((), {"pixel_values": picture(N, size=size)}, labels(N, size // scale, size // scale))


def detr() -> Any:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            backbone_config=backbone,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=6,
            decoder_ffn_dim=6,
            num_queries=3,
            num_labels=2,
        )
    )


VISION = [
    case("ViTForImageClassification", "classifier", "vit.layers.0.attention.k_proj", **SQUARE),
    case("DeiTForImageClassification", "classifier", "deit.layers.0.mlp.fc1", **SQUARE),
    case(
        "BeitForImageClassification",
        "classifier",
        "beit.layers.0.attention.v_proj",
        use_relative_position_bias=True,
        besides=("*lambda_*",),
        **SQUARE,
    ),
    case("Dinov2ForImageClassification", "classifier", "dinov2.encoder.layer.0.mlp.fc1", mlp_ratio=1, **SQUARE),
    case(
        "SwinForImageClassification",
        "classifier",
        "swin.encoder.layers.0.blocks.0.attention.q_proj",
        size=8,
        image_size=8,
        patch_size=2,
        embed_dim=4,
        depths=[2],
        num_heads=[2],
        window_size=2,
        mlp_ratio=1.0,
    ),
    case(
        "ConvNextForImageClassification",
        "classifier",
        "convnext.encoder.stages.0.layers.0.dwconv",
        size=16,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        num_stages=2,
        patch_size=4,
    ),
    case(
        "ConvNextV2ForImageClassification",
        "classifier",
        "convnextv2.encoder.stages.0.layers.0.pwconv1",
        size=16,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        num_stages=2,
        patch_size=4,
    ),
    case(
        "ResNetForImageClassification",
        "classifier.1",
        "resnet.encoder.stages.0.layers.0.layer.0.convolution",
        size=16,
        embedding_size=4,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        layer_type="basic",
    ),
    case(
        "RegNetForImageClassification",
        "classifier.1",
        "regnet.encoder.stages.0.layers.0.layer.0.convolution",
        size=16,
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        groups_width=4,
    ),
    case(
        "PoolFormerForImageClassification",
        "classifier",
        "poolformer.encoder.block.0.0.output.conv1",
        size=16,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        num_encoder_blocks=2,
        patch_sizes=[3, 3],
        strides=[2, 2],
        padding=[1, 1],
        mlp_ratio=1.0,
    ),
    case(
        "CvtForImageClassification",
        "classifier",
        "cvt.encoder.stages.0.layers.0.attention.attention.projection_query",
        size=16,
        embed_dim=[4],
        num_heads=[2],
        depth=[1],
        patch_sizes=[4],
        patch_stride=[4],
        patch_padding=[0],
        mlp_ratio=[1.0],
        attention_drop_rate=[0.0],
        drop_rate=[0.0],
        drop_path_rate=[0.0],
        qkv_bias=[True],
        cls_token=[True],
        qkv_projection_method=["dw_bn"],
        kernel_qkv=[3],
        padding_kv=[1],
        stride_kv=[2],
        padding_q=[1],
        stride_q=[1],
    ),
    case(
        "FocalNetForImageClassification",
        "classifier",
        "focalnet.encoder.stages.0.layers.0.modulation.projection_in",
        size=8,
        image_size=8,
        patch_size=2,
        embed_dim=4,
        hidden_sizes=[4],
        depths=[1],
        focal_levels=[2],
        focal_windows=[3],
        mlp_ratio=1.0,
    ),
    case(
        "PvtForImageClassification",
        "classifier",
        "pvt.encoder.block.0.0.mlp.dense1",
        size=16,
        image_size=16,
        num_encoder_blocks=2,
        depths=[1, 1],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[4, 4],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[1, 1],
    ),
    case(
        "SegformerForSemanticSegmentation",
        "decode_head.classifier",
        "segformer.stages.0.blocks.0.attention.q_proj",
        segmented(16, 4),
        outputs=lambda returned: returned.logits.movedim(1, -1),
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[4, 4],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[1, 1],
        decoder_hidden_size=4,
    ),
    case(
        "VideoMAEForVideoClassification",
        "classifier",
        "videomae.encoder.layer.0.output.dense",
        lambda: ((), {"pixel_values": torch.randn(N, 2, 3, 8, 8, dtype=torch.float64)}, labels(N)),
        num_frames=2,
        tubelet_size=2,
        **SQUARE,
    ),
    Published(
        "DetrForObjectDetection",
        "transformers",
        detr,
        lambda: ((), {"pixel_values": picture(N, size=16)}, labels(N, 3)),
        "class_labels_classifier",
        "model.decoder.layers.0.encoder_attn.q_proj",
        cross_entropy,
        logits,
        besides=("*query_position_embeddings.weight",),
    ),
]
