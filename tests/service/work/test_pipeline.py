"""Passes that are brought while another runs: two at most, full ones only, and none is lost when one fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest

from service.command.processes import new_metrics
from service.queue.memory import MemoryQueue
from service.terms.errors import InternalError, OutOfMemoryError
from service.terms.jobs import Part
from service.work.engine import EngineBrokenError, Frames, PassOptions, Pixels
from service.work.worker import Worker
from tests.fakes import FakeEngine
from tests.service.work.workers import SETTINGS, fresh, results, until, working

BATCH = SETTINGS.batch.max_batch


class OverlappingFake(FakeEngine):
    """Begins passes at once, and gives their pictures when it is let; fails those of some numbers, from 0."""

    def __init__(self, failures: dict[int, Exception] | None = None) -> None:
        super().__init__()
        self.begun: list[int] = []  # sizes
        self.may_end = threading.Semaphore(0)
        self.failures = failures or {}

    def start(
        self, vis: Frames, ir: Frames, options: PassOptions, seeds: list[int], overlap: Frames | None = None
    ) -> Callable[[], dict[Part, Pixels]]:
        number = len(self.begun)
        self.begun.append(len(vis))

        def wait() -> dict[Part, Pixels]:
            assert self.may_end.acquire(timeout=30)
            if number in self.failures:
                raise self.failures[number]
            return self.fuse(np.stack(list(vis)), np.stack(list(ir)), options, seeds)

        return wait

    def let(self, count: int = 1000) -> None:
        self.may_end.release(count)


async def test_a_full_batch_is_brought_while_another_runs() -> None:
    engine = OverlappingFake()
    async with working(engine, SETTINGS.replace(worker={"max_held": 5 * BATCH})) as (queue, worker):
        jobs = fresh(1 + 3 * BATCH)
        await queue.submit(jobs[0])
        await until(lambda: engine.begun == [1])
        for job in jobs[1:]:
            await queue.submit(job)
        await until(lambda: len(worker._batcher) == 2 * BATCH and len(engine.begun) == 2)  # one full batch has gone
        assert engine.begun == [1, BATCH]
        engine.let(1)
        await until(lambda: engine.begun == [1, BATCH, BATCH])
        engine.let()
        found = await results(queue, jobs)
        busy_s = worker._metrics.registry.get_sample_value("recofuse_engine_busy_seconds_total")
    assert [result.error_code for result in found] == [None] * len(jobs)
    assert engine.begun == [1, BATCH, BATCH, BATCH]
    assert busy_s is not None
    assert busy_s > 0


async def test_a_batch_that_may_still_grow_waits_for_the_engine() -> None:
    engine = OverlappingFake()
    async with working(engine) as (queue, worker):
        jobs = fresh(4)
        await queue.submit(jobs[0])
        await until(lambda: engine.begun == [1])
        for job in jobs[1:]:
            await queue.submit(job)
        await until(lambda: len(worker._batcher) == 3)
        await asyncio.sleep(2 * SETTINGS.batch.max_wait_s)
        assert engine.begun == [1]
        engine.let()
        found = await results(queue, jobs)
    assert [result.batch_size for result in found] == [1, 3, 3, 3]


@pytest.mark.parametrize("error", [OutOfMemoryError("full"), InternalError("a fault")], ids=["memory", "other"])
async def test_a_pass_that_fails_in_the_end_is_halved(error: Exception) -> None:
    engine = OverlappingFake({1: error})
    engine.let()
    async with working(engine) as (queue, worker):
        engine.may_end = threading.Semaphore(0)
        jobs = fresh(1 + BATCH)
        await queue.submit(jobs[0])
        await until(lambda: engine.begun == [1])
        for job in jobs[1:]:
            await queue.submit(job)
        await until(lambda: engine.begun == [1, BATCH])
        engine.let()
        found = await results(queue, jobs)
        await until(lambda: worker.num_held == 0)
    assert [result.error_code for result in found] == [None] * len(jobs)
    assert engine.begun == [1, BATCH, BATCH // 2, BATCH // 2]


async def test_a_device_that_is_lost_while_two_passes_are_under_way_ends_the_worker_and_no_job() -> None:
    error = EngineBrokenError("the device is lost")
    engine = OverlappingFake({0: error, 1: error})
    queue = MemoryQueue(SETTINGS.queue)
    worker = Worker(queue, engine, SETTINGS, new_metrics())
    running = asyncio.create_task(worker.run())
    await asyncio.wait_for(worker.warm.wait(), 5)
    jobs = fresh(1 + BATCH)
    await queue.submit(jobs[0])
    await until(lambda: engine.begun == [1])
    for job in jobs[1:]:
        await queue.submit(job)
    await until(lambda: engine.begun == [1, BATCH])
    engine.let()
    with pytest.raises(EngineBrokenError, match="the device is lost"):
        await asyncio.wait_for(running, 20)
    async with working(FakeEngine(), SETTINGS.replace(worker={"id": "other"}), queue):
        found = await results(queue, jobs)
    assert [result.error_code for result in found] == [None] * len(jobs)


async def test_a_pass_that_ends_well_beside_the_one_that_lost_the_device_is_finished() -> None:
    engine = OverlappingFake({1: EngineBrokenError("the device is lost")})
    queue = MemoryQueue(SETTINGS.queue)
    worker = Worker(queue, engine, SETTINGS, new_metrics())
    running = asyncio.create_task(worker.run())
    await asyncio.wait_for(worker.warm.wait(), 5)
    jobs = fresh(1 + BATCH)
    await queue.submit(jobs[0])
    await until(lambda: engine.begun == [1])
    for job in jobs[1:]:
        await queue.submit(job)
    await until(lambda: engine.begun == [1, BATCH])
    engine.let()
    with pytest.raises(EngineBrokenError):
        await asyncio.wait_for(running, 20)
    (first,) = await results(queue, jobs[:1])
    assert first.error_code is None
    assert (await queue.stats()).num_unfinished == BATCH
