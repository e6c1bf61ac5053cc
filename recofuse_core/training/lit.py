"""Pairs for what stands behind the lighting: frames as it delivers them, with the noise that it multiplied.

A dark, foggy or empty frame gets its camera's noise and JPEG first, then the estimator's lighting, and the branches
meet what came of both. The target of a dark frame is the frame without noise under the same lighting, so that only what
lighting cannot do is asked of them; that of a foggy one is the clear frame. docs/decisions/0017.
"""

import torch
from torch import Generator

from recofuse_core.degradations.recipes import degrade_ir, degrade_vis
from recofuse_core.exposure import ExposureEstimator
from recofuse_core.training.exposure import FrameKind, FrameSource, sensed
from recofuse_core.training.pairs import Batch, DegradedFrame, PairSource, cut_batch

WEATHER = ("downpour", "snowfall", "fog")
WEATHER_PROBABILITY = 0.3
CLEAN_IR_PROBABILITY = 0.3
LIT_ALIKE = (FrameKind.DARK_PAIR, FrameKind.DARKENED, FrameKind.NIGHT, FrameKind.EMPTY)


class LitSource:
    """Draws batches as `PairSource` does, of which a share comes from `frames`, lit by `estimator`."""

    def __init__(
        self, pairs: PairSource, frames: FrameSource, estimator: ExposureEstimator, lit_probability: float
    ) -> None:
        self.pairs = pairs
        self.frames = frames
        self.estimator = estimator
        self.lit_probability = lit_probability

    def draw(self, batch_size: int, crop: int, generator: Generator) -> Batch:
        """A batch of `crop` x `crop` pairs; the context is the whole of each frame, lit if its pair is."""
        side = max(crop, self.pairs.config.context, self.estimator.config.cells)

        def frame() -> DegradedFrame:
            if float(torch.rand((), generator=generator)) < self.lit_probability:
                return self.lit_frame(side, generator)
            return self.pairs.frame(side, generator)

        return cut_batch((frame() for _ in range(batch_size)), crop, generator)

    @torch.no_grad()
    def lit_frame(self, side: int, generator: Generator) -> DegradedFrame:
        """One square as lighting delivers it, and what should come of it."""
        scene, target, ir, kind = self.frames.scene(side, generator)
        if float(torch.rand((), generator=generator)) < WEATHER_PROBABILITY and kind is not FrameKind.EMPTY:
            weather = WEATHER[int(torch.randint(len(WEATHER), (), generator=generator))]
            fallen = degrade_vis(scene.clamp(0, 1), generator, kinds=[weather]).image
        else:
            fallen = scene
        low_ir = degrade_ir(ir, generator, clean_probability=CLEAN_IR_PROBABILITY).image
        given = sensed(fallen, generator)
        device = next(self.estimator.parameters()).device
        lighting = self.estimator(given[None].to(device), low_ir[None].to(device))
        if kind in LIT_ALIKE:
            target = lighting(scene.clamp(0, 1)[None].to(device))[0].cpu()
        return DegradedFrame(target, ir, lighting(given[None].to(device))[0].cpu(), low_ir)
