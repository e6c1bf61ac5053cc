"""What requests hold in memory, over all faces of a process: from a body's first byte on, until it is answered.

The queue's bound begins when a job is complete, and with Redis it is that of all front ends together; this one keeps a
single process from being ended by uploads that each are within their limits.

HTTP counts bytes while they come. gRPC hands messages over whole, so what may come is promised before it is asked for:
`Holding.promise` waits in a line for that much room, `Holding.arrive` puts what really came in the promise's place.
What is kept for later and can be done without is a `Spare`: it is counted while it is there, and is let go of, the
oldest first, before anybody is refused or has to wait.
What a newcomer would get wrong: promises are short where senders are, so waiting for one is worth it, and what waits
for a worker is not, so nobody waits long for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from recofuse_host.memory import usable_memory
from service.terms.errors import OverloadedError

SHARE = 0.4  # of the memory that the process may use; parsing and sending hold pieces twice for a while
PROMISED = 0.5  # of that, at most, for what is still to come: who sends nothing must not keep all others out
ROOM_WAIT_S = 1.0  # for what is held to become less; then the caller is told, and may come back
GRACE_S = 5.0  # a promise that is older goes to those who wait for room


class Held:
    """One count for all faces. most: bytes; 0: `SHARE` of the memory that the process may use."""

    def __init__(self, most: int, *, retry_after_s: float) -> None:
        self._most = most or int(SHARE * usable_memory())
        self._retry_after_s = retry_after_s
        self._arrived = 0
        self._promised = 0
        self._promises: dict[Holding, float] = {}  # since when (monotonic seconds), the oldest first
        self._line: list[_Waiting] = []
        self._spares: dict[Spare, int] = {}  # bytes, the oldest first; what has arrived counts them, too

    @contextlib.contextmanager
    def holding(self) -> Iterator[Holding]:
        """What one request holds; given back at the end of the block."""
        holding = Holding(self)
        try:
            yield holding
        finally:
            holding.release()

    def take(self, num_bytes: int) -> None:
        """Count more that has come, or less if it is negative. Raises OverloadedError if that is too much."""
        if num_bytes > 0 and not self._makes_room(num_bytes):
            raise self.refusal()
        self._arrived += num_bytes
        if num_bytes < 0:
            self._let_in()

    def promise_now(self, holding: Holding, num_bytes: int) -> bool:
        """Promise this much, or all there is to promise if that is less; False if there is no room for it now."""
        num_bytes = min(num_bytes, self._most)
        if not self._may_promise(num_bytes) or not self._makes_room(num_bytes):
            return False
        self._promised += num_bytes
        self._promises[holding] = time.monotonic()
        holding.num_promised = num_bytes
        return True

    async def promise(self, holding: Holding, num_bytes: int, within_s: float | None) -> None:
        """Promise this much, in the order of those who ask. within_s: None waits for as long as it takes.

        Raises OverloadedError if there is no room in time, and after `ROOM_WAIT_S` if what is held leaves none.
        """
        if not self._line and self.promise_now(holding, num_bytes):
            return
        waiting = _Waiting(holding, min(num_bytes, self._most), asyncio.get_running_loop().create_future())
        self._line.append(waiting)
        self._let_in()  # past those whom only what is held keeps waiting
        until_s = None if within_s is None else time.monotonic() + within_s
        try:
            while True:
                await asyncio.wait([waiting.granted], timeout=ROOM_WAIT_S)
                if waiting.granted.done():
                    return
                is_full = self._is_full_for(waiting)
                if until_s is not None and (is_full or time.monotonic() >= until_s):
                    raise self.refusal()
                if not is_full:
                    self._take_back_oldest()
        finally:
            if waiting in self._line:
                self._line.remove(waiting)
                self._let_in()  # it may have been in the way

    def arrive(self, holding: Holding, num_bytes: int) -> None:
        """Count what has come in place of its promise. Raises OverloadedError if that is too much."""
        if not self._makes_room(num_bytes - holding.num_promised):
            raise self.refusal()
        self._arrived += num_bytes
        self.forget(holding)

    def forget(self, holding: Holding) -> None:
        """A promise has been kept, or is wanted no more."""
        if self._promises.pop(holding, None) is not None:
            self._promised -= holding.num_promised
            holding.num_promised = 0
            self._let_in()

    def keep(self, spare: Spare, num_bytes: int) -> bool:
        """Count what is kept for later, in place of what was before. False, and nothing, if no room is left over."""
        self.drop(spare)
        if self._arrived + self._promised + num_bytes > self._most:
            return False
        self._arrived += num_bytes
        self._spares[spare] = num_bytes
        return True

    def drop(self, spare: Spare) -> None:
        """It is kept no more."""
        if num_bytes := self._spares.pop(spare, 0):
            self.take(-num_bytes)

    def refusal(self) -> OverloadedError:
        """What is said to those for whom there is no room."""
        return OverloadedError("too much is being uploaded at once; try again later", retry_after_s=self._retry_after_s)

    def _makes_room(self, num_bytes: int) -> bool:
        """Whether this much more has room; spares are let go of for that, if it is of use."""
        excess = self._arrived + self._promised + num_bytes - self._most
        if excess > 0 and excess > sum(self._spares.values()):
            return False
        while excess > 0:
            spare = next(iter(self._spares))
            yielded = self._spares.pop(spare)
            self._arrived -= yielded
            excess -= yielded
            spare.on_yield()
        return True

    def _is_full_for(self, waiting: _Waiting) -> bool:
        """Whether what has come leaves no room for it, whatever becomes of promises."""
        return self._arrived - sum(self._spares.values()) + waiting.num_bytes > self._most

    def _may_promise(self, num_bytes: int) -> bool:
        return not self._promises or self._promised + num_bytes <= PROMISED * self._most

    def _let_in(self) -> None:
        """Grant what there is room for. Who waits for what is held to become less does not hold up those behind."""
        for waiting in tuple(self._line):
            if self._is_full_for(waiting):
                continue
            if not self.promise_now(waiting.holding, waiting.num_bytes):
                break
            self._line.remove(waiting)
            waiting.granted.set_result(None)

    def _take_back_oldest(self) -> None:
        """Of a promise that is slow to be kept while others wait."""
        for holding, since_s in self._promises.items():
            if since_s + GRACE_S > time.monotonic():
                break
            if holding.on_wanted is not None:
                holding.on_wanted()
                break


class Holding:
    """The part of one request. on_wanted: called when a promise is so old that others should have its room."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._arrived = 0
        self.num_promised = 0
        self.on_wanted: Callable[[], None] | None = None

    def add(self, num_bytes: int) -> None:
        """More has come. Raises OverloadedError if that is too much for the process."""
        self._held.take(num_bytes)
        self._arrived += num_bytes

    async def promise(self, num_bytes: int, *, within_s: float | None) -> None:
        """Room for what may come. Raises OverloadedError; see `Held.promise`."""
        try:
            await self._held.promise(self, num_bytes, within_s)
        except BaseException:
            self._held.forget(self)  # granted in the moment in which its caller left
            raise

    def promise_now(self, num_bytes: int) -> bool:
        """Room for what may come, if there is some without waiting."""
        return self._held.promise_now(self, num_bytes)

    def arrive(self, num_bytes: int) -> None:
        """What was promised has come, and is this large. Raises OverloadedError if there is no room for more."""
        self._held.arrive(self, num_bytes)
        self._arrived += num_bytes

    def release(self) -> None:
        """Nothing is held or to come any more; at the latest at the end of the request."""
        self.on_wanted = None
        self._held.forget(self)
        num_bytes, self._arrived = self._arrived, 0
        if num_bytes:
            self._held.take(-num_bytes)


class Spare:
    """What one caller keeps for later and can do without. on_yield: called when others get its room."""

    def __init__(self, held: Held, on_yield: Callable[[], None]) -> None:
        self._held = held
        self.on_yield = on_yield

    def keep(self, num_bytes: int) -> bool:
        """Keep so much in place of what was kept before; False, and nothing, if no room is left over for it."""
        return self._held.keep(self, num_bytes)

    def release(self) -> None:
        """Nothing is kept any more."""
        self._held.drop(self)


@dataclass(frozen=True, slots=True)
class _Waiting:
    holding: Holding
    num_bytes: int
    granted: asyncio.Future[None]
