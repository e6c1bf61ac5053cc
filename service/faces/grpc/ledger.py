"""What one stream of frames keeps count of: numbers, gaps, rates and ages. Pure logic, the time is an argument.

What a newcomer would get wrong: nothing here outlives its stream. A sender that resumes says itself which answer was
its last one (`resume_after`), so it may do so at any front end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from service.terms.errors import InvalidInputError

WINDOW_S = 5.0  # rates look back this far
MAX_EVENTS = 512  # and over no more events than these
MAX_AGES = 256


class Rate:
    """How often something happens, over the last `WINDOW_S` seconds and `MAX_EVENTS` events."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=MAX_EVENTS)

    def add(self, now_s: float) -> None:
        """It happened."""
        self._times_s.append(now_s)

    def per_s(self, now_s: float) -> float:
        """Events per second between the first and the last one in the window; 0 for fewer than two."""
        while self._times_s and self._times_s[0] < now_s - WINDOW_S:
            self._times_s.popleft()
        if len(self._times_s) < 2 or self._times_s[-1] <= self._times_s[0]:
            return 0.0
        return (len(self._times_s) - 1) / (self._times_s[-1] - self._times_s[0])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A `StreamLedger` at one moment; the meanings are those of StreamStats in fusion.proto."""

    received: int
    fused: int
    failed: int
    dropped: int
    missing: int
    skipped: int
    received_per_s: float
    fused_per_s: float
    age_p50_s: float
    age_p99_s: float


class StreamLedger:
    """The books of one stream. Times are seconds of one clock."""

    def __init__(self, resume_after: int | None = None) -> None:
        self._resume_after = resume_after
        self._last_came: int | None = None
        self._last_answered = resume_after
        self._received = self._fused = self._failed = self._dropped = self._missing = self._skipped = 0
        self._arrivals, self._fusions = Rate(), Rate()
        self._ages_s: deque[float] = deque(maxlen=MAX_AGES)

    @property
    def previous_sequence(self) -> int | None:
        """The number of the last answer, this stream's or the one that it resumes after; None before the first."""
        return self._last_answered

    @property
    def num_open(self) -> int:
        """Frames that came and are neither answered nor dropped."""
        return self._received - self._fused - self._failed - self._dropped

    def arrive(self, sequence: int, now_s: float) -> bool:
        """A frame came. False: its sender has the answer already. Raises InvalidInputError if it is out of order."""
        if self._last_came is not None and sequence <= self._last_came:
            raise InvalidInputError(
                f"sequence: {sequence} came after {self._last_came}; accepted are ascending numbers"
            )
        if self._resume_after is not None and sequence <= self._resume_after:
            self._last_came = sequence
            self._skipped += 1
            return False
        before = [number for number in (self._last_came, self._resume_after) if number is not None]
        if before:
            self._missing += sequence - max(before) - 1
        self._last_came = sequence
        self._received += 1
        self._arrivals.add(now_s)
        return True

    def drop(self) -> None:
        """A frame was replaced by a newer one."""
        self._dropped += 1

    def answer(self, sequence: int, *, is_fused: bool, age_s: float, now_s: float) -> None:
        """A frame is answered now, with pictures or with an error."""
        self._last_answered = sequence
        if is_fused:
            self._fused += 1
            self._fusions.add(now_s)
            self._ages_s.append(age_s)
        else:
            self._failed += 1

    def snapshot(self, now_s: float) -> Snapshot:
        """All of it."""
        ages_s = sorted(self._ages_s)
        return Snapshot(
            received=self._received,
            fused=self._fused,
            failed=self._failed,
            dropped=self._dropped,
            missing=self._missing,
            skipped=self._skipped,
            received_per_s=self._arrivals.per_s(now_s),
            fused_per_s=self._fusions.per_s(now_s),
            age_p50_s=quantile(ages_s, 0.5),
            age_p99_s=quantile(ages_s, 0.99),
        )


def quantile(ascending: list[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed; 0 if there are none."""
    if not ascending:
        return 0.0
    rank = -(-share * len(ascending) // 1)  # rounded up
    return ascending[min(len(ascending), max(1, int(rank))) - 1]
