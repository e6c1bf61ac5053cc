"""The kernels of both ends of a run against their eager twins, on Triton's interpreter, as in test_interpreted.py."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed: there is no wheel of it for this platform")

from recofuse_core.finishing import Finish
from recofuse_core.kernels import picture_operations as operations
from recofuse_core.kernels import twins
from recofuse_core.kernels.ends import FusedFinish, FusedRows
from recofuse_core.model import ModelConfig
from recofuse_core.networks import Rows
from recofuse_core.picture import ALL_OUTPUTS, OutputName
from tests.core.kernels.blocks import drawn
from tests.core.kernels.test_interpreted import BRANCHES, DTYPES, FEW
from tests.core.tiny import CONFIGS, largest_difference, pairs, tiny_model

SIDES = st.integers(1, 40)
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7}  # the last is cut, see TOLERANCES
LAYOUTS = ("planes", "channels last", "one plane for all", "within others")
Layout = Literal["planes", "channels last", "one plane for all", "within others"]


def laid(image: Tensor, layout: Layout) -> Tensor:
    """An image (B, 3, H, W) as it may come to an encoder: infrared of one plane, tiles cut out of a frame."""
    if layout == "channels last":
        return image.contiguous(memory_format=torch.channels_last)
    if layout == "one plane for all":
        return image[:, :1].expand(-1, 3, -1, -1)
    return F.pad(image, (16, 32, 8, 0))[..., 8:, 16:-32] if layout == "within others" else image


@DTYPES
@FEW
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    power=st.integers(0, 2),
    layout=st.sampled_from(LAYOUTS),
    levels=st.booleans(),
)
def test_rows_of_an_image(
    dtype: torch.dtype, batch: int, height: int, width: int, power: int, layout: Layout, levels: bool
) -> None:
    factor = 2**power
    image = 0.5 + 0.3 * drawn(batch, 3, height * factor, width * factor)
    image = laid((255 * image.clamp(0, 1)).byte() if levels else image, layout)
    arguments = (image, factor, 0.5, dtype)
    found, expected = operations.unshuffled(*arguments), twins.unshuffled(*arguments)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.permute(0, 2, 3, 1).is_contiguous()
    if dtype == torch.float32 and not levels:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=1e-7)


@FEW
@given(batch=BRANCHES, height=st.integers(1, 30), width=st.integers(1, 30), layout=st.sampled_from(LAYOUTS))
def test_rows_hold_every_pixel_once(batch: int, height: int, width: int, layout: Layout) -> None:
    image = laid(drawn(batch, 3, 4 * height, 4 * width), layout)
    rows = FusedRows(Rows(4, 0.0))(image, torch.float32)
    assert torch.equal(F.pixel_shuffle(rows, 4), image)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [Rows(4, 0.5), Rows(1, 0.0)], ids=["gated", "published"])
@DTYPES
@torch.inference_mode()
def test_the_fused_beginning_is_the_plain_one(rows: Rows, layout: Layout, dtype: torch.dtype) -> None:
    """Several tiles of rows, the last of them not full."""
    image = laid(0.5 + 0.3 * drawn(2, 3, 48, 80), layout)
    for given_image in (image, laid((255 * image.clamp(0, 1)).byte(), layout)):
        found, expected = FusedRows(rows)(given_image, dtype), rows(given_image, dtype)
        torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=1e-7)


def test_what_is_not_finite_stays_where_it_is() -> None:
    image = drawn(1, 3, 16, 16)
    image[0, 1, 5, 6] = torch.nan
    image[0, 2, 9, 15] = torch.inf
    found = operations.unshuffled(image, 4, 0.5, torch.float16)
    assert torch.equal(found.isfinite(), F.pixel_unshuffle(image, 4).isfinite())


@CONFIGS
@pytest.mark.parametrize("size", [(48, 64), (37, 50)], ids=["whole", "padded"])
@torch.inference_mode()
def test_a_model_begins_the_same_with_it(config: ModelConfig, size: tuple[int, int]) -> None:
    """Of levels and of floats; levels come to the encoder as they are where their sides are whole."""
    plain, fused = tiny_model(config), tiny_model(config)
    fused.autoencoder.rows = FusedRows(fused.autoencoder.rows)  # type: ignore[assignment]
    vis, ir = pairs(2, *size)
    as_levels = [(255 * image).round().byte() for image in (vis, ir)]
    assert largest_difference(fused.fuse(vis, ir, steps=1), plain.fuse(vis, ir, steps=1)) < 1e-5
    found, expected = fused.fuse(*as_levels, steps=1), plain.fuse(*as_levels, steps=1)
    assert largest_difference(found, expected) <= 1


@FEW
@given(batch=BRANCHES, height=SIDES, width=SIDES, power=st.integers(0, 3))
def test_cells_of_luma(batch: int, height: int, width: int, power: int) -> None:
    image = drawn(batch, height, width, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(operations.luma_cells(image, 2**power), twins.luma_cells(image, 2**power))


@FEW
@given(rows=BRANCHES, values=st.integers(2, 300), one=st.floats(0, 1), other=st.floats(0, 1), levels=st.integers(1, 90))
def test_values_of_a_rank_are_exact(rows: int, values: int, one: float, other: float, levels: int) -> None:
    """Ties and zeros included."""
    drawn_values = (drawn(rows, values).abs() * levels).floor() / levels
    first, last = round(one * (values - 1)), round(other * (values - 1))
    found = operations.ranked(drawn_values, first, last)
    assert torch.equal(found, twins.ranked(drawn_values, first, last))


@FEW
@given(batch=BRANCHES, height=SIDES, width=SIDES, widened=st.booleans(), grey=st.booleans(), levels=st.booleans())
def test_painting(batch: int, height: int, width: int, widened: bool, grey: bool, levels: bool) -> None:
    image = 0.5 + 0.3 * drawn(batch, 3, height, width + 3)[..., :width]
    ends = torch.tensor([[0.2, 0.7]]).expand(batch, 2).contiguous() if widened else None
    arguments = (image, ends, 0.4, 1.5, grey, levels)
    (found, is_finite), (expected, expected_finite) = operations.paint(*arguments), twins.paint(*arguments)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(is_finite, expected_finite)
    difference = (found.float() - expected.float()).abs()
    if levels:  # sums in another order fall on the other side of a half now and then
        assert difference.max() <= 1
        assert difference.mean() < 0.01
        assert found.permute(0, 2, 3, 1).is_contiguous()
    else:
        assert difference.max() < 1e-5


def test_halves_are_rounded_to_even() -> None:
    image = (torch.arange(256).view(1, 1, 16, 16) / 255 + 0.5 / 255).expand(1, 3, 16, 16)
    image = torch.where((image * 255) % 1 == 0.5, image, 0.0)
    assert (image > 0).sum() > 100
    found, _ = operations.paint(image, None, 0.0, 1.5, False, True)
    assert torch.equal(found, (image.clamp(0, 1) * 255).round().byte())


@pytest.mark.parametrize("name", ALL_OUTPUTS)
@torch.inference_mode()
def test_the_fused_end_is_the_plain_one(name: OutputName) -> None:
    plain = Finish(0.4)
    decoded = 0.4 + 0.2 * torch.nn.functional.interpolate(drawn(1, 3, 5, 6), size=(70, 80), mode="bilinear")
    (found, is_finite), (expected, _) = FusedFinish(plain)(decoded, name, False), plain(decoded, name, False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert is_finite


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_is_seen(wrong: float) -> None:
    decoded = drawn(2, 3, 40, 50)
    decoded[1, 2, 39, 49] = wrong
    _, is_finite = operations.paint(decoded, None, 0.0, 1.5, True, True)
    assert is_finite[0].all()
    assert is_finite[1].tolist() == [True, False]
