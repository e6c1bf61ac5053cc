"""What every JobQueue promises, as tests. A class that derives from `QueueContract` provides the `world` fixture.

Times are short, so that an implementation on a real clock can sleep through them: a lease of LEASE_S, and so on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import pytest

from service.queue.contract import RECORD_BYTES, JobQueue, Lease
from service.terms.errors import (
    ConflictError,
    ErrorCode,
    InternalError,
    InvalidInputError,
    JobNotFoundError,
    NoRoomError,
    OverloadedError,
    PayloadTooLargeError,
)
from service.terms.jobs import FusionJob, FusionResult, JobStatus, Part, Priority, WorkerInfo, new_job_id
from service.terms.settings import QueueSettings
from tests.fakes import job as new_job

LEASE_S = 0.6
SETTINGS = QueueSettings(
    max_jobs=6,
    max_bytes=1 << 20,
    lease_s=LEASE_S,
    max_attempts=2,
    starvation_s=0.8,
    result_ttl_s=1.5,
    idempotency_ttl_s=1.5,
    max_dead_letters=3,
)


@dataclass
class World:
    """A queue and its time. now: Unix seconds as the queue sees them; advance: lets so many seconds pass."""

    queue: JobQueue
    now: Callable[[], float]
    advance: Callable[[float], Awaitable[None]]

    def job(self, *, priority: Priority = Priority.NORMAL, ttl_s: float | None = None, keep: bool = True) -> FusionJob:
        now = self.now()
        deadline_s = None if ttl_s is None else now + ttl_s
        return new_job(created_s=now, deadline_s=deadline_s, priority=priority, keep_result=keep)

    async def submit(self, count: int = 1, *, priority: Priority = Priority.NORMAL) -> list[FusionJob]:
        jobs = [self.job(priority=priority) for _ in range(count)]
        for job in jobs:
            await self.queue.submit(job)
        return jobs

    async def take_one(self, worker_id: str = "w1") -> Lease:
        (lease,) = await self.queue.take(worker_id, max_jobs=1, wait_s=1.0)
        return lease


def success(job: FusionJob, image: bytes = b"picture") -> FusionResult:
    return FusionResult(
        job_id=job.id,
        images={Part.FUSED: image},
        media_type="image/png",
        batch_size=1,
        ir_source="palette",
        warnings=("ir: looks like 昼間, a day in colour",),
    )


class QueueContract:
    async def test_a_job_comes_out_as_it_went_in(self, world: World) -> None:
        (job,) = await world.submit()
        lease = await world.take_one()
        assert (lease.job, lease.attempt, lease.worker_id) == (job, 1, "w1")
        assert await world.queue.take("w2", max_jobs=5, wait_s=0) == []

    async def test_a_history_goes_in_and_comes_out(self, world: World) -> None:
        for history in (b"", b"h" * 9000):
            job = replace(world.job(), means=b"m", history=history)
            assert job.size_bytes == len(job.vis) + len(job.ir) + 1 + len(history)
            await world.queue.submit(job)
            assert (await world.queue.stats()).size_bytes >= job.size_bytes
            lease = await world.take_one()
            assert lease.job == job
            result = replace(success(job), history=history[::-1] + b"i")
            assert await world.queue.finish(lease, result)
            assert await world.queue.wait_result(job.id, timeout_s=5) == result

    async def test_a_dead_letter_keeps_its_history(self, world: World) -> None:
        job = replace(world.job(), history=b"h" * 5000)
        await world.queue.submit(job)
        lease = await world.take_one()
        await world.queue.finish(lease, FusionResult.failed(job.id, InternalError("our fault")))
        (letter,) = await world.queue.dead_letters()
        assert letter.job == job
        await world.queue.retry_dead_letter(job.id)
        assert (await world.take_one()).job.history == job.history

    async def test_the_result_reaches_who_waits_and_who_comes_later(self, world: World) -> None:
        (job,) = await world.submit()
        waiting = asyncio.create_task(world.queue.wait_result(job.id, timeout_s=5))
        lease = await world.take_one()
        assert not waiting.done()
        assert await world.queue.finish(lease, success(job))
        assert await waiting == success(job)
        assert await world.queue.wait_result(job.id, timeout_s=0) == success(job)
        assert (await world.queue.view(job.id)).status is JobStatus.SUCCEEDED

    async def test_a_result_that_is_not_kept_is_delivered_once(self, world: World) -> None:
        job = world.job(keep=False)
        await world.queue.submit(job)
        await world.queue.finish(await world.take_one(), success(job))
        assert await world.queue.wait_result(job.id, timeout_s=1) == success(job)

    async def test_waiting_gives_up_after_its_time(self, world: World) -> None:
        (job,) = await world.submit()
        assert await world.queue.wait_result(job.id, timeout_s=0) is None
        assert await world.queue.wait_result(job.id, timeout_s=0.05) is None

    async def test_taking_waits_for_a_job(self, world: World) -> None:
        assert await world.queue.take("w1", max_jobs=1, wait_s=0.05) == []
        taking = asyncio.create_task(world.queue.take("w1", max_jobs=3, wait_s=5))
        await asyncio.sleep(0.05)
        (job,) = await world.submit()
        assert [lease.job.id for lease in await taking] == [job.id]

    async def test_first_in_first_out_within_a_class_and_urgent_classes_first(self, world: World) -> None:
        low = await world.submit(2, priority=Priority.LOW)
        normal = await world.submit(2)
        (high,) = await world.submit(priority=Priority.HIGH)
        leases = [await world.take_one() for _ in range(5)]
        assert [lease.job.id for lease in leases] == [job.id for job in (high, *normal, *low)]

    async def test_one_take_spans_classes(self, world: World) -> None:
        await world.submit(1, priority=Priority.LOW)
        await world.submit(2, priority=Priority.HIGH)
        leases = await world.queue.take("w1", max_jobs=8, wait_s=1)
        assert [lease.job.priority for lease in leases] == [Priority.HIGH, Priority.HIGH, Priority.LOW]

    async def test_a_low_job_is_not_starved(self, world: World) -> None:
        (low,) = await world.submit(priority=Priority.LOW)
        await world.advance(SETTINGS.starvation_s + 0.1)
        await world.submit(2, priority=Priority.HIGH)
        assert (await world.take_one()).job.id == low.id

    async def test_the_first_result_wins(self, world: World) -> None:
        (job,) = await world.submit()
        lease = await world.take_one()
        assert await world.queue.finish(lease, success(job, b"first"))
        assert not await world.queue.finish(lease, success(job, b"second"))
        result = await world.queue.wait_result(job.id, timeout_s=0)
        assert result is not None
        assert result.images[Part.FUSED] == b"first"

    async def test_a_lost_worker_loses_its_job_to_another(self, world: World) -> None:
        (job,) = await world.submit()
        first = await world.take_one("dead")
        await world.advance(LEASE_S + 0.1)
        second = await world.take_one("alive")
        assert (second.job.id, second.attempt) == (job.id, 2)
        assert (await world.queue.renew([first])).lost == {job.id}
        assert await world.queue.finish(first, success(job, b"late but first"))
        assert not await world.queue.finish(second, success(job, b"duplicate"))
        assert (await world.queue.stats()).num_unfinished == 0

    async def test_a_waiting_take_sees_a_lease_run_out(self, world: World) -> None:
        (job,) = await world.submit()
        await world.take_one("dead")
        taking = asyncio.create_task(world.queue.take("alive", max_jobs=1, wait_s=10 * LEASE_S))
        await asyncio.sleep(0)
        await world.advance(LEASE_S + 0.1)
        async with asyncio.timeout(5 * LEASE_S):
            assert [lease.job.id for lease in await taking] == [job.id]

    async def test_renewing_keeps_a_job(self, world: World) -> None:
        await world.submit()
        lease = await world.take_one()
        for _ in range(3):
            await world.advance(LEASE_S * 0.6)
            renewal = await world.queue.renew([lease])
            assert not renewal.lost
            assert not renewal.cancelled
        assert await world.queue.take("w2", max_jobs=1, wait_s=0) == []

    async def test_a_job_that_kills_its_workers_is_put_aside(self, world: World) -> None:
        (job,) = await world.submit()
        for attempt in range(1, SETTINGS.max_attempts + 1):
            assert (await world.take_one(f"w{attempt}")).attempt == attempt
            await world.advance(LEASE_S + 0.1)
        assert await world.queue.take("w9", max_jobs=1, wait_s=0) == []
        result = await world.queue.wait_result(job.id, timeout_s=1)
        assert result is not None
        assert result.error_code is ErrorCode.ATTEMPTS_EXHAUSTED
        (letter,) = await world.queue.dead_letters()
        assert (letter.job.id, letter.job.vis, letter.attempts) == (job.id, job.vis, SETTINGS.max_attempts)

    async def test_a_released_job_is_free_at_once_and_was_not_tried(self, world: World) -> None:
        jobs = await world.submit(3)
        leases = await world.queue.take("w1", max_jobs=2, wait_s=1)
        await world.queue.release(leases)
        again = [await world.take_one("w2") for _ in range(3)]
        assert {lease.job.id for lease in again} == {job.id for job in jobs}
        assert {lease.attempt for lease in again} == {1}

    async def test_a_job_released_after_it_took_its_worker_down_was_tried(self, world: World) -> None:
        (job,) = await world.submit()
        for attempt in range(1, SETTINGS.max_attempts + 1):
            lease = await world.take_one(f"w{attempt}")  # free at once
            assert lease.attempt == attempt
            await world.queue.release([lease], was_tried=True)
        assert await world.queue.take("w9", max_jobs=1, wait_s=0) == []
        result = await world.queue.wait_result(job.id, timeout_s=1)
        assert result is not None
        assert result.error_code is ErrorCode.ATTEMPTS_EXHAUSTED
        assert [letter.attempts for letter in await world.queue.dead_letters()] == [SETTINGS.max_attempts]

    async def test_releasing_what_is_not_held_changes_nothing(self, world: World) -> None:
        (job,) = await world.submit()
        lease = await world.take_one()
        await world.queue.finish(lease, success(job))
        await world.queue.release([lease])
        assert await world.queue.take("w1", max_jobs=1, wait_s=0) == []

    async def test_failures_of_ours_become_dead_letters(self, world: World) -> None:
        wrong, broken = await world.submit(2)
        for error in (InvalidInputError("not good"), InternalError("our fault")):
            lease = await world.take_one()
            await world.queue.finish(lease, FusionResult.failed(lease.job.id, error))
        view = await world.queue.view(wrong.id)
        assert (view.status, view.error_code, view.error_message) == (
            JobStatus.FAILED, ErrorCode.INVALID_INPUT, "not good",
        )  # fmt: skip
        assert [letter.job.id for letter in await world.queue.dead_letters()] == [broken.id]
        assert (await world.queue.stats()).num_dead_letters == 1

    async def test_dead_letters_can_be_retried_or_dropped(self, world: World) -> None:
        for _ in range(2):
            (job,) = await world.submit()
            lease = await world.take_one()
            await world.queue.finish(lease, FusionResult.failed(job.id, InternalError("our fault")))
        first, second = await world.queue.dead_letters()
        admission = await world.queue.retry_dead_letter(first.job.id)
        lease = await world.take_one()
        assert (lease.job.id, lease.job.vis, lease.attempt) == (admission.job_id, first.job.vis, 1)
        assert lease.job.id != first.job.id
        await world.queue.drop_dead_letter(second.job.id)
        assert await world.queue.dead_letters() == []
        with pytest.raises(JobNotFoundError):
            await world.queue.drop_dead_letter(second.job.id)

    async def test_dead_letters_are_bounded(self, world: World) -> None:
        jobs = []
        for _ in range(SETTINGS.max_dead_letters + 1):
            jobs += await world.submit()
            lease = await world.take_one()
            await world.queue.finish(lease, FusionResult.failed(lease.job.id, InternalError("our fault")))
        assert [letter.job.id for letter in await world.queue.dead_letters()] == [job.id for job in jobs[1:]]

    async def test_a_cancelled_job_is_not_handed_out(self, world: World) -> None:
        (job,) = await world.submit()
        waiting = asyncio.create_task(world.queue.wait_result(job.id, timeout_s=5))
        await asyncio.sleep(0.05)
        assert (await world.queue.cancel(job.id)).status is JobStatus.CANCELLED
        result = await waiting
        assert result is not None
        assert result.error_code is ErrorCode.CANCELLED
        assert await world.queue.take("w1", max_jobs=1, wait_s=0) == []
        assert (await world.queue.stats()).num_unfinished == 0

    async def test_cancelling_reaches_who_holds_the_job(self, world: World) -> None:
        gone, kept = await world.submit(2)
        leases = await world.queue.take("w1", max_jobs=2, wait_s=1)
        await world.queue.cancel(gone.id)
        renewal = await world.queue.renew(leases)
        assert (renewal.cancelled, renewal.lost) == (frozenset({gone.id}), frozenset[str]())
        assert world.queue.cancelled([gone.id, kept.id]) == {gone.id}
        assert not await world.queue.finish(leases[0], success(gone))
        assert await world.queue.finish(leases[1], success(kept))

    async def test_cancelling_what_has_ended_changes_nothing(self, world: World) -> None:
        (job,) = await world.submit()
        await world.queue.finish(await world.take_one(), success(job))
        assert (await world.queue.cancel(job.id)).status is JobStatus.SUCCEEDED
        assert await world.queue.wait_result(job.id, timeout_s=0) == success(job)

    async def test_an_expired_job_is_not_handed_out(self, world: World) -> None:
        job = world.job(ttl_s=0.2)
        await world.queue.submit(job)
        await world.advance(0.3)
        assert await world.queue.take("w1", max_jobs=1, wait_s=0) == []
        result = await world.queue.wait_result(job.id, timeout_s=1)
        assert result is not None
        assert result.error_code is ErrorCode.TIMED_OUT
        assert (await world.queue.view(job.id)).status is JobStatus.EXPIRED
        assert (await world.queue.stats()).num_unfinished == 0

    async def test_unknown_jobs_are_said_to_be_unknown(self, world: World) -> None:
        for call in (world.queue.view, world.queue.cancel, world.queue.retry_dead_letter):
            with pytest.raises(JobNotFoundError):
                await call(new_job_id())
        with pytest.raises(JobNotFoundError):
            await world.queue.wait_result(new_job_id(), timeout_s=0)

    async def test_results_are_forgotten_after_their_time(self, world: World) -> None:
        (job,) = await world.submit()
        before = (await world.queue.stats()).size_bytes
        await world.queue.finish(await world.take_one(), success(job))
        await world.advance(SETTINGS.result_ttl_s + 0.2)
        with pytest.raises(JobNotFoundError):
            await world.queue.wait_result(job.id, timeout_s=0)
        assert before > 0
        assert (await world.queue.stats()).size_bytes == 0

    async def test_jobs_are_bounded(self, world: World) -> None:
        jobs = await world.submit(SETTINGS.max_jobs)
        with pytest.raises(OverloadedError) as refused:
            await world.submit()
        assert refused.value.retry_after_s
        leases = await world.queue.take("w1", max_jobs=8, wait_s=1)
        with pytest.raises(OverloadedError):  # jobs at workers count as well
            await world.submit()
        await world.queue.finish(leases[0], success(jobs[0]))
        await world.submit()

    async def test_bytes_are_bounded(self, world: World) -> None:
        heavy = replace(world.job(), vis=bytes(SETTINGS.max_bytes - 10_000))
        await world.queue.submit(heavy)
        with pytest.raises(NoRoomError):
            await world.queue.submit(replace(world.job(), vis=bytes(20_000)))
        await world.queue.finish(await world.take_one(), success(heavy))
        await world.queue.submit(replace(world.job(), vis=bytes(20_000)))

    async def test_what_is_kept_of_ended_jobs_counts(self, world: World) -> None:
        cancelled, computed = await world.submit(2)
        await world.queue.cancel(cancelled.id)
        result = success(computed)
        await world.queue.finish(await world.take_one(), result)
        assert (await world.queue.stats()).size_bytes == 2 * RECORD_BYTES + result.size_bytes
        await world.advance(SETTINGS.result_ttl_s + 0.2)
        assert (await world.queue.stats()).size_bytes == 0

    async def test_a_job_that_can_never_fit_is_not_told_to_come_back(self, world: World) -> None:
        with pytest.raises(PayloadTooLargeError) as refused:
            await world.queue.submit(replace(world.job(), vis=bytes(SETTINGS.max_bytes)))
        assert refused.value.retry_after_s is None
        assert (await world.queue.stats()).num_unfinished == 0

    async def test_a_key_leads_to_the_first_job(self, world: World) -> None:
        job = world.job()
        first = await world.queue.submit(job, idempotency_key="k")
        second = await world.queue.submit(replace(job, id=new_job_id()), idempotency_key="k")
        assert (first.job_id, first.is_new) == (job.id, True)
        assert (second.job_id, second.is_new) == (job.id, False)
        assert (await world.queue.stats()).num_unfinished == 1
        await world.queue.finish(await world.take_one(), success(job))
        third = await world.queue.submit(replace(job, id=new_job_id()), idempotency_key="k")
        assert third.job_id == job.id
        assert await world.queue.wait_result(third.job_id, timeout_s=0) == success(job)

    async def test_a_key_is_for_one_request(self, world: World) -> None:
        job = world.job()
        await world.queue.submit(job, idempotency_key="k")
        with pytest.raises(ConflictError):
            await world.queue.submit(replace(job, id=new_job_id(), ir=job.ir + b"!"), idempotency_key="k")
        await world.queue.submit(replace(job, id=new_job_id(), ir=job.ir + b"!"), idempotency_key="other")

    async def test_submitting_twice_is_submitting_once(self, world: World) -> None:
        job = world.job()
        await world.queue.submit(job)
        await world.queue.submit(job)
        assert len(await world.queue.take("w1", max_jobs=8, wait_s=0.2)) == 1

    async def test_views_follow_a_job(self, world: World) -> None:
        (job,) = await world.submit()
        queued = await world.queue.view(job.id)
        assert (queued.status, queued.attempts, queued.finished_s) == (JobStatus.QUEUED, 0, None)
        lease = await world.take_one()
        running = await world.queue.view(job.id)
        assert (running.status, running.attempts) == (JobStatus.RUNNING, 1)
        await world.queue.finish(lease, success(job))
        ended = await world.queue.view(job.id)
        assert ended.status is JobStatus.SUCCEEDED
        assert ended.finished_s == pytest.approx(world.now(), abs=1.0)
        assert ended.created_s == pytest.approx(job.created_s)

    async def test_stats_count_what_is_there(self, world: World) -> None:
        jobs = await world.submit(2) + await world.submit(1, priority=Priority.LOW)
        await world.advance(0.3)
        await world.take_one()
        stats = await world.queue.stats()
        assert stats.depth == {Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 1}
        assert (stats.num_leased, stats.num_unfinished) == (1, 3)
        assert stats.size_bytes == sum(job.size_bytes for job in jobs)
        assert stats.oldest_age_s == pytest.approx(0.3, abs=0.25)

    async def test_workers_are_known_while_they_say_so(self, world: World) -> None:
        info = WorkerInfo(
            id="w1", model_name="m", model_version="1", device="cpu", default_steps=4, default_sampler="ode1",
            batch_sizes=(1, 2), is_warm=True, started_s=1.0,
        )  # fmt: skip
        await world.queue.announce(info, ttl_s=0.5)
        await world.queue.announce(info.model_copy(update={"id": "w0"}), ttl_s=5)
        assert [worker.id for worker in await world.queue.workers()] == ["w0", "w1"]
        await world.advance(0.6)
        (left,) = await world.queue.workers()
        assert left == info.model_copy(update={"id": "w0"})
        await world.queue.announce(left, ttl_s=0)
        assert await world.queue.workers() == []

    async def test_many_takers_share_without_overlap(self, world: World) -> None:
        jobs = await world.submit(6)
        taken = await asyncio.gather(*(world.queue.take(f"w{n}", max_jobs=2, wait_s=0.3) for n in range(5)))
        ids = [lease.job.id for leases in taken for lease in leases]
        assert sorted(ids) == sorted(job.id for job in jobs)
