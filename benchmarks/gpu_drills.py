"""What becomes of jobs when a GPU fails: drills of `make check-gpu`, each in a process of its own.

    python -m benchmarks.gpu_drills memory|lost|replays

memory: batches that do not fit are halved until they do, and every job is answered. lost: a kernel fails an assertion,
after which nothing works in the process; the worker ends, no job fails, and those without a picture wait for another
worker. replays: recorded runs and nothing else, for `compute-sanitizer` to look into.

The engine and the worker are the real ones; only what breaks the device is an argument, so that a CPU can show that
the drills see what they are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.load import picture_pair
from recofuse_core.kernels.choice import KernelChoice
from recofuse_core.precision import Precision
from service.command.processes import new_metrics
from service.queue.memory import MemoryQueue
from service.terms.jobs import FusionJob, FusionOptions, JobStatus, Part, new_job_id
from service.terms.settings import EngineSettings, Settings
from service.work.engine import Engine, EngineBrokenError, Frames, PassOptions, Pixels
from service.work.torch_engine import TorchEngine
from service.work.worker import Worker

SIZE = (640, 480)  # width, height
NUM_JOBS = 28
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Served:
    """What became of jobs, in numbers. is_lost: the engine ended its worker."""

    succeeded: int
    failed: int
    waiting: int
    halved: int
    is_lost: bool


async def serve(engine: Engine, num_jobs: int = NUM_JOBS, size: tuple[int, int] = SIZE) -> Served:
    """Give a worker jobs until all are answered or its engine is lost."""
    # Full batches wherever there are jobs enough, however slowly they are decoded.
    values: dict[str, dict[str, Any]] = {
        "worker": {"id": "drill", "drain_timeout_s": 20.0},
        "batch": {"max_wait_s": 5.0},
    }
    settings = Settings.from_values(values)
    queue, metrics = MemoryQueue(settings.queue), new_metrics()
    worker = Worker(queue, engine, settings, metrics)
    width, height = size
    vis, ir = picture_pair(width, height)
    jobs = [
        FusionJob(
            id=new_job_id(),
            vis=vis,
            ir=ir,
            width=width,
            height=height,
            created_s=time.time(),
            options=FusionOptions(seed=seed),
            keep_result=True,
        )
        for seed in range(num_jobs)
    ]
    for job in jobs:
        await queue.submit(job)
    running = asyncio.create_task(worker.run())

    async def answered() -> None:
        await asyncio.gather(*(queue.wait_result(job.id, timeout_s=PATIENCE_S) for job in jobs))

    answers = asyncio.create_task(answered())
    await asyncio.wait([running, answers], return_when=asyncio.FIRST_COMPLETED)
    answers.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await answers
    worker.stop()
    is_lost = False
    try:
        await running
    except EngineBrokenError:
        is_lost = True
    found = [(await queue.view(job.id)).status for job in jobs]
    return Served(
        found.count(JobStatus.SUCCEEDED),
        found.count(JobStatus.FAILED),
        sum(not status.is_final for status in found),
        int(metrics.registry.get_sample_value("recofuse_batches_split_total") or 0),
        is_lost,
    )


def drill_memory(engine: Engine) -> tuple[bool, str]:
    """engine: one in whose memory a batch of eight does not fit, and a pair does."""
    served = asyncio.run(serve(engine))
    passed = served.succeeded == NUM_JOBS and served.halved > 0 and not served.is_lost
    return passed, f"{served.succeeded} of {NUM_JOBS} jobs answered, {served.halved} batches halved"


def drill_lost(engine: Engine) -> tuple[bool, str]:
    """engine: one whose device is lost in a pass after the first."""
    served = asyncio.run(serve(engine))
    passed = served.is_lost and not served.failed and served.succeeded > 0 and served.waiting > 0
    line = f"{served.succeeded} of {NUM_JOBS} jobs answered before, {served.failed} failed, {served.waiting} wait"
    return passed, f"{line}; the worker {'ended' if served.is_lost else 'went on'}"


class DyingEngine(TorchEngine):
    """Breaks the device with its third pass: the first has ended by then, since two may be under way."""

    def __init__(self, settings: EngineSettings, break_device: Callable[[], None]) -> None:
        super().__init__(settings)
        self._break_device = break_device
        self._num_passes = 0

    def start(
        self, vis: Frames, ir: Frames, options: PassOptions, seeds: list[int], overlap: Frames | None = None
    ) -> Callable[[], dict[Part, Pixels]]:
        """See PipelinedEngine."""
        self._num_passes += 1
        if self._num_passes == 3:
            self._break_device()
        return super().start(vis, ir, options, seeds, overlap)


class TightEngine(TorchEngine):
    """Takes three times what a pair needs of the device's memory, and no more."""

    def load(self) -> None:
        """See Engine."""
        super().load()
        runtime, (width, height) = self._loaded(), SIZE
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        runtime.fuse(torch.zeros(1, 3, height, width).byte(), torch.zeros(1, 1, height, width).byte())
        needed = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3 * needed) / total)


def _fail_an_assertion() -> None:
    """On the device: an index that is out of range. It is noticed later."""
    torch.zeros(4, device="cuda")[torch.full((1,), 99, device="cuda")]


def replays(
    device: str = "cuda",
    *,
    kinds: Sequence[KernelChoice] = (),
    precision: Precision = "float16",
    size: tuple[int, int] = (128, 96),
    num: int = 3,
) -> tuple[bool, str]:
    """Recorded runs of a few kinds: short and long, on torch's kernels and on all of ours, where these can be compiled.

    Nothing is tried before, since whatever watches memory takes many times as long for all of it.
    """
    from recofuse_core.checkpoint import load_pretrained
    from recofuse_core.kernels.needs import look
    from recofuse_core.runtime import Runtime

    model = load_pretrained("compact", device=device)
    width, height = size
    vis = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    told, all_recorded = [], True
    lacks = look().lacks if not kinds else ()
    for kernels in kinds or (("eager",) if lacks else ("eager", "triton")):
        runtime = Runtime(model, precision=precision, kernels=kernels, graphs=True)
        for steps in (2, 12):
            runtime.record([(2, height, width)], steps=steps, levels=True)
            for _ in range(num):
                runtime.fuse(vis, vis[:, :1], steps=steps)
        found = runtime.activity
        all_recorded &= found.programs == 2 and not found.eager_runs
        told.append(f"{found.recorded_runs} recorded runs on {kernels}")
    return all_recorded, "; ".join([*told, *lacks])


def main(name: str) -> int:
    """Run one of the drills on the GPU; returns 0 if it passed."""
    settings = EngineSettings(device="cuda", warm_up_sizes=())
    drills: dict[str, Callable[[], tuple[bool, str]]] = {
        "memory": lambda: drill_memory(TightEngine(settings.model_copy(update={"graphs": "off"}))),
        "lost": lambda: drill_lost(DyingEngine(settings, _fail_an_assertion)),
        "replays": replays,
    }
    passed, line = drills[name]()
    print(line)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
