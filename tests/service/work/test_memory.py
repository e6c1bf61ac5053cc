"""A batch that does not fit: its halves do, because nothing keeps what the failed pass had in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from service.terms.errors import ErrorCode
from tests.service.work.devices import MeteredDevice, MeteredEngine, MeteredRuntime, cuda_error
from tests.service.work.workers import fresh, one_and_eight, results, working


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """What only the collector would find is not free in time on a device either."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def fuse_nine(runtime: MeteredRuntime) -> None:
    """One pair that is under way, and eight that wait meanwhile. All have their pictures in the end."""
    engine = MeteredEngine(runtime)
    async with working(engine) as (queue, worker):
        found = await one_and_eight(engine, queue, worker)
    assert [result.error_code for result in found] == [None] * 9


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (24, [1, 8]),
        (23, [1, 8, 4, 4]),
        (12, [1, 8, 4, 4]),
        (11, [1, 8, 4, 2, 2, 4, 2, 2]),
        (5, [1, 8, *[4, 2, 1, 1, 2, 1, 1] * 2]),
        (3, [1, 8, *[4, 2, 1, 1, 2, 1, 1] * 2]),
    ],
)
async def test_halves_of_what_did_not_fit_have_the_whole_device(room: int, expected: list[int]) -> None:
    runtime = MeteredRuntime(MeteredDevice(room))
    await fuse_nine(runtime)
    assert runtime.batches == expected
    assert runtime.device.used == 0


async def test_after_an_error_of_another_kind_the_halves_have_the_whole_device_too() -> None:
    """The pass fails with all that it needs in memory, and half of it would not fit beside that."""
    runtime = MeteredRuntime(
        MeteredDevice(24), faults=lambda number: cuda_error("invalid argument") if number == 1 else None
    )
    await fuse_nine(runtime)
    assert runtime.batches == [1, 8, 4, 4]
    assert runtime.device.refused == []


async def test_a_size_that_did_not_fit_is_not_tried_again() -> None:
    runtime = MeteredRuntime(MeteredDevice(12))
    engine = MeteredEngine(runtime)
    async with working(engine) as (queue, worker):
        for _ in range(2):
            found = await one_and_eight(engine, queue, worker)
            assert [result.error_code for result in found] == [None] * 9
    assert runtime.batches == [1, 8, 4, 4, 1, 4, 4]


@pytest.mark.parametrize("words", ["out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
async def test_one_pair_that_does_not_fit_is_told_so(words: str) -> None:
    runtime = MeteredRuntime(MeteredDevice(3), faults=lambda number: cuda_error(words))
    async with working(MeteredEngine(runtime)) as (queue, _):
        jobs = fresh(1)
        await queue.submit(jobs[0])
        (result,) = await results(queue, jobs)
    assert result.error_code is ErrorCode.OUT_OF_MEMORY
    assert result.error_message == "1 images of 64x48 do not fit into memory"
    assert runtime.device.used == 0
