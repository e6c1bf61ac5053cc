"""A worker whose engine is lost ends; its jobs are served elsewhere, over either queue, none lost and none twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from service.command.processes import new_metrics, run, serve_worker
from service.queue.contract import JobQueue
from service.queue.memory import MemoryQueue
from service.terms.errors import ErrorCode
from service.terms.jobs import FusionResult
from service.terms.settings import Settings
from service.work.engine import EngineBrokenError
from service.work.worker import Worker
from tests.fakes import FakeEngine
from tests.service.conftest import Serving
from tests.service.queue.redis.conftest import server, shared_server  # noqa: F401
from tests.service.queue.redis.queues import opened
from tests.service.work.devices import MeteredDevice, MeteredEngine, MeteredRuntime, cuda_error
from tests.service.work.workers import SETTINGS, fresh, held_back, results, until, working

LOST = SETTINGS.replace(worker={"id": "lost"}, queue={"lease_s": 60.0})  # what comes back was handed back


class Ledger:
    """A queue that writes down which results were made visible."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self.visible: list[tuple[str, str]] = []  # job, worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    async def finish(self, lease: Any, result: FusionResult) -> bool:
        is_visible = await self._queue.finish(lease, result)
        if is_visible:
            self.visible.append((lease.job.id, lease.worker_id))
        return is_visible


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
async def queue(request: pytest.FixtureRequest) -> AsyncIterator[Ledger]:
    if request.param == "memory":
        yield Ledger(MemoryQueue(LOST.queue))
        return
    redis = request.getfixturevalue("server")
    async with opened(redis, **LOST.queue.model_dump(exclude={"url"})) as shared:
        yield Ledger(shared)


def breaking_from(number: int, words: str = "an illegal memory access was encountered") -> MeteredEngine:
    """An engine whose device dies in a pass, and answers nothing after it."""
    return MeteredEngine(
        MeteredRuntime(MeteredDevice(1 << 20), faults=lambda n: cuda_error(words) if n >= number else None)
    )


@pytest.mark.parametrize("words", ["an illegal memory access was encountered", "device-side assert triggered"])
async def test_a_lost_engine_ends_its_worker_and_none_of_its_jobs(queue: Ledger, words: str) -> None:
    engine = breaking_from(1, words)
    worker = Worker(queue, engine, LOST, new_metrics())
    running = asyncio.create_task(worker.run())
    await asyncio.wait_for(worker.warm.wait(), 5)
    jobs = fresh(12)
    await held_back(engine, queue, worker, jobs)
    engine.gate.set()
    with pytest.raises(EngineBrokenError, match=words):
        await asyncio.wait_for(running, 20)
    assert not worker.is_warm
    assert await queue.workers() == []
    async with working(FakeEngine(), LOST.replace(worker={"id": "other"}), queue):
        found = await results(queue, jobs)
    assert [result.error_code for result in found] == [None] * 12
    assert sorted(job_id for job_id, _ in queue.visible) == sorted(job.id for job in jobs)
    assert [worker_id for _, worker_id in queue.visible] == ["lost"] + ["other"] * 11
    assert await queue.dead_letters() == []
    tried = [(await queue.view(job.id)).attempts for job in jobs]
    assert sorted(tried) == [1] * 4 + [2] * 8  # the pass of eight counts, what waited behind it does not


async def test_what_has_its_pictures_is_finished_first(queue: Ledger) -> None:
    """The first pass is being encoded while the device dies in the second."""
    engine = breaking_from(1)
    worker = Worker(queue, engine, LOST, new_metrics())
    encode, is_encoding = worker._codec.encode, asyncio.Event()
    loop = asyncio.get_running_loop()

    def slowly(*arguments: Any) -> bytes:
        loop.call_soon_threadsafe(is_encoding.set)
        time.sleep(0.5)
        return encode(*arguments)

    worker._codec.encode = slowly  # type: ignore[assignment, method-assign]
    running = asyncio.create_task(worker.run())
    await asyncio.wait_for(worker.warm.wait(), 5)
    jobs = fresh(2)
    await queue.submit(jobs[0])
    await asyncio.wait_for(is_encoding.wait(), 5)
    await queue.submit(jobs[1])
    with pytest.raises(EngineBrokenError):
        await asyncio.wait_for(running, 20)
    assert queue.visible == [(jobs[0].id, "lost")]
    assert (await queue.stats()).num_unfinished == 1


async def test_a_pair_that_takes_down_every_worker_comes_to_an_end(queue: Ledger) -> None:
    jobs = fresh(1)
    await queue.submit(jobs[0])
    for _ in range(LOST.queue.max_attempts):
        with pytest.raises(EngineBrokenError):
            await asyncio.wait_for(Worker(queue, breaking_from(0), LOST, new_metrics()).run(), 20)
    assert await queue.take("other", max_jobs=1, wait_s=0) == []
    (result,) = await results(queue, jobs)
    assert result.error_code is ErrorCode.ATTEMPTS_EXHAUSTED


async def test_a_device_that_is_lost_while_stopping_ends_the_stop(queue: Ledger) -> None:
    engine = breaking_from(1)
    worker = Worker(queue, engine, LOST.replace(worker={"drain_timeout_s": 30.0}), new_metrics())
    running = asyncio.create_task(worker.run())
    await asyncio.wait_for(worker.warm.wait(), 5)
    jobs = fresh(3)
    await held_back(engine, queue, worker, jobs)
    worker.stop()
    engine.gate.set()
    with pytest.raises(EngineBrokenError):
        await asyncio.wait_for(running, 20)
    assert (await queue.stats()).num_unfinished == 2


def test_the_process_ends_with_a_status() -> None:
    queue = MemoryQueue(LOST.queue)
    ready: list[str] = []

    async def serve(stop: asyncio.Event) -> None:
        await queue.submit(fresh(1)[0])
        await serve_worker(LOST.replace(worker={"metrics_port": -1}), queue, breaking_from(0), stop, ready.append)

    assert run(serve, Settings()) == 1
    assert ready == [""]


async def test_callers_of_a_server_all_in_one_are_told_to_try_again(serving: Serving) -> None:
    engine = breaking_from(0)
    pair = fresh(1)[0]

    async def broken_off() -> None:
        async with serving(engine=engine) as started:
            engine.gate.clear()
            calls = [
                asyncio.create_task(started.client.post("/v1/fuse", files={"vis": pair.vis, "ir": pair.ir}))
                for _ in range(3)
            ]
            await until(engine.started.is_set)
            assert (await started.client.get("/health/ready")).status_code == 200
            engine.gate.set()
            answers.extend(await asyncio.gather(*calls))
            await asyncio.wait({started.running}, timeout=20)

    answers: list[httpx.Response] = []
    with pytest.raises(EngineBrokenError):
        await broken_off()
    assert [answer.status_code for answer in answers] == [503] * 3
    assert {answer.json()["code"] for answer in answers} == {"unavailable"}
