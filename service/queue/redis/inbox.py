"""What this process is told of jobs that end: a connection that listens, and those who wait to hear it.

A message that is lost with a connection costs nothing: after every (re)connection all waiters look again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from redis import exceptions
from redis.asyncio.client import PubSub

from service.queue.redis.availability import reaching
from service.terms.errors import UnavailableError
from service.terms.jobs import FusionJob

logger = logging.getLogger(__name__)

MAX_EXPECTED = 10_000  # submitted jobs whose caller has not come to wait yet
QUIET_S = 5.0  # silence on the message connection after which it is probed
BACK_OFF_S = (0.05, 2.0)  # first and longest pause of the message connection between two tries; halved at random


@dataclass(frozen=True, slots=True)
class Told:
    """That a job has ended. record: its result, as Redis keeps it; None if it was not sent along."""

    is_kept: bool = True
    record: bytes | None = None


Waiter = asyncio.Future[Told]


@dataclass(frozen=True, slots=True)
class Expected:
    """A job of this process whose caller is about to wait: what its end will wake, and when that is at the latest."""

    waiter: Waiter
    deadline_s: float | None


class Inbox:
    """Receives ids of ended jobs while it is open, and wakes those who wait for them.

    channel: of this process, which others send to when they end what it waits for. Its name ends with +, by which they
    know that short results may be sent along. on_end: called with the ids that
    came by another channel, one of those of its workers.
    """

    def __init__(self, client: Any, channel: str, on_end: Callable[[str], None]) -> None:
        self._client = client
        self.channel = channel
        self._on_end = on_end
        self._channels = {channel}
        self._pubsub: PubSub | None = None
        self._waiters: dict[str, set[Waiter]] = {}
        self._expected: OrderedDict[str, Expected] = OrderedDict()
        self._listening: asyncio.Task[None] | None = None
        self._is_open = False

    def open(self) -> None:
        """Begin to listen; returns at once."""
        self._is_open = True
        self._listening = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """Listen no more."""
        self._is_open = False
        while self._listening is not None and not self._listening.done():
            self._listening.cancel()  # again, if redis-py mistook it for a lost connection
            await asyncio.wait({self._listening}, timeout=0.2)

    async def listen_to(self, channel: str) -> None:
        """Hear what is said on this channel too. Raises UnavailableError."""
        if channel not in self._channels:
            self._channels.add(channel)
            if self._pubsub is not None:
                with reaching():
                    await self._pubsub.subscribe(channel)

    # waiting

    def expect(self, job: FusionJob) -> None:
        """Listen for the job's end from now on, for a `waiting` that comes soon."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(job.id, set()).add(waiter)
        self._expected[job.id] = Expected(waiter, job.deadline_s)
        if len(self._expected) > MAX_EXPECTED:
            self.stop_expecting(next(iter(self._expected)))

    def stop_expecting(self, job_id: str) -> None:
        """Nobody will come to wait."""
        if (expected := self._expected.pop(job_id, None)) is not None:
            self._drop_waiter(job_id, expected.waiter)

    @contextlib.contextmanager
    def waiting(self, job_id: str) -> Iterator[tuple[Waiter, Expected | None]]:
        """A future that the job's end wakes, for the duration of the block, and what was expected before, if it was."""
        expected = self._expected.pop(job_id, None)
        # There before the look (or before the submit), so that no message falls between the two.
        waiter = asyncio.get_running_loop().create_future() if expected is None else expected.waiter
        self._waiters.setdefault(job_id, set()).add(waiter)
        try:
            yield waiter, expected
        finally:
            self._drop_waiter(job_id, waiter)

    def _drop_waiter(self, job_id: str, waiter: Waiter) -> None:
        waiters = self._waiters.get(job_id, set())
        waiters.discard(waiter)
        if not waiters:
            self._waiters.pop(job_id, None)

    # listening

    async def _listen(self) -> None:
        """Receive the ids of ended jobs, over as many connections as it takes."""
        pause_s, longest_s = BACK_OFF_S
        while self._is_open:
            started_s = time.monotonic()
            try:
                with reaching():
                    async with self._client.pubsub() as pubsub:
                        await pubsub.subscribe(*self._channels)
                        self._pubsub = pubsub
                        await self._hear(pubsub)
            except UnavailableError as error:
                logger.warning("messages are interrupted", extra={"error": str(error.__cause__)})
            except Exception:  # whatever it is, who waits must not wait in vain
                logger.exception("messages are interrupted")
            finally:
                self._pubsub = None
            has_lasted = time.monotonic() - started_s > longest_s
            pause_s = BACK_OFF_S[0] if has_lasted else min(2 * pause_s, longest_s)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    async def _hear(self, pubsub: PubSub) -> None:
        is_probed = False
        while True:
            message = await pubsub.get_message(timeout=QUIET_S)
            if message is None:
                if is_probed:
                    raise exceptions.ConnectionError("Redis does not answer")
                is_probed = True
                await pubsub.ping()
                continue
            is_probed = False
            if message["type"] == "subscribe":  # what was said before went by unheard
                for waiters in self._waiters.values():
                    _wake(waiters, Told())
            elif message["type"] == "message":
                raw_id, *rest = message["data"].split(b" ", 2)
                job_id = raw_id.decode()
                _wake(self._waiters.get(job_id, ()), Told(rest[0] != b"0", rest[1]) if rest else Told())
                if message["channel"].decode() != self.channel:
                    self._on_end(job_id)


def _wake(waiters: Iterable[Waiter], told: Told) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(told)
