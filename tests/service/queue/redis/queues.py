"""Queues on a server, and what the tests of them do over and over."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from service.queue.contract import Lease
from service.queue.redis.address import PREFIX
from service.queue.redis.queue import RedisQueue
from service.terms.errors import UnavailableError
from service.terms.jobs import FusionJob
from tests.fakes import job as new_job
from tests.service.queue.contract import SETTINGS
from tests.service.redis_server import RedisServer


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A short path, as Unix sockets need it."""
    with tempfile.TemporaryDirectory(prefix="rq-") as path:
        yield Path(path)


@contextlib.asynccontextmanager
async def opened(server: RedisServer | str, **changes: object) -> AsyncIterator[RedisQueue]:
    url = server if isinstance(server, str) else server.url
    queue = RedisQueue(SETTINGS.model_copy(update={"url": url, **changes}), min_file_bytes=1)
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


async def unavailable_until_back(call: object) -> object:
    """What a caller of the queue does: back off and repeat."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await call()  # type: ignore[operator]
            except UnavailableError:
                await asyncio.sleep(0.05)
