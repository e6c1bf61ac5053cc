"""What a visible and an infrared camera see alike: where edges are and which way they run, not how bright things are.

A cue map is (H, W, 2), float32: the gradient's direction at double angle, so that bright-to-dark and dark-to-bright
are the same, as long as the edge is strong beside its surroundings. Averaged, the directions of noise cancel and those
of an edge stay. Two maps are compared by their product summed over pixels, which is the mean cosine between the edges'
doubled directions; multichannel correlation computes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_rigs.rig import Matrix, Size

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

_TINY = 1e-6
_SURROUNDINGS = 12.0  # how wide an edge is compared, in sigmas
_FLOOR = 0.5  # of the picture's mean strength, that every edge is compared with too: flat regions stay flat
_GAIN = 1 / 1.5  # of a common edge, so that strong ones reach a length of 1


def cue_map(grey: Floats, seen: Mask | None = None, *, sigma: float, spread: float) -> Floats:
    """Edge directions of (H, W): (H, W, 2), lengths from 0 to 1.

    sigma: of the Gaussian before the gradient, pixels. spread: of the one that averages directions. seen: (H, W), where
    there is a picture; the edges of that area itself count for nothing.
    """
    smooth = cv2.GaussianBlur(grey, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    across, down = _floats(cv2.Scharr(smooth, cv2.CV_32F, 1, 0)), _floats(cv2.Scharr(smooth, cv2.CV_32F, 0, 1))
    strength = np.sqrt(across * across + down * down)
    doubled = np.stack([across * across - down * down, 2 * across * down], axis=-1) / (strength + _TINY)[..., None]
    if seen is not None and not seen.all():
        inside = inner_of(seen, max(1, round(2 * sigma)))
        doubled, strength = doubled * inside[..., None], strength * inside
    averaged = _floats(cv2.GaussianBlur(doubled, (0, 0), spread))
    usual = _floats(cv2.GaussianBlur(strength, (0, 0), _SURROUNDINGS * sigma))
    relative = averaged * (_GAIN / (usual + (_FLOOR * strength.mean() + _TINY)))[..., None]
    return _floats(relative / np.maximum(1, np.sqrt(energy_of(relative)))[..., None])


def inner_of(seen: Mask, pixels: int) -> Floats:
    """1 where there is a picture, but for so many pixels at its border, and else 0. The frame's own border is none."""
    kernel = np.ones((3, 3), np.uint8)
    inner = cv2.erode(seen.astype(np.uint8), kernel, iterations=pixels, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    return np.asarray(inner, np.float32)


def energy_of(cues: Floats) -> Floats:
    """Squared lengths of (H, W, n): (H, W)."""
    total = cues[..., 0] ** 2
    for index in range(1, cues.shape[-1]):  # einsum takes twice as long, and of two channels fourteen times
        total += cues[..., index] ** 2
    return np.asarray(total, np.float32)


def resized(grey: Floats, size: Size) -> Floats:
    """(H, W) in another size, averaged where it becomes smaller."""
    if (grey.shape[1], grey.shape[0]) == size:
        return grey
    method = cv2.INTER_AREA if grey.shape[1] > size[0] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(grey, size, interpolation=method), np.float32)


def laid(grey: Floats, matrix: Matrix, size: Size) -> tuple[Floats, Mask]:
    """A picture through a matrix in a frame of `size`, its edges going on outside of it, and where it reaches."""
    zoom = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    if zoom < 0.75:  # fewer pixels than it has
        grey = np.asarray(cv2.GaussianBlur(grey, (0, 0), 0.5 * np.sqrt(zoom**-2 - 1)), np.float32)
    picture = cv2.warpPerspective(grey, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    reach = cv2.warpPerspective(np.full(grey.shape, 255, np.uint8), matrix, size, flags=cv2.INTER_LINEAR)
    return np.asarray(picture, np.float32), np.asarray(reach > 250, np.bool_)


def _floats(values: NDArray[Any]) -> Floats:
    return np.asarray(values, np.float32)
