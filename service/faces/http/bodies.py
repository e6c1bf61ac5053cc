"""Bodies of requests, read within limits while they arrive, and counted.

A body that is too large is refused at the byte that is too many, and so is one that is too much beside the others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection

from fastapi import Request

from service.access.held import Holding
from service.terms.errors import (
    InvalidInputError,
    MalformedRequestError,
    PayloadTooLargeError,
    ServiceError,
    TimedOutError,
    UnsupportedMediaError,
)
from service.terms.settings import Settings

MAX_DISCARD_BYTES = 16 << 20  # of a refused body
DISCARD_S = 2.0


async def read_body(request: Request, settings: Settings, holding: Holding, options: Collection[str]) -> bytes:
    """A body that is not a form, as it is. Raises like `Body.pour`, and InvalidInputError.

    options: what the body may ask for. In the query string they would be ignored, so they are refused there; what has
    another name may be meant for a proxy on the way.
    """
    body = Body(request)
    chunks: list[bytes] = []
    try:
        if misplaced := [name for name, value in request.query_params.items() if value and name in options]:
            told = ", ".join(dict.fromkeys(misplaced))
            raise InvalidInputError(
                f"the query parameter {told} is not read here; it belongs into the body's parameters"
            )
        await body.pour(chunks.append, settings, holding)
        return b"".join(chunks)
    except ServiceError as error:
        refused = error.with_traceback(None)  # whose frames hold what has come
    chunks.clear()
    holding.release()
    await body.discard_rest()
    raise refused


class Body:
    """A request's body as it arrives."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._is_complete = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """The next pieces, as they come. Raises MalformedRequestError if the client leaves before the end."""
        while not self._is_complete:
            message = await self._request.receive()
            if message["type"] == "http.disconnect":
                self._is_complete = True
                raise MalformedRequestError("the connection was closed before the body's end")
            self._is_complete = not message.get("more_body", False)
            yield message.get("body", b"")

    async def pour(self, write: Callable[[bytes], None], settings: Settings, holding: Holding) -> None:
        """Hand the pieces on, counted and within the limits; none is asked for before what the head announces is fine.

        Raises UnsupportedMediaError (compressed), PayloadTooLargeError, OverloadedError, TimedOutError,
        MalformedRequestError.
        """
        _require_plain(self._request)
        max_bytes = 2 * settings.limits.max_image_bytes + 64 * 1024
        announced = self._request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > max_bytes:
            raise PayloadTooLargeError(f"the body has {announced} bytes; at most {max_bytes} are accepted")
        pause_s, min_rate = settings.http.body_timeout_s, settings.http.min_body_bytes_per_s
        now_s = asyncio.get_running_loop().time
        slowest_s = now_s() + pause_s  # when this much of a body must be there, at the latest
        num_bytes = 0
        try:
            async with asyncio.timeout(pause_s) as patience:
                async for chunk in self.chunks():
                    if num_bytes + len(chunk) > max_bytes:
                        raise PayloadTooLargeError(f"the body has more than {max_bytes} bytes")
                    holding.add(len(chunk))
                    num_bytes += len(chunk)
                    write(chunk)
                    slowest_s += len(chunk) / min_rate
                    patience.reschedule(min(now_s() + pause_s, slowest_s))
        except TimeoutError as error:
            raise TimedOutError(
                f"the body stopped or came too slowly; accepted are pauses of up to {pause_s:g} s and, after the first "
                f"{pause_s:g} s, at least {min_rate} bytes/s on average"
            ) from error

    async def discard_rest(self) -> None:
        """Let a refused client finish a body of bearable size: closing on it would destroy the answer on its way.

        A client that asked before sending (Expect: 100-continue) has nothing on its way yet.
        """
        if "expect" in self._request.headers:
            return
        num_bytes = 0
        with contextlib.suppress(TimeoutError, MalformedRequestError):
            async with asyncio.timeout(DISCARD_S):
                async for chunk in self.chunks():
                    num_bytes += len(chunk)
                    if num_bytes > MAX_DISCARD_BYTES:
                        return


def _require_plain(request: Request) -> None:
    """Raises UnsupportedMediaError for a body that would have to be decompressed."""
    for header in ("content-encoding", "transfer-encoding"):
        codings = {coding.strip().lower() for line in request.headers.getlist(header) for coding in line.split(",")}
        if unknown := sorted(codings - {"", "identity", "chunked"}):
            raise UnsupportedMediaError(
                f"compressed bodies are not accepted ({unknown[0][:40]}): send it uncompressed; images are compressed "
                "already"
            )
