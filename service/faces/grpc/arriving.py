"""Messages on their way in: room for them first, then their bytes, then what they say.

What a newcomer would get wrong: gRPC reads a message when it is asked to, and then all of it; until then it takes in
`LOOKAHEAD_BYTES` of a call and no more. So nothing is asked for before the caller is known and `Held` has room. The
largest message that is accepted is what may come, unless the caller announces less (`ANNOUNCED`) or, in a stream, what
came before was smaller. Nothing can stop a caller from sending more than it announced, or than its stream did so far,
up to that largest size: it is refused, but only once it is there.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from service.access.held import Held, Holding, Spare
from service.faces.grpc.weighing import admit
from service.terms.errors import (
    InvalidInputError,
    MalformedRequestError,
    PayloadTooLargeError,
    TimedOutError,
    UnavailableError,
)
from service.terms.settings import Settings

ANNOUNCED = "recofuse-request-bytes"  # metadata of a call: no message of it is larger
LOOKAHEAD_BYTES = 256 << 10  # of a call are taken in unasked, so that short messages cost no second round trip
MAX_SMALL_BYTES = 64 << 10  # of a message that carries no pictures
QUICK_S = 0.25  # such a message needs no room for this long: whatever the network brings until then fits anywhere
HANG_UP_S = 1.0  # it looks like an end without a message at first
FRAME_SPARE = 1.25  # how much larger than all before it a frame is expected to be at most
MIN_FRAME_BYTES = 64 << 10

Context = grpc.aio.ServicerContext[Any, Any]
Parse = Callable[[bytes], Any]

_SIZE = re.compile(r"[0-9]{1,18}")


def carries_pictures(route: str) -> bool:
    """Whether a method's messages do."""
    method = route.rpartition("/")[2]
    return "Fuse" in method or "Infer" in method


def max_message_bytes(settings: Settings) -> int:
    """The largest message that is accepted."""
    return 2 * settings.limits.max_image_bytes + 64 * 1024


class Arrivals:
    """How messages are read, for a server."""

    def __init__(self, held: Held, settings: Settings) -> None:
        self.held = held
        self.most = max_message_bytes(settings)
        self._patience_s = settings.http.body_timeout_s

    async def only(self, context: Context, parse: Parse, holding: Holding, route: str) -> Any:
        """The message of a call that has one. What it takes is in `holding` from now on.

        Raises MalformedRequestError, InvalidInputError, PayloadTooLargeError, OverloadedError, TimedOutError.
        """
        raw = await (self._pictures(context, holding) if carries_pictures(route) else self.small(context, holding))
        if raw is None:
            await asyncio.sleep(HANG_UP_S)  # in which a caller that hung up ends this task
            raise MalformedRequestError("the call came without a message")
        return _parsed(parse, raw, self.most)

    async def small(self, context: Context, holding: Holding) -> bytes | None:
        """The next message where none carries pictures; None after the last one. Raises as `only` does."""

        def cover() -> None:
            """It is slow, so that much may have come of it."""
            if not holding.promise_now(self.most) and holding.on_wanted is not None:
                holding.on_wanted()

        timer = asyncio.get_running_loop().call_later(QUICK_S, cover)
        try:
            raw = await self._read_in_time(context, holding)
        finally:
            timer.cancel()
        holding.release()
        if raw is not None and len(raw) > MAX_SMALL_BYTES:
            raise PayloadTooLargeError(
                f"the message has {len(raw)} bytes; this method accepts at most {MAX_SMALL_BYTES}"
            )
        return raw

    async def _pictures(self, context: Context, holding: Holding) -> bytes | None:
        announced = self.announced_bytes(context)
        await holding.promise(self.most if announced is None else announced, within_s=self._patience_s)
        raw = await self._read_in_time(context, holding)
        if raw is not None:
            if announced is not None and len(raw) > announced:
                raise InvalidInputError(f"{ANNOUNCED}: {announced} were announced, and the message has {len(raw)}")
            holding.arrive(len(raw))
        return raw

    def announced_bytes(self, context: Context) -> int | None:
        """The most that a message has, if the caller says so. Raises InvalidInputError, PayloadTooLargeError."""
        pairs: Any = context.invocation_metadata() or ()
        told = next((value for key, value in pairs if key == ANNOUNCED), None)
        if told is None:
            return None
        if not isinstance(told, str) or not _SIZE.fullmatch(told):
            raise InvalidInputError(f"{ANNOUNCED}: accepted is a number of bytes")
        if int(told) > self.most:
            raise PayloadTooLargeError(f"a message of {told} bytes is announced; at most {self.most} are accepted")
        return int(told)

    async def _read_in_time(self, context: Context, holding: Holding) -> bytes | None:
        try:
            return await _read(context, holding, self._patience_s)
        except _RoomWantedError as error:
            raise self.held.refusal() from error
        except TimeoutError as error:
            raise TimedOutError(f"the message was not there within {self._patience_s:g} s") from error


class Messages:
    """The messages of a call that has many, one by one, each as `Arrivals` has them.

    What one takes is held until the next is asked for; `keep` is for those who go on using it then.
    """

    def __init__(self, arrivals: Arrivals, context: Context, parse: Parse, route: str) -> None:
        self._arrivals = arrivals
        self._context = context
        self._parse = parse
        self._carries_pictures = carries_pictures(route)
        self._largest: int | None = None  # of those that were kept
        self._num_bytes = 0
        self._holding = Holding(arrivals.held)

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> Any:
        """Raises as `Arrivals.only` does, and UnavailableError if no message came and others needed the room for it."""
        self._holding.release()
        if self._carries_pictures:
            raw = await self._next_pictures()
        else:
            raw = await self._arrivals.small(self._context, self._holding)
        if raw is None:
            self._holding.release()
            raise StopAsyncIteration
        self._num_bytes = len(raw)
        return _parsed(self._parse, raw, self._arrivals.most)

    def keep(self) -> Holding:
        """What the message that came last holds; the caller releases it. The next are expected to be about as large."""
        kept, self._holding = self._holding, Holding(self._arrivals.held)
        self._largest = max(self._largest or 0, self._num_bytes)
        return kept

    def spare(self, on_yield: Callable[[], None]) -> Spare:
        """For what is kept beside messages and yields to them; the caller releases it."""
        return Spare(self._arrivals.held, on_yield)

    def close(self) -> None:
        """No more is wanted."""
        self._holding.release()

    async def _next_pictures(self) -> bytes | None:
        expected = self._arrivals.announced_bytes(self._context)
        if self._largest is not None:
            expected = max(MIN_FRAME_BYTES, int(FRAME_SPARE * self._largest), expected or 0)
        holding, most = self._holding, self._arrivals.most
        await holding.promise(most if expected is None else min(expected, most), within_s=None)
        try:
            raw = await _read(self._context, holding, None)
        except _RoomWantedError as error:
            raise UnavailableError(
                "no frame came, and others waited for its room; open the stream again when there is one",
                retry_after_s=1.0,
            ) from error
        if raw is not None:
            holding.arrive(len(raw))
        return raw


class _RoomWantedError(Exception):
    """Nothing came for a while, and others waited for the room that it had."""


class _Patience:
    """How long a message is waited for: less than was meant, once others want the room that it has."""

    def __init__(self, holding: Holding) -> None:
        self.timeout: asyncio.Timeout | None = None
        self.is_wanted = False
        self._holding = holding

    def give_up(self) -> None:
        """Wait no longer."""
        self.is_wanted, self._holding.on_wanted = True, None  # once: it takes a moment to take effect
        if self.timeout is not None:
            self.timeout.reschedule(asyncio.get_running_loop().time())


async def _read(context: Context, holding: Holding, within_s: float | None) -> bytes | None:
    """The next message as it is; None after the last. Raises TimeoutError, _RoomWantedError."""
    patience = _Patience(holding)
    try:
        async with asyncio.timeout(within_s) as patience.timeout:
            holding.on_wanted = patience.give_up
            try:
                raw: Any = await context.read()
            finally:
                holding.on_wanted = None
    except TimeoutError as error:
        if patience.is_wanted:
            raise _RoomWantedError from error
        raise
    finally:
        # It knows its task, which keeps how it was cancelled and so this frame: a cycle that would hold the whole call.
        patience.timeout = None
    return None if raw is grpc.aio.EOF else raw


def _parsed(parse: Parse, raw: bytes, most: int) -> Any:
    """What a message says. parse: `FromString` of its class. Raises as `admit` does, and MalformedRequestError."""
    admit(raw, parse.__self__.DESCRIPTOR, most)  # type: ignore[attr-defined]
    try:
        return parse(raw)
    except DecodeError as error:
        raise MalformedRequestError("a message cannot be parsed as what its method takes") from error
