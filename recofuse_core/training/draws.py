"""What stages draw alike, each from the generator that is passed in."""

import cv2
import numpy as np
import torch
from torch import Generator, Tensor


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
