"""What the cue networks learn from: pairs that lie exactly, moved, darkened and disturbed, with where they lie now.

Two kinds of example, as the calibration meets them. A *search* shows the whole visible picture, 128 pixels wide, and
infrared about in its scale but turned, and asks for one shift among thousands. A *refinement* shows a part of both at
one of the finer widths, infrared lying a few pixels off, and asks for the shift of each quarter. All pictures are
(480, 640) uint8 before, and float32 of 0 to 255 after.

How infrared is laid is written here once more, since this package and `recofuse_rigs` stand beside each other; a test
holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recofuse_images.limits import OWN_FILES
from recofuse_images.reader import read_picture
from recofuse_images.writer import jpeg_bytes

Picture = NDArray[np.float32]
Matrix = NDArray[np.float64]

WIDTH, HEIGHT = 640, 480
SMALL = 128, 96  # of a search, and of a refinement's part
FACTOR = WIDTH // SMALL[0]  # pixels to one of a search
MARGIN = 32, 24  # shifts of a search, either way
CANVAS = SMALL[0] + 2 * MARGIN[0], SMALL[1] + 2 * MARGIN[1]
RADIUS = 8  # shifts of a refinement, either way
PART = SMALL[0] + 2 * RADIUS, SMALL[1] + 2 * RADIUS
LEVELS = 160, 320, 640
SHARES = 0.25, 0.45, 0.3
BELL_PX = 0.6  # deviation of the target about an exact shift
IR_SIZES = (640, 480), (384, 288), (320, 256), (320, 240), (640, 512)
CORNERS = np.array([[0, 0], [WIDTH - 1, 0], [WIDTH - 1, HEIGHT - 1], [0, HEIGHT - 1]], np.float64)
QUARTERS = np.array([[x, y] for y in (0.25, 0.75) for x in (0.25, 0.75)]) * SMALL - 0.5


@dataclass(frozen=True, slots=True)
class Example:
    """vis: (96, 128). ir: CANVAS of a search, PART of a refinement. seen: like ir, where infrared is, after `turn`.

    turn: (3, 3), how the maps of ir are still to be turned, output pixels to input ones. shifts: (n, 2), x and y of
    infrared from visible: of the whole, or of quarters row by row. blur: pixels of its shift that are not certain.
    """

    vis: Picture
    ir: Picture
    seen: Picture
    turn: Matrix
    shifts: NDArray[np.float64]
    blur: float


def search_example(rng: np.random.Generator, vis: NDArray[np.uint8], ir: NDArray[np.uint8], off_px: float) -> Example:
    """off_px: how exactly the pair lies, in its own pixels."""
    ir_size = IR_SIZES[int(rng.integers(len(IR_SIZES)))]
    truth, scale, angle = moving(rng, ir_size)
    visible, infrared = _disturbed(rng, vis, ir, truth, ir_size)
    grey = cv2.resize(visible, SMALL, interpolation=cv2.INTER_AREA)
    base = float(np.sqrt(SMALL[0] / ir_size[0] * SMALL[1] / ir_size[1]))
    zoom = scale * base * float(np.exp(rng.uniform(-0.04, 0.04)))
    centre = (CANVAS[0] - 1) / 2, (CANVAS[1] - 1) / 2
    placed = _similarity(zoom, 0.0, ir_size, centre)
    turn = _similarity(1.0, angle + float(np.deg2rad(rng.uniform(-1.7, 1.7))), CANVAS, centre)
    laid = _laid(infrared, placed, CANVAS)
    seen = _seen(turn @ placed, ir_size, CANVAS)
    grid = np.meshgrid(np.linspace(0, SMALL[0] - 1, 9), np.linspace(0, SMALL[1] - 1, 7))
    ours: NDArray[np.float64] = np.asarray(np.stack(grid, -1).reshape(-1, 2), np.float64)
    theirs = through(np.linalg.inv(truth), ours * FACTOR + (FACTOR - 1) / 2)
    within = ((theirs >= 0) & (theirs <= np.array(ir_size) - 1)).all(axis=1)
    shifts = through(turn @ placed, theirs) - ours
    return Example(
        np.asarray(grey, np.float32),
        laid,
        seen,
        np.asarray(np.linalg.inv(turn), np.float64),
        shifts[within].mean(axis=0)[None] if within.any() else np.full((1, 2), np.nan),
        float(np.hypot(BELL_PX, off_px / FACTOR)),
    )


def refinement_example(
    rng: np.random.Generator, vis: NDArray[np.uint8], ir: NDArray[np.uint8], off_px: float
) -> Example:
    """off_px: how exactly the pair lies, in its own pixels."""
    ir_size = IR_SIZES[int(rng.integers(len(IR_SIZES)))]
    truth, _, _ = moving(rng, ir_size)
    visible, infrared = _disturbed(rng, vis, ir, truth, ir_size)
    width = int(rng.choice(LEVELS, p=SHARES))
    share = width / WIDTH
    grey = visible if width == WIDTH else cv2.resize(visible, (width, width * 3 // 4), interpolation=cv2.INTER_AREA)
    to_level = np.array([[share, 0, (share - 1) / 2], [0, share, (share - 1) / 2], [0, 0, 1]])
    moves = rng.uniform(-5, 5, 2) / share + rng.uniform(-1.5, 1.5, (4, 2)) / share * (1 if width < WIDTH else 2)
    off = cv2.getPerspectiveTransform(CORNERS.astype(np.float32), (CORNERS + moves).astype(np.float32))
    placed = to_level @ off @ truth
    middle = through(to_level @ truth, rng.uniform(0.1, 0.9, (1, 2)) * (np.array(ir_size) - 1))[0]
    room = np.array([grey.shape[1] - SMALL[0], grey.shape[0] - SMALL[1]])
    left, top = np.clip(np.rint(middle - np.array(SMALL) / 2), 0, room).astype(int)
    to_part = np.array([[1.0, 0, RADIUS - left], [0, 1, RADIUS - top], [0, 0, 1]])
    laid, seen = _laid(infrared, to_part @ placed, PART), _seen(to_part @ placed, ir_size, PART)
    ours = QUARTERS + np.array([left, top])
    shifts = through(placed @ np.linalg.inv(to_level @ truth), ours) - ours
    covered = seen[RADIUS:-RADIUS, RADIUS:-RADIUS].reshape(2, SMALL[1] // 2, 2, SMALL[0] // 2).mean(axis=(1, 3)).ravel()
    shifts[covered < 0.6] = np.nan
    return Example(
        np.asarray(grey[top : top + SMALL[1], left : left + SMALL[0]], np.float32),
        laid,
        seen,
        np.eye(3),
        shifts,
        float(np.hypot(BELL_PX, off_px * share)),
    )


def moving(rng: np.random.Generator, ir_size: tuple[int, int]) -> tuple[Matrix, float, float]:
    """Infrared pixels to visible ones; scale 0.6 to 1.6, 10 degrees, 15 %, corners 3 % besides. Also scale, radians."""
    scale, angle = float(np.exp(rng.uniform(np.log(0.6), np.log(1.6)))), float(np.deg2rad(rng.uniform(-10, 10)))
    place = np.array([WIDTH, HEIGHT]) * (0.5 + rng.uniform(-0.15, 0.15, 2)) - 0.5
    bent = (CORNERS + rng.uniform(-0.03, 0.03, (4, 2)) * [WIDTH, HEIGHT]).astype(np.float32)
    lean = cv2.getPerspectiveTransform(CORNERS.astype(np.float32), bent)
    to_full = np.diag([WIDTH / ir_size[0], HEIGHT / ir_size[1], 1])
    return _similarity(scale, angle, (WIDTH, HEIGHT), (place[0], place[1])) @ lean @ to_full, scale, angle


def through(matrix: NDArray[Any], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (n, 2) through a homography."""
    moved = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ matrix.T
    return np.asarray(moved[:, :2] / moved[:, 2:])


def stacked(examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """Fields of examples of one kind, one above the other; pictures as (B, 1, H, W)."""
    return {
        "vis": np.stack([example.vis for example in examples])[:, None],
        "ir": np.stack([example.ir for example in examples])[:, None],
        "seen": np.stack([example.seen for example in examples])[:, None],
        "turn": np.stack([example.turn for example in examples]).astype(np.float32),
        "shifts": np.stack([example.shifts for example in examples]).astype(np.float32),
        "blur": np.array([example.blur for example in examples], np.float32),
    }


# what light and cameras do


def _disturbed(
    rng: np.random.Generator,
    vis: NDArray[np.uint8],
    ir: NDArray[np.uint8],
    truth: Matrix,
    ir_size: tuple[int, int],
) -> tuple[Picture, Picture]:
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    if rng.random() < 0.5:
        vis, ir = vis[:, ::-1], ir[:, ::-1]
    moved = cv2.warpPerspective(ir, truth, ir_size, flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return _darkened(rng, np.asarray(vis, np.float32)), _thermal(rng, np.asarray(moved, np.float32))


def _floats(values: NDArray[Any]) -> Picture:
    return np.asarray(values, np.float32)


def _darkened(rng: np.random.Generator, grey: Picture) -> Picture:
    if rng.random() < 0.25:
        grey = _floats(cv2.GaussianBlur(grey, (0, 0), rng.uniform(0.4, 1.5)))
    if rng.random() < 0.4:
        grey = _floats(255 * (np.maximum(grey, 0) / 255) ** np.float32(np.exp(rng.uniform(-0.5, 0.7))))
    if rng.random() < 0.85:
        grey = grey * np.float32(np.exp(rng.uniform(np.log(0.15), 0)))
    shot = rng.uniform(0, 1) if rng.random() < 0.4 else 0.0  # variance for each level
    return _recorded(rng, grey, rng.uniform(0, 12), shot)


def _thermal(rng: np.random.Generator, grey: Picture) -> Picture:
    if rng.random() < 0.35:
        grey = _floats(cv2.GaussianBlur(grey, (0, 0), rng.uniform(0.4, 1.6)))
    if rng.random() < 0.4:
        grey = _floats(255 * (np.clip(grey, 0, 255) / 255) ** np.float32(np.exp(rng.uniform(-0.6, 0.6))))
    if rng.random() < 0.1:
        grey = 255 - grey
    if rng.random() < 0.4:
        gain = rng.uniform(0.3, 1)
        grey = grey * np.float32(gain) + np.float32(rng.uniform(0, 1 - gain) * 255)
    if rng.random() < 0.2:
        strength, is_across = np.float32(rng.uniform(0, 5)), rng.random() < 0.6
        shape = (1, grey.shape[1]) if is_across else (grey.shape[0], 1)
        grey = grey + rng.standard_normal(shape, np.float32) * strength
    return _recorded(rng, grey, rng.uniform(0, 10), 0.0)


def _recorded(rng: np.random.Generator, grey: Picture, noise: float, shot: float) -> Picture:
    """With noise, in whole levels, perhaps as JPEG, stretched to 0 to 255."""
    deviation = np.float32(noise) if shot == 0 else np.sqrt(np.maximum(grey, 0) * np.float32(shot) + noise * noise / 4)
    noisy = grey + rng.standard_normal(grey.shape, np.float32) * deviation
    values = np.clip(noisy, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        quality = int(rng.integers(25, 95))
        values = np.asarray(read_picture(jpeg_bytes(values, quality), "vis", OWN_FILES).values, np.uint8)
        values = values.reshape(grey.shape)
    low, high = np.percentile(values[::4, ::4], (0.1, 99.9))
    stretch = np.float32(255 / max(float(high - low), 1.0))
    return _floats(np.clip((values.astype(np.float32) - np.float32(low)) * stretch, 0, 255))


# how infrared is laid


def _similarity(scale: float, angle: float, size: tuple[int, int], centre: tuple[float, float]) -> Matrix:
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cosine, -sine, centre[0]], [sine, cosine, centre[1]], [0, 0, 1]])
    return np.asarray(turn @ [[1, 0, -(size[0] - 1) / 2], [0, 1, -(size[1] - 1) / 2], [0, 0, 1]], np.float64)


def _laid(grey: Picture, matrix: Matrix, size: tuple[int, int]) -> Picture:
    zoom = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    if zoom < 0.75:  # fewer pixels than it has
        grey = _floats(cv2.GaussianBlur(grey, (0, 0), 0.5 * np.sqrt(zoom**-2 - 1)))
    picture = cv2.warpPerspective(grey, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(picture, np.float32)


def _seen(matrix: Matrix, ir_size: tuple[int, int], size: tuple[int, int]) -> Picture:
    reach = cv2.warpPerspective(np.full(ir_size[::-1], 255, np.uint8), matrix, size, flags=cv2.INTER_LINEAR)
    inner = cv2.erode((reach > 250).astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=1)
    return np.asarray(inner, np.float32)
