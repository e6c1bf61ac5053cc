"""Stream kill: 8 streams over Redis while workers and a front end get kill -9; half in mode `all`, half in `latest`.

A worker's death must not end a stream: its frames are taken over by the other worker. A front end's death ends its
streams, and their cameras resume at the other front end after their last answer. Passes if nothing is out of order,
every gap is reported by the answer after it, mode `all` loses no frame, and every stream goes on after the last kill.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from benchmarks.drills import Report, Say
from benchmarks.processes import Process, Stack, StackError, can_split, free_port, recofuse, split, wait_ready
from service.command.cameras import CameraPlan, CameraReport, Tally, render_loop, simulate
from service.watch.metrics import FlowMode

SETTINGS: dict[str, dict[str, Any]] = {
    "engine": {"kind": "fixed", "fixed_batch_s": 0.05, "fixed_item_s": 0.005},
    "log": {"level": "ERROR"},
    "queue": {"lease_s": 2, "max_attempts": 10},
    "worker": {"heartbeat_s": 0.5, "announce_ttl_s": 3, "max_held": 8},
}
NUM_STREAMS, FPS, SIZE = 4, 10.0, (160, 120)  # streams of each mode
SECONDS = 16.0
KILLS = ((2.5, "worker-1"), (5.5, "worker-2"), (8.5, "api-1"), (11.5, "worker-1"))  # seconds after the start
AWAY_S = 1.0


def run(*, is_quick: bool, say: Say) -> Report:
    """A stack of its own; skipped, and thereby failed, where there is no Redis."""
    if why_not := can_split():
        return Report(False, f"cannot run: {why_not}")
    kills = KILLS[::2] if is_quick else KILLS  # quick: one worker and the front end
    seconds = SECONDS * (0.75 if is_quick else 1)
    ports = [free_port(), free_port()]
    with (
        split({**SETTINGS, "grpc": {"port": ports[0]}}, num_apis=1, num_workers=2) as stack,
        _second_front_end(stack, ports[1]),
    ):
        return asyncio.run(_drill(stack, ports, kills, seconds, say))


@contextlib.contextmanager
def _second_front_end(stack: Stack, port: int) -> Iterator[None]:
    """Another `api` process for the duration of the block: front ends of one host need a gRPC port each."""
    http_port = free_port()
    (first,) = stack.named("api")
    values = {**SETTINGS, "queue": {**SETTINGS["queue"], "url": stack.redis_url}}
    values |= {"http": {"port": http_port}, "grpc": {"port": port}}
    second = recofuse("api", first.log.parent, values, name="api-2")
    second.start()
    try:
        wait_ready(second, http_port)
        yield
    finally:
        second.stop()


async def _drill(
    stack: Stack, ports: list[int], kills: tuple[tuple[float, str], ...], seconds: float, say: Say
) -> Report:
    plans = [
        CameraPlan(
            num_streams=NUM_STREAMS,
            fps=FPS,
            seconds=seconds,
            mode=mode,
            size=SIZE,
            encoding="raw",
            answer="raw",
            num_frames=10,
        )
        for mode in (FlowMode.ALL, FlowMode.LATEST)
    ]
    loops = await asyncio.to_thread(render_loop, plans[0])
    targets = [f"127.0.0.1:{port}" for port in ports]
    breaking = asyncio.create_task(_break(stack, kills, say))
    try:
        everything, latest = await asyncio.gather(*(simulate(targets, plan, loops) for plan in plans))
        await breaking
    finally:
        breaking.cancel()
        await asyncio.gather(breaking, return_exceptions=True)
    return _report(everything, latest, kills)


async def _break(stack: Stack, kills: tuple[tuple[float, str], ...], say: Say) -> None:
    passed_s = 0.0
    for at_s, name in kills:
        await asyncio.sleep(at_s - passed_s)
        process: Process = stack.processes[name]
        if not process.is_alive:
            raise StackError(f"{name} ended by itself\n{process.last_lines()}")
        say(f"kill -9 of {name}")
        await asyncio.to_thread(process.kill)
        await asyncio.sleep(AWAY_S)
        process.start()
        passed_s = at_s + AWAY_S


def _report(everything: CameraReport, latest: CameraReport, kills: tuple[tuple[float, str], ...]) -> Report:
    problems: list[str] = []
    both = (everything, latest)
    num_sent, num_fused = everything.total("num_sent"), everything.total("num_fused")
    if num_fused != num_sent or everything.total("num_unanswered") or everything.total("num_dropped"):
        problems.append(f"mode all: {num_sent} sent, {num_fused} fused, {everything.total('num_unanswered')} open")
    wrong = {
        name: sum(report.total(name) for report in both)
        for name in ("num_failed", "num_out_of_order", "num_gaps_unreported")
    }
    problems += [f"{name} is {count}" for name, count in wrong.items() if count]
    last_kill_s = kills[-1][0]
    silent = [tally for report in both for tally in report.tallies if not tally.arrivals_s[-1:] > [last_kill_s]]
    if silent:
        problems.append(f"{len(silent)} streams did not go on after the last kill")
    num_resumed = sum(report.total("num_resumed") for report in both)
    if not num_resumed:
        problems.append("no stream had to resume")
    silence_s = max(_longest_silence(tally) for report in both for tally in report.tallies)
    gaps = latest.total("num_dropped") + latest.total("num_missing")
    workers = sum(name.startswith("worker") for _, name in kills)
    line = (
        f"{2 * NUM_STREAMS} streams, kill -9 of workers {workers} times and of a front end {len(kills) - workers}: "
        f"{num_resumed} resumed elsewhere; mode all {num_fused} of {num_sent} fused; mode latest "
        f"{latest.total('num_fused')} fused, {gaps} in gaps; {wrong['num_gaps_unreported']} gaps unreported, "
        f"{wrong['num_out_of_order']} out of order; longest silence of a stream {silence_s:.1f} s"
    )
    if problems:
        line += f" [{'; '.join(problems)}]"
    figures = {"all": everything.figures, "latest": latest.figures, "longest_silence_s": round(silence_s, 2)}
    return Report(not problems, line, {**figures, "problems": problems})


def _longest_silence(tally: Tally) -> float:
    moments = [0.0, *tally.arrivals_s]
    return max((later - earlier for earlier, later in pairwise(moments)), default=0.0)
