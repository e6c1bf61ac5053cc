"""What the workers of this process have in their hands. Pure logic, the times are arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from service.queue.redis.answers import Row


@dataclass(slots=True)
class _Holding:
    """A job in the hands of a worker of this process. seen_s: monotonic time of its take or latest renewal."""

    worker_id: str
    token: str
    deadline_s: float | None
    seen_s: float
    is_gone: bool = False


class Holdings:
    """The jobs that were taken here and are neither finished nor handed back, by id."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._held: dict[str, _Holding] = {}

    def hold(self, worker_id: str, rows: Sequence[Row], now_s: float) -> None:
        """These were taken. now_s: monotonic."""
        self._held |= {row.job_id: _Holding(worker_id, row.token, None, now_s) for row in rows}

    def let_go(self, job_id: str) -> None:
        """It was finished or handed back, or is not worth anything."""
        self._held.pop(job_id, None)

    def learn_deadline(self, job_id: str, deadline_s: float | None) -> None:
        """Until when a result of a held job is wanted, in Unix seconds."""
        if (held := self._held.get(job_id)) is not None:
            held.deadline_s = deadline_s

    def end(self, job_id: str) -> None:
        """It has a result from elsewhere; one that is not held is none of ours."""
        if (held := self._held.get(job_id)) is not None:
            held.is_gone = True

    def renew(self, states: Mapping[str, bytes], now_s: float) -> None:
        """What the script answered to a renewal, by job. now_s: monotonic."""
        for job_id, state in states.items():
            if (held := self._held.get(job_id)) is None:
                continue
            if state == b"kept":
                held.seen_s = now_s
            elif state == b"ended":
                held.is_gone = True
            else:
                del self._held[job_id]
        self._drop_stale(now_s)

    def tokens_of(self, worker_id: str) -> list[str]:
        """The deliveries that a worker still has."""
        return [held.token for held in self._held.values() if held.worker_id == worker_id]

    def pointless(self, job_ids: Iterable[str], now_s: float) -> frozenset[str]:
        """Which of these are held, and have ended or are past their deadline. now_s: Unix seconds."""
        known = ((job_id, self._held.get(job_id)) for job_id in job_ids)
        return frozenset(
            job_id
            for job_id, held in known
            if held is not None and (held.is_gone or (held.deadline_s is not None and held.deadline_s <= now_s))
        )

    def _drop_stale(self, now_s: float) -> None:
        """Forget holdings that were neither finished nor renewed: dropped by their worker after a cancellation."""
        oldest_s = now_s - 2 * self._lease_s
        for job_id in [job_id for job_id, held in self._held.items() if held.seen_s < oldest_s]:
            del self._held[job_id]
