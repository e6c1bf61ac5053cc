"""When a call is tried again, and how one piece of code serves clients that block and clients that await.

An operation is a generator. It yields what it wants done (a request to send, a pause to take) and is sent what came of
it, so that everything worth testing - which failures are tried again, how long the pauses are, what an answer means -
is written once. `run` and `run_async` are all that differs between the two kinds of client.

What is safe. A refusal (RefusedError: the queue is full, the key asks too often, the server is stopping) says that
nothing was done; a ConnectionFailedError that nothing was sent. Both are tried again. After a ConnectionLostError the
request may have been carried out, so it is repeated only if repeating changes nothing: reads, cancelling, and requests
with an idempotency key, whose repeats the server answers from the first one's job.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from recofuse_client.errors import (
    ConnectionFailedError,
    ConnectionLostError,
    RecofuseError,
    RefusedError,
    TimedOutError,
)

Answer = TypeVar("Answer")
Request = TypeVar("Request")


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently to try again. Retry(max_attempts=1) never does.

    first_pause_s, max_pause_s: the bounds between which pauses double. A pause is a random time of up to that (full
    jitter), so that many clients do not come back at once; where the server says how long to wait, up to a quarter is
    added to what it says. No pause outlasts the call's own deadline: then the error is raised at once.
    """

    max_attempts: int = 6
    first_pause_s: float = 0.2
    max_pause_s: float = 10.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or not 0 < self.first_pause_s <= self.max_pause_s:
            raise ValueError("max_attempts must be at least 1, and 0 < first_pause_s <= max_pause_s")

    def pause_s(self, num_failures: int, advice_s: float | None, fraction: float | None = None) -> float:
        """Seconds to wait after this many failures. fraction: in [0, 1], the chance in it; None draws one."""
        chance = random.random() if fraction is None else fraction
        if advice_s is not None:
            return advice_s * (1 + chance / 4)
        # Never 0: a server that has just refused a connection will refuse the next one, too.
        most_s = min(self.max_pause_s, self.first_pause_s * 2.0 ** min(num_failures - 1, 60))
        return most_s * (0.1 + 0.9 * chance)


def is_safe_to_repeat(error: RecofuseError, *, is_idempotent: bool) -> bool:
    """Whether the request behind this error may be sent again without doing anything twice."""
    if isinstance(error, ConnectionLostError):
        return is_idempotent
    return isinstance(error, (RefusedError, ConnectionFailedError))


@dataclass(frozen=True, slots=True)
class Pause:
    """An operation wants to wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Send(Generic[Request]):
    """An operation wants this sent, and its answer, which must come within timeout_s."""

    request: Request
    timeout_s: float


class Deadline:
    """A moment on the monotonic clock. `remaining_s` raises once it has passed."""

    def __init__(self, timeout_s: float) -> None:
        if not timeout_s > 0:
            raise ValueError(f"a timeout of {timeout_s} s is not possible; accepted is more than 0")
        self._timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def allows(self, pause_s: float) -> bool:
        """Whether there is time left after such a pause."""
        return time.monotonic() + pause_s < self._end_s

    def remaining_s(self) -> float:
        """Seconds, more than 0. Raises TimedOutError."""
        remaining_s = self._end_s - time.monotonic()
        if remaining_s <= 0:
            raise TimedOutError(f"there was no answer within {self._timeout_s:g} s")
        return remaining_s


Operation = Generator[Pause | Send[Request], Any, Answer]


def retried(
    attempt: Callable[[float], Operation[Request, Answer]], retry: Retry, deadline: Deadline, *, is_idempotent: bool
) -> Operation[Request, Answer]:
    """Try an operation until it succeeds, fails for good, or the deadline or the attempts are used up.

    attempt: receives the seconds that remain. Raises RecofuseError: what the last attempt raised.
    """
    num_failures = 0
    while True:
        try:
            return (yield from attempt(deadline.remaining_s()))
        except RecofuseError as error:
            num_failures += 1
            pause_s = retry.pause_s(num_failures, error.retry_after_s)
            if (
                num_failures >= retry.max_attempts
                or not is_safe_to_repeat(error, is_idempotent=is_idempotent)
                or not deadline.allows(pause_s)
            ):
                raise
        yield Pause(pause_s)


def poll_pauses_s() -> Iterator[float]:
    """Pauses between two questions about the same job: short at first, 2 s in the end."""
    pause_s = 0.05
    while True:
        yield pause_s * random.uniform(0.8, 1.2)
        pause_s = min(1.5 * pause_s, 2.0)


def run(
    operation: Operation[Request, Answer],
    send: Callable[[Request, float], Any],
    sleep: Callable[[float], None] = time.sleep,
) -> Answer:
    """Carry out an operation, blocking."""
    try:
        step = next(operation)
        while True:
            try:
                outcome: Any = None
                if isinstance(step, Pause):
                    sleep(step.seconds)
                else:
                    outcome = send(step.request, step.timeout_s)
            except RecofuseError as error:
                step = operation.throw(error)
            else:
                step = operation.send(outcome)
    except StopIteration as end:
        answer: Answer = end.value
        return answer
    finally:
        operation.close()


async def run_async(operation: Operation[Request, Answer], send: Callable[[Request, float], Awaitable[Any]]) -> Answer:
    """Carry out an operation, awaiting."""
    try:
        step = next(operation)
        while True:
            try:
                outcome: Any = None
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                else:
                    outcome = await send(step.request, step.timeout_s)
            except RecofuseError as error:
                step = operation.throw(error)
            else:
                step = operation.send(outcome)
    except StopIteration as end:
        answer: Answer = end.value
        return answer
    finally:
        operation.close()
