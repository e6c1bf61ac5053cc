"""Where infrared lies is found within a pixel, and what is no pair is not sworn to."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from recofuse_rigs.calibration import calibrate, grey_pair
from recofuse_rigs.camera import seen_by
from recofuse_rigs.errors import BadRigError, NothingFoundError
from recofuse_rigs.rig import Distortion, Matrix, Rig, corners_of, flat, mapped
from recofuse_rigs.search import GreyPair
from recofuse_rigs.sheet import calibration_sheet
from recofuse_rigs.targets import _straightened, from_boards, from_points, lens_of
from tests.rigs.scenes import IR_SIZE, VIS_SIZE, moved, scene, truth


def pair_of(seed: int, matrix: Matrix) -> GreyPair:
    vis, ir = scene(seed)
    return grey_pair(vis, moved(ir, matrix))


def error_px(found: Matrix, matrix: Matrix) -> float:
    corners = corners_of(IR_SIZE)
    return float(np.linalg.norm(mapped(found, corners) - mapped(matrix, corners), axis=1).mean())


@pytest.mark.parametrize("scale", [0.75, 1.3])
def test_one_pair(scale: float) -> None:
    matrix = truth(scale=scale)
    found = calibrate([pair_of(1, matrix)])
    assert error_px(found.matrix, matrix) < 2
    again = calibrate([pair_of(1, matrix)])
    assert np.array_equal(again.matrix, found.matrix)


def test_several_pairs_are_sure_and_one_that_contradicts_is_left_out() -> None:
    matrix = truth()
    pairs = [pair_of(seed, matrix) for seed in range(4)]
    vis, _ = scene(20)
    _, ir = scene(21)
    pairs.insert(2, grey_pair(vis, moved(ir, matrix)))
    found = calibrate(pairs)
    assert error_px(found.matrix, matrix) < 1
    assert found.left_out == (2,)
    assert found.is_sure, found.doubts
    rig = found.as_rig(name="roof")
    assert rig.num_pairs == 4
    assert 0.3 < rig.overlap < 1
    sheet = calibration_sheet(pairs, rig, "roof")
    assert sheet.shape == (28 + 5 * VIS_SIZE[1], 2 * VIS_SIZE[0], 3)
    assert (sheet == [255, 64, 32]).all(axis=2).sum() == 0  # edges let the picture through
    assert (sheet[..., 0].astype(int) > sheet[..., 2].astype(int) + 60).any()


def test_two_pictures_that_have_nothing_in_common_are_unsure() -> None:
    vis, _ = scene(1)
    _, ir = scene(2)
    found = calibrate([grey_pair(vis, moved(ir, truth()))])
    assert not found.is_sure
    assert found.doubts


def test_noise_is_unsure() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (240, 320)).astype(np.uint8)
    assert not calibrate([grey_pair(noise, rng.integers(0, 255, (128, 160)).astype(np.uint8))]).is_sure


def test_what_cannot_be_calibrated_is_refused() -> None:
    flat = np.zeros((240, 320), np.uint8)
    with pytest.raises(NothingFoundError):
        calibrate([])
    with pytest.raises(NothingFoundError, match="flat"):
        calibrate([grey_pair(flat, flat)])
    with pytest.raises(BadRigError, match="one visible and one infrared size"):
        calibrate([grey_pair(flat, flat), grey_pair(flat, flat[:100])])


def test_points_given_by_hand() -> None:
    matrix = truth()
    ir = np.random.default_rng(0).uniform((0, 0), IR_SIZE, (12, 2))
    vis = mapped(matrix, ir)
    rig = from_points(vis[:4], ir[:4], VIS_SIZE, IR_SIZE)
    assert error_px(rig.array, matrix) < 1e-3
    assert not rig.is_sure  # four always fit
    wrong = vis.copy()
    wrong[5] += 40
    rig = from_points(wrong, ir, VIS_SIZE, IR_SIZE)
    assert error_px(rig.array, matrix) < 0.1
    assert rig.is_sure
    line = np.stack([np.arange(5.0), np.arange(5.0)], axis=1)
    with pytest.raises(BadRigError):
        from_points(line, line, VIS_SIZE, IR_SIZE)
    with pytest.raises(BadRigError, match="at least 4"):
        from_points(vis[:3], ir[:3], VIS_SIZE, IR_SIZE)


def test_a_heated_checkerboard() -> None:
    board = np.full((240, 320), 230, np.uint8)
    for row in range(6):
        for column in range(8):
            if (row + column) % 2:
                cv2.rectangle(board, (60 + 24 * column, 40 + 24 * row), (83 + 24 * column, 63 + 24 * row), 20, -1)
    matrix = truth(scale=1.1, degrees=2, shift=(0, 0))
    heat = moved(255 - board, matrix, IR_SIZE)
    rig = from_boards([grey_pair(board, heat)], (7, 5))
    on_board = np.array([[84.0, 64.0], [227.0, 64.0], [227.0, 159.0], [84.0, 159.0]])
    placed = mapped(rig.array, mapped(np.linalg.inv(matrix), on_board))
    assert np.linalg.norm(placed - on_board, axis=1).mean() < 1  # squares are 11 infrared pixels wide
    assert rig.method == "checkerboard"
    with pytest.raises(NothingFoundError):
        from_boards([grey_pair(board, np.zeros((128, 160), np.uint8))], (7, 5))


BOARD = (7, 5)


def boards(number: int) -> list[NDArray[np.uint8]]:
    """Checkerboards in pictures of (640, 480), slanted, in its corners and its middle."""
    squares = np.full((280, 360), 230, np.uint8)
    for row in range(BOARD[1] + 1):
        for column in range(BOARD[0] + 1):
            if (row + column) % 2:
                squares[20 + 40 * row : 60 + 40 * row, 20 + 40 * column : 60 + 40 * column] = 20
    rng, found = np.random.default_rng(4), []
    corners = np.array([[0, 0], [360, 0], [360, 280], [0, 280]], np.float32)
    for index in range(number):
        place = np.array([[5, 5], [275, 5], [275, 195], [5, 195], [140, 100]][index % 5])
        moved_to = (corners + place + rng.uniform(0, 1, (4, 2)) * np.sign(180 - corners) * 45).astype(np.float32)
        view = cv2.getPerspectiveTransform(corners, moved_to)
        found.append(np.asarray(cv2.warpPerspective(squares, view, (640, 480), borderValue=230), np.uint8))
    return found


def test_boards_tell_the_lens() -> None:
    ir_size = (320, 240)
    lens = Distortion((300.0, 300.0), (159.5, 119.5), (-0.25, 0.05, 0.0, 0.0, 0.0))
    matrix = np.array([[2.0, 0, 0.5], [0, 2.0, 0.5], [0, 0, 1]])
    true = Rig((640, 480), ir_size, flat(matrix), distortion=lens)
    pairs = [grey_pair(vis, seen_by(true, vis)) for vis in boards(8)]
    found = from_boards(pairs, BOARD)
    assert found.distortion is not None
    columns, rows = np.meshgrid(np.arange(40, 600, 20.0), np.arange(40, 440, 20.0))
    on_vis = np.stack([columns.ravel(), rows.ravel()], axis=1)

    def in_infrared(rig: Rig) -> Matrix:
        straight = mapped(np.linalg.inv(rig.array), on_vis)
        return straight if rig.distortion is None else rig.distortion.apply(straight)

    def off_px(rig: Rig) -> float:
        return float(np.linalg.norm(in_infrared(rig) - in_infrared(true), axis=1).mean())

    assert off_px(found) < 0.5
    few = from_boards(pairs[:4], BOARD)
    assert few.distortion is None
    assert off_px(few) > 2 * off_px(found)


def test_a_strong_lens_is_undone() -> None:
    size = (320, 240)
    lens = Distortion((320.0, 320.0), (159.5, 119.5), (-0.6, 0.05, 0.0, 0.0, 0.0))
    straight = np.stack(np.meshgrid(*(np.linspace(0, side - 1, 9) for side in size)), axis=-1).reshape(-1, 2)
    assert np.abs(_straightened(lens, lens.apply(straight)) - straight).max() < 0.01


def test_a_straight_lens_is_left_out() -> None:
    grid = np.stack(np.meshgrid(np.arange(7.0), np.arange(5.0)), axis=-1).reshape(-1, 2)
    rng = np.random.default_rng(0)
    seen = [
        mapped(truth(scale=8 + index % 3, degrees=index, shift=(0, 0)) @ np.diag([2.0, 2, 1]), grid * 8 + 30)
        + rng.normal(0, 0.2, (35, 2))
        for index in range(8)
    ]
    assert lens_of(seen, BOARD, (320, 240)) is None
