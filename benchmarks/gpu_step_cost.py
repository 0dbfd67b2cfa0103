"""What a training step costs with FAM on a GPU: ResNet-18, ViT-S and BERT in float32, bfloat16 and float16.

    python benchmarks/gpu_step_cost.py                             all of it, on the current CUDA device
    python benchmarks/gpu_step_cost.py --networks vit-s --precisions bf16
    python benchmarks/gpu_step_cost.py --device cpu --small        a check that everything runs, without meaning

Steps take turns in random order and are timed by CUDA events, so what is compared is time on the device, launches
included. Weights and inputs are random: neither changes what a step costs. float16 is scaled by GradScaler.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from output import RESULTS, environment, save, show
from paired import ratio_to
from relflat import FAM

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES = 1000


@dataclass(frozen=True)
class Options:
    """Cost of a training step with FAM on a GPU, relative to a plain step.

    Attributes:
        device: of torch.
        networks: which.
        precisions: which; bf16 and fp16 are autocast.
        batch: samples a step.
        steps: timed steps of each row.
        small: tiny networks and inputs and two steps, to see that it runs.
        tf32: whether float32 products may be computed in TensorFloat-32.
        json: where to write the results; by default gpu_step_cost_DEVICE.json, and nowhere for small.
    """

    device: str = "cuda"
    networks: tuple[Literal["resnet-18", "vit-s", "bert"], ...] = ("resnet-18", "vit-s", "bert")
    precisions: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
    batch: int = 64
    steps: int = 50
    small: bool = False
    tf32: bool = False
    json: Path | None = None


@dataclass(frozen=True)
class Network:
    """A network to train.

    Attributes:
        model: builds it, small or not.
        inputs: ``(samples, small) -> keyword arguments`` of its forward.
        hidden: glob of a hidden layer near the output, the same in both sizes.
    """

    model: Callable[[bool], nn.Module]
    inputs: Callable[[int, bool], dict[str, Tensor]]
    hidden: Callable[[bool], str]


def _resnet(small: bool) -> nn.Module:
    sizes = [8, 16] if small else [64, 128, 256, 512]
    config = ResNetConfig(
        layer_type="basic", depths=[2] * len(sizes), hidden_sizes=sizes, embedding_size=sizes[0], num_labels=CLASSES
    )
    return ResNetForImageClassification(config)


def _vit(small: bool) -> nn.Module:
    width, depth, heads = (48, 2, 2) if small else (384, 12, 6)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=32 if small else 224,
        num_labels=CLASSES,
        attn_implementation="eager",  # the fused kernels have no second derivatives
    )
    return ViTForImageClassification(config)


def _bert(small: bool) -> nn.Module:
    width, depth, heads = (48, 2, 2) if small else (768, 12, 12)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    return BertForSequenceClassification(config)


def _pictures(n: int, small: bool) -> dict[str, Tensor]:
    size = 32 if small else 224
    return {"pixel_values": torch.randn(n, 3, size, size)}


def _sentences(n: int, small: bool) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1000, (n, 8 if small else 128))}


NETWORKS = {
    "resnet-18": Network(
        _resnet, _pictures, lambda small: f"resnet.encoder.stages.{1 if small else 3}.layers.1.layer.1.convolution"
    ),
    "vit-s": Network(_vit, _pictures, lambda small: f"vit.layers.{1 if small else 11}.mlp.fc2"),
    "bert": Network(_bert, _sentences, lambda small: f"bert.encoder.layer.{1 if small else 11}.output.dense"),
}
ROWS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain again": None,  # shows the error of the timing itself
    "FAM output": {"layer": "output"},
    "FAM output frozen": {"layer": "output", "gradient": "frozen"},
    "FAM hidden": {"layer": "hidden"},
    "FAM hidden frozen": {"layer": "hidden", "gradient": "frozen"},
}


class Step:
    """A training step of one row."""

    def __init__(self, network: Network, row: dict[str, Any] | None, precision: str, options: Options) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = torch.device(options.device), PRECISIONS[precision]
        self.model = network.model(options.small).to(self.device).train()
        inputs = network.inputs(options.batch, options.small)
        self.inputs = {k: v.to(self.device) for k, v in inputs.items()}
        self.targets = torch.randint(CLASSES, (options.batch,), device=self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.criterion: Callable[..., Tensor] = F.cross_entropy
        if row is not None:
            layer = network.hidden(options.small) if row["layer"] == "hidden" else row["layer"]
            rest = {k: v for k, v in row.items() if k != "layer"}
            self.criterion = FAM(nn.CrossEntropyLoss(), self.model, layer, strength=0.01, **rest)

    def __call__(self) -> None:
        """Do it."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = self.criterion(self.model(**self.inputs).logits, self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def method(self) -> str:
        """What FAM says it did."""
        return str(getattr(self.criterion, "last", {}).get("method", ""))


def main() -> None:
    options = tyro.cli(Options)
    if options.small:
        options = Options(**{**asdict(options), "batch": 4, "steps": 2})
    if not options.device.startswith("cuda"):
        print("not a GPU: the times below say nothing about one")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    results = [
        {"network": network, "precision": precision} | measure(network, precision, options)
        for network in options.networks
        for precision in options.precisions
    ]
    name = device_name(options.device)
    path = options.json or (RESULTS / f"gpu_step_cost_{name.lower().replace(' ', '-')}.json")
    if options.json or not options.small:
        kept = {k: v for k, v in asdict(options).items() if k != "json"}
        save(path, {"device": name, "environment": environment(), "options": kept, "results": results})
        print(f"written: {path}")


def measure(network: str, precision: str, options: Options) -> dict[str, Any]:
    """All rows of a network in a precision."""
    steps, failed = {}, {}
    for label, row in ROWS.items():
        try:
            step = Step(NETWORKS[network], row, precision, options)
            step()
            steps[label] = step
        except (RuntimeError, ValueError) as error:
            failed[label] = f"{type(error).__name__}: {error}".splitlines()[0]
    peaks = {label: peak(step, step.device) for label, step in steps.items()}
    times = in_turns(steps, options)
    rows = [
        {
            "row": label,
            "time": asdict(ratio_to(times[label], times["plain"])),
            "peak_mib": peaks[label],
            "method": steps[label].method(),
        }
        for label in steps
    ]
    print_table(f"{network}, {precision}, batch {options.batch}, {device_name(options.device)}", rows, failed)
    steps.clear()
    gc.collect()
    return {"rows": rows, "cannot_run": failed}


def in_turns(steps: Mapping[str, Callable[[], Any]], options: Options) -> dict[str, list[float]]:
    """Seconds of every step and round, in random order within a round; three rounds warm up."""
    order, found = random.Random(0), {label: [] for label in steps}
    for turn in range(options.steps + 3):
        for label in order.sample(list(steps), len(steps)):
            seconds = timed(steps[label], torch.device(options.device))
            if turn >= 3:
                found[label].append(seconds)
    return found


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds between two events around a step; wall time on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak(step: Callable[[], Any], device: torch.device) -> float | None:
    """Peak MiB allocated during a step above what was there before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def print_table(title: str, rows: list[dict[str, Any]], failed: Mapping[str, str]) -> None:
    cells = [
        [
            r["row"],
            f"{r['time']['ratio']:.3f} [{r['time']['low']:.3f}, {r['time']['high']:.3f}]",
            f"{1000 * r['time']['seconds']:.2f}",
            "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}",
            r["method"],
        ]
        for r in rows
    ]
    show(title, ("step", "relative time", "ms", "peak MiB", "method"), cells)
    for label, reason in failed.items():
        print(f"cannot run: {label}: {reason}")


if __name__ == "__main__":
    main()
