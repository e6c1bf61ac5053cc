"""Bad requests and the error that each of them is, whichever face it comes in by.

Every case says the same thing twice: as the form of an HTTP request and as a gRPC message. UNKNOWN stands for a value
of an enum that does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recofuse_images.errors import BadImageError, ImageError, ImageTooLargeError, UnsupportedImageError
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from service.terms.errors import ErrorCode
from tests.fakes import file_of, pair, picture
from tests.images.files import BAD_FILES

VIS, IR = pair()
UNKNOWN: Any = 99
CODES: dict[type[ImageError], ErrorCode] = {
    BadImageError: ErrorCode.INVALID_INPUT,
    ImageTooLargeError: ErrorCode.PAYLOAD_TOO_LARGE,
    UnsupportedImageError: ErrorCode.UNSUPPORTED_MEDIA,
}


@dataclass(frozen=True)
class ErrorCase:
    """A request, and the code of its error. vis, ir: None leaves the image out."""

    code: ErrorCode
    vis: bytes | None = VIS
    ir: bytes | None = IR
    form: dict[str, str] = field(default_factory=dict)
    options: pb.FuseOptions = field(default_factory=pb.FuseOptions)

    def files(self) -> dict[str, bytes]:
        """The images as fields of a form."""
        return {name: data for name, data in (("vis", self.vis), ("ir", self.ir)) if data is not None}

    def message(self) -> pb.FuseRequest:
        """The whole case as a message."""
        return pb.FuseRequest(
            vis=pb.Image(encoded=self.vis) if self.vis is not None else None,
            ir=pb.Image(encoded=self.ir) if self.ir is not None else None,
            options=self.options,
        )


def _bad_options(**pairs: tuple[str, pb.FuseOptions]) -> dict[str, ErrorCase]:
    return {
        name.replace("_", " "): ErrorCase(
            ErrorCode.INVALID_INPUT, form={name.partition("__")[0]: value}, options=options
        )
        for name, (value, options) in pairs.items()
    }


ERROR_CASES: dict[str, ErrorCase] = {
    **{f"vis {name}": ErrorCase(CODES[kind], vis=data) for name, (data, kind, _) in BAD_FILES.items()},
    **{f"ir {name}": ErrorCase(CODES[kind], ir=data) for name, (data, kind, _) in BAD_FILES.items()},
    "one file for both": ErrorCase(ErrorCode.INVALID_INPUT, vis=VIS, ir=VIS),
    "no vis": ErrorCase(ErrorCode.INVALID_INPUT, vis=None),
    "no ir": ErrorCase(ErrorCode.INVALID_INPUT, ir=None),
    "other aspect": ErrorCase(ErrorCode.INVALID_INPUT, ir=file_of(picture(64, 64, channels=1))),
    **_bad_options(
        output=("everything", pb.FuseOptions(output=UNKNOWN)),
        format=("bmp", pb.FuseOptions(format=UNKNOWN)),
        sampler=("magic", pb.FuseOptions(sampler=UNKNOWN)),
        exposure=("bright", pb.FuseOptions(exposure=UNKNOWN)),
        colour=("purple", pb.FuseOptions(colour=UNKNOWN)),
        priority=("urgent", pb.FuseOptions(priority=UNKNOWN)),
        steps__none=("0", pb.FuseOptions(steps=0)),
        steps__many=("1001", pb.FuseOptions(steps=1001)),
        seed=(str(2**63), pb.FuseOptions(seed=2**63)),
        timeout_ms=("0", pb.FuseOptions(timeout_ms=0)),
        timeout_ms__long=("999999999", pb.FuseOptions(timeout_ms=999999999)),
        vis_range=("9,1", pb.FuseOptions(vis_range=pb.VisRange(low=9, high=1))),
        vis_range__nan=("nan,1", pb.FuseOptions(vis_range=pb.VisRange(low=float("nan"), high=1))),
        vis_range__empty=("0,0", pb.FuseOptions(vis_range=pb.VisRange())),
        rig=("cellar", pb.FuseOptions(rig="cellar")),
        rig__path=("../cellar", pb.FuseOptions(rig="../cellar")),
        rig__singular=("0,0,0,0,0,0,0,0,0", pb.FuseOptions(rig="0,0,0,0,0,0,0,0,0")),
        rig__no_file=("{}", pb.FuseOptions(rig="{}")),
        align=("sideways", pb.FuseOptions(align=UNKNOWN)),
        colour_range=("1,2", pb.FuseOptions(colour_range=pb.ColourRange(low=1, high=2))),
        ir_range=("9,1", pb.FuseOptions(ir_range=pb.IrRange(low=9, high=1))),
        ir_range__nan=("nan,1", pb.FuseOptions(ir_range=pb.IrRange(low=float("nan"), high=1))),
        ir_range__empty=("0,0", pb.FuseOptions(ir_range=pb.IrRange())),
    ),
}
