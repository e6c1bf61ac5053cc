"""A stream's frame: its levels held to those of the frames before, its noise averaged away, and what it tells the next.

The worker keeps nothing: means and history come with the job, and what was seen of the frame goes back with the result.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from recofuse_images import calm, steady
from recofuse_images.reader import Pair
from service.terms.images import Pixels
from service.terms.jobs import FusionJob, Part

logger = logging.getLogger(__name__)


class Frame(NamedTuple):
    """A pair as it came: its cell means for what is steady, itself halved for what is calm; None for what is not."""

    cells: steady.Floats | None
    halved: calm.Given | None

    @classmethod
    def of(cls, job: FusionJob, pair: Pair) -> Frame | None:
        """None for what is no frame of such a stream, and for a pair that is too small."""
        is_small = min(*pair.vis.shape[:2], *pair.ir.shape[:2]) < steady.GRID
        if is_small or (job.means is None and job.history is None):
            return None
        return cls(
            None if job.means is None else steady.inputs(pair.vis, pair.ir),
            None if job.history is None else calm.given(pair.vis, pair.ir),
        )


class Told(NamedTuple):
    """What goes back for the frames after this one; see `FusionResult`."""

    seen: bytes = b""
    history: bytes = b""


def steadied(pictures: dict[Part, Pixels], frame: Frame, job: FusionJob) -> tuple[dict[Part, Pixels], Told]:
    """The pictures as they are to be shown, and what was seen of them.

    Infrared stays as it is where temperatures are read from it.
    """
    held = {part: picture for part, picture in pictures.items() if not (job.options.is_measured and part is Part.IR)}
    seen = history = b""
    if frame.cells is not None:
        cells = steady.seen(held, frame.cells)
        before = steady.Seen.from_bytes(job.means) if job.means else None
        held, seen = steady.steadied(held, cells, before), cells.to_bytes()
    if frame.halved is not None:
        try:
            held, history = calm.calmed(held, frame.halved, job.history or b"")
        except ValueError:  # of a worker of another release
            logger.warning("a history cannot be read, the stream begins anew", extra={"job_id": job.id})
            held, history = calm.calmed(held, frame.halved, b"")
    return {part: held.get(part, picture) for part, picture in pictures.items()}, Told(seen, history)
