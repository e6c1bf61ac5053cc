"""Tiles cover the grid, weights add up to one, and a tiled result shows no seam."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recofuse_core.errors import ConfigError
from recofuse_core.tiling import Mosaic, TilingConfig, blend, plan_tiles
from tests.core.tiny import GATED, PUBLISHED, pairs, tiny_model

TILING = TilingConfig(max_pixels=1, tile=192, overlap=96)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 150), st.integers(2, 150), st.integers(4, 20), st.integers(1, 5))
def test_tiles_cover_the_grid_and_overlap(half_rows: int, half_columns: int, half_tile: int, half_overlap: int) -> None:
    rows, columns, tile = 2 * half_rows, 2 * half_columns, 2 * half_tile
    overlap = 2 * min(half_overlap, half_tile // 2)
    tiles = plan_tiles(rows, columns, tile, overlap)
    covered = torch.zeros(rows, columns)
    for one in tiles:
        assert one.top % 2 == one.left % 2 == 0
        assert one.bottom - one.top == min(tile, rows)
        assert one.right - one.left == min(tile, columns)
        one.cut(covered, 1).add_(1)
    assert float(covered.min()) >= 1
    for spans in ({(t.top, t.bottom) for t in tiles}, {(t.left, t.right) for t in tiles}):
        ordered = sorted(spans)
        # Even starts are rounded, which may cost two positions of the overlap.
        assert all(b[0] <= a[1] - max(overlap - 2, 1) for a, b in pairwise(ordered))


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
        Mosaic(plan_tiles(4, 4, 16, 4), (4, 4), 1).joined()


@pytest.mark.parametrize(
    "broken", [{"tile": 100}, {"overlap": 10}, {"overlap": 0}, {"tile": 160, "overlap": 96}], ids=str
)
def test_impossible_tilings_are_refused(broken: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="multiples of 16"):
        TilingConfig(**broken)


def step_at(image: Tensor, columns: list[int]) -> float:
    """Mean absolute difference between each of these columns and the one before."""
    return float(torch.stack([(image[..., c] - image[..., c - 1]).abs().mean() for c in columns]).mean())


@pytest.mark.parametrize("config", [GATED, PUBLISHED], ids=["gated", "published"])
def test_a_tiled_result_is_near_the_untiled_one_and_has_no_seam(config: object) -> None:
    """Tiles are an approximation (channel attention and TIM see the tile alone), and the error has no edges."""
    model = tiny_model(config)  # type: ignore[arg-type]
    vis, ir = pairs(1, 256, 416)
    whole = model.fuse(vis, ir, outputs=("fused", "vis"), seeds=3)
    tiled = model.fuse(vis, ir, outputs=("fused", "vis"), seeds=3, tiling=TILING)
    tiles = plan_tiles(32, 52, 24, 12)
    assert len(tiles) > 4
    borders = sorted({8 * side for t in tiles for side in (t.left, t.right) if 0 < side < 52})
    elsewhere = [c for c in range(8, 416, 8) if c not in borders]  # edges of the same 8-pixel units
    for name in ("fused", "vis"):
        one, other = getattr(whole, name), getattr(tiled, name)
        error = one - other
        assert float(error.abs().mean()) < 0.02
        assert float(error.abs().max()) < 0.2
        assert step_at(error, borders) < 1.5 * step_at(error, elsewhere) + 1e-4


def test_a_frame_below_the_limit_is_left_whole() -> None:
    model = tiny_model()
    vis, ir = pairs(1, 64, 64)
    limit = TilingConfig(max_pixels=64 * 64, tile=48, overlap=16)
    assert torch.equal(model.fuse(vis, ir, tiling=limit).fused, model.fuse(vis, ir).fused)  # type: ignore[arg-type]
