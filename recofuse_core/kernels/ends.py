"""Both ends of a run on our kernels.

An image becomes an encoder's rows in one launch, a decoded one what is asked for in two or four.
"""

import torch
from torch import Tensor, nn

from recofuse_core.finishing import WIDENING_GAIN, WIDENING_GRID, Finish, widening_ranks
from recofuse_core.kernels import picture_operations as operations
from recofuse_core.networks import Rows
from recofuse_core.picture import OutputName


class FusedRows(nn.Module):
    """`Rows`."""

    def __init__(self, block: Rows) -> None:
        super().__init__()
        self.factor, self.middle = block.factor, block.middle

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """See Rows. Channels last."""
        rows: Tensor = operations.unshuffled(image, self.factor, self.middle, dtype)
        return rows


class FusedFinish(nn.Module):
    """`Finish`."""

    def __init__(self, block: Finish) -> None:
        super().__init__()
        self.widening = block.widening

    def forward(self, decoded: Tensor, name: OutputName, levels: bool) -> tuple[Tensor, Tensor]:
        """See Finish."""
        ends = None
        if name == "fused" and self.widening:
            cells = operations.luma_cells(decoded, WIDENING_GRID)
            ends = operations.ranked(cells, *widening_ranks(cells.shape[1]))
        image, is_finite = operations.paint(decoded, ends, self.widening, WIDENING_GAIN, name == "ir", levels)
        return image, is_finite.all()
