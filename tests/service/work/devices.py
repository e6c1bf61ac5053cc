"""A device that does no work, but has a size: what a run allocates takes room until nothing refers to it any more.

`MeteredRuntime` stands where the core's `Runtime` does, so that the engine and the worker above it are the real ones.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from recofuse_core.frames import Images, together
from recofuse_core.picture import FusionOutput, ModelInfo, OutputName
from recofuse_core.program_cache import Activity
from recofuse_core.programs import Pending
from recofuse_core.runtime import Runtime
from service.terms.jobs import Part
from service.terms.settings import EngineSettings
from service.work.engine import Frames, PassOptions, Pixels
from service.work.torch_engine import TorchEngine


class Block:
    """Room on the device, for as long as it is referred to."""

    def __init__(self, units: int) -> None:
        self.units = units


@dataclass
class MeteredDevice:
    """room: units that it has. refused: how large the allocations were that did not fit."""

    room: int
    refused: list[int] = field(default_factory=list)
    blocks: weakref.WeakSet[Block] = field(default_factory=weakref.WeakSet)

    @property
    def used(self) -> int:
        return sum(block.units for block in self.blocks)

    def allocate(self, units: int) -> Block:
        if self.used + units > self.room:
            self.refused.append(units)
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {units} units")
        block = Block(units)
        self.blocks.add(block)
        return block


@dataclass
class MeteredRuntime:
    """A pair takes three units: two while it is encoded, one more while it is sampled. Answers vis and ir.

    faults: by the number of the run, from 0, what it raises in place of an answer, deep within.
    """

    device: MeteredDevice
    faults: Callable[[int], Exception | None] = lambda number: None
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    records: bool = False
    due_in_s: float | None = None
    can_light: bool = False
    batches: list[int] = field(default_factory=list)
    activity: Activity = field(default_factory=Activity)
    info = ModelInfo("metered", "1", "", 3, "ode2", 0)

    def submit(self, *images: Images, **options: Any) -> Pending:
        output = self.fuse(*map(together, images), **options)
        return Pending(lambda: output)

    def fuse(self, vis: Tensor, ir: Tensor, *, outputs: Collection[OutputName], **options: object) -> FusionOutput:
        self.batches.append(len(vis))
        latents = [self.device.allocate(len(vis)) for _ in range(2)]
        self._sample(latents)
        pictures: dict[str, Tensor] = {"fused": vis, "vis": vis, "ir": ir}
        return FusionOutput(*(pictures[name] if name in outputs else None for name in ("fused", "vis", "ir")))

    def _sample(self, latents: list[Block]) -> None:
        state = self.device.allocate(latents[0].units)
        error = self.faults(len(self.batches) - 1)
        if error is not None:
            raise error
        assert state.units


class MeteredEngine(TorchEngine):
    """The real bridge over such a runtime, loaded from the start; passes wait for `gate`."""

    def __init__(self, runtime: MeteredRuntime) -> None:
        super().__init__(EngineSettings())
        self._runtime = cast(Runtime, runtime)
        self.gate, self.started = threading.Event(), threading.Event()
        self.gate.set()

    def load(self) -> None: ...

    def warm_up(self) -> None: ...

    def start(
        self, vis: Frames, ir: Frames, options: PassOptions, seeds: list[int], overlap: Frames | None = None
    ) -> Callable[[], dict[Part, Pixels]]:
        self.started.set()
        assert self.gate.wait(30)
        return super().start(vis, ir, options, seeds, overlap)


def cuda_error(words: str) -> RuntimeError:
    """An error of CUDA as torch reports it."""
    kind: Any = getattr(torch, "AcceleratorError", RuntimeError)
    error: RuntimeError = kind(
        f"CUDA error: {words}\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
        "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    )
    return error
