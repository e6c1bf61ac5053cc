"""The end of a run: what becomes of decoded images.

They are clamped, the range of the fused one is widened (docs/decisions/0013), what brightened infrared is undone in the
restored one (0046), and all are rounded to levels if levels came. Nothing here waits for the device.
"""

import functools

import torch
from torch import Tensor, nn

from recofuse_core.brightening import Brightening
from recofuse_core.layers import average_to
from recofuse_core.losses import luma
from recofuse_core.picture import OutputName

WIDENING_GRID = 64  # cells a side that a frame is averaged to, so that noise and hot pixels hardly move its ends
WIDENING_TAIL = 0.005  # share of the cells beyond either end
WIDENING_GAIN = 1.5  # at most, so that fog and flat frames do not come back as noise


def widen_range(image: Tensor, share: float) -> Tensor:
    """Move both ends of each image's range of luma by a share of their way to black and to white.

    image: (B, 3, H, W) in [0, 1]; returns the same. The curve has three straight parts, from (0, 0) to the lower end,
    to the upper and to (1, 1): it clips no luma and keeps its order. Chroma stays. The share is less where the middle
    part would be steeper than `WIDENING_GAIN`; a frame that uses the whole range comes back as it is.
    """
    if share == 0:
        return image
    y = luma(image)
    cells = average_to(WIDENING_GRID, y).flatten(1).sort(dim=1).values[:, :, None, None]
    first, last = widening_ranks(cells.shape[1])
    return widened(image, y, cells[:, first : first + 1], cells[:, last : last + 1], share, WIDENING_GAIN)


def widening_ranks(num_cells: int) -> tuple[int, int]:
    """The places, among sorted cells, of those at which the range of luma begins and ends."""
    tail = round(WIDENING_TAIL * num_cells)
    return tail, num_cells - tail - 1


def widened(image: Tensor, y: Tensor, low: Tensor, high: Tensor, share: float, most: float) -> Tensor:
    """`widen_range` with luma and both ends (B, 1, 1, 1) of it known. most: the gain."""
    used = (high - low).clamp(1e-6, 1 - 1e-6)
    unused = 1 - used
    moved = ((most - 1) * used / unused).clamp(max=share)
    # How far luma moves: outwards by the share of its way at and beyond either end, and in between along a line.
    between = (moved * unused / used) * (y - low) - moved * low
    change = torch.maximum(-moved * y, torch.minimum(between, moved * (1 - y)))
    return (image + change).clamp(0.0, 1.0)


class Finish(nn.Module):
    """What becomes of a decoded image. It has no weights: a place for what runs this otherwise (kernels/ends.py)."""

    def __init__(self, widening: float) -> None:
        super().__init__()
        self.widening = widening

    def forward(self, decoded: Tensor, name: OutputName, levels: bool) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W), not clamped, to the picture in [0, 1] or levels; and whether all of it is finite."""
        is_finite = torch.isfinite(decoded).all()
        image = decoded.clamp(0.0, 1.0)
        if name == "fused":
            image = widen_range(image, self.widening)
        elif name == "ir":
            image = image.mean(dim=1, keepdim=True)
        return (image * 255).round().byte() if levels else image, is_finite


class Finishing:
    """What becomes of decoded images, and whether all of them are finite so far.

    tone: (B, 1, H, W), how far the range of the fused image is widened; None for wholly. brightened_by: what is undone
    of the restored infrared image.
    """

    def __init__(
        self,
        finish: Finish,
        *,
        levels: bool,
        tone: Tensor | None = None,
        brightened_by: Brightening | None = None,
    ) -> None:
        self._finish = finish
        self._levels = levels
        self._tone = tone
        self._brightened_by = brightened_by
        self._flags: list[Tensor] = []

    def __call__(self, name: OutputName, decoded: Tensor) -> Tensor:
        """See picture.Finish."""
        image: Tensor
        if name == "fused" and self._tone is not None:
            wide, is_finite = self._finish(decoded, name, False)
            image = self._written(torch.lerp(decoded.clamp(0.0, 1.0), wide, self._tone))
        elif name == "ir" and self._brightened_by is not None:
            brighter, is_finite = self._finish(decoded, name, False)
            image = self._written(self._brightened_by.undone(brighter))
        else:
            image, is_finite = self._finish(decoded, name, self._levels)
        self._flags.append(is_finite)
        return image

    def _written(self, image: Tensor) -> Tensor:
        return (image * 255).round().byte() if self._levels else image

    @property
    def is_finite(self) -> Tensor:
        """Without dimensions; nothing waits for it."""
        return functools.reduce(torch.logical_and, self._flags)
