"""A steady stream's frame: its levels held to those of the frames before, and what it tells the next ones.

The worker keeps nothing: the means come with the job, and what was seen of the frame goes back with the result.
"""

from __future__ import annotations

from recofuse_images import steady
from recofuse_images.reader import Pair
from service.terms.images import Pixels
from service.terms.jobs import FusionOptions, Part


def given_of(pair: Pair) -> steady.Floats | None:
    """Cell means of a decoded pair; None for one that is too small to have any."""
    is_small = min(*pair.vis.shape[:2], *pair.ir.shape[:2]) < steady.GRID
    return None if is_small else steady.inputs(pair.vis, pair.ir)


def steadied(
    pictures: dict[Part, Pixels], given: steady.Floats, means: bytes, options: FusionOptions
) -> tuple[dict[Part, Pixels], bytes]:
    """The pictures, and what was seen of them as they came from the model.

    Infrared stays as it is where temperatures are read from it.
    """
    held = {part: picture for part, picture in pictures.items() if not (options.is_measured and part is Part.IR)}
    frame = steady.seen(held, given)
    before = steady.Seen.from_bytes(means) if means else None
    result = steady.steadied(held, frame, before)
    return {part: result.get(part, picture) for part, picture in pictures.items()}, frame.to_bytes()
