"""A rig: two cameras that do not move against each other, and the matrix that lays infrared pixels on visible ones.

Coordinates are those of pixels, x before y, and whole numbers are the centres of pixels: the picture's first pixel is
at (0, 0) and its edge at -0.5. The matrix holds between undistorted infrared pixels and visible ones as they are
stored; `distortion` says where the infrared lens puts a straight ray's pixel. A rig of one resolution serves others of
the same aspect ratio (`resized`).

The file is JSON, at most 64 KiB, and is trusted in nothing: every value is checked before it is used, so that a rig
which was read can be applied. No OpenCV here: front ends read and list rigs.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_rigs.errors import BadRigError

Matrix = NDArray[np.float64]
Size = tuple[int, int]  # width, height

FORMAT, VERSION = "recofuse-rig", 1
MAX_FILE_BYTES = 64 << 10
MIN_SIDE, MAX_SIDE = 8, 16384
MAX_ZOOM = 32.0  # visible pixels that one infrared pixel covers along a side, or the other way round
MAX_LEAN = 8.0  # how many times more one corner is enlarged than another
MIN_OVERLAP = 0.01
USUAL_PARALLAX, MAX_PARALLAX = 0.02, 0.05  # of the visible frame's width
ASPECT_TOLERANCE = 0.02

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MAX_MATRIX_CHARS = 1024
_METHODS = ("scenes", "corners", "checkerboard", "matrix")


@dataclass(frozen=True, slots=True)
class Distortion:
    """The infrared lens after Brown: focal lengths and centre in pixels; k1, k2, p1, p2, k3 as OpenCV orders them."""

    focal: tuple[float, float]
    centre: tuple[float, float]
    coefficients: tuple[float, float, float, float, float]

    def apply(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where the lens puts undistorted pixels (N, 2)."""
        k1, k2, p1, p2, k3 = self.coefficients
        x, y = ((points - self.centre) / self.focal).T
        r2 = x * x + y * y
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
        bent_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        bent_y = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        return np.stack([bent_x, bent_y], axis=1) * self.focal + self.centre


@dataclass(frozen=True, slots=True)
class Rig:
    """How infrared lies in the visible frame.

    matrix: row by row, infrared pixels to visible ones. overlap: share of the visible frame that infrared covers.
    spread_px: how far the corners move when the calibration is repeated on parts of its pairs, visible pixels; 0 where
    that was not measured. residual_px: what is left between the edges of both, visible pixels. is_sure: whether the
    calibration would swear to it. parallax_px: how far off what is nearer or farther than the calibrated distances may
    lie, visible pixels; 0 if that is not to be looked for, None for the usual share of the width.

    Raises BadRigError for what no two cameras can be.
    """

    vis_size: Size
    ir_size: Size
    matrix: tuple[float, ...]
    name: str = ""
    distortion: Distortion | None = None
    spread_px: float = 0.0
    residual_px: float = 0.0
    is_sure: bool = True
    num_pairs: int = 0
    method: str = "matrix"
    date: str = ""
    parallax_px: float | None = None

    def __post_init__(self) -> None:
        for role, size in (("vis_size", self.vis_size), ("ir_size", self.ir_size)):
            if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
                raise BadRigError(f"{role}: sides are {MIN_SIDE} to {MAX_SIDE} pixels, not {size[0]}x{size[1]}")
        if self.name:
            check_name(self.name)
        if self.method not in _METHODS:
            raise BadRigError(f"method: accepted are {', '.join(_METHODS)}")
        if self.date:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise BadRigError("date: accepted is a day such as 2026-01-31") from error
        for role, value in (("spread_px", self.spread_px), ("residual_px", self.residual_px)):
            if not 0 <= value <= MAX_SIDE:  # NaN is neither
                raise BadRigError(f"{role}: accepted are 0 to {MAX_SIDE} pixels")
        most = MAX_PARALLAX * self.vis_size[0]
        if self.parallax_px is not None and not 0 <= self.parallax_px <= most * (1 + 1e-9):
            raise BadRigError(
                f"parallax_px: accepted are 0 to {most:g} pixels, {MAX_PARALLAX:.0%} of the visible width"
            )
        if not 0 <= self.num_pairs <= 1_000_000:
            raise BadRigError("num_pairs: accepted are 0 to 1000000")
        _check_matrix(self.matrix, self.vis_size, self.ir_size)
        if self.distortion is not None:
            _check_distortion(self.distortion, self.ir_size)
        if self.overlap < MIN_OVERLAP:
            raise BadRigError(
                f"matrix: infrared covers {self.overlap:.1%} of the visible frame; {MIN_OVERLAP:.0%} is the least"
            )

    @property
    def array(self) -> Matrix:
        """The matrix, (3, 3)."""
        return np.array(self.matrix, np.float64).reshape(3, 3)

    @property
    def parallax_bound_px(self) -> float:
        """How far infrared may lie off in a frame, visible pixels."""
        return USUAL_PARALLAX * self.vis_size[0] if self.parallax_px is None else self.parallax_px

    @property
    def overlap(self) -> float:
        """Share of the visible frame that infrared covers, to about a hundredth; without the lens's distortion."""
        width, height = self.vis_size
        columns, rows = (np.arange(64) + 0.5) / 64 * width - 0.5, (np.arange(64)[:, None] + 0.5) / 64 * height - 0.5
        back = np.linalg.inv(self.array)
        # By elements: this is done for each request, and the start of a matrix product's threads would cost more.
        x, y, depth = (row[0] * columns + row[1] * rows + row[2] for row in back)
        with np.errstate(all="ignore"):
            x, y = x / depth, y / depth
        # The infrared centre has a positive denominator both ways; what has not lies behind the camera.
        is_before = depth * np.sign(np.linalg.det(self.array)) > 0
        inside = is_before & (x >= -0.5) & (x <= self.ir_size[0] - 0.5) & (y >= -0.5) & (y <= self.ir_size[1] - 0.5)
        return float(inside.mean())

    def resized(self, vis_size: Size, ir_size: Size) -> Rig:
        """The same rig for pictures of other resolutions. Raises BadRigError for another aspect ratio."""
        if (vis_size, ir_size) == (self.vis_size, self.ir_size):
            return self
        for role, size, own in (("vis", vis_size, self.vis_size), ("ir", ir_size, self.ir_size)):
            ratio = size[0] * own[1] / (size[1] * own[0])
            if max(ratio, 1 / ratio) > 1 + ASPECT_TOLERANCE:
                raise BadRigError(
                    f"{role} is {size[0]}x{size[1]}, and the rig is for {own[0]}x{own[1]}; accepted are pictures of "
                    "the same aspect ratio"
                )
        wider = resizing(self.vis_size, vis_size)
        narrower = resizing(ir_size, self.ir_size)
        lens = self.distortion
        if lens is not None:
            scale = ir_size[0] / self.ir_size[0], ir_size[1] / self.ir_size[1]
            centre = [(value + 0.5) * factor - 0.5 for value, factor in zip(lens.centre, scale, strict=True)]
            lens = Distortion(
                (lens.focal[0] * scale[0], lens.focal[1] * scale[1]), (centre[0], centre[1]), lens.coefficients
            )
        pixel = vis_size[0] / self.vis_size[0]
        return replace(
            self,
            vis_size=vis_size,
            ir_size=ir_size,
            matrix=flat(wider @ self.array @ narrower),
            distortion=lens,
            spread_px=min(self.spread_px * pixel, float(MAX_SIDE)),
            residual_px=min(self.residual_px * pixel, float(MAX_SIDE)),
            parallax_px=None if self.parallax_px is None else self.parallax_px * pixel,
        )


def check_name(name: str) -> None:
    """Raises BadRigError for what is no plain word: rigs are looked up by name in a folder."""
    if not _NAME.fullmatch(name):
        raise BadRigError("name: accepted are letters, digits, - and _, at most 64, the first a letter or digit")


def matrix_of(text: str) -> Matrix:
    """The (3, 3) matrix of nine numbers with commas, row by row. Raises BadRigError."""
    words = text.split(",")
    try:
        values = [float(word) for word in words] if len(words) == 9 and len(text) <= _MAX_MATRIX_CHARS else []
    except ValueError:
        values = []
    if len(values) != 9 or not all(math.isfinite(value) and abs(value) <= 1e9 for value in values):
        raise BadRigError("matrix: accepted are nine finite numbers with commas, row by row")
    return np.array(values, np.float64).reshape(3, 3)


def flat(matrix: Matrix) -> tuple[float, ...]:
    """A (3, 3) matrix as a rig holds it, its last element 1 where that can be."""
    last = float(matrix[2, 2])
    scaled = matrix / last if abs(last) > 1e-12 and math.isfinite(last) else matrix
    return tuple(float(value) for value in scaled.ravel())


def resizing(old: Size, new: Size) -> Matrix:
    """Pixels of a picture of one size to those of the same picture in another."""
    x, y = new[0] / old[0], new[1] / old[1]
    return np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5], [0, 0, 1]])


def corners_of(size: Size) -> Matrix:
    """The centres of a picture's corner pixels, clockwise from the first: (4, 2)."""
    right, bottom = size[0] - 1, size[1] - 1
    return np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]], np.float64)


def mapped(matrix: NDArray[np.floating[Any]], points: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Points (N, 2) through a (3, 3) matrix."""
    homogeneous = np.column_stack([points, np.ones(len(points))]) @ matrix.T
    return np.asarray(homogeneous[:, :2] / homogeneous[:, 2:], np.float64)


def _check_matrix(values: Sequence[float], vis_size: Size, ir_size: Size) -> None:
    """Raises BadRigError for what no two cameras beside each other can be."""
    if len(values) != 9 or not all(math.isfinite(value) and abs(value) <= 1e9 for value in values):
        raise BadRigError("matrix: accepted are three rows of three finite numbers")
    matrix = np.array(values, np.float64).reshape(3, 3)
    x, y = corners_of(ir_size).T
    depth = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2]
    if not (depth.min() > 0 and depth.max() <= MAX_LEAN * depth.min()):
        raise BadRigError("matrix: it leans further than two cameras beside each other can, or mirrors the picture")
    with np.errstate(all="ignore"):  # LAPACK divides by pivots that are no normal numbers; what comes of it is refused
        determinant = float(np.linalg.det(matrix / np.abs(depth).mean()))
    # A homography enlarges areas by det / depth**3.
    zooms = np.sqrt(np.maximum(determinant, 0) / (depth / np.abs(depth).mean()) ** 3)
    if not (zooms.min() * MAX_ZOOM >= 1 and zooms.max() <= MAX_ZOOM):
        raise BadRigError(f"matrix: singular, mirrored or enlarging by more than {MAX_ZOOM:.0f} times")
    placed = mapped(matrix, corners_of(ir_size))
    sides = np.linalg.norm(placed - np.roll(placed, 1, axis=0), axis=1)
    own = np.array([ir_size[1], ir_size[0], ir_size[1], ir_size[0]]) - 1.0
    stretch = sides / own
    if not (stretch.min() * MAX_ZOOM >= 1 and stretch.max() <= MAX_ZOOM and stretch.max() <= MAX_LEAN * stretch.min()):
        raise BadRigError("matrix: it stretches the infrared picture beyond what two cameras can")
    if np.abs(placed).max() > MAX_ZOOM * max(vis_size):
        raise BadRigError("matrix: it puts infrared far outside of the visible frame")


def _check_distortion(lens: Distortion, ir_size: Size) -> None:
    """Raises BadRigError for a lens that bends its own picture beyond recognition."""
    width, height = ir_size
    numbers = (*lens.focal, *lens.centre, *lens.coefficients)
    if not all(math.isfinite(value) and abs(value) <= 1e6 for value in numbers):
        raise BadRigError("distortion: accepted are finite numbers")
    if not all(0.1 * max(ir_size) <= focal <= 100 * max(ir_size) for focal in lens.focal):
        raise BadRigError("distortion: focal lengths are a tenth to a hundred times the longer side")
    rows, columns = np.mgrid[0 : height - 1 : 9j, 0 : width - 1 : 9j]
    points = np.stack([columns.ravel(), rows.ravel()], axis=1)
    moved = np.abs(lens.apply(points) - points).max()
    if not moved <= 0.5 * max(ir_size):
        raise BadRigError("distortion: it moves pixels by more than half of the picture")


# the file


def to_json(rig: Rig, indent: int | None = 2) -> str:
    """A rig as its file. indent: None for one short line."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "name": rig.name,
        "date": rig.date,
        "method": rig.method,
        "is_sure": rig.is_sure,
        "num_pairs": rig.num_pairs,
        "spread_px": rig.spread_px,
        "residual_px": rig.residual_px,
        "overlap": round(rig.overlap, 3),
        "vis_size": list(rig.vis_size),
        "ir_size": list(rig.ir_size),
        "matrix": rig.array.tolist(),
    }
    if rig.parallax_px is not None:
        document["parallax_px"] = rig.parallax_px
    if rig.distortion is not None:
        document["distortion"] = {field.name: list(getattr(rig.distortion, field.name)) for field in fields(Distortion)}
    return json.dumps(document, indent=indent, allow_nan=False) + "\n"


def from_json(text: str | bytes) -> Rig:
    """The rig of a file. Raises BadRigError, and nothing else, for whatever bytes."""
    if len(text) > MAX_FILE_BYTES:
        raise BadRigError(f"the rig file has {len(text)} bytes; at most {MAX_FILE_BYTES} are accepted")
    try:
        document = json.loads(text, object_pairs_hook=_unrepeated, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # of JSON, and of bytes that are no text
        raise BadRigError("the rig file is not sound JSON; `recofuse calibrate` writes one") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadRigError(f'the file is no rig: it has no "format": "{FORMAT}"')
    if document.get("version") != VERSION or isinstance(document.get("version"), bool):
        raise BadRigError(f"the rig file is of another version; accepted is {VERSION}")
    known = {field.name for field in fields(Rig)} | {"format", "version", "overlap"}
    if unknown := sorted(str(name)[:40] for name in set(document) - known):
        raise BadRigError(f"the rig file holds what is unknown: {', '.join(unknown[:5])}")
    if missing := sorted({"vis_size", "ir_size", "matrix"} - set(document)):
        raise BadRigError(f"the rig file lacks {', '.join(missing)}")
    values: dict[str, Any] = {
        "vis_size": _size(document, "vis_size"),
        "ir_size": _size(document, "ir_size"),
        "matrix": _rows(document["matrix"]),
    }
    for name in ("name", "method", "date"):
        if name in document:
            values[name] = _of_type(document, name, str, "a word")
    for name in ("spread_px", "residual_px"):
        if name in document:
            values[name] = _number(document[name], name)
    if document.get("parallax_px") is not None:
        values["parallax_px"] = _number(document["parallax_px"], "parallax_px")
    if "is_sure" in document:
        values["is_sure"] = _of_type(document, "is_sure", bool, "true or false")
    if "num_pairs" in document:
        values["num_pairs"] = _whole(document["num_pairs"], "num_pairs")
    if document.get("distortion") is not None:
        values["distortion"] = _lens(document["distortion"])
    return Rig(**values)


def from_file(path: Path) -> Rig:
    """The rig of a file. Raises BadRigError for a file that is none, OSError for a path that cannot be read."""
    with path.open("rb") as file:
        return from_json(file.read(MAX_FILE_BYTES + 1))


def _unrepeated(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in items}) < len(items):
        raise ValueError("a name stands twice")
    return dict(items)


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _of_type(document: Mapping[str, Any], name: str, kind: type, accepted: str) -> Any:
    if not isinstance(document[name], kind):
        raise BadRigError(f"{name}: accepted is {accepted}")
    return document[name]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRigError(f"{name}: accepted are finite numbers")
    try:
        number = float(value)
    except OverflowError as error:
        raise BadRigError(f"{name}: accepted are finite numbers") from error
    if not math.isfinite(number):
        raise BadRigError(f"{name}: accepted are finite numbers")
    return number


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRigError(f"{name}: accepted are whole numbers")
    return value


def _numbers(value: Any, name: str, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise BadRigError(f"{name}: accepted are {count} numbers")
    return tuple(_number(item, name) for item in value)


def _size(document: Mapping[str, Any], name: str) -> Size:
    value = document[name]
    if not isinstance(value, list) or len(value) != 2:
        raise BadRigError(f"{name}: accepted are width and height")
    return _whole(value[0], name), _whole(value[1], name)


def _rows(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != 3:
        raise BadRigError("matrix: accepted are three rows of three finite numbers")
    return tuple(number for row in value for number in _numbers(row, "matrix", 3))


def _lens(value: Any) -> Distortion:
    names = {field.name for field in fields(Distortion)}
    if not isinstance(value, dict) or set(value) != names:
        raise BadRigError(f"distortion: accepted are {', '.join(sorted(names))}")
    focal, centre = _numbers(value["focal"], "focal", 2), _numbers(value["centre"], "centre", 2)
    k1, k2, p1, p2, k3 = _numbers(value["coefficients"], "coefficients", 5)
    return Distortion((focal[0], focal[1]), (centre[0], centre[1]), (k1, k2, p1, p2, k3))
