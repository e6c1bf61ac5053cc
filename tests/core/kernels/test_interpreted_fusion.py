"""The kernels of the fusion module against their eager twins, on Triton's interpreter, as in test_interpreted.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: there is no wheel of it for this platform")

from recofuse_core.errors import ConfigError
from recofuse_core.kernels import fusion_operations as operations
from recofuse_core.kernels import twins
from recofuse_core.kernels.choice import relative_rms
from recofuse_core.kernels.fusion import FusedLatentFusion
from recofuse_core.networks import FusionConfig, LatentFusion
from tests.core.kernels.blocks import drawn
from tests.core.kernels.test_interpreted import BRANCHES, CHANNELS, FEW, ROWS, TOLERANCES

SIDES = st.integers(1, 11)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_stride=False)


@FEW
@given(
    batch=BRANCHES, height=SIDES, width=SIDES, channels=st.integers(1, 20), columns=CHANNELS,
    pool=st.integers(1, 3), swapped=st.booleans(),
)  # fmt: skip
def test_projection_of_both_latents(
    batch: int, height: int, width: int, channels: int, columns: int, pool: int, swapped: bool
) -> None:
    vis, ir = drawn(2, batch, channels, height, width)
    ir = ir.contiguous(memory_format=torch.channels_last)  # they come as they lie
    weight, bias = drawn(2, channels, columns, seed=1), drawn(2, columns, seed=2)
    arguments = (vis, ir, weight, bias, pool, swapped)
    assert_close(operations.project(*arguments), twins.project(*arguments))


@FEW
@given(batch=BRANCHES, height=SIDES, width=SIDES, channels=st.integers(1, 20), filled=st.integers(0, 5))
def test_latents_beside_each_other(batch: int, height: int, width: int, channels: int, filled: int) -> None:
    vis, ir = drawn(2, batch, height, width, channels).movedim(-1, 2)
    mixed = drawn(2, batch, height * width, channels + filled, seed=1)
    assert_close(operations.beside(mixed, vis, ir), twins.beside(mixed, vis, ir))


@FEW
@given(branches=BRANCHES, batch=BRANCHES, rows=st.integers(2, 150), members=st.integers(1, 5), shared=st.booleans())
def test_group_norm_by_tiles(branches: int, batch: int, rows: int, members: int, shared: bool) -> None:
    groups = 3
    x = 2 * drawn(1 if shared else branches, batch, rows, groups * members) + 30  # far from zero, where squares cancel
    gain, shift, bias = drawn(3, branches, groups * members, seed=1)
    bias = bias[:1].expand_as(bias).contiguous() if shared else bias
    sums = torch.cat([operations.tile_sums(part, bias[index]) for index, part in enumerate(x)])
    assert_close(sums, torch.cat([twins.tile_sums(part, bias[index]) for index, part in enumerate(x)]))
    arguments = (sums, gain, shift, bias, groups, 1e-5, rows)
    coefficients = operations.norm_coefficients(*arguments)
    torch.testing.assert_close(coefficients, twins.norm_coefficients(*arguments), rtol=1e-4, atol=1e-3)
    found = operations.norm_silu(x, coefficients)
    assert_close(found, twins.norm_silu(x, coefficients))
    for index in range(branches):
        plain = (x[0 if shared else index] + bias[index]).mT
        normed = torch.nn.functional.group_norm(plain, groups, gain[index], shift[index], 1e-5)
        torch.testing.assert_close(found[index], torch.nn.functional.silu(normed).mT, rtol=1e-3, atol=1e-3)


@FEW
@given(branches=BRANCHES, batch=BRANCHES, rows=ROWS, channels=CHANNELS, squeezed=st.integers(1, 4))
def test_attention_to_channels(branches: int, batch: int, rows: int, channels: int, squeezed: int) -> None:
    parts = list(drawn(branches, batch, rows, channels))
    modulated = (parts, drawn(branches, channels, seed=1), drawn(branches, 2, channels, seed=2))
    pools = operations.channel_pools(*modulated)
    assert_close(pools, twins.channel_pools(*modulated))
    arguments = (pools, drawn(branches, channels, squeezed, seed=3), drawn(branches, squeezed, channels, seed=4), rows)
    assert_close(operations.channel_attention(*arguments), twins.channel_attention(*arguments))


@FEW
@given(branches=BRANCHES, batch=BRANCHES, height=SIDES, width=SIDES, channels=CHANNELS)
def test_attention_to_positions(branches: int, batch: int, height: int, width: int, channels: int) -> None:
    parts = list(drawn(branches, batch, height * width, channels))
    bias, modulation = drawn(branches, channels, seed=1), drawn(branches, 2, channels, seed=2)
    attention = drawn(branches, batch, channels, seed=3).sigmoid()
    modulated = (parts, bias, modulation, attention)
    maps = operations.spatial_maps(*modulated)
    assert_close(maps, twins.spatial_maps(*modulated))
    arguments = (*modulated, maps, drawn(branches, 2, 7, 7, seed=4) / 10, drawn(branches, seed=5), height, width)
    for found, expected in zip(operations.spatial_gate(*arguments), twins.spatial_gate(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@FEW
@given(batch=BRANCHES, height=SIDES, width=SIDES, channels=st.integers(1, 20))
def test_weighing(batch: int, height: int, width: int, channels: int) -> None:
    vis, ir = drawn(2, batch, channels, height, width)
    logits = drawn(2, batch, height * width, channels, seed=1)
    arguments = (*logits, drawn(2, channels, seed=2), vis, ir)
    assert_close(operations.weigh(*arguments), twins.weigh(*arguments))


def fusion_module(config: FusionConfig) -> LatentFusion:
    module = LatentFusion(config).requires_grad_(False)
    for index, parameter in enumerate(module.parameters()):
        drawn_here = drawn(*parameter.shape, seed=index)
        parameter.data = 0.2 * drawn_here + 1 if parameter.ndim == 1 else drawn_here / parameter[0].numel() ** 0.5
    return module


@pytest.mark.parametrize(
    ("pool", "dtype", "width"),
    [
        (1, torch.float32, 7),
        (2, torch.float32, 7),
        (2, torch.float32, 45),  # more squares than a context has
        (2, torch.float16, 45),
        (1, torch.bfloat16, 7),
    ],
    ids=str,
)
@torch.inference_mode()
def test_the_fused_module_is_the_plain_one(pool: int, dtype: torch.dtype, width: int) -> None:
    config = FusionConfig(4, width=16, time_dim=64, num_groups=4, context_pool=pool, uses_time=pool == 1)
    plain = fusion_module(config).to(dtype)
    plain.time.float()
    fused = FusedLatentFusion(plain)
    vis, ir = drawn(2, 1, 4, 5, width)
    step = torch.tensor([40])
    conditioning = fused.conditioning(step)
    assert torch.equal(conditioning[0].flatten(), torch.cat([part.flatten() for part in plain.conditioning(step)]))
    found = fused.fuse(vis, ir, conditioning if pool == 1 else plain.conditioning(step))
    assert (found.dtype, found.shape) == (torch.float32, vis.shape)
    assert relative_rms(found, plain(vis, ir, step), vis) < TOLERANCES[dtype]


def test_each_item_with_a_step_of_its_own_is_refused() -> None:
    fused = FusedLatentFusion(LatentFusion(FusionConfig(4, width=16, time_dim=64, num_groups=4)))
    with pytest.raises(ConfigError, match="one time step"):
        fused.conditioning(torch.tensor([1, 2]))
