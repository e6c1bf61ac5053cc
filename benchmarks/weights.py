"""`recofuse bench weights OLD NEW`: what a pair costs with either set of weights, and how that grows with the pixels.

OLD is run by torch, NEW by torch or, with --runtime onnx, as graphs: `compact compact --runtime onnx` compares both.
Both are run in turn, window by window, in one process with the same settings, so that what else the machine does meets
both alike; what counts is processor time, the least of the windows. The last line has the ratio at 640x480 and how much
dearer a pixel of the largest size is.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from recofuse_core.checkpoint import load_pretrained
from recofuse_core.graphs.runtime import GraphRuntime
from recofuse_core.picture import Exposure, OutputName
from recofuse_core.runtime import Runtime

SIZES = ((320, 256), (640, 480), (1280, 1024), (3840, 2160))  # width, height; the last is tiled
REFERENCE = (640, 480)
Runner = Literal["torch", "onnx"]
FUSED: tuple[OutputName, ...] = ("fused",)


@dataclass(frozen=True)
class Cost:
    """Seconds of processor time a pair of `width` x `height`, fused picture alone, with the weights called `name`.

    seconds: the least of the windows; median_seconds: their median.
    """

    name: str
    width: int
    height: int
    seconds: float
    median_seconds: float

    @property
    def microseconds_per_pixel(self) -> float:
        """The same for one pixel."""
        return 1e6 * self.seconds / (self.width * self.height)


@dataclass(frozen=True)
class Outcome:
    """All costs, and what follows from them."""

    costs: list[Cost]
    ratio: float  # of NEW to OLD at 640x480
    median_ratio: float  # the same of the medians
    growth: float  # of the largest size's cost a pixel to that of 640x480, with NEW


def run(
    old: str,
    new: str,
    *,
    exposure: Exposure,
    windows: int,
    runtime: Runner = "torch",
    sizes: tuple[tuple[int, int], ...] = SIZES,
    json_path: Path | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Measure both and say what was found; one thread. Raises CheckpointError for weights that cannot be read."""
    torch.set_num_threads(1)
    runtimes: dict[str, Runtime | GraphRuntime] = {"old": Runtime(load_pretrained(old), precision="float32")}
    if runtime == "onnx":
        runtimes["new"] = GraphRuntime(new, num_threads=1)
    else:
        runtimes["new"] = Runtime(load_pretrained(new), precision="float32")
    runners = {"old": "", "new": " as graphs" if runtime == "onnx" else ""}
    runtimes = {f"{role}: {used.info.name} {used.info.version}{runners[role]}": used for role, used in runtimes.items()}
    old_name, new_name = runtimes
    costs: list[Cost] = []
    for width, height in sizes:
        generator = torch.Generator().manual_seed(0)
        vis = torch.randint(256, (1, 3, height, width), generator=generator, dtype=torch.uint8)
        ir = torch.randint(256, (1, 1, height, width), generator=generator, dtype=torch.uint8)
        spent: dict[str, list[float]] = {name: [] for name in runtimes}
        for window in range(windows + 1):  # the first warms up
            for name, used in runtimes.items():
                offered = exposure if used.can_light else "as_shot"
                started = time.process_time()
                if isinstance(used, Runtime):
                    used.fuse(vis, ir, outputs=FUSED, exposure=offered)
                else:
                    used.fuse(vis.numpy(), ir.numpy(), outputs=FUSED, exposure=offered)
                if window:
                    spent[name].append(time.process_time() - started)
        for name, seconds in spent.items():
            cost = Cost(name, width, height, min(seconds), statistics.median(seconds))
            costs.append(cost)
            say(
                f"{cost.name:>24} {width}x{height}: {cost.seconds:.2f} s (median {cost.median_seconds:.2f}), "
                f"{cost.microseconds_per_pixel:.2f} us a pixel"
            )

    def cost_of(name: str, size: tuple[int, int]) -> Cost:
        return next(cost for cost in costs if cost.name == name and (cost.width, cost.height) == size)

    reference = REFERENCE if REFERENCE in sizes else sizes[0]
    at_reference = cost_of(new_name, reference)
    before = cost_of(old_name, reference)
    ratio, median_ratio = at_reference.seconds / before.seconds, at_reference.median_seconds / before.median_seconds
    growth = cost_of(new_name, sizes[-1]).microseconds_per_pixel / at_reference.microseconds_per_pixel
    outcome = Outcome(costs, ratio, median_ratio, growth)
    say(
        f"{new_name} takes {ratio:.2f} of the processor time of {old_name} at "
        f"{reference[0]}x{reference[1]} ({exposure}; {median_ratio:.2f} by medians), "
        f"and {growth:.2f} times as much a pixel at {sizes[-1][0]}x{sizes[-1][1]}"
    )
    if json_path:
        json_path.write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
    return outcome
