"""Image-fusion and restoration scores.

Fusion scores follow the field's evaluation kits: every image is first rounded to 8 bits and turned into BT.601 grey of
whole levels 0..255; scores of a fused image against two sources are the sum or the mean of two terms, as each docstring
says. EN, SD and MI reward noise, stretched contrast and copying, so the scores at the end of `FusionScores` (noise,
chroma, agreement with the maximum of both sources) belong beside them. Restoration scores (`psnr`, `ssim`) compare all
channels as they are, without rounding; round first where the figure is to describe an 8-bit file.

An `Image` is a torch tensor or numpy array of shape (H, W), (1, H, W) or (3, H, W), RGB, floats in [0, 1] or uint8.
Everything is computed in float64. Each function raises ShapeError for another shape, type or range, and for images
whose sizes differ.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from recofuse_core.errors import ShapeError

Image = Tensor | NDArray[Any]

PEAK = 255.0
MIN_VIF_SIDE = 41  # below it the fourth scale has no pixel left
_RANGE_SLACK = 1e-3  # rounding in half precision may leave [0, 1] by this much


@dataclass(frozen=True)
class FusionScores:
    """Scores of one fused image against its visible and infrared source; `fusion_scores` computes them.

    Higher is better except for `noise` and `chroma`, of which less is better.
    """

    en: float  # entropy, bits
    sd: float  # standard deviation, levels
    mi: float  # mutual information with ir plus that with vis, bits
    cc: float  # correlation, mean of both
    scd: float  # sum of the correlations of differences
    vif: float  # visual information fidelity, sum of both
    qabf: float  # edge preservation
    ssim: float  # mean of both
    noise: float  # Immerkaer's estimate, levels
    chroma: float  # distance of the chroma to that of vis, levels
    max_corr_intensity: float  # correlation with max(vis, ir)
    max_corr_gradient: float  # correlation of gradients with the larger of both sources' gradients
    max_ssim_intensity: float  # SSIM with max(vis, ir)
    max_ssim_gradient: float  # SSIM of gradients with the larger of both sources' gradients


def fusion_scores(fused: Image, vis: Image, ir: Image) -> FusionScores:
    """All scores of `fused` against the sources; the images share their height and width, at least 41 each."""
    grey_fused, grey_vis, grey_ir = grey(fused), grey(vis), grey(ir)
    _require_same_size(fused=grey_fused, vis=grey_vis, ir=grey_ir)
    target = torch.maximum(grey_vis, grey_ir)
    gradient = _gradients(grey_fused)  # (2, H, W)
    gradient_target = torch.maximum(_gradients(grey_vis), _gradients(grey_ir))
    return FusionScores(
        en=entropy(fused),
        sd=standard_deviation(fused),
        mi=mutual_information(vis, fused) + mutual_information(ir, fused),
        cc=correlation_score(fused, vis, ir),
        scd=correlations_of_differences(fused, vis, ir),
        vif=visual_information_fidelity(vis, fused) + visual_information_fidelity(ir, fused),
        qabf=edge_preservation(fused, vis, ir),
        ssim=(_mean_ssim(grey_fused[None], grey_vis[None]) + _mean_ssim(grey_fused[None], grey_ir[None])) / 2,
        noise=noise_estimate(fused),
        chroma=chroma_distance(fused, vis),
        max_corr_intensity=_pearson(grey_fused, target),
        max_corr_gradient=_pearson(gradient, gradient_target),
        max_ssim_intensity=_mean_ssim(grey_fused[None], target[None]),
        max_ssim_gradient=_mean_ssim(gradient, gradient_target),
    )


# --- restoration ------------------------------------------------------------------------------------------------------


def psnr(image: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio in dB over all channels; infinite for equal images."""
    first, second = _levels(image), _levels(reference)
    _require_same_shape(image=first, reference=second)
    error = (first - second).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def ssim(image: Image, reference: Image) -> float:
    """Structural similarity (Wang et al., 2004), the mean over channels and over the pixels that a whole window covers.

    Gaussian 11x11 window of std 1.5, K = (0.01, 0.03), range 255. Sides of at least 11.
    """
    first, second = _levels(image), _levels(reference)
    _require_same_shape(image=first, reference=second)
    return _mean_ssim(first, second)


# --- fusion -----------------------------------------------------------------------------------------------------------


def grey(image: Image) -> Tensor:
    """BT.601 grey, 0.299 R + 0.587 G + 0.114 B, of the image rounded to 8 bits: (H, W) float64, whole levels 0..255."""
    channels = _levels(image).round()
    return channels[0] if channels.shape[0] == 1 else _luma(channels).round()


def entropy(image: Image) -> float:
    """EN: Shannon entropy of the grey histogram, bits, in [0, 8]."""
    return _entropy_of_counts(torch.bincount(grey(image).long().flatten(), minlength=256))


def standard_deviation(image: Image) -> float:
    """SD: population standard deviation of the grey levels."""
    return grey(image).std(correction=0).item()


def mutual_information(source: Image, fused: Image) -> float:
    """Mutual information of two grey images in bits: H(a) + H(b) - H(a, b) of their 256x256 joint histogram.

    MI of a fused image is the sum over both sources.
    """
    first, second = grey(source), grey(fused)
    _require_same_size(source=first, fused=second)
    joint = torch.bincount((first * 256 + second).long().flatten(), minlength=256 * 256).view(256, 256)
    information = _entropy_of_counts(joint.sum(1)) + _entropy_of_counts(joint.sum(0)) - _entropy_of_counts(joint)
    return max(information, 0.0)


def correlation_score(fused: Image, vis: Image, ir: Image) -> float:
    """CC: mean of Pearson's correlations of the fused image with each source; 0 for a flat image."""
    grey_fused, grey_vis, grey_ir = grey(fused), grey(vis), grey(ir)
    _require_same_size(fused=grey_fused, vis=grey_vis, ir=grey_ir)
    return (_pearson(grey_fused, grey_vis) + _pearson(grey_fused, grey_ir)) / 2


def correlations_of_differences(fused: Image, vis: Image, ir: Image) -> float:
    """SCD = corr(fused - vis, ir) + corr(fused - ir, vis) (Aslantas and Bendes, 2015)."""
    grey_fused, grey_vis, grey_ir = grey(fused), grey(vis), grey(ir)
    _require_same_size(fused=grey_fused, vis=grey_vis, ir=grey_ir)
    return _pearson(grey_fused - grey_vis, grey_ir) + _pearson(grey_fused - grey_ir, grey_vis)


def visual_information_fidelity(source: Image, fused: Image) -> float:
    """Pixel-domain VIF (Sheikh and Bovik, 2006) of the fused image against one source: 4 scales, sigma_n^2 = 2.

    Windows of 17, 9, 5 and 3 pixels with std of a fifth, whole windows only. VIF of a fused image is the sum over both
    sources. Sides of at least 41. A flat source carries no information to lose: 1.
    """
    reference, distorted = grey(source), grey(fused)
    _require_same_size(source=reference, fused=distorted)
    if min(reference.shape) < MIN_VIF_SIDE:
        raise ShapeError(f"VIF needs sides of at least {MIN_VIF_SIDE}, got {tuple(reference.shape)}")
    noise_variance, tiny = 2.0, 1e-10
    kept = possible = 0.0
    pair = torch.stack([reference, distorted])  # (2, H, W)
    for scale in range(4):
        kernel = _gaussian(2 ** (4 - scale) + 1, (2 ** (4 - scale) + 1) / 5, pair)
        if scale > 0:
            pair = _filter_valid(pair, kernel)[:, ::2, ::2]
        moments = _filter_valid(torch.stack([*pair, *pair.square(), pair[0] * pair[1]]), kernel)
        mean_r, mean_d = moments[0], moments[1]
        var_r = (moments[2] - mean_r.square()).clamp_min(0)
        var_d = (moments[3] - mean_d.square()).clamp_min(0)
        covariance = moments[4] - mean_r * mean_d
        # the channel model: distorted = gain * reference + noise of variance `rest`
        gain = covariance / (var_r + tiny)
        rest = var_d - gain * covariance
        flat_r, flat_d = var_r < tiny, var_d < tiny
        var_r = var_r.masked_fill(flat_r, 0)
        rest = torch.where(flat_r | (gain < 0), var_d, rest).masked_fill(flat_d, 0).clamp_min(tiny)
        gain = gain.masked_fill(flat_r | flat_d, 0).clamp_min(0)
        kept += torch.log10(1 + gain.square() * var_r / (rest + noise_variance)).sum().item()
        possible += torch.log10(1 + var_r / noise_variance).sum().item()
    return (kept + tiny) / (possible + tiny)


def edge_preservation(fused: Image, vis: Image, ir: Image) -> float:
    """Qabf (Xydeas and Petrovic, 2000): how much of the sources' edges survives in strength and orientation, [0, 1].

    Sobel edges; strength 0.9994 / (1 + exp(-15 (ratio - 0.5))), orientation 0.9879 / (1 + exp(-22 (agreement - 0.8)));
    each pixel weighs as its source's edge. Outside the image is black, as in the usual kits.
    """
    grey_fused, grey_vis, grey_ir = grey(fused), grey(vis), grey(ir)
    _require_same_size(fused=grey_fused, vis=grey_vis, ir=grey_ir)
    strength_f, angle_f = _edges(grey_fused)
    preserved = weight = 0.0
    for source in (grey_vis, grey_ir):
        strength, angle = _edges(source)
        larger = torch.maximum(strength, strength_f)
        ratio = torch.where(larger > 0, torch.minimum(strength, strength_f) / larger.clamp_min(1e-12), 1.0)
        agreement = ((angle - angle_f).abs() - math.pi / 2).abs() * (2 / math.pi)  # edges have no sign: modulo pi
        quality = 0.9994 / (1 + torch.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + torch.exp(-22 * (agreement - 0.8)))
        preserved += (quality * strength).sum().item()
        weight += strength.sum().item()
    return preserved / weight if weight > 0 else 0.0


def noise_estimate(image: Image) -> float:
    """Immerkaer's (1996) noise std in grey levels: the mean response to a mask that cancels planes and edges."""
    levels = grey(image)
    height, width = levels.shape
    if min(height, width) < 3:
        raise ShapeError(f"the noise estimate needs sides of at least 3, got {(height, width)}")
    mask = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]], dtype=levels.dtype)
    response = functional.conv2d(levels[None, None], mask.to(levels.device)[None, None])
    return math.sqrt(math.pi / 2) / 6 * response.abs().mean().item()


def chroma_distance(fused: Image, vis: Image) -> float:
    """Mean Euclidean distance of (Cb, Cr) in levels, Cb = 0.564 (B - Y), Cr = 0.713 (R - Y); a grey image has none."""
    first, second = _levels(fused).round(), _levels(vis).round()
    _require_same_size(fused=first[0], vis=second[0])
    return (_chroma(first) - _chroma(second)).square().sum(0).sqrt().mean().item()


# --- parts ------------------------------------------------------------------------------------------------------------


def _levels(image: Image) -> Tensor:
    """(C, H, W) float64 in 0..255, checked."""
    tensor = image.detach() if isinstance(image, Tensor) else torch.tensor(image)
    if tensor.ndim == 2:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or tensor.numel() == 0:
        raise ShapeError(f"expected an image of shape (H, W), (1, H, W) or (3, H, W), got {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint8:
        return tensor.double()
    if not tensor.is_floating_point():
        raise ShapeError(f"expected floats in [0, 1] or uint8, got {tensor.dtype}")
    values = tensor.double()
    low, high = values.min().item(), values.max().item()
    if not (low >= -_RANGE_SLACK and high <= 1 + _RANGE_SLACK):  # written so that NaN fails as well
        raise ShapeError(f"expected values in [0, 1], got {low:.4g} to {high:.4g}")
    return values.clamp(0, 1) * PEAK


def _require_same_size(**images: Tensor) -> None:
    if len({image.shape[-2:] for image in images.values()}) > 1:
        sizes = ", ".join(f"{name} {tuple(image.shape[-2:])}" for name, image in images.items())
        raise ShapeError(f"images differ in size: {sizes}")


def _require_same_shape(**images: Tensor) -> None:
    if len({image.shape for image in images.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(image.shape)}" for name, image in images.items())
        raise ShapeError(f"images differ in shape: {shapes}")


def _luma(channels: Tensor) -> Tensor:
    return 0.299 * channels[0] + 0.587 * channels[1] + 0.114 * channels[2]


def _chroma(channels: Tensor) -> Tensor:
    """(2, H, W): Cb and Cr."""
    if channels.shape[0] == 1:
        return channels.new_zeros(2, *channels.shape[1:])
    luma = _luma(channels)
    return torch.stack([0.564 * (channels[2] - luma), 0.713 * (channels[0] - luma)])


def _entropy_of_counts(counts: Tensor) -> float:
    share = counts[counts > 0].double() / counts.sum()
    return -(share * share.log2()).sum().item() + 0.0  # + 0.0 turns -0.0 into 0.0


def _pearson(first: Tensor, second: Tensor) -> float:
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(first.square().sum().item() * second.square().sum().item())
    return (first * second).sum().item() / scale if scale > 1e-9 else 0.0


def _gaussian(size: int, std: float, like: Tensor) -> Tensor:
    """(size,) normalised samples of a Gaussian, centred."""
    positions = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (positions / std) ** 2)
    return kernel / kernel.sum()


def _filter_valid(images: Tensor, kernel: Tensor) -> Tensor:
    """Separable filter of (N, H, W) by a symmetric (size,) kernel, whole windows only.

    Shifted sums: torch's convolution has no fast path for float64, which the variances need.
    """
    for axis in (2, 1):
        length = images.shape[axis] - len(kernel) + 1
        filtered = torch.zeros_like(images.narrow(axis, 0, length))
        for start, weight in enumerate(kernel.tolist()):
            filtered.add_(images.narrow(axis, start, length), alpha=weight)
        images = filtered
    return images


def _mean_ssim(first: Tensor, second: Tensor) -> float:
    """Mean SSIM of (N, H, W) levels."""
    if min(first.shape[-2:]) < 11:
        raise ShapeError(f"SSIM needs sides of at least 11, got {tuple(first.shape[-2:])}")
    kernel = _gaussian(11, 1.5, first)
    maps = torch.cat([first, second, first.square(), second.square(), first * second])
    mean_a, mean_b, square_a, square_b, product = _filter_valid(maps, kernel).chunk(5)
    var_a, var_b, covariance = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean().item()


def _sobel(levels: Tensor) -> Tensor:
    """Horizontal and vertical Sobel responses of padded (H + 2, W + 2) levels: (2, H, W), weights 1, 2, 1."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=levels.dtype)
    kernels = torch.stack([across, across.T]).unsqueeze(1).to(levels.device)
    return functional.conv2d(levels[None, None], kernels)[0]


def _gradients(levels: Tensor) -> Tensor:
    """|dx|, |dy|: (2, H, W) in 0..255 (Sobel / 4: a full step gives 255), replicated border as in the fusion losses."""
    return _sobel(functional.pad(levels[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]).abs() / 4


def _edges(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel strength and orientation in (-pi/2, pi/2], black outside."""
    dx, dy = _sobel(functional.pad(levels, (1, 1, 1, 1)))
    angle = torch.where(dx == 0, math.pi / 2, torch.atan(dy / torch.where(dx == 0, 1.0, dx)))
    return torch.hypot(dx, dy), angle
