"""The queue within one process and one event loop, for a front end and a worker that share it."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile

from service.queue.contract import (
    RECORD_BYTES,
    Admission,
    Clock,
    DeadLetter,
    Lease,
    QueueStats,
    Renewal,
    check_size,
)
from service.terms.errors import (
    FAULTS,
    AttemptsExhaustedError,
    CancelledError,
    ConflictError,
    ErrorCode,
    JobNotFoundError,
    NoRoomError,
    OverloadedError,
    ServiceError,
    TimedOutError,
)
from service.terms.jobs import FusionJob, FusionResult, JobStatus, JobView, Priority, WorkerInfo, new_job_id
from service.terms.settings import QueueSettings

MAX_GONE = 64  # jobs that are gone while a MemoryQueue still has their times in a heap, beside as many as there are


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """One job's life in a MemoryQueue. job loses its payloads once there is a result."""

    job: FusionJob
    waiting_since_s: float
    ttl_s: float
    idempotency_key: str | None
    attempts: int = 0
    token: str | None = None  # of the current lease; None while waiting and at the end
    lease_until_s: float = 0.0
    result: FusionResult | None = None
    finished_s: float | None = None
    waiters: set[asyncio.Future[None]] = field(default_factory=set)

    @property
    def status(self) -> JobStatus:
        if self.result is not None:
            return self.result.status
        return JobStatus.QUEUED if self.token is None else JobStatus.RUNNING


class MemoryQueue:
    """The contract within one process and one event loop. What it holds is gone when the process is."""

    def __init__(self, settings: QueueSettings, *, clock: Clock = time.time) -> None:
        self._settings = settings
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._waiting: dict[Priority, OrderedDict[str, _Entry]] = {priority: OrderedDict() for priority in Priority}
        self._leased: dict[str, _Entry] = {}
        self._finished: list[tuple[float, str]] = []  # heap of (kept until, id)
        self._deadlines: list[tuple[float, str]] = []  # heap
        self._keys: dict[str, tuple[str, str]] = {}  # idempotency key: (job id, fingerprint)
        self._dead: OrderedDict[str, DeadLetter] = OrderedDict()
        self._workers: dict[str, tuple[float, WorkerInfo]] = {}
        self._takers: set[asyncio.Future[None]] = set()
        self._size_bytes = 0
        self._num_tokens = 0
        self._is_open = True

    async def open(self) -> None:
        """Nothing to prepare."""

    async def close(self) -> None:
        """Wake up every waiting taker with nothing."""
        self._is_open = False
        _wake(self._takers)

    def give_up(self, error: ServiceError) -> None:
        """End every job that has no result with this error: the only worker that there can be is lost."""
        self._sweep()
        for entry in [entry for entry in self._entries.values() if entry.result is None]:
            self._end(entry, FusionResult.failed(entry.job.id, error))

    # front end

    async def submit(self, job: FusionJob, *, idempotency_key: str | None = None) -> Admission:
        """See JobQueue."""
        now = self._sweep()
        if idempotency_key is not None and (known := self._keys.get(idempotency_key)) is not None:
            if known[1] != job.fingerprint():
                raise ConflictError(
                    "this idempotency key was used for another request; use a fresh key for each request"
                )
            return Admission(known[0], is_new=False)
        if job.id in self._entries:  # the same submit, repeated by a caller that did not hear the answer
            return Admission(job.id, is_new=True)
        self._admit(job)
        entry = _Entry(
            job=job,
            waiting_since_s=now,
            ttl_s=self._settings.result_ttl_s if idempotency_key is None else self._settings.idempotency_ttl_s,
            idempotency_key=idempotency_key,
        )
        self._entries[job.id] = entry
        self._size_bytes += job.size_bytes
        if idempotency_key is not None:
            self._keys[idempotency_key] = (job.id, job.fingerprint())
        if job.deadline_s is not None:
            heapq.heappush(self._deadlines, (job.deadline_s, job.id))
        self._waiting[job.priority][job.id] = entry
        _wake(self._takers)
        return Admission(job.id, is_new=True)

    async def wait_result(self, job_id: str, *, timeout_s: float) -> FusionResult | None:
        """See JobQueue."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while True:
            now = self._sweep()
            entry = self._entry(job_id)
            if entry.result is not None:
                result = entry.result
                if not entry.job.keep_result:
                    self._drop(job_id)
                return result
            remaining_s = end - loop.time()
            if remaining_s <= 0:
                return None
            if entry.job.deadline_s is not None:  # nobody else may be there to notice that it has passed
                remaining_s = min(remaining_s, max(entry.job.deadline_s - now, 0) + 0.001)
            await _wait_in(entry.waiters, remaining_s)

    async def cancel(self, job_id: str) -> JobView:
        """See JobQueue."""
        self._sweep()
        entry = self._entry(job_id)
        if entry.result is None:
            self._end(entry, FusionResult.failed(job_id, CancelledError("the job was cancelled by its caller")))
        return self._view(entry)

    async def view(self, job_id: str) -> JobView:
        """See JobQueue."""
        self._sweep()
        return self._view(self._entry(job_id))

    async def stats(self) -> QueueStats:
        """See JobQueue."""
        now = self._sweep()
        heads = [next(iter(waiting.values())).waiting_since_s for waiting in self._waiting.values() if waiting]
        return QueueStats(
            depth={priority: len(waiting) for priority, waiting in self._waiting.items()},
            num_leased=len(self._leased),
            size_bytes=self._size_bytes,
            oldest_age_s=max(0.0, now - min(heads)) if heads else 0.0,
            num_dead_letters=len(self._dead),
        )

    async def workers(self) -> list[WorkerInfo]:
        """See JobQueue."""
        now = self._clock()
        self._workers = {name: known for name, known in self._workers.items() if known[0] > now}
        return [info for _, (_, info) in sorted(self._workers.items())]

    # worker

    async def announce(self, worker: WorkerInfo, *, ttl_s: float) -> None:
        """See JobQueue."""
        self._workers[worker.id] = (self._clock() + ttl_s, worker)

    async def take(self, worker_id: str, *, max_jobs: int, wait_s: float) -> list[Lease]:
        """See JobQueue."""
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        while True:
            now = self._sweep()
            leases = [self._lease(entry, worker_id, now) for entry in self._choose(max_jobs, now)]
            remaining_s = end - loop.time()
            if leases or remaining_s <= 0 or not self._is_open:
                return leases
            if self._leased:  # a lost worker's jobs come back at this time
                expiry_s = min(entry.lease_until_s for entry in self._leased.values())
                remaining_s = min(remaining_s, max(expiry_s - now, 0) + 0.001)
            await _wait_in(self._takers, remaining_s)

    async def renew(self, leases: Sequence[Lease]) -> Renewal:
        """See JobQueue."""
        now = self._sweep()
        lost = set()
        for lease in leases:
            entry = self._leased.get(lease.job.id)
            if entry is not None and entry.token == lease.token:
                entry.lease_until_s = now + self._settings.lease_s
            else:
                lost.add(lease.job.id)
        cancelled = self.cancelled(lost)
        return Renewal(lost=frozenset(lost) - cancelled, cancelled=cancelled)

    def cancelled(self, job_ids: Iterable[str]) -> frozenset[str]:
        """See JobQueue."""
        self._sweep()
        known = ((job_id, self._entries.get(job_id)) for job_id in job_ids)
        return frozenset(job_id for job_id, entry in known if entry is None or entry.result is not None)

    async def finish(self, lease: Lease, result: FusionResult) -> bool:
        """See JobQueue."""
        self._sweep()
        entry = self._entries.get(lease.job.id)
        if entry is None or entry.result is not None:
            return False
        self._end(entry, result)
        return True

    async def release(self, leases: Sequence[Lease], *, was_tried: bool = False) -> None:
        """See JobQueue."""
        for lease in reversed(leases):  # each goes to the front, so the first of them ends up first
            entry = self._leased.get(lease.job.id)
            if entry is None or entry.token != lease.token:
                continue
            if was_tried:
                self._lose(entry)
            else:
                entry.attempts -= 1
                self._put_back(entry)

    # operator

    async def dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        """See JobQueue."""
        return list(self._dead.values())[:limit]

    async def retry_dead_letter(self, job_id: str) -> Admission:
        """See JobQueue."""
        letter = self._dead_letter(job_id)
        again = replace(letter.job, id=new_job_id(), created_s=self._clock(), deadline_s=None, keep_result=True)
        admission = await self.submit(again)
        if job_id in self._dead:  # admission may have pushed it out to make room
            await self.drop_dead_letter(job_id)
        return admission

    async def drop_dead_letter(self, job_id: str) -> None:
        """See JobQueue."""
        self._size_bytes -= self._dead_letter(job_id).job.size_bytes
        del self._dead[job_id]

    # the parts

    def _sweep(self) -> float:
        """Bring the state up to the present: deadlines, lost leases, results nobody fetched. Returns the time."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            job_id = heapq.heappop(self._deadlines)[1]
            if self._is_unfinished(job_id):
                entry = self._entries[job_id]
                waited_s = now - entry.job.created_s
                late = TimedOutError(f"the job's deadline passed after {waited_s:.1f} s, before there was a result")
                self._end(entry, FusionResult.failed(job_id, late))
        for entry in [entry for entry in self._leased.values() if entry.lease_until_s <= now]:
            self._lose(entry)
        while self._finished and self._finished[0][0] <= now:
            self._drop(heapq.heappop(self._finished)[1])
        # Most jobs are gone long before their deadline and their result's time; their entries must not wait for those.
        if len(self._finished) > 2 * len(self._entries) + MAX_GONE:
            self._finished = [(end_s, job_id) for end_s, job_id in self._finished if job_id in self._entries]
            heapq.heapify(self._finished)
        if len(self._deadlines) > 2 * self._num_unfinished + MAX_GONE:
            self._deadlines = [(end_s, job_id) for end_s, job_id in self._deadlines if self._is_unfinished(job_id)]
            heapq.heapify(self._deadlines)
        return now

    @property
    def _num_unfinished(self) -> int:
        return sum(map(len, self._waiting.values())) + len(self._leased)

    def _is_unfinished(self, job_id: str) -> bool:
        entry = self._entries.get(job_id)
        return entry is not None and entry.result is None

    def _admit(self, job: FusionJob) -> None:
        limits = self._settings
        check_size(job, limits)
        if (num_unfinished := self._num_unfinished) >= limits.max_jobs:
            raise OverloadedError(
                f"the queue is full ({num_unfinished} jobs); try again later", retry_after_s=limits.retry_after_s
            )
        while self._dead and self._size_bytes + job.size_bytes > limits.max_bytes:  # new work comes before old failures
            self._size_bytes -= self._dead.popitem(last=False)[1].job.size_bytes
        if self._size_bytes + job.size_bytes > limits.max_bytes:
            raise NoRoomError(
                f"the queue is full ({self._size_bytes} bytes); try again later", retry_after_s=limits.retry_after_s
            )

    def _choose(self, max_jobs: int, now: float) -> list[_Entry]:
        starved_before = now - self._settings.starvation_s
        classes = [
            takewhile(lambda entry: entry.waiting_since_s <= starved_before, waiting.values())
            for waiting in self._waiting.values()
        ]
        starved = islice(heapq.merge(*classes, key=lambda entry: entry.waiting_since_s), max_jobs)
        chosen = {entry.job.id: entry for entry in starved}
        for waiting in self._waiting.values():
            for job_id, entry in waiting.items():
                if len(chosen) >= max_jobs:
                    break
                chosen.setdefault(job_id, entry)
        return list(chosen.values())

    def _lease(self, entry: _Entry, worker_id: str, now: float) -> Lease:
        del self._waiting[entry.job.priority][entry.job.id]
        self._leased[entry.job.id] = entry
        self._num_tokens += 1
        entry.token = str(self._num_tokens)
        entry.attempts += 1
        entry.lease_until_s = now + self._settings.lease_s
        return Lease(job=entry.job, worker_id=worker_id, attempt=entry.attempts, token=entry.token)

    def _lose(self, entry: _Entry) -> None:
        if entry.attempts >= self._settings.max_attempts:
            lost = AttemptsExhaustedError(f"the job was given up after {entry.attempts} workers were lost with it")
            self._end(entry, FusionResult.failed(entry.job.id, lost))
        else:
            self._put_back(entry)

    def _put_back(self, entry: _Entry) -> None:
        del self._leased[entry.job.id]
        entry.token = None
        waiting = self._waiting[entry.job.priority]
        waiting[entry.job.id] = entry
        waiting.move_to_end(entry.job.id, last=False)
        _wake(self._takers)

    def _end(self, entry: _Entry, result: FusionResult) -> None:
        job = entry.job
        self._waiting[job.priority].pop(job.id, None)
        self._leased.pop(job.id, None)
        entry.result = result
        entry.finished_s = self._clock()
        entry.token = None
        self._size_bytes += RECORD_BYTES + result.size_bytes - job.size_bytes
        entry.job = replace(job, vis=b"", ir=b"", means=None, history=None)  # the payloads are not needed any more
        heapq.heappush(self._finished, (entry.finished_s + entry.ttl_s, job.id))
        if result.error_code in FAULTS:
            self._bury(job, result, entry)
        _wake(entry.waiters)

    def _bury(self, job: FusionJob, result: FusionResult, entry: _Entry) -> None:
        self._dead[job.id] = DeadLetter(
            job=job,
            error_code=result.error_code or ErrorCode.INTERNAL,
            error_message=result.error_message,
            attempts=entry.attempts,
            failed_s=self._clock(),
        )
        self._size_bytes += job.size_bytes
        while len(self._dead) > self._settings.max_dead_letters:
            self._size_bytes -= self._dead.popitem(last=False)[1].job.size_bytes

    def _drop(self, job_id: str) -> None:
        entry = self._entries.pop(job_id, None)
        if entry is None:
            return  # was handed out already
        if entry.result is not None:
            self._size_bytes -= RECORD_BYTES + entry.result.size_bytes
        if entry.idempotency_key is not None:
            del self._keys[entry.idempotency_key]

    def _entry(self, job_id: str) -> _Entry:
        if (entry := self._entries.get(job_id)) is None:
            raise JobNotFoundError("no such job; results are kept for a limited time after a job has ended")
        return entry

    def _dead_letter(self, job_id: str) -> DeadLetter:
        if (letter := self._dead.get(job_id)) is None:
            raise JobNotFoundError("no such dead letter")
        return letter

    def _view(self, entry: _Entry) -> JobView:
        return JobView(
            id=entry.job.id,
            status=entry.status,
            created_s=entry.job.created_s,
            priority=entry.job.priority,
            attempts=entry.attempts,
            deadline_s=entry.job.deadline_s,
            finished_s=entry.finished_s,
            error_code=entry.result.error_code if entry.result else None,
            error_message=entry.result.error_message if entry.result else "",
        )


def _wake(waiters: set[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


async def _wait_in(waiters: set[asyncio.Future[None]], timeout_s: float) -> None:
    """Wait until woken through this set, or for timeout_s."""
    waiter = asyncio.get_running_loop().create_future()
    waiters.add(waiter)
    try:
        async with asyncio.timeout(timeout_s):
            await waiter
    except TimeoutError:
        return
    finally:
        waiters.discard(waiter)
