"""A baseline without learning: enhance each image with OpenCV, then fuse the luma by average, maximum or local weight.

What a careful engineer would try first, so that the model has something honest to beat. The recipe adapts to the image
but is never told which degradation was applied. Letters: H and W height and width. Images are CPU tensors, vis
(3, H, W) and ir (1, H, W), floats in [0, 1] or uint8; results are uint8.

    visible    non-local means, percentile stretch, gamma when dark, mild CLAHE on the lightness
    infrared   column destriping, non-local means, percentile stretch, gamma when dark, mild CLAHE

Non-local means adapts its strength to Immerkaer's noise estimate and is left out on clean images.
"""

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recofuse_core.data import to_uint8
from recofuse_core.errors import ShapeError
from recofuse_core.evaluation.quality import noise_estimate

Plane = NDArray[Any]

NOISE_FLOOR = 2.0  # levels; texture alone reads as about this much noise
VIS_DENOISE_GAIN, IR_DENOISE_GAIN = 1.5, 1.2  # filter strength per level of noise; the best PSNR at sigma 5 to 25
MAX_DENOISE = 40.0
STRETCH_PERCENTILES = (0.5, 99.5)
MAX_STRETCH = 4.0  # contrast gained at most, so that an empty scene does not become noise
DARK_MEAN = 0.35
BRIGHT_GOAL = 0.42
MIN_GAMMA = 0.45
CLAHE_LIMIT, CLAHE_TILES = 1.2, (8, 8)
STRIPE_SMOOTHING = 10.0  # px; slower changes across columns belong to the scene
WEIGHT_SMOOTHING = 5.0  # px


def enhance_vis(image: Tensor) -> Tensor:
    """The enhanced visible image, uint8 (3, H, W). Raises ShapeError."""
    pixels = _pixels(image, 3)
    strength = _denoise_strength(image, VIS_DENOISE_GAIN)
    if strength > 0:
        pixels = cv2.fastNlMeansDenoisingColored(pixels, None, strength, strength, 5, 15)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    stretched = _brighten(_stretch(pixels, grey))
    lab = cv2.cvtColor(stretched, cv2.COLOR_RGB2LAB)
    lab[..., 0] = _equalise(lab[..., 0])
    return _tensor(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB))


def enhance_ir(image: Tensor) -> Tensor:
    """The enhanced infrared image, uint8 (1, H, W). Raises ShapeError."""
    plane = destripe_columns(_pixels(image, 1)[..., 0])
    strength = _denoise_strength(torch.from_numpy(plane), IR_DENOISE_GAIN)
    if strength > 0:
        plane = cv2.fastNlMeansDenoising(plane, None, strength, 5, 15)
    plane = _equalise(_brighten(_stretch(plane, plane)))
    return _tensor(plane[..., None])


def destripe_columns(plane: Plane) -> Plane:
    """Subtract each column's offset from a (H, W) uint8 plane: its median difference from its horizontal surround."""
    levels = plane.astype(np.float32)
    surround = cv2.GaussianBlur(levels, (0, 0), sigmaX=STRIPE_SMOOTHING, sigmaY=1e-3)
    offsets = np.median(levels - surround, axis=0)
    return np.asarray(np.clip(np.rint(levels - offsets), 0, 255).astype(np.uint8))


def fuse_average(vis: Tensor, ir: Tensor) -> Tensor:
    """Mean of both lumas, chroma of vis: uint8 (3, H, W)."""
    return _fuse(vis, ir, lambda luma, infrared: (luma + infrared) / 2)


def fuse_maximum(vis: Tensor, ir: Tensor) -> Tensor:
    """Larger of both lumas, chroma of vis: uint8 (3, H, W)."""
    return _fuse(vis, ir, np.maximum)


def fuse_weighted(vis: Tensor, ir: Tensor) -> Tensor:
    """Each luma weighted by its local gradient energy, chroma of vis: uint8 (3, H, W)."""

    def mix(luma: Plane, infrared: Plane) -> Plane:
        weight = _activity(luma)
        share = weight / (weight + _activity(infrared))
        return np.asarray(share * luma + (1 - share) * infrared)

    return _fuse(vis, ir, mix)


BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "average": fuse_average,
    "maximum": fuse_maximum,
    "weighted": fuse_weighted,
}


def _pixels(image: Tensor, channels: int) -> Plane:
    if image.ndim != 3 or image.shape[0] != channels:
        raise ShapeError(f"expected an image of shape ({channels}, H, W), got {tuple(image.shape)}")
    return to_uint8(image).permute(1, 2, 0).contiguous().numpy()


def _tensor(pixels: Plane) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _denoise_strength(image: Tensor, gain: float) -> float:
    noise = noise_estimate(image)
    return min(MAX_DENOISE, gain * noise) if noise > NOISE_FLOOR else 0.0


def _stretch(pixels: Plane, grey: Plane) -> Plane:
    """Map the percentiles of `grey` to 0 and 255, all channels alike, so that hues keep their balance."""
    low, high = np.percentile(grey, STRETCH_PERCENTILES)
    gain = min(255 / max(high - low, 1.0), MAX_STRETCH)
    # where the gain is limited, the middle of the range stays where it was
    centre = (low + high) / 2
    goal = 127.5 if gain < MAX_STRETCH else centre
    stretched = (pixels.astype(np.float32) - centre) * gain + goal
    return np.asarray(np.clip(np.rint(stretched), 0, 255).astype(np.uint8))


def _brighten(pixels: Plane) -> Plane:
    mean = max(float(pixels.mean()) / 255, 1e-3)
    if mean >= DARK_MEAN:
        return pixels
    gamma = max(math.log(BRIGHT_GOAL) / math.log(mean), MIN_GAMMA)
    table = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return np.asarray(table[pixels])


def _equalise(plane: Plane) -> Plane:
    return np.asarray(cv2.createCLAHE(CLAHE_LIMIT, CLAHE_TILES).apply(plane))


def _activity(luma: Plane) -> Plane:
    dx, dy = cv2.Sobel(luma, cv2.CV_32F, 1, 0), cv2.Sobel(luma, cv2.CV_32F, 0, 1)
    return np.asarray(cv2.GaussianBlur(np.abs(dx) + np.abs(dy), (0, 0), WEIGHT_SMOOTHING)) + 1.0


def _fuse(vis: Tensor, ir: Tensor, mix: Callable[[Plane, Plane], Plane]) -> Tensor:
    colours = _pixels(vis, 3).astype(np.float32)
    infrared = _pixels(ir, 1)[..., 0].astype(np.float32)
    if colours.shape[:2] != infrared.shape:
        raise ShapeError(f"images differ in size: vis {colours.shape[:2]}, ir {infrared.shape}")
    luma = colours @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    shifted = colours + (mix(luma, infrared) - luma)[..., None]  # one offset for R, G and B moves Y alone
    return _tensor(np.clip(np.rint(shifted), 0, 255).astype(np.uint8))
