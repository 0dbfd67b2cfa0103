"""What the ranks do: gradients of FAM on their share of a batch, to be compared with those of one process."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from relflat import linear_cross_entropy_fam, relative_flatness, relative_flatness_by_layer
from unbounded import FAM

SAMPLES, CLASSES, STRENGTH = 24, 5, 0.5


class Net(nn.Module):
    """A trunk, which may be checkpointed or compiled, a hidden layer, and an output layer."""

    def __init__(self, *, checkpointed: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk: Any = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.hidden, self.output = nn.Linear(8, 7), nn.Linear(7, CLASSES)
        self.checkpointed = checkpointed
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.trunk, x, use_reentrant=False) if self.checkpointed else self.trunk(x)
        return self.output(self.hidden(h).tanh())


class Head(nn.Module):
    """An output layer that computes its loss where its weight is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(CLASSES, 7)), nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = linear_cross_entropy_fam(
            x, self.weight, y, strength=STRENGTH, bias=self.bias, chunk_tokens=5, chunk_classes=2
        )
        return loss.total


class LanguageModel(nn.Module):
    """A trunk below that head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Sequential(nn.Linear(6, 7), nn.Tanh()), Head()
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.trunk(x), y)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 6, dtype=torch.float64, generator=generator).to(dtype)
    y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    y[2] = -100
    return x, y


CASES: dict[str, dict[str, Any]] = {
    "output": {"layer": "output"},
    "output, adaptive": {"layer": "output", "adaptive": True},
    "hidden, hessian": {"layer": "hidden", "method": "exact", "curvature": "hessian"},
    "hidden, ggn": {"layer": "hidden", "method": "exact"},
    "hidden, frozen": {"layer": "hidden", "method": "exact", "gradient": "frozen"},
    "both": {"layer": ["hidden", "output"], "method": "exact"},
}


def grads(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in found if g is not None]


def alone(case: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gradients of the full batch in one process."""
    model, (x, y) = Net(dtype=dtype), data(dtype)
    with FAM(nn.CrossEntropyLoss(), model, strength=STRENGTH, **CASES[case]) as criterion:
        criterion(model(x), y).backward()
    return grads(model)


def head_alone() -> list[Tensor]:
    """Gradients of the language model on the full batch in one process."""
    model = LanguageModel()
    model(*data()).backward()
    return grads(model)


def share_of(rank: int, ranks: int, *, uneven: bool = False) -> slice:
    """Which samples a rank has."""
    if not uneven:
        size = SAMPLES // ranks
        return slice(rank * size, (rank + 1) * size)
    ends = [0, *sorted(SAMPLES * (i + 1) ** 2 // ranks**2 for i in range(ranks))]
    return slice(ends[rank], ends[rank + 1])


def weighted(loss: Tensor, y: Tensor) -> Tensor:
    """The share of a rank in the mean over all ranks' targets, times the ranks that DDP and FSDP divide by."""
    mine = (y != -100).sum()
    total = mine.clone()
    dist.all_reduce(total)
    return loss * (mine.item() / total.item() * dist.get_world_size())


def step(
    model: nn.Module, criterion: Callable[..., Tensor], x: Tensor, y: Tensor, pieces: int = 1, sync: Any = None
) -> None:
    """Forward and backward of a rank's share, in one piece or with gradients accumulated over several."""
    total = (y != -100).sum()
    dist.all_reduce(total)
    for i, (xs, ys) in enumerate(zip(x.chunk(pieces), y.chunk(pieces), strict=True)):
        last = i == pieces - 1
        with contextlib.nullcontext() if last or sync is None else sync():
            share = (ys != -100).sum().item() / total.item() * dist.get_world_size()
            (criterion(model(xs), ys) * share).backward()


def with_penalty(fam: FAM, outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that is computed elsewhere, with its penalty."""
    loss = fam.loss_fn(outputs, targets)
    return loss + fam.penalty(loss)


def ddp(rank: int, ranks: int) -> dict[str, Any]:
    """Under DistributedDataParallel every case, and on two ranks every way of running it."""
    found: dict[str, Any] = {}

    def one(
        name: str,
        case: str,
        *,
        uneven: bool = False,
        pieces: int = 1,
        compiled: bool = False,
        tap_ddp: bool = False,
        wrap: dict[str, bool] | None = None,
        by_loss: bool = False,
        **options: Any,
    ) -> None:
        net = Net(**options)
        if compiled:
            net.trunk = torch.compile(net.trunk, backend="aot_eager")
        model = DistributedDataParallel(net, **wrap or {})
        at = share_of(rank, ranks, uneven=uneven)
        x, y = (t[at] for t in data(options.get("dtype", torch.float64)))
        given = {**CASES[case]}
        if tap_ddp:
            given["layer"] = f"module.{given['layer']}"
        with FAM(nn.CrossEntropyLoss(), model if tap_ddp else net, strength=STRENGTH, **given) as fam:
            criterion = functools.partial(with_penalty, fam) if by_loss else fam
            step(model, criterion, x, y, pieces, model.no_sync)
        found[name] = (case, grads(net))

    for case in CASES:
        one(case, case)
    for case in ("output", "hidden, ggn"):
        one(f"{case}, uneven", case, uneven=True)
    if ranks > 2:
        return found
    one("tapped through the wrapper", "output", tap_ddp=True)
    one("float32", "output", dtype=torch.float32)
    for case in ("output", "hidden, ggn"):
        one(f"{case}, accumulated", case, pieces=3)
        one(f"{case}, checkpointed", case, checkpointed=True)
        one(f"{case}, compiled", case, compiled=True)
    for case in CASES:
        one(f"{case}, static graph", case, wrap={"static_graph": True})
    one("unused parameters looked for", "hidden, ggn", wrap={"find_unused_parameters": True})
    for case in ("output", "hidden, hessian"):
        one(f"{case}, static graph, penalty(loss)", case, by_loss=True, wrap={"static_graph": True})
    one("static graph, tapped through the wrapper", "hidden, ggn", tap_ddp=True, wrap={"static_graph": True})
    return found


def fsdp(rank: int, ranks: int) -> dict[str, Any]:
    """Under fully_shard, on two ranks also together with others, not resharded, and in every other way."""
    found: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (ranks,))

    def sharded(net: nn.Module, *, each: bool, reshard: bool) -> nn.Module:
        for part in net.children() if each else ():
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
        return fully_shard(net, mesh=mesh)

    def one(
        name: str,
        case: str,
        *,
        each: bool = True,
        reshard: bool = True,
        before: bool = False,
        uneven: bool = False,
        pieces: int = 1,
        **options: Any,
    ) -> None:
        net = Net(**options)
        model = net if before else sharded(net, each=each, reshard=reshard)
        criterion = FAM(nn.CrossEntropyLoss(), net, strength=STRENGTH, **CASES[case])
        if before:
            sharded(net, each=each, reshard=reshard)
        x, y = (t[share_of(rank, ranks, uneven=uneven)] for t in data())
        step(model, criterion, x, y, pieces)
        whole = [n for n, p in net.named_parameters() if not hasattr(p, "full_tensor")]
        assert not whole, f"left unsharded: {whole}"
        found[name] = (case, grads(net))

    for case in CASES:
        one(case, case)
    for case in ("output", "hidden, hessian"):
        one(f"{case}, uneven", case, uneven=True)
        if ranks > 2:
            continue
        one(f"{case}, one group", case, each=False)
        one(f"{case}, kept after forward", case, reshard=False)
        one(f"{case}, criterion first", case, before=True)
        one(f"{case}, accumulated", case, pieces=3)
        one(f"{case}, checkpointed", case, checkpointed=True)

    head = LanguageModel()
    sharded(head, each=True, reshard=True)
    x, y = (t[share_of(rank, ranks)] for t in data())
    weighted(head(x, y), y).backward()
    found["language model"] = ("head", grads(head))

    net = sharded(Net(), each=True, reshard=True)
    for name in ("output", "hidden"):
        flat = relative_flatness(
            net, nn.CrossEntropyLoss(), (x, y), layer=name, method="auto", process_group=dist.group.WORLD
        )
        found[f"measure {name}"] = flat
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    F.cross_entropy(net(x), y).sum().backward()
    optimizer.step()
    again = relative_flatness(net, nn.CrossEntropyLoss(), (x, y), layer="hidden", process_group=dist.group.WORLD)
    found["measure after a step"] = again.value != found["measure hidden"].value
    return found


def precision(rank: int, ranks: int) -> dict[str, Any]:
    """Mixed precision on ranks: bf16 autocast, fp16 with a GradScaler, one step that overflows included."""
    found: dict[str, Any] = {}
    x, y = (t[share_of(rank, ranks)] for t in data(torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        net = Net(dtype=torch.float32)
        model = DistributedDataParallel(net)
        criterion = FAM(nn.CrossEntropyLoss(), net, "output", strength=STRENGTH)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**10)
        with torch.autocast("cpu", dtype):
            loss = criterion(model(x), y)
        scaler.scale(weighted(loss, y)).backward()
        scaler.unscale_(optimizer)
        found[str(dtype)] = grads(net)
        scaler.step(optimizer)
        scaler.update()
    before, scale = [p.detach().clone() for p in net.parameters()], scaler.get_scale()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = criterion(model(x * (1e6 if rank == 0 else 1.0)), y)
    scaler.scale(loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    same = all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    found["skipped"] = same and scaler.get_scale() < scale
    return found


def probes(rank: int, ranks: int) -> dict[str, Any]:
    """Different ranks draw different probes, also on the same data; and all seeds are those given."""
    x, y = data()
    values = []
    for _ in range(2):
        net = Net()
        with FAM(nn.CrossEntropyLoss(), net, "hidden", strength=STRENGTH, method="probe", seed=3) as criterion:
            criterion(net(x), y)
        values.append(criterion.last["kappa"])
    return {"values": values}


def measure(rank: int, ranks: int) -> dict[str, Any]:
    """relative_flatness of shares of very different sizes; the last rank has none at all."""
    net, loss_fn, group = Net(), nn.CrossEntropyLoss(), dist.group.WORLD
    x, y = data()
    ends = [0, 17, *[SAMPLES] * (ranks - 1)]
    mine = slice(ends[rank], ends[rank + 1])
    batches = list(zip(x[mine].split(4), y[mine].split(4), strict=True)) if mine.start < mine.stop else []
    found: dict[str, Any] = {}
    for layer in ("output", "hidden"):
        for normalize in (False, True):
            found[f"{layer} {normalize}"] = relative_flatness(
                net,
                loss_fn,
                batches,
                layer=layer,
                method="exact" if layer == "hidden" else "auto",
                normalize_features=normalize,
                process_group=group,
            )
    found["all"] = relative_flatness_by_layer(net, loss_fn, batches, layer="*", process_group=group)
    found["probes"] = relative_flatness(
        net, loss_fn, batches, layer="hidden", method="probe", rtol=0.2, process_group=group
    )
    found["xtrace"] = relative_flatness(
        net, loss_fn, batches, layer="hidden", method="xtrace", probes=8, process_group=group
    )
    halves = [(x[:4], y[:4] % CLASSES), (x[4:9], y[4:9] % CLASSES)] if rank == 0 else [(x[9:], y[9:] % CLASSES)] * 2
    found["unknown"] = relative_flatness(
        net, lambda z, t: F.cross_entropy(z, t) * 1.0, halves, layer="output", process_group=group, method="exact"
    )
    errors = {}
    for name, change in {
        "bad on rank 1": {"data": [(x, y)] if rank == 0 else [(x * torch.nan, y)]},
        "empty": {"data": []},
        "one batch of an unknown loss": {
            "data": (x, y % CLASSES),
            "loss_fn": lambda z, t: F.cross_entropy(z, t) + z.square().mean(),
        },
    }.items():
        try:
            relative_flatness(net, **{"loss_fn": loss_fn, **change}, layer="output", process_group=group)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return found | {"errors": errors}


def dying(rank: int, ranks: int, what: str) -> str:
    """The last rank dies, or stays away; what the others are told."""
    import os
    import time

    net = Net()
    model = DistributedDataParallel(net)
    x, y = (t[share_of(rank, ranks)] for t in data())
    criterion = FAM(nn.CrossEntropyLoss(), net, "output", strength=STRENGTH)
    loss = criterion(model(x), y)
    if rank == ranks - 1:
        if what == "dies":
            os._exit(1)
        time.sleep(7 if what == "hangs" else 0)
    start = time.monotonic()
    try:
        if what == "hangs":
            relative_flatness(net, nn.CrossEntropyLoss(), (x, y), layer="output", process_group=dist.group.WORLD)
        else:
            loss.backward()
    except RuntimeError as error:
        return f"{time.monotonic() - start:.0f} s: {error}"
    return "no error"
