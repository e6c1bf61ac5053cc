"""What a bilateral grid does to a frame."""

import torch
from torch import Generator

from recofuse_core.bilateral import BilateralGrid
from tests.core.tiny import exported, pairs


def test_entries_are_looked_up_by_place_and_brightness() -> None:
    """Against an independent writing: the entry of a cell's centre at a level's centre is that entry."""
    entries = torch.randn(1, 6, 3, 4, 5, generator=Generator().manual_seed(0))
    grid = BilateralGrid(entries)
    for level in range(3):
        guide = torch.full((1, 1, 4, 5), (level + 0.5) / 3)
        assert torch.allclose(grid.look_up(guide), entries[:, :, level], atol=1e-5)
    between = grid.look_up(torch.full((1, 1, 4, 5), 1 / 3))
    assert torch.allclose(between, (entries[:, :, 0] + entries[:, :, 1]) / 2, atol=1e-5)


def test_gains_and_offsets_act_where_they_are() -> None:
    """A grid that lifts the left half alone, and dark pixels alone."""
    entries = torch.zeros(1, 6, 4, 8, 8)
    entries[:, :3, :2, :, :4] = torch.tensor(2.0).log()
    image = torch.full((1, 3, 64, 64), 0.2)
    image[..., 32:, :] = 0.9
    lit = BilateralGrid(entries)(image)
    assert torch.allclose(lit[..., :28, :24], torch.tensor(0.4), atol=1e-4)
    assert torch.allclose(lit[..., :28, 40:], torch.tensor(0.2), atol=1e-4)
    assert torch.allclose(lit[..., 36:, :], torch.tensor(0.9), atol=1e-4)


def test_other_runtimes_find_the_same_entries() -> None:
    """All levels weighed, as graphs have it, against one look at each place; darker and brighter than any level too."""
    entries = torch.randn(2, 6, 8, 4, 5, generator=Generator().manual_seed(2))
    guide = torch.rand(2, 1, 17, 24, generator=Generator().manual_seed(3)).mul(1.2).sub(0.1)
    found = exported(lambda values, places: BilateralGrid(values).look_up(places), entries, guide)
    assert torch.allclose(found, BilateralGrid(entries).look_up(guide), atol=1e-5)
    vis, _ = pairs(2, 33, 47)
    assert torch.allclose(
        exported(lambda values, frame: BilateralGrid(values)(frame), entries, vis),
        BilateralGrid(entries)(vis),
        atol=1e-5,
    )
