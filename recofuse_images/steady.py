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

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.uint8]
Floats = NDArray[np.float32]

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
        return b"".join((MAGIC, ",".join(parts).encode(), b"\\n", numbers.tobytes()))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Seen:
        """The inverse of `to_bytes`, but for rounding. Raises ValueError for anything else."""
        head, _, body = raw.partition(b"\\n")
        names = head.removeprefix(MAGIC).decode("ascii", "replace").split(",") if head != MAGIC else []
        if not head.startswith(MAGIC) or not set(names) <= _CHANNELS.keys() or len(set(names)) != len(names):
            raise ValueError("this is not what was seen of a frame")
        counts = [4, *(_CHANNELS[name] for name in names)]
        if len(body) != 2 * GRID * GRID * sum(counts):
            raise ValueError("what was seen of a frame is cut short")
        planes = np.frombuffer(body, "<u2").reshape(GRID, GRID, -1).astype(np.float32) / _SCALE
        given, *shown = np.split(planes, np.cumsum(counts)[:-1], axis=2)
        return cls(given, dict(zip(names, shown, strict=True)))


def averaged(picture: Levels) -> Floats:
    """(GRID, GRID, C) means of (H, W) or (H, W, C) levels, sides of GRID at least."""
    rows, columns = (np.arange(GRID) * side // GRID for side in picture.shape[:2])
    planes = picture[..., None] if picture.ndim == 2 else picture
    sums = np.add.reduceat(np.add.reduceat(planes, rows, axis=0, dtype=np.uint32), columns, axis=1)
    heights = np.diff(rows, append=picture.shape[0])
    widths = np.diff(columns, append=picture.shape[1])
    means: Floats = (sums / (heights[:, None] * widths)[..., None]).astype(np.float32)
    return means


def inputs(vis: Levels, ir: Levels) -> Floats:
    """`Seen.given` of a pair, (H, W, 3) and (H, W)."""
    return np.concatenate([averaged(vis), averaged(ir)], axis=2)


def seen(pictures: Mapping[str, Levels], given: Floats) -> Seen:
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
            return np.where(is_still[..., None], means + np.float32(FOLLOWED) * (new - means), new)

        self._means = Seen(
            followed(before.given, frame.given),
            {part: followed(means, frame.shown[part]) for part, means in before.shown.items()},
        )


def steadied(pictures: Mapping[str, Levels], frame: Seen, means: Seen | None) -> dict[str, Levels]:
    """A frame's pictures (H, W) or (H, W, 3) by part with their levels close to the means of those before it."""
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
    planes = picture[..., None] if picture.ndim == 2 else picture
    held = np.empty_like(planes)
    for channel in range(planes.shape[2]):
        held[..., channel] = _table(_taken_back(now[:, channel], before[:, channel]))[planes[..., channel]]
    return held.reshape(picture.shape)


def _taken_back(now: Floats, before: Floats) -> Floats:
    """What to add at every knot so that levels `now` (N,) are close to `before`."""
    change = (before - now).clip(-LARGEST, LARGEST)
    shares = (1 - np.abs(now[:, None] - KNOTS) / KNOTS[1]).clip(0, 1)  # (N, knots)
    curve: Floats = (shares.T @ change + FEW * np.median(change)) / (shares.sum(axis=0) + FEW)
    return ((1 - OWN) * curve).astype(np.float32)


def _table(curve: Floats) -> Levels:
    """What becomes of every level. Their order stays."""
    table = np.maximum.accumulate(_EVERY + np.interp(_EVERY, KNOTS, curve))
    return np.rint(table.clip(0, 255)).astype(np.uint8)
