"""What the training benchmarks share: timing of a step, its operations, its peak memory, and records as JSON lines."""

import argparse
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Dense bf16 operations per second by the vendor's data sheets; what utilisation is a share of.
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options that every benchmark here has."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=rounds, help="timed repetitions, of which the median counts")
    parser.add_argument("--output", type=Path, help="file to which one JSON line per measurement is appended")


class Records:
    """Prints measurements and appends them to a file at once, so that a run that is cut short keeps what it has."""

    def __init__(self, part: str, args: argparse.Namespace) -> None:
        self.part, self.device, self.path = part, args.device, args.output
        torch.set_num_threads(args.threads)

    def add(self, **values: Any) -> None:
        """One measurement; floats are cut to six digits."""
        record = {"part": self.part, "device": device_name(self.device), "torch": torch.__version__, **values}
        record = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}
        print(json.dumps(record), flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def device_name(device: str) -> str:
    """`"NVIDIA H200"`, or `"cpu"`."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def synchronise(device: str) -> None:
    """Waits for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_seconds(function: Callable[[], object], rounds: int, device: str, warmup: int = 2) -> float:
    """Median wall time of a call, the device's work included."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(rounds):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def reset_peak(device: str) -> None:
    """Frees what is left over and starts a new peak."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """Peak GiB: of the tensors since `reset_peak` on a GPU, of the whole process since its start on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def count_flops(function: Callable[[], object]) -> int:
    """Operations of the matrix products, convolutions and attention kernels of a call.

    torch's counter multiplies the backward pass of a depthwise convolution by its channels; here a convolution's
    backward pass counts twice its forward pass. Element-wise work is not counted.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    backward = counts.pop("aten.convolution_backward", None)
    return sum(counts.values()) + (2 * counts.get("aten.convolution", 0) if backward is not None else 0)


def utilisation(flops: float, seconds: float, device: str) -> float | None:
    """Share of the device's dense bf16 peak; None where that is not known."""
    name = device_name(device)
    return next((flops / seconds / peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)


def autocast(device: str, enabled: bool) -> torch.autocast:
    """bf16 autocast on the device, or nothing."""
    return torch.autocast(device.partition(":")[0], dtype=torch.bfloat16, enabled=enabled)


def training_step(
    loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, norm: float
) -> None:
    """Forward pass, backward pass, clipping, optimizer step."""
    loss().backward()
    nn.utils.clip_grad_norm_(parameters, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def compile_layers(model: nn.Module, layer_name: str, enabled: bool = True) -> None:
    """Compiles every layer of a class: one compilation serves all, where compiling the whole model takes minutes."""
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if type(module).__name__ == layer_name:
            if enabled:
                module.compile(dynamic=False)
            else:
                module._compiled_call_impl = None


@contextmanager
def out_of_memory(records: Records, **values: Any) -> Iterator[None]:
    """Records that a measurement did not fit instead of failing."""
    try:
        yield
    except torch.OutOfMemoryError:
        records.add(**values, out_of_memory=True)
