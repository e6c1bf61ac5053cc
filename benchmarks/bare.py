"""What `recofuse bench service` is compared with: batching servers as one would write them first, with FastAPI alone.

    python -m benchmarks.bare serve PORT              one process
    python -m benchmarks.bare front PORT REDIS_PORT   the same over Redis: any number of these,
    python -m benchmarks.bare worker REDIS_PORT       and of these

They parse the same multipart body, gather requests in a queue, hand batches to a model on a thread (here one that
returns its input) and answer with one file. They have no limits, check no file, know no metrics, forget nobody who hung
up, and over Redis lose what a worker held: what recofuse does besides is what the ratio shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import uvicorn
import uvloop
from fastapi import FastAPI, Response, UploadFile
from redis.asyncio import Redis

MAX_BATCH, MAX_WAIT_S = 8, 0.005
JOBS = b"jobs"  # a list in Redis of `channel of the front end`/`id`

Pair = tuple[bytes, bytes]


def fuse_batch(pairs: Sequence[Pair]) -> list[bytes]:
    """In a model's place: what the null engine does between ready bytes."""
    return [vis for vis, _ in pairs]


class Batcher(Protocol):
    """Where a request waits for its answer."""

    async def fuse(self, vis: bytes, ir: bytes) -> bytes:
        """The answer to one pair."""

    async def run(self) -> None:
        """Serve until cancelled."""


class LocalBatcher:
    """Gathers pairs until there are enough or the first has waited long enough, and runs them together."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[Pair, asyncio.Future[bytes]]] = asyncio.Queue()

    async def fuse(self, vis: bytes, ir: bytes) -> bytes:
        """See Batcher."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        await self._queue.put(((vis, ir), future))
        return await future

    async def run(self) -> None:
        """See Batcher."""
        while True:
            waiting = [await self._queue.get()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MAX_WAIT_S):
                    while len(waiting) < MAX_BATCH:
                        waiting.append(await self._queue.get())
            answers = await asyncio.to_thread(fuse_batch, [pair for pair, _ in waiting])
            for (_, future), answer in zip(waiting, answers, strict=True):
                if not future.done():
                    future.set_result(answer)


class RedisBatcher:
    """Puts pairs into Redis, and is told over a channel of its own when a worker has left the answer there."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self._channel = secrets.token_hex(8).encode()
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        self._is_listening = asyncio.Event()

    async def fuse(self, vis: bytes, ir: bytes) -> bytes:
        """See Batcher."""
        await self._is_listening.wait()
        job = secrets.token_hex(8).encode()
        self._waiting[job] = told = asyncio.get_running_loop().create_future()
        async with self._redis.pipeline(transaction=True) as submission:
            submission.hset(b"pair:" + job, mapping={"vis": vis, "ir": ir})
            submission.lpush(JOBS, self._channel + b"/" + job)
            await submission.execute()
        await told
        async with self._redis.pipeline(transaction=False) as fetching:
            fetching.get(b"answer:" + job)
            fetching.delete(b"answer:" + job)
            answer, _ = await fetching.execute()
        return bytes(answer)

    async def run(self) -> None:
        """See Batcher."""
        async with self._redis.pubsub() as messages:
            await messages.subscribe(self._channel)
            async for message in messages.listen():
                self._is_listening.set()
                if message["type"] == "message":
                    self._waiting.pop(message["data"]).set_result(None)


async def work(redis: Any) -> None:
    """Take jobs from Redis, as many as there are, and leave their answers there."""
    while True:
        _, first = await redis.brpop(JOBS)
        taken = [job.split(b"/") for job in (first, *(await redis.rpop(JOBS, MAX_BATCH - 1) or ()))]
        async with redis.pipeline(transaction=False) as fetching:
            for _, job in taken:
                fetching.hmget(b"pair:" + job, "vis", "ir")
            pairs = await fetching.execute()
        answers = await asyncio.to_thread(fuse_batch, pairs)
        async with redis.pipeline(transaction=True) as finishing:
            for (channel, job), answer in zip(taken, answers, strict=True):
                finishing.set(b"answer:" + job, answer)
                finishing.delete(b"pair:" + job)
                finishing.publish(channel, job)
            await finishing.execute()


def build_app(batcher: Batcher) -> FastAPI:
    """The HTTP server."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/fuse")
    async def fuse(vis: UploadFile, ir: UploadFile) -> Response:
        return Response(await batcher.fuse(await vis.read(), await ir.read()), media_type="image/png")

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    return app


def connect(port: int) -> Any:
    """A client of a local Redis. A worker waits for jobs as long as it takes."""
    return Redis(port=port, protocol=2, socket_read_size=1 << 20, socket_timeout=None)


def main(role: str, *ports: int) -> None:
    """Run one of the processes above."""
    if role == "worker":
        uvloop.run(work(connect(ports[0])))
        return
    batcher = LocalBatcher() if role == "serve" else RedisBatcher(connect(ports[1]))
    uvicorn.run(build_app(batcher), host="127.0.0.1", port=ports[0], log_level="warning", access_log=False)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
