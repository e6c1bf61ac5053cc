"""Noise that is new in every frame, averaged away from a stream's pictures where the scene stands still.

Every pixel is shown as a running mean over the pictures of the frames before, for as long as nothing has changed around
it; where something has, the frame at hand is shown. The newest frame weighs 1/2, 1/3 and so on, and never less than
1/(FRAMES + 1), so what changes too slowly to be noticed is followed. What has changed is judged twice: by the frames as
they came, both of them, in means over small windows against the noise that is seen in them, and by the restored
pictures, against how much they change anyway and how steep they are. A mean is never farther from the picture at hand
than that, so a change that nobody noticed leaves no more than a trace of the size of the noise.

What a newcomer would get wrong: all state is the history that goes from frame to frame as bytes, and the mean in it is
the very picture that was shown. So means are rounded by chance, up as often as their fraction says: to the nearest
level, a frame that differs by five levels or less would move none of them, and all would stay at the first frames'
guess. Chance is drawn from the history, and who repeats a frame gets the same picture. Whoever has the frame and a
history can go on, after any frame before; a history of other sizes or parts is as good as none. Evidence and weights
have half the sides of the pictures.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.uint8]
Floats = NDArray[np.float32]

Name = TypeVar("Name", bound=str)  # of a part

MAGIC = b"RFC1"
MIN_SIDE = 16  # px of a picture below which it is shown as it is
FRAMES = 10  # that a mean counts for at most against the newest one

# Of the frames as they came: what counts as a change, in standard deviations of the mean over a window.
WINDOWS = (3, 7, 15)  # px a side, of the halved frame
SURE = (3.0, 5.0)  # from where on a mean counts less, and from where on not at all
MIN_DEVIATION = 1.0  # levels: codecs leave something of this size also where no noise is seen
COARSE = 2.0  # how many times that of white noise a deviation may be: stripes and codecs are not white
STEEP_GIVEN = 0.15  # of the range within 3x3 px: cameras tremble

# Of the restored pictures, whose noise is not white: levels are those of cells of 8x8 px of the halved picture.
QUIET = 25  # percentile of the cells that stands for noise: what moves seldom fills three quarters of a frame
NOISE = (0.25, 5.0)  # levels that it is taken for at least, and at most
TIMES = 3.0  # of that noise, which a picture may differ from its mean by
STEEP = 0.3  # and of the range within 3x3 px: what is steep is restored a little elsewhere in each frame
CHANGED = (0.8, 1.4)  # of what it may differ by: from where on a mean counts less, and from where on not at all
FARTHEST = 1.2  # of that, too: how far what is shown may be from the frame at hand
AROUND = 9  # px of the halved picture around what has changed that count as changed, so that no edge smears
_UNIT = 16  # of a frame, as the number of frames travels


@dataclass(frozen=True)
class Given:
    """A frame as it came, halved (H/2, W/2), and the standard deviation of its noise in levels, vis before ir."""

    planes: tuple[Levels, Levels]
    noise: tuple[float, float]


@dataclass(frozen=True)
class History:
    """What is known of the frames before one.

    planes: running means of the frames as they came, halved. frames: how many they count for, in sixteenths, of the
    same shape. shown: the pictures (H, W) or (H, W, C) by part.
    """

    planes: tuple[Levels, Levels]
    frames: Levels
    shown: Mapping[str, Levels]

    def to_bytes(self) -> bytes:
        """Packed without loss: about half of the pictures' bytes."""
        from recofuse_images.codecs import imagecodecs

        codec: Any = imagecodecs  # whose types know no arrays
        arrays = [*self.planes, self.frames, *self.shown.values()]
        # Differences to the row above, which is what is left to pack of a smooth picture.
        rows = [np.diff(array.reshape(len(array), -1), axis=0, prepend=np.uint8(0)).ravel() for array in arrays]
        body = bytes(codec.zstd_encode(np.concatenate(rows), level=1))
        return b"".join((MAGIC, _said_of(self.shown).encode(), b"\n", body))

    @classmethod
    def from_bytes(cls, raw: bytes, pictures: Mapping[Name, Levels]) -> History | None:
        """The inverse of `to_bytes`; None for one of other parts or sizes than these pictures'. Raises ValueError."""
        from recofuse_images.codecs import imagecodecs

        codec: Any = imagecodecs
        head, _, body = raw.partition(b"\n")
        if not head.startswith(MAGIC):
            raise ValueError("this is not a history of a stream's pictures")
        if head[len(MAGIC) :] != _said_of(pictures).encode():
            return None
        half = _halved(*next(iter(pictures.values())).shape[:2])
        shapes = [half] * 3 + [picture.shape for picture in pictures.values()]
        sizes = [int(np.prod(shape)) for shape in shapes]
        levels = np.empty(sum(sizes), np.uint8)  # no more than this, whatever the bytes say
        try:
            unpacked = codec.zstd_decode(body, out=levels)
        except (RuntimeError, ValueError) as error:
            raise ValueError("a history of a stream's pictures is damaged") from error
        if len(unpacked) != len(levels):
            raise ValueError("a history of a stream's pictures is cut short")
        arrays = []
        for shape, end, size in zip(shapes, np.cumsum(sizes), sizes, strict=True):
            rows = levels[end - size : end].reshape(shape[0], -1)
            for above, row in itertools.pairwise(rows):  # whole rows at a time: a fifth of what `accumulate` takes
                np.add(above, row, out=row)
            arrays.append(rows.reshape(shape))
        vis, ir, frames, *shown = arrays
        return cls((vis, ir), frames, dict(zip(pictures, shown, strict=True)))


def given(vis: Levels, ir: Levels) -> Given:
    """What is to be known of a pair as it came, (H, W, 3) and (H, W)."""
    from recofuse_images.codecs import cv2

    height, width = _halved(*vis.shape[:2])
    grey = np.asarray(cv2.cvtColor(vis, cv2.COLOR_RGB2GRAY), np.uint8)
    planes = [
        np.asarray(cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA), np.uint8) for plane in (grey, ir)
    ]
    return Given((planes[0], planes[1]), (_noise_of(grey), _noise_of(ir)))


def calmed(pictures: Mapping[Name, Levels], frame: Given, before: bytes) -> tuple[dict[Name, Levels], bytes]:
    """A frame's pictures (H, W) or (H, W, C) of one size by part as they are to be shown, and the history after it.

    before: the history of an earlier frame, or nothing. Raises ValueError for bytes that are none.
    """
    size = next((picture.shape[:2] for picture in pictures.values()), (0, 0))
    if min(size) < MIN_SIDE or frame.planes[0].shape != _halved(*size):
        return dict(pictures), b""
    history = History.from_bytes(before, pictures) if before else None
    if history is None:
        ones = np.full(frame.planes[0].shape, _UNIT, np.uint8)
        return dict(pictures), History(frame.planes, ones, _named(pictures)).to_bytes()
    shown, after = _followed(pictures, frame, history, np.random.default_rng(zlib.crc32(before)))
    return shown, after.to_bytes()


def _followed(
    pictures: Mapping[Name, Levels], frame: Given, history: History, generator: np.random.Generator
) -> tuple[dict[Name, Levels], History]:
    from recofuse_images.codecs import cv2

    change = _change_of_given(frame, history.planes)
    bounds = {}
    for part, picture in pictures.items():
        bounds[part], changed = _change_of_picture(picture, history.shown[part])
        np.maximum(change, changed, out=change)
    stays = cv2.erode((1 - change).clip(0, 1), np.ones((AROUND, AROUND), np.uint8))
    stays = cv2.blur(stays, (AROUND // 2 | 1, AROUND // 2 | 1))
    frames = stays * history.frames.astype(np.float32) * np.float32(1 / _UNIT)
    share = frames / (frames + 1)  # of the mean; the frame at hand has the rest
    shown = {
        part: _mixed(picture, history.shown[part], bounds[part], share, generator) for part, picture in pictures.items()
    }
    vis, ir = (_blended(mean, now, share, generator) for now, mean in zip(frame.planes, history.planes, strict=True))
    numbers = np.rint(np.minimum(frames + 1, FRAMES) * _UNIT).astype(np.uint8)
    return shown, History((vis, ir), numbers, _named(shown))


def _change_of_given(frame: Given, means: tuple[Levels, Levels]) -> Floats:
    """0 and less where a frame as it came is like the frames before, 1 and more where it is certainly not."""
    from recofuse_images.codecs import cv2

    change = np.zeros(frame.planes[0].shape, np.float32)
    for plane, mean, noise in zip(frame.planes, means, frame.noise, strict=True):
        difference = cv2.subtract(plane, mean, dtype=cv2.CV_32F)
        steep = cv2.blur(_range_within(mean), (3, 3)).astype(np.float32) * np.float32(STEEP_GIVEN / SURE[0])
        for side in WINDOWS:
            size = np.abs(cv2.blur(difference, (side, side)))
            white = max(noise, 0.3) / (2 * side) * 1.2  # the mean has some noise of its own
            seen = 1.4826 * float(np.median(size[::4, ::4]))
            deviation = max(MIN_DEVIATION, min(seen, COARSE * white))
            np.maximum(change, size / (deviation + steep * (3 / side)), out=change)
    low, high = SURE
    scaled: Floats = (change - low) / (high - low)
    return scaled


def _change_of_picture(picture: Levels, mean: Levels) -> tuple[Levels, Floats]:
    """By how many levels a picture may differ from its mean, and where it does by more, as `_change_of_given`."""
    from recofuse_images.codecs import cv2

    now, before = _small_grey(picture), _small_grey(mean)
    size = cv2.absdiff(now, before)
    cells = cv2.blur(size.astype(np.float32), (8, 8))[4::8, 4::8]
    noise = float(np.percentile(cells, QUIET)) if cells.size else NOISE[0]
    bound = TIMES * min(max(noise, NOISE[0]), NOISE[1]) + np.float32(STEEP) * _range_within(now).astype(np.float32)
    low, high = CHANGED
    changed = (cv2.blur(size.astype(np.float32), (3, 3)) / bound - low) / (high - low)
    return np.rint(FARTHEST * bound).clip(0, 255).astype(np.uint8), changed.astype(np.float32)


def _mixed(picture: Levels, mean: Levels, bound: Levels, share: Floats, generator: np.random.Generator) -> Levels:
    """The picture and its mean, brought within a bound (h, w) of it, which has a share (h, w)."""
    from recofuse_images.codecs import cv2

    height, width = picture.shape[:2]
    flat = picture.reshape(height, width, -1)
    most = cv2.merge([cv2.resize(bound, (width, height), interpolation=cv2.INTER_LINEAR)] * flat.shape[2])
    near = cv2.max(mean.reshape(flat.shape), cv2.subtract(flat, most))  # all stay within 0 and 255 by themselves
    near = cv2.min(near, cv2.add(flat, most))
    weights = np.asarray(cv2.resize(share, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    return _blended(np.asarray(near, np.uint8).reshape(flat.shape), flat, weights, generator).reshape(picture.shape)


def _blended(mean: Levels, now: Levels, share: Floats, generator: np.random.Generator) -> Levels:
    """The mean (H, W) or (H, W, C), which has a share (H, W), and what is now, rounded by chance."""
    blended = mean.astype(np.float32)
    blended -= now
    blended *= share.reshape(share.shape + (1,) * (now.ndim - 2))
    blended += now  # in this order what is the same stays the same
    drawn = np.frombuffer(generator.bytes(now.size), np.uint8).reshape(now.shape)
    blended += drawn.astype(np.float32) * np.float32(1 / 256) + np.float32(1 / 512)
    return blended.astype(np.uint8)  # towards zero; both were levels, so it stays within 255


def _small_grey(picture: Levels) -> Levels:
    """(H/2, W/2) of one channel."""
    from recofuse_images.codecs import cv2

    flat = picture.reshape(*picture.shape[:2], -1)
    height, width = _halved(*flat.shape[:2])
    half = cv2.resize(flat, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(half, cv2.COLOR_RGB2GRAY) if flat.shape[2] == 3 else half.reshape(height, width))


def _range_within(plane: Levels) -> Levels:
    """The largest less the smallest level within 3x3 px."""
    from recofuse_images.codecs import cv2

    window = np.ones((3, 3), np.uint8)
    return np.asarray(cv2.subtract(cv2.dilate(plane, window), cv2.erode(plane, window)))


def _noise_of(plane: Levels) -> float:
    """The standard deviation of white noise in levels (Immerkaer, CVIU 1996, by the median), from every fourth row."""
    above, here, below = (plane[start : len(plane) - 2 + start : 4].astype(np.int16) for start in range(3))
    columns = above - 2 * here + below
    corners = columns[:, :-2] - 2 * columns[:, 1:-1] + columns[:, 2:]
    return 1.4826 * float(np.median(np.abs(corners[:, ::2]))) / 6 if corners.size else 0.0


def _halved(height: int, width: int) -> tuple[int, int]:
    return -(-height // 2), -(-width // 2)


def _named(pictures: Mapping[Name, Levels]) -> dict[str, Levels]:
    return {str(part): picture for part, picture in pictures.items()}


def _said_of(pictures: Mapping[Name, Levels]) -> str:
    """Parts and their shapes, in one line."""
    return ",".join(f"{part}:{'x'.join(map(str, picture.shape))}" for part, picture in pictures.items())
