"""The one bridge between jobs and tensors: a batch of decoded pairs in, a batch of pictures out.

An engine is called from one thread at a time. It gets pairs of one shape and one set of options and knows nothing of
queues or files. `CoreEngine` runs the model; the two others stand in for it where the service itself is measured.

torch is imported when a CoreEngine loads, not before, so that a process without a model stays small and starts fast.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from service.terms.errors import InternalError, InvalidInputError, OutOfMemoryError
from service.terms.jobs import DEFAULT_EXPOSURE, Exposure, FusionOptions, Part, Sampler
from service.terms.settings import EngineSettings, Settings

if TYPE_CHECKING:
    from recofuse_core import Runtime

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]


class EngineBrokenError(Exception):
    """The device is lost to this process: nothing will work in it any more, though it may in another."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is running.

    batch_sizes: the sizes that it runs best, ascending; empty if it does not care. exposures: those that it offers.
    """

    model_name: str
    model_version: str
    device: str
    default_steps: int
    default_sampler: Sampler
    batch_sizes: tuple[int, ...] = ()
    exposures: tuple[Exposure, ...] = get_args(Exposure)

    @property
    def default_exposure(self) -> Exposure:
        """What a job that names none gets: the default where it is offered, so that every engine serves such a job."""
        return DEFAULT_EXPOSURE if DEFAULT_EXPOSURE in self.exposures else "as_shot"


@dataclass(frozen=True, slots=True)
class PassOptions:
    """What all jobs of one forward pass have in common, defaults filled in."""

    steps: int
    sampler: Sampler
    parts: tuple[Part, ...]
    exposure: Exposure

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
    def has_preparation(self) -> bool:
        """Whether `prepare` would do something now. Asked between passes, from any thread."""

    def prepare(self) -> None:
        """Make one thing ready that passes have shown to be wanted, while nothing else is to do."""

    def fuse(self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int]) -> dict[Part, Pixels]:
        """From vis (B, H, W, 3) and ir (B, H, W) to the asked parts: fused and vis (B, H, W, 3), ir (B, H, W).

        Item i depends on its own images and seeds[i] alone. Raises OutOfMemoryError (a smaller batch may work),
        InvalidInputError (the shape can never work), InternalError, and EngineBrokenError (nothing works any more).
        """


def build_engine(settings: Settings) -> Engine:
    """The engine that the settings ask for, not loaded yet."""
    engine = settings.engine
    if engine.kind == "null":
        return NullEngine()
    if engine.kind == "fixed":
        return FixedCostEngine(engine.fixed_batch_s, engine.fixed_item_s)
    return CoreEngine(engine.model_copy(update={"batch_sizes": settings.batch_sizes}), settings.worker.per_host)


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
    def has_preparation(self) -> bool:
        """See Engine."""
        return False

    def prepare(self) -> None:
        """Nothing to prepare."""

    def fuse(self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int]) -> dict[Part, Pixels]:
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

    def fuse(self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int]) -> dict[Part, Pixels]:
        """See Engine."""
        time.sleep(self._batch_s + len(vis) * self._item_s)
        return super().fuse(vis, ir, options, seeds)


class CoreEngine:
    """Runs recofuse_core on a CPU or one GPU."""

    def __init__(self, settings: EngineSettings, per_host: int = 1) -> None:
        self._settings = settings
        self._per_host = per_host
        self._runtime: Runtime | None = None
        self._device = settings.device

    @property
    def info(self) -> EngineInfo:
        """See Engine."""
        runtime = self._loaded()
        model = runtime.info
        return EngineInfo(
            model_name=model.name,
            model_version=model.version,
            device=self._device,
            default_steps=model.default_steps,
            default_sampler=model.default_sampler,
            batch_sizes=runtime.batch_sizes if runtime.records else (),
            exposures=get_args(Exposure) if runtime.can_light else ("as_shot",),
        )

    def load(self) -> None:
        """See Engine."""
        from recofuse_core import Runtime, load_pretrained
        from recofuse_core.devices import named_device
        from recofuse_core.threads import use_threads
        from recofuse_host.waiting import sleep_while_waiting

        settings = self._settings
        self._device = named_device(self._device)
        threads = use_threads(settings.num_threads, num_sharing=self._per_host)
        logger.info(
            "threads of the model",
            extra={"threads": threads.count, "why": threads.why, "waiting": sleep_while_waiting().told()},
        )
        self._runtime = Runtime(
            load_pretrained(settings.model, device=self._device),
            precision=settings.precision,
            graphs=None if settings.graphs == "auto" else settings.graphs == "on",
            max_graphs=settings.max_graphs,
            max_graph_bytes=settings.max_graph_bytes,
            defers_recording=True,
            batch_sizes=settings.batch_sizes,
        )

    def warm_up(self) -> None:
        """See Engine. A shape that fails is left out; raises what the last one raised if every one did."""
        runtime = self._loaded()
        sizes = [tuple(map(int, size.split("x"))) for size in self._settings.warm_up_sizes]
        batches = runtime.batch_sizes if runtime.records else (1,)
        shapes = [(batch, height, width) for width, height in sizes for batch in batches]
        exposure = self.info.default_exposure
        num_done, last = 0, None
        # The fused picture is what most requests ask for; it is recorded last, so that it stays when room is short.
        for outputs in (tuple(part.value for part in Part), (Part.FUSED.value,)):
            for shape in shapes:
                error = _failure_of(
                    functools.partial(runtime.record, [shape], outputs=outputs, levels=True, exposure=exposure)
                )
                if error is None:
                    num_done += 1
                    continue
                last = error
                logger.warning("a shape is not made ready", extra={"shape": shape, "error": str(error)})
        if last is not None and not num_done:
            raise last

    @property
    def has_preparation(self) -> bool:
        """See Engine."""
        return self._runtime is not None and self._runtime.has_due

    def prepare(self) -> None:
        """See Engine. Raises EngineBrokenError."""
        try:
            self._loaded().record_due()
        except RuntimeError as error:
            translated = _translated(error, (0, 0, 0))
            if isinstance(translated, EngineBrokenError):
                raise translated from error
            raise

    def fuse(self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int]) -> dict[Part, Pixels]:
        """See Engine."""
        try:
            return self._fused(vis, ir, options, seeds)
        except Exception as error:
            translated = _translated(error, vis.shape)
            if translated is None:
                raise
        # Out here, so that an error of memory is tied to none of torch's as its context.
        try:
            raise translated
        finally:
            del translated  # else this frame and the error hold each other

    def _fused(self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int]) -> dict[Part, Pixels]:
        import torch

        output = self._loaded().fuse(
            torch.from_numpy(vis).permute(0, 3, 1, 2),
            torch.from_numpy(ir).unsqueeze(1),
            steps=options.steps,
            sampler=options.sampler,
            seeds=seeds,
            outputs=tuple(part.value for part in options.parts),
            exposure=options.exposure,
        )
        return {part: _to_pixels(getattr(output, part.value)) for part in options.parts}

    def _loaded(self) -> Runtime:
        if self._runtime is None:
            raise InternalError("the model is not loaded")
        return self._runtime


def _to_pixels(levels: Any) -> Pixels:
    """(B, C, H, W) levels to (B, H, W, 3) or, for one channel, (B, H, W)."""
    levels = levels[:, 0] if levels.shape[1] == 1 else levels.permute(0, 2, 3, 1)
    return np.ascontiguousarray(levels.numpy())


def _translated(error: Exception, shape: tuple[int, ...]) -> Exception | None:
    """The only place where the core's and torch's errors become the service's; None for one that is no error of theirs.

    What the failed run held is free again, whatever it was.
    """
    from recofuse_core.errors import CoreError, ShapeError
    from recofuse_core.faults import Fault, fault_of, let_go

    let_go(error)
    if isinstance(error, ShapeError):
        translated: Exception = InvalidInputError(str(error))
    elif isinstance(error, CoreError):
        translated = InternalError("the model failed on this pair")
    elif (fault := fault_of(error)) is Fault.MEMORY:
        _give_back_memory()
        return OutOfMemoryError(f"{shape[0]} images of {shape[2]}x{shape[1]} do not fit into memory")
    elif fault is Fault.BROKEN:
        translated = EngineBrokenError(f"the device is lost to this process: {str(error).splitlines()[0]}")
    else:
        return None
    translated.__cause__ = error
    return translated


def _failure_of(run: Callable[[], None]) -> Exception | None:
    """What a run failed with, holding nothing; an error that ends the process passes."""
    from recofuse_core.faults import Fault, fault_of, let_go

    try:
        run()
    except RuntimeError as error:
        if fault_of(error) is Fault.BROKEN:
            raise
        let_go(error)
        return error.with_traceback(None)
    return None


def _give_back_memory() -> None:
    """What torch keeps for later is lost to cuBLAS, cuDNN and graphs, which allocate for themselves."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
