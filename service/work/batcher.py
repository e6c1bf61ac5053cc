"""Which waiting jobs share a forward pass: pure logic, the time is an argument.

What a newcomer would get wrong: waiting is for companions that are known to be on their way (`num_coming`), never for
hope. A lone job on an idle engine goes at once; while the engine is busy jobs gather by themselves. So `max_wait_s`
bounds a wait that only happens when it pays.

Order: a job counts as one class more urgent after every `starvation_s` that it waited; beyond the first class it is
served in order of arrival, before anything fresher, so no flood of urgent jobs holds it up for ever. Within a class the
earliest deadline goes first. The most urgent job chooses the bucket; its companions follow in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.terms.jobs import Priority

Item = TypeVar("Item")

MAX_LIMITS = 256


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """Bounds of a batch. sizes: batch sizes that the engine runs best, ascending; empty: any size up to max_batch."""

    max_batch: int
    max_wait_s: float
    starvation_s: float
    sizes: tuple[int, ...] = ()

    def padded(self, num_jobs: int) -> int:
        """The batch size to run for this many jobs: the next preferred size, or num_jobs itself."""
        return next((size for size in sorted(self.sizes) if num_jobs <= size <= self.max_batch), num_jobs)


@dataclass(frozen=True, slots=True)
class Waiting(Generic[Item]):
    """One job that is ready for the engine. Times in seconds.

    bucket: jobs of equal buckets may share a pass. frame: passes of equal frames need equal memory.
    """

    id: str
    item: Item
    bucket: Hashable
    priority: Priority
    arrived_s: float
    deadline_s: float = math.inf
    frame: Hashable = None


class Batcher(Generic[Item]):
    """Holds jobs that are ready, and says which of them to run next."""

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy = policy
        self._waiting: dict[str, Waiting[Item]] = {}
        self._limits: dict[Hashable, tuple[int, float]] = {}  # frame: jobs at most, until when

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, waiting: Waiting[Item]) -> None:
        """A job became ready."""
        self._waiting[waiting.id] = waiting

    def remove(self, job_id: str) -> Item | None:
        """Take a job out, for example because it was cancelled; None if it is not here."""
        waiting = self._waiting.pop(job_id, None)
        return None if waiting is None else waiting.item

    def limit(self, frame: Hashable, max_jobs: int, until_s: float) -> None:
        """Larger passes of such frames did not fit: make none until then, when there may be more room again."""
        self._limits.pop(frame, None)
        self._limits[frame] = (max(1, max_jobs), until_s)
        if len(self._limits) > MAX_LIMITS:
            del self._limits[next(iter(self._limits))]

    def max_batch(self, frame: Hashable, now_s: float) -> int:
        """Jobs of such frames in one pass at most."""
        max_jobs, until_s = self._limits.get(frame, (self.policy.max_batch, math.inf))
        return min(max_jobs, self.policy.max_batch) if now_s < until_s else self.policy.max_batch

    def drain(self) -> list[Item]:
        """Take everything out, in order of arrival."""
        items = [waiting.item for waiting in self._waiting.values()]
        self._waiting.clear()
        return items

    def remove_expired(self, now_s: float) -> list[Item]:
        """Take out the jobs that are past their deadline."""
        late = [waiting.id for waiting in self._waiting.values() if waiting.deadline_s <= now_s]
        return [self._waiting.pop(job_id).item for job_id in late]

    def next_batch(self, now_s: float, *, num_coming: int = 0, is_busy: bool = False) -> list[Item] | None:
        """The jobs to run on an engine that is idle now, most urgent first; None: nothing to run yet.

        num_coming: jobs that will be added soon (being decoded); without any, nothing waits. is_busy: the engine is
        not idle, so that only a full batch is worth bringing: others may still grow. Expired jobs never come out of
        here; `remove_expired` hands them over.
        """
        alive = [waiting for waiting in self._waiting.values() if waiting.deadline_s > now_s]
        if not alive:
            return None
        alive.sort(key=lambda waiting: self._urgency(waiting, now_s))
        bucket = alive[0].bucket
        max_batch = self.max_batch(alive[0].frame, now_s)
        batch = [waiting for waiting in alive if waiting.bucket == bucket][:max_batch]
        if len(batch) < max_batch and (is_busy or (num_coming and now_s < self._due_s(alive))):
            return None
        return [self._waiting.pop(waiting.id).item for waiting in batch]

    def due_s(self, now_s: float) -> float | None:
        """When next to ask `next_batch` even if nothing was added until then; None if nothing waits."""
        alive = [waiting for waiting in self._waiting.values() if waiting.deadline_s > now_s]
        return self._due_s(alive) if alive else None

    def _due_s(self, alive: list[Waiting[Item]]) -> float:
        # The longest-waiting job of all bounds the wait, whichever bucket is the most urgent one.
        return min(waiting.arrived_s for waiting in alive) + self.policy.max_wait_s

    def _urgency(self, waiting: Waiting[Item], now_s: float) -> tuple[float, float, float]:
        waited_s = now_s - waiting.arrived_s
        rank = waiting.priority.rank - math.floor(waited_s / self.policy.starvation_s)
        if rank < 0:
            return (-1.0, waiting.arrived_s, 0.0)
        return (float(rank), waiting.deadline_s, waiting.arrived_s)
