"""How well rigs are found: infrared is moved by known homographies, and `calibrate` says where it lies.

Scenes are generated streets, registered by construction, and the registered pairs of a folder, cut to 4:3 and brought
to 640x480. A draw takes one pair or ten, one infrared size, and one homography: scale 0.6 to 1.6 of the field of view,
rotation up to 10 degrees, shift up to 15 %, every corner displaced by up to 3 % besides; then the visible pictures are
darkened (down to a quarter) and both sides get noise. What the moved frame shows beyond its source is mirrored.

The error is the mean distance, in visible pixels at 640x480, at the corners of what both cameras see: the infrared
frame's corners, brought to the nearest pixel of the visible frame. Two methods run beside ours, on the same pairs:
OpenCV's ECC (homography, from the two frames laid on each other, pyramid of three), and SIFT with RANSAC; of ten pairs,
ECC's is the median over the first three, and SIFT's matches are put together.

What a newcomer would get wrong: recorded pairs are registered to a few pixels only, and each data set otherwise, so
against the files' registration the error is that of the files as well. Therefore the same pairs are calibrated unmoved
and undegraded too, begun at the files' registration, by what the moved infrared shows of them: a second reference,
which holds what the files are off by. The difference to it is what moving, darkening, noise and the search from nothing
cost; what the method itself may get wrong of every recorded pair is in both and shows in neither. Bars are judged by it
(of streets, which are exact, both are one), and the errors by the files stand beside. Ten pairs are of one camera where
the folder has ten of one, by what their names begin with; else they are of several, and no rig.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import machine
from recofuse_images.picture import grey_of
from recofuse_rigs.calibration import calibrate, grey_pair
from recofuse_rigs.placing import sets_of
from recofuse_rigs.rig import Matrix, Size, corners_of, mapped
from recofuse_rigs.search import GreyPair

Grey = NDArray[np.uint8]
Scene = tuple[Grey, Grey]  # registered, 640x480

WIDTH, HEIGHT = 640, 480
IR_SIZES: tuple[Size, ...] = ((640, 480), (384, 288), (320, 256), (320, 240), (640, 512))
MANY = 10
FAILED_PX = 1e3  # of a method that found nothing
BOUNDS_PX = {1: 2.0, MANY: 1.0}
SHARES = {1: 0.8, MANY: 0.95}
MIN_UNSURE = 0.9


@dataclass(frozen=True, slots=True)
class Draw:
    """One calibration and what the others made of the same pairs: errors in pixels. own_px: against where the pairs lie
    unmoved, which is not where files of recorded ones have it.
    """

    scenes: str
    num_pairs: int
    error_px: float
    own_px: float
    ecc_px: float
    sift_px: float
    is_sure: bool
    spread_px: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All draws, and whether the bars are met."""

    draws: list[Draw]
    line: str
    all_met: bool


def run(
    pairs: Path | None,
    *,
    singles: int,
    tens: int,
    seed: int = 0,
    json_path: Path | None = None,
    say: Callable[[str], None],
) -> Outcome:
    """Measure on generated streets and, if given, on a folder with vis and ir."""
    cv2.setNumThreads(1)
    sources = {"streets": {"streets": streets(24)}}
    if pairs is not None:
        sources["folder"] = sets_of(pairs)
    draws: list[Draw] = []
    for name, cameras in sources.items():
        rng = np.random.default_rng(seed)
        everything = [scene for scenes in cameras.values() for scene in scenes]
        rigs = [scenes for scenes in cameras.values() if len(scenes) >= MANY] or [everything]
        for count, times in ((1, singles), (MANY, tens)):
            for number in range(times):
                draws.append(drawn(rng, name, everything if count == 1 else rigs[number % len(rigs)], count))
                say(_told(draws[-1]))
    outcome = judge(draws)
    if json_path is not None:
        document = {
            "machine": machine(),
            "line": outcome.line,
            "all_met": outcome.all_met,
            "draws": [asdict(d) for d in draws],
        }
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    say(markdown(draws))
    say(outcome.line)
    return outcome


def streets(count: int) -> list[Scene]:
    """Generated scenes."""
    from recofuse_core.scenes.scene import make_scene

    found = []
    for seed in range(1, count + 1):
        scene = make_scene(seed, HEIGHT, WIDTH)
        vis = np.rint(scene.vis.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
        found.append((np.asarray(grey_of(vis), np.uint8), np.rint(scene.ir.numpy()[0] * 255).astype(np.uint8)))
    return found


def homography(rng: np.random.Generator, ir_size: Size) -> Matrix:
    """Infrared pixels to visible ones, as the module's text has it."""
    scale, angle = np.exp(rng.uniform(np.log(0.6), np.log(1.6))), np.deg2rad(rng.uniform(-10, 10))
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    x, y = WIDTH / 2 + rng.uniform(-0.15, 0.15) * WIDTH, HEIGHT / 2 + rng.uniform(-0.15, 0.15) * HEIGHT
    turn = np.array([[cosine, -sine, x], [sine, cosine, y], [0, 0, 1]]) @ [
        [1, 0, -WIDTH / 2],
        [0, 1, -HEIGHT / 2],
        [0, 0, 1],
    ]
    corners = corners_of((WIDTH, HEIGHT))
    bent = corners + rng.uniform(-0.03, 0.03, (4, 2)) * [WIDTH, HEIGHT]
    lean = cv2.getPerspectiveTransform(corners.astype(np.float32), bent.astype(np.float32))
    return np.asarray(turn @ lean @ np.diag([WIDTH / ir_size[0], HEIGHT / ir_size[1], 1]), np.float64)


def drawn(rng: np.random.Generator, name: str, scenes: Sequence[Scene], count: int) -> Draw:
    """One draw, calibrated by all methods."""
    ir_size = IR_SIZES[int(rng.integers(len(IR_SIZES)))]
    truth = homography(rng, ir_size)
    light, noise, ir_noise = np.exp(rng.uniform(np.log(0.25), 0)), rng.uniform(0, 10), rng.uniform(0, 8)
    picked = [scenes[index] for index in rng.permutation(len(scenes))[:count]]
    pairs = []
    for vis, ir in picked:
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        moved = cv2.warpPerspective(ir, truth, ir_size, flags=flags, borderMode=cv2.BORDER_REFLECT_101)
        pairs.append(grey_pair(_noisy(rng, vis * light, noise), _noisy(rng, moved, ir_noise)))
    started_s = time.process_time()
    found = calibrate(pairs)
    cpu_s = time.process_time() - started_s
    error = own = error_px(found.matrix, truth, ir_size)
    if name != "streets":
        own = error_px(found.matrix, unmoved(picked, truth, ir_size) @ truth, ir_size)
    return Draw(
        name,
        count,
        error,
        own,
        error_px(ecc(pairs, ir_size), truth, ir_size),
        error_px(sift(pairs), truth, ir_size),
        found.is_sure,
        found.spread_px,
        cpu_s,
    )


def unmoved(picked: Sequence[Scene], truth: Matrix, ir_size: Size) -> Matrix:
    """Where infrared of these scenes lies before it is moved, by the part of it that is seen afterwards."""
    reach = mapped(truth, corners_of(ir_size))
    left, top = np.clip(np.floor(reach.min(axis=0)), 0, [WIDTH - 1, HEIGHT - 1]).astype(int)
    right, bottom = np.clip(np.ceil(reach.max(axis=0)), 0, [WIDTH - 1, HEIGHT - 1]).astype(int)
    place = np.array([[1.0, 0, left], [0, 1, top], [0, 0, 1]])
    pairs = [grey_pair(vis, ir[top : bottom + 1, left : right + 1]) for vis, ir in picked]
    return calibrate(pairs, start=place).matrix @ np.linalg.inv(place)


def _noisy(rng: np.random.Generator, picture: NDArray[Any], strength: float) -> Grey:
    return np.asarray(np.clip(picture + rng.normal(0, 1, picture.shape) * strength, 0, 255), np.uint8)


def error_px(found: Matrix | None, truth: Matrix, ir_size: Size) -> float:
    """Mean distance at the corners of what both cameras see."""
    if found is None:
        return FAILED_PX
    seen = np.asarray(np.clip(mapped(truth, corners_of(ir_size)), 0, [WIDTH - 1, HEIGHT - 1]), np.float64)
    with np.errstate(all="ignore"):
        placed = mapped(found, mapped(np.linalg.inv(truth), seen))
    distance = float(np.linalg.norm(placed - seen, axis=1).mean())
    return min(distance, FAILED_PX) if np.isfinite(distance) else FAILED_PX


def ecc(pairs: Sequence[GreyPair], ir_size: Size) -> Matrix | None:
    """OpenCV's ECC, from the two frames laid on each other."""
    base = np.diag([WIDTH / ir_size[0], HEIGHT / ir_size[1], 1])
    found = []
    for pair in pairs[:3]:  # it is slow, and fails alike
        warp = np.eye(3, dtype=np.float32)
        laid = cv2.warpPerspective(pair.ir, base, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REPLICATE)
        try:
            for level in (4, 2, 1):
                size = WIDTH // level, HEIGHT // level
                scale = np.diag([level, level, 1.0])
                small = (np.linalg.inv(scale) @ warp @ scale).astype(np.float32)
                criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-4)
                _, better = cv2.findTransformECC(
                    cv2.resize(pair.vis, size), cv2.resize(laid, size), small, cv2.MOTION_HOMOGRAPHY, criteria
                )
                warp = (scale @ np.asarray(better) @ np.linalg.inv(scale)).astype(np.float32)
        except cv2.error:
            continue
        matrix = np.linalg.inv(warp.astype(np.float64)) @ base
        found.append(matrix / matrix[2, 2])
    return np.median(found, axis=0) if found else None


def sift(pairs: Sequence[GreyPair]) -> Matrix | None:
    """SIFT, Lowe's ratio, RANSAC over the matches of all pairs."""
    detector, matcher = cv2.SIFT.create(2000), cv2.BFMatcher()
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    for pair in pairs:
        points, features = detector.detectAndCompute(pair.vis.astype(np.uint8), None)
        others, described = detector.detectAndCompute(pair.ir.astype(np.uint8), None)
        if features is None or described is None or len(features) < 2 or len(described) < 2:
            continue
        for match in matcher.knnMatch(described, features, k=2):
            if match[0].distance < 0.8 * match[1].distance:
                theirs.append((others[match[0].queryIdx].pt[0], others[match[0].queryIdx].pt[1]))
                ours.append((points[match[0].trainIdx].pt[0], points[match[0].trainIdx].pt[1]))
    if len(ours) < 4:
        return None
    matrix, _ = cv2.findHomography(np.array(theirs, np.float64), np.array(ours, np.float64), cv2.RANSAC, 4.0)
    return None if matrix is None else np.asarray(matrix, np.float64)


# what the draws say


def judge(draws: Sequence[Draw]) -> Outcome:
    """Whether the bars are met on each kind of scene, by where pairs lie unmoved."""
    parts, all_met = [], True
    for name in dict.fromkeys(draw.scenes for draw in draws):
        for count, bound in BOUNDS_PX.items():
            own = [draw for draw in draws if (draw.scenes, draw.num_pairs) == (name, count)]
            if own:
                share = sum(draw.own_px <= bound for draw in own) / len(own)
                by_files = sum(draw.error_px <= bound for draw in own) / len(own)
                all_met &= share >= SHARES[count]
                beside = "" if name == "streets" else f" ({by_files:.0%} by the files' registration)"
                parts.append(
                    f"{name}, pairs of a draw {count}: {share:.0%} of {len(own)} within {bound:.0f} px{beside}"
                )
        wrong = [draw for draw in draws if draw.scenes == name and draw.own_px > BOUNDS_PX[draw.num_pairs]]
        if wrong:
            unsure = sum(not draw.is_sure for draw in wrong) / len(wrong)
            all_met &= unsure >= MIN_UNSURE
            parts.append(f"{name}: unsure of {unsure:.0%} of the {len(wrong)} others")
    return Outcome(list(draws), f"bars {'met' if all_met else 'not met'}: {'; '.join(parts)}", all_met)


def markdown(draws: Sequence[Draw]) -> str:
    """A table: medians, and shares within the bound."""
    lines = [
        "| Scenes | Pairs | Draws | By files | Within | Unmoved | Within | ECC | Within | SIFT | Within | Sure | s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, count in dict.fromkeys((draw.scenes, draw.num_pairs) for draw in draws):
        own = [draw for draw in draws if (draw.scenes, draw.num_pairs) == (name, count)]
        cells = []
        for kind in ("error_px", "own_px", "ecc_px", "sift_px"):
            values = np.array([getattr(draw, kind) for draw in own])
            cells.append(f"{np.median(values):.2f} | {(values <= BOUNDS_PX[count]).mean():.0%}")
        sure = sum(draw.is_sure for draw in own) / len(own)
        cpu_s = float(np.mean([draw.cpu_s for draw in own]))
        lines.append(f"| {name} | {count} | {len(own)} | {' | '.join(cells)} | {sure:.0%} | {cpu_s:.1f} |")
    return "\n".join(lines)


def _told(draw: Draw) -> str:
    return (
        f"{draw.scenes}, {draw.num_pairs}: {draw.error_px:.2f} px ({draw.own_px:.2f}), "
        f"{'sure' if draw.is_sure else 'unsure'} (spread {draw.spread_px:.2f}), "
        f"ECC {draw.ecc_px:.0f}, SIFT {draw.sift_px:.0f}"
    )
