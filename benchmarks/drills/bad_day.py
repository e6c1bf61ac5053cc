"""A bad day: what goes wrong in production, one line each, all in one and split over Redis.

- *bad image*: 8 pairs wait for one batch, one of them damaged: it is answered 4xx, the other 7 are served together.
- *hang-up*: 16 clients hang up while the first batch runs: nothing but that batch is computed.
- *burst*: 300 requests at once: each is served, or refused at once with 429 and Retry-After; no 5xx.
- *worker killed* (split): kill -9 with 8 requests in flight, another worker takes over: all 8 are answered.
- *SIGTERM*: with 8 requests in flight: all 8 are answered, status 0, no process left behind.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvloop

from benchmarks.drills import Report, Say
from benchmarks.load import Answer, ask, fuse_request, picture_pair, png, scrape
from benchmarks.processes import Stack, all_in_one, can_split, split, wait_ready

LONG_PASS_S = 3.0  # long enough for a load of requests to come in, and to be cancelled, while one pass runs
BURST = 300
MAX_JOBS = 64
REFUSED_S = 5.0  # "at once", with 300 uploads of 605 kB on the same few cores
PATIENCE_S = 30.0

Settings = dict[str, dict[str, Any]]


def run(*, is_quick: bool, say: Say) -> Report:
    """Every line on every topology; nothing is left out when quick, because it is quick anyway."""
    why_not = can_split()
    parts, problems, figures = [], [], {}
    for topology in ("all-in-one", "split"):
        if topology == "split" and why_not:
            parts.append(f"split skipped: {why_not}")
            continue
        lines = []
        for name, (settings, drill) in DRILLS.items():
            if name == "worker killed" and topology != "split":
                continue
            with _stack(topology, settings) as stack:
                text, problem, found = uvloop.run(drill(stack))
            lines.append(f"{name}: {text}")
            figures[f"{topology}, {name}"] = found
            problems += [f"{topology}, {name}: {problem}"] if problem else []
            say(f"{topology}, {name}: {text}{f' [{problem}]' if problem else ''}")
        parts.append(f"{topology} {'; '.join(lines)}")
    line = " | ".join(parts)
    if problems:
        line += f" [{'; '.join(problems)}]"
    return Report(not problems, line, figures)


Found = tuple[str, str, dict[str, Any]]  # in words, what is wrong or nothing, the figures


@contextmanager
def _stack(topology: str, settings: Settings) -> Iterator[Stack]:
    values: Settings = {
        "engine": {"kind": "fixed", "fixed_batch_s": LONG_PASS_S, "fixed_item_s": 0.002},
        "grpc": {"port": -1},
        "log": {"level": "ERROR"},
    }
    for group, changes in settings.items():
        values[group] = {**values.get(group, {}), **changes}
    with all_in_one(values) if topology == "all-in-one" else split(values) as stack:
        yield stack


async def _bad_image(stack: Stack) -> Found:
    vis, ir = picture_pair()
    # Its chunks and check sums are right, so only the worker's decoder finds out.
    good, bad = fuse_request(vis, ir), fuse_request(png(640, 480, b"\xff" * 5000), ir)
    blocker = asyncio.create_task(ask(stack.address, good))
    await _until(lambda: _accepted(stack, 1))
    await asyncio.sleep(0.3)  # the blocker is in the model now; those that follow gather behind it
    answers = await asyncio.gather(*(ask(stack.address, bad if number == 3 else good) for number in range(8)))
    await blocker
    statuses = Counter(answer.status for answer in answers)
    is_bad_refused = 400 <= answers[3].status < 500
    figures = await scrape(_worker_of(stack))
    num_passes = int(figures["recofuse_batch_size_count"])
    text = f"bad one {answers[3].status}, neighbours {statuses[200]} x 200 in {num_passes - 1} pass"
    problem = "" if is_bad_refused and statuses[200] == 7 else f"statuses {dict(statuses)}"
    if not problem and num_passes != 2:
        problem = f"{num_passes} passes, so that the neighbours did not share one"
    return text, problem, {"statuses": _by_name(statuses), "num_passes": num_passes}


async def _hang_up(stack: Stack) -> Found:
    request = fuse_request(*picture_pair())
    calls = [asyncio.create_task(ask(stack.address, request))]
    await _until(lambda: _accepted(stack, 1))
    await asyncio.sleep(0.3)  # the first one is in the model now, which is what the others wait for
    calls += [asyncio.create_task(ask(stack.address, request)) for _ in range(15)]
    await _until(lambda: _accepted(stack, 16))
    started = time.perf_counter()
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await _until(lambda: _is_idle(stack))
    seconds = time.perf_counter() - started
    figures = await scrape(_worker_of(stack))
    num_computed, num_passes = int(figures["recofuse_batch_size_sum"]), int(figures["recofuse_batch_size_count"])
    text = f"{num_computed} of 16 computed, because the model was busy with it already, {16 - num_computed} skipped"
    if not num_computed:  # a slow machine: the promise is kept, only more easily
        text = "0 of 16 computed, 16 skipped"
    problem = "" if num_passes <= 1 and num_computed <= 8 else f"{num_passes} passes with {num_computed} jobs"
    return text, problem, {"num_computed": num_computed, "num_passes": num_passes, "idle_after_s": round(seconds, 2)}


async def _burst(stack: Stack) -> Found:
    request = fuse_request(*picture_pair())
    answers = await asyncio.gather(
        *(ask(stack.address, request) for _ in range(BURST)), return_exceptions=True
    )  # fmt: skip
    heard = [answer for answer in answers if isinstance(answer, Answer)]
    statuses = Counter(answer.status for answer in heard)
    refused = [answer for answer in heard if answer.status == 429]
    served_s = max((answer.seconds for answer in heard if answer.status == 200), default=0.0)
    refused_s = max((answer.seconds for answer in refused), default=0.0)
    num_errors = sum(count for status, count in statuses.items() if status >= 500)
    num_broken = BURST - len(heard)
    text = (
        f"{BURST} at once, room for {MAX_JOBS}: {statuses[200]} served within {served_s:.1f} s, {statuses[429]} "
        f"refused with 429 within {refused_s:.1f} s, {num_errors} with 5xx"
    )
    problem = ""
    if set(statuses) - {200, 429} or num_broken or not statuses[200] or not statuses[429]:
        problem = f"statuses {dict(statuses)}, {num_broken} broken connections"
    elif refused_s > REFUSED_S or any("retry-after" not in answer.headers for answer in refused):
        problem = "a refusal was late or lacks Retry-After"
    figures = {"statuses": _by_name(statuses), "num_broken": num_broken, "served_s": served_s, "refused_s": refused_s}
    return text, problem, figures


async def _worker_killed(stack: Stack) -> Found:
    request = fuse_request(*picture_pair())
    calls = [asyncio.create_task(ask(stack.address, request)) for _ in range(8)]
    await _until(lambda: _held(stack, 8))
    started = time.perf_counter()
    (worker,) = stack.named("worker")
    worker.kill()
    worker.start()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    seconds = time.perf_counter() - started
    num_served = sum(isinstance(answer, Answer) and answer.status == 200 for answer in answers)
    await asyncio.to_thread(wait_ready, worker, stack.monitors[0][1])
    text = f"{num_served} of the 8 in flight answered, {seconds:.1f} s after kill -9"
    problem = "" if num_served == 8 else f"answers {[getattr(answer, 'status', str(answer)) for answer in answers]}"
    return text, problem, {"num_served": num_served, "seconds": round(seconds, 2)}


async def _sigterm(stack: Stack) -> Found:
    request = fuse_request(*picture_pair())
    calls = [asyncio.create_task(ask(stack.address, request)) for _ in range(8)]
    await _until(lambda: _accepted(stack, 8))
    servers = [process for process in stack.processes.values() if process.name != "redis"]
    statuses = await asyncio.gather(*(asyncio.to_thread(process.stop) for process in servers[:1]))
    answers = await asyncio.gather(*calls, return_exceptions=True)
    statuses += await asyncio.gather(*(asyncio.to_thread(process.stop) for process in servers[1:]))
    num_served = sum(isinstance(answer, Answer) and answer.status == 200 for answer in answers)
    num_left = sum(len(process.left_behind()) for process in servers)
    text = f"{num_served} of the 8 in flight answered, exit status {max(statuses)}, {num_left} processes left behind"
    problem = "" if num_served == 8 and not any(statuses) and not num_left else "not all was answered or ended"
    return text, problem, {"num_served": num_served, "exit_statuses": statuses, "num_left": num_left}


DRILLS: dict[str, tuple[Settings, Callable[[Stack], Any]]] = {
    "bad image": ({}, _bad_image),
    "hang-up": ({}, _hang_up),
    "burst": ({"engine": {"fixed_batch_s": 0.02}, "queue": {"max_jobs": MAX_JOBS}}, _burst),
    "worker killed": (
        {
            "engine": {"fixed_batch_s": 2.0},
            "queue": {"lease_s": 3},
            "worker": {"heartbeat_s": 1, "announce_ttl_s": 3},
        },
        _worker_killed,
    ),
    "SIGTERM": ({"engine": {"fixed_batch_s": 0.5}}, _sigterm),
}


def _worker_of(stack: Stack) -> tuple[str, int]:
    return stack.monitors[0] if stack.monitors else stack.address


async def _accepted(stack: Stack, count: int) -> bool:
    figures = await scrape(stack.address)
    return sum(value for name, value in figures.items() if name.startswith("recofuse_jobs_accepted_total")) >= count


async def _held(stack: Stack, count: int) -> bool:
    return (await scrape(stack.address))["recofuse_queue_leased"] >= count


async def _is_idle(stack: Stack) -> bool:
    front, worker = await scrape(stack.address), await scrape(_worker_of(stack))
    waiting = sum(value for name, value in front.items() if name.startswith("recofuse_queue_depth"))
    return waiting + front["recofuse_queue_leased"] + worker["recofuse_jobs_held"] == 0


async def _until(is_so: Callable[[], Awaitable[bool]]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not await is_so():
        if time.monotonic() > end_s:
            raise TimeoutError(f"it did not come to that within {PATIENCE_S:g} s")
        await asyncio.sleep(0.02)


def _by_name(statuses: Counter[int]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(statuses.items())}
