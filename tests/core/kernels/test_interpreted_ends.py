"""The kernels of the end of a run against their eager twins, on Triton's interpreter, as in test_interpreted.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: there is no wheel of it for this platform")

from recofuse_core.finishing import Finish
from recofuse_core.kernels import picture_operations as operations
from recofuse_core.kernels import twins
from recofuse_core.kernels.ends import FusedFinish
from recofuse_core.picture import ALL_OUTPUTS, OutputName
from tests.core.kernels.blocks import drawn
from tests.core.kernels.test_interpreted import BRANCHES, FEW

SIDES = st.integers(1, 40)


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
