"""The learned maps: of any size, nothing where there is no picture, and found where edges are lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from recofuse_rigs.learned import MAPS, learned_maps
from tests.rigs.scenes import scene


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
