"""Recorded runs: their buffers, and how a batch goes through them.

A run of few steps is one recording. Of a longer one the beginning, one step and the end are recorded; the step is
replayed with its numbers, its conditioning and its noise in buffers (stepping.py). So a run of 100 steps is as small
as one of one, and one recording serves any number of steps.

A batch is `submit`ted and its result waited for, so that the next one can be put into the other set of buffers
meanwhile. Levels lie as files and cameras have them, channel beside channel (B, H, W, C), on the host, on the device
and in the results: nothing is transposed on the host. The host copies a frame once, to where the device takes it from;
results are handed out where the device has put them.
"""

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recofuse_core.brightening import Brightening
from recofuse_core.finishing import Finishing
from recofuse_core.frames import Images, is_on_host, put, together
from recofuse_core.model import Conditions, Constants, ReCoFuse, TorchNetworks
from recofuse_core.overlap import Floats, Overlap
from recofuse_core.picture import (
    ALL_OUTPUTS,
    Encoded,
    Frame,
    FusionOutput,
    FusionPlan,
    OutputName,
    require_finite,
)
from recofuse_core.recording import Recorder, Results
from recofuse_core.sampler import Pair, num_draws
from recofuse_core.stepping import Numbers, advanced, limits_of
from recofuse_core.supplies import Supplies, num_bytes

MAX_UNROLLED_STEPS = 8  # of one recording; a step of the published model is a thousand kernels


@dataclass(frozen=True)
class ProgramKey:
    """What a recorded run is good for. The dtype and device are the runtime's.

    plan: without time steps for a program that runs any number of them. partial: infrared was not measured everywhere.
    """

    plan: FusionPlan
    batch: int
    height: int
    width: int
    levels: bool
    partial: bool = False

    @classmethod
    def of(
        cls, plan: FusionPlan, batch: int, height: int, width: int, *, levels: bool, partial: bool = False
    ) -> "ProgramKey":
        """The key of a plan for images of a size."""
        is_long = len(plan.timesteps) > MAX_UNROLLED_STEPS
        return cls(replace(plan, timesteps=()) if is_long else plan, batch, height, width, levels, partial)


class Pending:
    """A run that was started. Its result may be asked for from any thread, once."""

    def __init__(self, finish: Callable[[], FusionOutput]) -> None:
        self._finish: Callable[[], FusionOutput] | None = finish
        self._output: FusionOutput | None = None
        self._error: Exception | None = None
        self._lock = threading.Lock()

    @property
    def is_settled(self) -> bool:
        """Whether nothing is to be waited for."""
        return self._finish is None

    def settle(self) -> None:
        """Wait until the run has ended, however it ended."""
        with self._lock:
            if self._finish is None:
                return
            try:
                self._output = self._finish()
            except Exception as error:  # noqa: BLE001 - it is raised to whoever asks for the result
                self._error = error
            self._finish = None

    def result(self) -> FusionOutput:
        """Wait, and give the result or raise what the run failed with."""
        self.settle()
        output, error, self._output, self._error = self._output, self._error, None, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # else this frame and the error hold each other
        if output is None:
            raise RuntimeError("the result of a run was asked for twice")
        return output


class _Buffers:
    """One batch on its way: host memory and the device's, in and out."""

    def __init__(self, inputs: Sequence[Tensor], results: Sequence[Tensor], recorder: Recorder) -> None:
        self.host_inputs = [_host_like(tensor, recorder) for tensor in inputs]
        self.inputs = [torch.empty_like(tensor).zero_() for tensor in inputs]
        self.results = [torch.empty_like(tensor) for tensor in results]
        self.pending: Pending | None = None

    @property
    def is_free(self) -> bool:
        return self.pending is None or self.pending.is_settled

    @property
    def size_bytes(self) -> int:
        return sum(map(num_bytes, (self.host_inputs, self.inputs, self.results)))


class Program(ABC):
    """What was recorded for one kind of run, and two sets of buffers to reach it."""

    NUM_SETS = 2

    def __init__(
        self, model: ReCoFuse, key: ProgramKey, device: torch.device, recorder: Recorder, supplies: Supplies
    ) -> None:
        self._model = model
        self._key = key
        self._recorder = recorder
        self._supplies = supplies
        reserved_before = recorder.reserved_bytes()
        dtype = torch.uint8 if key.levels else torch.float32
        self._layout = torch.channels_last if key.levels else torch.contiguous_format
        kinds = [(3, dtype, self._layout), (1, dtype, self._layout)]
        if key.partial:
            kinds.append((2, torch.uint8, torch.channels_last))
        self._images = [
            torch.zeros(key.batch, channels, key.height, key.width, dtype=kind, device=device).contiguous(
                memory_format=layout
            )
            for channels, kind, layout in kinds
        ]
        self._constants: Constants = {}
        self._names = [name for name in ALL_OUTPUTS if name in key.plan.outputs]
        self._static = list(self._images)
        self._results = self._record(device)
        # Programs share a pool, so this is what it added to it, but never less than what is its own.
        own = num_bytes(self._static) + num_bytes(self._results)
        grown = recorder.reserved_bytes() - reserved_before
        self._sets = [_Buffers(self._images, self._results, recorder) for _ in range(self.NUM_SETS)]
        self.size_bytes = max(own, grown) + sum(buffers.size_bytes for buffers in self._sets)

    @abstractmethod
    def _record(self, device: torch.device) -> Results:
        """Make the other static buffers, record what is to be replayed; the pictures, and whether they are finite."""

    @abstractmethod
    def _replay(self, seeds: Sequence[int], timesteps: tuple[int, ...]) -> Callable[[], None]:
        """What is to be run once the images are in place. What it reads is made already."""

    def submit(self, images: Sequence[Images], seeds: Sequence[int], timesteps: tuple[int, ...]) -> Pending:
        """Start a run of images of the program's shape, on the host or on the device; the result lies where they do.

        images: vis, ir and, for one that is partial, the levels of `Overlap`. They are copied, or held until it has
        ended. Waits for the run before the last, whose buffers this one takes.
        """
        buffers = self._free_set()
        from_host = is_on_host(images[0])
        sources = []
        for frames, buffer in zip(images, buffers.host_inputs, strict=True):
            if is_on_host(frames):
                put(frames, buffer)
            sources.append(buffer if is_on_host(frames) else together(frames))
        self._recorder.upload(list(zip(buffers.inputs, sources, strict=True)))
        replay = self._replay(seeds, timesteps)

        def work() -> None:
            _copy(buffers.inputs, self._images)
            replay()
            _copy(self._results, buffers.results)

        self._recorder.run(work)
        # The caller's own. On the host torch takes such memory again once nothing that was handed out lies in it.
        targets = [
            _host_like(result, self._recorder) if from_host else torch.empty_like(result) for result in buffers.results
        ]
        wait = self._recorder.download(list(zip(targets, buffers.results, strict=True)))
        held = [] if from_host else sources  # until they were read
        buffers.pending = Pending(functools.partial(self._finished, wait, targets, held))
        return buffers.pending

    def settle(self) -> None:
        """Wait until all runs of it have ended, however they ended."""
        for buffers in self._sets:
            if buffers.pending is not None:
                buffers.pending.settle()

    def _free_set(self) -> _Buffers:
        """One that nothing is under way in, the one used longest ago if that takes waiting."""
        free = next(
            (each for each in reversed(self._sets) if each.is_free), self._sets[0]
        )  # the last is still in caches
        if free.pending is not None:
            free.pending.settle()
        self._sets.remove(free)
        self._sets.append(free)
        return free

    @torch.inference_mode()
    def _finished(self, wait: Callable[[], None], targets: list[Tensor], held: list[Tensor]) -> FusionOutput:
        wait()
        held.clear()
        *pictures, is_finite = targets
        require_finite(is_finite)
        named = dict(zip(self._names, pictures, strict=True))
        return FusionOutput(named.get("fused"), named.get("vis"), named.get("ir"))

    def _overlap(self) -> Overlap | None:
        """What blends, of the levels that lie in the buffers now."""
        return Overlap(self._images[2].float() / 255, self._on_device) if self._key.partial else None

    def _on_device(self, matrix: Floats) -> Tensor:
        """A matrix that is made once for good, and so lives as long as what is made of it."""
        key = id(matrix)
        if key not in self._constants:
            self._constants[key] = torch.from_numpy(matrix).to(self._images[0].device), matrix
        made: Tensor = self._constants[key][0]
        return made

    def _laid_out(self, pictures: dict[OutputName, Tensor], is_finite: Tensor) -> Results:
        return *(pictures[name].contiguous(memory_format=self._layout) for name in self._names), is_finite


class WholeProgram(Program):
    """A run of few steps in one recording."""

    def _record(self, device: torch.device) -> Results:
        model, key, conditions = self._model, self._key, self._supplies.conditions
        shape = model.latent_shape(key.batch, key.height, key.width)
        self._noise = noise = torch.zeros(key.plan.num_draws, 2, *shape, device=device)
        self._static.append(noise)
        self._seeds: list[int] = []  # whose noise lies there
        for t in (*key.plan.timesteps, 0):
            conditions(t)  # made before the recording, which may not copy from the host
        vis, ir = self._images[:2]

        def compute() -> Results:
            draws = iter(noise)
            output, is_finite = model.run(
                vis,
                ir,
                key.plan,
                lambda: Pair(*next(draws)),
                conditions,
                overlap=self._overlap(),
                constants=self._constants,
            )
            return self._laid_out({name: getattr(output, name) for name in self._names}, is_finite)

        self._run, results = self._recorder.record(compute)
        return results

    def _replay(self, seeds: Sequence[int], timesteps: tuple[int, ...]) -> Callable[[], None]:
        def replay() -> None:
            known: Sequence[int | None] = self._seeds or [None] * len(seeds)
            self._seeds = []  # nobody knows what lies there if this fails
            count, shape = len(self._noise), self._noise.shape[-3:]
            for item, (seed, before) in enumerate(zip(seeds, known, strict=True)):
                if seed != before:
                    self._noise[:, :, item].copy_(self._supplies.noise(seed, count, shape))
            self._seeds = list(seeds)
            self._run()

        return replay


class SteppedProgram(Program):
    """A run of any number of steps: a beginning, one step and an end."""

    def _record(self, device: torch.device) -> Results:
        model, key, supplies = self._model, self._key, self._supplies
        sampler, size = key.plan.sampler, (key.height, key.width)
        batch, channels, height, width = model.latent_shape(key.batch, *size)
        is_second_order = sampler == "ode2"
        is_limited = model.config.denoiser.prediction == "noise" and sampler != "euler"

        def both(count: int = batch) -> Tensor:
            """Of both modalities, channels last as the networks have them."""
            return torch.zeros(2, count, height, width, channels, device=device).permute(0, 1, 4, 2, 3)

        self._noise, state, mu, previous = both(), both(), both(), both(batch if is_second_order else 0)
        self._row = torch.zeros(len(Numbers._fields), device=device)
        self._block = torch.zeros_like(supplies.conditions.packed(0))
        low, high = (torch.zeros(2, key.batch, 1, 1, 1, device=device) for _ in range(2))
        how_treated, *of_lit = (torch.zeros(key.batch, 1, 1, 1, device=device) for _ in range(3))
        brightening = Brightening(*of_lit)
        self._static += [self._noise, state, mu, previous, self._row, self._block, low, high, how_treated, *brightening]
        numbers = Numbers(*self._row)
        conditioning = supplies.conditions.seen_in(self._block)
        frame = self._frame(lambda t: conditioning)
        noise = self._noise
        vis, ir = self._images[:2]

        def begin() -> Results:
            images, brightened_by, treated = model.prepared(vis, ir, key.plan.exposure)
            encoded = frame.encode(images)
            for degraded, place in zip(encoded.mu, mu, strict=True):
                place.copy_(degraded)
            for limit, place in zip(limits_of(mu) if is_limited else (), (low, high), strict=is_limited):
                place.copy_(limit)
            state.copy_(torch.addcmul(mu, noise, numbers.spread))
            if is_second_order:
                previous.zero_()
            if brightened_by is not None:
                for value, place in zip(brightened_by, brightening, strict=True):
                    place.copy_(value)
            if treated is not None:
                how_treated.copy_(treated)
            return (*encoded.frames, *encoded.vis_skips, *encoded.ir_skips)

        def step() -> Results:
            prediction = frame.predict(Pair(*state), Pair(*mu), 0)  # of the time step in the block
            new, clean = advanced(
                sampler, numbers, prediction, state, mu, limits=(low, high), previous=previous, draw=noise
            )
            state.copy_(new)
            if is_second_order:
                previous.copy_(clean)
            return ()

        def end() -> Results:
            images, skips = Pair(*begun[:2]), begun[2:]
            count = len(skips) // 2
            overlap = self._overlap()
            tone = None if overlap is None else overlap.tone
            brightened_by = brightening if key.plan.exposure == "lit" else None
            finish = Finishing(model.finish, levels=key.levels, tone=tone, brightened_by=brightened_by)
            encoded = Encoded(images, Pair(*mu), skips[:count], skips[count:])
            pictures = self._frame(supplies.conditions).pictures(Pair(*state), encoded, finish, overlap, how_treated)
            return self._laid_out(pictures, finish.is_finite)

        self._begin, begun = self._recorder.record(begin)
        self._step, _ = self._recorder.record(step)
        self._end, results = self._recorder.record(end)
        self._static += begun
        return results

    def _frame(self, conditions: Conditions) -> Frame:
        networks = TorchNetworks(self._model, conditions, coupled=self._key.plan.coupled, constants=self._constants)
        return Frame(networks, self._key.plan, (self._key.height, self._key.width))

    def _replay(self, seeds: Sequence[int], timesteps: tuple[int, ...]) -> Callable[[], None]:
        supplies, plan = self._supplies, replace(self._key.plan, timesteps=timesteps)
        rows = supplies.tables(plan)
        blocks = [supplies.conditions.packed(t) for t in timesteps]
        draws = supplies.noise.one_by_one(seeds, plan.num_draws, self._noise.shape[-3:])
        draws_each = num_draws(plan.sampler, 1) > 1

        def replay() -> None:
            self._row.copy_(rows[0])
            self._put_noise(next(draws), seeds)
            self._begin()
            for row, block in zip(rows, blocks, strict=True):
                self._row.copy_(row)
                self._block.copy_(block)
                if draws_each:
                    self._put_noise(next(draws), seeds)
                self._step()
            next(draws, None)
            self._end()

        return replay

    def _put_noise(self, drawn: dict[int, Tensor], seeds: Sequence[int]) -> None:
        if len(drawn) == 1:
            self._noise.copy_(drawn[seeds[0]][:, None])
            return
        for item, seed in enumerate(seeds):
            self._noise[:, item].copy_(drawn[seed])


def build_program(
    model: ReCoFuse, key: ProgramKey, device: torch.device, recorder: Recorder, supplies: Supplies
) -> Program:
    """Record what a key stands for."""
    kind = WholeProgram if key.plan.timesteps else SteppedProgram
    return kind(model, key, device, recorder, supplies)


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _host_like(tensor: Tensor, recorder: Recorder) -> Tensor:
    """A host buffer of a tensor's shape and layout."""
    if tensor.ndim != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        return recorder.host_buffer(tensor.shape, tensor.dtype)
    batch, channels, height, width = tensor.shape
    return recorder.host_buffer((batch, height, width, channels), tensor.dtype).permute(0, 3, 1, 2)
