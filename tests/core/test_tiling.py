"""Tiles cover the grid, weights add up to one, and a tiled result shows no seam."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recofuse_core import load_pretrained
from recofuse_core.degradations.recipes import degrade_ir, degrade_vis
from recofuse_core.errors import ConfigError
from recofuse_core.model import TorchNetworks
from recofuse_core.scenes.scene import make_scene
from recofuse_core.tiling import Mosaic, Tile, TilingConfig, plan_tiles
from tests.core.tiny import images_of, pairs, tiny_model


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 150), st.integers(2, 150), st.integers(4, 20), st.integers(1, 5))
def test_tiles_cover_the_grid_and_overlap(half_rows: int, half_columns: int, half_tile: int, half_overlap: int) -> None:
    rows, columns, tile = 2 * half_rows, 2 * half_columns, 2 * half_tile
    overlap = 2 * min(half_overlap, half_tile // 2)
    tiles = plan_tiles(rows, columns, tile, overlap)
    covered = torch.zeros(rows, columns)
    for one in tiles:
        assert one.top % 2 == one.left % 2 == 0
        assert one.bottom - one.top <= min(tile, rows)
        assert one.right - one.left <= min(tile, columns)
        one.cut(covered, 1).add_(1)
    assert float(covered.min()) >= 1
    for spans in ({(t.top, t.bottom) for t in tiles}, {(t.left, t.right) for t in tiles}):
        shared = [a[1] - b[0] for a, b in pairwise(sorted(spans))]
        assert all(overlap <= one <= overlap + 2 for one in shared)
        assert len({end - start for start, end in spans}) == 1


CANVAS = TorchNetworks(tiny_model(), lambda t: pytest.fail("no network is asked"))


def blend(tiles: Sequence[Tile], parts: Iterable[Tensor], grid: tuple[int, int], scale: int) -> Tensor:
    mosaic = Mosaic(CANVAS, tiles, grid, scale)
    for tile, part in zip(tiles, parts, strict=True):
        mosaic.add(tile, part)
    whole: Tensor = mosaic.joined()
    return whole


@settings(deadline=None, max_examples=20)
@given(st.integers(10, 60), st.integers(10, 60), st.sampled_from([1, 2, 8]), st.integers(0, 9))
def test_pieces_of_a_whole_join_to_the_whole(half_rows: int, half_columns: int, scale: int, seed: int) -> None:
    rows, columns = 2 * half_rows, 2 * half_columns
    tiles = plan_tiles(rows, columns, 16, 6)
    torch.manual_seed(seed)
    whole = torch.randn(2, 3, rows * scale, columns * scale)
    joined = blend(tiles, (tile.cut(whole, scale) for tile in tiles), (rows, columns), scale)
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-5)


def test_weights_fade_towards_neighbours() -> None:
    tiles = plan_tiles(10, 28, 16, 4)
    assert len(tiles) == 2
    parts = (torch.full((1, 1, 10, 16), value) for value in (0.0, 1.0))
    row = blend(tiles, parts, (10, 28), 1)[0, 0, 5]
    assert row[:12].abs().max() == 0
    assert (row[16:] - 1).abs().max() < 1e-6
    assert torch.all(row[1:] >= row[:-1])
    assert float((row[1:] - row[:-1]).max()) < 0.3


def test_nothing_to_join_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one tile"):
        blend((), iter(()), (4, 4), 1)
    with pytest.raises(ConfigError, match="no tile has been added"):
        Mosaic(CANVAS, plan_tiles(4, 4, 16, 4), (4, 4), 1).joined()


@pytest.mark.parametrize(
    "broken", [{"tile": 100}, {"overlap": 10}, {"overlap": 0}, {"tile": 160, "overlap": 96}], ids=str
)
def test_impossible_tilings_are_refused(broken: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="multiples of 16"):
        TilingConfig(**broken)


def step_at(image: Tensor, columns: list[int]) -> float:
    """Mean absolute difference between each of these columns and the one before."""
    return float(torch.stack([(image[..., c] - image[..., c - 1]).abs().mean() for c in columns]).mean())


def test_a_tiled_result_is_near_the_untiled_one_and_has_no_seam() -> None:
    """Tiles are an approximation (channel attention and TIM see the tile alone), and the error has no edges.

    Trained weights: random ones make of a tile's mean, which attention sees, whatever they like.
    """
    model = load_pretrained("compact")
    scene, generator = make_scene(3, 384, 512), torch.Generator().manual_seed(1)
    vis = degrade_vis(scene.vis, generator, kinds=["low_light", "gaussian_noise"]).image[None]
    ir = degrade_ir(scene.ir, generator, kinds=["low_contrast", "stripes"]).image[None]
    whole = model.fuse(vis, ir)
    tiled = model.fuse(vis, ir, tiling=TilingConfig(max_pixels=1, tile=384, overlap=128))
    tiles = plan_tiles(48, 64, 48, 16)
    assert len(tiles) == 2
    borders = [8 * side for t in tiles for side in (t.left, t.right) if 0 < side < 64]
    elsewhere = [c for c in range(8, 512, 8) if c not in borders]  # edges of the same 8-pixel units
    for one, other in zip(images_of(whole), images_of(tiled), strict=True):
        error = one - other
        assert 0 < float(error.abs().mean()) < 0.015
        assert float(error.abs().max()) < 0.1
        assert step_at(error, borders) < 1.5 * step_at(error, elsewhere) + 1e-4


def test_a_frame_below_the_limit_is_left_whole() -> None:
    model = tiny_model()
    vis, ir = pairs(1, 64, 64)
    limit = TilingConfig(max_pixels=64 * 64, tile=48, overlap=16)
    assert torch.equal(model.fuse(vis, ir, tiling=limit).fused, model.fuse(vis, ir).fused)  # type: ignore[arg-type]
