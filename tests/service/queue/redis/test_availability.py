"""Redis goes away and comes back, is not there yet, is full, or is another one after a failover: nothing is lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from redis import exceptions

from service.queue.redis.address import PREFIX
from service.queue.redis.availability import reaching
from service.terms.errors import JobNotFoundError, OverloadedError, UnavailableError
from service.terms.jobs import Priority, new_job_id
from tests.service.queue.contract import success
from tests.service.queue.redis.queues import folder, fresh, opened, take_one, unavailable_until_back, until
from tests.service.redis_server import RedisServer, free_port

pytestmark = pytest.mark.redis


async def test_a_restart_of_redis_in_the_middle_loses_nothing(durable: RedisServer) -> None:
    kept = {"lease_s": 5.0, "result_ttl_s": 60.0, "idempotency_ttl_s": 60.0}
    async with opened(durable, **kept) as front_end, opened(durable, **kept) as worker:
        held, waiting_job, urgent = fresh(), fresh(), replace(fresh(), priority=Priority.HIGH)
        await front_end.submit(held, idempotency_key="k")
        lease = await take_one(worker)
        await front_end.submit(waiting_job)
        waiting = asyncio.create_task(front_end.wait_result(held.id, timeout_s=20))
        await asyncio.sleep(0.1)
        durable.kill()
        with pytest.raises(UnavailableError):
            await front_end.submit(urgent)
        with pytest.raises(UnavailableError):
            await worker.finish(lease, success(held))
        taking = asyncio.create_task(unavailable_until_back(lambda: worker.take("w1", max_jobs=4, wait_s=5)))
        assert not waiting.done()
        await asyncio.to_thread(durable.start)
        assert await unavailable_until_back(lambda: worker.finish(lease, success(held))) is True
        assert await waiting == success(held)  # the same wait, over the restart
        leases = await taking
        assert isinstance(leases, list)
        assert [(lease.job, lease.attempt) for lease in leases] == [(waiting_job, 1)]
        again = await unavailable_until_back(
            lambda: front_end.submit(replace(held, id=new_job_id()), idempotency_key="k")
        )
        assert again.job_id == held.id  # type: ignore[attr-defined]
        await front_end.submit(urgent)
        assert (await front_end.stats()).num_unfinished == 2


async def test_a_server_that_was_emptied_is_filled_again(server: RedisServer) -> None:
    async with opened(server) as queue:
        job = fresh()
        await queue.submit(job)
        taking = asyncio.create_task(unavailable_until_back(lambda: queue.take("w1", max_jobs=1, wait_s=5)))
        await taking
        blocked = asyncio.create_task(unavailable_until_back(lambda: queue.take("w2", max_jobs=1, wait_s=5)))
        await asyncio.sleep(0.1)
        server.command("FLUSHALL")
        server.command("SCRIPT", "FLUSH")
        with pytest.raises(JobNotFoundError):
            await queue.wait_result(job.id, timeout_s=5)
        await queue.submit(fresh())
        assert len(await blocked) == 1  # type: ignore[arg-type]


async def test_opening_does_not_need_the_server_yet() -> None:
    with folder() as path:
        server = RedisServer(path)
        async with opened(server) as queue:
            with pytest.raises(UnavailableError):
                await queue.stats()
            await asyncio.to_thread(server.start)
            try:
                job = fresh()
                await queue.submit(job)
                waiting = asyncio.create_task(queue.wait_result(job.id, timeout_s=10))
                await queue.finish(await take_one(queue), success(job))
                assert await waiting == success(job)
            finally:
                server.kill()


async def test_a_full_memory_is_told_at_once() -> None:
    with folder() as path:
        server = RedisServer(path, "--maxmemory", "3mb")
        server.start()
        try:
            async with opened(server, max_bytes=1 << 30) as queue:
                big = [replace(fresh(), vis=bytes(1 << 20)) for _ in range(6)]
                answers = await asyncio.gather(*map(queue.submit, big), return_exceptions=True)
                refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
                assert 1 <= len(refused) == 6 - (await queue.stats()).num_unfinished
        finally:
            server.kill()


async def test_a_failover_is_survived() -> None:
    with folder() as one, folder() as two, folder() as three:
        ports = free_port(), free_port(), free_port()
        primary = RedisServer(one, port=ports[0])
        replica = RedisServer(
            two, "--replicaof", "127.0.0.1", str(ports[0]), "--repl-diskless-sync-delay", "0", port=ports[1]
        )
        config = three / "sentinel.conf"
        config.write_text(
            f"sentinel monitor main 127.0.0.1 {ports[0]} 1\n"
            "sentinel down-after-milliseconds main 400\nsentinel failover-timeout main 2000\n"
        )
        sentinel = RedisServer(three, port=ports[2], config=config)
        try:
            for server in (primary, replica, sentinel):
                server.start()

            async def sees_both() -> bool:
                return b"num-slaves 1" in replies(sentinel.command("SENTINEL", "masters"))

            await until(sees_both)
            async with opened(f"redis+sentinel://127.0.0.1:{ports[2]}/main", lease_s=30.0) as queue:
                job = fresh()
                await queue.submit(job)
                lease = await take_one(queue)
                waiting = asyncio.create_task(unavailable_until_back(lambda: queue.wait_result(job.id, timeout_s=40)))

                async def is_copied() -> bool:
                    return replica.command("EXISTS", f"{PREFIX}:job:{job.id}") == b":1\r\n"

                await until(is_copied)
                primary.kill()
                assert await unavailable_until_back(lambda: queue.finish(lease, success(job)))
                assert await waiting == success(job)
        finally:
            for server in (primary, replica, sentinel):
                server.kill()


def replies(raw: bytes) -> bytes:
    """The words of a raw answer, without its lengths."""
    return b" ".join(word for word in raw.split(b"\r\n") if not word.startswith((b"$", b"*")))


def test_a_full_memory_within_a_script_is_told_as_one_outside_of_it() -> None:
    """Redis 6 words it as an error of the script."""
    message = (
        "Error running script (call to f_1): @user_script:1: -OOM command not allowed when used memory > 'maxmemory'."
    )
    with pytest.raises(UnavailableError) as caught, reaching():
        raise exceptions.ResponseError(message)
    assert isinstance(caught.value.__cause__, exceptions.OutOfMemoryError)
    with pytest.raises(exceptions.ResponseError, match="unknown"), reaching():
        raise exceptions.ResponseError("unknown command")
