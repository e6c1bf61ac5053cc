"""The batcher: one shape a batch, no needless wait, nobody starved. The clock is an argument."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from service.terms.jobs import Priority
from service.work.batcher import Batcher, BatchPolicy, Waiting

POLICY = BatchPolicy(max_batch=4, max_wait_s=0.01, starvation_s=5.0)

WAITING = st.builds(
    lambda number, bucket, priority, arrived_s, deadline_s: Waiting(
        str(number), number, bucket, priority, arrived_s, deadline_s
    ),
    number=st.integers(0, 10**9),
    bucket=st.sampled_from("abc"),
    priority=st.sampled_from(Priority),
    arrived_s=st.floats(0, 20),
    deadline_s=st.just(math.inf) | st.floats(0, 40),
)
CROWD = st.lists(WAITING, max_size=30, unique_by=lambda waiting: waiting.id)


def crowd(*jobs: Waiting[int], policy: BatchPolicy = POLICY) -> Batcher[int]:
    batcher: Batcher[int] = Batcher(policy)
    for job in jobs:
        batcher.add(job)
    return batcher


def job(
    number: int, *, bucket: str = "a", priority: Priority = Priority.NORMAL, at: float = 0.0, by: float = math.inf
) -> Waiting[int]:
    return Waiting(str(number), number, bucket, priority, at, by)


@settings(deadline=None, max_examples=150)
@given(CROWD, st.floats(0, 30))
def test_everything_alive_comes_out_once_in_batches_of_one_bucket(jobs: list[Waiting[int]], now_s: float) -> None:
    batcher = crowd(*jobs)
    buckets = {waiting.item: waiting.bucket for waiting in jobs}
    seen: list[int] = []
    while (batch := batcher.next_batch(now_s)) is not None:
        assert 1 <= len(batch) <= POLICY.max_batch
        assert len({buckets[item] for item in batch}) == 1
        seen += batch
    alive = [waiting.item for waiting in jobs if waiting.deadline_s > now_s]
    assert sorted(seen) == sorted(alive)
    assert sorted(batcher.remove_expired(now_s)) == sorted(set(buckets) - set(alive))
    assert len(batcher) == 0


@settings(deadline=None, max_examples=150)
@given(CROWD, st.floats(0, 30), st.integers(0, 5))
def test_nothing_waits_beyond_its_due_time_nor_without_company_coming(
    jobs: list[Waiting[int]], now_s: float, num_coming: int
) -> None:
    batcher = crowd(*jobs)
    due_s = batcher.due_s(now_s)
    batch = batcher.next_batch(now_s, num_coming=num_coming)
    if due_s is None:
        assert batch is None
    elif batch is None:
        assert num_coming > 0
        assert (
            now_s
            < due_s
            <= min(waiting.arrived_s for waiting in jobs if waiting.deadline_s > now_s) + POLICY.max_wait_s
        )


@settings(deadline=None, max_examples=100)
@given(CROWD, st.floats(20, 30))
def test_the_most_urgent_job_is_in_the_first_batch(jobs: list[Waiting[int]], now_s: float) -> None:
    fresh = [job for job in jobs if now_s - job.arrived_s < POLICY.starvation_s and job.deadline_s > now_s]
    if not fresh:
        return
    first = min(fresh, key=lambda job: (job.priority.rank, job.deadline_s, job.arrived_s))
    batch = crowd(*fresh).next_batch(now_s)
    assert batch is not None
    assert first.item == batch[0]


def test_a_lone_job_on_an_idle_engine_goes_at_once() -> None:
    assert crowd(job(1, at=5.0)).next_batch(5.0) == [1]


def test_a_job_waits_for_company_that_is_coming_but_no_longer_than_max_wait() -> None:
    batcher = crowd(job(1, at=5.0))
    assert batcher.next_batch(5.0, num_coming=1) is None
    assert batcher.due_s(5.0) == 5.01
    batcher.add(job(2, at=5.004))
    assert batcher.next_batch(5.004, num_coming=1) is None
    assert batcher.next_batch(5.01, num_coming=1) == [1, 2]


def test_a_full_batch_does_not_wait() -> None:
    assert crowd(*map(job, range(5))).next_batch(0.0, num_coming=9) == [0, 1, 2, 3]


def test_a_busy_engine_is_brought_full_batches_alone() -> None:
    crowded = crowd(*map(job, range(5)))
    assert crowded.next_batch(9.0, is_busy=True) == [0, 1, 2, 3]
    assert crowded.next_batch(9.0, is_busy=True) is None
    assert crowded.next_batch(9.0) == [4]


def test_the_earliest_deadline_goes_first_within_a_class() -> None:
    batcher = crowd(job(1), job(2, by=3.0), job(3, by=2.0), job(4, priority=Priority.HIGH), job(5, by=0.5))
    assert batcher.next_batch(1.0) == [4, 3, 2, 1]


def test_a_flood_of_urgent_jobs_starves_nobody() -> None:
    policy = BatchPolicy(max_batch=2, max_wait_s=0.0, starvation_s=1.0)
    batcher = crowd(job(-1, bucket="low", priority=Priority.LOW), policy=policy)
    now_s = 0.0
    for turn in range(100):
        for number in range(2):
            batcher.add(job(1000 + 2 * turn + number, priority=Priority.HIGH, at=now_s, by=now_s + 60))
        batch = batcher.next_batch(now_s)
        assert batch is not None
        if batch == [-1]:
            break
        now_s += 0.1
    assert batch == [-1]
    assert now_s <= (Priority.LOW.rank + 1) * policy.starvation_s + 0.2


def test_padding_goes_to_the_next_size_that_fits() -> None:
    policy = BatchPolicy(max_batch=8, max_wait_s=0, starvation_s=1, sizes=(1, 2, 4, 8, 16))
    assert [policy.padded(n) for n in (1, 2, 3, 4, 5, 8)] == [1, 2, 4, 4, 8, 8]
    assert [POLICY.padded(n) for n in (1, 3)] == [1, 3]
    assert BatchPolicy(6, 0, 1, (1, 4, 8)).padded(5) == 5


def test_passes_of_frames_that_did_not_fit_stay_smaller_for_a_time() -> None:
    batcher = crowd(*(replace(job(number), frame="large") for number in range(6)))
    batcher.limit("large", 2, until_s=10.0)
    batcher.limit("other", 1, until_s=10.0)
    assert batcher.next_batch(1.0, num_coming=1) == [0, 1]  # full as it is, so it does not wait
    assert batcher.next_batch(10.0) == [2, 3, 4, 5]
    batcher.limit("large", 0, until_s=20.0)
    assert batcher.max_batch("large", 11.0) == 1
    assert batcher.max_batch("small", 11.0) == POLICY.max_batch
    for frame in range(1000):
        batcher.limit(frame, 1, until_s=20.0)
    assert batcher.max_batch("large", 11.0) == POLICY.max_batch
    assert batcher.max_batch(999, 11.0) == 1


def test_a_removed_job_does_not_come_out() -> None:
    batcher = crowd(job(1), job(2))
    assert batcher.remove("1") == 1
    assert batcher.remove("1") is None
    assert batcher.drain() == [2]
    assert batcher.next_batch(0.0) is None
