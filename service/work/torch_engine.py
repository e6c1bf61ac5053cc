"""The engine that runs the model with torch, on a GPU or a CPU.

torch is imported when it loads, not before, so that a process without a model stays small and starts fast.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np

from service.terms.activity import EngineActivity
from service.terms.errors import InternalError, InvalidInputError, OutOfMemoryError
from service.terms.jobs import Exposure, Part
from service.terms.settings import EngineSettings
from service.work.engine import EngineBrokenError, EngineInfo, Frames, PassOptions, Pixels

if TYPE_CHECKING:
    from recofuse_core import Runtime
    from recofuse_core.programs import Pending

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 5e-4
GPU_HOST_THREADS = 4  # copies into pinned memory are all that is left to them


class TorchEngine:
    """Runs the networks with torch, on a CPU or one GPU."""

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
            blends=True,
        )

    def load(self) -> None:
        """See Engine."""
        import torch

        from recofuse_core import Runtime, load_pretrained
        from recofuse_core.devices import named_device
        from recofuse_core.threads import use_threads
        from recofuse_host.waiting import sleep_while_waiting

        settings = self._settings
        self._device = named_device(self._device)
        on_gpu = self._device.startswith("cuda")
        threads = use_threads(settings.num_threads, num_sharing=self._per_host)
        if on_gpu and not settings.num_threads and threads.count > GPU_HOST_THREADS:
            threads = dataclasses.replace(use_threads(GPU_HOST_THREADS), why="enough beside a GPU")
        logger.info(
            "threads of the model",
            extra={"threads": threads.count, "why": threads.why, "waiting": sleep_while_waiting().told()},
        )
        if on_gpu:
            if ":" in self._device:  # else this thread makes a context on the first GPU, too, half a gigabyte there
                torch.cuda.set_device(self._device)
            # The model's thread gives Python's lock away some eight times a batch, and would wait 5 ms each time for
            # a thread that is busy in Python.
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._runtime = Runtime(
            load_pretrained(settings.model, device=self._device),
            precision=settings.precision,
            kernels=settings.kernels,
            graphs=None if settings.graphs == "auto" else settings.graphs == "on",
            max_graphs=settings.max_graphs,
            max_graph_bytes=settings.max_graph_bytes,
            defers_recording=True,
            batch_sizes=settings.batch_sizes,
        )
        dtype = str(self._runtime.dtype).removeprefix("torch.")
        logger.info("precision of the networks", extra={"dtype": dtype, "why": self._runtime.why_dtype})
        logger.info("blocks of the model run on", extra={"kernels": self._runtime.kernels})

    def warm_up(self) -> None:
        """See Engine. A shape that fails is left out; raises what the last one raised if every one did.

        Recorded are the runs for the fused picture, which most requests ask for; those for all pictures when nothing
        else is to do.
        """
        runtime = self._loaded()
        sizes = [tuple(map(int, size.split("x"))) for size in self._settings.warm_up_sizes]
        batches = runtime.batch_sizes if runtime.records else (1,)
        shapes = [(batch, height, width) for width, height in sizes for batch in batches]
        exposure = self.info.default_exposure
        num_done, last = 0, None
        kinds: list[tuple[list[Any], bool]] = [([Part.FUSED.value], False), ([part.value for part in Part], True)]
        for outputs, later in kinds:
            record = functools.partial(runtime.record, outputs=outputs, levels=True, exposure=exposure, later=later)
            for shape in shapes:
                error = _failure_of(functools.partial(record, [shape]))
                if error is None:
                    num_done += not (later and runtime.records)
                    continue
                last = error
                logger.warning("a shape is not made ready", extra={"shape": shape, "error": str(error)})
        if last is not None and not num_done:
            raise last

    @property
    def prepares_in_s(self) -> float | None:
        """See Engine."""
        return None if self._runtime is None else self._runtime.due_in_s

    def prepare(self) -> None:
        """See Engine. Raises EngineBrokenError."""
        try:
            self._loaded().record_due()
        except RuntimeError as error:
            translated = _translated(error, (0, 0, 0))
            if isinstance(translated, EngineBrokenError):
                raise translated from error
            raise

    def activity(self) -> EngineActivity:
        """See TellingEngine."""
        return EngineActivity(**dataclasses.asdict(self._loaded().activity))

    def fuse(
        self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int], overlap: Pixels | None = None
    ) -> dict[Part, Pixels]:
        """See Engine."""
        return self.start(vis, ir, options, seeds, overlap)()

    def start(
        self, vis: Frames, ir: Frames, options: PassOptions, seeds: list[int], overlap: Frames | None = None
    ) -> Callable[[], dict[Part, Pixels]]:
        """See PipelinedEngine."""
        shape = (len(vis), *vis[0].shape)
        pending = _in_our_words(lambda: self._submitted(vis, ir, options, seeds, overlap), shape)
        return lambda: _in_our_words(lambda: _pictures(pending, options), shape)

    def _submitted(
        self, vis: Frames, ir: Frames, options: PassOptions, seeds: list[int], overlap: Frames | None
    ) -> Pending:
        return self._loaded().submit(
            vis,
            ir,
            steps=options.steps,
            sampler=options.sampler,
            seeds=seeds,
            outputs=tuple(part.value for part in options.parts),
            exposure=options.exposure,
            overlap=overlap,
        )

    def _loaded(self) -> Runtime:
        if self._runtime is None:
            raise InternalError("the model is not loaded")
        return self._runtime


def _pictures(pending: Pending, options: PassOptions) -> dict[Part, Pixels]:
    output = pending.result()
    return {part: _to_pixels(getattr(output, part.value)) for part in options.parts}


def _in_our_words(call: Callable[[], Answer], shape: tuple[int, ...]) -> Answer:
    """What a call returns; it raises what `Engine.fuse` may."""
    try:
        return call()
    except Exception as error:
        translated = _translated(error, shape)
        if translated is None:
            raise
    # Out here, so that an error of memory is tied to none of torch's as its context.
    try:
        raise translated
    finally:
        del translated  # else this frame and the error hold each other


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
