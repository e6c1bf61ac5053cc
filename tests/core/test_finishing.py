"""The end of a run: what widening promises, and what becomes of infrared that was brightened."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recofuse_core.brightening import Brightening
from recofuse_core.errors import ConfigError
from recofuse_core.finishing import WIDENING_GAIN, Finish, Finishing, widen_range
from recofuse_core.losses import chroma, luma
from tests.core.tiny import GATED, images_of, pairs, tiny_model


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_widening_keeps_order_chroma_and_both_ends(share: float, start: float, span: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = start * (1 - span) + span * torch.rand(2, 3, 40, 50, generator=generator)
    image[0] = 0.4  # a flat frame beside another
    wide = widen_range(image, share)
    assert float((wide[0] - 0.4).abs().max()) < 1e-6
    inside = ((wide > 0) & (wide < 1)).all(dim=1, keepdim=True)[1:]  # where no single colour ran out of range
    torch.testing.assert_close(
        chroma(wide[1:]) * inside, chroma(image[1:]) * inside, rtol=0, atol=1e-5, msg="chroma changed"
    )
    before, after = (luma(each[1:])[inside] for each in (image, wide))
    order = before.argsort()
    steps_before, steps_after = before[order].diff(), after[order].diff()
    assert bool((steps_after >= (1 - share) * steps_before - 1e-5).all())
    assert bool((steps_after <= WIDENING_GAIN * steps_before + 1e-5).all())


def ramp(start: float, end: float) -> Tensor:
    """(1, 3, 64, 128), from start to end from left to right, with level ends."""
    levels = torch.linspace(start, end, 118)
    row = torch.cat([levels[:1].expand(5), levels, levels[-1:].expand(5)])
    return row.repeat(64, 1).expand(1, 3, -1, -1)


def test_widening_moves_both_ends_by_the_share() -> None:
    image = ramp(0.2, 0.8)
    assert torch.equal(widen_range(image, 0), image)
    wide = luma(widen_range(image, 0.25))[0, 0, 0]
    assert float(wide[0]) == pytest.approx(0.75 * 0.2, abs=1e-5)
    assert float(wide[-1]) == pytest.approx(1 - 0.75 * 0.2, abs=1e-5)
    assert float(wide[63:65].mean()) == pytest.approx(0.5, abs=1e-5)
    whole = ramp(0, 1)
    torch.testing.assert_close(widen_range(whole, 0.25), whole, rtol=0, atol=1e-5)


def test_fog_is_widened_by_no_more_than_the_limit() -> None:
    wide = luma(widen_range(ramp(0.6, 0.64), 0.9))
    assert float(wide.max() - wide.min()) == pytest.approx(WIDENING_GAIN * 0.04, rel=1e-3)


def test_only_the_fused_image_is_widened() -> None:
    model, plain = tiny_model(replace(GATED, widening=0.4)), tiny_model()
    model.load_state_dict(plain.state_dict())
    vis, ir = pairs(2, 40, 48)
    wide, narrow = model.fuse(vis, ir), plain.fuse(vis, ir)
    (wide_fused, *wide_restored), (fused, *restored) = images_of(wide), images_of(narrow)
    assert all(torch.equal(one, other) for one, other in zip(wide_restored, restored, strict=True))
    assert torch.equal(wide_fused, widen_range(fused, 0.4))
    assert float((wide_fused - fused).abs().max()) > 0.05
    with pytest.raises(ConfigError, match="widening"):
        replace(GATED, widening=1.0)


@pytest.mark.parametrize("levels", [False, True])
def test_brightening_is_undone_of_infrared_alone(levels: bool) -> None:
    by = Brightening(torch.tensor([0.5, 2.0]).view(2, 1, 1, 1), torch.ones(2, 1, 1, 1))
    infrared = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    finish = Finishing(Finish(0.0), levels=levels, brightened_by=by)
    expected = {"ir": infrared[:, :1], "vis": by(infrared), "fused": by(infrared)}
    for name, image in expected.items():
        made = finish(name, by(infrared))  # type: ignore[arg-type]
        assert made.dtype == (torch.uint8 if levels else torch.float32)
        torch.testing.assert_close(made, (255 * image).round().byte() if levels else image, atol=1e-5, rtol=0)
    assert bool(finish.is_finite)
    finish("ir", torch.full((2, 3, 8, 8), torch.nan))
    assert not bool(finish.is_finite)
