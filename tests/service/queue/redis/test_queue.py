"""RedisQueue keeps the contract on a real server, and what only a shared queue can be asked for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions

from service.queue.contract import RECORD_BYTES
from service.queue.redis import beside
from service.queue.redis.address import PREFIX
from service.terms.errors import ErrorCode, InternalError, JobNotFoundError, OverloadedError, UnavailableError
from service.terms.jobs import FusionResult, JobStatus, Priority, new_job_id
from tests.service.queue.contract import LEASE_S, SETTINGS, QueueContract, World, success
from tests.service.queue.redis.queues import fresh, keys_of, opened, take_one, until
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.redis


class TestRedisQueue(QueueContract):
    @pytest.fixture
    async def world(self, server: RedisServer) -> AsyncIterator[World]:
        async with opened(server) as queue:
            yield World(queue, time.time, asyncio.sleep)


class TestSharedFolder(QueueContract):
    """The same with images and answers beside Redis, however small."""

    @pytest.fixture
    async def world(self, server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
        async with opened(server, shared_folder=str(tmp_path)) as queue:
            yield World(queue, time.time, asyncio.sleep)


async def test_a_queue_closes_whatever_it_is_doing(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling a call of redis-py once may do nothing, at some moments."""
    monkeypatch.setattr(beside, "KEEP_S", 0.0)  # it looks after the folder all the time
    for number in range(100):
        async with asyncio.timeout(20), opened(server):
            await asyncio.sleep(0.003 + 0.0001 * (number % 40))


async def test_of_several_commands_in_one_run_one_that_fails_fails_alone(server: RedisServer) -> None:
    async with opened(server) as queue:
        await queue.submit(job := fresh())
        commands = [("view", job.id), ("no_such_command",), ("view", job.id), ("view", "unknown")]
        joined = [queue._transitions.join(*words) for words in commands]
        answers: list[Any] = await asyncio.gather(*joined, return_exceptions=True)
        assert answers[0][0] == answers[2][0] == b"queued"
        assert isinstance(answers[1], exceptions.ResponseError)
        assert answers[3] == []


async def test_after_a_look_that_left_nothing_classes_keep_their_order(server: RedisServer) -> None:
    """Then a worker waits without looking again, and each class may have an entry."""
    async with opened(server, lease_s=60.0) as queue:
        await queue.submit(fresh())
        assert len(await queue.take("w1", max_jobs=2, wait_s=0)) == 1
        jobs = [replace(fresh(), priority=priority) for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH)]
        for job in jobs:
            await queue.submit(job)
        low, normal, high = jobs
        assert (await take_one(queue)).job == high
        assert [(lease.job, lease.attempt) for lease in await queue.take("w1", max_jobs=3, wait_s=0)] == [
            (normal, 1),
            (low, 1),
        ]


async def test_what_redis_forgets_while_nobody_calls_stays_in_no_books(server: RedisServer) -> None:
    """Keys run out by themselves, also while all processes or Redis are off; their bytes are taken off afterwards."""
    async with opened(server) as queue:
        job = fresh()
        await queue.submit(job, idempotency_key="k")
        await queue.finish(await take_one(queue), success(job, b"p" * 1000))
        assert (await queue.stats()).size_bytes == RECORD_BYTES + 1000
        keys = await queue._client.keys("*")
        mortal = [key for key in keys if await queue._client.pttl(key) > 0]
        assert f"{PREFIX}:result:{job.id}".encode() in mortal  # pictures go in any case
        await queue._client.delete(*mortal)
        await asyncio.sleep(SETTINGS.result_ttl_s + 0.1)
        assert (await queue.stats()).size_bytes == 0
        with pytest.raises(JobNotFoundError):
            await queue.view(job.id)
        assert (await queue.submit(replace(job, id=new_job_id()), idempotency_key="k")).is_new


async def test_nothing_is_left_in_redis_when_all_is_done(server: RedisServer) -> None:
    async with opened(server, max_jobs=64) as queue:
        jobs = [fresh(keep=False, ttl_s=30) for _ in range(20)]
        used_before = (await queue._client.info("memory"))["used_memory"]
        for job in jobs:
            await queue.submit(replace(job, vis=bytes(40_000)))
        assert f"payload:{jobs[0].id}" in await keys_of(queue)
        for _ in jobs:
            lease = await take_one(queue)
            await queue.finish(lease, success(lease.job, bytes(30_000)))
        for job in jobs:
            assert await queue.wait_result(job.id, timeout_s=1) == success(job, bytes(30_000))

        async def is_empty() -> bool:
            return (await queue.stats()).size_bytes == 0

        await until(is_empty)
        left = {key.split(":")[0] for key in await keys_of(queue)}
        assert left <= {"jobs", "wake", "bytes"}
        used_after = (await queue._client.info("memory"))["used_memory"]
        assert used_after - used_before < 400_000  # against 800 kB of images that went through


async def test_images_and_results_have_an_end_even_if_nobody_comes(server: RedisServer) -> None:
    async with opened(server) as queue:
        job = fresh(ttl_s=30)
        await queue.submit(job, idempotency_key="k")
        payload_ms = await queue._client.pttl(f"{PREFIX}:payload:{job.id}")
        assert 30_000 < payload_ms < 24 * 3600_000
        await queue.finish(await take_one(queue), success(job))
        for key in await keys_of(queue):
            if key.startswith(("payload", "result", "idem")):  # the job's own few bytes are swept by the next call
                assert 0 < await queue._client.pttl(f"{PREFIX}:{key}") < 120_000


async def test_a_result_wakes_a_waiter_in_another_process(server: RedisServer) -> None:
    async with opened(server) as front_end, opened(server) as other, opened(server) as worker:
        job = fresh()
        await front_end.submit(job)
        waiting = [asyncio.create_task(queue.wait_result(job.id, timeout_s=10)) for queue in (front_end, other, other)]
        lease = await take_one(worker)
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await worker.finish(lease, success(job))
        assert await asyncio.gather(*waiting) == [success(job)] * 3
        assert time.monotonic() - started < 1.0  # pushed; the safety net would take 15 s


async def test_a_cancellation_reaches_the_worker_without_asking(server: RedisServer) -> None:
    async with opened(server) as front_end, opened(server) as worker:
        jobs = [fresh(), fresh()]
        for job in jobs:
            await front_end.submit(job)
        await worker.take("w1", max_jobs=2, wait_s=1)
        await front_end.cancel(jobs[0].id)

        async def is_known() -> bool:
            return bool(worker.cancelled([jobs[0].id]))

        await until(is_known)
        assert worker.cancelled([job.id for job in jobs]) == {jobs[0].id}


async def test_keys_lead_to_the_first_job_from_every_front_end(server: RedisServer) -> None:
    async with opened(server) as one, opened(server) as two:
        job = fresh()
        first, second = await asyncio.gather(
            one.submit(job, idempotency_key="k"), two.submit(replace(job, id=new_job_id()), idempotency_key="k")
        )
        assert first.job_id == second.job_id
        assert {first.is_new, second.is_new} == {True, False}
        assert (await one.stats()).num_unfinished == 1


async def test_bounds_hold_across_front_ends(server: RedisServer) -> None:
    async with contextlib.AsyncExitStack() as stack:
        queues = [await stack.enter_async_context(opened(server)) for _ in range(3)]
        submits = [queues[n % 3].submit(fresh()) for n in range(5 * SETTINGS.max_jobs)]
        answers = await asyncio.gather(*submits, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
        assert len(answers) - len(refused) == SETTINGS.max_jobs
        payloads = [key for key in await keys_of(queues[0]) if key.startswith("payload")]
        assert len(payloads) == SETTINGS.max_jobs  # what was refused left nothing behind


async def test_old_failures_make_room_for_new_work(server: RedisServer) -> None:
    async with opened(server, max_bytes=100_000) as queue:
        job = replace(fresh(), vis=bytes(80_000))
        await queue.submit(job)
        await queue.finish(await take_one(queue), FusionResult.failed(job.id, InternalError("our fault")))
        assert (await queue.stats()).num_dead_letters == 1
        await queue.submit(replace(job, id=new_job_id()))
        stats = await queue.stats()
        assert (stats.num_dead_letters, stats.size_bytes) == (0, RECORD_BYTES + job.size_bytes)


async def test_a_job_that_kills_workers_is_put_aside_and_can_be_retried(server: RedisServer) -> None:
    async with opened(server) as front_end:
        job = fresh()
        await front_end.submit(job)
        waiting = asyncio.create_task(front_end.wait_result(job.id, timeout_s=20))
        for attempt in range(SETTINGS.max_attempts):
            async with opened(server) as worker:  # takes it and is never heard of again
                assert (await take_one(worker, f"w{attempt}")).attempt == attempt + 1
        async with opened(server) as worker:
            assert await worker.take("last", max_jobs=1, wait_s=3 * LEASE_S) == []
            result = await waiting
            assert result is not None
            assert result.error_code is ErrorCode.ATTEMPTS_EXHAUSTED
            (letter,) = await front_end.dead_letters()
            assert (letter.job, letter.attempts) == (job, SETTINGS.max_attempts)
            again = await front_end.retry_dead_letter(job.id)
            lease = await take_one(worker, "last")
            assert (lease.job.id, lease.job.vis, lease.attempt) == (again.job_id, job.vis, 1)
            await worker.finish(lease, success(lease.job))
        assert await front_end.wait_result(again.job_id, timeout_s=1) == success(lease.job)
        assert await front_end.dead_letters() == []


async def test_what_is_handed_back_wakes_a_waiting_taker(server: RedisServer) -> None:
    async with opened(server, lease_s=60.0) as first, opened(server, lease_s=60.0) as second:
        job = fresh()
        await first.submit(job)
        lease = await take_one(first, "w1")
        taking = asyncio.create_task(take_one(second, "w2", wait_s=10))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        await first.release([lease])
        assert (await taking).job == job
        assert time.monotonic() - started < 0.9  # its own looks are a second apart


async def test_a_process_under_a_dead_ones_id_receives_its_jobs_at_once(server: RedisServer) -> None:
    async with opened(server, lease_s=60.0) as front_end:
        job = fresh()
        await front_end.submit(job)
        async with opened(server, lease_s=60.0) as before:
            await take_one(before, "pod-0")
        async with opened(server, lease_s=60.0) as after:
            lease = await take_one(after, "pod-0")
            assert (lease.job, lease.attempt) == (job, 2)
            assert await after.take("pod-0", max_jobs=5, wait_s=0) == []


async def test_a_take_whose_answer_was_lost_is_made_good(server: RedisServer) -> None:
    async with opened(server, lease_s=60.0) as queue:
        assert await queue.take("w1", max_jobs=1, wait_s=0) == []
        job = fresh()
        await queue.submit(job)
        taking = asyncio.create_task(queue.take("w1", max_jobs=1, wait_s=5))
        call = queue._transitions.call

        async def lose_the_answer(command: str, *arguments: object) -> object:
            await call(command, *arguments)
            raise UnavailableError("cut off")

        queue._transitions.call = lose_the_answer  # type: ignore[method-assign]
        with pytest.raises(UnavailableError):
            await taking
        queue._transitions.call = call  # type: ignore[method-assign]
        assert (await queue.view(job.id)).status is JobStatus.RUNNING
        lease = await take_one(queue)
        assert (lease.job, lease.attempt) == (job, 1)


async def test_an_unreadable_job_is_reported_failed(server: RedisServer) -> None:
    async with opened(server) as queue:
        job = fresh()
        await queue.submit(job)
        await queue._client.delete(f"{PREFIX}:payload:{job.id}")
        assert await queue.take("w1", max_jobs=1, wait_s=0) == []
        result = await queue.wait_result(job.id, timeout_s=0)
        assert result is not None
        assert result.error_code is ErrorCode.INTERNAL
        assert (await queue.stats()).size_bytes == RECORD_BYTES


@pytest.mark.parametrize("ttl_s", [0.05, 60.0], ids=["lost", "stopped"])
async def test_gone_workers_leave_no_consumers(server: RedisServer, ttl_s: float) -> None:
    """Every process has a name of its own: they would gather with each restart, whichever way it ended."""
    from service.terms.jobs import WorkerInfo

    info = WorkerInfo(
        id="w1", model_name="m", model_version="1", device="cpu", default_steps=4, default_sampler="ode1",
        batch_sizes=(), is_warm=True, started_s=1.0,
    )  # fmt: skip
    streams = [*(f"{PREFIX}:jobs:{priority}" for priority in Priority), f"{PREFIX}:wake"]
    async with opened(server, lease_s=60.0) as queue:

        async def pending() -> list[int]:
            rows = [row for stream in streams for row in await queue._client.xinfo_consumers(stream, "workers")]
            return [row["pending"] for row in rows]

        await queue.announce(info, ttl_s=ttl_s)
        await queue.submit(replace(fresh(), priority=Priority.HIGH))
        urgent = await take_one(queue)
        await queue.finish(urgent, success(urgent.job))
        await queue.submit(fresh())
        lease = await take_one(queue)
        if ttl_s == 60.0:
            await queue.announce(info, ttl_s=0)
        await asyncio.sleep(0.1)
        assert await queue.workers() == []
        assert sorted(await pending()) == [0, 1]  # it holds one
        assert await queue.finish(lease, success(lease.job))
        assert await queue.workers() == []
        assert await pending() == []
        assert "workers-gone" not in await keys_of(queue)
        await queue.announce(info, ttl_s=60)
        await queue.submit(fresh())
        await take_one(queue)  # the name may be used again
        assert [known.id for known in await queue.workers()] == ["w1"]
        assert sum(await pending()) == 1


async def test_a_server_that_takes_no_writes_is_away_for_all_who_ask_together(server: RedisServer) -> None:
    async with opened(server) as queue:
        jobs = [fresh() for _ in range(3)]
        await queue.submit(jobs[0])
        assert server.command("REPLICAOF", "127.0.0.1", "1") == b"+OK\r\n"
        try:
            joined = [queue.cancel(jobs[0].id), *(queue.submit(job) for job in jobs[1:])]
            answers = await asyncio.gather(*joined, return_exceptions=True)
        finally:
            assert server.command("REPLICAOF", "NO", "ONE") == b"+OK\r\n"
        assert [type(answer) for answer in answers] == [UnavailableError] * 3
