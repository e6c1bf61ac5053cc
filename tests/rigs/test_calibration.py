"""Where infrared lies is found within a pixel, and what is no pair is not sworn to."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from recofuse_rigs.calibration import calibrate, grey_pair
from recofuse_rigs.errors import BadRigError, NothingFoundError
from recofuse_rigs.rig import Matrix, corners_of, mapped
from recofuse_rigs.search import GreyPair
from recofuse_rigs.sheet import calibration_sheet
from recofuse_rigs.targets import from_boards, from_points
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
