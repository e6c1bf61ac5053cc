"""Pairs for the branches as what stands before them delivers frames: weather taken off, unveiled, lit or not, toned.

What the estimators cannot do is left to the branches, so they have to meet it: streaks and flakes that stay, the rest
of a veil, the noise that lighting multiplied. A lit frame gets its camera's noise and JPEG first; the target of a dark
one is the frame without noise, its own too, under the same lighting, so that only what lighting cannot do is asked for;
that of a foggy one is the clear frame. docs/decisions/0017, 0038, 0041.
"""

import cv2
import numpy as np
import torch
from torch import Generator, Tensor

from recofuse_core.degradations.recipes import Range, degrade_ir, degrade_vis
from recofuse_core.exposure import ExposureEstimator, brightened
from recofuse_core.model import ReCoFuse
from recofuse_core.sampler import Pair
from recofuse_core.training.exposure import SHARES, FrameKind, FrameSource, sensed
from recofuse_core.training.pairs import Batch, DegradedFrame, PairSource, cut_batch

WEATHER = ("downpour", "snowfall", "fog")
LIT_WEATHER_PROBABILITY = 0.3
CLEAN_IR_PROBABILITY = 0.3
LIT_ALIKE = (FrameKind.DARK_PAIR, FrameKind.DARKENED, FrameKind.NIGHT, FrameKind.EMPTY)
LUMA_NOISE, COLOUR_NOISE = 4, 14  # of 255 levels of the square root
LIT_CROP = Range(0.55, 1.0)  # of a frame's sides: not so much smaller that their noise is averaged away
LIT_SHARES = SHARES | {FrameKind.NIGHT: 0.4}  # they alone have warm people of their own before a dark road


class DeliveredSource:
    """Draws batches of whose frames a share comes lit, and of the others a share in rain, snow or fog."""

    def __init__(
        self,
        pairs: PairSource,
        frames: FrameSource,
        model: ReCoFuse,
        exposure: ExposureEstimator,
        *,
        lit_probability: float,
        weather_probability: float = 0.0,
    ) -> None:
        self.pairs = pairs
        self.frames = frames
        self.model = model
        self.exposure = exposure
        self.lit_probability = lit_probability
        self.weather_probability = weather_probability

    def draw(self, batch_size: int, crop: int, generator: Generator) -> Batch:
        """A batch of `crop` x `crop` pairs, degraded ones as they are encoded."""
        side = max(crop, self.pairs.config.context, self.exposure.config.cells)

        def frame() -> DegradedFrame:
            if float(torch.rand((), generator=generator)) < self.lit_probability:
                return self.lit_frame(side, generator)
            return self.frame(side, generator)

        batch = cut_batch((frame() for _ in range(batch_size)), crop, generator)
        return Batch(batch.clean, batch.degraded)

    @torch.no_grad()
    def frame(self, side: int, generator: Generator) -> DegradedFrame:
        """One square as shot."""
        frame = self.pairs.frame(side, generator)
        given, low_ir = frame.degraded_vis, frame.degraded_ir
        if float(torch.rand((), generator=generator)) < self.weather_probability:
            given = _in_weather(frame.vis, generator)
            given = sensed(given, generator)
        frames = self.model.clear(self._on_device(given, low_ir))
        delivered, _ = self.model.levelled(frames, "as_shot")
        return self._delivered(frame.vis, frame.ir, delivered)

    @torch.no_grad()
    def lit_frame(self, side: int, generator: Generator) -> DegradedFrame:
        """One lit square."""
        scene, target, ir, kind = self.frames.scene(side, generator, LIT_SHARES, LIT_CROP)
        fallen = scene
        if float(torch.rand((), generator=generator)) < LIT_WEATHER_PROBABILITY and kind is not FrameKind.EMPTY:
            fallen = _in_weather(scene.clamp(0, 1), generator)
        low_ir = degrade_ir(ir, generator, clean_probability=CLEAN_IR_PROBABILITY).image
        cleared = self.model.clear(self._on_device(sensed(fallen, generator), low_ir))
        frames = self.model.unveil(cleared)
        lighting = self.exposure(*frames)
        if kind in LIT_ALIKE:
            clean = without_noise(scene) if kind is FrameKind.NIGHT else scene.clamp(0, 1)
            clean = clean[None].to(frames.vis.device)
            # What lost a veil is another frame, of other levels: the clean one is lit by itself.
            is_unveiled = not torch.equal(frames.vis, cleared.vis)
            target = (self.exposure(clean, frames.ir) if is_unveiled else lighting)(clean)[0].cpu()
        toned = self.model.normalise(Pair(lighting(frames.vis), frames.ir))
        delivered, by = brightened(toned, frames.vis)
        return self._delivered(target, by(ir[None].to(toned.ir.device))[0].cpu(), delivered)

    def _on_device(self, vis: Tensor, ir: Tensor) -> Pair:
        device = next(self.exposure.parameters()).device
        return Pair(vis[None].to(device), ir[None].to(device))

    @staticmethod
    def _delivered(vis: Tensor, ir: Tensor, delivered: Pair) -> DegradedFrame:
        """Targets (C, S, S), and what comes of a batch of one."""
        return DegradedFrame(vis, ir, delivered.vis[0].cpu(), delivered.ir[0].cpu())


def without_noise(night: Tensor) -> Tensor:
    """A real night (3, H, W) in [0, 1] without most of its own noise, by non-local means of its square root.

    Without it the target of a lit night had the noise of its camera, and so had what was restored.
    """
    roots = (255 * night.clamp(0, 1).sqrt()).round().byte().permute(1, 2, 0).contiguous().numpy()
    calm = cv2.fastNlMeansDenoisingColored(roots, None, LUMA_NOISE, COLOUR_NOISE, 5, 15)
    return torch.from_numpy(calm.astype(np.float32) / 255).square().permute(2, 0, 1).contiguous()


def _in_weather(vis: Tensor, generator: Generator) -> Tensor:
    kind = WEATHER[int(torch.randint(len(WEATHER), (), generator=generator))]
    return degrade_vis(vis, generator, kinds=[kind]).image
