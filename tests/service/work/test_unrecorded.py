"""A worker on a device that can record no pass, whatever the reason: every job has its picture all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import pytest
import torch

from recofuse_core.recording import EagerRecorder, Results
from recofuse_core.runtime import Runtime
from service.terms.jobs import Part
from tests.core.tiny import tiny_model
from tests.service.work.devices import MeteredEngine, MeteredRuntime, cuda_error
from tests.service.work.workers import one_and_eight, until, working

ERRORS = {
    "capture": cuda_error("operation not permitted when stream is capturing"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "other": RuntimeError("no such algorithm"),
}


class UnableRecorder(EagerRecorder):
    """Runs what it is to record, and fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.num_tried = 0

    def record(self, function: Callable[[], Results]) -> NoReturn:
        """See Recorder."""
        self.num_tried += 1
        function()
        raise self.error


@pytest.mark.parametrize("is_deferred", [True, False], ids=["when idle", "in a pass"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
async def test_jobs_are_answered_where_nothing_can_be_recorded(error: Exception, is_deferred: bool) -> None:
    recorder = UnableRecorder(error)
    runtime = Runtime(tiny_model(), precision="float32", graphs=True, recorder=recorder, defers_recording=is_deferred)
    assert runtime._programs is not None
    runtime._programs.RECORDING_SHARE = 1.0  # it need not wait between two
    engine = MeteredEngine(cast(MeteredRuntime, runtime))
    found: list[Any] = []
    async with working(engine) as (queue, worker):
        for _ in range(3):
            found += await one_and_eight(engine, queue, worker)
            await until(lambda: runtime.due_in_s is None)
    assert [result.error_code for result in found] == [None] * 27
    assert all(result.images[Part.FUSED] for result in found)
    assert recorder.num_tried == 2  # batches of one and of eight, once each
    told = runtime.activity
    assert (told.recorded_runs, told.eager_runs, told.failed_recordings) == (0, 6, 2)
