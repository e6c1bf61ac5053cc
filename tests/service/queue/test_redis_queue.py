"""RedisQueue keeps the contract on a real server, and what only a shared queue can be asked for."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.queue.contract import RECORD_BYTES, Lease, MemoryQueue
from service.queue.redis import PREFIX, RedisAddress, RedisQueue, build_queue
from service.terms.errors import ErrorCode, InternalError, JobNotFoundError, OverloadedError, UnavailableError
from service.terms.jobs import FusionJob, FusionResult, JobStatus, Priority, new_job_id
from service.terms.settings import QueueSettings, SettingsError
from tests.fakes import job as new_job
from tests.service.queue.contract import LEASE_S, SETTINGS, QueueContract, World, success
from tests.service.redis_server import RedisServer, free_port

pytestmark = pytest.mark.redis


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A short path, as Unix sockets need it."""
    with tempfile.TemporaryDirectory(prefix="rq-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with folder() as path:
        server = RedisServer(path)
        server.start()
        yield server
        server.kill()


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    assert shared_server.command("FLUSHALL") == b"+OK\r\n"
    return shared_server


@pytest.fixture
def durable() -> Iterator[RedisServer]:
    """A server of its own, with an append-only file that misses nothing."""
    with folder() as path:
        server = RedisServer(path, "--appendonly", "yes", "--appendfsync", "always")
        server.start()
        yield server
        server.kill()


@contextlib.asynccontextmanager
async def opened(server: RedisServer | str, **changes: object) -> AsyncIterator[RedisQueue]:
    url = server if isinstance(server, str) else server.url
    queue = RedisQueue(SETTINGS.model_copy(update={"url": url, **changes}))
    await queue.open()
    try:
        yield queue
    finally:
        await queue.close()


def fresh(*, keep: bool = True, ttl_s: float | None = None) -> FusionJob:
    now = time.time()
    return new_job(created_s=now, deadline_s=None if ttl_s is None else now + ttl_s, keep_result=keep)


async def take_one(queue: RedisQueue, worker_id: str = "w1", wait_s: float = 5.0) -> Lease:
    (lease,) = await queue.take(worker_id, max_jobs=1, wait_s=wait_s)
    return lease


async def until(claim: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await claim():  # noqa: ASYNC110 - looks at a state that belongs to others
            await asyncio.sleep(0.01)


async def keys_of(queue: RedisQueue) -> set[str]:
    return {key.decode().removeprefix(f"{PREFIX}:") for key in await queue._client.keys("*")}


class TestRedisQueue(QueueContract):
    @pytest.fixture
    async def world(self, server: RedisServer) -> AsyncIterator[World]:
        async with opened(server) as queue:
            yield World(queue, time.time, asyncio.sleep)


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
        call = queue._call

        async def lose_the_answer(command: str, *arguments: object) -> object:
            await call(command, *arguments)
            raise UnavailableError("cut off")

        queue._call = lose_the_answer  # type: ignore[method-assign]
        with pytest.raises(UnavailableError):
            await taking
        queue._call = call  # type: ignore[method-assign]
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


# Redis goes away


async def unavailable_until_back(call: object) -> object:
    """What a caller of the queue does: back off and repeat."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await call()  # type: ignore[operator]
            except UnavailableError:
                await asyncio.sleep(0.05)


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


# where Redis is


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://localhost", {"host": "localhost"}),
        (
            "redis://me:p%40ss@cache.example:6380/3",
            {"host": "cache.example", "port": 6380, "db": 3, "username": "me", "password": "p@ss"},
        ),
        (
            "rediss://:secret@cache.example?ssl_ca_certs=/etc/ca.pem",
            {"host": "cache.example", "password": "secret", "ssl": True, "ssl_ca_certs": "/etc/ca.pem"},
        ),
        ("unix:///run/redis.sock?db=2", {"path": "/run/redis.sock", "db": 2}),
    ],
)
def test_urls_of_one_server(url: str, options: dict[str, object]) -> None:
    assert RedisAddress.parse(url) == RedisAddress(options)


def test_urls_of_sentinels() -> None:
    address = RedisAddress.parse("redis+sentinel://me:p%40ss@a,b:26380,[::1]:5/main/2?sentinel_password=s")
    assert address.sentinels == (("a", 26379), ("b", 26380), ("::1", 5))
    assert address.service == "main"
    assert address.options == {"username": "me", "password": "p@ss", "db": 2}
    assert address.sentinel_options == {"password": "s"}
    secure = RedisAddress.parse("rediss+sentinel://a/main?ssl_ca_certs=/ca.pem")
    assert secure.options == secure.sentinel_options == {"ssl": True, "ssl_ca_certs": "/ca.pem"}


@pytest.mark.parametrize(
    "url",
    ["http://host", "redis://", "localhost:6379", "redis+sentinel://a", "redis+sentinel:///main", "redis://h:port",
     "redis+sentinel://me:secret@a:port/main", "redis+cluster://a"],
)  # fmt: skip
def test_urls_that_cannot_be_are_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"queue\.url") as refused:
        RedisQueue(QueueSettings(url=url))
    assert "secret" not in str(refused.value)


def test_the_url_chooses_the_queue() -> None:
    assert isinstance(build_queue(QueueSettings()), MemoryQueue)
    assert isinstance(build_queue(QueueSettings(url="redis://localhost")), RedisQueue)


async def test_wrong_credentials_stop_at_the_start() -> None:
    with folder() as path:
        server = RedisServer(path, port=free_port())
        server.start()
        server.command("CONFIG", "SET", "requirepass", "right")
        try:
            async with opened(f"redis://:right@127.0.0.1:{server.port}") as queue:
                await queue.stats()
            for url in (f"redis://:wrong@127.0.0.1:{server.port}", f"redis://127.0.0.1:{server.port}"):
                queue = RedisQueue(QueueSettings(url=url))
                with pytest.raises(SettingsError, match="credentials"):
                    await queue.open()
                await queue.close()
        finally:
            server.kill()


@contextlib.asynccontextmanager
async def tls_in_front(server: RedisServer, path: Path) -> AsyncIterator[tuple[int, Path]]:
    """A TLS port that leads to the server, and the certificate that it shows; the wheel's binary speaks no TLS."""
    key, certificate = path / "key.pem", path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    try:
        await asyncio.to_thread(lambda: subprocess.run(command, check=True, capture_output=True))
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while block := await reader.read(1 << 16):
                writer.write(block)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(server.path)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    proxy = await asyncio.start_server(connect, "127.0.0.1", 0, ssl=context)
    try:
        yield proxy.sockets[0].getsockname()[1], certificate
    finally:
        proxy.close()


async def test_tls_with_a_known_certificate(server: RedisServer) -> None:
    with folder() as path:
        async with tls_in_front(server, path) as (port, certificate):
            async with opened(f"rediss://localhost:{port}?ssl_ca_certs={certificate}") as queue:
                job = replace(fresh(), vis=bytes(300_000))
                await queue.submit(job)
                assert (await take_one(queue)).job == job
            queue = RedisQueue(QueueSettings(url=f"rediss://localhost:{port}"))
            with pytest.raises(UnavailableError):  # an unknown authority
                await queue.stats()
            await queue.close()


async def test_tls_with_a_password() -> None:
    with folder() as one, folder() as two:
        server = RedisServer(one)
        server.start()
        server.command("CONFIG", "SET", "requirepass", "r%g@t/")
        try:
            async with tls_in_front(server, two) as (port, certificate):
                query = f"?ssl_ca_certs={certificate}"
                async with opened(f"rediss://:r%25g%40t%2F@localhost:{port}{query}") as queue:
                    job = fresh()
                    await queue.submit(job)
                    lease = await take_one(queue)
                    waiting = asyncio.create_task(queue.wait_result(job.id, timeout_s=20))
                    await queue.finish(lease, success(job))
                    assert await waiting == success(job)  # pushed over a connection with TLS and password too
                queue = RedisQueue(QueueSettings(url=f"rediss://:wrong@localhost:{port}{query}"))
                with pytest.raises(SettingsError, match="credentials"):
                    await queue.open()
                await queue.close()
        finally:
            server.kill()


async def test_sentinels_and_servers_may_each_ask_for_a_password() -> None:
    with folder() as one, folder() as two:
        ports = free_port(), free_port()
        primary = RedisServer(one, port=ports[0])
        config = two / "sentinel.conf"
        config.write_text(f"sentinel monitor main 127.0.0.1 {ports[0]} 1\nsentinel auth-pass main inner\n")
        sentinel = RedisServer(two, port=ports[1], config=config)
        try:
            for server in (primary, sentinel):
                server.start()
            primary.command("CONFIG", "SET", "requirepass", "inner")
            assert sentinel.command("ACL", "SETUSER", "default", "resetpass", ">outer") == b"+OK\r\n"
            address = f"redis+sentinel://:inner@127.0.0.1:{ports[1]}/main"
            async with opened(f"{address}?sentinel_password=outer") as queue:
                job = fresh()
                await queue.submit(job)
                lease = await take_one(queue)
                await queue.finish(lease, success(job))
                assert await queue.wait_result(job.id, timeout_s=20) == success(job)
            for query in ("", "?sentinel_password=wrong"):
                queue = RedisQueue(QueueSettings(url=f"{address}{query}"))
                with pytest.raises((SettingsError, UnavailableError)):
                    await queue.stats()
                await queue.close()
        finally:
            for server in (primary, sentinel):
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
