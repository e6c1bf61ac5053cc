"""Pairs that pass for registered are brought to where they lie, and what is doubtful is told and left out."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from recofuse_images.writer import png_bytes
from recofuse_rigs import placing
from recofuse_rigs.calibration import grey_pair
from recofuse_rigs.errors import BadPairsError
from recofuse_rigs.placing import SIZE, Grey, placed, placed_sets, sets_of
from recofuse_rigs.refinement import FINE
from recofuse_rigs.rig import Matrix, corners_of, mapped
from tests.rigs.scenes import scene

OFF = np.array([[1.0, 0, 4], [0, 1, -3], [0, 0, 1]])  # of infrared's pixels, to where they lie


def off_pair(seed: int, ir_seed: int | None = None) -> tuple[Grey, Grey]:
    """A pair of SIZE whose infrared file lies 5 px off, of another scene if it is asked for."""
    vis, ir = scene(seed)[0], scene(seed if ir_seed is None else ir_seed)[1]
    vis, ir = (np.asarray(cv2.resize(side, SIZE, interpolation=cv2.INTER_CUBIC), np.uint8) for side in (vis, ir))
    moved = cv2.warpPerspective(ir, np.linalg.inv(OFF), SIZE, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    return vis, np.asarray(moved, np.uint8)


def off_px(matrix: Matrix) -> float:
    corners = corners_of(SIZE)
    return float(np.linalg.norm(mapped(matrix, corners) - mapped(OFF, corners), axis=1).mean())


def test_pairs_of_no_set_go_by_themselves() -> None:
    pairs = [off_pair(0), off_pair(1), off_pair(2, ir_seed=3)]
    said: list[str] = []
    found = placed([grey_pair(*pair) for pair in pairs], said.append)
    assert [place.kind for place in found] == ["own", "own", "unsure"]
    assert all(off_px(place.matrix) < 0.7 for place in found[:2])
    assert all(place.moved_px == pytest.approx(5, abs=0.7) for place in found[:2])
    assert np.array_equal(found[2].matrix, np.eye(3))
    assert said == ["the set lies 0.0 px off, not agreed"]


def test_a_set_that_agrees_takes_along_what_cannot_go_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "LEVELS", placing.LEVELS[:1])  # the coarser one alone, for speed
    assert placing.LEVELS[0].width == FINE[0].width
    pairs = [off_pair(seed) for seed in range(12)]
    vis, ir = pairs[5]
    noise = np.random.default_rng(0).normal(0, 25, ir.shape)
    pairs[5] = vis, np.asarray(np.clip(ir * 0.2 + 100 + noise, 0, 255), np.uint8)
    pairs[7] = off_pair(7, ir_seed=20)
    said: list[str] = []
    found = placed([grey_pair(*pair) for pair in pairs], said.append)
    assert said == ["the set lies 4.8 px off, agreed"]  # of 5
    kinds = [place.kind for place in found]
    assert kinds[5] == "set"
    assert kinds[7] == "unsure"
    assert kinds.count("own") > 6
    assert off_px(found[5].matrix) < 0.5
    assert all(off_px(place.matrix) < 1.2 for place in found if place.kind == "own")


def write(folder: Path, name: str, pair: tuple[Grey, Grey]) -> None:
    for side, picture in zip(("vis", "ir"), pair, strict=True):
        (folder / side).mkdir(parents=True, exist_ok=True)
        (folder / side / f"{name}.png").write_bytes(png_bytes(picture))


def test_folders_are_read_by_set_and_laid(tmp_path: Path) -> None:
    write(tmp_path / "one", "day_1", off_pair(0))
    write(tmp_path / "one", "night-1", off_pair(1))
    write(tmp_path / "two", "day_2", off_pair(2, ir_seed=3))
    sets = sets_of(tmp_path / "one")
    assert sorted(sets) == ["day", "night"]
    assert [side.shape for side in sets["day"][0]] == [SIZE[::-1], SIZE[::-1]]
    said: list[str] = []
    (found,) = placed_sets([tmp_path / "one", tmp_path / "two"], ["night"], said.append)
    assert said[0] == "day: 2 pairs"
    assert said[-1] == "day: 1 own, 0 set, 1 unsure"
    vis, ir = (np.asarray(cv2.resize(side, SIZE, interpolation=cv2.INTER_CUBIC), np.uint8) for side in scene(0))
    assert np.array_equal(found[0], vis)
    inner = np.s_[20:-20, 20:-20]
    errors = [np.abs(other[inner].astype(int) - ir[inner]).mean() for other in (found[1], off_pair(0)[1])]
    assert errors[0] < 0.3 * errors[1]


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadPairsError, match="there is no file or folder"):
        sets_of(tmp_path)
    write(tmp_path, "day_1", off_pair(0))
    with pytest.raises(BadPairsError, match=r"no pair is of the set nigth.*there are day"):
        list(placed_sets([tmp_path], ["nigth"]))
    (tmp_path / "ir" / "day_1.png").write_bytes(b"no picture")
    with pytest.raises(BadPairsError, match=r"vis/day_1.png and .*ir/day_1.png: "):
        sets_of(tmp_path)


def test_pictures_are_cut_to_their_middles(tmp_path: Path) -> None:
    vis = np.zeros((300, 800), np.uint8)
    vis[:, 200:600] = 200
    write(tmp_path, "wide", (vis, vis // 2))
    ((found, _),) = sets_of(tmp_path)["wide"]
    assert found.shape == SIZE[::-1]
    assert (found == 200).all()
