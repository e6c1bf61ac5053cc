"""What a batch costs the model's thread beside a GPU that would take no time: the host's part."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.engine import NAMED_SIZE
from benchmarks.simulated_capture import DEVICE, SimulatedRecorder, simulation, small
from recofuse_core.model import build_model
from recofuse_core.picture import Exposure, OutputName
from recofuse_core.runtime import Runtime


class HostRecorder(SimulatedRecorder):
    """Leaves out what a GPU does by itself, runs and transfers; so what is left is the host's work."""

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""

    def run(self, work: Callable[[], None]) -> None:
        """See Recorder."""

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """See Recorder. The last result says whether all is finite."""
        pairs[-1][0].fill_(True)
        return lambda: None


class HostWork(NamedTuple):
    """Processor time of the model's thread for a batch of 640x480 through the service's engine, least of some runs.

    Frames are put together, staged, and made pictures of; what a GPU would do meanwhile takes no time.
    copying_ms: what copying as many bytes as the frames have takes in between, which is the floor.
    """

    ms: float
    copying_ms: float


def host_work(batch: int = 8, repeats: int = 15, exposure: Exposure | None = None) -> HostWork:
    """See HostWork. exposure: the rendition, the service's default unless named."""
    from service.terms.jobs import FusionOptions
    from service.terms.settings import EngineSettings
    from service.work.engine import PassOptions
    from service.work.torch_engine import TorchEngine

    with DEVICE:
        model = build_model(small("compact")).eval()
    engine = TorchEngine(EngineSettings())
    engine._runtime = Runtime(
        model, precision="bfloat16", graphs=True, stacked=True, recorder=HostRecorder(), batch_sizes=(batch,)
    )
    options = PassOptions.of(FusionOptions(exposure=exposure), engine.info)
    fused: tuple[OutputName, ...] = ("fused",)
    width, height = NAMED_SIZE
    vis = [np.full((height, width, 3), item, np.uint8) for item in range(batch)]
    ir = [np.full((height, width), item, np.uint8) for item in range(batch)]
    source = np.ones(sum(frame.nbytes for frame in (*vis, *ir)), np.uint8)
    target = np.zeros_like(source)

    def spent_on(work: Callable[[], object]) -> float:
        started = time.thread_time()
        work()
        return time.thread_time() - started

    with simulation():
        engine._runtime.record([(batch, height, width)], outputs=fused, levels=True, exposure=options.exposure)
        spent = [
            (
                spent_on(lambda: engine.start(vis, ir, options, [0] * batch)()),
                spent_on(lambda: np.copyto(target, source)),
            )
            for _ in range(repeats)
        ]
    return HostWork(*(1e3 * min(each) for each in zip(*spent, strict=True)))
