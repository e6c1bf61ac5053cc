"""The queue between front ends and workers: the contract (`JobQueue`).

Every implementation keeps it, and `tests/service/queue/contract.py` checks it:

- *Accepted is a promise.* Once `submit` has returned, the job ends with exactly one visible result: the first `finish`
  wins and later ones change nothing. Execution is at least once.
- *A take is a lease.* A worker that stops renewing for `lease_s` loses its jobs to the next taker, which counts as
  another attempt; after `max_attempts` the job is reported failed and becomes a dead letter. `release` hands a job back
  at once and takes its attempt back too, unless it was tried and took its worker down.
- *Order.* Higher classes first, first in first out within a class; a job of a lower class that has waited for
  `starvation_s` is taken before fresher ones of higher classes. Deadlines within a batch are the batcher's affair.
- *Nothing is done for nobody.* A job that is cancelled or past its deadline is not handed out any more, and its waiters
  are told; one that is being worked on shows up in `cancelled` and in the answer of `renew`.
- *Bounds.* `submit` refuses at once (OverloadedError) beyond `max_jobs` unfinished jobs or `max_bytes` of unfinished
  payloads and of kept results, each with RECORD_BYTES for its record (NoRoomError). A job that alone is larger than
  that can never fit (PayloadTooLargeError).
- *Pushed.* `wait_result` wakes up when the result is there; it never polls. If waiting breaks off, waiting again works.

Every method may raise UnavailableError while the queue cannot be reached; callers back off and repeat. All methods are
safe to repeat. Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from service.terms.errors import ErrorCode, PayloadTooLargeError
from service.terms.jobs import FusionJob, FusionResult, JobView, Priority, WorkerInfo
from service.terms.settings import QueueSettings

Clock = Callable[[], float]

RECORD_BYTES = 2048  # what counts of a job that has ended, besides its pictures, until it is forgotten


@dataclass(frozen=True, slots=True)
class Admission:
    """What became of a submit. is_new is False when the idempotency key led to an earlier job, whose id this is."""

    job_id: str
    is_new: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """One delivery of a job to a worker. attempt counts from 1; token belongs to the queue (a stream entry's id)."""

    job: FusionJob
    worker_id: str
    attempt: int
    token: str


@dataclass(frozen=True, slots=True)
class Renewal:
    """Which of the renewed jobs are not worth going on with: taken over by another worker, or wanted by nobody."""

    lost: frozenset[str]
    cancelled: frozenset[str]


@dataclass(frozen=True, slots=True)
class QueueStats:
    """A snapshot. depth: waiting jobs by class; num_leased: jobs at workers; size_bytes: what counts for max_bytes.

    oldest_age_s: how long the oldest waiting job has waited, 0 if there is none. folder_bytes: of files in the shared
    folder, as this process last saw it; 0 if there is none.
    """

    depth: dict[Priority, int]
    num_leased: int
    size_bytes: int
    oldest_age_s: float
    num_dead_letters: int
    folder_bytes: int = 0

    @property
    def num_unfinished(self) -> int:
        """Jobs that were accepted and have no result yet."""
        return sum(self.depth.values()) + self.num_leased


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A job that failed through no fault of its request, kept for an operator. failed_s: Unix seconds."""

    job: FusionJob
    error_code: ErrorCode
    error_message: str
    attempts: int
    failed_s: float


def check_size(job: FusionJob, settings: QueueSettings) -> None:
    """Raises PayloadTooLargeError for a job that no queue of these settings can ever hold."""
    if job.size_bytes > settings.max_bytes:
        raise PayloadTooLargeError(
            f"the job has {job.size_bytes} bytes; this server's queue accepts at most {settings.max_bytes}"
        )


class JobQueue(Protocol):
    """See the module's text for the promises that these methods keep together."""

    async def open(self) -> None:
        """Connect, and prepare what must exist. Called once before anything else."""

    async def close(self) -> None:
        """Let go of connections. Jobs stay where they are if the queue outlives the process."""

    # front end

    async def submit(self, job: FusionJob, *, idempotency_key: str | None = None) -> Admission:
        """Accept a job, or find the earlier one of the same key.

        Raises OverloadedError when full, PayloadTooLargeError for a job that would not fit an empty queue either,
        ConflictError when the key was used for another request (`job.fingerprint`).
        """

    async def wait_result(self, job_id: str, *, timeout_s: float) -> FusionResult | None:
        """The result as soon as there is one, or None after timeout_s (0: look once).

        A job past its deadline has a TIMED_OUT result, a cancelled one CANCELLED. The result of a job without
        keep_result may be gone after it has been handed out once. Raises JobNotFoundError.
        """

    async def cancel(self, job_id: str) -> JobView:
        """Give the job a CANCELLED result unless it has one already; waiters wake up. Raises JobNotFoundError."""

    async def view(self, job_id: str) -> JobView:
        """Where the job stands. Raises JobNotFoundError."""

    async def stats(self) -> QueueStats:
        """A snapshot for metrics, admission estimates and draining."""

    async def workers(self) -> list[WorkerInfo]:
        """Workers whose last `announce` has not run out, by id."""

    # worker

    async def announce(self, worker: WorkerInfo, *, ttl_s: float) -> None:
        """Say that this worker is there, for the next ttl_s seconds. ttl_s=0 takes it back."""

    async def take(self, worker_id: str, *, max_jobs: int, wait_s: float) -> list[Lease]:
        """Up to max_jobs jobs, as soon as there is at least one; empty after wait_s (0: look once)."""

    async def renew(self, leases: Sequence[Lease]) -> Renewal:
        """Keep these leases for another lease_s; say which are pointless. Lost ones are not taken back."""

    def cancelled(self, job_ids: Iterable[str]) -> frozenset[str]:
        """Which of these held jobs are known here and now to be cancelled or expired: local, immediate, best effort."""

    async def finish(self, lease: Lease, result: FusionResult) -> bool:
        """Make this the job's result, unless it has one; True if it is now the visible one.

        A result with an error of FAULTS becomes a dead letter as well.
        """

    async def release(self, leases: Sequence[Lease], *, was_tried: bool = False) -> None:
        """Hand jobs back, to be taken by anyone at once. The attempt does not count unless was_tried.

        was_tried: as if the worker had been lost with them, so that `max_attempts` holds, only sooner.
        """

    # operator

    async def dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        """Dead letters, oldest first."""

    async def retry_dead_letter(self, job_id: str) -> Admission:
        """Submit its job again, as a new one without a deadline. Raises JobNotFoundError, OverloadedError."""

    async def drop_dead_letter(self, job_id: str) -> None:
        """Forget a dead letter. Raises JobNotFoundError."""
