"""What a stream is given: its source of frames, and what holds for all of them."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from dataclasses import dataclass, field

from recofuse_client.pictures import ImageLike
from recofuse_client.retries import Retry
from recofuse_client.rpc import SERVICE
from recofuse_client.values import Frame, Mode, Options

METHOD = f"/{SERVICE}/FuseStream"
Frames = Iterable[Frame | tuple[ImageLike, ImageLike]]
AsyncFrames = AsyncIterable[Frame | tuple[ImageLike, ImageLike]]
CLOSE_S = 2.0  # for a source to give way once its stream is closed


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """What holds for a whole stream.

    window: frames of mode `all` that may be without an answer; more hides the way to a distant server. max_in_flight:
    frames that the server works on at once, 0 for its own choice. frame_timeout_s: each frame's deadline, counted from
    its arrival; None for the server's own. steady: hold levels from frame to frame where the scene stands still.
    calm: average noise away there; with one frame at work unless max_in_flight says more, which makes it less calm.
    reconnect_s: how long to go on trying when there is no answer any more;
    0: not at all. The time in which the source has nothing to send does not count.
    """

    options: Options = field(default_factory=Options)
    mode: Mode = "all"
    bgr: bool = False
    window: int = 16
    max_in_flight: int = 0
    frame_timeout_s: float | None = None
    steady: bool = True
    calm: bool = False
    reconnect_s: float = 60.0
    retry: Retry = field(default_factory=Retry)

    def __post_init__(self) -> None:
        if self.mode not in ("all", "latest"):
            raise ValueError(f"mode: accepted are all and latest, not {self.mode!r}")
        if self.window < 1 or self.max_in_flight < 0 or self.reconnect_s < 0:
            raise ValueError("window must be at least 1, max_in_flight and reconnect_s at least 0")
