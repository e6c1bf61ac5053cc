"""Both branches in one pass give what each gives alone."""

import copy

import pytest
import torch

from recofuse_core.errors import ConfigError
from recofuse_core.layers import GatedConvBlock
from recofuse_core.networks import DualDenoiser
from recofuse_core.runtime import Runtime
from recofuse_core.stacked import StackedBlock, StackedDenoiser
from tests.core.tiny import PUBLISHED, largest_difference, pairs, tiny_model


@pytest.mark.parametrize("height", [4, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_stacked_branches_are_the_two_branches(batch: int, height: int) -> None:
    dual = tiny_model(PUBLISHED).denoiser
    generator = torch.Generator().manual_seed(batch)
    vis, vis_mu, ir, ir_mu = torch.randn(4, batch, 4, height, 10, generator=generator)
    step = torch.tensor([42])
    expected = dual.denoise(vis, vis_mu, ir, ir_mu, dual.conditioning(step))
    stacked = StackedDenoiser(copy.deepcopy(dual))
    actual = stacked.denoise(vis, vis_mu, ir, ir_mu, stacked.conditioning(step))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*expected)


@pytest.mark.parametrize("size", [(5, 6), (1, 2)])  # attention goes to weights, or to positions where those are fewer
def test_a_stacked_block_is_both_blocks(size: tuple[int, int]) -> None:
    dual = tiny_model(PUBLISHED).denoiser
    vis, ir = next(dual.vis.blocks()), next(dual.ir.blocks())
    assert isinstance(vis, GatedConvBlock)
    block = StackedBlock(vis, ir)
    x = torch.randn(2, 2, *size, vis.expand1.in_channels)
    before = x.clone()
    plain = torch.stack([one(part.permute(0, 3, 1, 2)) for one, part in zip((vis, ir), x, strict=True)])
    gains = [
        torch.stack([getattr(b, norm).gain for b in (vis, ir)])[:, None, None, None] for norm in ("norm1", "norm2")
    ]
    zero = torch.zeros_like(gains[0])
    actual = block(x, (gains[0], zero, gains[1], zero))
    torch.testing.assert_close(actual.permute(0, 1, 4, 2, 3), plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


def test_stacked_branches_give_the_same_picture_and_give_memory_back() -> None:
    model = tiny_model(PUBLISHED)
    vis, ir = pairs(2, 40, 50)
    runtime = Runtime(model, precision="float32", stacked=True)
    assert largest_difference(runtime.fuse(vis, ir, seeds=5), model.fuse(vis, ir, seeds=5)) < 1e-4
    kept = [p for p in runtime.model.denoiser.parameters() if not p.is_meta]
    buffers = sum(buffer.numel() for buffer in runtime.model.denoiser.buffers())
    whole = sum(p.numel() for p in model.denoiser.parameters())
    assert sum(p.numel() for p in kept) + buffers <= whole


def test_stacked_branches_take_one_step_at_a_time() -> None:
    dual = tiny_model(PUBLISHED).denoiser
    assert isinstance(dual, DualDenoiser)
    with pytest.raises(ConfigError, match="one time step"):
        StackedDenoiser(dual).conditioning(torch.tensor([1, 2]))
