"""LoRA adapters with dropout."""

import copy

import pytest
import torch
from torch import nn

from relflat import LayerError, RelflatWarning, relative_flatness
from unbounded import FAM


def test_lora_with_active_dropout_is_refused_and_its_factor_is_not() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))

    def adapted(dropout: float) -> nn.Module:
        config = peft.LoraConfig(r=2, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
        return peft.get_peft_model(copy.deepcopy(base), config)

    net, name = adapted(0.5), "base_model.model.0"
    with pytest.raises(LayerError, match=r"adapter 'default' of layer '.*0' has active dropout"):
        FAM(nn.CrossEntropyLoss(), net, name, strength=0.1)(net(x), y)
    factor = FAM(nn.CrossEntropyLoss(), net, f"{name}.lora_B.default", strength=0.1)
    factor(net(x), y).backward()
    assert factor.last["kappa"] > 0
    assert relative_flatness(net, nn.CrossEntropyLoss(), (x, y), layer=name).value != 0  # not active here
    plain = adapted(0.0)
    FAM(nn.CrossEntropyLoss(), plain, name, strength=0.1)(plain(x), y).backward()


def test_a_layer_with_adalora_is_not_taken_for_one_with_lora() -> None:
    """It has three factors in place of two; its base is a layer by itself."""
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    net = peft.get_peft_model(net, peft.AdaLoraConfig(r=2, target_modules=["0"], total_step=10))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    with pytest.warns(RelflatWarning, match="left out"):
        (fam := FAM(nn.CrossEntropyLoss(), net))(net(x), y).backward()
    assert {"base_model.model.0.base_layer", "base_model.model.2"} <= set(fam.layers)
