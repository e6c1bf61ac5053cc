"""The queue's transitions: calling `transitions.lua`, and what it keeps where.

Every transition is one call of the script and therefore atomic; payloads and results travel in the same MULTI,
beside the script, so that nothing large is copied through Lua. Keys, all with the prefix `{recofuse}`:

    jobs:high|normal|low    streams, one group `workers`; an entry carries id, deadline, header, and lives until the end
    payload:ID              hash of vis, ir and, of few, a history, or of how many bytes of them lie beside; TTL past
                            the deadline; gone at the end
    job:ID                  hash: where the entry is, bytes, times, and at the end what became of it; no TTL, but swept
    result:ID               the result's bytes, or where in the shared folder its pictures are (`beside.py`); TTL
    pending-result:TOKEN    a result on its way: renamed to result:ID, or dropped as a duplicate, in the same MULTI
    deadlines, finished     sorted sets of ids: when to give up, when to forget
    idem:HASH               idempotency key: first job's id and the request's fingerprint; TTL
    bytes                   what counts for max_bytes
    dead                    stream of dead letters, oldest first; dead-index: id to entry; dead-payload:ID
    workers, workers-until  what workers said about themselves, and until when that holds
    workers-gone            set of ids that are still to be forgotten as consumers
    wake                    stream that wakes blocked takers when a job is handed back
    folder                  the id of the shared folder; TTL, renewed by those who use it
    inbox:TOKEN, worker:ID  pub/sub channels: ids of jobs that ended, to those who wait and those who work

What a newcomer would get wrong: *a job is in its stream exactly as long as it is unfinished*, so nothing is ever
trimmed, and the streams' lengths are the number of unfinished jobs. A lease is the group's pending entry: its idle time
is the silence of its worker (`renew` resets it with XCLAIM JUSTID), its delivery count the attempts.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Sequence
from importlib import resources
from typing import Any

from redis import exceptions

from service.queue.redis.availability import reaching
from service.terms.errors import UnavailableError
from service.terms.settings import QueueSettings

GROUP = "workers"
MAX_CALLS = 64  # at once, and thereby connections of one process, besides those that wait for jobs or messages

MAX_JOINED = 32  # transitions that go together
_LENGTH = struct.Struct("<I")

SCRIPT = resources.files("service.queue.redis").joinpath("transitions.lua").read_text(encoding="utf-8")
SCRIPT_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()


class Transitions:
    """The script on one Redis, for the keys below one prefix.

    calls: places for calls at once, which others that talk to this Redis take as well.
    """

    def __init__(self, client: Any, prefix: str, settings: QueueSettings) -> None:
        self._client = client
        self._prefix = prefix
        self._common = (to_ms(settings.lease_s), settings.max_attempts, settings.max_dead_letters)
        self.calls = asyncio.Semaphore(MAX_CALLS)
        self._gathered: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self._sending: asyncio.Task[None] | None = None

    def key(self, *parts: str) -> str:
        """The full name of one of the keys above."""
        return ":".join((self._prefix, *parts))

    async def call(self, command: str, *arguments: Any) -> Any:
        """One transition of transitions.lua. Raises UnavailableError."""
        head = (1, self._prefix, command, *self._common)
        async with self.calls:
            with reaching():
                try:
                    return await self._client.execute_command("EVALSHA", SCRIPT_SHA, *head, *arguments)
                except exceptions.NoScriptError:  # a fresh server; it keeps what it has run once
                    return await self._client.execute_command("EVAL", SCRIPT, *head, *arguments)

    async def transact(self, writes: Sequence[tuple[Any, ...]], command: str, *arguments: Any) -> Any:
        """The writes and then a transition, all in one MULTI; `join` if there are none. Raises UnavailableError."""
        if not writes:
            return await self.join(command, *arguments)
        head = (1, self._prefix, command, *self._common)
        async with self.calls:
            with reaching():
                for verb, script in (("EVALSHA", SCRIPT_SHA), ("EVAL", SCRIPT)):
                    async with self._client.pipeline(transaction=True) as transaction:
                        for write in writes:
                            transaction.execute_command(*write)
                        transaction.execute_command(verb, script, *head, *arguments)
                        answers = await transaction.execute(raise_on_error=False)
                    if isinstance(answers[-1], exceptions.NoScriptError):
                        continue
                    for answer in answers:
                        if isinstance(answer, Exception):
                            raise answer
                    break
                return answers[-1]

    async def join(self, command: str, *arguments: Any) -> Any:
        """As `call`, for what many do at once: those that come while others are on their way then are one call.

        A call of its own costs this process more than the script costs Redis, and a run of the script more than what it
        is for.
        """
        answer = asyncio.get_running_loop().create_future()
        self._gathered.append(((command, *arguments), answer))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_gathered())
        outcome = await answer
        if isinstance(outcome, Exception):
            try:
                with reaching():
                    raise outcome
            finally:
                del outcome  # else it and this frame, and so the caller's images, would hold each other
        return outcome

    async def close(self) -> None:
        """Returns once nothing is on its way any more."""
        if self._sending is not None:
            await asyncio.wait({self._sending})

    async def _send_gathered(self) -> None:
        while self._gathered:
            # What nobody waits for any more is not begun: a job that was abandoned would come after its cancellation.
            wanted = [call for call in self._gathered if not call[1].done()]
            batch, self._gathered = wanted[:MAX_JOINED], wanted[MAX_JOINED:]
            if not batch:
                return
            try:
                outcomes = await self._together([words for words, _ in batch])
            except UnavailableError as error:
                batch += self._gathered  # they would only wait as long once more
                self._gathered = []
                outcomes = [_same(error) for _ in batch]
            except Exception as error:  # noqa: BLE001 - each of those who wait raises it
                outcomes = [error] * len(batch)
            for (_, answer), outcome in zip(batch, outcomes, strict=True):
                if not answer.done():  # its caller may have gone
                    answer.set_result(outcome)

    async def _together(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers, errors among them. Raises UnavailableError."""
        words = [word for command in commands for word in (len(command), *command)]
        answers: list[Any] = await self.call("several", len(words), _packed(words))
        return answers

    async def look(self, job_id: str, inbox: str) -> tuple[list[bytes], bytes | None]:
        """Where a job stands, and its result if it has one; asks for a message to the inbox when it ends."""
        head = (1, self._prefix, "look", *self._common, job_id, inbox)
        async with self.calls:
            with reaching():
                for verb, script in (("EVALSHA", SCRIPT_SHA), ("EVAL", SCRIPT)):
                    async with self._client.pipeline(transaction=False) as pipeline:
                        pipeline.execute_command(verb, script, *head)
                        pipeline.get(self.key("result", job_id))
                        state, raw = await pipeline.execute(raise_on_error=False)
                    if isinstance(state, exceptions.NoScriptError):
                        continue
                    for answer in (state, raw):
                        if isinstance(answer, Exception):
                            raise answer
                    break
                return state, raw


def _packed(words: Sequence[bytes | str | int]) -> bytes:
    """As one string, each behind its length: redis-py takes its time for every argument of a call."""
    parts: list[bytes] = []
    for word in words:
        raw = word if isinstance(word, bytes) else str(word).encode()
        parts += (_LENGTH.pack(len(raw)), raw)
    return b"".join(parts)


def _same(error: UnavailableError) -> UnavailableError:
    """For another caller: a shared one would gather the frames of all."""
    again = UnavailableError(error.message, retry_after_s=error.retry_after_s)
    again.__cause__ = error.__cause__
    return again


def to_ms(seconds: float) -> int:
    """Seconds as the script counts them."""
    return round(seconds * 1000)
