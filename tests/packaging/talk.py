"""Run by an environment that has the client alone: every call, by every way to a server. Prints JSON.

Usage: talk.py HTTP_URL GRPC_URL VIS IR
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np

import recofuse_client as rc

VIS, IR = np.full((48, 64, 3), 90, np.uint8), np.full((48, 64), 300, np.uint16)


def blocking(url: str, vis: str, ir: str) -> Iterator[Any]:
    """What a client that blocks gets."""
    with rc.Client(url) as client:
        with open(vis, "rb") as file:
            content = file.read()
        yield client.health().is_ready
        yield [model.name for model in client.models()]
        yield client.fuse(vis, ir).fused.shape
        yield client.fuse(content, IR, output="ir").ir.shape
        yield client.fuse(VIS[..., ::-1], IR, bgr=True).fused.shape
        yield client.fuse(VIS, IR, format="png").pictures[rc.Part.FUSED].encoded[1:4].decode()
        yield client.wait(client.submit(VIS, IR).id).fused.shape
        if url.startswith("grpc"):
            with client.stream([(VIS, IR)] * 3) as results:
                yield [result.unwrap().fused.shape for result in results]


async def awaiting(url: str, vis: str, ir: str) -> AsyncIterator[Any]:
    """What a client that awaits gets."""
    async with rc.AsyncClient(url) as client:
        yield (await client.health()).is_ready
        yield (await client.fuse(vis, ir)).fused.shape
        yield (await client.wait((await client.submit(VIS, IR)).id)).fused.shape
        if url.startswith("grpc"):
            async with client.stream([(VIS, IR)] * 3) as results:
                yield [result.unwrap().fused.shape async for result in results]


async def collected(answers: AsyncIterator[Any]) -> list[Any]:
    """The items of an asynchronous generator."""
    return [answer async for answer in answers]


http, grpc, vis, ir = sys.argv[1:]
said: dict[str, Any] = {"from": rc.__file__}
for name, url in (("http", http), ("grpc", grpc)):
    said[name] = list(blocking(url, vis, ir))
    said[f"{name}-async"] = asyncio.run(collected(awaiting(url, vis, ir)))
said["imported"] = [name for name in ("torch", "fastapi", "cv2", "PIL", "imagecodecs") if name in sys.modules]
json.dump(said, sys.stdout)
