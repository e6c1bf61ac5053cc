"""The scores against independent writings: torchmetrics, scikit-image, numpy, and plain loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage import measure, metrics
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio as torchmetrics_psnr,
)
from torchmetrics.functional.image import (
    structural_similarity_index_measure as torchmetrics_ssim,
)
from torchmetrics.functional.image import (
    visual_information_fidelity as torchmetrics_vif,
)

from recofuse_core.errors import ShapeError
from recofuse_core.evaluation import quality

Array = NDArray[np.float64]

skimage_measure: Any = measure  # its functions carry no types
skimage_metrics: Any = metrics


def scene(seed: int, channels: int = 3, height: int = 61, width: int = 72, noise: float = 0.04) -> Tensor:
    """Smooth structure with edges and some noise, rounded to 8 bits: (channels, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 6, 7, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
    image[:, height // 3 : height // 2, width // 4 : width // 2] += 0.3
    image += noise * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round() / 255


def triple(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """fused, vis, ir: the fused image mixes its sources."""
    vis, ir = scene(seed), scene(seed + 100, channels=1)
    fused = ((0.6 * vis + 0.4 * ir).clamp(0, 1) * 255).round() / 255
    return fused, vis, ir


def pearson(a: Array, b: Array) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def correlate(image: Array, kernel: Array) -> Array:
    """Whole windows only."""
    windows = np.lib.stride_tricks.sliding_window_view(image, kernel.shape)
    result: Array = np.einsum("ijkl,kl->ij", windows, kernel)
    return result


def grey_array(image: Tensor) -> Array:
    array: Array = np.rint(image.double().numpy() * 255)
    if array.shape[0] == 1:
        return np.asarray(array[0])
    return np.asarray(np.rint(0.299 * array[0] + 0.587 * array[1] + 0.114 * array[2]))


@pytest.mark.parametrize("seed", [0, 1])
def test_psnr_agrees_with_others(seed: int) -> None:
    image, reference = scene(seed), scene(seed, noise=0.1)
    ours = quality.psnr(image, reference)
    assert ours == pytest.approx(
        skimage_metrics.peak_signal_noise_ratio(reference.numpy(), image.numpy(), data_range=1.0), abs=1e-4
    )
    assert ours == pytest.approx(torchmetrics_psnr(image[None], reference[None], data_range=1.0).item(), abs=1e-4)
    assert quality.psnr(image, image) == math.inf


@pytest.mark.parametrize("seed", [0, 1])
def test_ssim_agrees_with_others(seed: int) -> None:
    image, reference = scene(seed), scene(seed, noise=0.1)
    ours = quality.ssim(image, reference)
    expected = skimage_metrics.structural_similarity(
        image.double().numpy(),
        reference.double().numpy(),
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
    )
    assert ours == pytest.approx(expected, abs=1e-6)
    _, ssim_map = torchmetrics_ssim(
        image[None].double(), reference[None].double(), data_range=1.0, return_full_image=True
    )
    assert ours == pytest.approx(ssim_map[..., 5:-5, 5:-5].mean().item(), abs=1e-6)  # it averages the border as well


@pytest.mark.parametrize("seed", [0, 1])
def test_entropy_deviation_and_information_agree_with_scikit_image(seed: int) -> None:
    fused, vis, ir = triple(seed)
    levels, source = grey_array(fused), grey_array(vis)
    assert quality.entropy(fused) == pytest.approx(skimage_measure.shannon_entropy(levels, base=2), abs=1e-9)
    assert quality.standard_deviation(fused) == pytest.approx(np.std(levels), abs=1e-9)
    # scikit-image gives (H(a) + H(b)) / H(a, b); solve it for the mutual information
    both = skimage_measure.shannon_entropy(levels) + skimage_measure.shannon_entropy(source)
    edges = np.arange(257) - 0.5
    ratio = skimage_metrics.normalized_mutual_information(
        np.concatenate([source.ravel(), [0, 255]]), np.concatenate([levels.ravel(), [0, 255]]), bins=256
    )
    joint, _, _ = np.histogram2d(source.ravel(), levels.ravel(), bins=(edges, edges))
    joint /= joint.sum()
    expected = both + (joint[joint > 0] * np.log2(joint[joint > 0])).sum()
    assert quality.mutual_information(vis, fused) == pytest.approx(expected, abs=1e-9)
    assert both / (both - quality.mutual_information(vis, fused)) == pytest.approx(ratio, abs=5e-3)
    total = quality.mutual_information(vis, fused) + quality.mutual_information(ir, fused)
    assert quality.fusion_scores(fused, vis, ir).mi == pytest.approx(total)


@pytest.mark.parametrize("seed", [0, 1])
def test_vif_agrees_with_torchmetrics(seed: int) -> None:
    fused, vis, _ = triple(seed)
    expected = torchmetrics_vif(
        torch.from_numpy(grey_array(fused))[None, None], torch.from_numpy(grey_array(vis))[None, None], sigma_n_sq=2.0
    )
    assert quality.visual_information_fidelity(vis, fused) == pytest.approx(expected.item(), rel=1e-5)


def test_vif_agrees_with_a_plain_writing() -> None:
    fused, vis, _ = triple(3)
    reference, distorted = grey_array(vis), grey_array(fused)
    numerator = denominator = 0.0
    for scale in (1, 2, 3, 4):
        size = 2 ** (5 - scale) + 1
        axis = np.arange(size) - size // 2
        window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * (size / 5) ** 2))
        window /= window.sum()
        if scale > 1:
            reference = correlate(reference, window)[::2, ::2]
            distorted = correlate(distorted, window)[::2, ::2]
        for row in range(reference.shape[0] - size + 1):
            for column in range(reference.shape[1] - size + 1):
                a = reference[row : row + size, column : column + size]
                b = distorted[row : row + size, column : column + size]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                gain = covariance / (var_a + 1e-10)
                rest = var_b - gain * covariance
                if gain < 0:
                    gain, rest = 0.0, var_b
                numerator += math.log10(1 + gain**2 * var_a / (max(rest, 1e-10) + 2))
                denominator += math.log10(1 + var_a / 2)
    assert quality.visual_information_fidelity(vis, fused) == pytest.approx(numerator / denominator, rel=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_correlations_agree_with_numpy(seed: int) -> None:
    fused, vis, ir = triple(seed)
    f, v, i = (grey_array(image).ravel() for image in (fused, vis, ir))
    assert quality.correlation_score(fused, vis, ir) == pytest.approx((pearson(f, v) + pearson(f, i)) / 2, abs=1e-9)
    assert quality.correlations_of_differences(fused, vis, ir) == pytest.approx(
        pearson(f - v, i) + pearson(f - i, v), abs=1e-9
    )
    scores = quality.fusion_scores(fused, vis, ir)
    assert scores.max_corr_intensity == pytest.approx(pearson(f, np.maximum(v, i)), abs=1e-9)


def plain_edges(image: Array) -> tuple[Array, Array]:
    padded = np.pad(image, 1)
    strength, angle = np.zeros_like(image), np.zeros_like(image)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            p = padded[row : row + 3, column : column + 3]
            dx = p[0, 2] + 2 * p[1, 2] + p[2, 2] - p[0, 0] - 2 * p[1, 0] - p[2, 0]
            dy = p[2, 0] + 2 * p[2, 1] + p[2, 2] - p[0, 0] - 2 * p[0, 1] - p[0, 2]
            strength[row, column] = math.hypot(dx, dy)
            angle[row, column] = math.pi / 2 if dx == 0 else math.atan(dy / dx)
    return strength, angle


def test_edge_preservation_agrees_with_a_plain_writing() -> None:
    fused, vis, ir = triple(4)
    strength_f, angle_f = plain_edges(grey_array(fused))
    numerator = denominator = 0.0
    for source in (vis, ir):
        strength, angle = plain_edges(grey_array(source))
        for row, column in np.ndindex(*strength.shape):
            edge, edge_f = float(strength[row, column]), float(strength_f[row, column])
            ratio = 1.0 if edge == edge_f else min(edge, edge_f) / max(edge, edge_f)
            agreement = abs(abs(float(angle[row, column] - angle_f[row, column])) - math.pi / 2) / (math.pi / 2)
            kept = 0.9994 / (1 + math.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + math.exp(-22 * (agreement - 0.8)))
            numerator += kept * edge
            denominator += edge
    assert quality.edge_preservation(fused, vis, ir) == pytest.approx(numerator / denominator, rel=1e-9)


def test_agreement_with_the_larger_gradient_agrees_with_numpy() -> None:
    fused, vis, ir = triple(5)
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4

    def gradients(image: Tensor) -> Array:
        padded = np.pad(grey_array(image), 1, mode="edge")
        return np.stack([np.abs(correlate(padded, kernel)) for kernel in (sobel, sobel.T)])

    actual, target = gradients(fused), np.maximum(gradients(vis), gradients(ir))
    scores = quality.fusion_scores(fused, vis, ir)
    assert scores.max_corr_gradient == pytest.approx(pearson(actual, target), abs=1e-9)
    expected = skimage_metrics.structural_similarity(
        actual,
        target,
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255.0,
    )
    assert scores.max_ssim_gradient == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sigma", [3.0, 8.0, 15.0])
def test_noise_estimate_finds_the_noise_that_was_added(sigma: float) -> None:
    ramp = torch.linspace(0.3, 0.7, 128).expand(128, 128)  # planes do not count as noise
    noise = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) * sigma / 255
    assert quality.noise_estimate(ramp) < 0.5
    assert quality.noise_estimate(ramp + noise) == pytest.approx(sigma, rel=0.06)


def test_chroma_distance_sees_a_tint_and_ignores_brightness() -> None:
    vis = torch.full((3, 16, 16), 100 / 255)
    tinted = vis.clone()
    tinted[0] += 20 / 255  # red up by 20 levels: Y by 5.98, so Cr moves 0.713 * 14.02 and Cb -0.564 * 5.98
    assert quality.chroma_distance(vis + 25 / 255, vis) == pytest.approx(0, abs=1e-9)
    assert quality.chroma_distance(tinted, vis) == pytest.approx(math.hypot(0.713 * 14.02, 0.564 * 5.98), rel=1e-6)
    assert quality.chroma_distance(torch.full((16, 16), 0.2), vis) == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_scores_stay_in_their_ranges_and_copies_score_best(seed: int) -> None:
    fused, vis, ir = triple(seed)
    scores = quality.fusion_scores(fused, vis, ir)
    assert 0 <= scores.en <= 8
    assert 0 <= scores.qabf <= 1
    assert -2 <= scores.scd <= 2
    assert max(abs(scores.cc), abs(scores.ssim), abs(scores.max_ssim_intensity)) <= 1
    copy = quality.fusion_scores(vis, vis, quality.grey(vis) / 255)
    assert copy.cc == pytest.approx(1)
    assert copy.ssim == pytest.approx(1)
    assert copy.vif == pytest.approx(2)
    assert copy.mi == pytest.approx(2 * copy.en)
    assert copy.chroma == 0
    assert copy.max_corr_gradient == pytest.approx(1)
    assert copy.qabf == pytest.approx(0.9994 * 0.9879 / (1 + math.exp(-7.5)) / (1 + math.exp(-4.4)))


def test_number_types_and_grey_shapes_are_equivalent() -> None:
    fused, vis, ir = triple(6)
    expected = quality.fusion_scores(fused, vis, ir)
    whole = (fused * 255).round().to(torch.uint8)
    assert quality.fusion_scores(whole, vis.numpy(), ir[0].double().numpy()) == expected


def test_flat_images_have_defined_scores() -> None:
    flat = torch.full((3, 48, 48), 0.5)
    scores = quality.fusion_scores(flat, flat, flat[:1])
    assert (scores.en, scores.sd, scores.mi, scores.cc, scores.scd, scores.noise) == (0, 0, 0, 0, 0, 0)
    assert scores.vif == pytest.approx(2)
    assert scores.ssim == pytest.approx(1)


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(4, 48, 48),
        torch.rand(1, 3, 48, 48),
        torch.rand(3, 0, 48),
        torch.rand(48, 48) * 255,
        torch.full((48, 48), math.nan),
        torch.zeros(48, 48, dtype=torch.int64),
    ],
)
def test_unfit_images_are_refused(image: Tensor) -> None:
    with pytest.raises(ShapeError):
        quality.entropy(image)


def test_sizes_must_agree_and_suffice() -> None:
    image = torch.rand(3, 48, 48)
    with pytest.raises(ShapeError, match="size"):
        quality.fusion_scores(image, image, torch.rand(1, 48, 50))
    with pytest.raises(ShapeError, match="shape"):
        quality.psnr(image, image[:1])
    with pytest.raises(ShapeError, match="41"):
        quality.visual_information_fidelity(image[:, :40], image[:, :40])
    with pytest.raises(ShapeError, match="11"):
        quality.ssim(image[:, :10], image[:, :10])
    with pytest.raises(ShapeError, match="3"):
        quality.noise_estimate(image[:, :2])
