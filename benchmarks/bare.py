"""What `recofuse bench service` is compared with: a batching server as one would write it first, with FastAPI alone.

`python -m benchmarks.bare PORT`. It parses the same multipart body, gathers requests in an asyncio queue, hands batches
to a model on a thread (here one that returns its input) and answers with one file. It has no limits, checks no file and
forgets nobody who hung up: what recofuse does besides is what the ratio shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence

import uvicorn
from fastapi import FastAPI, Response, UploadFile

MAX_BATCH, MAX_WAIT_S = 8, 0.005

Pair = tuple[bytes, bytes]


class BareBatcher:
    """Gathers pairs until there are enough or the first has waited long enough, and runs them together."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[Pair, asyncio.Future[bytes]]] = asyncio.Queue()

    async def fuse(self, vis: bytes, ir: bytes) -> bytes:
        """The answer to one pair."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        await self._queue.put(((vis, ir), future))
        return await future

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            waiting = [await self._queue.get()]
            end_s = loop.time() + MAX_WAIT_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(end_s):
                    while len(waiting) < MAX_BATCH:
                        waiting.append(await self._queue.get())
            answers = await asyncio.to_thread(fuse_batch, [pair for pair, _ in waiting])
            for (_, future), answer in zip(waiting, answers, strict=True):
                if not future.done():
                    future.set_result(answer)


def fuse_batch(pairs: Sequence[Pair]) -> list[bytes]:
    """In a model's place: what the null engine does between ready bytes."""
    return [vis for vis, _ in pairs]


def build_app() -> FastAPI:
    """The server."""
    batcher = BareBatcher()

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


if __name__ == "__main__":
    uvicorn.run(build_app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
