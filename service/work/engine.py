"""The one bridge between jobs and tensors: a batch of decoded pairs in, a batch of pictures out.

An engine is called from one thread at a time. It gets pairs of one shape and one set of options and knows nothing of
queues or files. Two run the model: `TorchEngine`, on a GPU or a CPU, and `GraphEngine`, on a CPU without torch; the two
here stand in for it where the service itself is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from service.terms.activity import EngineActivity
from service.terms.errors import InvalidInputError
from service.terms.jobs import DEFAULT_EXPOSURE, Exposure, FusionOptions, Part, Sampler

Pixels = NDArray[np.uint8]
Frames = Pixels | Sequence[Pixels]  # (B, H, W, ...), or B of (H, W, ...)


class EngineBrokenError(Exception):
    """The device is lost to this process: nothing will work in it any more, though it may in another."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is running.

    batch_sizes: the sizes that it runs best, ascending; empty if it does not care. exposures: those that it offers.
    blends: whether it makes the fused picture the visible one where infrared was not measured; with others that is done
    to their pictures.
    """

    model_name: str
    model_version: str
    device: str
    default_steps: int
    default_sampler: Sampler
    batch_sizes: tuple[int, ...] = ()
    exposures: tuple[Exposure, ...] = get_args(Exposure)
    blends: bool = False

    @property
    def default_exposure(self) -> Exposure:
        """What a job that names none gets: the default where it is offered, so that every engine serves such a job."""
        return DEFAULT_EXPOSURE if DEFAULT_EXPOSURE in self.exposures else "as_shot"


@dataclass(frozen=True, slots=True)
class PassOptions:
    """What all jobs of one forward pass have in common, defaults filled in.

    is_partial: infrared was not measured everywhere, and the engine is told where.
    """

    steps: int
    sampler: Sampler
    parts: tuple[Part, ...]
    exposure: Exposure
    is_partial: bool = False

    @classmethod
    def of(cls, options: FusionOptions, engine: EngineInfo) -> Self:
        """What these options come to. Raises InvalidInputError for an exposure that the engine does not offer."""
        exposure = options.exposure or engine.default_exposure
        if exposure not in engine.exposures:
            raise InvalidInputError(
                f"exposure: the weights {engine.model_name} {engine.model_version} have no exposure estimator and "
                f"cannot give {exposure}; accepted is {', '.join(engine.exposures)}"
            )
        return cls(
            steps=options.steps or engine.default_steps,
            sampler=options.sampler or engine.default_sampler,
            parts=options.output.parts,
            exposure=exposure,
        )


class Engine(Protocol):
    """Loads, warms up, fuses. All calls block; all but `info` may take long."""

    @property
    def info(self) -> EngineInfo:
        """What is running; valid after `load`."""

    def load(self) -> None:
        """Read weights, move them to the device. Raises recofuse_core's CheckpointError or OSError."""

    def warm_up(self) -> None:
        """Run once what later passes need, so that the first request is not slower than the others."""

    @property
    def prepares_in_s(self) -> float | None:
        """Seconds until `prepare` may do something; 0 for now, None if nothing is left. Asked between passes, from any
        thread.
        """

    def prepare(self) -> None:
        """While nothing else is to do, make one thing ready that passes have shown to be wanted or the warm-up left."""

    def fuse(
        self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int], overlap: Pixels | None = None
    ) -> dict[Part, Pixels]:
        """From vis (B, H, W, 3) and ir (B, H, W) to the asked parts: fused and vis (B, H, W, 3), ir (B, H, W).

        Item i depends on its own images and seeds[i] alone. overlap: (B, H, W, 2), how far detail and tone of the fused
        picture count, 0 to 255; for engines that blend. Raises OutOfMemoryError (a smaller batch may work),
        InvalidInputError (the shape can never work), InternalError, and EngineBrokenError (nothing works any more).
        """


@runtime_checkable
class PipelinedEngine(Protocol):
    """An engine that can be given the next pass while one runs; two may be under way."""

    def start(
        self, vis: Frames, ir: Frames, options: PassOptions, seeds: list[int], overlap: Frames | None = None
    ) -> Callable[[], dict[Part, Pixels]]:
        """Begin what `Engine.fuse` does; what is returned waits for the pictures, on any thread. Both raise as it.

        Frames need not be stacked: the engine copies each to where it wants it, and needs them no more when this
        returns.
        """


@runtime_checkable
class TellingEngine(Protocol):
    """An engine that says what it does."""

    def activity(self) -> EngineActivity:
        """So far, and now; from any thread, after `load`."""


class NullEngine:
    """Costs nothing and returns its input; fused is the vis image. For measuring what the service adds."""

    @property
    def info(self) -> EngineInfo:
        """See Engine."""
        return EngineInfo("null", "1", "none", default_steps=1, default_sampler="ode1")

    def load(self) -> None:
        """Nothing to load."""

    def warm_up(self) -> None:
        """Nothing to warm up."""

    @property
    def prepares_in_s(self) -> float | None:
        """See Engine."""
        return None

    def prepare(self) -> None:
        """Nothing to prepare."""

    def fuse(
        self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int], overlap: Pixels | None = None
    ) -> dict[Part, Pixels]:
        """See Engine."""
        return {part: ir if part is Part.IR else vis for part in options.parts}


class FixedCostEngine(NullEngine):
    """Takes batch_s + B * item_s for each pass without using the processor, as a GPU would; returns its input."""

    def __init__(self, batch_s: float = 0.020, item_s: float = 0.002) -> None:
        self._batch_s = batch_s
        self._item_s = item_s

    @property
    def info(self) -> EngineInfo:
        """See Engine."""
        return EngineInfo("fixed", "1", "none", default_steps=1, default_sampler="ode1")

    def fuse(
        self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int], overlap: Pixels | None = None
    ) -> dict[Part, Pixels]:
        """See Engine."""
        time.sleep(self._batch_s + len(vis) * self._item_s)
        return super().fuse(vis, ir, options, seeds, overlap)
