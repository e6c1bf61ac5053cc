"""The kernels of both ends of a run as operations of torch; see operations.py for what all of them share.

Images are (B, 3, H, W) of any strides, float32 but where levels are said to be taken, too.
"""

import torch
from torch import Tensor, library

from recofuse_core.kernels.operations import NAMESPACE

TILE = 1024  # pixels of one


@library.custom_op(f"{NAMESPACE}::unshuffled", mutates_args=())
def unshuffled(image: Tensor, factor: int, middle: float, dtype: torch.dtype) -> Tensor:
    """Images, or levels by 255, less `middle`, unshuffled: (B, 3 factor**2, H/factor, W/factor), channels last.

    factor: a power of two that divides both sides.
    """
    from recofuse_core.kernels import picture_ends

    return picture_ends.unshuffled(image, factor, middle, dtype, TILE)


@unshuffled.register_fake
def _(image: Tensor, factor: int, middle: float, dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = image.shape
    rows = image.new_empty(batch, height // factor, width // factor, channels * factor**2, dtype=dtype)
    return rows.permute(0, 3, 1, 2)


@library.custom_op(f"{NAMESPACE}::luma_cells", mutates_args=())
def luma_cells(image: Tensor, grid: int) -> Tensor:
    """Luma of clamped images averaged to grid x grid cells: (B, grid**2)."""
    from recofuse_core.kernels import picture_ends

    return picture_ends.luma_cells(image, grid)


@luma_cells.register_fake
def _(image: Tensor, grid: int) -> Tensor:
    return image.new_empty(len(image), grid**2)


@library.custom_op(f"{NAMESPACE}::ranked", mutates_args=())
def ranked(values: Tensor, first: int, last: int) -> Tensor:
    """What would stand at two places if each row of values (P, N), none negative, were sorted: (P, 2).

    A row that holds a NaN gives nothing of use.
    """
    from recofuse_core.kernels import picture_ends

    return picture_ends.ranked(values, first, last)


@ranked.register_fake
def _(values: Tensor, first: int, last: int) -> Tensor:
    return values.new_empty(len(values), 2)


@library.custom_op(f"{NAMESPACE}::paint", mutates_args=())
def paint(
    image: Tensor, ends: Tensor | None, share: float, gain: float, grey: bool, levels: bool
) -> tuple[Tensor, Tensor]:
    """Clamped images, their range widened as `widen_range` does, and which tiles (B, T) are finite.

    ends: (B, 2), where the range of luma begins and ends; none where nothing is widened. grey: the mean of the channels
    alone. levels: uint8, channel beside channel in memory; else floats, plane by plane.
    """
    from recofuse_core.kernels import picture_ends

    return picture_ends.paint(image, ends, share, gain, grey, levels, TILE)


@paint.register_fake
def _(image: Tensor, ends: Tensor | None, share: float, gain: float, grey: bool, levels: bool) -> tuple[Tensor, Tensor]:
    batch, _, height, width = image.shape
    channels = 1 if grey else 3
    is_finite = image.new_empty(batch, -(-height * width // TILE), dtype=torch.bool)
    if levels:
        return image.new_empty(batch, height, width, channels, dtype=torch.uint8).permute(0, 3, 1, 2), is_finite
    return image.new_empty(batch, channels, height, width), is_finite
