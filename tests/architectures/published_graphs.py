"""Models of PyTorch Geometric: vertices classified, graphs regressed."""

from collections.abc import Callable
from typing import Any

import torch
from published import Batch, Published, cross_entropy, labels, squared_error
from torch import Tensor, nn

V, IN, HIDDEN = 6, 4, 5


def edges() -> Tensor:
    ring = torch.arange(V)
    one = torch.stack([ring, (ring + 1) % V])
    more = torch.tensor([[0, 2, 1], [3, 5, 4]])
    half = torch.cat([one, more], 1)
    return torch.cat([half, half.flip(0)], 1)


def vertices() -> Batch:
    return (torch.randn(V, IN, dtype=torch.float64), edges()), {}, labels(V)


def built(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torch_geometric.nn import models

        return getattr(models, name)(**options)

    return build


def case(name: str, output: str, hidden: str, batch: Callable[[], Batch] = vertices, **options: Any) -> Published:
    besides = options.pop("besides", ())
    loss, outputs = options.pop("loss", cross_entropy), options.pop("outputs", lambda returned: returned)
    return Published(name, "torch_geometric", built(name, **options), batch, output, hidden, loss, outputs, besides)


SIZES = {"in_channels": IN, "hidden_channels": HIDDEN, "num_layers": 2, "out_channels": 3}
ATOMS = {"hidden_channels": 4, "cutoff": 3.0}


def molecules() -> Batch:
    return (
        torch.tensor([1, 6, 8, 1, 7]),
        torch.randn(5, 3, dtype=torch.float64),
        torch.tensor([0, 0, 0, 1, 1]),
    ), {}, torch.randn(2, 1, dtype=torch.float64)


def typed() -> Batch:
    return (torch.randn(V, IN, dtype=torch.float64), edges()), {}, labels(V)


def convolutions() -> list[tuple[str, Callable[[Any], tuple[nn.Module, nn.Module]]]]:
    return []


class Stack(nn.Module):
    """Two layers of a class of torch_geometric.nn."""

    def __init__(self, layer: str, *args: Any, **options: Any) -> None:
        super().__init__()
        from torch_geometric import nn as gnn

        kind = getattr(gnn, layer)
        self.first, self.second = kind(IN, HIDDEN, *args, **options), kind(HIDDEN, 3, *args, **options)

    def forward(self, x: Tensor, edge_index: Tensor, *more: Any) -> Tensor:
        return self.second(self.first(x, edge_index, *more).tanh(), edge_index, *more)


GRAPHS = [
    case("GCN", "convs.1.lin", "convs.0.lin", **SIZES),
    case("GraphSAGE", "convs.1.lin_r", "convs.0.lin_l", **SIZES),
    case("GIN", "convs.1.nn.lins.1", "convs.0.nn.lins.0", **SIZES),
    case("GAT", "convs.1.lin", "convs.0.lin", heads=1, besides=("*.att_src", "*.att_dst"), **SIZES),
    case("GAT", "convs.1.lin_l", "convs.0.lin_r", v2=True, heads=1, besides=("*.att",), **SIZES),
    case("PNA", "convs.1.lin", "convs.0.pre_nns.0.0", aggregators=["mean", "max"], scalers=["identity"],
         deg=torch.tensor([0, 2, 4]), **SIZES),
    case("EdgeCNN", "convs.1.nn.lins.1", "convs.0.nn.lins.0", **SIZES),
    case("GraphUNet", "up_convs.0.lin", "down_convs.0.lin", in_channels=IN, hidden_channels=HIDDEN, out_channels=3, depth=1,
         besides=("pools.*",)),
    case("LINKX", "final_mlp.lins.0", "node_mlp.lins.0", num_nodes=V, in_channels=IN, hidden_channels=HIDDEN, out_channels=3, num_layers=1),
    case("MLP", "lins.1", "lins.0", lambda: ((torch.randn(V, IN, dtype=torch.float64),), {}, labels(V)),
         channel_list=[IN, HIDDEN, 3]),
    case("SchNet", "lin2", "interactions.0.conv.lin1", molecules, num_filters=4, num_interactions=1, num_gaussians=4,
         loss=squared_error, **ATOMS),
    case("DimeNetPlusPlus", "output_blocks.1.lin", "interaction_blocks.0.lin_ji", molecules, hidden_channels=4, out_channels=1,
         num_blocks=1, int_emb_size=2, basis_emb_size=2, out_emb_channels=4, num_spherical=2, num_radial=2, cutoff=3.0,
         num_before_skip=1, num_after_skip=1, num_output_layers=1, loss=squared_error),
]  # fmt: skip
