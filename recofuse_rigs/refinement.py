"""From about right to a fraction of a pixel: a homography that all blocks of all pairs agree on.

Infrared is laid on the visible grid as well as is known. The frame is cut into overlapping blocks, and for each the
likeness of edges and learned maps is worked out for every small displacement: a surface, averaged over pairs. A
homography moves each block by some displacement; the one is sought whose values on the surfaces add up to the most. So
a block that shows one long edge speaks for its direction alone, and one that shows nothing is not heard. From small
pictures to large ones.

The optimum is found by Newton's method over the displacements of the frame's four corners, on surfaces that are first
blurred. A prior draws towards a similarity, as far as cameras that look the same way are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_rigs.cues import Floats, Mask, cue_map, energy_of, laid, resized
from recofuse_rigs.learned import Side, learned_maps
from recofuse_rigs.rig import Matrix, Size, corners_of, mapped, resizing
from recofuse_rigs.search import EMPTY, GreyPair, size_of

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Level:
    """One size of picture. radius: the farthest displacement, in its pixels; sigma, spread: of its edges.

    maps: share of the learned maps in the likeness, the rest of which is edges'.
    """

    width: int
    radius: int
    repeats: int
    sigma: float
    spread: float
    maps: float


COARSE = Level(160, 6, 2, 1.0, 1.0, 0.6)
FINE = (Level(320, 8, 2, 1.2, 1.0, 0.7), Level(640, 8, 2, 1.5, 1.0, 0.3))
JUDGED = Level(320, 0, 0, 1.2, 1.0, 0.5)  # on which results are compared
BLOCKS = (8, 6)
PRIOR = (
    1.2e-4  # cost to one pair of a squared pixel, at 640, by which a corner leaves the similarity; in summed likeness
)

_OVERLAPPING = 1.5  # side of a block in distances between blocks
_COVERED = 0.5  # share of a block that infrared must reach
_EMPTY_BLOCK = 0.01  # mean energy that the denominator holds besides, so that noise is not stretched
_BLURS = (2.0, 1.0, 0.6)
_NEWTON_STEPS = 8
_PARABOLA = np.array([  # of nine samples, row by row: value, slopes along x and y, curvatures xx, yy and xy
    [0, 0, 0, 0, 1, 0, 0, 0, 0],
    [0, 0, 0, -0.5, 0, 0.5, 0, 0, 0],
    [0, -0.5, 0, 0, 0, 0, 0, 0.5, 0],
    [0, 0, 0, 1, -2, 1, 0, 0, 0],
    [0, 1, 0, 0, -2, 0, 0, 1, 0],
    [0.25, 0, -0.25, 0, 0, 0, -0.25, 0, 0.25],
]).T  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fit:
    """Where the infrared lies, and what the last surfaces say of it.

    surfaces: (pairs, blocks, 2 radius + 1, 2 radius + 1) likeness by displacement (rows, columns) from where it lay
    before the last step. step: (8,) what that step moved the frame's corners by; drift: all steps, in pixels of a frame
    640 wide. centres: (blocks, 2). size: of the frame in which these are pixels.
    """

    matrix: Matrix
    surfaces: Floats
    step: Vector
    drift: Vector
    centres: Vector
    size: Size


def refined(pairs: Sequence[GreyPair], matrix: Matrix, levels: Sequence[Level]) -> Fit:
    """Improve `matrix`, infrared pixels to visible ones, on all pairs together."""
    vis_size = size_of(pairs[0].vis)
    drift = np.zeros(8)  # of the corners since the start, in pixels of 640
    fit: Fit | None = None
    for level in levels:
        size = level.width, max(16, round(level.width * vis_size[1] / vis_size[0]))
        per_pixel = 640 / level.width
        to_level = resizing(vis_size, size)
        visible = [cues_of(resized(pair.vis, size), "vis", level) for pair in pairs]
        for _ in range(level.repeats):
            placed = to_level @ matrix
            surfaces, centres = _surfaces_of_all(pairs, visible, placed, size, level)
            step = best_step(surfaces.mean(axis=0), centres, size, drift, len(pairs))
            drift = drift + step * per_pixel
            matrix = np.linalg.inv(to_level) @ np.linalg.inv(by_corners(step, size)) @ placed
            fit = Fit(matrix, surfaces, step, drift, centres, size)
    assert fit is not None  # levels repeat at least once
    return fit


def likeness(pairs: Sequence[GreyPair], matrix: Matrix, level: Level = JUDGED) -> Vector:
    """How alike the cues of each pair are where infrared lies by `matrix`: at most 1, and about 0 by chance."""
    vis_size = size_of(pairs[0].vis)
    size = level.width, max(16, round(level.width * vis_size[1] / vis_size[0]))
    placed = resizing(vis_size, size) @ matrix
    scores = np.zeros(len(pairs))
    for index, pair in enumerate(pairs):
        picture, seen = laid(pair.ir, placed, size)
        both = zip(cues_of(resized(pair.vis, size), "vis", level), cues_of(picture, "ir", level, seen), strict=True)
        for (visible, share), (infrared, _) in both:
            energy = energy_of(visible)
            floor = EMPTY * float(energy.sum())
            bound = (float(energy[seen].sum()) + floor) * (float(energy_of(infrared).sum()) + floor)
            scores[index] += share * float((visible * infrared).sum()) / max(float(np.sqrt(bound)), 1e-9)
    return scores


def cues_of(picture: Floats, side: Side, level: Level, seen: Mask | None = None) -> list[tuple[Floats, float]]:
    """Edges and learned maps of (H, W), each with its share in the likeness; what has none is left out."""
    found = []
    if level.maps < 1:
        found.append((cue_map(picture, seen, sigma=level.sigma, spread=level.spread), 1 - level.maps))
    if level.maps > 0:
        found.append((learned_maps(picture, side, seen), level.maps))
    return found


def by_corners(moves: Vector, size: Size) -> Matrix:
    """The homography that moves the corners of a frame by (8,): x and y of each, clockwise from the first."""
    corners = corners_of(size).astype(np.float32)
    moved = corners + moves.reshape(4, 2).astype(np.float32)
    return np.asarray(cv2.getPerspectiveTransform(corners, moved), np.float64)


# the surfaces


def _surfaces_of_all(
    pairs: Sequence[GreyPair],
    visible: Sequence[list[tuple[Floats, float]]],
    placed: Matrix,
    size: Size,
    level: Level,
) -> tuple[Floats, Vector]:
    side = 2 * level.radius + 1
    found = []
    centres = np.zeros((0, 2))
    for pair, ours in zip(pairs, visible, strict=True):
        picture, seen = laid(pair.ir, placed, size)
        total = np.zeros((BLOCKS[0] * BLOCKS[1], side, side), np.float32)
        for (own, share), (other, _) in zip(ours, cues_of(picture, "ir", level, seen), strict=True):
            surfaces, centres = likeness_surfaces(own, other, seen, level.radius)
            total += np.float32(share) * surfaces
        found.append(total)
    return np.stack(found), centres


def likeness_surfaces(
    visible: Floats,
    infrared: Floats,
    seen: Mask,
    radius: int,
    *,
    blocks: tuple[int, int] = BLOCKS,
    overlapping: float = _OVERLAPPING,
) -> tuple[Floats, Vector]:
    """How alike two cue maps are by displacement of the infrared one, block by block.

    blocks: columns and rows of them. overlapping: a block's side in distances between blocks. Returns
    (blocks, 2 radius + 1, 2 radius + 1) and the blocks' centres (blocks, 2).
    """
    height, width = seen.shape
    wide = min(width, int(overlapping * width / blocks[0]))
    high = min(height, int(overlapping * height / blocks[1]))
    padded = cv2.copyMakeBorder(infrared, radius, radius, radius, radius, cv2.BORDER_CONSTANT, value=0)
    sums = cv2.integral(energy_of(np.asarray(padded, np.float32)))
    floor = _EMPTY_BLOCK * wide * high
    surfaces, centres = [], []
    for top in np.rint(np.linspace(0, height - high, blocks[1])).astype(int):
        for left in np.rint(np.linspace(0, width - wide, blocks[0])).astype(int):
            centres.append((left + (wide - 1) / 2, top + (high - 1) / 2))
            if seen[top : top + high, left : left + wide].mean() < _COVERED:
                surfaces.append(np.zeros((2 * radius + 1, 2 * radius + 1), np.float32))
                continue
            block = visible[top : top + high, left : left + wide]
            around = padded[top : top + high + 2 * radius, left : left + wide + 2 * radius]
            alike = cv2.matchTemplate(around, block, cv2.TM_CCORR)
            near = sums[top : top + high + 2 * radius + 1, left : left + wide + 2 * radius + 1]
            other = near[high:, wide:] - near[:-high, wide:] - near[high:, :-wide] + near[:-high, :-wide]
            bound = (float(energy_of(block).sum()) + floor) * (np.maximum(other, 0) + floor)
            surfaces.append(np.asarray(alike / np.sqrt(bound), np.float32))
    return np.stack(surfaces), np.array(centres)


# the optimum


def best_step(
    surfaces: Floats, centres: Vector, size: Size, drift: Vector, num_pairs: int, start: Vector | None = None
) -> Vector:
    """The corners' displacement (8,) that collects the most from the surfaces (blocks, n, n), less the prior's cost.

    surfaces: means over num_pairs, against which the prior counts once. drift: what the corners have moved by before,
    in pixels of a frame 640 wide. start: where to begin.
    """
    per_pixel = 640 / size[0]
    leaving = _beyond_similarity(size)
    cost = PRIOR / num_pairs * per_pixel**2
    earlier = drift / per_pixel
    step = np.zeros(8) if start is None else start

    def collected(blurred: Floats, moves: Vector) -> float:
        x, y = (mapped(by_corners(moves, size), centres) - centres).T
        return float(quadratics(blurred, x, y)[0].sum()) - cost * float(((leaving @ (moves + earlier)) ** 2).sum())

    for blur in _BLURS:
        blurred = np.stack([
            np.asarray(cv2.GaussianBlur(surface, (0, 0), blur, borderType=cv2.BORDER_REPLICATE), np.float32)
            for surface in surfaces
        ])  # fmt: skip
        best, damping = collected(blurred, step), 1e-3
        for _ in range(_NEWTON_STEPS):
            moved, jacobian = _moves(step, centres, size)
            _, slopes, bends = quadratics(blurred, moved[:, 0], moved[:, 1])
            falling = what_falls(bends)
            slope = np.einsum("nij,ni->j", jacobian, slopes) - 2 * cost * leaving @ (step + earlier)
            bend = np.einsum("nia,nij,njb->ab", jacobian, falling, jacobian) + 2 * cost * leaving
            scale = float(np.trace(bend)) / 8
            for _ in range(6):
                change = np.linalg.solve(bend + (damping * scale + 1e-9) * np.eye(8), slope)
                change *= min(1.0, 3 / max(float(np.abs(change).max()), 1e-9))
                value = collected(blurred, step + change)
                if value > best:
                    step, best, damping = step + change, value, max(damping / 5, 1e-5)
                    break
                damping *= 5
            else:
                break
            if np.abs(change).max() < 0.01:
                break
    return step


def quadratics(surfaces: Floats, x: Vector, y: Vector) -> tuple[Vector, Vector, Vector]:
    """Value (n,), slope (n, 2) and curvature (n, 2, 2) of surfaces at displacements, by nine samples' parabola."""
    side = surfaces.shape[1]
    radius = side // 2
    x, y = np.clip(x + radius, 1, 2 * radius - 1), np.clip(y + radius, 1, 2 * radius - 1)
    column, row = np.rint(x).astype(int), np.rint(y).astype(int)
    over_x, over_y = x - column, y - row
    middles = (np.arange(len(surfaces)) * side + row) * side + column
    around = np.add.outer([-side, 0, side], [-1, 0, 1]).ravel()
    samples = np.take(surfaces, middles[:, None] + around).astype(np.float64)  # (n, 9), row by row
    middle, slope_x, slope_y, xx, yy, xy = (samples @ _PARABOLA).T
    value = (
        middle + slope_x * over_x + slope_y * over_y + 0.5 * (xx * over_x**2 + yy * over_y**2) + xy * over_x * over_y
    )
    slopes = np.stack([slope_x + xx * over_x + xy * over_y, slope_y + yy * over_y + xy * over_x], axis=-1)
    bends = np.stack([xx, xy, xy, yy], axis=-1).reshape(-1, 2, 2)
    return value, slopes, bends


def what_falls(bends: Vector) -> Vector:
    """Of curvatures (n, 2, 2), how much each falls away along its axes, (n, 2, 2): what is a valley is none.

    In closed form, since a solver of eigenvalues costs as much as all else of a step.
    """
    xx, xy, yy = bends[:, 0, 0], bends[:, 0, 1], bends[:, 1, 1]
    middle, apart = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    steepest, flattest = np.maximum(apart - middle, 0), np.maximum(-middle - apart, 0)
    share = (flattest - steepest) / np.maximum(2 * apart, 1e-30)
    found = share[:, None, None] * bends
    found[:, [0, 1], [0, 1]] += (steepest - share * (middle - apart))[:, None]
    return np.asarray(found)


def _moves(step: Vector, centres: Vector, size: Size) -> tuple[Vector, Vector]:
    """How the homography of a step moves the centres (n, 2), and its derivative by the step (n, 2, 8)."""
    moved = mapped(by_corners(step, size), centres)
    jacobian = np.zeros((len(centres), 2, 8))
    for index in range(8):
        nudged = step.copy()
        nudged[index] += 0.5
        jacobian[:, :, index] = (mapped(by_corners(nudged, size), centres) - moved) / 0.5
    return moved - centres, jacobian


def _beyond_similarity(size: Size) -> Matrix:
    """Projects corner displacements (8,) on what no shift, turn or scaling does."""
    x, y = (corners_of(size) - corners_of(size).mean(axis=0)).T
    ways = np.zeros((8, 4))
    ways[0::2, 0] = ways[1::2, 1] = 1
    ways[0::2, 2], ways[1::2, 2] = x, y
    ways[0::2, 3], ways[1::2, 3] = -y, x
    orthonormal, _ = np.linalg.qr(ways)
    return np.asarray(np.eye(8) - orthonormal @ orthonormal.T, np.float64)
