"""What a rig adds to a frame's processor time: warping, the border of infrared, and refining.

The model runs as graphs on one thread, on a generated street of 640x480 as a rig's two cameras see it. Ways take turns,
so that all of them meet the same neighbours, and medians count. `twice` is what was done before the border was blended
in the latent: both pictures are decoded, and blended as pictures. An overlay (`colour=iron`) is made of the
restored visible and the restored infrared picture, so two are decoded and the fused one is not; what its rig adds is
set against an overlay of a registered pair.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import machine
from recofuse_core.graphs.runtime import GraphRuntime
from recofuse_core.picture import OutputName
from recofuse_core.scenes.scene import make_scene
from recofuse_rigs.parallax import refined_warp
from recofuse_rigs.rig import Rig
from recofuse_rigs.warp import Warp, Warps

WIDTH, HEIGHT = 640, 480
MAX_MORE = 0.15  # of the processor time of a registered frame
JUDGED = ("whole", "partial", "refined", "partial refined")

_AGAINST = {"overlay refined": "overlay"}  # what a way is set against where that is not `registered`

Levels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Median processor seconds of a frame by way, how much more than registered, and whether the bar is met."""

    cpu_s: dict[str, float]
    more: dict[str, float]
    line: str
    all_met: bool


def run(*, rounds: int, json_path: Path | None = None, say: Callable[[str], None]) -> Outcome:
    """Measure every way as often as said."""
    cv2.setNumThreads(1)
    ways = _ways(GraphRuntime("compact", num_threads=1))
    for way in ways.values():  # what follows from a rig alone is made once
        way()
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started_s = time.process_time()
            way()
            spent[name].append(time.process_time() - started_s)
    outcome = judge({name: float(np.median(seconds)) for name, seconds in spent.items()})
    if json_path is not None:
        document = {"machine": machine(), **asdict(outcome)}
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    say(outcome.line)
    return outcome


def judge(cpu_s: dict[str, float]) -> Outcome:
    """Whether what a rig adds stays below the bar."""
    more = {name: seconds / cpu_s[_AGAINST.get(name, "registered")] - 1 for name, seconds in cpu_s.items()}
    all_met = all(more[name] <= MAX_MORE for name in JUDGED)
    told = ", ".join(
        f"{name} {share:+.1%}" + (f" on {_AGAINST[name]}" if name in _AGAINST else "")
        for name, share in more.items()
        if name != "registered"
    )
    line = (
        f"bars {'met' if all_met else 'not met'}: a registered frame takes {cpu_s['registered']:.2f} s of processor "
        f"time; beside it {told} (at most {MAX_MORE:+.0%} of {', '.join(JUDGED)})"
    )
    return Outcome(cpu_s, more, line, all_met)


def _ways(runtime: GraphRuntime) -> dict[str, Callable[[], object]]:
    scene = make_scene(3, HEIGHT, WIDTH)
    vis = np.rint(scene.vis.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
    ir = np.rint(scene.ir[0].numpy() * 255).astype(np.uint8)
    warps = Warps()
    covering, narrow = (
        warps.of(Rig((WIDTH, HEIGHT), (WIDTH, HEIGHT), (zoom, 0.0, x, 0.0, zoom, y, 0.0, 0.0, 1.0)))
        for zoom, x, y in ((1.1, -20.0, -15.0), (0.8, 60.0, 50.0))
    )

    def fused(laid: Levels, *outputs: OutputName, warp: Warp | None = None) -> list[Levels]:
        overlap = None if warp is None else warp.overlap[None]
        made = runtime.fuse(vis.transpose(2, 0, 1)[None], laid[None, None], outputs=outputs, overlap=overlap)
        return [np.ascontiguousarray(getattr(made, name)[0].transpose(1, 2, 0)) for name in outputs]

    def twice() -> Levels:
        both = fused(narrow.apply(ir), "fused", "vis")
        return narrow.blended(both[0], both[1])

    return {
        "registered": lambda: fused(ir, "fused"),
        "whole": lambda: fused(covering.apply(ir), "fused"),
        "partial": lambda: fused(narrow.apply(ir), "fused", warp=narrow),
        "refined": lambda: fused(refined_warp(vis, ir, covering, find_warp=warps.of).warp.apply(ir), "fused"),
        "partial refined": lambda: fused(
            refined_warp(vis, ir, narrow, find_warp=warps.of).warp.apply(ir), "fused", warp=narrow
        ),
        "twice": twice,
        "overlay": lambda: fused(ir, "vis", "ir"),
        "overlay refined": lambda: fused(refined_warp(vis, ir, narrow, find_warp=warps.of).warp.apply(ir), "vis", "ir"),
    }
