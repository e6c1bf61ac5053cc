"""A worker at work on a queue, and what its tests do over and over."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from service.command.processes import new_metrics
from service.queue.contract import JobQueue
from service.queue.memory import MemoryQueue
from service.terms.jobs import FusionJob, FusionResult
from service.terms.settings import Settings
from service.work.engine import Engine
from service.work.worker import Worker
from tests.fakes import job


class GatedEngine(Engine, Protocol):
    """One whose passes wait until `gate` is set, and set `started` before."""

    gate: threading.Event
    started: threading.Event


SETTINGS = Settings.from_values(
    {
        "worker": {"id": "w", "take_wait_s": 0.2, "heartbeat_s": 0.05, "drain_timeout_s": 2.0},
        "batch": {"max_wait_s": 0.2},
    }
)


@asynccontextmanager
async def working(
    engine: GatedEngine, settings: Settings = SETTINGS, queue: JobQueue | None = None
) -> AsyncIterator[tuple[JobQueue, Worker]]:
    queue = queue or MemoryQueue(settings.queue)
    worker = Worker(queue, engine, settings, new_metrics())
    running = asyncio.create_task(worker.run())
    await asyncio.wait_for(worker.warm.wait(), 5)
    try:
        yield queue, worker
    finally:
        engine.gate.set()
        worker.stop()
        await asyncio.wait_for(running, 10)


def fresh(count: int, **kind: object) -> list[FusionJob]:
    return [job(seed=seed, created_s=time.time(), keep_result=True, **kind) for seed in range(count)]  # type: ignore[arg-type]


async def results(queue: JobQueue, jobs: list[FusionJob]) -> list[FusionResult]:
    found = await asyncio.gather(*(queue.wait_result(job.id, timeout_s=10) for job in jobs))
    return [result for result in found if result is not None]


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not claim():  # noqa: ASYNC110 - looks at a state that belongs to others
            await asyncio.sleep(0.005)


async def held_back(engine: GatedEngine, queue: JobQueue, worker: Worker, jobs: list[FusionJob]) -> None:
    """Submit one job that keeps the engine busy, then the others; they are decoded and wait."""
    engine.gate.clear()
    await queue.submit(jobs[0])
    await until(engine.started.is_set)
    for waiting in jobs[1:]:
        await queue.submit(waiting)
    await until(lambda: len(worker._batcher) == len(jobs) - 1)


async def one_and_eight(engine: GatedEngine, queue: JobQueue, worker: Worker) -> list[FusionResult]:
    """The results of a pass of one job and of one of the eight that have waited meanwhile."""
    jobs = fresh(9)
    engine.started.clear()
    await held_back(engine, queue, worker, jobs)
    engine.gate.set()
    return await results(queue, jobs)
