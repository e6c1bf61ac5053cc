"""What stands in for a model where it does not matter what a model does."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool2d

from recofuse_core.picture import Exposure, FusionOutput
from recofuse_core.sampler import SamplerName


@dataclass(frozen=True)
class Call:
    """How a pair was asked for; ir: (1, H, W)."""

    ir: Tensor
    seeds: int
    coupled: bool
    exposure: Exposure


class Scripted:
    """A `Fuser` that makes of a pair what a function says, and remembers how it was asked."""

    def __init__(self, make: Callable[[Tensor, Tensor], FusionOutput]) -> None:
        self.make = make
        self.calls: list[Call] = []

    def fuse(
        self,
        vis: Tensor,
        ir: Tensor,
        *,
        steps: int | None,
        sampler: SamplerName | None,
        seeds: int,
        coupled: bool,
        exposure: Exposure,
    ) -> FusionOutput:
        self.calls.append(Call(ir[0], seeds, coupled, exposure))
        return self.make(vis, ir)


def smoothed(vis: Tensor, ir: Tensor) -> FusionOutput:
    """Means of 3x3 pixels, fused by the mean: enough to gain on noise."""
    vis, ir = (avg_pool2d(image, 3, 1, 1, count_include_pad=False) for image in (vis, ir))
    return FusionOutput(fused=(vis + ir) / 2, vis=vis, ir=ir)


def unchanged(vis: Tensor, ir: Tensor) -> FusionOutput:
    """What came in."""
    return FusionOutput(fused=vis, vis=vis, ir=ir)


def halved(vis: Tensor, ir: Tensor) -> FusionOutput:
    """Half of every visible level, and nothing else."""
    return FusionOutput(fused=None, vis=vis / 2, ir=None)


def brightened(levels: list[float]) -> Callable[[Tensor, Tensor], FusionOutput]:
    """Levels added to what comes in, other ones to every frame."""
    more = iter(levels)

    def make(vis: Tensor, ir: Tensor) -> FusionOutput:
        brighter = (vis + next(more) / 255).clamp(0, 1)
        return FusionOutput(fused=brighter, vis=brighter, ir=ir)

    return make
