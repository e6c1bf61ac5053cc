"""A stream from its cameras to its viewers, with its figures: what `recofuse stream` runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recofuse_client.client import Client, FusionOptions
from recofuse_client.values import Alignment, FrameResult, IrSource, Mode, Part, StreamStats

if TYPE_CHECKING:
    from recofuse_client.streams.options import Frames

SAY_EVERY_S = 0.5
MAX_REMEMBERED = 4096  # latencies
MAX_WARNINGS = 20  # different ones of a stream, which may go on for months


class Sink(Protocol):
    """Where pictures go."""

    def write(self, picture: NDArray[np.uint8], timestamp_ns: int) -> None:
        """Take a picture, RGB or grey, of this time in ns."""

    def close(self) -> None:
        """No more will come."""


@dataclass(slots=True)
class LiveReport:
    """What came of a stream. seconds: from the first result to the last.

    num_unpaired: visible frames left out for want of an infrared one near them in time. num_alarms: frames with a
    region at or above the alarm. alignments: of the last frames with align="refine". ir_source: what was read of the
    last infrared frame that was fused. warnings: each once, the first MAX_WARNINGS.
    """

    stats: StreamStats = field(default_factory=StreamStats)
    seconds: float = 0.0
    num_results: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_REMEMBERED))
    last_error: str = ""
    is_interrupted: bool = False
    ir_source: IrSource = ""
    warnings: list[str] = field(default_factory=list)
    num_alarms: int = 0
    num_unpaired: int = 0
    alignments: deque[Alignment] = field(default_factory=lambda: deque(maxlen=MAX_REMEMBERED))

    @property
    def fps(self) -> float:
        """Results a second; 0 for fewer than two."""
        return (self.num_results - 1) / self.seconds if self.seconds > 0 else 0.0

    def latency_s(self, percent: float) -> float:
        """A percentile of the latencies of the last 4096 results; 0 for none."""
        return float(np.percentile(self.latencies_s, percent)) if self.latencies_s else 0.0

    @property
    def moved_px(self) -> float | None:
        """How far infrared was moved beyond its rig, in the mean of the last 4096 frames; None if none was refined."""
        return float(np.mean([each.moved_px for each in self.alignments])) if self.alignments else None

    @property
    def residual_px(self) -> float | None:
        """How far off it still seemed, likewise; None where nothing was to be seen."""
        seen = [each.residual_px for each in self.alignments if each.residual_px is not None]
        return float(np.mean(seen)) if seen else None

    @property
    def figures(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "seconds": self.seconds,
            "fps": self.fps,
            "latency_p50_s": self.latency_s(50),
            "latency_p99_s": self.latency_s(99),
            "is_interrupted": self.is_interrupted,
            "last_error": self.last_error,
            "ir_source": self.ir_source,
            "warnings": self.warnings,
            "num_alarms": self.num_alarms,
            "num_unpaired": self.num_unpaired,
            "moved_px": self.moved_px,
            "residual_px": self.residual_px,
            **asdict(self.stats),
        }

    @property
    def line(self) -> str:
        """The figures that matter, in words."""
        stats = self.stats
        words = (
            f"{stats.fused} frames fused, {stats.failed} failed, {stats.dropped} dropped, {stats.lost} lost; "
            f"{self.fps:.1f} a second; latency p50 {self.latency_s(50) * 1000:.0f} ms, "
            f"p99 {self.latency_s(99) * 1000:.0f} ms"
        )
        words = f"{words}; {self.num_unpaired} without a partner in time" if self.num_unpaired else words
        words = f"{words}; {self.num_alarms} with an alarm" if self.num_alarms else words
        words = words if self.moved_px is None else f"{words}; infrared moved by {self.moved_px:.1f} px"
        return f"{words}; {stats.reconnects} reconnections" if stats.reconnects else words

    def add(self, result: FrameResult, started_s: float) -> None:
        """Count a result. started_s: when the first one came (monotonic)."""
        self.stats = result.stats
        self.num_results += 1
        self.seconds = time.monotonic() - started_s
        self.latencies_s.append(result.latency_s)
        if result.error is not None:
            self.last_error = str(result.error)
        if result.fusion is not None:
            self.ir_source = result.fusion.ir_source
            if result.fusion.alignment is not None:
                self.alignments.append(result.fusion.alignment)
            self.num_alarms += result.fusion.alarm is not None and result.fusion.alarm.num_regions > 0
            new = [warning for warning in dict.fromkeys(result.fusion.warnings) if warning not in self.warnings]
            self.warnings += new[: MAX_WARNINGS - len(self.warnings)]


def run(
    client: Client,
    frames: Frames,
    sinks: Sequence[Sink],
    *,
    mode: Mode,
    options: FusionOptions,
    steady: bool = True,
    calm: bool = False,
    say: Callable[[LiveReport], None] = lambda report: None,
    warn: Callable[[str], None] = lambda warning: None,
    max_frames: int = 0,
) -> LiveReport:
    """Stream frames through a server into the sinks, until they end, `max_frames` have come back or Ctrl-C is pressed.

    Closes the sinks in any case. say: is told the figures some times a second. warn: is told each warning once. Raises
    RecofuseError when the stream cannot go on, and what the frames and the sinks raise.
    """
    report, started_s, said_s = LiveReport(), 0.0, 0.0
    part = Part(options.get("output", "fused"))
    try:
        with client.stream(frames, mode=mode, steady=steady, calm=calm, **options) as results:
            try:
                for result in results:
                    now_s = time.monotonic()
                    started_s = started_s or now_s
                    num_told = len(report.warnings)
                    report.add(result, started_s)
                    for warning in report.warnings[num_told:]:
                        warn(warning)
                    if result.fusion is not None:
                        _write(sinks, result.fusion[part].pixels, result.timestamp_ns)
                    if now_s - said_s >= SAY_EVERY_S:
                        said_s = now_s
                        say(report)
                    if max_frames and report.num_results >= max_frames:
                        break
            except KeyboardInterrupt:
                report.is_interrupted = True
            report.stats = results.stats
    finally:
        for sink in sinks:
            sink.close()
    return report


def _write(sinks: Iterable[Sink], picture: NDArray[np.uint8], timestamp_ns: int) -> None:
    for sink in sinks:
        sink.write(picture, timestamp_ns)
