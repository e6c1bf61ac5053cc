"""The queue's transitions: calling `transitions.lua`, and what it keeps where.

Every transition is one call of the script and therefore atomic; payloads and results travel in the same MULTI,
beside the script, so that they are never copied through Lua. Keys, all with the prefix `{recofuse}`:

    jobs:high|normal|low    streams, one group `workers`; an entry carries id, deadline, header, and lives until the end
    payload:ID              hash of vis and ir; TTL past the deadline; gone at the end
    job:ID                  hash: where the entry is, bytes, times, and at the end what became of it; no TTL, but swept
    result:ID               the result's bytes; TTL
    pending-result:TOKEN    a result on its way: renamed to result:ID, or dropped as a duplicate, in the same MULTI
    deadlines, finished     sorted sets of ids: when to give up, when to forget
    idem:HASH               idempotency key: first job's id and the request's fingerprint; TTL
    bytes                   what counts for max_bytes
    dead                    stream of dead letters, oldest first; dead-index: id to entry; dead-payload:ID
    workers, workers-until  what workers said about themselves, and until when that holds
    workers-gone            set of ids that are still to be forgotten as consumers
    wake                    stream that wakes blocked takers when a job is handed back
    inbox:TOKEN, worker:ID  pub/sub channels: ids of jobs that ended, to those who wait and those who work

What a newcomer would get wrong: *a job is in its stream exactly as long as it is unfinished*, so nothing is ever
trimmed, and the streams' lengths are the number of unfinished jobs. A lease is the group's pending entry: its idle time
is the silence of its worker (`renew` resets it with XCLAIM JUSTID), its delivery count the attempts.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from redis import exceptions

from service.queue.redis.availability import reaching
from service.terms.settings import QueueSettings

GROUP = "workers"
MAX_CALLS = 64  # at once, and thereby connections of one process, besides those that wait for jobs or messages

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
        """The writes and then a transition, all in one MULTI. Raises UnavailableError."""
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


def to_ms(seconds: float) -> int:
    """Seconds as the script counts them."""
    return round(seconds * 1000)
