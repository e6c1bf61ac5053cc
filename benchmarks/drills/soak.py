"""Soak: thousands of requests through the whole stack; memory, descriptors and Redis must be where they were.

The slope is a straight line through each process's resident memory after warm-up, in KiB per 1,000 requests. An
allocator keeps some pages at first and noise remains, so growth counts as a leak beyond a bound, not beyond zero.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import redis
import uvloop

from benchmarks.drills import Report, Say
from benchmarks.load import Load, fuse_request, picture_pair
from benchmarks.processes import Stack, all_in_one, can_split, split

NUM_REQUESTS = 5000  # of each topology
CONCURRENCY = 8
WARM_UP_SHARE = 0.5  # of the requests; the allocators of all threads need about 2,000 to settle
MAX_SLOPE_KIB = 2048.0  # per 1,000 requests of 605 kB in and 430 kB out: a leak of 0.2 % of the bytes would show
MAX_FD_GROWTH = 8  # a pool of connections grows to the most calls that ever were at once; a leak knows no bound
MAX_REDIS_GROWTH_KIB = 128

SETTINGS: dict[str, dict[str, Any]] = {
    "engine": {"kind": "null"},
    "grpc": {"port": -1},
    "log": {"level": "WARNING"},
    # Results and their status are let go soon, so that Redis can be seen to return to its start.
    "queue": {"result_ttl_s": 2, "idempotency_ttl_s": 2},
}


def run(*, is_quick: bool, say: Say) -> Report:
    """All in one, then split over Redis if that is possible here."""
    parts, is_passed, figures = [], True, {}
    why_not = can_split()
    for topology in ("all-in-one", "split"):
        if topology == "split" and why_not:
            parts.append(f"split skipped: {why_not}")
            continue
        num_requests = 600 if is_quick else NUM_REQUESTS
        with _stack(topology) as stack:
            outcome = soak(stack, num_requests, say, is_warm=not is_quick)
        figures[topology] = outcome
        is_passed &= not outcome["problems"]
        slopes = ", ".join(f"{name} {slope:+.0f}" for name, slope in outcome["rss_slope_kib_per_1000"].items())
        text = (
            f"{topology} {outcome['num_answers']} requests at {outcome['images_s']:.0f}/s, {outcome['num_failed']} "
            f"failed, memory slope in KiB per 1000: {slopes}; descriptors {sum(outcome['fd_growth'].values()):+d}"
        )
        if "redis_growth_kib" in outcome:
            text += f"; Redis memory {outcome['redis_growth_kib']:+.0f} KiB, {outcome['redis_keys_left']} keys"
        if outcome["problems"]:
            text += f" [{'; '.join(outcome['problems'])}]"
        parts.append(text)
    return Report(is_passed, " | ".join(parts), figures)


@contextmanager
def _stack(topology: str) -> Iterator[Stack]:
    with all_in_one(SETTINGS) if topology == "all-in-one" else split(SETTINGS, num_workers=2) as stack:
        yield stack


def soak(stack: Stack, num_requests: int, say: Say, *, is_warm: bool) -> dict[str, Any]:
    """Load the stack with num_requests and follow its processes. is_warm: enough requests to judge memory by."""
    store = None if stack.redis_url is None else redis.Redis.from_url(stack.redis_url)
    redis_before = None if store is None else _redis_bytes(store)
    pairs = [fuse_request(*picture_pair(seed=seed), {"seed": str(seed)}) for seed in range(4)]
    samples: list[tuple[int, dict[str, int]]] = []
    descriptors: list[dict[str, int]] = []

    async def load() -> tuple[Load, float]:
        clients = Load(stack.addresses, pairs, CONCURRENCY)
        started, next_sample = time.perf_counter(), 0
        step = max(20, num_requests // 100)
        await clients.start()
        while clients.tally.num_answers + clients.tally.num_broken < num_requests:
            await asyncio.sleep(0.02)
            done = clients.tally.num_answers
            if done >= next_sample:
                next_sample = done + step
                samples.append((done, stack.rss_bytes()))
                descriptors.append(stack.num_fds())
                if done % (10 * step) < step:
                    total = sum(samples[-1][1].values()) / 2**20
                    say(f"{done} of {num_requests}: {total:.0f} MiB in {len(stack.processes)} processes")
        seconds = time.perf_counter() - started
        await clients.stop()
        return clients, seconds

    clients, seconds = uvloop.run(load())
    warm = [sample for sample in samples if sample[0] >= WARM_UP_SHARE * num_requests]
    servers = [name for name in stack.processes if name != "redis"]  # Redis is asked for what it holds instead
    slopes = {name: _slope([done for done, _ in warm], [rss[name] / 1024 for _, rss in warm]) for name in servers}
    first = next(fds for fds, sample in zip(descriptors, samples, strict=True) if sample in warm)
    fd_growth = {name: descriptors[-1][name] - first[name] for name in stack.processes}
    problems = [f"{name} grows" for name, slope in slopes.items() if is_warm and slope > MAX_SLOPE_KIB]
    problems += [f"{name} keeps descriptors" for name, growth in fd_growth.items() if growth > MAX_FD_GROWTH]
    if clients.tally.num_failed:
        problems.append(f"answers {dict(clients.tally.statuses)}, {clients.tally.num_broken} broken")
    problems += [f"{name} ended" for name, process in stack.processes.items() if not process.is_alive]
    outcome: dict[str, Any] = {
        "num_answers": clients.tally.num_answers,
        "num_failed": clients.tally.num_failed,
        "images_s": clients.tally.statuses[200] / seconds,
        "rss_mib_first": {name: round(warm[0][1][name] / 2**20, 1) for name in stack.processes},
        "rss_mib_last": {name: round(warm[-1][1][name] / 2**20, 1) for name in stack.processes},
        "rss_slope_kib_per_1000": slopes,
        "fd_growth": fd_growth,
    }
    if store is not None and redis_before is not None:
        growth_kib = (_settled_redis_bytes(store, redis_before) - redis_before) / 1024
        num_keys = int(store.dbsize())
        outcome |= {"redis_growth_kib": growth_kib, "redis_keys_left": num_keys}
        if growth_kib > MAX_REDIS_GROWTH_KIB:
            problems.append("Redis keeps memory")
        store.close()
    return outcome | {"problems": problems}


def _slope(done: list[int], kib: list[float]) -> float:
    """KiB per 1,000 requests, by least squares; 0 with fewer than three samples."""
    return 0.0 if len(done) < 3 else float(np.polyfit(np.asarray(done) / 1000, np.asarray(kib), 1)[0])


def _redis_bytes(store: redis.Redis) -> int:
    """What Redis holds, without the buffers of its connections, which stay open."""
    memory = store.info("memory")
    return int(memory["used_memory"]) - int(memory["mem_clients_normal"])


def _settled_redis_bytes(store: redis.Redis, before: int) -> int:
    """Memory once expired keys are gone; waits for that, but not for ever."""
    end_s = time.monotonic() + 20
    while (now := _redis_bytes(store)) - before > MAX_REDIS_GROWTH_KIB * 1024 and time.monotonic() < end_s:
        time.sleep(0.5)
    return now
