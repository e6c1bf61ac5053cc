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
    caller, has_left = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        if caller is not None:
            caller.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and caller is not None and not caller.uncancel():  # by the watcher alone
            return None
        raise
    finally:
        watcher.cancel()
