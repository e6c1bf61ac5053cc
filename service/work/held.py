"""What a worker knows of one job from take to finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from recofuse_images.reader import Pair
from service.queue.contract import Lease
from service.terms.jobs import Stage
from service.terms.measures import Alignment
from service.watch.tracing import NO_JOB_TRACE, JobTrace

if TYPE_CHECKING:
    from recofuse_images.measures import Measured
    from recofuse_rigs.warp import Warp
    from service.work.engine import Pixels
    from service.work.steadying import Frame


@dataclass(slots=True, eq=False)
class Held:
    """One job in this worker's hands."""

    lease: Lease
    pair: Pair | None = None
    warp: Warp | None = None  # by which infrared came into the visible frame, if its cameras are not registered
    ir_scale: tuple[float, float] = (0.0, 0.0)  # what is black and white in the pair's infrared
    measured: Measured | None = None  # the values of that, if the job asks for some
    ready_s: float = 0.0
    timings_s: dict[Stage, float] = field(default_factory=dict)
    is_running: bool = False  # in the model or beyond
    ir_source: str = ""  # of the pair, which is let go of before its result is there
    warnings: tuple[str, ...] = ()
    alignment: Alignment | None = None
    track: str = ""
    frame: Frame | None = None  # what has to be known of the pair, if it is a frame of a steady or calm stream
    trace: JobTrace = NO_JOB_TRACE

    @property
    def has_pictures(self) -> bool:
        """Whether the engine is done with it."""
        return self.is_running and self.pair is None


class PassInput(NamedTuple):
    """What an engine is given for one pass, frame by frame, see `PipelinedEngine.start`."""

    vis: list[Pixels]
    ir: list[Pixels]
    seeds: list[int]
    overlap: list[Pixels] | None

    @classmethod
    def of(cls, batch: Sequence[Held], size: int, *, is_partial: bool) -> PassInput:
        """The jobs of a batch, filled up with the last of them to a size. is_partial: infrared covers part of each."""
        filled = [*batch, *[batch[-1]] * (size - len(batch))]
        pairs = [held.pair for held in filled if held.pair is not None]
        overlaps = [held.warp.overlap for held in filled if held.warp is not None] if is_partial else []
        return cls(
            [pair.vis for pair in pairs],
            [pair.ir for pair in pairs],
            [held.lease.job.options.seed for held in filled],
            overlaps or None,
        )

    def stacked(self) -> tuple[Pixels, Pixels, Pixels | None]:
        """Both kinds of frames and the overlap, each as one array, see `Engine.fuse`."""
        return np.stack(self.vis), np.stack(self.ir), None if self.overlap is None else np.stack(self.overlap)
