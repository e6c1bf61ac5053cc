"""What `align=refine` makes of what a rig leaves: streets with depth, seen by two cameras side by side.

A draw is a generated street, whose infrared is rendered from 5 to 15 cm beside and up to 5 cm above or below the
visible camera, and a rig that is right for one distance of 9 to 25 m. What is nearer or farther lies off by the
parallax, which the depth of every pixel tells exactly. Both sides are made dark and noisy as in `benchmarks.alignment`.
Beside each stands the same street seen by both cameras from one place: nothing is off there, and nothing should be
moved.

The residual is the mean distance, in visible pixels at 640x480, between where infrared is laid and where it belongs,
by the strength of infrared's own edges: where infrared is flat, nobody sees where it lies. Over all pixels alike it
stands beside. Jitter is how far the field differs, in the mean, between frames that differ in noise alone: each frame
by itself, and followed as a stream is.

What a newcomer would get wrong: recorded pairs are registered to a few pixels only, so nobody knows what is left of
them. They are moved by a known shift besides, and the field is compared with what was found of the unmoved pair.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.alignment import HEIGHT, WIDTH
from benchmarks.processes import machine
from recofuse_rigs.parallax import Refined, Track, refined_warp
from recofuse_rigs.placing import sets_of
from recofuse_rigs.rig import Rig
from recofuse_rigs.warp import Warp, Warps

Field = NDArray[np.floating[Any]]  # (H, W, 2)

MAX_RATIO = 0.5  # of the residual after to that before
SHARE = 0.95  # of the moved frames that must keep it
MAX_HARM_PX = 0.2  # to a registered pair
MAX_CPU_S = 0.15 * 1.4  # of what the model takes for a frame on one core
SHIFT = (5.0, -3.0)  # of recorded pairs
NUM_FRAMES = 5
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Draw:
    """One street. Pixels; before and after by infrared's edges, all_before and all_after over all pixels alike.

    harm_px: how far the registered twin was moved. own_jitter_px, jitter_px: frame by frame, and followed.
    """

    before_px: float
    after_px: float
    all_before_px: float
    all_after_px: float
    moved_px: float
    told_residual_px: float | None
    harm_px: float
    own_jitter_px: float
    jitter_px: float
    cpu_s: float

    @property
    def is_moved(self) -> bool:
        """Whether the frame was not left alone."""
        return self.moved_px > 0


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded pair. moved_px: as it is. error_px: how much of a known shift was not found, of 5.8 px."""

    moved_px: float
    error_px: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All draws, and whether the bars are met."""

    draws: list[Draw]
    recorded: list[Recorded]
    line: str
    all_met: bool


def run(
    pairs: Path | None, *, count: int, seed: int = 0, json_path: Path | None = None, say: Callable[[str], None]
) -> Outcome:
    """Measure on generated streets and, if given, on a folder with vis and ir."""
    cv2.setNumThreads(1)
    draws: list[Draw] = []
    rng, warps = np.random.default_rng(seed), Warps()
    for number in range(1, count + 1):
        draws.append(drawn(rng, number, warps))
        say(_told(draws[-1]))
    others = [] if pairs is None else list(_recorded(pairs, warps))
    outcome = judge(draws, others)
    if json_path is not None:
        document = {
            "machine": machine(),
            "line": outcome.line,
            "all_met": outcome.all_met,
            "draws": [asdict(draw) for draw in draws],
            "recorded": [asdict(pair) for pair in others],
        }
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    say(markdown(draws))
    say(outcome.line)
    return outcome


def drawn(rng: np.random.Generator, number: int, warps: Warps) -> Draw:
    """One street and its registered twin."""
    from recofuse_core.scenes.scene import two_views

    across_m, up_m = float(rng.choice([-1, 1]) * rng.uniform(0.05, 0.15)), float(rng.uniform(-0.05, 0.05))
    right_m = float(rng.uniform(9, 25))
    light, noise, ir_noise = np.exp(rng.uniform(np.log(0.25), 0)), rng.uniform(0, 10), rng.uniform(0, 8)

    def seen(across_m: float, up_m: float) -> tuple[NDArray[np.uint8], NDArray[np.uint16], Field, Rig]:
        views = two_views(number, across_m=across_m, up_m=up_m, height=HEIGHT, width=WIDTH)
        x, y = -views.focal * across_m, views.focal * up_m
        rig = Rig((WIDTH, HEIGHT), (WIDTH, HEIGHT), (1.0, 0.0, -x / right_m, 0.0, 1.0, -y / right_m, 0.0, 0.0, 1.0))
        nearer = 1 / views.depth_m.numpy() - 1 / right_m
        vis = np.rint(views.vis.numpy().transpose(1, 2, 0) * 255 * light).astype(np.uint8)
        return vis, (7000 + 2550 * views.ir[0].numpy()).astype(np.uint16), np.stack([x, y], -1) * nearer[..., None], rig

    def dirty(vis: NDArray[np.uint8], ir: NDArray[np.uint16]) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        grain, heat = rng.normal(0, noise, vis.shape), rng.normal(0, 10 * ir_noise, ir.shape)
        return np.clip(vis + grain, 0, 255).astype(np.uint8), np.clip(ir + heat, 0, 65535).astype(np.uint16)

    vis, ir, field, rig = seen(across_m, up_m)
    warp = warps.of(rig)
    frames = [dirty(vis, ir) for _ in range(NUM_FRAMES)]
    refined_warp(*frames[0], warp, find_warp=warps.of)  # what follows from the rig alone is made once
    started_s = time.process_time()
    first = refined_warp(*frames[0], warp, find_warp=warps.of)
    first.warp.apply(frames[0][1])
    cpu_s = time.process_time() - started_s
    own = [first, *(refined_warp(*frame, warp, find_warp=warps.of) for frame in frames[1:])]
    followed: list[Refined] = []
    track: Track | None = None
    for frame in frames:
        followed.append(refined_warp(*frame, warp, track=track, find_warp=warps.of))
        track = followed[-1].track
    found = field_of(first)
    edges = _edges(ir) * warp.coverage
    before, after = np.linalg.norm(field, axis=2), np.linalg.norm(field - found, axis=2)
    twin = dirty(*seen(0.0, 0.0)[:2])
    still = warps.of(Rig((WIDTH, HEIGHT), (WIDTH, HEIGHT), _IDENTITY))
    return Draw(
        float((before * edges).sum() / edges.sum()),
        float((after * edges).sum() / edges.sum()),
        float(before[warp.coverage].mean()),
        float(after[warp.coverage].mean()),
        first.moved_px,
        first.residual_px,
        refined_warp(*twin, still, find_warp=warps.of).moved_px,
        _jitter(own),
        _jitter(followed),
        cpu_s,
    )


def field_of(refined: Refined) -> Field:
    """By what infrared was moved, for each pixel."""
    if refined.moved_px == 0 or refined.track is None:
        return np.zeros((HEIGHT, WIDTH, 2))
    return np.asarray(cv2.resize(refined.track.field * WIDTH, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR))


def _edges(ir: NDArray[np.uint16]) -> NDArray[np.float32]:
    smooth = cv2.GaussianBlur(ir.astype(np.float32), (0, 0), 1.0)
    return np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))


def _jitter(found: list[Refined]) -> float:
    """Of the later half, where a stream has found its place."""
    fields = [field_of(refined) for refined in found[-(len(found) // 2 + 1) :]]
    return float(np.mean([np.linalg.norm(one - other, axis=2).mean() for one, other in pairwise(fields)]))


def _recorded(folder: Path, warps: Warps) -> Iterator[Recorded]:
    warp: Warp = warps.of(Rig((WIDTH, HEIGHT), (WIDTH, HEIGHT), _IDENTITY))
    shift = np.array([[1, 0, SHIFT[0]], [0, 1, SHIFT[1]]], np.float32)
    for vis, ir in itertools.chain.from_iterable(sets_of(folder).values()):
        moved = cv2.warpAffine(ir, shift, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
        own, other = (refined_warp(vis, each, warp, find_warp=warps.of) for each in (ir, moved))
        error = np.linalg.norm(field_of(other) - field_of(own) - SHIFT, axis=2).mean()
        yield Recorded(own.moved_px, float(error))


# what the draws say


def judge(draws: list[Draw], others: list[Recorded]) -> Outcome:
    """Whether the bars are met."""
    moved = [draw for draw in draws if draw.is_moved]
    ratio = sum(draw.after_px for draw in moved) / max(sum(draw.before_px for draw in moved), 1e-9)
    halved = sum(draw.after_px <= MAX_RATIO * draw.before_px for draw in moved) / max(len(moved), 1)
    harm, cpu_s = max(draw.harm_px for draw in draws), float(np.median([draw.cpu_s for draw in draws]))
    all_met = bool(moved) and ratio <= MAX_RATIO and halved >= SHARE and harm <= MAX_HARM_PX and cpu_s <= MAX_CPU_S
    line = (
        f"bars {'met' if all_met else 'not met'}: {len(moved)} of {len(draws)} frames refined, residual to "
        f"{ratio:.0%} of what it was, {halved:.0%} at least halved; registered twins moved by {harm:.2f} px at most; "
        f"{1e3 * cpu_s:.0f} ms of processor time a frame"
    )
    if others:
        line += f"; recorded pairs: {np.median([pair.error_px for pair in others]):.2f} px of a shift of 5.8 not found"
    return Outcome(draws, others, line, all_met)


def markdown(draws: list[Draw]) -> str:
    """A table: medians of the frames that were moved."""
    moved = [draw for draw in draws if draw.is_moved] or draws
    names = ("before_px", "after_px", "all_before_px", "all_after_px", "own_jitter_px", "jitter_px")
    cells = [f"{np.median([getattr(draw, name) for draw in moved]):.2f}" for name in names]
    return "\n".join([
        "| Streets | Before, px | After | All pixels, before | After | Jitter, frame by frame | Followed |",
        "|--:|--:|--:|--:|--:|--:|--:|",
        f"| {len(moved)} | {' | '.join(cells)} |",
    ])  # fmt: skip


def _told(draw: Draw) -> str:
    what = f"to {draw.after_px:.2f} px" if draw.is_moved else "left alone"
    return (
        f"{draw.before_px:.2f} px {what} (all pixels {draw.all_before_px:.2f}, {draw.all_after_px:.2f}); twin moved by "
        f"{draw.harm_px:.2f}; jitter {draw.own_jitter_px:.2f}, followed {draw.jitter_px:.2f}; {1e3 * draw.cpu_s:.0f} ms"
    )
