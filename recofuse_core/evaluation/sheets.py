"""Contact sheets: one row of small pictures a pair."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recofuse_core.errors import ShapeError
from recofuse_core.evaluation.protocol import PairImages

SHEET_WIDTH = 240  # px of one picture
_LABEL_HEIGHT, _GAP = 18, 4


def sheet_row(name: str, images: PairImages) -> Tensor:
    """One pair as a row of labelled small pictures: uint8 (3, H', W')."""
    cells: list[NDArray[np.uint8]] = []
    for label, image in images.by_part().items():
        height = max(1, round(image.shape[1] * SHEET_WIDTH / image.shape[2]))
        pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        small = cv2.resize(pixels, (SHEET_WIDTH, height), interpolation=cv2.INTER_AREA)
        cell = np.full((height + _LABEL_HEIGHT + _GAP, SHEET_WIDTH + _GAP, 3), 24, dtype=np.uint8)
        cell[_LABEL_HEIGHT : _LABEL_HEIGHT + height, :SHEET_WIDTH] = small
        text = label if cells else f"{name}: {label}"
        cv2.putText(cell, text[:38], (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (230, 230, 230), 1, cv2.LINE_AA)
        cells.append(cell)
    return torch.from_numpy(np.concatenate(cells, axis=1)).permute(2, 0, 1).contiguous()


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """Rows of `sheet_row` one below the other: uint8 (3, H', W'). Raises ShapeError if there is none."""
    if not rows:
        raise ShapeError("a sheet needs at least one row")
    return torch.cat(list(rows), dim=1)
