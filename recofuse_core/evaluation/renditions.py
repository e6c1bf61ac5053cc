"""Clean visible frames in the rendition that was asked for: what a result is compared with.

The rule knows no weights, so that all are measured by the same references: a frame that is well exposed is its own lit
rendition, a true night is lit as training lights nights that have no reference, and what lies between is mixed.
"""

from collections.abc import Callable

from torch import Tensor

from recofuse_core.errors import ConfigError
from recofuse_core.losses import luma
from recofuse_core.picture import Exposure
from recofuse_core.training.exposure import TRUE_NIGHT, WELL_EXPOSED, exposing


def rendition_of(clean: Tensor, exposure: Exposure) -> Callable[[Tensor], Tensor]:
    """What brings a clean frame (3, H, W) in [0, 1], and others of its sequence, into a rendition."""
    if exposure == "as_shot":
        return lambda image: image
    if exposure != "lit":
        raise ConfigError(f"exposure must be as_shot or lit, not {exposure!r}")
    mean = float(luma(clean[None]).mean())
    share = min(max((WELL_EXPOSED[0] - mean) / (WELL_EXPOSED[0] - TRUE_NIGHT), 0), 1)
    if share == 0:
        return lambda image: image
    expose = exposing(clean)
    return lambda image: image + share * (expose(image) - image)
