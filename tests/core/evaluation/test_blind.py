"""Scores without a reference: PIQE as an independent writing of it has it, and the order that both put pictures in."""

import numpy as np
import pytest
import torch
from torch import Tensor

from recofuse_core.data import to_uint8
from recofuse_core.degradations.physics import gaussian_blur, gaussian_noise
from recofuse_core.errors import ShapeError
from recofuse_core.evaluation import blind
from recofuse_core.scenes.scene import make_scene


def scene(height: int = 100, width: int = 131) -> Tensor:
    return make_scene(3, height, width).vis


def versions() -> list[Tensor]:
    """As it is, noisy, blurred."""
    clean = scene()
    return [
        to_uint8(image)
        for image in (clean, gaussian_noise(clean, 0.08, torch.Generator().manual_seed(0)), gaussian_blur(clean, 2.0))
    ]


def slow_piqe(levels: np.ndarray) -> float:
    """Block by block, as the paper tells it."""
    height, width = levels.shape
    padded = np.pad(levels, ((0, -height % 16), (0, -width % 16)), "symmetric")
    padded = np.round(255 * padded / padded.max())
    at = np.arange(-3, 4)
    kernel = np.exp(-(at**2) / (2 * (7 / 6) ** 2))
    kernel /= kernel.sum()

    def smooth(plane: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            wide = np.pad(plane, [(3, 3) if side == axis else (0, 0) for side in (0, 1)], "edge")
            plane = np.apply_along_axis(lambda line: np.convolve(line, kernel, "valid"), axis, wide)
        return plane

    mean = smooth(padded)
    normal = (padded - mean) / (np.sqrt(np.abs(smooth(padded**2) - mean**2)) + 1)
    distortion, active = 0.0, 0
    for top in range(0, padded.shape[0], 16):
        for left in range(0, padded.shape[1], 16):
            block = normal[top : top + 16, left : left + 16]
            variance = block.var(ddof=1)
            if variance <= 0.1:
                continue
            active += 1
            edges = (block[0], block[-1], block[:, 0], block[:, -1])
            if any(edge[k : k + 6].std(ddof=1) < 0.1 for edge in edges for k in range(11)):
                distortion += 1 - variance
            centre = block[:, 7:9].std(ddof=1)
            around = np.concatenate([block[:, :7], block[:, 8:9], block[:, 10:]], axis=1).std(ddof=1)
            std, ratio = np.sqrt(variance), centre / around
            if std > 2 * abs(std - ratio) / max(std, ratio):
                distortion += variance
    return 100 * (distortion + 1) / (active + 1)


def test_piqe_is_what_the_paper_tells() -> None:
    for image in versions():
        levels = np.round(np.array([0.299, 0.587, 0.114]) @ image.reshape(3, -1).numpy()).reshape(image.shape[1:])
        assert blind.piqe(image) == pytest.approx(slow_piqe(levels), rel=1e-3)


def test_piqe_knows_what_is_distorted() -> None:
    clean, _, blurred = map(blind.piqe, versions())
    assert clean < blurred
    assert blind.piqe(torch.full((3, 40, 40), 90, dtype=torch.uint8)) == 100
    assert blind.piqe(torch.zeros(1, 40, 40)) == 100
    with pytest.raises(ShapeError, match="at least 16"):
        blind.piqe(torch.zeros(1, 15, 40))


def test_brisque_knows_what_is_distorted() -> None:
    pytest.importorskip("brisque")
    clean, noisy, blurred = map(blind.brisque, versions())
    assert clean is not None
    assert noisy is not None
    assert blurred is not None
    assert clean < noisy
    assert clean < blurred
    assert blind.brisque(torch.full((3, 40, 40), 90, dtype=torch.uint8)) is None
