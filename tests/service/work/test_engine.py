"""The bridge to the model: what it makes ready at the start and later, and the sizes that it agrees on."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch

from recofuse_core.picture import ModelInfo
from recofuse_core.program_cache import Activity
from recofuse_core.runtime import Runtime
from service.terms.activity import EngineActivity
from service.terms.jobs import Part
from service.terms.settings import EngineSettings, Settings
from service.work.engine import EngineBrokenError, PassOptions, Pixels
from service.work.engines import build_engine
from service.work.torch_engine import TorchEngine
from tests.fakes import FakeEngine
from tests.service.work.devices import MeteredDevice, MeteredEngine, MeteredRuntime
from tests.service.work.workers import fresh, held_back, results, until, working

Shape = tuple[int, int, int]


@dataclass
class ReadyingRuntime:
    """Makes shapes ready; those with an error in `errors` (by batch size) fail. later: what may wait."""

    errors: dict[int, Exception] = field(default_factory=dict)
    ready: list[Shape] = field(default_factory=list)
    later: list[Shape] = field(default_factory=list)
    batch_sizes: tuple[int, ...] = (1, 2, 4)
    records: bool = True
    can_light: bool = False
    info = ModelInfo("readying", "1", "", 3, "ode2", 0)

    def record(self, shapes: list[Shape], *, outputs: tuple[str, ...], later: bool, **options: object) -> None:
        assert later == (len(outputs) == 3)
        if later:
            self.later += shapes
            return
        for shape in shapes:
            if (error := self.errors.get(shape[0])) is not None:
                raise error
            self.ready.append(shape)


def engine_with(runtime: ReadyingRuntime) -> TorchEngine:
    engine = TorchEngine(EngineSettings(warm_up_sizes=("64x48",)))
    engine._runtime = cast(Runtime, runtime)
    return engine


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no such algorithm")])
def test_one_shape_that_cannot_be_made_ready_is_left_out(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    runtime = ReadyingRuntime({4: error})
    engine_with(runtime).warm_up()
    assert runtime.ready == [(1, 48, 64), (2, 48, 64)]
    assert runtime.later == [(1, 48, 64), (2, 48, 64), (4, 48, 64)]
    assert [record.message for record in caplog.records] == ["a shape is not made ready"]


def test_a_device_that_can_run_nothing_ends_the_start() -> None:
    with pytest.raises(RuntimeError, match="no such algorithm"):
        engine_with(ReadyingRuntime(dict.fromkeys((1, 2, 4), RuntimeError("no such algorithm")))).warm_up()
    lost = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine_with(ReadyingRuntime({2: lost})).warm_up()


@pytest.mark.parametrize(
    ("batch", "engine", "expected"),
    [
        ({}, {}, (1, 2, 4, 8)),
        ({"max_batch": 4}, {}, (1, 2, 4)),
        ({"max_batch": 16}, {}, (1, 2, 4, 8, 16)),
        ({"max_batch": 6}, {"batch_sizes": (1, 3, 8)}, (1, 3, 6)),
        ({"max_batch": 8, "sizes": (4, 1)}, {}, (1, 4, 8)),
        ({"max_batch": 1}, {}, (1,)),
    ],
    ids=str,
)
def test_the_batcher_and_the_engine_agree_on_sizes(
    batch: dict[str, object], engine: dict[str, object], expected: tuple[int, ...]
) -> None:
    settings = Settings.from_values({"batch": batch, "engine": {**engine, "runtime": "torch"}})
    assert settings.batch_sizes == expected
    built = build_engine(settings)
    assert isinstance(built, TorchEngine)
    assert built._settings.batch_sizes == expected


async def test_a_worker_tells_what_its_engine_does() -> None:
    engine = MeteredEngine(MeteredRuntime(MeteredDevice(9), activity=Activity(recorded_runs=4, programs=2)))
    async with working(engine) as (queue, worker):
        jobs = fresh(1)
        await queue.submit(jobs[0])
        await results(queue, jobs)
        told = worker._metrics.registry.get_sample_value
        assert told("recofuse_engine_runs_total", {"form": "recorded"}) == 4
        assert told("recofuse_engine_programs") == 2


def test_the_core_and_the_service_tell_the_same_of_an_engine() -> None:
    """Front ends may not import the one, the core not the other."""
    names, others = ([part.name for part in dataclasses.fields(kind)] for kind in (Activity, EngineActivity))
    assert names == others


@dataclass
class PreparingEngine(FakeEngine):
    """Has something to make ready after every pass. calls: passes and preparations in order."""

    calls: list[str] = field(default_factory=list)
    is_due: bool = False
    error: Exception | None = None

    @property
    def prepares_in_s(self) -> float | None:
        return 0.0 if self.is_due else None

    def prepare(self) -> None:
        self.calls.append("prepare")
        self.is_due = False
        if self.error is not None:
            raise self.error

    def fuse(
        self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int], overlap: Pixels | None = None
    ) -> dict[Part, Pixels]:
        answer = super().fuse(vis, ir, options, seeds, overlap)
        self.calls.append("pass")
        self.is_due = True
        return answer


async def test_what_is_due_is_made_ready_when_nothing_else_is_to_do() -> None:
    engine = PreparingEngine()
    async with working(engine) as (queue, worker):
        jobs = fresh(9)
        await held_back(engine, queue, worker, jobs)
        engine.gate.set()
        await results(queue, jobs)
        await until(lambda: "prepare" in engine.calls)
    assert engine.calls == ["pass", "pass", "prepare"]


@dataclass
class LeavingEngine(PreparingEngine):
    """Has something left of the warm-up that it may make ready only later. waits: what it answers when asked."""

    waits: list[float] = field(default_factory=lambda: [0.05, 0.0])

    @property
    def prepares_in_s(self) -> float | None:
        return self.waits.pop(0) if self.waits else None


async def test_what_may_be_made_ready_only_later_is_so_without_a_job() -> None:
    engine = LeavingEngine()
    async with working(engine):
        await until(lambda: "prepare" in engine.calls)
    assert (engine.calls, engine.waits) == (["prepare"], [])


async def test_a_preparation_that_fails_fails_no_job() -> None:
    engine = PreparingEngine(error=RuntimeError("no such algorithm"))
    async with working(engine) as (queue, _):
        for _ in range(2):
            (job,) = fresh(1)
            await queue.submit(job)
            (result,) = await results(queue, [job])
            assert result.error_code is None
            await until(lambda: not engine.is_due)
    assert engine.calls == ["pass", "prepare"] * 2


async def test_a_device_lost_in_a_preparation_ends_the_worker() -> None:
    engine = PreparingEngine(error=EngineBrokenError("gone"))

    async def work() -> None:
        async with working(engine) as (queue, worker):
            (job,) = fresh(1)
            await queue.submit(job)
            await results(queue, [job])
            await until(lambda: not worker.is_warm)

    with pytest.raises(EngineBrokenError, match="gone"):
        await asyncio.wait_for(work(), 20)
