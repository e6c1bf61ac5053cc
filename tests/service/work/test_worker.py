"""A real worker on a real in-process queue: overlapping stages, failures that stay alone, and an orderly end."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from recofuse_images import reader
from recofuse_rigs.rig import Rig
from recofuse_rigs.warp import Warps
from service.command.processes import new_metrics
from service.queue.contract import Lease
from service.queue.memory import MemoryQueue
from service.terms import images
from service.terms.errors import ErrorCode, UnavailableError
from service.terms.jobs import Exposure, FusionOptions, FusionResult, Output, Part, Priority, Stage
from service.terms.settings import Settings
from service.work.worker import Worker
from tests.fakes import FakeEngine, file_of, job, picture
from tests.service.work.workers import SETTINGS, fresh, held_back, results, until, working


async def test_a_job_becomes_a_picture_with_its_timings() -> None:
    async with working(FakeEngine()) as (queue, _):
        jobs = fresh(1, options=FusionOptions(output=Output.ALL, seed=0))
        await queue.submit(jobs[0])
        (result,) = await results(queue, jobs)
    assert list(result.images) == [Part.FUSED, Part.VIS, Part.IR]
    assert (result.model_name, result.model_version, result.batch_size) == ("fake", "7", 1)
    assert list(result.timings_s) == list(Stage)
    assert (result.width, result.height, result.media_type) == (64, 48, "image/png")
    original = images.decode_pair(jobs[0].vis, jobs[0].ir, SETTINGS.limits)
    again = images.decode_pair(result.images[Part.VIS], result.images[Part.IR], SETTINGS.limits)
    np.testing.assert_array_equal(again.vis, original.vis)
    np.testing.assert_array_equal(again.ir, original.ir)


async def test_a_lone_job_does_not_wait_for_company() -> None:
    slow = SETTINGS.replace(batch={"max_wait_s": 5.0})
    async with working(FakeEngine(), slow) as (queue, _):
        jobs = fresh(1)
        await queue.submit(jobs[0])
        (result,) = await results(queue, jobs)
    assert result.timings_s[Stage.BATCH] < 1.0


async def test_jobs_that_wait_together_run_together_by_shape_and_options() -> None:
    engine = FakeEngine()
    async with working(engine) as (queue, worker):
        first, *others = fresh(8)
        others[0] = replace(others[0], options=FusionOptions(seed=1, steps=9))
        others[1] = replace(others[1], options=FusionOptions(seed=2, output=Output.VIS))
        others[2] = replace(others[2], options=FusionOptions(seed=3, sampler="euler"))
        others[3] = job(seed=4, width=80, height=60, created_s=time.time(), keep_result=True)
        others[4] = replace(others[4], options=FusionOptions(seed=5, steps=3, sampler="ode1"))  # the defaults, by name
        await held_back(engine, queue, worker, [first, *others])
        engine.gate.set()
        found = await results(queue, [first, *others])
    assert all(result.error_code is None for result in found)
    assert sorted(map(sorted, engine.batches)) == [[0], [1], [2], [3], [4], [5, 6, 7]]


async def test_jobs_of_different_exposure_never_share_a_pass() -> None:
    engine = FakeEngine()
    default = engine.info.default_exposure
    (other,) = set(engine.exposures) - {default}
    async with working(engine) as (queue, worker):
        first, *others = fresh(5)
        for index, exposure in enumerate((other, default, None, other)):
            others[index] = replace(others[index], options=FusionOptions(seed=index + 1, exposure=exposure))
        await held_back(engine, queue, worker, [first, *others])
        engine.gate.set()
        found = await results(queue, [first, *others])
    assert all(result.error_code is None for result in found)
    exposures = [options.exposure for options in engine.options]
    passes = {tuple(sorted(seeds)): exposure for seeds, exposure in zip(engine.batches, exposures, strict=True)}
    assert passes == {(0,): default, (1, 4): other, (2, 3): default}


async def test_an_exposure_that_the_weights_cannot_give_is_refused_and_fails_alone() -> None:
    engine = FakeEngine(exposures=("as_shot",))
    wanted: tuple[Exposure | None, ...] = (None, None, "lit", "as_shot")
    async with working(engine) as (queue, _):
        jobs = [
            replace(each, options=FusionOptions(seed=each.options.seed, exposure=exposure))
            for each, exposure in zip(fresh(4), wanted, strict=True)
        ]
        for each in jobs:
            await queue.submit(each)
        plain, unnamed, lit, as_shot = await results(queue, jobs)
        told = await queue.workers()
    assert [result.error_code for result in (plain, unnamed, as_shot)] == [None] * 3
    assert lit.error_code is ErrorCode.INVALID_INPUT
    assert lit.error_message == (
        "exposure: the weights fake 7 have no exposure estimator and cannot give lit; accepted is as_shot"
    )
    assert sorted(seed for batch in engine.batches for seed in batch) == [0, 1, 3]
    assert {options.exposure for options in engine.options} == {"as_shot"}
    assert [(info.default_exposure, info.exposures) for info in told] == [("as_shot", ("as_shot",))]


async def test_a_job_with_a_rig_needs_nothing_of_the_workers_own_folder() -> None:
    """Infrared of another size comes into the visible frame; where it ends, the fused picture needs restored vis."""
    engine = FakeEngine()
    part, whole = (
        Rig((64, 48), (80, 80), (scale, 0.0, x, 0.0, scale, 0.0, 0.0, 0.0, 1.0))
        for scale, x in ((0.5, 10.0), (1.0, 0.0))
    )
    async with working(engine) as (queue, worker):
        first, *others = fresh(6, options=FusionOptions())
        ir = file_of(picture(80, 80, channels=1))
        jobs = [
            replace(each, ir=each.ir if rig is None else ir, rig=rig, options=FusionOptions(seed=seed, output=output))
            for seed, (each, rig, output) in enumerate(
                zip(
                    others,
                    (part, part, whole, None, part),
                    (Output.FUSED, Output.FUSED, Output.FUSED, Output.FUSED, Output.IR),
                    strict=True,
                ),
                start=1,
            )
        ]
        await held_back(engine, queue, worker, [first, *jobs])
        engine.gate.set()
        found = await results(queue, [first, *jobs])
    assert all(result.error_code is None for result in found), [result.error_message for result in found]
    assert [list(result.images) for result in found] == [[Part.FUSED]] * 5 + [[Part.IR]]
    passes = {
        tuple(sorted(seeds)): options.parts for seeds, options in zip(engine.batches, engine.options, strict=True)
    }
    assert passes == {
        (0,): (Part.FUSED,), (1, 2): (Part.FUSED, Part.VIS), (3, 4): (Part.FUSED,), (5,): (Part.IR,)
    }  # fmt: skip
    expected = images.decode_rigged(jobs[4].vis, ir, part, Warps(), SETTINGS.limits).pair.ir
    np.testing.assert_array_equal(reader.read_ir(found[5].images[Part.IR]), expected)


async def test_a_rig_that_does_not_fit_its_pictures_fails_alone() -> None:
    async with working(FakeEngine()) as (queue, _):
        jobs = fresh(2)
        rig = Rig((64, 48), (80, 60), (0.8, 0.0, 0.0, 0.0, 0.8, 0.0, 0.0, 0.0, 1.0))
        jobs[1] = replace(jobs[1], rig=rig, ir=file_of(picture(80, 80, channels=1)))
        for each in jobs:
            await queue.submit(each)
        sound, refused = await results(queue, jobs)
    assert sound.error_code is None
    assert refused.error_code is ErrorCode.INVALID_INPUT
    assert "the rig is for 80x60" in refused.error_message


async def test_batches_are_filled_up_to_the_engines_sizes() -> None:
    engine = FakeEngine(batch_sizes=(1, 4, 8))
    async with working(engine) as (queue, worker):
        jobs = fresh(4)
        await held_back(engine, queue, worker, jobs)
        engine.gate.set()
        found = await results(queue, jobs)
        assert worker._metrics.registry.get_sample_value("recofuse_padded_items_total") == 1
    assert [len(batch) for batch in engine.batches] == [1, 4]
    assert [result.batch_size for result in found] == [1, 3, 3, 3]


async def test_a_poison_job_fails_alone() -> None:
    engine = FakeEngine(poison_seeds=frozenset({5}))
    async with working(engine) as (queue, worker):
        jobs = fresh(9)
        await held_back(engine, queue, worker, jobs)
        engine.gate.set()
        found = await results(queue, jobs)
        assert [letter.job.id for letter in await queue.dead_letters()] == [jobs[5].id]
    assert [result.error_code for result in found] == [None] * 5 + [ErrorCode.INTERNAL] + [None] * 3
    assert "poisoned" not in found[5].error_message


async def test_an_undecodable_image_fails_alone() -> None:
    engine = FakeEngine()
    async with working(engine) as (queue, _):
        jobs = fresh(4)
        jobs[1] = replace(jobs[1], ir=jobs[1].ir[:99])
        for each in jobs:
            await queue.submit(each)
        found = await results(queue, jobs)
        assert await queue.dead_letters() == []
    assert [result.error_code for result in found] == [None, ErrorCode.INVALID_INPUT, None, None]


@pytest.mark.parametrize(("max_fit", "expected"), [(2, None), (0, ErrorCode.OUT_OF_MEMORY)])
async def test_a_batch_that_does_not_fit_is_halved(max_fit: int, expected: ErrorCode | None) -> None:
    engine = FakeEngine(max_fit=1)
    async with working(engine) as (queue, worker):
        jobs = fresh(9)
        await held_back(engine, queue, worker, jobs)
        engine.max_fit = max_fit
        engine.gate.set()
        found = await results(queue, jobs)
    assert {result.error_code for result in found[1:]} == {expected}


async def test_cancelled_and_expired_jobs_are_not_computed() -> None:
    engine = FakeEngine()
    async with working(engine) as (queue, worker):
        jobs = fresh(4)
        jobs[2] = replace(jobs[2], deadline_s=time.time() + 0.4)
        await held_back(engine, queue, worker, jobs)
        await queue.cancel(jobs[1].id)
        await asyncio.sleep(0.5)
        engine.gate.set()
        found = await results(queue, jobs)
        await until(lambda: worker.num_held == 0)
    assert [result.error_code for result in found] == [None, ErrorCode.CANCELLED, ErrorCode.TIMED_OUT, None]
    assert engine.batches == [[0], [3]]


async def test_a_slow_pass_keeps_its_lease() -> None:
    settings = SETTINGS.replace(queue={"lease_s": 0.3})
    engine = FakeEngine()
    async with working(engine, settings) as (queue, worker):
        jobs = fresh(2)
        await held_back(engine, queue, worker, jobs)
        await asyncio.sleep(0.8)
        assert await queue.take("other", max_jobs=1, wait_s=0) == []
        engine.gate.set()
        await results(queue, jobs)
        assert {(await queue.view(each.id)).attempts for each in jobs} == {1}


async def test_urgent_jobs_overtake_waiting_ones() -> None:
    engine = FakeEngine()
    async with working(engine, SETTINGS.replace(batch={"max_batch": 1}, worker={"max_held": 8})) as (queue, worker):
        jobs = fresh(4)
        jobs[3] = replace(jobs[3], priority=Priority.HIGH)
        await held_back(engine, queue, worker, jobs)
        engine.gate.set()
        await results(queue, jobs)
    assert engine.batches[:2] == [[0], [3]]
    assert sorted(engine.batches[2:]) == [[1], [2]]  # in the order in which their decoders, which run at once, ended


async def test_what_is_held_is_bounded() -> None:
    engine = FakeEngine()
    async with working(engine, SETTINGS.replace(worker={"max_held": 3})) as (queue, worker):
        engine.gate.clear()
        jobs = fresh(8)
        for each in jobs:
            await queue.submit(each)
        await asyncio.sleep(0.2)
        stats = await queue.stats()
        assert (worker.num_held, stats.num_leased) == (3, 3)
        engine.gate.set()
        assert len(await results(queue, jobs)) == 8


async def test_stopping_finishes_what_is_held_and_takes_nothing_new() -> None:
    engine = FakeEngine()
    queue = MemoryQueue(SETTINGS.queue)
    worker = Worker(queue, engine, SETTINGS, new_metrics())
    running = asyncio.create_task(worker.run())
    await worker.warm.wait()
    jobs = fresh(3)
    await held_back(engine, queue, worker, jobs)
    worker.stop()
    await asyncio.sleep(0.3)
    late = fresh(1)[0]
    await queue.submit(late)
    engine.gate.set()
    await asyncio.wait_for(running, 5)
    assert all(result.error_code is None for result in await results(queue, jobs))
    assert (await queue.stats()).num_unfinished == 1
    assert await queue.workers() == []


async def test_what_cannot_be_finished_in_time_is_handed_back() -> None:
    engine = FakeEngine()
    settings = SETTINGS.replace(worker={"drain_timeout_s": 0.2})
    queue = MemoryQueue(settings.queue)
    worker = Worker(queue, engine, settings, new_metrics())
    running = asyncio.create_task(worker.run())
    await worker.warm.wait()
    jobs = fresh(3)
    await held_back(engine, queue, worker, jobs)
    worker.stop()
    await asyncio.wait_for(running, 5)
    engine.gate.set()
    again = await queue.take("other", max_jobs=5, wait_s=0)
    assert [(lease.job.id, lease.attempt) for lease in again] == [(each.id, 1) for each in jobs]


async def test_a_model_that_cannot_load_ends_the_worker() -> None:
    def fail() -> None:
        raise OSError("no such weights")

    worker = Worker(MemoryQueue(SETTINGS.queue), FakeEngine(on_load=fail), SETTINGS, new_metrics())
    with pytest.raises(OSError, match="no such weights"):
        await worker.run()
    assert not worker.is_warm


class FlakyQueue(MemoryQueue):
    """Cannot be reached for the first calls of each kind."""

    def __init__(self, settings: Settings, num_failures: int) -> None:
        super().__init__(settings.queue)
        self._left = dict.fromkeys(("take", "finish", "announce"), num_failures)

    def _maybe_fail(self, name: str) -> None:
        if self._left[name]:
            self._left[name] -= 1
            raise UnavailableError("away")

    async def take(self, worker_id: str, *, max_jobs: int, wait_s: float) -> list[Lease]:
        self._maybe_fail("take")
        return await super().take(worker_id, max_jobs=max_jobs, wait_s=wait_s)

    async def finish(self, lease: Lease, result: FusionResult) -> bool:
        self._maybe_fail("finish")
        return await super().finish(lease, result)


async def test_a_queue_that_goes_away_is_survived() -> None:
    async with working(FakeEngine(), queue=FlakyQueue(SETTINGS, 2)) as (queue, _):
        jobs = fresh(3)
        for each in jobs:
            await queue.submit(each)
        assert all(result.error_code is None for result in await results(queue, jobs))


async def test_another_worker_takes_over_from_one_that_is_killed() -> None:
    settings = SETTINGS.replace(queue={"lease_s": 0.3})
    queue = MemoryQueue(settings.queue)
    stuck = FakeEngine()
    victim = Worker(queue, stuck, settings.replace(worker={"id": "victim"}), new_metrics())
    running = asyncio.create_task(victim.run())
    await victim.warm.wait()
    jobs = fresh(3)
    await held_back(stuck, queue, victim, jobs)
    victim._queue = MemoryQueue(settings.queue)  # it cannot reach the queue any more, not even to hand back
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    stuck.gate.set()
    async with working(FakeEngine(), settings, queue):
        found = await results(queue, jobs)
    assert [result.error_code for result in found] == [None] * 3
    assert {(await queue.view(each.id)).attempts for each in jobs} == {2}
