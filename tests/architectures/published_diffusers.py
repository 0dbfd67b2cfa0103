"""Models of diffusers: denoisers and autoencoders."""

from collections.abc import Callable
from typing import Any

import torch
from published import Batch, Published, View, picture, squared_error
from torch import Tensor, nn

N = 2
NORM = {"norm_num_groups": 1}


def drawn(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=torch.float64)


def times() -> Tensor:
    return torch.tensor([3, 7])


def built(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**options)

    return build


def case(
    name: str,
    output: str,
    hidden: str,
    batch: Callable[[], Batch],
    *,
    besides: tuple[str, ...] = (),
    views: tuple[tuple[str, View], ...] = (),
    outputs: Callable[[Any], Any] = lambda returned: returned.sample,
    **options: Any,
) -> Published:
    return Published(
        name, "diffusers", built(name, **options), batch, output, hidden, squared_error, outputs, besides, views
    )


def denoised(*more: Any, channels: int = 2, size: int = 8) -> Callable[[], Batch]:
    return lambda: ((picture(N, channels, size), times()), {}, picture(N, channels, size))


DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
DIFFUSERS = [
    case(
        "UNet2DModel",
        "conv_out",
        "mid_block.attentions.0.to_k",
        denoised(size=2),
        sample_size=2,
        in_channels=2,
        out_channels=2,
        block_out_channels=(2,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        attention_head_dim=1,
        **NORM,
    ),
    case(
        "UNet2DConditionModel",
        "conv_out",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        lambda: ((picture(N, 2, 2), times(), drawn(3, 4)), {}, picture(N, 2, 2)),
        sample_size=2,
        in_channels=2,
        out_channels=2,
        block_out_channels=(2,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=4,
        attention_head_dim=1,
        **NORM,
    ),
    case(
        "AutoencoderKL",
        "decoder.conv_out",
        "quant_conv",
        lambda: ((picture(N, 2, 2),), {}, picture(N, 2, 2)),
        in_channels=2,
        out_channels=2,
        block_out_channels=(2,),
        latent_channels=2,
        layers_per_block=1,
        **NORM,
    ),
    case(
        "Transformer2DModel",
        "proj_out",
        "transformer_blocks.0.attn1.to_q",
        lambda: ((picture(N, 4, 2), drawn(3, 4)), {}, picture(N, 4, 2)),
        in_channels=4,
        num_attention_heads=2,
        attention_head_dim=2,
        cross_attention_dim=4,
        norm_num_groups=2,
        num_layers=1,
    ),
    case(
        "DiTTransformer2DModel",
        "proj_out_2",
        "transformer_blocks.0.ff.net.0.proj",
        lambda: ((picture(N, 2, 4), times(), torch.tensor([0, 1])), {}, picture(N, 2, 4)),
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=4,
        norm_num_groups=2,
    ),
    case(
        "SD3Transformer2DModel",
        "proj_out",
        "transformer_blocks.0.attn.add_q_proj",
        lambda: ((picture(N, 2, 4), drawn(3, 4), drawn(5), times()), {}, picture(N, 2, 4)),
        sample_size=4,
        patch_size=2,
        in_channels=2,
        out_channels=2,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=4,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        pos_embed_max_size=4,
    ),
    case(
        "FluxTransformer2DModel",
        "proj_out",
        "single_transformer_blocks.0.proj_mlp",
        lambda: (
            (),
            {
                "hidden_states": drawn(4, 4),
                "encoder_hidden_states": drawn(3, 5),
                "pooled_projections": drawn(5),
                "timestep": drawn().sigmoid(),
                "img_ids": torch.zeros(4, 3),
                "txt_ids": torch.zeros(3, 3),
            },
            drawn(4, 4),
        ),
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=5,
        pooled_projection_dim=5,
        axes_dims_rope=(4, 2, 2),
    ),
    case(
        "PriorTransformer",
        "proj_to_clip_embeddings",
        "transformer_blocks.0.attn1.to_v",
        lambda: ((drawn(6), times()), {"proj_embedding": drawn(6), "encoder_hidden_states": drawn(3, 6)}, drawn(6)),
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        embedding_dim=6,
        num_embeddings=3,
        additional_embeddings=4,
        outputs=lambda returned: returned.predicted_image_embedding,
        besides=("positional_embedding", "prd_embedding"),
    ),
]
