"""What the alignment benchmark concludes from its draws, and that its error is what it says."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from benchmarks.alignment import FAILED_PX, Draw, error_px, homography, judge, markdown, unmoved
from tests.rigs.scenes import scene

DRAW = Draw("streets", 1, 0.5, 0.5, 300.0, 400.0, True, 0.3, 1.0)


@pytest.mark.parametrize(
    ("draws", "all_met"),
    [
        ([DRAW] * 5, True),
        ([DRAW] * 4 + [replace(DRAW, own_px=9.0, is_sure=False)], True),  # 80 % within, and the other said so
        ([DRAW] * 4 + [replace(DRAW, own_px=9.0)], False),  # it was sure
        ([DRAW] * 3 + [replace(DRAW, own_px=9.0, is_sure=False)], False),
        ([replace(DRAW, num_pairs=10)] * 5, True),
        ([replace(DRAW, num_pairs=10, own_px=1.5, is_sure=False)] * 5, False),
    ],
)
def test_the_verdict(draws: list[Draw], all_met: bool) -> None:
    outcome = judge(draws)
    assert outcome.all_met is all_met
    assert outcome.line.startswith("bars met" if all_met else "bars not met")
    assert markdown(draws).count("\n") == 2


def test_the_error_is_that_of_the_corners() -> None:
    truth = homography(np.random.default_rng(1), (320, 256))
    moved = np.array([[1, 0, 3], [0, 1, -4], [0, 0, 1.0]]) @ truth
    assert error_px(truth, truth, (320, 256)) == pytest.approx(0, abs=1e-6)
    assert error_px(moved, truth, (320, 256)) == pytest.approx(5)
    assert error_px(None, truth, (320, 256)) == FAILED_PX


def test_what_files_are_off_by_is_in_the_second_reference() -> None:
    size = (640, 480)
    shift = np.array([[1, 0, 3], [0, 1, -2], [0, 0, 1.0]])
    vis, ir = (np.asarray(cv2.resize(side, size, interpolation=cv2.INTER_CUBIC), np.uint8) for side in scene(3))
    off = np.asarray(cv2.warpPerspective(ir, np.linalg.inv(shift), size, borderMode=cv2.BORDER_REFLECT_101), np.uint8)
    truth = np.array([[0.7, 0, 60], [0, 0.7, 50], [0, 0, 1.0]])
    assert error_px(unmoved([(vis, off)], truth, size) @ truth, shift @ truth, size) < 0.5
    draw = replace(DRAW, scenes="folder", error_px=9.0)
    assert "folder, pairs of a draw 1: 100% of 5 within 2 px (0% by the files' registration)" in judge([draw] * 5).line
