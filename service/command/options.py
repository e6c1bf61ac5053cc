"""Options that several verbs share: one name, one meaning and one help text each."""

from __future__ import annotations

from typing import Annotated

import typer

from service.command.environment import WEIGHTS_VARIABLE
from service.terms.errors import InvalidInputError

DEFAULT_WEIGHTS = "compact"

Weights = Annotated[
    str,
    typer.Option(
        envvar=WEIGHTS_VARIABLE, metavar="NAME_OR_PATH", help="A shipped model's name or the path of a checkpoint file."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes the first GPU, else the CPU.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of the model; 0: as many as may be used.")]
Exposure = Annotated[
    str | None,
    typer.Option(
        metavar="lit|as_shot",
        help="lit: a dark scene as a well exposed photograph, lamps kept, dark infrared brighter in the fused picture; "
        "as_shot: as dark as it came; veils are lifted in both; the model's own if unset.",
    ),
]
Steady = Annotated[bool, typer.Option(help="Hold levels steady from frame to frame where the scene stands still.")]
Calm = Annotated[
    bool, typer.Option("--calm", help="Average noise away where the scene stands still; one frame at a time.")
]
Align = Annotated[
    str,
    typer.Option(
        metavar="rig|refine",
        help="refine: what the rig leaves in each frame, or a pair without one has, is measured and put right if that "
        "is clear.",
    ),
]
Colour = Annotated[
    str,
    typer.Option(
        metavar="natural|grey|white_hot|iron|rainbow",
        help="Of the fused picture. The last three lay infrared in a palette over the visible picture in grey.",
    ),
]
ColourRange = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Infrared values between which those colours go from nothing to full; the upper half of the scale if "
        "unset.",
    ),
]
Degrees = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="GAIN OFFSET", help="Degrees Celsius are GAIN * value + OFFSET of the infrared values."),
]
AlarmAt = Annotated[
    str | None,
    typer.Option(
        "--alarm", metavar="60C|8200", help="Tell the regions that are at least so hot: degrees, or infrared values."
    ),
]
Outline = Annotated[bool, typer.Option("--outline", help="Draw the regions of the alarm into the fused picture.")]
VisRange = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Visible values that become black and white; by the depth if unset."),
]
IrRange = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Infrared values that become black and white; automatic if unset."),
]


def sides_of(size: str) -> tuple[int, int]:
    """Width and height of a --size. Raises InvalidInputError for anything but WIDTHxHEIGHT, and for small pictures."""
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 64 and len(size) <= 9):
        raise InvalidInputError(f"size: expected WIDTHxHEIGHT with sides of 64 px and more, got {size}")
    return int(width), int(height)
