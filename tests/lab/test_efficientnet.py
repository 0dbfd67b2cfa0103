import pytest
import torch
from torch.nn import functional

from fetched import have
from relflat.errors import DataError
from relflat.lab.data.fetch import files
from relflat.lab.data.sources import SOURCES
from relflat.lab.tasks import efficientnet
from relflat.lab.tasks.efficientnet import WEIGHTS, EfficientNetLite0, SameConv2d, load_pretrained


def packaged(model: EfficientNetLite0) -> dict[str, torch.Tensor]:
    """The network's weights in their order under other names, as in the package."""
    return {f"_{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("size", [5, 6, 7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, 1), (1, 1)])
def test_padding_is_tensorflows(size, kernel, stride):
    """Output k looks at k * stride - before onwards, where before is half of what is missing, rounded down."""
    layer = SameConv2d(1, 1, kernel, stride, bias=False).double()
    x = torch.randn(1, 1, size, size, dtype=torch.float64)
    sides = -(-size // stride)
    before = max((sides - 1) * stride + kernel - size, 0) // 2
    wide = functional.pad(x, (before, kernel, before, kernel))[0, 0]
    expected = torch.stack(
        [
            (wide[i * stride : i * stride + kernel, j * stride : j * stride + kernel] * layer.weight[0, 0]).sum()
            for i in range(sides)
            for j in range(sides)
        ]
    )
    assert torch.allclose(layer(x).flatten(), expected)


def test_the_published_number_of_parameters():
    assert sum(p.numel() for p in EfficientNetLite0().parameters()) == 4_652_008


def test_pictures_are_scaled_and_resized():
    model = EfficientNetLite0(3, side=32).eval()
    seen = []
    model.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.full((1, 3, 20, 20), 127 / 255))
    model(torch.ones(1, 3, 20, 20))
    assert seen[0].shape == (1, 3, 32, 32)
    assert seen[0].abs().max() < 1e-5
    assert torch.allclose(seen[1], torch.ones(()))


def test_weights_go_where_they_belong(tmp_path):
    torch.manual_seed(0)
    source, target = EfficientNetLite0().eval(), EfficientNetLite0().eval()
    torch.save(packaged(source), tmp_path / "w.pth")
    load_pretrained(target, tmp_path / "w.pth")
    pictures = torch.rand(2, 3, 32, 32)
    assert not torch.equal(source(pictures), target(pictures))  # the output layer is new
    load_pretrained(target, tmp_path / "w.pth", output=True)
    assert torch.equal(source(pictures), target(pictures))


@pytest.mark.parametrize("change", ["lost", "added", "reshaped", "not weights"])
def test_other_weights_are_refused(tmp_path, monkeypatch, change):
    source = SOURCES["efficientnet-lite0"]
    path = tmp_path / source.folder_name / source.folder / WEIGHTS
    path.parent.mkdir(parents=True)
    monkeypatch.setenv("RELFLAT_CACHE", str(tmp_path))
    weights = packaged(EfficientNetLite0())
    if change == "lost":
        del weights["_blocks.3.depthwise.1.running_var"]
    if change == "added":
        weights["_blocks.16.depthwise.1.bias"] = torch.zeros(1)
    if change == "reshaped":
        weights["_head.0.weight"] = torch.zeros(1280, 1280, 1, 1)
    torch.save(weights, path)
    if change == "not weights":
        path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="relflat data get efficientnet-lite0"):
        efficientnet.efficientnet_lite0()


@pytest.mark.data
def test_pretrained_weights_know_a_palace():
    """scikit-learn's photograph of the Summer Palace: ImageNet's class 698 is "palace"."""
    from sklearn.datasets import load_sample_image

    have("efficientnet-lite0")
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    cut = (photo.shape[-1] - photo.shape[-2]) // 2
    model = EfficientNetLite0(side=224).eval()
    path = files("efficientnet-lite0") / WEIGHTS
    load_pretrained(model, path, output=True)
    assert model(photo[..., cut:-cut]).argmax() == 698
    assert efficientnet.efficientnet_lite0(10).output.out_features == 10
