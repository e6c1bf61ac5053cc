"""What to expect of streams at each resolution: `bench streams`, on otherwise idle cores.

Two questions, each with real processes, simulated cameras and processor time as the measure. What does a frame cost the
service? The null engine answers at once, four cameras send as fast as they may (mode `all`), and the server's processor
time is divided by the frames. What does a frame cost with the model on this machine? One camera in mode `latest` sends
faster than the model computes, so that the frames delivered a second are what one stream gets.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import all_in_one, free_port, machine
from service.command.cameras import CameraPlan, CameraReport, Encoding, render_loop, simulate
from service.watch.metrics import FlowMode

SIZES = ((320, 240), (640, 480), (1280, 720), (1920, 1080))
MODEL_SIZES = SIZES[:3]
ENCODINGS: tuple[Encoding, ...] = ("raw", "jpeg")


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. cpu_ms: of the server, a frame; latency_ms: median, from camera to camera."""

    engine: str
    size: str
    encoding: str
    num_streams: int
    frames_per_s: float
    cpu_ms: float
    latency_ms: float
    mib_per_frame: float  # both images as they were sent


def run(
    *, is_quick: bool = False, with_model: bool = True, json_path: Path | None = None, say: Callable[[str], None]
) -> list[Row]:
    """Measure all sizes; the last line that is said sums up."""
    seconds = 2.0 if is_quick else 5.0
    rows = []
    for size in SIZES[:2] if is_quick else SIZES:
        for encoding in ENCODINGS:
            plan = _plan(size, encoding, seconds, num_streams=4, fps=1000.0, mode=FlowMode.ALL)
            rows.append(_row("null", plan))
            say(_line(rows[-1]))
    if with_model:
        for size in MODEL_SIZES[:1] if is_quick else MODEL_SIZES:
            plan = _plan(size, "jpeg", 3 * seconds, num_streams=1, fps=10.0, mode=FlowMode.LATEST)
            rows.append(_row("core", plan))
            say(_line(rows[-1]))
    if json_path is not None:
        document = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    say(markdown(rows))
    say(f"streams: {'; '.join(map(_line, rows))}")
    return rows


def _plan(size: tuple[int, int], encoding: Encoding, seconds: float, **what: Any) -> CameraPlan:
    return CameraPlan(
        size=size, encoding=encoding, answer=encoding, seconds=seconds, num_frames=5, num_scenes=1, **what
    )


def _row(engine: str, plan: CameraPlan) -> Row:
    loops = render_loop(plan)
    port = free_port()
    width, height = plan.size
    settings: dict[str, dict[str, Any]] = {
        "engine": {"kind": engine, "warm_up_sizes": f"{width}x{height}"},
        "grpc": {"port": port},
        "log": {"level": "ERROR"},
    }
    with all_in_one(settings) as stack:
        before_s = stack.processes["serve"].cpu_s()
        report: CameraReport = asyncio.run(simulate([f"127.0.0.1:{port}"], plan, loops))
        spent_s = stack.processes["serve"].cpu_s() - before_s
    if report.total("num_failed") or not report.total("num_fused"):
        raise RuntimeError(f"frames failed: {report.figures['errors'][:3]}")
    vis, ir = loops[0][0]
    return Row(
        engine=engine,
        size=f"{width}x{height}",
        encoding=plan.encoding,
        num_streams=plan.num_streams,
        frames_per_s=report.total("num_fused") / report.seconds,
        cpu_ms=1e3 * spent_s / report.total("num_fused"),
        latency_ms=1e3 * report.latency_s(0.5),
        mib_per_frame=(vis.ByteSize() + ir.ByteSize()) / 2**20,
    )


def _line(row: Row) -> str:
    return f"{row.engine} {row.size} {row.encoding} {row.frames_per_s:.1f} frames/s, {row.cpu_ms:.1f} ms of processor"


def markdown(rows: Sequence[Row]) -> str:
    """A table of the rows."""
    lines = [
        "| Engine | Resolution | Frames as | MiB a pair | Streams | Frames/s in all | Server's CPU a frame |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.engine} | {row.size} | {row.encoding} | {row.mib_per_frame:.2f} | {row.num_streams} "
        f"| {row.frames_per_s:.1f} | {row.cpu_ms:.1f} ms |"
        for row in rows
    ]
    return "\n".join(lines)
