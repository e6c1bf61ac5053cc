"""The losses in the image: fusion targets, the logarithmic error, and the strongest picture."""

import math

import pytest
import torch
from torch import Generator

from recofuse_core.losses import FusionTargets, GradientTarget, chroma, fusion_loss, log_error, luma, strongest


def test_fusion_targets_are_told_apart() -> None:
    vis, ir = torch.rand(2, 1, 3, 16, 16, generator=Generator().manual_seed(0))
    ir = ir[:, :1].expand(-1, 3, -1, -1)
    mean = fusion_loss((vis + ir) / 2, vis, ir, targets=FusionTargets(intensity="mean"))
    assert float(mean.intensity) == pytest.approx(0, abs=1e-6)
    usual = fusion_loss((vis + ir) / 2, vis, ir)
    assert float(usual.intensity) > 0.05
    assert float(mean.gradient) == float(usual.gradient)
    gentle = fusion_loss(torch.full_like(vis, 0.5), vis, ir, targets=FusionTargets(gradient="mean"))
    harsh = fusion_loss(torch.full_like(vis, 0.5), vis, ir)
    assert float(gentle.gradient) < float(harsh.gradient)  # a flat picture lacks the mean less than the maximum
    assert float(gentle.intensity) == float(harsh.intensity)


def test_signed_gradients_are_not_met_by_a_made_up_texture() -> None:
    generator = Generator().manual_seed(0)
    vis, other = 0.5 + 0.05 * torch.randn(2, 1, 1, 32, 32, generator=generator).expand(-1, -1, 3, -1, -1)
    ir = torch.full_like(vis, 0.5)
    flat = torch.full_like(vis, 0.5)

    def costs(gradient: GradientTarget) -> list[float]:
        targets = FusionTargets(gradient=gradient)
        return [float(fusion_loss(image, vis, ir, targets=targets).gradient) for image in (flat, other, vis)]

    # Texture of the right strength that is not the source's own: better than none by absolute values, worse by signs.
    smooth, made_up, true = costs("maximum")
    assert true < made_up < smooth
    smooth, made_up, true = costs("signed")
    assert true == 0 < smooth < made_up
    # The stronger source is followed, whichever it is.
    assert float(fusion_loss(vis, flat, vis, targets=FusionTargets(gradient="signed")).gradient) == 0


def test_the_log_error_gives_every_image_an_equal_say() -> None:
    target = torch.rand(2, 3, 16, 16, generator=Generator().manual_seed(0))
    image = target + torch.tensor([0.1, 0.01])[:, None, None, None]
    expected = (math.log10(0.1**2 + 1e-5) + math.log10(0.01**2 + 1e-5)) / 2
    assert float(log_error(image, target)) == pytest.approx(expected, abs=1e-4)


def test_the_strongest_picture_has_the_larger_luma_and_the_visible_chroma() -> None:
    vis, ir = torch.rand(2, 1, 3, 16, 16, generator=Generator().manual_seed(0))
    best = strongest(vis, ir)
    torch.testing.assert_close(luma(best), torch.maximum(luma(vis), luma(ir)))
    torch.testing.assert_close(chroma(best), chroma(vis))


def test_the_luma_of_a_grey_is_that_grey() -> None:
    image = torch.rand(2, 3, 16, 16, generator=Generator().manual_seed(0))
    shares = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(luma(image), (shares * image).sum(dim=1, keepdim=True))
    assert torch.equal(luma(image[:, :1].expand(-1, 3, -1, -1)), image[:, :1])
