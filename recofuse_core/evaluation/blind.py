"""Scores without a reference: how distorted one picture looks by itself, 0 to about 100, less is better.

`piqe` needs nothing. `brisque` needs the package of that name, which carries the weights of its authors; without it
there is no such score. Both were made for noise, blur and compression: neither knows how bright a scene should be, and
a flat grey picture is "bad" to PIQE. They are read beside what a picture looks like, never alone.
"""

import functools
import importlib
import importlib.util
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recofuse_core.errors import ShapeError
from recofuse_core.evaluation.quality import grey

Floats = NDArray[np.float64]

BLOCK = 16  # pixels a side
SEGMENT = 6  # pixels of a block's edge
ACTIVE = 0.1  # variance from which a block is looked at
IMPAIRED = 0.1  # std of a segment below which a block shows an artefact


def piqe(image: Tensor) -> float:
    """PIQE (Venkatanath et al., 2015) of an image (1 or 3, H, W), as the image toolboxes compute it.

    Blocks of 16x16 of the contrast-normalised grey picture count if they hold detail. One whose edge has a flat piece
    shows an artefact, one whose middle varies much like its surroundings shows noise, and what is distorted weighs by
    its variance. 100 for a picture without any detail. Raises ShapeError for sides below 16.
    """
    levels = grey(image).cpu().numpy()
    height, width = levels.shape
    if min(height, width) < BLOCK:
        raise ShapeError(f"PIQE needs sides of at least {BLOCK}, got {(height, width)}")
    levels = np.pad(levels, ((0, -height % BLOCK), (0, -width % BLOCK)), "symmetric")
    levels = np.round(255 * (levels / max(levels.max(), 1)))
    blocks = _blocks(_normalised(levels))
    variances = blocks.var(axis=(1, 2), ddof=1)
    blocks, variances = blocks[variances > ACTIVE], variances[variances > ACTIVE]
    shows_artefact = _has_flat_edge(blocks)
    shows_noise = _is_noisy(blocks, np.sqrt(variances))
    distortion = (shows_artefact * (1 - variances) + shows_noise * variances).sum()
    return float(100 * (distortion + 1) / (len(blocks) + 1))


def brisque(image: Tensor) -> float | None:
    """BRISQUE (Mittal et al., 2012) of an image (1 or 3, H, W).

    None if the package `brisque` is not installed, and for a picture without any detail, which has no such score.
    """
    scorer = _brisque_scorer()
    if scorer is None:
        return None
    levels: Floats = grey(image).cpu().numpy() / 255
    half: Any = cv2.resize(levels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_CUBIC)
    with np.errstate(invalid="ignore"):
        features = [feature for scale in (levels, half) for feature in scorer.calculate_brisque_features(scale)]
    # Some come as arrays of one number, which the package itself cannot read with a recent numpy.
    numbers = np.array([np.asarray(feature, np.float64).item() for feature in features])
    return float(scorer.calculate_image_quality_score(numbers)) if np.isfinite(numbers).all() else None


@functools.cache
def _brisque_scorer() -> Any:
    # No extra of ours brings it: the libsvm that it needs comes as sources alone, which want a compiler.
    if importlib.util.find_spec("brisque") is None:
        return None
    return importlib.import_module("brisque").BRISQUE()


def _normalised(levels: Floats) -> Floats:
    """Every place less its neighbourhood's mean, over its std and one."""

    def smooth(plane: Floats) -> Floats:
        return np.asarray(cv2.GaussianBlur(plane, (7, 7), 7 / 6, borderType=cv2.BORDER_REPLICATE), np.float64)

    mean = smooth(levels)
    std = np.sqrt(np.abs(smooth(levels * levels) - mean * mean))
    normalised: Floats = (levels - mean) / (std + 1)
    return normalised


def _blocks(plane: Floats) -> Floats:
    """(N, BLOCK, BLOCK) of a plane of whole blocks."""
    rows, columns = plane.shape[0] // BLOCK, plane.shape[1] // BLOCK
    return plane.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2).reshape(-1, BLOCK, BLOCK)


def _has_flat_edge(blocks: Floats) -> NDArray[np.bool_]:
    edges = np.stack([blocks[:, 0], blocks[:, -1], blocks[:, :, 0], blocks[:, :, -1]], axis=1)  # (N, 4, BLOCK)
    segments = np.lib.stride_tricks.sliding_window_view(edges, SEGMENT, axis=2)
    flat: NDArray[np.bool_] = (segments.std(axis=3, ddof=1) < IMPAIRED).any(axis=(1, 2))
    return flat


def _is_noisy(blocks: Floats, stds: Floats) -> NDArray[np.bool_]:
    middle = BLOCK // 2
    centre = blocks[:, :, middle - 1 : middle + 1]
    # The second column goes after the first has, so it is the one behind the centre: as in the toolboxes.
    around = np.delete(blocks, [middle - 1, middle + 1], axis=2)
    surround = around.std(axis=(1, 2), ddof=1)
    ratio = np.divide(centre.std(axis=(1, 2), ddof=1), surround, out=np.zeros_like(stds), where=surround > 0)
    noisy: NDArray[np.bool_] = stds > 2 * np.abs(stds - ratio) / np.maximum(stds, ratio)
    return noisy
