"""How a function over fixed buffers becomes one that is replayed, and how data comes to it and from it.

A `Recorder` hides the device: `CudaRecorder` captures a CUDA graph, `EagerRecorder` runs the same logic again and so
tests it anywhere. Uploads, runs and downloads go side by side on a GPU, so that the next batch is on its way while one
runs; what a run reads and writes is therefore not what is uploaded and downloaded, but a copy of it that the run makes.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from recofuse_core.arithmetic import full_float32

Results = tuple[Tensor, ...]


class Recorder(Protocol):
    """Turns a function over fixed buffers into one that can be run again and again, and moves data to and from them."""

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """What repeats `function` on the buffers that it read now, and the fixed tensors that its results appear in."""

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies from and to without help of the processor."""

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start to fill each first tensor, which no run under way uses, from the second; later runs see it filled."""

    def run(self, work: Callable[[], None]) -> None:
        """Start work, replays and copies on the device, after all that was started by `run` before."""

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Start to fill each first tensor from the second, as the last run leaves it. What is returned waits for it."""

    def reserved_bytes(self) -> int:
        """Bytes of the device's memory that this process has taken, whatever for."""


class EagerRecorder:
    """Runs the function again instead of replaying it. For devices without graphs, and for tests of what uses them."""

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """See Recorder."""
        fixed = tuple(result.clone() for result in function())

        def replay() -> None:
            for buffer, result in zip(fixed, function(), strict=True):
                buffer.copy_(result)

        return replay, fixed

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Recorder."""
        return torch.empty(tuple(shape), dtype=dtype)

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""
        for buffer, source in pairs:
            buffer.copy_(source)

    def run(self, work: Callable[[], None]) -> None:
        """See Recorder."""
        work()

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """See Recorder."""
        for target, result in pairs:
            target.copy_(result)
        return _nothing

    def reserved_bytes(self) -> int:
        """See Recorder; host memory is not watched."""
        return 0


def _nothing() -> None:
    """What is to be waited for where everything is done at once."""


class CudaRecorder:
    """CUDA graphs that share one memory pool, replayed on a stream of their own; copies go over two others.

    Graphs of one pool may share memory for everything but what they keep (inputs lie outside the pool), so what one has
    computed must be copied out, within the same `run`, before another is replayed.

    cuBLAS's workspaces lie outside the pool, too, and graphs know their addresses: nothing may clear them
    (`torch._C._cuda_clearCublasWorkspaces`) while a graph lives.
    """

    NUM_WARM_RUNS = 2  # the first picks algorithms and allocates workspaces, which a capture must not do

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.uploads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.downloads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """See Recorder."""
        self.compute.wait_stream(torch.cuda.current_stream(self.device))
        with full_float32(by_trial=True), torch.cuda.stream(self.compute):
            for _ in range(self.NUM_WARM_RUNS):
                function()
            self.compute.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: another thread of the process may use the device during the capture.
                with torch.cuda.graph(graph, pool=self.pool, stream=self.compute, capture_error_mode="thread_local"):
                    results = function()
            except BaseException:
                # A capture that broke off keeps its hold on the pool; the next ones get another.
                self.pool = torch.cuda.graph_pool_handle()
                raise
        return graph.replay, results

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Recorder."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""
        self.uploads.wait_stream(torch.cuda.current_stream(self.device))  # the sources may lie on the device
        with torch.cuda.stream(self.uploads):
            for buffer, source in pairs:
                buffer.copy_(source, non_blocking=True)

    def run(self, work: Callable[[], None]) -> None:
        """See Recorder."""
        self.compute.wait_stream(self.uploads)
        self.compute.wait_stream(torch.cuda.current_stream(self.device))  # what work reads may have been made there
        with torch.cuda.stream(self.compute):
            work()

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """See Recorder. The waiting thread sleeps."""
        self.downloads.wait_stream(self.compute)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.downloads):
            for target, result in pairs:
                target.copy_(result, non_blocking=True)
            done.record()
        wait: Callable[[], None] = done.synchronize
        return wait

    def reserved_bytes(self) -> int:
        """See Recorder."""
        return torch.cuda.memory_reserved(self.device)
