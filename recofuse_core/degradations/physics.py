"""The physical models: light, lens, weather, sensor and codec, one function each with explicit parameters.

`jpeg` and `quantise` aside, they do not clip: a sensor clips once, in `quantise`, and clipping every part would bias
the noise. Images are CPU float32 in [0, 1], (C, H, W).
"""

import math
from collections.abc import Callable
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Generator, Tensor

from recofuse_core.errors import CoreError, ShapeError
from recofuse_images.errors import ImageError
from recofuse_images.limits import OWN_FILES
from recofuse_images.reader import read_picture
from recofuse_images.writer import jpeg_bytes


def low_light(image: Tensor, gain: float, gamma: float) -> Tensor:
    """Under-exposure: (gain * I) ** gamma; gain in [0.35, 0.9], gamma in [1.2, 2.6]."""
    return (image * gain).clamp_min(0).pow(gamma)


def haze(image: Tensor, airlight: Tensor | float, transmission: Tensor | float) -> Tensor:
    """Atmospheric scattering (Koschmieder): I * t + A * (1 - t).

    airlight: scalar, (C, 1, 1) or (C, H, W), in [0, 1]; transmission: scalar or (1, H, W), in (0, 1].
    """
    return image * transmission + airlight * (1 - transmission)


def depth_surrogate(height: int, width: int, clutter: float, generator: Generator) -> Tensor:
    """A smooth stand-in for scene depth, (1, H, W) in [0.4, 1], far at the top and near at the bottom.

    Blurred noise is mixed in; clutter in [0, 1] is its share. The noise is a 5x5 random grid blown up bicubically,
    which costs next to nothing and has the spectrum of heavily blurred white noise.
    """
    grid = torch.rand(5, 5, generator=generator).numpy()
    bumps = torch.from_numpy(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)).clamp_(0, 1)
    slope = torch.linspace(1, 0, height).unsqueeze(1)  # (H, 1)
    return bumps.mul_(clutter).add_(slope * (1 - clutter)).mul_(0.6).add_(0.4).unsqueeze(0)


def precipitation(image: Tensor, cover: Tensor, brightness: float) -> Tensor:
    """Rain or snow in front of a scene: I * (1 - cover) + brightness * cover; cover (1, H, W) in [0, 1]."""
    return image * (1 - cover) + brightness * cover


def rain_cover(
    height: int, width: int, density: float, length: float, angle: float, opacity: float, generator: Generator
) -> Tensor:
    """What falling drops cover while the shutter is open, (1, H, W) in [0, opacity]: short, parallel streaks.

    density: drops a pixel, in [0.001, 0.006]; length: of a streak in px, in [9, 27]; angle: from the x axis, radians.
    """
    drops = (torch.rand(1, height, width, generator=generator) < density).float()
    drops *= torch.rand(drops.shape, generator=generator)
    kernel = _line_kernel(length, angle)
    kernel /= kernel.max()
    streaks = _filter_planes(drops, lambda plane: cv2.filter2D(plane, -1, kernel, borderType=cv2.BORDER_CONSTANT))
    return streaks.clamp_(0, 1) * opacity  # large kernels go through a Fourier transform, which may dip below zero


def snow_cover(height: int, width: int, density: float, opacity: float, generator: Generator) -> Tensor:
    """What falling flakes cover, (1, H, W) in [0, opacity]: soft discs of three sizes, the large (near) ones rarer.

    density: flakes a pixel, in [0.001, 0.006].
    """
    cover = torch.zeros(1, height, width)
    for sigma, share in ((0.7, 0.7), (1.3, 0.25), (2.4, 0.05)):
        flakes = (torch.rand(1, height, width, generator=generator) < density * share).float()
        soft = gaussian_blur(flakes, sigma) * (2 * math.pi * sigma**2)  # a lone flake's peak is one
        cover = torch.maximum(cover, soft)
    return cover.clamp_(0, 1) * opacity


def colour_cast(image: Tensor, gains: Tensor) -> Tensor:
    """Wrong white balance: one gain per channel, gains (3,) in [0.8, 1.2]."""
    return image * gains.view(-1, 1, 1)


def low_contrast(image: Tensor, slope: float, offset: float) -> Tensor:
    """Squeezed thermal contrast: slope * I + offset; slope in [0.25, 0.75], offset in [0, 1 - slope]."""
    return image * slope + offset


def stripe_profile(
    length: int, std: float, generator: Generator, *, smoothing: float = 0.0, max_run: int = 1
) -> Tensor:
    """Random per-line values of the given std, (length,): white, Gaussian low-pass, or constant in runs.

    smoothing: the low-pass std in px. Runs have 1 to max_run lines. A low-passed profile is scaled back, so that its
    expected std stays `std`.
    """
    if max_run > 1:
        runs = torch.randint(1, max_run + 1, (length,), generator=generator)
        levels = torch.randn(length, generator=generator)
        return torch.repeat_interleave(levels, runs)[:length] * std
    if smoothing <= 0:
        return torch.randn(length, generator=generator) * std
    radius = max(1, math.ceil(3 * smoothing))
    positions = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (positions / smoothing) ** 2)
    kernel /= kernel.square().sum().sqrt()  # unit energy keeps the variance of white noise
    white = torch.randn(1, 1, length + 2 * radius, generator=generator)
    return torch.nn.functional.conv1d(white, kernel.view(1, 1, -1)).view(-1) * std


def stripes(
    image: Tensor, offsets: Tensor, gains: Tensor | None = None, axis: Literal["columns", "rows"] = "columns"
) -> Tensor:
    """Fixed-pattern noise of a line-read infrared sensor: I * (1 + gains) + offsets, one value per column (or row).

    offsets, gains: (W,) for columns, (H,) for rows. Offset std in [1.5, 12] / 255, gain std in [0.01, 0.06].
    Raises ShapeError if a profile does not fit the image.
    """
    view = (1, 1, -1) if axis == "columns" else (1, -1, 1)
    num_lines = image.shape[-1 if axis == "columns" else -2]
    for profile in (offsets, gains):
        if profile is not None and profile.shape != (num_lines,):
            raise ShapeError(f"a stripe profile must have shape ({num_lines},) for {axis}, got {tuple(profile.shape)}")
    if gains is not None:
        image = image * (1 + gains.view(view))
    return image + offsets.view(view)


def fixed_pattern(image: Tensor, offsets: Tensor, gains: Tensor) -> Tensor:
    """Non-uniformity of an uncooled sensor: I * (1 + gains) + offsets, one value a pixel; offsets, gains (1, H, W).

    Offset std in [1.5, 8] / 255, with a smooth shading of up to 0.12 from the warm housing; gain std half of it.
    """
    return image * (1 + gains) + offsets


def dead_pixels(image: Tensor, is_dead: Tensor, levels: Tensor) -> Tensor:
    """Defective elements: pixels that show `levels` whatever the scene; is_dead (1, H, W), share in [.05, .5] %."""
    return torch.where(is_dead, levels, image)


def gaussian_noise(image: Tensor, sigma: float, generator: Generator, correlation: float = 0.0) -> Tensor:
    """Additive sensor noise of std sigma, in [4, 30] / 255; correlation in [0, 1] is shared by every two channels."""
    noise = torch.randn(image.shape, generator=generator)
    if correlation > 0:
        shared = torch.randn(1, *image.shape[1:], generator=generator)
        noise.mul_(math.sqrt(1 - correlation)).add_(shared, alpha=math.sqrt(correlation))
    return noise.mul_(sigma).add_(image)


def poisson_noise(image: Tensor, peak: float, generator: Generator) -> Tensor:
    """Photon noise: Poisson(I * peak) / peak; peak, the photons of a white pixel, in [20, 300]."""
    return torch.poisson(image.clamp_min(0) * peak, generator=generator) / peak


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Defocus: a Gaussian of std sigma px, in [0.6, 2.2] (infrared [0.6, 1.5]), reflecting borders."""
    return _filter_planes(
        image, lambda plane: cv2.GaussianBlur(plane, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    )


def motion_blur(image: Tensor, length: float, angle: float) -> Tensor:
    """Camera shake: the mean along a straight path of `length` px, in [3, 13] (infrared [3, 7]), at `angle` radians."""
    kernel = _line_kernel(length, angle)
    return _filter_planes(image, lambda plane: cv2.filter2D(plane, -1, kernel, borderType=cv2.BORDER_REFLECT_101))


def jpeg(image: Tensor, quality: int) -> Tensor:
    """JPEG coding and decoding at `quality`, in [25, 80] (infrared [40, 90]); clips to [0, 1] and rounds to 8 bit."""
    channels = image.shape[0]
    pixels = image.clamp(0, 1).mul_(255).round_().to(torch.uint8)
    array = (pixels[0] if channels == 1 else pixels.permute(1, 2, 0)).contiguous().numpy()
    try:
        decoded = read_picture(jpeg_bytes(array, quality), "vis", OWN_FILES).values
    except ImageError as error:
        raise CoreError(f"JPEG coding failed for an image of shape {tuple(image.shape)}") from error
    planes = torch.from_numpy(np.array(decoded).reshape(*pixels.shape[1:], channels)).permute(2, 0, 1)
    return planes.contiguous().float().div_(255)


def quantise(image: Tensor) -> Tensor:
    """Clip to [0, 1] and round to 8 bit, as the sensor's converter does."""
    return image.clamp(0, 1).mul_(255).round_().div_(255)


def _filter_planes(image: Tensor, filter_plane: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    planes = image.contiguous().numpy()
    return torch.from_numpy(np.stack([filter_plane(plane) for plane in planes]))


def _line_kernel(length: float, angle: float) -> np.ndarray:
    """A straight path through the centre, sampled four times per px and spread bilinearly; sums to one."""
    radius = math.ceil((length - 1) / 2) + 1
    along = np.linspace(-(length - 1) / 2, (length - 1) / 2, max(2, math.ceil(4 * length)))
    x, y = radius + along * math.cos(angle), radius + along * math.sin(angle)
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    dx, dy = x - column, y - row
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    np.add.at(kernel, (row, column), (1 - dx) * (1 - dy))
    np.add.at(kernel, (row, column + 1), dx * (1 - dy))
    np.add.at(kernel, (row + 1, column), (1 - dx) * dy)
    np.add.at(kernel, (row + 1, column + 1), dx * dy)
    kernel /= kernel.sum()
    return kernel.astype(np.float32)
