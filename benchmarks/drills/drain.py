"""Drain: SIGTERM under load. No accepted request may fail, every process ends with status 0 and leaves none behind.

All in one: 16 HTTP and 8 gRPC clients in a closed loop, SIGTERM to the server. Split, HTTP only: the same at two front
ends and two workers over Redis; first a worker gets SIGTERM, then a front end, then all that is left. Some clients ask
for jobs (202) as well, which must have ended at the end.

What counts as refused rather than failed: 503 (UNAVAILABLE) from the server itself, said before anything was accepted,
and a connection that ends or cannot be made although its request was sent after the signal.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import uvloop

from benchmarks.drills import Report, Say
from benchmarks.load import Load, ask, fuse_request, get_request, picture_pair
from benchmarks.processes import Process, all_in_one, can_split, free_port, split
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc

CONCURRENCY = 16
NUM_JOBS = 40  # asynchronous ones, split only
STOP_S = 30.0

SETTINGS: dict[str, dict[str, Any]] = {
    "engine": {"kind": "fixed", "fixed_batch_s": 0.1, "fixed_item_s": 0.005},
    "codec": {"kind": "ready"},
    "grpc": {"port": -1},
    "log": {"level": "ERROR"},
}


def run(*, is_quick: bool, say: Say) -> Report:
    """All in one, then split over Redis if that is possible here."""
    load_s = 0.7 if is_quick else 2.0
    tally = Tally()
    grpc_port = free_port()
    with all_in_one({**SETTINGS, "grpc": {"port": grpc_port}}) as stack:
        uvloop.run(_all_in_one(stack.address, f"127.0.0.1:{grpc_port}", stack.processes["serve"], load_s, tally))
    say(f"all-in-one: {tally.text()}")
    parts = [f"all-in-one {tally.text()}"]
    figures: dict[str, Any] = {"all-in-one": tally.figures()}
    problems = list(tally.problems)
    if why_not := can_split():
        parts.append(f"split skipped: {why_not}")
    else:
        tally = Tally()
        with split(SETTINGS, num_apis=2, num_workers=2) as stack:
            processes = [*stack.named("worker"), *stack.named("api")]
            uvloop.run(_split(stack.addresses, processes, load_s, tally))
        say(f"split: {tally.text()}")
        parts.append(f"split {tally.text()}")
        figures["split"] = tally.figures()
        problems += tally.problems
    line = " | ".join(parts)
    if problems:
        line += f" [{'; '.join(problems[:5])}]"
    return Report(not problems, line, figures)


@dataclass(slots=True)
class Tally:
    """What became of the requests. num_late: connections that ended although their request came after a signal."""

    num_served: int = 0
    num_refused: int = 0
    num_failed: int = 0
    num_late: int = 0
    num_jobs: int = 0
    num_jobs_ended: int = 0
    slowest_stop_s: float = 0.0
    exit_statuses: list[int] = field(default_factory=list)
    num_left: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, load: Load, signals_s: list[float]) -> None:
        """Count one load's answers, after its end. signals_s: when something was told to stop."""
        tally = load.tally
        self.num_served += tally.statuses[200]
        self.num_refused += tally.statuses[503]
        broken = [sent_s for sent_s in tally.broken_s if not signals_s or sent_s < signals_s[0]]
        self.num_late += len(tally.broken_s) - len(broken)
        failed = tally.num_answers - tally.statuses[200] - tally.statuses[503] + len(broken)
        self.num_failed += failed
        if failed:
            self.problems.append(f"answers {dict(tally.statuses)}, {len(broken)} broken connections")

    def add_calls(self, calls: _Calls, signal_s: float) -> None:
        """Count the gRPC clients' calls, after their end."""
        self.num_served += calls.num_served
        self.num_refused += calls.num_refused
        broken = [heard for started_s, heard in calls.broken if started_s < signal_s]
        self.num_late += len(calls.broken) - len(broken)
        self.num_failed += len(broken)
        self.problems += broken[:3]

    async def stop(self, process: Process) -> None:
        """SIGTERM, and what it comes to."""
        started = time.perf_counter()
        status = await asyncio.to_thread(process.stop, STOP_S)
        self.slowest_stop_s = max(self.slowest_stop_s, time.perf_counter() - started)
        self.exit_statuses.append(status)
        left = process.left_behind()
        self.num_left += len(left)
        if status or left:
            self.problems.append(f"{process.name} ended with status {status} and left {len(left)} processes")

    def text(self) -> str:
        """In words."""
        jobs = f", {self.num_jobs_ended} of {self.num_jobs} accepted jobs ended" if self.num_jobs else ""
        return (
            f"{self.num_served} served, {self.num_failed} of the accepted failed, {self.num_refused} refused with 503"
            f"{jobs}; {len(self.exit_statuses)} x SIGTERM, exit statuses {sorted(set(self.exit_statuses))}, the "
            f"slowest after {self.slowest_stop_s:.1f} s, {self.num_left} processes left behind"
        )

    def figures(self) -> dict[str, Any]:
        """For programs."""
        names = ("num_served", "num_refused", "num_failed", "num_late", "num_jobs", "num_jobs_ended", "num_left")
        return {
            **{name: getattr(self, name) for name in names},
            "exit_statuses": self.exit_statuses,
            "slowest_stop_s": round(self.slowest_stop_s, 2),
            "problems": self.problems,
        }


async def _all_in_one(
    address: tuple[str, int], grpc_address: str, process: Process, load_s: float, tally: Tally
) -> None:
    load = Load([address], [fuse_request(*picture_pair())], CONCURRENCY)
    calls = _Calls(grpc_address, *picture_pair())
    await load.start()
    calling = asyncio.create_task(calls.run())
    await asyncio.sleep(load_s)
    num_before, calls_before = load.tally.statuses[200], calls.num_served
    signals_s = [time.perf_counter()]
    await tally.stop(process)
    num_after, calls_after = load.tally.statuses[200] - num_before, calls.num_served - calls_before
    calls.is_running = False
    await asyncio.gather(load.stop(), calling)
    tally.add(load, signals_s)
    tally.add_calls(calls, signals_s[0])
    if not (num_before and num_after and calls_before and calls_after):
        tally.problems.append(
            f"served before and after the signal: {num_before} and {num_after} over HTTP, {calls_before} and "
            f"{calls_after} over gRPC"
        )


class _Calls:
    """gRPC clients in a closed loop. broken: when each call that was neither served nor refused was
    made, and what it heard.
    """

    def __init__(self, address: str, vis: bytes, ir: bytes) -> None:
        self._address = address
        self._request = pb.FuseRequest(vis=pb.Image(encoded=vis), ir=pb.Image(encoded=ir))
        self.is_running = True
        self.num_served = 0
        self.num_refused = 0
        self.broken: list[tuple[float, str]] = []

    async def run(self) -> None:
        """Call until told to stop."""
        options = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(self._address, options) as channel:
            stub = fusion_pb2_grpc.FusionServiceStub(channel)
            await asyncio.gather(*(self._client(stub) for _ in range(CONCURRENCY // 2)))

    async def _client(self, stub: fusion_pb2_grpc.FusionServiceAsyncStub) -> None:
        while self.is_running:
            started_s = time.perf_counter()
            try:
                await stub.Fuse(self._request, timeout=STOP_S)
                self.num_served += 1
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE and "stopping" in (error.details() or ""):
                    self.num_refused += 1
                else:
                    self.broken.append((started_s, f"{error.code().name} {error.details()}"))
                await asyncio.sleep(0.05)


async def _split(addresses: list[tuple[str, int]], processes: list[Process], load_s: float, tally: Tally) -> None:
    request = fuse_request(*picture_pair())
    first_worker, second_worker, first_api, second_api = processes
    # Clients of the front end that stays, so that nothing at all may go wrong for them, and of the one that goes.
    staying, going = (Load([address], [request], CONCURRENCY // 2) for address in (addresses[1], addresses[0]))
    await staying.start()
    await going.start()
    jobs = asyncio.create_task(_submit_jobs(addresses[0], load_s, tally))
    await asyncio.sleep(load_s)
    await tally.stop(first_worker)
    await asyncio.sleep(load_s / 2)
    accepted = await jobs
    stopped_s = [time.perf_counter()]
    await tally.stop(first_api)
    await asyncio.sleep(load_s / 2)
    await going.stop()
    tally.add(going, stopped_s)
    if staying.tally.num_failed:
        tally.problems.append(f"clients of a front end that stayed saw {dict(staying.tally.statuses)}")
    await _look_at_jobs(addresses[1], accepted, tally)
    stopped_s = [time.perf_counter()]
    await tally.stop(second_api)
    await staying.stop()
    tally.add(staying, stopped_s)
    await tally.stop(second_worker)


async def _submit_jobs(address: tuple[str, int], load_s: float, tally: Tally) -> list[str]:
    """Jobs over the time in which a worker is told to stop; their ids."""
    request = fuse_request(*picture_pair(), headers="Prefer: respond-async\r\n")
    accepted = []
    for _ in range(NUM_JOBS):
        answer = await ask(address, request)
        if answer.status == 202:
            accepted.append(json.loads(answer.body)["id"])
        else:
            tally.problems.append(f"a job was answered {answer.status}")
        await asyncio.sleep(1.5 * load_s / NUM_JOBS)
    tally.num_jobs = len(accepted)
    return accepted


async def _look_at_jobs(address: tuple[str, int], accepted: list[str], tally: Tally) -> None:
    """All jobs must succeed, although their front end and one worker are gone."""
    end_s = time.monotonic() + STOP_S
    for job_id in accepted:
        status = "queued"
        while status in ("queued", "running") and time.monotonic() < end_s:
            with suppress(ConnectionError):
                status = json.loads((await ask(address, get_request(f"/v1/jobs/{job_id}"))).body)["status"]
            if status in ("queued", "running"):
                await asyncio.sleep(0.05)
        tally.num_jobs_ended += status == "succeeded"
    if tally.num_jobs_ended != len(accepted):
        tally.problems.append(f"{len(accepted) - tally.num_jobs_ended} accepted jobs did not succeed")
