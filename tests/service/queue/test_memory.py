"""MemoryQueue keeps the contract, and lets go of everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.queue.contract import Lease
from service.queue.memory import MAX_GONE, MemoryQueue
from service.terms.jobs import FusionJob, FusionResult, JobStatus, Priority
from service.terms.settings import QueueSettings
from tests.fakes import FakeClock, job
from tests.service.queue.contract import SETTINGS, QueueContract, World, success


class TestMemoryQueue(QueueContract):
    @pytest.fixture
    async def world(self) -> AsyncIterator[World]:
        clock = FakeClock()
        queue = MemoryQueue(SETTINGS, clock=clock)

        async def advance(seconds: float) -> None:
            clock.advance(seconds)

        await queue.open()
        yield World(queue, clock, advance)
        await queue.close()


async def test_closing_wakes_takers() -> None:
    queue = MemoryQueue(QueueSettings())
    taking = asyncio.create_task(queue.take("w", max_jobs=1, wait_s=60))
    await asyncio.sleep(0)
    await queue.close()
    assert await asyncio.wait_for(taking, 1) == []


@pytest.mark.parametrize("keep", [False, True])
async def test_jobs_that_are_gone_leave_nothing_behind_until_their_times(keep: bool) -> None:
    """Results may be kept for minutes and deadlines be hours away, at hundreds of jobs a second."""
    clock = FakeClock()
    queue = MemoryQueue(QueueSettings(result_ttl_s=600 if not keep else 2, idempotency_ttl_s=600), clock=clock)
    for _ in range(1000):
        one = job(created_s=clock(), deadline_s=clock() + 3600, keep_result=keep)
        await queue.submit(one)
        (lease,) = await queue.take("w", max_jobs=1, wait_s=0)
        await queue.finish(lease, success(one))
        assert await queue.wait_result(one.id, timeout_s=0) is not None
        clock.advance(0.1)
    last = job(created_s=clock(), deadline_s=clock() + 5)
    await queue.submit(last)
    kept = len(queue._entries)
    assert kept <= 22
    assert len(queue._finished) <= 2 * kept + MAX_GONE
    assert len(queue._deadlines) <= 2 + MAX_GONE
    clock.advance(6)
    assert (await queue.view(last.id)).status is JobStatus.EXPIRED  # what is still there still counts


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["submit", "take", "finish", "release", "cancel", "tick"]), st.integers(0, 9)))
)
def test_whatever_happens_every_job_ends_once_and_nothing_is_kept(steps: list[tuple[str, int]]) -> None:
    async def story() -> None:
        clock = FakeClock()
        queue = MemoryQueue(
            QueueSettings(lease_s=3, max_attempts=3, result_ttl_s=1e6, idempotency_ttl_s=1e6), clock=clock
        )
        jobs: list[FusionJob] = []
        leases: list[Lease] = []
        visible: list[str] = []

        async def finish(index: int) -> None:
            lease = leases.pop(index % len(leases))
            if await queue.finish(lease, success(lease.job)):
                visible.append(lease.job.id)

        for action, number in steps:
            if action == "submit":
                deadline_s = None if number % 2 else clock() + number
                jobs.append(
                    job(created_s=clock(), deadline_s=deadline_s, priority=list(Priority)[number % 3], keep_result=True)
                )
                await queue.submit(jobs[-1])
            elif action == "take":
                leases += await queue.take("w", max_jobs=number, wait_s=0)
            elif action == "finish" and leases:
                await finish(number)
            elif action == "release" and leases:
                await queue.release([leases.pop(number % len(leases))])
            elif action == "cancel" and jobs:
                await queue.cancel(jobs[number % len(jobs)].id)
            elif action == "tick":
                clock.advance(number)
        while (await queue.stats()).num_unfinished:
            leases += await queue.take("last", max_jobs=100, wait_s=0)
            while leases:
                await finish(0)
            clock.advance(4)
        assert len(visible) == len(set(visible))
        for known in jobs:
            result = await queue.wait_result(known.id, timeout_s=0)
            assert isinstance(result, FusionResult)
            assert (result.status is JobStatus.SUCCEEDED) == (known.id in visible)
            assert (await queue.view(known.id)).status is result.status
        clock.advance(2e6)
        for letter in await queue.dead_letters():
            await queue.drop_dead_letter(letter.job.id)
        assert (await queue.stats()).size_bytes == 0
        assert not queue._entries

    asyncio.run(story())
