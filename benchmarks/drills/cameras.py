"""Cameras: 16 simulated cameras at 10 frames a second each, and an engine that can serve half of them.

The queue is smaller than what the cameras have at work, so that it is full all the time. Mode `latest` must keep the
age of every delivered frame bounded (it does not grow, and stays within what the frames at work explain), serve all
cameras alike (each within 10 % of the mean), and let the server's memory rest. Mode `all` must slow the cameras and
lose nothing.
"""

from __future__ import annotations

import asyncio
from statistics import mean, median
from typing import Any

from benchmarks.drills import Report, Say
from benchmarks.processes import Process, all_in_one, free_port
from service.command.cameras import CameraPlan, CameraReport, render_loop, simulate
from service.watch.metrics import FlowMode

SETTINGS: dict[str, dict[str, Any]] = {
    "engine": {"kind": "fixed", "fixed_batch_s": 0.1, "fixed_item_s": 0},  # 80 frames a second in batches of 8
    "log": {"level": "ERROR"},
    "queue": {"max_jobs": 24},  # fewer than the frames at work: streams have to stand in line
}
NUM_STREAMS, FPS = 16, 10.0
LATEST_S, ALL_S = 15.0, 12.0
# Mode all wants frames that are large beside what HTTP/2 and the kernel buffer, some 4 MB a connection.
SIZES = {FlowMode.LATEST: (160, 120), FlowMode.ALL: (320, 240)}
IN_FLIGHT = 2  # of a stream in mode latest, and one more may wait
MAX_UNFAIRNESS = 0.10
MAX_GROWTH = 0.05  # of resident memory, from the second third of the time to the last
SLACK_S = 0.5
MAX_SENT = 0.9  # mode all: share of the frames that an unhindered camera would have sent


def run(*, is_quick: bool, say: Say) -> Report:
    """Both modes, each against a server of its own."""
    problems: list[str] = []
    latest, rss = _run(FlowMode.LATEST, LATEST_S / 2 if is_quick else LATEST_S, say)
    growth = mean(rss[-(len(rss) // 3) :]) / mean(rss[len(rss) // 3 : -(len(rss) // 3)]) - 1
    first_s, last_s = _median_ages(latest)
    bound_s = 2 * (IN_FLIGHT + 1) * NUM_STREAMS / max(latest.fused_per_s, 1e-9) + SLACK_S
    if latest.max_age_s > bound_s or last_s > 1.5 * first_s + 0.1:
        problems.append(f"the age of delivered frames is not bounded: {last_s:.2f} s after {first_s:.2f} s")
    if latest.unfairness > MAX_UNFAIRNESS:
        problems.append(f"cameras were not served alike: {latest.figures['fused_by_stream']}")
    if growth > MAX_GROWTH and not is_quick:
        problems.append(f"memory grew by {100 * growth:.1f} %")
    if latest.total("num_dropped") < 0.2 * latest.total("num_sent"):
        problems.append("the engine was not overloaded")
    everything, _ = _run(FlowMode.ALL, ALL_S / 2 if is_quick else ALL_S, say)
    num_wanted = NUM_STREAMS * FPS * everything.plan.seconds
    num_sent, num_fused = everything.total("num_sent"), everything.total("num_fused")
    if num_fused != num_sent or everything.total("num_unanswered") or everything.total("num_dropped"):
        problems.append(f"mode all lost frames: {num_sent} sent, {num_fused} fused")
    if num_sent > MAX_SENT * num_wanted and not is_quick:
        problems.append("mode all did not slow the cameras")
    for report in (latest, everything):
        if report.total("num_failed") or report.total("num_out_of_order") or report.total("num_gaps_unreported"):
            problems.append(f"{report.plan.mode}: failed, out of order or unreported: {report.figures['errors'][:3]}")
    ages_s = sorted(age_s for tally in latest.tallies for age_s in tally.ages_s)
    p99_s = ages_s[min(len(ages_s) - 1, int(0.99 * len(ages_s)))] if ages_s else 0.0
    line = (
        f"latest: {latest.fused_per_s:.0f} of {NUM_STREAMS * FPS:.0f} frames/s fused, {latest.total('num_dropped')} "
        f"dropped, age p99 {1e3 * p99_s:.0f} ms, at most {1e3 * latest.max_age_s:.0f} ms, each camera within "
        f"{100 * latest.unfairness:.1f} % of the mean, memory {100 * growth:+.1f} %; all: {num_sent} of "
        f"{num_wanted:.0f} frames sent, {num_fused} fused, none lost"
    )
    if problems:
        line = f"{line.removesuffix(', none lost')} [{'; '.join(problems)}]"
    figures = {
        "latest": {**latest.figures, "age_p99_ms": round(1e3 * p99_s, 1), "memory_growth": round(growth, 4)},
        "all": everything.figures,
        "problems": problems,
    }
    return Report(not problems, line, figures)


def _run(mode: FlowMode, seconds: float, say: Say) -> tuple[CameraReport, list[int]]:
    """One mode; the report, and the server's resident memory each half second."""
    plan = CameraPlan(
        num_streams=NUM_STREAMS,
        fps=FPS,
        seconds=seconds,
        mode=mode,
        size=SIZES[mode],
        encoding="raw",
        answer="raw",
        num_frames=10,
    )
    port = free_port()
    with all_in_one({**SETTINGS, "grpc": {"port": port}}) as stack:
        return asyncio.run(_watched(plan, port, stack.processes["serve"], say))


async def _watched(plan: CameraPlan, port: int, server: Process, say: Say) -> tuple[CameraReport, list[int]]:
    rss: list[int] = []

    async def watch() -> None:
        while True:
            rss.append(server.rss_bytes())
            await asyncio.sleep(0.5)

    loops = await asyncio.to_thread(render_loop, plan)
    watching = asyncio.create_task(watch())
    try:
        report = await simulate([f"127.0.0.1:{port}"], plan, loops, say=lambda line: say(f"{plan.mode}: {line}"))
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    return report, rss


def _median_ages(report: CameraReport) -> tuple[float, float]:
    """Median age of the frames delivered in the second and in the last third of the time."""
    third_s = report.plan.seconds / 3
    thirds: tuple[list[float], list[float]] = ([], [])
    for tally in report.tallies:
        for moment_s, age_s in zip(tally.arrivals_s, tally.ages_s, strict=True):
            if moment_s > third_s:
                thirds[moment_s > 2 * third_s].append(age_s)
    return tuple(median(ages_s) if ages_s else 0.0 for ages_s in thirds)  # type: ignore[return-value]  # two of them
