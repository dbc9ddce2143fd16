"""Alternating timings: medians of wall and CPU time, so that a noisy machine hits every candidate alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Timing:
    """Median seconds of one candidate over its rounds."""

    wall: float
    cpu: float


def alternate(
    candidates: dict[str, Callable[[], object]], rounds: int, device: str = "cpu", grad: bool = False
) -> dict[str, Timing]:
    """Run every candidate once per round, in turn, after one warm-up each; without gradients unless `grad`."""

    def run(function: Callable[[], object]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    with torch.set_grad_enabled(grad):
        for function in candidates.values():
            run(function)
        for _ in range(rounds):
            for name, function in candidates.items():
                seconds[name].append(run(function))
    return {
        name: Timing(statistics.median(wall for wall, _ in runs), statistics.median(cpu for _, cpu in runs))
        for name, runs in seconds.items()
    }


def print_table(title: str, timings: dict[str, Timing], items: int, unit: str, reference: str | None = None) -> None:
    """One Markdown row per candidate: rate, seconds, and the factor over the reference."""
    print(f"\n{title}\n")
    print(f"| candidate | {unit}/s | wall s | CPU s | wall factor | CPU factor |\n|---|---|---|---|---|---|")
    base = timings[reference or next(iter(timings))]
    for name, timing in timings.items():
        rate, wall_factor, cpu_factor = items / timing.wall, base.wall / timing.wall, base.cpu / timing.cpu
        print(f"| {name} | {rate:.2f} | {timing.wall:.3f} | {timing.cpu:.3f} | {wall_factor:.2f} | {cpu_factor:.2f} |")
