"""Levels of a stream's pictures, held steady from frame to frame where the scene stands still.

Curves, lighting and the widening of the range are estimated from each frame anew, and noise moves them. Whatever moves
them, it is seen in the pictures: cells whose inputs are as they were come out brighter or darker, all of one level by
much the same. So every frame tells means of its cells (`Seen`), a stream keeps a running mean of them (`Memory`), and a
frame's levels are brought close to that by one curve a channel (`steadied`). This works on the pictures of any runtime,
and what has to be known of the frames before is a few thousand numbers.

What a newcomer would get wrong: the memory is of pictures as they were before they were steadied, and of all of them.
So it does not matter how many frames are at work at once, nor which frame was the last that had ended. What moves is
not compared with what was there; after a cut nothing is as it was, and the frame stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.uint8]
Floats = NDArray[np.float32]

Name = TypeVar("Name", bound=str)  # of a part

GRID = 32  # cells a side that pictures are averaged to, so that noise hardly moves them
MAGIC = b"RFS1"
STILL = 4.0  # levels that a cell of the inputs may change and count as standing still
MIN_STILL = 0.1  # share of the cells below which a frame begins anew
OWN = 0.1  # what a frame keeps of its own levels
FOLLOWED = 0.15  # of a new frame, by the memory
LARGEST = 24.0  # levels that are taken back at most
KNOTS = np.linspace(0, 255, 17, dtype=np.float32)  # of a curve
FEW = 8.0  # cells that the median of all weighs as, at every knot
_EVERY = np.arange(256, dtype=np.float32)
_SCALE = 256  # units of a level as they travel
_CHANNELS = {"vis": 3, "ir": 1, "fused": 3}


@dataclass(frozen=True)
class Seen:
    """Cell means of a frame: of its inputs (GRID, GRID, 4), vis before ir, and of its pictures by part."""

    given: Floats
    shown: Mapping[str, Floats]

    def to_bytes(self) -> bytes:
        """Some kilobytes."""
        parts = [name for name in _CHANNELS if name in self.shown]
        planes = np.concatenate([self.given, *(self.shown[name] for name in parts)], axis=2)
        numbers = np.rint(planes * _SCALE).clip(0, 0xFFFF).astype("<u2")
        return b"".join((MAGIC, ",".join(parts).encode(), b"\n", numbers.tobytes()))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Seen:
        """The inverse of `to_bytes`, but for rounding. Raises ValueError for anything else."""
        head, _, body = raw.partition(b"\n")
        names = head.removeprefix(MAGIC).decode("ascii", "replace").split(",") if head != MAGIC else []
        if not head.startswith(MAGIC) or not set(names) <= _CHANNELS.keys() or len(set(names)) != len(names):
            raise ValueError("this is not what was seen of a frame")
        counts = [4, *(_CHANNELS[name] for name in names)]
        if len(body) != 2 * GRID * GRID * sum(counts):
            raise ValueError("what was seen of a frame is cut short")
        planes: Floats = np.frombuffer(body, "<u2").reshape(GRID, GRID, -1).astype(np.float32) / np.float32(_SCALE)
        ends = np.cumsum(counts)
        given, *shown = (planes[..., end - count : end] for count, end in zip(counts, ends, strict=True))
        return cls(given, dict(zip(names, shown, strict=True)))


def averaged(picture: Levels) -> Floats:
    """(GRID, GRID, C) means of (H, W) or (H, W, C) levels, sides of GRID at least."""
    rows, columns = (np.arange(GRID + 1) * side // GRID for side in picture.shape[:2])
    heights, widths = np.diff(rows), np.diff(columns)
    # Short numbers, and row by row of cells: a sixth of what summing by index costs.
    dtype = np.uint16 if heights.max() * 255 <= np.iinfo(np.uint16).max else np.uint32
    lines = picture.reshape(len(picture), -1)
    bands = [lines[top:end].sum(axis=0, dtype=dtype) for top, end in itertools.pairwise(rows)]
    planes = np.stack(bands).reshape(GRID, picture.shape[1], -1)
    sums = np.add.reduceat(planes, columns[:-1], axis=1, dtype=np.uint32)
    means: Floats = (sums / (heights[:, None] * widths)[..., None]).astype(np.float32)
    return means


def inputs(vis: Levels, ir: Levels) -> Floats:
    """`Seen.given` of a pair, (H, W, 3) and (H, W)."""
    return np.concatenate([averaged(vis), averaged(ir)], axis=2)


def seen(pictures: Mapping[Name, Levels], given: Floats) -> Seen:
    """What a frame tells of itself, by its pictures before they are steadied."""
    return Seen(given, {part: averaged(picture) for part, picture in pictures.items()})


class Memory:
    """Running means of a stream's frames, cell by cell, for one stream."""

    def __init__(self) -> None:
        self._means: Seen | None = None

    @property
    def means(self) -> Seen | None:
        """What the next frame is to be held to; None before the first."""
        return self._means

    def add(self, frame: Seen) -> None:
        """One more frame. Cells that changed begin anew, and so does everything after a cut or with other parts."""
        before = self._means
        if before is None or before.shown.keys() != frame.shown.keys():
            self._means = frame
            return
        is_still = _still(frame, before)
        if is_still.mean() < MIN_STILL:
            self._means = frame
            return

        def followed(means: Floats, new: Floats) -> Floats:
            mixed: Floats = np.where(is_still[..., None], means + np.float32(FOLLOWED) * (new - means), new)
            return mixed

        self._means = Seen(
            followed(before.given, frame.given),
            {part: followed(means, frame.shown[part]) for part, means in before.shown.items()},
        )


def steadied(pictures: Mapping[Name, Levels], frame: Seen, means: Seen | None) -> dict[Name, Levels]:
    """A frame's pictures (H, W) or (H, W, C) by part with their levels close to the means of those before it."""
    if means is None or (is_still := _still(frame, means)).mean() < MIN_STILL:
        return dict(pictures)
    return {
        part: _steadied(picture, frame.shown[part][is_still], means.shown[part][is_still])
        if part in means.shown
        else picture
        for part, picture in pictures.items()
    }


def _still(frame: Seen, means: Seen) -> NDArray[np.bool_]:
    still: NDArray[np.bool_] = np.abs(frame.given - means.given).max(axis=2) <= STILL
    return still


def _steadied(picture: Levels, now: Floats, before: Floats) -> Levels:
    """One picture by its still cells (N, C)."""
    from recofuse_images.codecs import cv2  # not above: front ends remember, and show nothing

    tables = [_table(_taken_back(*levels)) for levels in zip(now.T, before.T, strict=True)]
    held = cv2.LUT(picture, np.stack(tables, axis=1)[:, None])
    return np.asarray(held, np.uint8).reshape(picture.shape)  # OpenCV drops an only channel


def _taken_back(now: Floats, before: Floats) -> Floats:
    """What to add at every knot so that levels `now` (N,) are close to `before`."""
    change = (before - now).clip(-LARGEST, LARGEST)
    shares = (1 - np.abs(now[:, None] - KNOTS) / KNOTS[1]).clip(0, 1)  # (N, knots)
    curve: Floats = (shares.T @ change + FEW * np.median(change)) / (shares.sum(axis=0) + FEW)
    return ((1 - OWN) * curve).astype(np.float32)


def _table(curve: Floats) -> Levels:
    """What becomes of every level. Their order stays."""
    table = np.maximum.accumulate(_EVERY + np.interp(_EVERY, KNOTS, curve))
    levels: Levels = np.rint(table.clip(0, 255)).astype(np.uint8)
    return levels
