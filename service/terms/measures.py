"""What a request may want measured, and what is told of it: units, alarms, regions, and how well infrared lies."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# How the restored infrared comes in the values of its source: float32, or what 16 bits hold.
ValuesFormat = Literal["npy", "tiff", "png"]
Unit = Literal["counts", "celsius"]

ALARM = r"^[+-]?[0-9]{1,9}(\.[0-9]{1,9})?C?$"
MEDIA_TYPES: dict[str, str] = {"npy": "application/x-npy", "tiff": "image/tiff", "png": "image/png"}


def _alarm_text(given: object) -> object:
    text = f"{given:.9f}" if isinstance(given, int | float) and not isinstance(given, bool) else given
    if not isinstance(text, str) or not re.fullmatch(ALARM, text):
        raise ValueError("accepted are a number in the infrared file's values, and degrees, such as 8200 and 60C")
    return text


AlarmText = Annotated[str, BeforeValidator(_alarm_text)]


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Region(_Told):
    """A connected region at or above an alarm, in pixels of the answer. box: left, top, width, height."""

    box: tuple[int, int, int, int]
    area: int
    hottest: float
    centroid: tuple[float, float]


class Alarm(_Told):
    """What is at or above an alarm. regions: the largest first, not all of num_regions if there are many.

    area: pixels of all of them. hottest: the highest value; None without a region. All values are in `unit`.
    """

    threshold: float
    unit: Unit
    num_regions: Annotated[int, Field(ge=0)]
    area: Annotated[int, Field(ge=0)]
    hottest: float | None
    regions: tuple[Region, ...]


class Alignment(_Told):
    """What `align=refine` made of a frame, in visible pixels.

    moved_px: how far infrared was moved beyond its rig, in the mean; 0 if it was left alone. residual_px: how far off
    its parts still seem; None where there was nothing to see.
    """

    residual_px: Annotated[float, Field(ge=0)] | None
    moved_px: Annotated[float, Field(ge=0)]

    @property
    def line(self) -> str:
        """In words, such as `residual 0.8 px, moved 3.1 px`."""
        left = "unknown" if self.residual_px is None else f"{self.residual_px:.1f} px"
        return f"residual {left}, moved {self.moved_px:.1f} px"


def alarm_at(text: str) -> tuple[float, bool]:
    """The number of an alarm such as 60C or 8200, and whether it is in degrees. It fits `ALARM`."""
    return float(re.sub("C$", "", text)), text.endswith("C")
