"""Models of timm, torchvision and segmentation-models-pytorch, which need an environment of their own."""

import importlib
from collections.abc import Callable
from typing import Any

from published import Batch, Published, View, cross_entropy, labels, picture
from torch import nn

N = 2
IMAGES = {"num_classes": 3}
ADDED = (
    "*cls_token",
    "*pos_embed*",
    "*position_embedding*",
    "*class_token",
    "*relative_position_bias_table",
    "*dist_token",
)


def seen(size: int, n: int = N) -> Callable[[], Batch]:
    return lambda: ((picture(n, 3, size),), {}, labels(n))


def whole(returned: Any) -> Any:
    return returned


def pixels(returned: Any) -> Any:
    """Classes last."""
    return (returned["out"] if isinstance(returned, dict) else returned).movedim(1, -1)


def case(
    library: str,
    name: str,
    build: Callable[[], nn.Module],
    output: str,
    hidden: str,
    size: int = 8,
    *,
    batch: Callable[[], Batch] | None = None,
    outputs: Callable[[Any], Any] = whole,
    besides: tuple[str, ...] = (),
    views: tuple[tuple[str, View], ...] = (),
    unsure: bool = False,
) -> Published:
    given = batch or seen(size)
    return Published(
        name, library, build, given, output, hidden, cross_entropy, outputs, ADDED + besides, views, unsure
    )


def timm(
    name: str,
    output: str,
    hidden: str,
    size: int = 8,
    besides: tuple[str, ...] = (),
    unsure: bool = False,
    **options: Any,
) -> Published:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **IMAGES, **options)

    return case("timm", name, build, output, hidden, size, besides=besides, unsure=unsure)


def timm_class(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    """A class of timm.models, for configurations that ``create_model`` does not take."""

    def build() -> nn.Module:
        found = importlib.import_module(f"timm.models.{module}")
        given = {k: getattr(found, v.removeprefix("@")) if str(v).startswith("@") else v for k, v in options.items()}
        return getattr(found, name)(**IMAGES, **given)

    return build


def timm_efficientnet() -> Any:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    blocks = decode_arch_def([["ds_r1_k3_s1_e1_c4_se0.25"], ["ir_r1_k3_s2_e2_c4_se0.25"]])
    return EfficientNet(blocks, num_classes=3, num_features=6, stem_size=4, fix_stem=True)


def timm_nfnet() -> Any:
    from timm.models.nfnet import NfCfg, NormFreeNet

    return NormFreeNet(
        NfCfg(
            depths=(1, 1),
            channels=(4, 8),
            stem_type="3x3",
            stem_chs=4,
            group_size=2,
            bottle_ratio=0.5,
            num_features=6,
        ),
        num_classes=3,
    )


TRANSFORMER = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1}
WINDOWS = {
    "img_size": 8,
    "patch_size": 2,
    "window_size": 2,
    "embed_dim": 4,
    "depths": (2,),
    "num_heads": (2,),
    "mlp_ratio": 1,
}
MIXER = {"img_size": 8, "patch_size": 4, "num_blocks": 1, "embed_dim": 8}
FOUR = {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)}

TIMM = [
    timm("vit_tiny_patch16_224", "head", "blocks.0.attn.qkv", **TRANSFORMER),
    timm("deit_tiny_distilled_patch16_224", "head", "blocks.0.mlp.fc1", unsure=True, **TRANSFORMER),
    timm("beit_base_patch16_224", "head", "blocks.0.mlp.fc2", besides=("*.gamma_*",), **TRANSFORMER),
    timm("eva02_tiny_patch14_224", "head", "blocks.0.attn.proj", **TRANSFORMER),
    timm("cait_xxs24_224", "head", "blocks.0.attn.proj_l", depth_token_only=1, **TRANSFORMER),
    timm("swin_tiny_patch4_window7_224", "head.fc", "layers.0.blocks.0.mlp.fc1", **WINDOWS),
    timm("swinv2_tiny_window8_256", "head.fc", "layers.0.blocks.0.mlp.fc1", besides=("*.logit_scale",), **WINDOWS),
    timm("convnext_atto", "head.fc", "stages.0.blocks.0.mlp.fc1", 32, **FOUR),
    timm("convnextv2_atto", "head.fc", "stages.0.blocks.0.mlp.fc2", 32, **FOUR),
    case("timm", "mlp_mixer", timm_class("mlp_mixer", "MlpMixer", **MIXER), "head", "blocks.0.mlp_tokens.fc1"),
    case(
        "timm",
        "resmlp",
        timm_class("mlp_mixer", "MlpMixer", block_layer="@ResBlock", norm_layer="@Affine", mlp_ratio=2, **MIXER),
        "head",
        "blocks.0.mlp_channels.fc1",
        besides=("*.alpha", "*.beta"),
    ),
    case(
        "timm",
        "gmlp",
        timm_class(
            "mlp_mixer", "MlpMixer", block_layer="@SpatialGatingBlock", mlp_layer="@GatedMlp", mlp_ratio=2, **MIXER
        ),
        "head",
        "blocks.0.mlp_channels.fc2",
    ),
    case(
        "timm",
        "convmixer",
        timm_class("convmixer", "ConvMixer", dim=4, depth=1, kernel_size=3, patch_size=2),
        "head",
        "blocks.0.1",
    ),
    case(
        "timm",
        "poolformer",
        timm_class("metaformer", "MetaFormer", token_mixers="@Pooling", **FOUR),
        "head.fc.fc2",
        "stages.0.blocks.0.mlp.fc1",
        32,
    ),
    timm(
        "pvt_v2_b0",
        "head",
        "stages.0.blocks.0.attn.q",
        32,
        depths=(1, 1, 1, 1),
        embed_dims=(4, 4, 4, 4),
        num_heads=(1, 1, 1, 1),
        mlp_ratios=(1, 1, 1, 1),
    ),
    case(
        "timm",
        "resnet",
        timm_class("resnet", "ResNet", block="@BasicBlock", layers=(1, 1, 1, 1), channels=(4, 4, 4, 4), stem_width=4),
        "fc",
        "layer2.0.downsample.0",
        16,
    ),
    case("timm", "efficientnet", timm_efficientnet, "classifier", "blocks.1.0.conv_pw", 16),
    case("timm", "nfnet (scaled std conv)", timm_nfnet, "head.fc", "stages.0.0.conv1", 16, besides=("*.gain",)),
]


def torchvision(
    build: Callable[[Any], Any], name: str, output: str, hidden: str, size: int = 16, **more: Any
) -> Published:
    def made() -> Any:
        import torchvision

        return build(torchvision.models)

    return case("torchvision", name, made, output, hidden, size, **more)


def mobilenet(m: Any) -> Any:
    return m.MobileNetV2(num_classes=3, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 1, 2]], width_mult=0.25)


def mobilenet_v3(m: Any) -> Any:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    setting = [InvertedResidualConfig(8, 3, 8, 8, True, "HS", 2, 1, 1.0)]
    return MobileNetV3(setting, last_channel=8, num_classes=3)


def segmentation(m: Any) -> Any:
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    body = nn.Sequential()
    body.add_module("one", nn.Conv2d(3, 8, 1, stride=2))
    backbone = m._utils.IntermediateLayerGetter(body, {"one": "out"})
    return FCN(backbone, FCNHead(8, 3))


def labelled(size: int) -> Callable[[], Batch]:
    return lambda: ((picture(N, 3, size),), {}, labels(N, size, size))


def efficientnet(m: Any) -> Any:
    from torchvision.models.efficientnet import MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 4, 4, 1, 1.0, 1.0), MBConvConfig(2, 3, 2, 4, 4, 1, 1.0, 1.0)]
    return m.EfficientNet(blocks, dropout=0.0, num_classes=3)


TORCHVISION = [
    torchvision(
        lambda m: m.DenseNet(growth_rate=2, block_config=(1, 1), num_init_features=4, bn_size=1, num_classes=3),
        "densenet",
        "classifier",
        "features.denseblock1.denselayer1.conv1",
        32,
    ),
    torchvision(mobilenet, "mobilenet_v2", "classifier.1", "features.1.conv.1"),
    torchvision(mobilenet_v3, "mobilenet_v3", "classifier.3", "classifier.0"),
    torchvision(
        lambda m: m.ShuffleNetV2([1, 1, 1], [4, 8, 8, 8, 8], num_classes=3),
        "shufflenet_v2",
        "fc",
        "stage2.0.branch1.2",
        32,
    ),
    torchvision(lambda m: m.MNASNet(0.05, num_classes=3), "mnasnet", "classifier.1", "layers.6", 32),
    torchvision(
        lambda m: m.VisionTransformer(8, 4, 1, 2, 8, 6, num_classes=3),
        "vit",
        "heads.head",
        "encoder.layers.encoder_layer_0.mlp.0",
        8,
    ),
    torchvision(
        lambda m: m.SwinTransformer([2, 2], 4, [2], [2], [2, 2], mlp_ratio=1.0, num_classes=3),
        "swin",
        "head",
        "features.1.0.mlp.0",
        8,
    ),
    torchvision(
        lambda m: m.convnext.ConvNeXt(
            [m.convnext.CNBlockConfig(4, 6, 1), m.convnext.CNBlockConfig(6, None, 1)], num_classes=3
        ),
        "convnext",
        "classifier.2",
        "features.1.0.block.3",
        besides=("*.layer_scale",),
    ),
    torchvision(
        lambda m: m.RegNet(
            m.regnet.BlockParams([1, 1], [4, 8], [4, 4], [1, 1], [2, 2], se_ratio=0.25), num_classes=3, stem_width=4
        ),
        "regnet",
        "fc",
        "trunk_output.block1.block1-0.f.se.fc1",
    ),
    torchvision(efficientnet, "efficientnet", "classifier.1", "features.1.0.block.1.fc1"),
    torchvision(segmentation, "fcn", "classifier.4", "backbone.one", batch=labelled(6), outputs=pixels),
]


def smp(name: str, output: str, hidden: str, **options: Any) -> Published:
    def build() -> Any:
        import segmentation_models_pytorch as models

        return getattr(models, name)("tu-test_resnet", encoder_weights=None, classes=3, **options)

    return case("segmentation-models-pytorch", name, build, output, hidden, batch=labelled(32), outputs=pixels)


SMP = [
    smp("Unet", "segmentation_head.0", "decoder.blocks.1.conv2.0", encoder_depth=3, decoder_channels=(4, 4, 4)),
    smp(
        "FPN",
        "segmentation_head.0",
        "decoder.seg_blocks.0.block.0.block.0",
        decoder_pyramid_channels=4,
        decoder_segmentation_channels=32,
    ),
    smp("Linknet", "segmentation_head.0", "decoder.blocks.4.block.0.0", decoder_use_norm="batchnorm"),
    smp("PSPNet", "segmentation_head.0", "decoder.psp.blocks.0.pool.1.0", psp_out_channels=4),
    smp(
        "UnetPlusPlus",
        "segmentation_head.0",
        "decoder.blocks.x_0_2.conv2.0",
        encoder_depth=3,
        decoder_channels=(4, 4, 4),
    ),
    smp(
        "DeepLabV3Plus", "segmentation_head.0", "decoder.block1.0", decoder_channels=4, decoder_atrous_rates=(1, 2, 3)
    ),
]
