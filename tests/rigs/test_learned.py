"""The learned maps: of any size, nothing where there is no picture, and found where edges are lost."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from recofuse_core.scenes.scene import make_scene
from recofuse_rigs import calibration, search
from recofuse_rigs.calibration import grey_pair
from recofuse_rigs.errors import BadNetworkError
from recofuse_rigs.learned import MAPS, learned_maps, network_of
from recofuse_rigs.refinement import COARSE, FINE, JUDGED, Level, Vector, likeness
from recofuse_rigs.rig import Matrix, corners_of, mapped
from recofuse_rigs.search import GreyPair
from tests.rigs.scenes import moved, scene


def test_maps_of_any_size() -> None:
    vis, ir = scene(1)
    for height, width in ((96, 128), (97, 131), (61, 50), (240, 320)):
        for side, picture in (("vis", vis), ("ir", ir)):
            maps = learned_maps(picture[:height, :width].astype(np.float32), side)  # type: ignore[arg-type]
            assert maps.shape == (height, width, MAPS)
            assert maps.dtype == np.float32
            assert 0 < np.square(maps).sum(axis=-1).max() < 1


def test_maps_do_not_hang_on_the_range() -> None:
    vis, _ = scene(1)
    maps = learned_maps(vis.astype(np.float32), "vis")
    assert np.abs(learned_maps(vis * np.float32(0.2) + 3, "vis") - maps).max() < 1e-2


def test_nothing_is_seen_where_there_is_no_picture() -> None:
    _, ir = scene(1)
    seen = np.zeros(ir.shape, np.bool_)
    seen[40:200, 60:250] = True
    maps = learned_maps(ir.astype(np.float32), "ir", seen)
    assert not maps[:42].any()
    assert not maps[:, :62].any()
    assert maps[42:198, 62:248].any(axis=-1).mean() > 0.9


def test_threads_have_networks_of_their_own() -> None:
    vis, _ = scene(1)
    pictures = [vis[:, start:].astype(np.float32) for start in range(0, 64, 8)]
    expected = [learned_maps(picture, "vis") for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda picture: learned_maps(picture, "vis"), pictures * 4))
    assert all(np.array_equal(maps, expected[index % 8]) for index, maps in enumerate(found))


STREET_SIZE, STREET_IR_SIZE = (640, 480), (320, 256)


def dark_street(seed: int) -> tuple[GreyPair, Matrix]:
    """A generated street at a quarter of its light, noise in both pictures; and where infrared lies."""
    rng = np.random.default_rng(seed)
    clear = make_scene(seed, 240, 320)
    pictures = (np.einsum("chw,c->hw", clear.vis.numpy(), [0.299, 0.587, 0.114]), clear.ir.numpy()[0])
    vis, ir = (cv2.resize(np.asarray(side * 255, np.float32), STREET_SIZE) for side in pictures)
    matrix = np.array([[1.34, 0.143, 145.3], [-0.137, 1.226, 114.7], [2.5e-5, 1e-5, 1.0]])

    def noisy(picture: NDArray[np.float32], strength: float) -> NDArray[np.uint8]:
        return np.asarray(np.clip(picture + rng.normal(0, strength, picture.shape), 0, 255), np.uint8)

    return grey_pair(noisy(vis * 0.25, 10), noisy(moved(ir, matrix, STREET_IR_SIZE), 8)), matrix


def by_edges_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration as it is without maps."""
    coarse, *fine = (replace(level, maps=0.0) for level in (COARSE, *FINE))
    judged = replace(JUDGED, maps=0.0)

    def likeness_of_edges(pairs: Sequence[GreyPair], matrix: Matrix, level: Level = judged) -> Vector:
        return likeness(pairs, matrix, level)

    monkeypatch.setattr(search, "MAPS_SHARE", 0.0)
    monkeypatch.setattr(calibration, "COARSE", coarse)
    monkeypatch.setattr(calibration, "FINE", tuple(fine))
    monkeypatch.setattr(calibration, "likeness", likeness_of_edges)


def test_a_dark_street_is_placed_that_edges_alone_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The street is picked: of most others edges alone tell as much. It comes to 2.9 and 245 px."""
    pair, matrix = dark_street(3)
    corners = corners_of(STREET_IR_SIZE)

    def off_px() -> float:
        found = calibration.calibrate([pair]).matrix
        return float(np.linalg.norm(mapped(found, corners) - mapped(matrix, corners), axis=1).mean())

    assert off_px() < 6
    by_edges_alone(monkeypatch)
    assert off_px() > 60


def test_a_file_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    shipped = Path(str(resources.files("recofuse_rigs"))) / "cues_vis.onnx"
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(shipped.read_bytes()[:-100])
    with pytest.raises(BadNetworkError, match=r"damaged.onnx is damaged, or OpenCV .* too old"):
        network_of(damaged)
    with pytest.raises(BadNetworkError, match=r"none.onnx cannot be read \(No such file or directory\)"):
        network_of(tmp_path / "none.onnx")
    other = Path(str(resources.files("recofuse_core"))) / "graphs" / "zeros.onnx"
    with pytest.raises(BadNetworkError):
        network_of(other)
