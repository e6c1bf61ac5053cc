"""Calibration by hand or by a target: points given in pairs, or a checkerboard that both cameras see.

A board of one plane says how infrared lies for things as far away as the board was; several boards at the distances
that matter, or far ones, make the better rig. A heated board is often seen the other way round by the infrared camera,
which the search tries too.

Six boards and more, all over the infrared frame and at different slants, also tell how the infrared lens bends. A board
is flat whatever its distance, so a lens is judged board by board, free of parallax, and by boards that it was not made
of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_rigs.errors import BadRigError, NothingFoundError
from recofuse_rigs.rig import Distortion, Matrix, Rig, Size, corners_of, flat, mapped
from recofuse_rigs.search import GreyPair, size_of

MIN_POINTS = 4
SURE_PX = 1.5  # residual at a width of 640 up to which points make a sure rig
MIN_BOARDS = 6  # that tell a lens
_OUTLIER_PX = 3.0  # at a width of 640
_BENT = 0.7  # of what boards are bent by without a lens, below which one is believed
_LENS_STEPS, _MAX_BEND = 6, 2.0  # k1 and k2, of a focal length of the frame's width
_REACH = 0.6  # of the half diagonal, that corners must reach to: beyond them a lens is made up


def from_points(vis: Matrix, ir: Matrix, vis_size: Size, ir_size: Size, *, method: str = "corners") -> Rig:
    """The rig of points (N, 2) that both cameras see, N at least 4. Points that fit nothing are passed over.

    is_sure if there are more than 4 and the rest of them lie within SURE_PX of where the matrix puts them; four fit
    always, and then nothing is known of their error. Raises BadRigError for too few, and for points in one line.
    """
    if vis.shape != ir.shape or vis.ndim != 2 or vis.shape[1:] != (2,) or len(vis) < MIN_POINTS:
        raise BadRigError(f"accepted are at least {MIN_POINTS} points, each with its place in vis and in ir")
    if not (np.isfinite(vis).all() and np.isfinite(ir).all()):
        raise BadRigError("accepted are points of finite numbers")
    pixel = vis_size[0] / 640
    matrix, inliers = cv2.findHomography(
        ir.astype(np.float64),
        vis.astype(np.float64),
        cv2.USAC_MAGSAC if len(vis) > MIN_POINTS else 0,
        _OUTLIER_PX * pixel,
    )
    if matrix is None or not np.isfinite(matrix).all():
        raise BadRigError("the points lie in a line, or fit no view of two cameras")
    is_in = np.ones(len(vis), bool) if inliers is None else np.asarray(inliers, bool).ravel()
    distances = np.linalg.norm(mapped(np.asarray(matrix, np.float64), ir) - vis, axis=1)
    residual = float(np.sqrt((distances[is_in] ** 2).mean())) if is_in.any() else float(distances.max())
    return Rig(
        vis_size,
        ir_size,
        flat(np.asarray(matrix, np.float64)),
        residual_px=residual,
        is_sure=len(vis) > MIN_POINTS and residual <= SURE_PX * pixel and bool(is_in.mean() > 0.7),
        num_pairs=1,
        method=method,
    )


def board_points(grey: NDArray[np.float32], board: tuple[int, int]) -> Matrix | None:
    """The inner corners of a checkerboard of (columns, rows) of them in (H, W), 0 to 255; None if it is not seen.

    The board may be seen in reverse (a heated one), and is sought at twice the size where the picture is small.
    """
    levels = np.clip(grey, 0, 255).astype(np.uint8)
    for factor in (1, 2) if max(levels.shape) <= 800 else (1,):
        enlarged = levels if factor == 1 else np.asarray(cv2.resize(levels, None, fx=factor, fy=factor), np.uint8)
        for seen in (enlarged, 255 - enlarged):
            flags = cv2.CALIB_CB_ADAPTIVE_THRESH | cv2.CALIB_CB_NORMALIZE_IMAGE
            is_found, corners = cv2.findChessboardCorners(seen, board, flags=flags)
            if is_found:
                criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 40, 0.001)
                found = cv2.cornerSubPix(seen, np.asarray(corners, np.float32), (3, 3), (-1, -1), criteria)
                return (np.asarray(found, np.float64).reshape(-1, 2) + 0.5) / factor - 0.5
    return None


def from_boards(pairs: Sequence[GreyPair], board: tuple[int, int]) -> Rig:
    """The rig of pairs that show a checkerboard of (columns, rows) inner corners to both cameras.

    Raises NothingFoundError if no pair shows it to both.
    """
    vis_size, ir_size = size_of(pairs[0].vis), size_of(pairs[0].ir)
    seen: list[tuple[Matrix, Matrix]] = []
    for pair in pairs:
        if (size_of(pair.vis), size_of(pair.ir)) != (vis_size, ir_size):
            raise BadRigError("all pairs of a rig must have one visible and one infrared size; calibrate others apart")
        vis, ir = board_points(pair.vis, board), board_points(pair.ir, board)
        if vis is not None and ir is not None:
            seen.append((vis, _in_the_same_order(vis, ir)))
    if not seen:
        raise NothingFoundError(
            f"no pair shows a checkerboard of {board[0]}x{board[1]} inner corners to both cameras; it must be whole in "
            "both pictures, and warm or cold enough for the infrared one"
        )
    lens = lens_of([ir for _, ir in seen], board, ir_size)
    vis, ir = np.concatenate([pair[0] for pair in seen]), np.concatenate([pair[1] for pair in seen])
    if lens is not None:
        ir = _straightened(lens, ir)
    found = from_points(vis, ir, vis_size, ir_size, method="checkerboard")
    return Rig(
        vis_size,
        ir_size,
        found.matrix,
        distortion=lens,
        residual_px=found.residual_px,
        is_sure=found.is_sure,
        num_pairs=len(seen),
        method="checkerboard",
    )


def lens_of(boards: Sequence[Matrix], board: tuple[int, int], size: Size) -> Distortion | None:
    """The lens by which these boards' corners, (columns * rows, 2) each, are straight; None if they tell none.

    That is if there are fewer than MIN_BOARDS, if none reach far into the corners of the frame, or if a lens made of
    every other board does not make the boards between clearly straighter.
    """
    centre = corners_of(size).mean(axis=0)
    reach = np.linalg.norm(np.concatenate(boards) - centre, axis=1).max()
    if len(boards) < MIN_BOARDS or reach < _REACH * np.linalg.norm(centre):
        return None
    bent_px = lens_px = 0.0
    for half in (0, 1):
        lens, rest = _fitted_lens(boards[half::2], board, size), boards[1 - half :: 2]
        bent_px += sum(_bent_px(ir, board) for ir in rest)
        lens_px += sum(_bent_px(_straightened(lens, ir), board) for ir in rest)
    return _fitted_lens(boards, board, size) if lens_px < _BENT * bent_px else None


def _fitted_lens(boards: Sequence[Matrix], board: tuple[int, int], size: Size) -> Distortion:
    """k1 and k2 about the frame's centre that make boards the straightest, by Gauss and Newton.

    Each board may lie anywhere, so its view is free; the focal length, which boards that face the camera do not tell,
    is only the unit in which k1 and k2 are told.
    """
    centre = corners_of(size).mean(axis=0)

    def lens(bends: Matrix) -> Distortion:
        k1, k2 = (float(value) for value in bends)
        return Distortion(
            (float(size[0]), float(size[0])), (float(centre[0]), float(centre[1])), (k1, k2, 0.0, 0.0, 0.0)
        )

    def left(bends: Matrix) -> Matrix:
        straight = [_straightened(lens(bends), ir) for ir in boards]
        return np.concatenate([_bent(points, board) for points in straight]).ravel()

    bends, nudge = np.zeros(2), 0.01
    for _ in range(_LENS_STEPS):
        now = left(bends)
        slopes = np.stack([(left(bends + nudge * way) - now) / nudge for way in np.eye(2)], axis=1)
        bends = np.clip(
            bends - np.linalg.solve(slopes.T @ slopes + 1e-3 * np.eye(2), slopes.T @ now), -_MAX_BEND, _MAX_BEND
        )
    return lens(bends)


def _straightened(lens: Distortion, points: Matrix) -> Matrix:
    """Where pixels (N, 2) of a lens would lie without it: what `Distortion.apply` puts there."""
    (focal_x, focal_y), (x, y) = lens.focal, lens.centre
    camera = np.array([[focal_x, 0, x], [0, focal_y, y], [0, 0, 1.0]])
    until = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 50, 1e-8)  # the usual five are off by pixels
    found = cv2.undistortImagePoints(points[:, None], camera, np.array(lens.coefficients), None, until)
    return np.asarray(found, np.float64).reshape(-1, 2)


def _bent_px(points: Matrix, board: tuple[int, int]) -> float:
    return float(np.linalg.norm(_bent(points, board), axis=1).mean())


def _bent(points: Matrix, board: tuple[int, int]) -> Matrix:
    """How a board's corners lie from those of a flat one, (N, 2), in infrared pixels."""
    grid = _grid(board)
    matrix, _ = cv2.findHomography(grid, points)
    return mapped(np.asarray(matrix, np.float64), grid) - points


def _grid(board: tuple[int, int]) -> Matrix:
    return np.stack(np.meshgrid(np.arange(board[0]), np.arange(board[1])), axis=-1).reshape(-1, 2).astype(np.float64)


def _in_the_same_order(vis: Matrix, ir: Matrix) -> Matrix:
    """The infrared corners from the end at which the visible ones begin: cameras of a rig see the same side up."""

    def direction(points: Matrix) -> Matrix:
        return np.asarray(points[-1] - points[0], np.float64)

    return ir if float(direction(vis) @ direction(ir)) > 0 else ir[::-1]
