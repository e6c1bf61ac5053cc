"""The contract on Redis Streams: any number of front ends and workers, on any number of hosts, around one Redis."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from redis import exceptions

from service.queue.contract import (
    Admission,
    Clock,
    DeadLetter,
    Lease,
    QueueStats,
    Renewal,
    check_size,
)
from service.queue.redis.address import PREFIX, RedisAddress
from service.queue.redis.answers import (
    PAYLOADS,
    Row,
    ended_without_record,
    letter_of,
    no_such_job,
    pairs_of,
    payloads_of,
    row_of,
    rows_of,
    view_of,
)
from service.queue.redis.availability import check_server, reaching
from service.queue.redis.beside import Beside
from service.queue.redis.folder import MIN_BYTES, FolderFullError, FrameBrokenError, FrameGoneError
from service.queue.redis.holdings import Holdings
from service.queue.redis.inbox import Inbox, Told
from service.queue.redis.transitions import GROUP, Transitions, to_ms
from service.terms.errors import (
    FAULTS,
    INTERNAL_MESSAGE,
    ConflictError,
    InternalError,
    JobNotFoundError,
    MalformedRequestError,
    NoRoomError,
    OverloadedError,
    UnavailableError,
)
from service.terms.jobs import FusionJob, FusionResult, JobStatus, JobView, Priority, WorkerInfo, new_job_id
from service.terms.settings import QueueSettings

logger = logging.getLogger(__name__)

BLOCK_S = 1.0  # longest wait in one XREADGROUP, and so the delay with which a lost lease is noticed
LOOK_AGAIN_S = 15.0  # safety net under the pushed messages
FORGET_AFTER_S = 0.1  # results that were handed out are forgotten together, this much later
MARGIN_S = 3600.0  # images outlive their job's deadline by this much
NO_DEADLINE_S = 30 * 86400.0  # images of a job without a deadline stay for this long
PENDING_RESULT_S = 60.0
SHORT_BYTES = 4096  # results up to here are an argument of the script, and travel with the message that they are there


class RedisQueue:
    """The contract of `service.queue.contract` on Redis. One object may serve as front end, worker, or both.

    One `take` at a time for a worker id, and a worker id belongs to one process at a time: a process that starts under
    the id of a dead one receives at once what that one held.
    """

    def __init__(
        self,
        settings: QueueSettings,
        *,
        prefix: str = PREFIX,
        clock: Clock = time.time,
        min_file_bytes: int = MIN_BYTES,
    ) -> None:
        self._settings = settings
        self._clock = clock
        # redis-py types an answer as all that any protocol and version might give; what is true here, the tests show.
        self._client: Any = RedisAddress.parse(settings.url).connect()
        self._transitions = Transitions(self._client, prefix, settings)
        self._key = self._transitions.key
        self._block_s = min(BLOCK_S, settings.lease_s / 4)
        self._streams = {self._key("jobs", priority): priority for priority in Priority}
        self._holdings = Holdings(settings.lease_s)
        self._inbox = Inbox(self._client, f"{self._key('inbox', secrets.token_urlsafe(9))}+", self._holdings.end)
        self._beside = Beside(settings.shared_folder, self._client, self._key, min_bytes=min_file_bytes)
        # By worker id: 0 before its first take, 1 if an answer to one may have been lost, None if there is no doubt.
        self._doubts: dict[str, int | None] = {}
        self._drained_s: dict[str, float] = {}  # by worker id: loop's time of a look that left nothing
        self._to_forget: list[tuple[str, str]] = []  # jobs, and the files of their answers
        self._forgetting: asyncio.Task[None] | None = None
        self._is_open = False

    async def open(self) -> None:
        """See JobQueue. Succeeds while Redis is away: then calls fail until it is there.

        Raises SettingsError if Redis is there but too old, or refuses the credentials, or if the shared folder cannot
        be used or is not that of the others.
        """
        self._beside.open()
        try:
            await check_server(self._client)
            await self._beside.check()
        except UnavailableError as error:
            logger.warning("queue cannot be reached yet", extra={"error": str(error.__cause__)})
        self._is_open = True
        self._inbox.open()

    async def close(self) -> None:
        """See JobQueue."""
        self._is_open = False
        await self._inbox.close()
        if self._forgetting is not None:
            await self._forgetting
        await self._transitions.close()
        await self._beside.close()
        sentinel = getattr(self._client.connection_pool, "sentinel_manager", None)
        for client in (self._client, *(sentinel.sentinels if sentinel is not None else ())):
            await client.aclose()

    # front end

    async def submit(self, job: FusionJob, *, idempotency_key: str | None = None) -> Admission:
        """See JobQueue."""
        limits, now = self._settings, self._clock()
        check_size(job, limits)
        idem, fingerprint, ttl_s = "", "", limits.result_ttl_s
        if idempotency_key is not None:
            idem = hashlib.blake2b(idempotency_key.encode(), digest_size=16).hexdigest()
            fingerprint = await asyncio.to_thread(job.fingerprint)
            ttl_s = limits.idempotency_ttl_s
        payload_ttl_ms = to_ms(NO_DEADLINE_S if job.deadline_s is None else max(job.deadline_s - now, 0) + MARGIN_S)
        payload = self._key("payload", job.id)
        is_awaited = not job.keep_result  # its caller waits on this very object
        if is_awaited:
            self._inbox.expect(job)
        is_accepted = False
        try:
            await self._beside.agree()
            beside = await self._beside.put_job(job)
            stored = [item for named in zip(PAYLOADS, job.payloads, strict=False) for item in named]
            writes = [("HSET", payload, *stored), ("PEXPIRE", payload, payload_ttl_ms)]
            outcome, detail = await self._transitions.transact(
                [] if beside else writes,
                "submit",
                job.id,
                job.priority.value,
                job.header_bytes(),
                repr(job.created_s),
                "" if job.deadline_s is None else to_ms(job.deadline_s),
                job.size_bytes,
                to_ms(ttl_s),
                payload_ttl_ms,
                int(job.keep_result),
                idem,
                fingerprint,
                limits.max_jobs,
                limits.max_bytes,
                self._inbox.channel if is_awaited else "",
                beside,
            )
            is_accepted = outcome == b"accepted"
        except FolderFullError as error:
            raise NoRoomError(
                "the queue's folder is full; try again later", retry_after_s=limits.retry_after_s
            ) from error
        except UnavailableError as error:
            self._beside.doubt_job(job)
            if not isinstance(error.__cause__, exceptions.OutOfMemoryError):
                raise
            raise NoRoomError(
                "the queue's memory is full; try again later", retry_after_s=limits.retry_after_s
            ) from error
        finally:
            if is_awaited and not is_accepted:
                self._inbox.stop_expecting(job.id)
        if not is_accepted:
            self._beside.let_go_job(job)
        if outcome == b"full":
            kind = NoRoomError if detail.endswith(b" bytes") else OverloadedError
            raise kind(f"the queue is full ({detail.decode()}); try again later", retry_after_s=limits.retry_after_s)
        if outcome == b"conflict":
            raise ConflictError("this idempotency key was used for another request; use a fresh key for each request")
        return Admission(detail.decode(), is_new=is_accepted)

    async def wait_result(self, job_id: str, *, timeout_s: float) -> FusionResult | None:
        """See JobQueue."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while True:
            with self._inbox.waiting(job_id) as (waiter, expected):
                remaining_s = end - loop.time()
                if expected is not None and remaining_s > 0:
                    deadline_s = expected.deadline_s  # `submit` has asked for the message: nothing to look for yet
                else:
                    inbox = self._inbox.channel if remaining_s > 0 else ""
                    state, raw = await self._transitions.look(job_id, inbox)
                    if state[0] == b"ended":
                        is_kept = state[3] != b"0"
                        if raw is None:
                            return self._handed_out(ended_without_record(job_id, state), "", is_kept=is_kept)
                        return await self._read_out(Told(is_kept, raw))
                    if state[0] == b"unknown":
                        raise no_such_job()
                    if remaining_s <= 0:
                        return None
                    deadline_s = int(state[1]) / 1000 if state[1] else None
                wait_s = min(remaining_s, LOOK_AGAIN_S)
                if deadline_s is not None:  # nobody else may be there to notice that it has passed
                    wait_s = min(wait_s, max(deadline_s - self._clock(), 0) + 0.01)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await waiter
                if waiter.done() and not waiter.cancelled() and waiter.result().record is not None:
                    return await self._read_out(waiter.result())

    async def cancel(self, job_id: str) -> JobView:
        """See JobQueue."""
        answer = await self._transitions.call("cancel", job_id, "the job was cancelled by its caller")
        view = view_of(job_id, answer)
        if view.status is JobStatus.CANCELLED:
            self._beside.remove_job(job_id)
        return view

    async def view(self, job_id: str) -> JobView:
        """See JobQueue."""
        return view_of(job_id, await self._transitions.call("view", job_id))

    async def stats(self) -> QueueStats:
        """See JobQueue."""
        high, normal, low, num_leased, size_bytes, age_ms, num_dead = await self._transitions.call("stats")
        return QueueStats(
            depth=dict(zip(Priority, (high, normal, low), strict=True)),
            num_leased=num_leased,
            size_bytes=size_bytes,
            oldest_age_s=age_ms / 1000,
            num_dead_letters=num_dead,
            folder_bytes=self._beside.size_bytes,
        )

    async def workers(self) -> list[WorkerInfo]:
        """See JobQueue."""
        infos = [WorkerInfo.model_validate_json(raw) for raw in await self._transitions.call("workers")]
        return sorted(infos, key=lambda info: info.id)

    # worker

    async def announce(self, worker: WorkerInfo, *, ttl_s: float) -> None:
        """See JobQueue."""
        await self._transitions.call("announce", worker.id, worker.model_dump_json(), to_ms(ttl_s))

    async def take(self, worker_id: str, *, max_jobs: int, wait_s: float) -> list[Lease]:
        """See JobQueue."""
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        await self._inbox.listen_to(self._key("worker", worker_id))
        await self._beside.agree()
        if (doubt := self._doubts.get(worker_id, 0)) is not None:
            self._doubts[worker_id] = 1
            tokens = self._holdings.tokens_of(worker_id)
            rows = rows_of(await self._transitions.call("recover", worker_id, doubt, *tokens))
            if leases := await self._leases(worker_id, rows, max_jobs):
                return leases
        while True:
            self._doubts[worker_id] = 1  # until the answer is here
            remaining_s = end - loop.time()
            is_last = remaining_s <= 0 or not self._is_open
            rows = []
            if is_last or not self._is_drained(worker_id):
                rows = await self._look_for(worker_id, max_jobs)
            if not rows and not is_last:
                rows = await self._block(worker_id, min(remaining_s, self._block_s))
            leases = await self._leases(worker_id, rows, max_jobs)
            self._doubts[worker_id] = None
            if leases or is_last:
                return leases

    async def renew(self, leases: Sequence[Lease]) -> Renewal:
        """See JobQueue."""
        states: dict[str, bytes] = {}
        for worker_id in {lease.worker_id for lease in leases}:
            own = [lease for lease in leases if lease.worker_id == worker_id]
            arguments = [part for lease in own for part in (*lease.token.split("/"), lease.attempt, lease.job.id)]
            answer = await self._transitions.call("renew", worker_id, *arguments)
            states.update(zip((lease.job.id for lease in own), answer, strict=True))
        self._holdings.renew(states, time.monotonic())
        return Renewal(
            lost=frozenset(job_id for job_id, state in states.items() if state == b"lost"),
            cancelled=frozenset(job_id for job_id, state in states.items() if state == b"ended"),
        )

    def cancelled(self, job_ids: Iterable[str]) -> frozenset[str]:
        """See JobQueue."""
        return self._holdings.pointless(job_ids, self._clock())

    async def finish(self, lease: Lease, result: FusionResult) -> bool:
        """See JobQueue."""
        buries = result.error_code in FAULTS
        is_visible = await self._finish(lease.job.id, lease.worker_id, result, buries=buries)
        self._holdings.let_go(lease.job.id)
        if is_visible and not buries:
            self._beside.let_go_job(lease.job)
        return is_visible

    async def release(self, leases: Sequence[Lease], *, was_tried: bool = False) -> None:
        """See JobQueue."""
        for worker_id in {lease.worker_id for lease in leases}:
            own = [lease for lease in leases if lease.worker_id == worker_id]
            arguments = [part for lease in own for part in (*lease.token.split("/"), lease.attempt)]
            await self._transitions.call("release", worker_id, int(was_tried), *arguments)
            for lease in own:
                self._holdings.let_go(lease.job.id)

    # operator

    async def dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        """See JobQueue."""
        with reaching():
            entries = await self._client.xrange(self._key("dead"), count=limit)
        return [letter for _, fields in entries if (letter := await self._letter_of(fields)) is not None]

    async def retry_dead_letter(self, job_id: str) -> Admission:
        """See JobQueue."""
        entries = await self._transitions.call("dead_letter", job_id)
        letter = await self._letter_of(pairs_of(entries[0][1])) if entries else None
        if letter is None:
            raise JobNotFoundError("no such dead letter")
        again = replace(letter.job, id=new_job_id(), created_s=self._clock(), deadline_s=None, keep_result=True)
        admission = await self.submit(again)
        with contextlib.suppress(JobNotFoundError):  # admission may have pushed it out to make room
            await self.drop_dead_letter(job_id)
        return admission

    async def drop_dead_letter(self, job_id: str) -> None:
        """See JobQueue."""
        if not await self._transitions.call("drop_dead_letter", job_id):
            raise JobNotFoundError("no such dead letter")
        self._beside.remove_job(job_id)

    # taking

    def _is_drained(self, worker_id: str) -> bool:
        """Whether the look before left nothing, a moment ago; asked once, because what `_block` brings is not all."""
        drained_s = self._drained_s.pop(worker_id, -math.inf)
        return asyncio.get_running_loop().time() - drained_s < self._block_s

    async def _look_for(self, worker_id: str, max_jobs: int) -> list[Row]:
        self._drained_s.pop(worker_id, None)
        starvation_ms = to_ms(self._settings.starvation_s)
        rows = rows_of(await self._transitions.call("take", worker_id, max_jobs, starvation_ms))
        if 0 < len(rows) < max_jobs:
            self._drained_s[worker_id] = asyncio.get_running_loop().time()
        return rows

    async def _block(self, worker_id: str, wait_s: float) -> list[Row]:
        """Wait for a fresh entry; while workers wait, one entry wakes one of them."""
        wake = self._key("wake")
        streams: dict[Any, Any] = dict.fromkeys((*self._streams, wake), ">")
        with reaching():
            found = await self._client.xreadgroup(GROUP, worker_id, streams, count=1, block=max(1, to_ms(wait_s)))
            rows = []
            for stream, entries in found or ():
                if stream.decode() != wake:
                    priority = self._streams[stream.decode()]
                    rows += [row_of(priority.value, entry.decode(), 1, fields) for entry, fields in entries]
                    continue
                async with self._client.pipeline(transaction=True) as transaction:  # it has done its work
                    ids = [entry for entry, _ in entries]
                    transaction.xack(wake, GROUP, *ids)
                    transaction.xdel(wake, *ids)
                    await transaction.execute()
        return rows

    async def _leases(self, worker_id: str, rows: Sequence[Row], max_jobs: int) -> list[Lease]:
        """The jobs of these entries with their images; what is too much goes back."""
        if not rows:
            return []
        # Known before their images are here, so that a cancellation that comes meanwhile is not missed.
        self._holdings.hold(worker_id, rows, time.monotonic())
        try:
            leases = await self._with_images(worker_id, rows)
            if len(leases) > max_jobs:  # several classes had an entry at the same moment
                await self.release(leases[max_jobs:])
        except BaseException:
            for row in rows:
                self._holdings.let_go(row.job_id)  # else `recover` would pass them over
            raise
        return leases[:max_jobs]

    async def _with_images(self, worker_id: str, rows: Sequence[Row]) -> list[Lease]:
        stored = [row for row in rows if not row.beside]
        payloads: dict[str, list[bytes | None]] = {}
        if stored:
            async with self._transitions.calls:
                with reaching():
                    async with self._client.pipeline(transaction=False) as pipeline:
                        for row in stored:
                            pipeline.hmget(self._key("payload", row.job_id), *PAYLOADS)
                        found = await pipeline.execute()
            payloads = dict(zip((row.job_id for row in stored), found, strict=True))
        leases = []
        for row in rows:
            try:
                if row.beside:
                    job = await self._beside.job(row.header, row.job_id, row.beside)
                else:
                    job = FusionJob.from_parts(row.header, *payloads_of(payloads[row.job_id]))
            except (MalformedRequestError, FrameGoneError) as error:
                # Usually it was cancelled a moment ago, and then this changes nothing.
                logger.warning("job cannot be read", extra={"job_id": row.job_id, "error": str(error)})
                lost = isinstance(error, FrameGoneError)
                told = InternalError("the images of this job were lost; send them again" if lost else INTERNAL_MESSAGE)
                broken = FusionResult.failed(row.job_id, told)
                await self._finish(row.job_id, worker_id, broken, buries=False)
                self._holdings.let_go(row.job_id)
                continue
            leases.append(Lease(job=job, worker_id=worker_id, attempt=row.attempt, token=row.token))
            self._holdings.learn_deadline(job.id, job.deadline_s)
        return leases

    async def _finish(self, job_id: str, worker_id: str, result: FusionResult, *, buries: bool) -> bool:
        error = result.error_code.value if result.error_code else ""
        ending = ("finish", job_id, worker_id, error, result.error_message, result.size_bytes, int(buries))
        name = ""
        if (written := await self._beside.put_answer(result)) is not None:
            name, record = written
        elif result.size_bytes <= SHORT_BYTES:
            record = result.to_bytes()
        else:
            token = secrets.token_urlsafe(9)
            pending = ("SET", self._key("pending-result", token), result.to_bytes(), "PX", to_ms(PENDING_RESULT_S))
            return bool(await self._transitions.transact([pending], *ending, token))
        is_visible = bool(await self._transitions.join(*ending, "", record))
        self._beside.told_answer(job_id)
        if not is_visible:
            self._beside.let_go_answers([name])
        return is_visible

    # results and dead letters

    async def _read_out(self, told: Told) -> FusionResult:
        """The result of a record. Raises JobNotFoundError if its file is gone."""
        try:
            result, name = await self._beside.answer(told.record or b"")
        except FrameGoneError as error:
            logger.warning("an answer cannot be read", extra={"error": str(error)})
            raise no_such_job() from error
        return self._handed_out(result, name, is_kept=told.is_kept)

    def _handed_out(self, result: FusionResult, name: str, *, is_kept: bool) -> FusionResult:
        if not is_kept:
            # Only now that it is here: an answer that is lost on its way can be fetched again.
            self._to_forget.append((result.job_id, name))
            if self._forgetting is None or self._forgetting.done():
                self._forgetting = asyncio.create_task(self._forget())
        return result

    async def _forget(self) -> None:
        await asyncio.sleep(FORGET_AFTER_S)
        while self._to_forget:
            batch, self._to_forget = self._to_forget, []
            try:
                await self._transitions.call("forget", *(job_id for job_id, _ in batch))
            except UnavailableError:
                return  # they are forgotten when their time has come
            self._beside.let_go_answers(name for _, name in batch)

    async def _letter_of(self, fields: dict[bytes, bytes]) -> DeadLetter | None:
        job_id, header = fields[b"id"].decode(), fields[b"header"]
        with reaching():
            beside, *payloads = await self._client.hmget(self._key("dead-payload", job_id), "beside", *PAYLOADS)
        try:
            if beside is not None:
                return letter_of(fields, await self._beside.job(header, job_id, int(beside)))
        except FrameBrokenError as error:  # it stays: its disk may do better another time
            logger.warning("a dead letter cannot be read", extra={"job_id": job_id, "error": str(error)})
            return None
        except FrameGoneError:
            if self._beside.is_shared:
                logger.warning("the images of a dead letter are gone, and so is it now", extra={"job_id": job_id})
                with contextlib.suppress(JobNotFoundError):
                    await self.drop_dead_letter(job_id)
            return None
        if None in payloads[:2]:
            return None  # dropped a moment ago
        return letter_of(fields, FusionJob.from_parts(header, *payloads_of(payloads)))
