"""What Redis and the script answer, as values of the contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from service.queue.contract import DeadLetter
from service.terms.errors import ErrorCode, JobNotFoundError
from service.terms.jobs import FusionJob, FusionResult, JobStatus, JobView, Priority

PAYLOADS = ("vis", "ir", "history")  # fields of a payload's hash, as `FusionJob.payloads` has them


def payloads_of(values: Sequence[bytes | None]) -> list[bytes]:
    """What Redis has of `PAYLOADS`; few jobs have a history."""
    vis, ir, history = values
    return [vis or b"", ir or b"", *([] if history is None else [history])]


@dataclass(frozen=True, slots=True)
class Row:
    """One delivery, before its images are there. token: class and entry id, which stay the same until the end.

    beside: bytes of the images that lie in the shared folder; 0 if Redis has them.
    """

    token: str
    attempt: int
    job_id: str
    header: bytes
    beside: int = 0


def row_of(priority: str, entry: str, attempt: int, fields: dict[bytes, bytes]) -> Row:
    """An entry of a stream, delivered for the attempt-th time."""
    return Row(f"{priority}/{entry}", attempt, fields[b"id"].decode(), fields[b"header"], int(fields.get(b"beside", 0)))


def rows_of(answer: Iterable[Any]) -> list[Row]:
    """What `take` and `recover` deliver."""
    return [
        row_of(priority.decode(), entry.decode(), attempt, pairs_of(fields))
        for priority, entry, attempt, fields in answer
    ]


def pairs_of(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Names and values in turn, as a mapping."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def view_of(job_id: str, answer: Sequence[bytes]) -> JobView:
    """What `view` and `cancel` tell of a job. Raises JobNotFoundError."""
    if not answer:
        raise no_such_job()
    state, priority, code, message, attempts, created, deadline, finished = (part.decode() for part in answer)
    error = ErrorCode(code) if code else None
    ended = FusionResult(job_id=job_id, error_code=error).status
    return JobView(
        id=job_id,
        status=ended if state == "ended" else JobStatus(state),
        created_s=float(created),
        priority=Priority(priority),
        attempts=int(attempts),
        deadline_s=int(deadline) / 1000 if deadline else None,
        finished_s=int(finished) / 1000 if finished else None,
        error_code=error,
        error_message=message,
    )


def ended_without_record(job_id: str, state: Sequence[bytes]) -> FusionResult:
    """The result of a job that `look` calls ended, of which nothing else is kept. Raises JobNotFoundError."""
    _, code, message, _ = state
    if code:
        return FusionResult(job_id=job_id, error_code=ErrorCode(code.decode()), error_message=message.decode())
    raise no_such_job()


def letter_of(fields: dict[bytes, bytes], job: FusionJob) -> DeadLetter:
    """An entry of the stream of dead letters, with its job."""
    return DeadLetter(
        job=job,
        error_code=ErrorCode(fields[b"code"].decode()),
        error_message=fields[b"message"].decode(),
        attempts=int(fields[b"attempts"]),
        failed_s=int(fields[b"failed"]) / 1000,
    )


def no_such_job() -> JobNotFoundError:
    """For ids that lead nowhere."""
    return JobNotFoundError("no such job; results are kept for a limited time after a job has ended")
