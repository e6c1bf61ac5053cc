"""Whole runs recorded once and replayed, with static buffers, and what is kept of them.

A `Recorder` hides the device: `CudaRecorder` captures a CUDA graph, `EagerRecorder` runs the same logic again and so
tests it anywhere.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recofuse_core.model import ALL_OUTPUTS, Conditioning, FusionOutput, FusionPlan, ReCoFuse, require_finite
from recofuse_core.sampler import NoiseSource, Pair, seeded_noise

Results = tuple[Tensor, ...]


class Recorder(Protocol):
    """Turns a function over fixed buffers into one that can be run again and again, and moves data to and from them."""

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """What repeats `function` on the buffers that it read now, and the fixed tensors that its results appear in."""

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies from and to without help of the processor."""

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start to fill each first tensor, a static buffer, from the second; what is run next sees the new content."""

    def run(self, replay: Callable[[], None]) -> None:
        """Start a recorded function."""

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Fill each first tensor from the second, a result of what was run last, and wait until that is done."""


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

    def run(self, replay: Callable[[], None]) -> None:
        """See Recorder."""
        replay()

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""
        self.upload(pairs)


class CudaRecorder:
    """CUDA graphs that share one memory pool, replayed on a stream of their own; copies go over a second one.

    Graphs of one pool may share memory for everything but what they keep (inputs lie outside the pool), so the results
    of one must be copied out before another is run; `download` waits for exactly that.
    """

    NUM_WARM_RUNS = 2  # the first picks algorithms and allocates workspaces, which a capture must not do

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """See Recorder."""
        self.compute.wait_stream(torch.cuda.current_stream(self.device))
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False),
            torch.cuda.stream(self.compute),
        ):
            for _ in range(self.NUM_WARM_RUNS):
                function()
            self.compute.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread of the process may use the device during the capture.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.compute, capture_error_mode="thread_local"):
                results = function()
        return graph.replay, results

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Recorder."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""
        self.copies.wait_stream(self.compute)  # the last run may still read the buffers
        self.copies.wait_stream(torch.cuda.current_stream(self.device))  # the sources may lie on the device
        with torch.cuda.stream(self.copies):
            for buffer, source in pairs:
                buffer.copy_(source, non_blocking=True)
        self.compute.wait_stream(self.copies)

    def run(self, replay: Callable[[], None]) -> None:
        """See Recorder."""
        with torch.cuda.stream(self.compute):
            replay()

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""
        self.copies.wait_stream(self.compute)
        with torch.cuda.stream(self.copies):
            for target, result in pairs:
                target.copy_(result, non_blocking=True)
        self.copies.synchronize()


@dataclass(frozen=True)
class ProgramKey:
    """What a recorded run is good for. The dtype and device are the runtime's."""

    plan: FusionPlan
    batch: int
    height: int
    width: int
    levels: bool


class Program:
    """One recorded run: static inputs, noise and outputs, and host buffers to reach them."""

    def __init__(
        self, model: ReCoFuse, key: ProgramKey, device: torch.device, recorder: Recorder, conditions: "ScheduleCache"
    ) -> None:
        self._recorder = recorder
        dtype = torch.uint8 if key.levels else torch.float32
        size = (key.height, key.width)
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((key.batch, c, *size), dtype) for c in (3, 1)]
        latent = model.latent_shape(key.batch, key.height, key.width)
        shapes.append(((key.plan.num_draws, 2, *latent), torch.float32))
        self._host = [recorder.host_buffer(shape, dtype) for shape, dtype in shapes]
        vis, ir, noise = self._static = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        self._names = [name for name in ALL_OUTPUTS if name in key.plan.outputs]
        for t in (*key.plan.timesteps, 0):
            conditions(t)  # made before the recording, which may not copy from the host

        def compute() -> Results:
            draws = iter(noise)
            output, is_finite = model.run(vis, ir, key.plan, lambda: Pair(*next(draws)), conditions)
            return *(getattr(output, name).contiguous() for name in self._names), is_finite

        self._replay, self._results = recorder.record(compute)
        self._host_results = [recorder.host_buffer(result.shape, result.dtype) for result in self._results]

    def __call__(self, vis: Tensor, ir: Tensor, seeds: Sequence[int]) -> FusionOutput:
        """Images of the program's shape, on the host or on the device; the result lies where they do."""
        host_vis, host_ir, host_noise = self._host
        draw: NoiseSource = seeded_noise(seeds, host_noise[0, 0])
        for slot in host_noise:
            slot[0], slot[1] = draw()
        sources = [vis, ir, host_noise]
        if vis.device.type == "cpu":
            host_vis.copy_(vis)
            host_ir.copy_(ir)
            sources = [host_vis, host_ir, host_noise]
        self._recorder.upload(list(zip(self._static, sources, strict=True)))
        self._recorder.run(self._replay)
        targets = [
            host if vis.device.type == "cpu" else torch.empty_like(result)
            for host, result in zip(self._host_results, self._results, strict=True)
        ]
        self._recorder.download(list(zip(targets, self._results, strict=True)))
        *pictures, is_finite = targets
        require_finite(is_finite)
        if vis.device.type == "cpu":
            pictures = [picture.clone() for picture in pictures]
        named = dict(zip(self._names, pictures, strict=True))
        return FusionOutput(named.get("fused"), named.get("vis"), named.get("ir"))


class ProgramCache:
    """The programs used last. A shape is recorded when asked for, or when it is met for the second time.

    So a shape that comes once costs one eager run, not a recording, and whoever is ready for it has recorded it before.
    """

    def __init__(self, max_programs: int, build: Callable[[ProgramKey], Program]) -> None:
        self._max_programs = max_programs
        self._build = build
        self._programs: OrderedDict[ProgramKey, Program] = OrderedDict()
        self._seen: OrderedDict[ProgramKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, key: ProgramKey) -> bool:
        return key in self._programs

    def get(self, key: ProgramKey, *, record: bool = False) -> Program | None:
        """The program for a key; None where it is neither recorded nor due."""
        if (program := self._programs.get(key)) is None:
            if not record and key not in self._seen:
                self._seen[key] = None
                if len(self._seen) > 8 * self._max_programs:
                    self._seen.popitem(last=False)
                return None
            while len(self._programs) >= self._max_programs:
                self._programs.popitem(last=False)  # before the recording, which takes over its memory
            program = self._programs[key] = self._build(key)
        self._programs.move_to_end(key)
        return program


class ScheduleCache:
    """The conditioning of every time step that was asked for: at most T + 1 entries, for weights that never change."""

    def __init__(self, model: ReCoFuse) -> None:
        self._model = model
        self._made: dict[int, Conditioning] = {}

    def __call__(self, t: int) -> Conditioning:
        """The conditioning of step t for the whole batch."""
        if t not in self._made:
            self._made[t] = self._model.condition(t)
        return self._made[t]
