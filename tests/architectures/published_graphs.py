"""Models of PyTorch Geometric: vertices classified, graphs regressed."""

from collections.abc import Callable
from typing import Any

import torch
from published import Batch, Published, cross_entropy, labels
from torch import Tensor, nn

V, IN, HIDDEN = 6, 4, 5


def edges() -> Tensor:
    ring = torch.arange(V)
    one = torch.stack([ring, (ring + 1) % V])
    more = torch.tensor([[0, 2, 1], [3, 5, 4]])
    half = torch.cat([one, more], 1)
    return torch.cat([half, half.flip(0)], 1)


def whole(returned: Any) -> Any:
    return returned


def vertices() -> Batch:
    return (torch.randn(V, IN, dtype=torch.float64), edges()), {}, labels(V)


def built(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torch_geometric.nn import models

        return getattr(models, name)(**options)

    return build


def case(name: str, output: str, hidden: str, batch: Callable[[], Batch] = vertices, **options: Any) -> Published:
    besides = options.pop("besides", ())
    unsure, name_of = options.pop("unsure", False), options.pop("called", name)
    build = built(name, **options)
    return Published(
        name_of, "torch_geometric", build, batch, output, hidden, cross_entropy, whole, besides, (), unsure
    )


SIZES = {"in_channels": IN, "hidden_channels": HIDDEN, "num_layers": 2, "out_channels": 3}


class Stack(nn.Module):
    """Two layers of a class of torch_geometric.nn."""

    def __init__(self, layer: str, *args: Any, **options: Any) -> None:
        super().__init__()
        from torch_geometric import nn as gnn

        kind = getattr(gnn, layer)
        self.first, self.second = kind(IN, HIDDEN, *args, **options), kind(HIDDEN, 3, *args, **options)

    def forward(self, x: Tensor, edge_index: Tensor, *more: Any) -> Tensor:
        return self.second(self.first(x, edge_index, *more).tanh(), edge_index, *more)


def stacked(layer: str, output: str, hidden: str, **options: Any) -> Published:
    build = lambda: Stack(layer, **options)
    return Published(layer, "torch_geometric", build, vertices, output, hidden, cross_entropy, whole, unsure=True)


GRAPHS = [
    case("GCN", "convs.1.lin", "convs.0.lin", unsure=True, **SIZES),
    case("GraphSAGE", "convs.1.lin_r", "convs.0.lin_l", unsure=True, **SIZES),
    case("GIN", "convs.1.nn.lins.1", "convs.0.nn.lins.0", **SIZES),
    case("GAT", "convs.1.lin", "convs.0.lin", heads=1, unsure=True, besides=("*.att_src", "*.att_dst"), **SIZES),
    case(
        "GAT",
        "convs.1.lin_l",
        "convs.0.lin_r",
        v2=True,
        called="GATv2",
        heads=1,
        unsure=True,
        besides=("*.att",),
        **SIZES,
    ),
    case(
        "PNA",
        "convs.1.lin",
        "convs.0.pre_nns.0.0",
        aggregators=["mean", "max"],
        scalers=["identity"],
        deg=torch.tensor([0, 2, 4]),
        **SIZES,
    ),
    case("EdgeCNN", "convs.1.nn.lins.1", "convs.0.nn.lins.0", **SIZES),
    case(
        "GraphUNet",
        "up_convs.0.lin",
        "down_convs.0.lin",
        in_channels=IN,
        hidden_channels=HIDDEN,
        out_channels=3,
        depth=1,
        unsure=True,
        besides=("pools.*",),
    ),
    case(
        "LINKX",
        "final_mlp.lins.0",
        "node_mlp.lins.0",
        besides=("edge_lin.weight",),
        num_nodes=V,
        in_channels=IN,
        hidden_channels=HIDDEN,
        out_channels=3,
        num_layers=1,
    ),
    case(
        "MLP",
        "lins.1",
        "lins.0",
        lambda: ((torch.randn(V, IN, dtype=torch.float64),), {}, labels(V)),
        channel_list=[IN, HIDDEN, 3],
    ),
    stacked("TransformerConv", "second.lin_value", "first.lin_key"),
    stacked("ChebConv", "second.lins.0", "first.lins.1", K=2),
]
