"""Whole runs recorded once and replayed, with static buffers, and what is kept of them.

A `Recorder` hides the device: `CudaRecorder` captures a CUDA graph, `EagerRecorder` runs the same logic again and so
tests it anywhere.
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recofuse_core.arithmetic import full_float32
from recofuse_core.faults import Fault, fault_of, let_go
from recofuse_core.model import Conditioning, ReCoFuse, noise_like
from recofuse_core.picture import ALL_OUTPUTS, FusionOutput, FusionPlan, require_finite
from recofuse_core.sampler import Pair

logger = logging.getLogger(__name__)

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

    def run(self, replay: Callable[[], None]) -> None:
        """See Recorder."""
        replay()

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""
        self.upload(pairs)

    def reserved_bytes(self) -> int:
        """See Recorder; host memory is not watched."""
        return 0


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

    def reserved_bytes(self) -> int:
        """See Recorder."""
        return torch.cuda.memory_reserved(self.device)


@dataclass(frozen=True)
class ProgramKey:
    """What a recorded run is good for. The dtype and device are the runtime's."""

    plan: FusionPlan
    batch: int
    height: int
    width: int
    levels: bool


class NoiseCache:
    """The noise of seeds, drawn once and kept on the device: most requests name no seed, and so the same one."""

    def __init__(self, device: torch.device, max_bytes: int = 256 * 1024**2) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._drawn: OrderedDict[tuple[int, int, tuple[int, ...]], Tensor] = OrderedDict()  # used longest ago first

    def __call__(self, seed: int, num_draws: int, shape: Sequence[int]) -> Tensor:
        """(num_draws, 2, *shape): what `noise_like` draws for one item of `shape` (C, h, w), vis and ir."""
        key = (seed, num_draws, tuple(shape))
        if key not in self._drawn:
            draw = noise_like([seed], torch.empty(1, *shape))
            drawn = torch.stack([torch.cat(draw()) for _ in range(num_draws)])
            self._drawn[key] = drawn.to(self._device)
            while len(self._drawn) > 1 and num_bytes(self._drawn.values()) > self._max_bytes:
                self._drawn.popitem(last=False)
        self._drawn.move_to_end(key)
        return self._drawn[key]


class Program:
    """One recorded run: static inputs, noise and outputs, and host buffers to reach them.

    Levels lie as files and cameras have them, channel beside channel (B, H, W, C), on the host, on the device and in
    the results: nothing is transposed on the host, and what is copied is copied as one block.
    """

    def __init__(
        self,
        model: ReCoFuse,
        key: ProgramKey,
        device: torch.device,
        recorder: Recorder,
        conditions: "ScheduleCache",
        noise_of: NoiseCache,
    ) -> None:
        self._recorder = recorder
        self._noise_of = noise_of
        reserved_before = recorder.reserved_bytes()
        dtype = torch.uint8 if key.levels else torch.float32
        layout = torch.channels_last if key.levels else torch.contiguous_format
        shapes = [(key.batch, channels, key.height, key.width) for channels in (3, 1)]
        self._host = [
            _host_like(torch.empty(s, dtype=dtype, device="meta", memory_format=layout), recorder) for s in shapes
        ]
        vis, ir = (torch.empty_like(host, device=device).zero_() for host in self._host)
        latent = model.latent_shape(key.batch, key.height, key.width)
        noise = torch.zeros(key.plan.num_draws, 2, *latent, device=device)
        self._static = [vis, ir, noise]
        self._seeds: list[int] = []  # whose noise lies there
        self._names = [name for name in ALL_OUTPUTS if name in key.plan.outputs]
        for t in (*key.plan.timesteps, 0):
            conditions(t)  # made before the recording, which may not copy from the host

        def compute() -> Results:
            draws = iter(noise)
            output, is_finite = model.run(vis, ir, key.plan, lambda: Pair(*next(draws)), conditions)
            pictures = (getattr(output, name) for name in self._names)
            return *(picture.contiguous(memory_format=layout) for picture in pictures), is_finite

        self._replay, self._results = recorder.record(compute)
        self._host_results = [_host_like(result, recorder) for result in self._results]
        # Programs share a pool, so this is what it added to it, but never less than what is its own.
        own = num_bytes(self._static) + num_bytes(self._results)
        grown = recorder.reserved_bytes() - reserved_before
        self.size_bytes = max(own, grown) + num_bytes(self._host) + num_bytes(self._host_results)

    def __call__(self, vis: Tensor, ir: Tensor, seeds: Sequence[int]) -> FusionOutput:
        """Images of the program's shape, on the host or on the device; the result lies where they do."""
        is_on_host = vis.device.type == "cpu"
        sources = [vis, ir]
        if is_on_host:
            for host, source in zip(self._host, sources, strict=True):
                host.copy_(source)
            sources = self._host
        *images, noise = self._static
        new_noise = self._new_noise(noise, seeds)  # held until the run has ended, whatever the cache lets go
        self._seeds = []  # nobody knows what lies there if the upload fails
        self._recorder.upload([*zip(images, sources, strict=True), *new_noise])
        self._seeds = list(seeds)
        self._recorder.run(self._replay)
        targets = [
            host if is_on_host else torch.empty_like(result)
            for host, result in zip(self._host_results, self._results, strict=True)
        ]
        self._recorder.download(list(zip(targets, self._results, strict=True)))
        *pictures, is_finite = targets
        require_finite(is_finite)
        if is_on_host:
            pictures = [picture.clone() for picture in pictures]
        named = dict(zip(self._names, pictures, strict=True))
        return FusionOutput(named.get("fused"), named.get("vis"), named.get("ir"))

    def _new_noise(self, noise: Tensor, seeds: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The items of the static noise that are to change, each with what it becomes."""
        known: Sequence[int | None] = self._seeds or [None] * len(seeds)
        return [
            (noise[:, :, item], self._noise_of(seed, len(noise), noise.shape[-3:]))
            for item, (seed, before) in enumerate(zip(seeds, known, strict=True))
            if seed != before
        ]


def _host_like(tensor: Tensor, recorder: Recorder) -> Tensor:
    """A host buffer of a tensor's shape and layout."""
    if tensor.ndim != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        return recorder.host_buffer(tensor.shape, tensor.dtype)
    batch, channels, height, width = tensor.shape
    return recorder.host_buffer((batch, height, width, channels), tensor.dtype).permute(0, 3, 1, 2)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class ProgramCache:
    """Recorded runs, bounded in number and bytes, admitted by use.

    A shape is due when it was met twice; so one that comes once costs one eager run, not a recording. Where there is no
    room, a new shape takes the place of the one used least, if it is used more: 17 shapes in turn on 16 places are 16
    programs and one that stays eager, not a recording each. Uses fade, so that what was hot yesterday gives way. Shapes
    recorded by name (`record`), which somebody vouched for, are always admitted and count as used `VOUCHED` times.

    A deferred cache leaves what is due to idle moments (`record_due`), and beyond `OVERDUE` uses to `get` after all; it
    records for at most a tenth of the time, whatever callers ask for.

    What cannot be recorded is refused for good and runs eagerly; after `MAX_FAILED_CAPTURES` of them, everything does.
    """

    VOUCHED = 16
    HALF_LIFE = 1024  # lookups after which a use counts half
    RECORDING_SHARE = 0.1
    OVERDUE = 64  # uses after which a due shape does not wait for an idle moment any longer
    MAX_FAILED_CAPTURES = 3

    def __init__(
        self,
        max_programs: int,
        build: Callable[[ProgramKey], Program],
        *,
        max_bytes: int = 0,
        is_deferred: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_bytes: of all programs, 0: no bound. is_deferred: what is due waits for `record_due`."""
        self._max_programs = max_programs
        self._max_bytes = max_bytes
        self._build = build
        self._is_deferred = is_deferred
        self._clock = clock
        self._programs: OrderedDict[ProgramKey, Program] = OrderedDict()  # used longest ago first
        self._uses: OrderedDict[ProgramKey, float] = OrderedDict()
        self._refused: set[ProgramKey] = set()
        self._due: OrderedDict[ProgramKey, None] = OrderedDict()
        self._num_lookups = 0
        self._num_failed_captures = 0
        self._record_from_s = -math.inf

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, key: ProgramKey) -> bool:
        return key in self._programs

    @property
    def size_bytes(self) -> int:
        """Bytes that all programs hold."""
        return sum(program.size_bytes for program in self._programs.values())

    @property
    def is_off(self) -> bool:
        """Whether recording was given up."""
        return self._num_failed_captures >= self.MAX_FAILED_CAPTURES

    def get(self, key: ProgramKey, *, record: bool = False) -> Program | None:
        """The program for a key; None where the run is to be eager. record: make it now, whoever has to go."""
        self._count(key, self.VOUCHED if record else 1)
        if (program := self._programs.get(key)) is not None:
            self._programs.move_to_end(key)
            return program
        if key in self._refused or self.is_off:
            return None
        if record:
            return self._record(key)
        if self._uses[key] < 2 or not self._is_worth_it(key):
            return None
        if not self._is_deferred or (self._uses[key] >= self.OVERDUE and self._may_record()):
            return self._record(key)
        self._due[key] = None
        return None

    @property
    def has_due(self) -> bool:
        """Whether `record_due` would record something now."""
        return bool(self._due) and self._may_record()

    def record_due(self) -> bool:
        """Record the one of the due shapes that is used most; False if there was none, or it is too soon."""
        if not self._may_record():
            return False
        while self._due:
            key = max(self._due, key=lambda due: self._uses.get(due, 0))
            del self._due[key]
            if key not in self._programs and key not in self._refused and self._is_worth_it(key):
                return self._record(key) is not None
        return False

    def _may_record(self) -> bool:
        return not self.is_off and self._clock() >= self._record_from_s

    def _is_worth_it(self, key: ProgramKey) -> bool:
        """Whether there is room, or a program that is used clearly less."""
        if not self._is_full():
            return True
        return self._uses[key] > self._uses.get(self._victim(), 0) + 1

    def _is_full(self) -> bool:
        return len(self._programs) >= self._max_programs or 0 < self._max_bytes <= self.size_bytes

    def _victim(self) -> ProgramKey:
        return min(self._programs, key=lambda key: self._uses.get(key, 0))  # the one used longest ago of several

    def _record(self, key: ProgramKey) -> Program | None:
        while self._programs and self._is_full():
            del self._programs[self._victim()]  # before the recording, which takes over its memory
        self._due.pop(key, None)
        started_s = self._clock()
        try:
            program = self._build(key)
        except (RuntimeError, MemoryError) as error:
            fault = fault_of(error)
            if fault is Fault.BROKEN:
                raise
            let_go(error)
            self._refused.add(key)
            self._num_failed_captures += fault is not Fault.MEMORY
            reason = str(error).partition("\n")[0]
            logger.warning("a run cannot be recorded and stays eager", extra={"key": str(key), "error": reason})
            if self.is_off:
                logger.error("recording is given up: all runs are eager from now on", extra={"error": reason})
            return None
        finally:
            ended_s = self._clock()
            self._record_from_s = ended_s + (ended_s - started_s) * (1 / self.RECORDING_SHARE - 1)
        self._programs[key] = program
        # What is too large for all others together stays: it was worth it.
        while len(self._programs) > 1 and 0 < self._max_bytes < self.size_bytes:
            del self._programs[min((k for k in self._programs if k != key), key=lambda k: self._uses.get(k, 0))]
        return program

    def _count(self, key: ProgramKey, uses: int) -> None:
        self._uses[key] = self._uses.get(key, 0) + uses
        self._uses.move_to_end(key)
        while len(self._uses) > 8 * self._max_programs:
            gone, _ = self._uses.popitem(last=False)
            self._due.pop(gone, None)
        self._num_lookups += 1
        if self._num_lookups % self.HALF_LIFE == 0:
            for known in self._uses:
                self._uses[known] /= 2


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
