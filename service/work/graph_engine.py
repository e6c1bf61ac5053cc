"""The engine that runs the model's graphs with ONNX Runtime, on a CPU and without torch.

What it needs is imported when it loads, not before.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, get_args

import numpy as np

from service.terms.errors import InternalError, InvalidInputError, OutOfMemoryError
from service.terms.jobs import Exposure, Part
from service.terms.settings import EngineSettings
from service.work.engine import EngineInfo, PassOptions, Pixels

if TYPE_CHECKING:
    from recofuse_core.graphs.runtime import GraphRuntime

logger = logging.getLogger(__name__)


class GraphEngine:
    """Runs the networks as graphs."""

    def __init__(self, settings: EngineSettings, per_host: int = 1) -> None:
        self._settings = settings
        self._per_host = per_host
        self._runtime: GraphRuntime | None = None

    @property
    def info(self) -> EngineInfo:
        """See Engine."""
        runtime = self._loaded()
        model = runtime.info
        return EngineInfo(
            model_name=model.name,
            model_version=model.version,
            device="cpu",
            default_steps=model.default_steps,
            default_sampler=model.default_sampler,
            exposures=get_args(Exposure) if runtime.can_light else ("as_shot",),
            blends=True,
        )

    def load(self) -> None:
        """See Engine."""
        from recofuse_core.graphs.runtime import GraphRuntime

        settings = self._settings
        self._runtime = GraphRuntime(settings.model, num_threads=settings.num_threads, num_sharing=self._per_host)
        threads = self._runtime.threads
        logger.info("threads of the model", extra={"threads": threads.count, "why": threads.why, "waiting": "asleep"})

    def warm_up(self) -> None:
        """See Engine."""
        options = PassOptions(
            self.info.default_steps, self.info.default_sampler, tuple(Part), self.info.default_exposure
        )
        for size in self._settings.warm_up_sizes:
            width, height = map(int, size.split("x"))
            vis = np.zeros((1, height, width, 3), np.uint8)
            self.fuse(vis, vis[..., 0], options, [0])

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
        from recofuse_core.errors import CoreError, ShapeError

        try:
            output = self._loaded().fuse(
                vis.transpose(0, 3, 1, 2),
                ir[:, None],
                steps=options.steps,
                sampler=options.sampler,
                seeds=seeds,
                outputs=tuple(part.value for part in options.parts),
                exposure=options.exposure,
                overlap=overlap,
            )
        except ShapeError as error:
            raise InvalidInputError(str(error)) from error
        except CoreError as error:
            raise InternalError("the model failed on this pair") from error
        except MemoryError:
            size = f"{vis.shape[2]}x{vis.shape[1]}"
            raise OutOfMemoryError(f"{len(vis)} images of {size} do not fit into memory") from None
        return {part: _to_pixels(getattr(output, part.value)) for part in options.parts}

    def _loaded(self) -> GraphRuntime:
        if self._runtime is None:
            raise InternalError("the model is not loaded")
        return self._runtime


def _to_pixels(levels: Pixels) -> Pixels:
    """(B, C, H, W) to (B, H, W, 3) or, for one channel, (B, H, W)."""
    return np.ascontiguousarray(levels[:, 0] if levels.shape[1] == 1 else levels.transpose(0, 2, 3, 1))
