"""What stages draw alike, each from the generator that is passed in."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Generator, Tensor

from recofuse_core.degradations.recipes import Range

REDUCED = Range(1.0, 1.7)  # how many times a frame is made smaller, if it is: half of all, which are sharper then


def unit(generator: Generator) -> float:
    """A number in [0, 1)."""
    return float(torch.rand((), generator=generator))


def chance(probability: float, generator: Generator) -> bool:
    """True as often as asked."""
    return unit(generator) < probability


def index(count: int, generator: Generator) -> int:
    """A whole number below `count`."""
    return int(torch.randint(count, (), generator=generator))


def part_of(levels: np.ndarray, taken: int, side: int, generator: Generator) -> Tensor:
    """A square of `taken` px of a frame (H, W, 3) or (H, W), uint8, as (C, side, side) in [0, 1]; half are mirrored."""
    height, width = levels.shape[:2]
    taken = max(min(height, width, taken), 1)
    top, left = (int(unit(generator) * (length - taken + 1)) for length in (height, width))
    method = cv2.INTER_AREA if taken > side else cv2.INTER_LINEAR
    part = cv2.resize(levels[top : top + taken, left : left + taken], (side, side), interpolation=method)
    part = part[:, ::-1] if chance(0.5, generator) else part
    return torch.from_numpy(np.ascontiguousarray(np.atleast_3d(part))).permute(2, 0, 1).float() / 255


def taken_from(side: int, generator: Generator) -> int:
    """How many pixels of a frame make a square of `side`, so that it is about as sharp as cameras record."""
    return int(side * REDUCED.draw(generator)) if chance(0.5, generator) else side


def as_recorded(images: Sequence[np.ndarray], side: int, generator: Generator) -> Tensor:
    """A square (C, side, side) of one of the images, levels (H, W[, 3]), about as sharp as it was recorded."""
    levels = images[index(len(images), generator)]
    return part_of(levels, taken_from(side, generator), side, generator)
