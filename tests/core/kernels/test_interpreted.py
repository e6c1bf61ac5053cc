"""Every kernel against its eager twin, on Triton's interpreter: what they add up, and not how a card does it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: there is no wheel of it for this platform")

from recofuse_core.kernels import operations, twins
from recofuse_core.kernels.blocks import FusedBlock, FusedConvBlock
from recofuse_core.kernels.choice import relative_rms
from recofuse_core.layers import Modulation
from recofuse_core.model import ModelConfig
from recofuse_core.picture import OutputName
from recofuse_core.runtime import Runtime
from recofuse_core.stacked import StackedBlock
from tests.core.kernels.blocks import drawn, gated_block, modulations
from tests.core.tiny import GATED, PUBLISHED, largest_difference, pairs, tiny_model

# The interpreter cuts what does not fit bfloat16 off instead of rounding it, so its errors are twice a card's.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 4e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
FUSED: tuple[OutputName, ...] = ("fused",)
FEW = settings(max_examples=3, deadline=None, derandomize=True)
CHANNELS = st.integers(2, 40)
ROWS = st.integers(1, 70)  # one tile of rows is 64
BRANCHES = st.integers(1, 2)


@FEW
@given(branches=BRANCHES, rows=ROWS, channels=CHANNELS, width=CHANNELS, gated=st.booleans())
def test_norm_and_product(branches: int, rows: int, channels: int, width: int, gated: bool) -> None:
    columns = 2 * width if gated else width
    x, gain, shift = drawn(branches, rows, channels), *drawn(2, branches, channels, seed=1)
    weight, bias = drawn(branches, channels, columns, seed=2), drawn(branches, columns, seed=3)
    arguments = (3 * x + 1, gain, shift, weight, bias, 1e-5, gated)
    torch.testing.assert_close(
        operations.norm_product(*arguments), twins.norm_product(*arguments), rtol=1e-4, atol=1e-4
    )


@FEW
@given(
    branches=BRANCHES, batch=BRANCHES, height=st.integers(1, 9), width=st.integers(1, 11), channels=st.integers(1, 35)
)
def test_depthwise_gate_and_its_sums(branches: int, batch: int, height: int, width: int, channels: int) -> None:
    wide = drawn(branches * batch, height * width, 2 * channels)
    weight, bias = drawn(branches, 9, 2 * channels, seed=1), drawn(branches, 2 * channels, seed=2)
    for found, expected in zip(
        operations.depthwise_gate(wide, weight, bias, height, width),
        twins.depthwise_gate(wide, weight, bias, height, width),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@FEW
@given(branches=BRANCHES, batch=BRANCHES, tiles=st.integers(1, 40), channels=CHANNELS)
def test_attention_of_the_means(branches: int, batch: int, tiles: int, channels: int) -> None:
    sums = drawn(branches * batch, tiles, channels)
    arguments = (sums, drawn(branches, channels, channels, seed=1), drawn(branches, channels, seed=2), 64 * tiles - 3)
    torch.testing.assert_close(operations.attend(*arguments), twins.attend(*arguments), rtol=1e-4, atol=1e-4)


@FEW
@given(branches=BRANCHES, batch=BRANCHES, rows=ROWS, channels=CHANNELS, scaled=st.booleans())
def test_product_and_addition(branches: int, batch: int, rows: int, channels: int, scaled: bool) -> None:
    x, residual = drawn(2, branches * batch, rows, channels)
    scale = drawn(branches * batch, channels, seed=1) if scaled else None
    arguments = (x, scale, drawn(branches, channels, channels, seed=2), drawn(branches, channels, seed=3), residual)
    torch.testing.assert_close(operations.product_add(*arguments), twins.product_add(*arguments), rtol=1e-4, atol=1e-4)


@FEW
@given(branches=BRANCHES, batch=BRANCHES, rows=ROWS, channels=CHANNELS)
def test_the_rest_of_a_block(branches: int, batch: int, rows: int, channels: int) -> None:
    gated, x = drawn(2, branches * batch, rows, channels)
    attention, (gain, shift) = drawn(branches * batch, channels, seed=1), drawn(2, branches, channels, seed=2)
    sides = (channels, 2 * channels, channels)
    weights = [drawn(branches, channels, side, seed=side) / channels**0.5 for side in sides]
    biases = [drawn(branches, side, seed=1 + side) for side in sides]
    arguments = (gated, attention, x, weights, biases, gain, shift, 1e-5)
    torch.testing.assert_close(operations.finish(*arguments), twins.finish(*arguments), rtol=1e-3, atol=1e-3)


@DTYPES
@pytest.mark.parametrize("whole", [True, False], ids=["four kernels", "six kernels"])
@torch.inference_mode()
def test_a_fused_block_is_the_stacked_block(whole: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (2, 5, 7)
    monkeypatch.setattr(operations, "WIDEST_WHOLE", 256 if whole else 0)
    block = StackedBlock(gated_block(20, seed=1), gated_block(20, seed=2)).to(dtype)
    x, modulation = drawn(2, *size, 20, dtype=dtype), modulations(2, 20, dtype)
    fused = FusedBlock(block)
    found = fused(x, modulation)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert relative_rms(found, block(x, modulation), x) < TOLERANCES[dtype]
    assert torch.equal(fused(x, modulation), found)
    assert torch.equal(x, drawn(2, *size, 20, dtype=dtype))


@pytest.mark.parametrize("whole", [True, False], ids=["four kernels", "six kernels"])
@torch.inference_mode()
def test_rows_wider_than_a_tile(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "WIDEST_WHOLE", 256 if whole else 0)
    block = StackedBlock(gated_block(72, seed=1), gated_block(72, seed=2))
    x, modulation = drawn(2, 1, 3, 2, 72), modulations(2, 72)
    assert relative_rms(FusedBlock(block)(x, modulation), block(x, modulation), x) < 1e-5


@DTYPES
@pytest.mark.parametrize("modulated", [True, False])
@torch.inference_mode()
def test_a_fused_block_of_one_branch_is_the_plain_block(modulated: bool, dtype: torch.dtype) -> None:
    block = gated_block(16).to(dtype)
    x = drawn(2, 16, 5, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    scale1, shift1, scale2, shift2 = (part.flatten() for part in modulations(1, 16, dtype))
    modulation = (Modulation(scale1, shift1), Modulation(scale2, shift2)) if modulated else None
    found = FusedConvBlock(block)(x, modulation)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative_rms(found, block(x, modulation), x) < TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("stacked", "config"), [(True, GATED), (False, PUBLISHED)], ids=["stacked gated", "published apart"]
)
def test_a_whole_run_is_the_eager_one(stacked: bool, config: ModelConfig) -> None:
    model = tiny_model(config)
    eager = Runtime(model, precision="float32", stacked=stacked, kernels="eager")
    fused = Runtime(model, precision="float32", stacked=stacked, kernels="triton")
    assert fused.kernels.startswith("triton: ")
    vis, ir = pairs(1, 33, 41)
    one, other = (runtime.fuse(vis, ir, steps=1, outputs=FUSED) for runtime in (fused, eager))
    assert largest_difference(one, other) < 1e-4
