"""Callers that hang up before their answer is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

Answer = TypeVar("Answer")

CLIENT_CLOSED = 499  # nobody hears it; it only tells the metrics what became of the request


async def unless_hung_up(request: Request, work: Awaitable[Answer]) -> Answer | None:
    """The work's result, or None, with the work cancelled, if the client hangs up first."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for unfinished in (task, watcher):
            unfinished.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
