"""The runtimes of the shipped weights on a processor, alone and beside busy processes: rows of `recofuse bench engine`.

Each runtime is a process of its own that fuses one 640x480 pair whenever it is told to, with the model's defaults, the
fused picture alone, levels to levels. Windows alternate as in benchmarks/neighbours.py, and a ratio is of medians of
processor time, a runtime's to torch's under the same circumstances.

- `torch`: the library's `Runtime`, float32.
- `onnxruntime`: the graphs beside the weights, as `recofuse fuse` and workers run them.
- `openvino`: the same graphs, where OpenVINO is installed; nothing else of recofuse uses it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.neighbours import EARLY, HEADING, WINDOWS, Row, beside_others
from benchmarks.processes import machine
from recofuse_core.graphs.runtime import Floats, GraphNetworks, GraphRuntime, PartName, graph_path
from recofuse_core.weights_file import resolve
from recofuse_host.processors import read_processors

BASELINE = "torch"
LOOP = (
    """
import sys, time
{imports}
import numpy as np
generator = np.random.default_rng(0)
vis = generator.integers(0, 256, (1, 3, 480, 640), np.uint8)
ir = generator.integers(0, 256, (1, 1, 480, 640), np.uint8)
{load}
def fuse():
    runtime.fuse(*pair, outputs=("fused",), exposure="as_shot")
"""
    + WINDOWS
)
LOADS = {
    "torch": """
import torch
from recofuse_core import Runtime, load_pretrained
torch.set_num_threads({threads})
runtime, pair = Runtime(load_pretrained("compact"), precision="float32"), tuple(map(torch.from_numpy, (vis, ir)))
""",
    "onnxruntime": """
from recofuse_core.graphs.runtime import GraphRuntime
runtime, pair = GraphRuntime("compact", num_threads={threads}), (vis, ir)
""",
    "openvino": """
from benchmarks.runtimes import openvino_runtime
runtime, pair = openvino_runtime({threads}), (vis, ir)
""",
}


class OpenVinoNetworks(GraphNetworks):
    """The graphs of a model, run by OpenVINO."""

    def __init__(self, networks: GraphNetworks, weights: str, num_threads: int) -> None:
        import openvino

        super().__init__(networks._sessions, networks._prediction)
        core, path = openvino.Core(), resolve(weights)
        hints = {
            "INFERENCE_NUM_THREADS": num_threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._requests: dict[PartName, Any] = {
            part: core.compile_model(core.read_model(graph_path(path, part)), "CPU", hints).create_infer_request()
            for part in self._sessions
        }

    def _run(self, part: PartName, *arrays: NDArray[Any]) -> list[Floats]:
        found = self._requests[part].infer([np.ascontiguousarray(array) for array in arrays])
        return [np.array(found[output]) for output in found]


def openvino_runtime(num_threads: int) -> GraphRuntime:
    """The shipped weights in OpenVINO; `as_shot` alone."""
    runtime = GraphRuntime("compact", num_threads=num_threads)
    runtime._networks = OpenVinoNetworks(runtime._networks, "compact", num_threads)
    return runtime


@dataclass(frozen=True, slots=True)
class Outcome:
    """All rows, torch's first."""

    rows: tuple[Row, ...]
    num_busy: int

    def ratios(self) -> dict[str, tuple[float, float | None]]:
        """By runtime: its processor time to torch's, alone and beside the busy processes."""
        base, *others = self.rows
        return {
            row.name: (
                row.alone.cpu_s / base.alone.cpu_s,
                row.busy.cpu_s / base.busy.cpu_s if row.busy and base.busy else None,
            )
            for row in others
        }

    @property
    def line(self) -> str:
        """The ratios in words."""
        parts = []
        for name, (alone, busy) in self.ratios().items():
            beside = "" if busy is None else f", {busy:.2f} beside {self.num_busy} busy processes"
            parts.append(f"{name} takes {alone:.2f} of torch's processor time{beside}")
        return "; ".join(parts) or "nothing is here to compare with torch"


def ways(num_threads: int) -> dict[str, str]:
    """The programs of the runtimes that are installed, torch's first."""
    found = {name: load for name, load in LOADS.items() if importlib.util.find_spec(name) is not None}
    return {name: LOOP.format(imports=EARLY, load=load.format(threads=num_threads)) for name, load in found.items()}


def run(
    *,
    num_threads: int = 1,
    repeats: int = 5,
    num_busy: int = 0,
    json_path: Path | None = None,
    is_all: bool = False,
    say: Callable[[str], None] = print,
    chosen: dict[str, str] | None = None,
) -> Outcome:
    """Measure, and say one row a runtime. num_busy 0: as many busy processes as processors may be used.

    is_all: nothing else is measured, so that the ratios are the last line. chosen: programs in place of `ways`.
    """
    num_busy = num_busy or read_processors().usable
    programs = ways(num_threads) if chosen is None else chosen
    rows: Sequence[Row] = beside_others(programs, repeats, num_busy)
    say(f"compact by runtime, 640x480, fused picture alone, {num_threads} thread(s), medians of {repeats}:")
    say(f"{'':<24} {'as it is':^15}   {f'{num_busy} busy':^15}   {'ratio':^13}")
    say(HEADING)
    for row in rows:
        say(row.text())
    for name in LOADS:
        if name not in programs and chosen is None:
            say(f"{name:<24} is not installed")
    outcome = Outcome(tuple(rows), num_busy)
    if json_path is not None:
        content = {"machine": machine(), **asdict(outcome), "line": outcome.line}
        json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if is_all:
        say(outcome.line)
    return outcome
