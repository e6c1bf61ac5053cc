"""What a rig leaves: how far infrared lies off in one frame, since a rig holds for a range of distances only.

Infrared is laid by the rig, small, and its cues are compared with the visible ones cell by cell, as the calibration
does it (`refinement`): for each cell a surface of likeness by displacement. A smooth field of a few nodes is sought
that collects the most from the surfaces. It counts only if it is confirmed by what it was not made of: the field of
every other cell, as on a board, must make the cells between more alike, and clearly so. Otherwise the frame is left
alone: one camera sees edges that the other does not, and a field that followed them would harm what is registered.

In a stream a frame begins with what the frames before have shown (`Track`). Who sends the frames keeps it and sends it
along, so that whoever does the work keeps nothing. A cut begins anew.

The field is added to the rig's map (`Warp.moved`), so that infrared is still interpolated once.
"""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_rigs.cues import Floats, Mask, cue_map
from recofuse_rigs.errors import BadRigError
from recofuse_rigs.refinement import Vector, likeness_surfaces, quadratics, what_falls
from recofuse_rigs.rig import MAX_PARALLAX, Rig, Size
from recofuse_rigs.search import GreyPair
from recofuse_rigs.warp import Warp, hat_weights, warp_of

NODES = (8, 6)  # columns, rows of a field
_CELLS = (16, 12)  # that are compared: two to a node along each side
_PIXELS = 320 * 240  # of the size at which they are
_MIN_SIDE = 48  # below it cells hold too little
_SIGMA, _SPREAD = 1.0, 0.7  # of the cue maps
_BLURS = (2.0, 0.5)
_STEPS = 5
_LEANING = 0.002  # cost of a squared pixel, at the compared size, between neighbouring nodes; in summed likeness
_BENDING = 0.02  # likewise, of what three in a row differ from a line by
_TETHER = 0.001  # likewise, from where a node began
_CLEARLY = 3.0  # standard errors by which the gain of the cells between must stand out
_MIN_GAIN = 0.03  # and its share of what the cells had in common
_MIN_MOVED = 0.2  # pixels at the compared size: less is not worth it
_MAX_FRAMES = 5  # that a stream's field is a mean of, about
_VAST = 1e30
_MIN_PAIRS = 4  # that tell a rig's bound
_FARTHEST = 95  # percentile of a pair's nodes
_ROOM = 1.4  # times the farthest: other scenes have nearer things
_THUMB = (16, 12)
_CUT = 24.0  # levels by which the thumbnails of one scene differ at the most


@dataclass(frozen=True, eq=False)
class Track:
    """What a stream's frames have shown so far.

    field: (rows, columns, 2), as `Warp.moved` takes it, in shares of the visible width. thumbnail: (12, 16) levels of
    the last frame, by which a cut is seen. num_frames: how many frames the field is a mean of, at most 5.
    """

    field: NDArray[np.float32]
    thumbnail: NDArray[np.uint8]
    num_frames: int

    def to_text(self) -> str:
        """Short ASCII."""
        parts = bytes([self.num_frames]), self.field.astype("<f4").tobytes(), self.thumbnail.tobytes()
        return base64.b64encode(b"".join(parts)).decode()

    @classmethod
    def from_text(cls, text: str) -> Track:
        """Raises BadRigError for what `to_text` did not write."""
        num_nodes, num_levels = NODES[0] * NODES[1] * 2, _THUMB[0] * _THUMB[1]
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRigError("track: not as it was told") from error
        if len(data) != 1 + 4 * num_nodes + num_levels or not 1 <= data[0] <= _MAX_FRAMES:
            raise BadRigError("track: not as it was told")
        field = np.frombuffer(data, "<f4", num_nodes, 1).reshape(NODES[1], NODES[0], 2).astype(np.float32)
        if not (np.abs(field) <= 1).all():  # NaN is not, either
            raise BadRigError("track: not as it was told")
        thumbnail = np.frombuffer(data, np.uint8, num_levels, 1 + 4 * num_nodes).reshape(_THUMB[1], _THUMB[0])
        return cls(field, thumbnail, data[0])


@dataclass(frozen=True, eq=False)
class Refined:
    """One frame's warp, and what was seen, in visible pixels.

    moved_px: how far infrared was moved, in the mean over the frame; 0 if it was left alone. residual_px: how far off
    its parts still are, each by itself; None where nothing is to be seen.
    """

    warp: Warp
    moved_px: float
    residual_px: float | None
    track: Track | None


def refined_warp(
    vis: NDArray[np.uint8],
    infrared: NDArray[Any],
    warp: Warp,
    *,
    track: Track | None = None,
    find_warp: Callable[[Rig], Warp] = warp_of,
) -> Refined:
    """What a rig leaves in this frame, measured and, if that is clear, put right.

    vis: (H, W, 3) RGB or (H, W). infrared: (H, W) as its camera gave it, any depth. track: of the frames before.
    find_warp: how what follows from the rig at the compared size is come by.
    """
    size = _compared_size(warp.rig.vis_size)
    bound = warp.rig.parallax_bound_px * size[0] / warp.rig.vis_size[0]
    if min(size) < _MIN_SIDE or bound <= 0:
        return Refined(warp, 0.0, None, None)
    try:
        small = warp.rig.resized(size, warp.rig.ir_size)
    except BadRigError:  # too large a step between the two, and nothing to be seen of it
        return Refined(warp, 0.0, None, None)
    laying = find_warp(small)
    grey = _grey(vis, size)
    surfaces = _surfaces(grey, laying.apply(_finite(infrared)), laying.coverage, bound)
    per_pixel = warp.rig.vis_size[0] / size[0]
    thumbnail = np.asarray(cv2.resize(grey, _THUMB, interpolation=cv2.INTER_AREA).clip(0, 255), np.uint8)
    if track is not None and _is_cut(track.thumbnail, thumbnail):
        track = None
    before = None if track is None else track.field.reshape(-1, 2).astype(np.float64) * size[0]
    found = _found(surfaces, bound, before, 0 if track is None else track.num_frames)
    field = found.reshape(NODES[1], NODES[0], 2)
    residual = _residual(surfaces, found)
    moved = float(np.linalg.norm(found, axis=1).mean())
    num_frames = min(_MAX_FRAMES, 1 + (0 if track is None else track.num_frames))
    return Refined(
        warp if moved == 0 else warp.moved((field * per_pixel).astype(np.float32)),
        moved * per_pixel,
        None if residual is None else residual * per_pixel,
        Track((field / size[0]).astype(np.float32), thumbnail, num_frames),
    )


def bound_of(pairs: Sequence[GreyPair], rig: Rig) -> float | None:
    """How far off what is nearer or farther than the rig is right for lies in its pairs, visible pixels, with room.

    For `parallax_px` of a rig. None where fewer than half of the pairs tell it clearly, and for fewer than four.
    """
    if len(pairs) < _MIN_PAIRS:
        return None
    most = MAX_PARALLAX * rig.vis_size[0]
    warp = warp_of(replace(rig, parallax_px=most))
    farthest = []
    for pair in pairs:
        refined = refined_warp(np.clip(pair.vis, 0, 255).astype(np.uint8), pair.ir, warp)
        if refined.moved_px > 0 and refined.track is not None:
            lengths = np.linalg.norm(refined.track.field, axis=2) * rig.vis_size[0]
            farthest.append(float(np.percentile(lengths, _FARTHEST)))
    if 2 * len(farthest) < len(pairs):
        return None
    return round(min(_ROOM * max(farthest), most), 1)


def _compared_size(vis_size: Size) -> Size:
    share = min(1.0, float(np.sqrt(_PIXELS / (vis_size[0] * vis_size[1]))))
    return max(1, round(vis_size[0] * share)), max(1, round(vis_size[1] * share))


def _grey(vis: NDArray[np.uint8], size: Size) -> Floats:
    small = vis if vis.shape[1::-1] == size else cv2.resize(vis, size, interpolation=cv2.INTER_AREA)
    values = np.asarray(small, np.float32)
    return values if values.ndim == 2 else np.asarray(cv2.cvtColor(values, cv2.COLOR_RGB2GRAY), np.float32)


def _finite(infrared: NDArray[Any]) -> NDArray[Any]:
    """The lowest value for what is none, or is beyond all sense."""
    if infrared.dtype.kind != "f":
        return infrared
    is_sound = np.abs(infrared) < _VAST
    if is_sound.all():
        return infrared
    return np.where(is_sound, infrared, infrared[is_sound].min() if is_sound.any() else 0)


def _is_cut(before: NDArray[np.uint8], now: NDArray[np.uint8]) -> bool:
    """Whether two frames show different scenes, whatever the light of both."""
    one, other = (levels.astype(np.float32) - levels.mean() for levels in (before, now))
    return float(np.abs(one - other).mean()) > _CUT


# the surfaces, and the field


def _surfaces(grey: Floats, infrared: NDArray[Any], seen: Mask, bound: float) -> Floats:
    """(cells, n, n), row by row."""
    values = infrared.astype(np.float32)
    low, high = np.percentile(values[::2, ::2], (0.1, 99.9))
    levels = np.clip((values - low) * (255 / max(float(high - low), 1e-6)), 0, 255)
    visible = cue_map(grey, sigma=_SIGMA, spread=_SPREAD)
    other = cue_map(np.asarray(levels, np.float32), seen, sigma=_SIGMA, spread=_SPREAD)
    radius = int(np.ceil(bound)) + 2
    return likeness_surfaces(visible, other, seen, radius, blocks=_CELLS, overlapping=1.0)[0]


def _found(surfaces: Floats, bound: float, before: Vector | None, num_frames: int) -> Vector:
    """The nodes' displacements (nodes, 2), at the compared size; 0 where the frame is to be left alone."""
    still = np.zeros((NODES[0] * NODES[1], 2))
    has_any = np.abs(surfaces).max(axis=(1, 2)) > 0
    if has_any.sum() < len(surfaces) // 8:
        return still
    blurred = [_blurred(surfaces, blur) for blur in _BLURS]
    common = abs(float(_values(surfaces, still)[has_any].sum()))
    is_odd = np.indices((_CELLS[1], _CELLS[0])).sum(axis=0).ravel() % 2 == 1
    of_odd, of_even = (_fitted(blurred, has_any & (is_odd == half), bound, before) for half in (True, False))
    foreign = np.where(is_odd, _gains(surfaces, of_even), _gains(surfaces, of_odd))[has_any]
    target = still
    if _is_clear(foreign, common):
        target = _fitted(blurred, has_any, bound, before)
    elif before is not None and _is_clear(_gains(surfaces, before)[has_any], common):
        target = before
    if before is None:
        found = target
    else:
        found = before + (target - before) / min(num_frames + 1, _MAX_FRAMES)
        if _gains(surfaces, found)[has_any].sum() <= 0:  # what was true of the frames before is not of this one
            found = still
    return found if np.linalg.norm(found, axis=1).mean() >= _MIN_MOVED else still


def _is_clear(gains: Vector, common: float) -> bool:
    """Whether what a field gains on cells that it was not made of cannot be chance."""
    error = float(gains.std()) / np.sqrt(len(gains))
    return bool(gains.sum() >= _MIN_GAIN * common and gains.mean() >= _CLEARLY * error and gains.sum() > 0)


def _gains(surfaces: Floats, nodes: Vector) -> Vector:
    """By how much a field makes each cell more alike."""
    return np.asarray(_values(surfaces, nodes) - _values(surfaces, np.zeros_like(nodes)))


def _values(surfaces: Floats, nodes: Vector) -> Vector:
    x, y = (_spread_nodes() @ nodes).T
    return quadratics(surfaces, x, y)[0]


def _fitted(blurred: list[Floats], counted: Mask, bound: float, before: Vector | None) -> Vector:
    """The field (nodes, 2) that collects the most from the counted cells, by Newton's method."""
    weights = _spread_nodes() * counted[:, None]
    spread, stiffness = _spread_nodes(), _stiffness()
    anchor = np.zeros((weights.shape[1], 2)) if before is None else before
    nodes = _begun(blurred[0], counted, bound, anchor)

    def collected(surfaces: Floats, field: Vector) -> float:
        x, y = (spread @ field).T
        likeness = float(quadratics(surfaces, x, y)[0][counted].sum())
        return likeness - float((field * (stiffness @ field)).sum()) - _TETHER * float(((field - anchor) ** 2).sum())

    for surfaces in blurred:
        best, damping = collected(surfaces, nodes), 1e-3
        for _ in range(_STEPS):
            x, y = (spread @ nodes).T
            _, slopes, bends = quadratics(surfaces, x, y)
            slope = weights.T @ slopes - 2 * stiffness @ nodes - 2 * _TETHER * (nodes - anchor)
            bend = _bend(counted, bends)
            scale = float(np.trace(bend)) / len(bend)
            for _ in range(4):
                steep = bend + damping * scale * np.eye(len(bend))
                _, solved = cv2.solve(steep, slope.T.reshape(-1, 1), flags=cv2.DECOMP_CHOLESKY)
                change = np.asarray(solved, np.float64).ravel()
                change *= min(1.0, 2 / max(float(np.abs(change).max()), 1e-9))
                moved = _bounded(nodes + change.reshape(2, -1).T, bound)
                value = collected(surfaces, moved)
                if value > best:
                    is_done = bool(np.abs(moved - nodes).max() < 0.02)
                    nodes, best, damping = moved, value, max(damping / 5, 1e-4)
                    break
                damping *= 8
            else:
                break
            if is_done:
                break
    return nodes


def _begun(surfaces: Floats, counted: Mask, bound: float, anchor: Vector) -> Vector:
    """Where to begin: the shift that all cells together like best, or where the frame before ended."""
    total = surfaces[counted].sum(axis=0)
    radius = total.shape[0] // 2
    row, column = np.unravel_index(int(total.argmax()), total.shape)
    shift = _bounded(np.array([[column - radius, row - radius]], np.float64), bound)
    places = [np.zeros_like(anchor), np.broadcast_to(shift, anchor.shape).copy(), anchor]
    return places[int(np.argmax([float(_values(surfaces, place)[counted].sum()) for place in places]))]


def _bend(counted: Mask, bends: Vector) -> Vector:
    """The curvature of what is collected, (2 nodes, 2 nodes), x of all nodes before y; valleys count as flat."""
    falling = what_falls(bends)
    num = NODES[0] * NODES[1]
    bend = np.empty((2 * num, 2 * num))
    # A cell depends on four nodes at the most, so this is summed by places and not by a product of whole matrices.
    cells, places, products = _node_pairs()
    products = products * counted[cells]
    for i in range(2):
        for j in range(i, 2):
            part = np.bincount(places, products * falling[cells, i, j], num * num).reshape(num, num)
            bend[i * num : (i + 1) * num, j * num : (j + 1) * num] = part
            bend[j * num : (j + 1) * num, i * num : (i + 1) * num] = part
    cost = 2 * (_stiffness() + _TETHER * np.eye(num))
    bend[:num, :num] += cost
    bend[num:, num:] += cost
    return bend


def _bounded(nodes: Vector, bound: float) -> Vector:
    length = np.linalg.norm(nodes, axis=1, keepdims=True)
    return np.asarray(nodes * np.minimum(1, bound / np.maximum(length, 1e-9)))


def _blurred(surfaces: Floats, sigma: float) -> Floats:
    return np.stack([
        np.asarray(cv2.GaussianBlur(surface, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE), np.float32)
        for surface in surfaces
    ])  # fmt: skip


@functools.cache
def _spread_nodes() -> Vector:
    """(cells, nodes): how the nodes' displacements make each cell's."""
    down, across = (hat_weights(count, nodes) for count, nodes in zip(_CELLS[::-1], NODES[::-1], strict=True))
    return np.asarray(np.kron(down, across), np.float64)


@functools.cache
def _node_pairs() -> tuple[NDArray[np.intp], NDArray[np.intp], Vector]:
    """For each cell and each two nodes of it: the cell, where the two stand in a matrix of nodes, and their weights."""
    spread = _spread_nodes()
    weights = spread[:, :, None] * spread[:, None, :]
    cells, one, other = np.nonzero(weights)
    return cells, one * spread.shape[1] + other, weights[cells, one, other]


@functools.cache
def _stiffness() -> Vector:
    """(nodes, nodes): the cost of a field that bends, and a little of one that leans, as the ground does."""
    columns, rows = NODES
    flat_x, flat_y = np.eye(columns), np.eye(rows)
    lean_x, lean_y = np.diff(flat_x, axis=0), np.diff(flat_y, axis=0)
    leans = np.vstack([np.kron(flat_y, lean_x), np.kron(lean_y, flat_x)])
    twists = np.kron(lean_y, lean_x)
    bends = np.vstack([np.kron(flat_y, np.diff(lean_x, axis=0)), np.kron(np.diff(lean_y, axis=0), flat_x)])
    return np.asarray(_LEANING * leans.T @ leans + _BENDING * (bends.T @ bends + 2 * twists.T @ twists))


def _residual(surfaces: Floats, nodes: Vector) -> float | None:
    """How far each part of the frame, four cells by four, would still go alone; weighted by what it has to say."""
    columns, rows = _CELLS
    side = surfaces.shape[1]
    radius = side // 2
    moves = _spread_nodes() @ nodes
    grid = surfaces.reshape(rows, columns, side, side)
    field = moves.reshape(rows, columns, 2)
    distances, weights = [], []
    for top in range(0, rows - 3, 2):
        for left in range(0, columns - 3, 2):
            surface = grid[top : top + 4, left : left + 4].mean(axis=(0, 1))
            x, y = field[top : top + 4, left : left + 4].mean(axis=(0, 1))
            blurred = cv2.GaussianBlur(surface, (0, 0), 1.0, borderType=cv2.BORDER_REPLICATE)
            row, column = np.unravel_index(int(blurred.argmax()), blurred.shape)
            weights.append(max(float(blurred.max() - np.median(blurred)), 0.0))
            distances.append(float(np.hypot(column - radius - x, row - radius - y)))
    total = sum(weights)
    return sum(d * w for d, w in zip(distances, weights, strict=True)) / total if total > 0 else None
