"""Stall: Redis stops answering (SIGSTOP) while large uploads come in; a front end must not keep what it cannot hand on.

Three rounds of twelve uploads at once, of 60 MB each. Passes if every one is refused in words (429 or 503, with
Retry-After), if the front end's memory is back near its start after each round, without anything from outside that
would make it collect, and if a pair is fused again once Redis goes on.
"""

from __future__ import annotations

import asyncio
import signal
import zlib
from collections import Counter
from typing import Any

import numpy as np

from benchmarks.drills import Report, Say
from benchmarks.load import ask, fuse_request, picture_pair, png
from benchmarks.processes import Process, Stack, can_split, split

NUM_UPLOADS = 12  # at once
NUM_ROUNDS = 3  # one of them in a quick run
SIDE = 3200  # px of the square pictures: 30 MB of noise each, stored, which is just within the limit
MAX_KEPT_MIB = 96  # above the start: what allocators keep of copies, not an upload
SETTLE_S = 2.0
REFUSALS = (429, 503)

SETTINGS: dict[str, dict[str, Any]] = {"engine": {"kind": "null"}, "grpc": {"port": -1}, "log": {"level": "ERROR"}}


def run(*, is_quick: bool, say: Say) -> Report:
    """A stack of its own; skipped, and thereby failed, where there is no Redis."""
    if why_not := can_split():
        return Report(False, f"cannot run: {why_not}")
    with split(SETTINGS) as stack:
        return asyncio.run(_drill(stack, 1 if is_quick else NUM_ROUNDS, say))


async def _drill(stack: Stack, num_rounds: int, say: Say) -> Report:
    (api,), (redis,) = stack.named("api"), stack.named("redis")
    upload = fuse_request(_stored(SIDE, seed=0), _stored(SIDE, seed=1))
    small = fuse_request(*picture_pair())
    problems, kept_mib = [], []
    if (status := (await ask(stack.address, small)).status) != 200:
        problems.append(f"answered {status} before the stall")
    start_mib = _mib(api)
    redis.signal(signal.SIGSTOP)
    statuses: Counter[int] = Counter()
    try:
        for number in range(1, num_rounds + 1):
            answers = await asyncio.gather(*(ask(stack.address, upload, timeout_s=120) for _ in range(NUM_UPLOADS)))
            statuses.update(answer.status for answer in answers)
            if not all(answer.headers.get("retry-after") for answer in answers):
                problems.append("an answer without Retry-After")
            del answers
            await asyncio.sleep(SETTLE_S)
            kept_mib.append(_mib(api) - start_mib)
            say(f"round {number}: {kept_mib[-1]:+.0f} MiB")
    finally:
        redis.signal(signal.SIGCONT)
    if strange := set(statuses) - set(REFUSALS):
        problems.append(f"answered {', '.join(map(str, sorted(strange)))}")
    if max(kept_mib) > MAX_KEPT_MIB:
        problems.append(f"more than {MAX_KEPT_MIB} MiB stayed")
    await asyncio.sleep(SETTLE_S)
    if (status := (await ask(stack.address, small)).status) != 200:
        problems.append(f"answered {status} after the stall")
    peak_mib = api.peak_rss_bytes() / 2**20
    line = (
        f"{num_rounds} rounds of {NUM_UPLOADS} uploads of {len(upload) / 1e6:.0f} MB at once while Redis stood still: "
        f"{', '.join(f'{count} times {status}' for status, count in sorted(statuses.items()))}; front end at "
        f"{start_mib:.0f} MiB, after the rounds {', '.join(f'{kept:+.0f}' for kept in kept_mib)}, peak {peak_mib:.0f}"
    )
    figures = {"kept_mib": kept_mib, "peak_mib": peak_mib, "start_mib": start_mib, "statuses": dict(statuses)}
    if problems:
        line += f" [{'; '.join(problems)}]"
    return Report(not problems, line, figures)


def _mib(process: Process) -> float:
    return process.rss_bytes() / 2**20


def _stored(side: int, *, seed: int) -> bytes:
    """A PNG of noise, not compressed: as large as files get."""
    rows = np.random.default_rng(seed).integers(0, 256, (side, 1 + 3 * side), np.uint8)
    rows[:, 0] = 0  # no filter
    return png(side, side, zlib.compress(rows.tobytes(), 0))
