"""Pairs for branches and decoder as what stands before them delivers frames: weather taken off, unveiled, lit, toned.

What the estimators cannot do is left to the branches, so they have to meet it: streaks and flakes that stay, the rest
of a veil, the noise that lighting multiplied. A lit frame gets its camera's noise and JPEG first; the target of a dark
one is the frame without noise, its own too, under the same lighting, so that only what lighting cannot do is asked for;
that of a foggy one is the clear frame. Photographs hold what the cameras of the pairs do not resolve, which a decoder
would take for noise. docs/decisions/0017, 0038, 0041, 0052.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from recofuse_core.degradations.physics import quantise
from recofuse_core.degradations.recipes import Range, degrade_ir, degrade_vis
from recofuse_core.detail import own_noise
from recofuse_core.exposure import ExposureEstimator, brightened
from recofuse_core.losses import luma
from recofuse_core.model import ReCoFuse
from recofuse_core.sampler import Pair
from recofuse_core.training.draws import as_recorded, chance, index, unit
from recofuse_core.training.exposure import SHARES, FrameKind, FrameSource, sensed
from recofuse_core.training.pairs import Batch, DegradedFrame, PairSource, cut_batch

WEATHER = ("downpour", "snowfall", "fog")
LIT_WEATHER_PROBABILITY = 0.3
CLEAN_IR_PROBABILITY = 0.3
LIT_ALIKE = (FrameKind.DARK_PAIR, FrameKind.DARKENED, FrameKind.NIGHT, FrameKind.EMPTY)
TRULY_DARK = (FrameKind.DARK_PAIR, FrameKind.NIGHT)  # with the noise of a camera in the dark
LUMA_NOISE, COLOUR_NOISE = 4, 14  # of 255 levels of the square root
LIT_CROP = Range(0.55, 1.0)  # of a frame's sides: not so much smaller that their noise is averaged away
BAR_PROBABILITY = 0.2
OWN_NOISE, TRIES = 2.5, 4  # levels; half of all targets have less
PHOTO_DARKENING = Range(0.15, 0.7, log=True)
PHOTO_GAMMA = Range(0.8, 1.4)
LIT_SHARES = SHARES | {FrameKind.NIGHT: 0.4}  # they alone have warm people of their own before a dark road


class DeliveredSource:
    """Draws batches of whose frames a share comes lit, and of the others a share in rain, snow or fog.

    for_detail: frames come about as sharp and as noisy as they are recorded, some with a bar that no sensor saw.
    """

    def __init__(
        self,
        pairs: PairSource,
        frames: FrameSource,
        model: ReCoFuse,
        exposure: ExposureEstimator,
        *,
        lit_probability: float,
        weather_probability: float = 0.0,
        photo_probability: float = 0.0,
        for_detail: bool = False,
    ) -> None:
        self.pairs = pairs
        self.frames = frames
        self.model = model
        self.exposure = exposure
        self.lit_probability = lit_probability
        self.weather_probability = weather_probability
        self.photo_probability = photo_probability
        self.for_detail = for_detail

    def draw(self, batch_size: int, crop: int, generator: Generator) -> Batch:
        """A batch of `crop` x `crop` pairs, degraded ones as they are encoded."""
        side = max(crop, self.pairs.config.context, self.exposure.config.cells)

        def frame() -> DegradedFrame:
            if chance(self.photo_probability, generator):
                return self.photograph(side, generator)
            if chance(self.lit_probability, generator):
                return self.lit_frame(side, generator)
            return self.frame(side, generator)

        frames = (self._noiseless(frame) if self.for_detail else frame() for _ in range(batch_size))
        if self.for_detail:
            frames = (_with_bar(each, generator) if chance(BAR_PROBABILITY, generator) else each for each in frames)
        batch = cut_batch(frames, crop, generator)
        return Batch(batch.clean, batch.degraded)

    @staticmethod
    def _noiseless(draw: Callable[[], DegradedFrame]) -> DegradedFrame:
        """One whose target has no more noise of its own than OWN_NOISE, or the last of a few: noise is no detail."""
        for _ in range(TRIES):
            drawn = draw()
            if float(own_noise(luma(drawn.vis[None]))) < OWN_NOISE:
                break
        return drawn

    @torch.no_grad()
    def frame(self, side: int, generator: Generator) -> DegradedFrame:
        """One square as shot."""
        frame = self.pairs.frame(side, generator, as_recorded=self.for_detail)
        given, low_ir = frame.degraded_vis, frame.degraded_ir
        if chance(self.weather_probability, generator):
            given = _in_weather(frame.vis, generator)
            given = sensed(given, generator)
        frames, fall = self.model.cleared(self._on_device(given, low_ir))
        delivered, _ = self.model.levelled(frames, "as_shot", fall)
        return self._delivered(frame.vis, frame.ir, delivered)

    @torch.no_grad()
    def lit_frame(self, side: int, generator: Generator) -> DegradedFrame:
        """One lit square."""
        crop = None if self.for_detail else LIT_CROP
        scene, target, ir, kind = self.frames.scene(side, generator, LIT_SHARES, crop)
        fallen = scene
        if chance(LIT_WEATHER_PROBABILITY, generator) and kind is not FrameKind.EMPTY:
            fallen = _in_weather(scene.clamp(0, 1), generator)
        low_ir = degrade_ir(ir, generator, clean_probability=CLEAN_IR_PROBABILITY).image
        cleared, fall = self.model.cleared(self._on_device(sensed(fallen, generator), low_ir))
        frames = self.model.unveil(cleared, fall)
        lighting = self.exposure(*frames)
        if kind in LIT_ALIKE:
            clean = without_noise(scene) if kind in TRULY_DARK else scene.clamp(0, 1)
            clean = clean[None].to(frames.vis.device)
            # What lost a veil is another frame, of other levels: the clean one is lit by itself.
            is_unveiled = not torch.equal(frames.vis, cleared.vis)
            target = (self.exposure(clean, frames.ir) if is_unveiled else lighting)(clean)[0].cpu()
        return self._lit(frames, lighting, target, ir)

    @torch.no_grad()
    def photograph(self, side: int, generator: Generator) -> DegradedFrame:
        """One square of a sharp photograph, lit or not, a third of them without noise; infrared of another scene."""
        scene = as_recorded(self.frames.photos, side, generator)
        if chance(0.7, generator):
            ir = as_recorded(self.frames.infrared, side, generator)
        else:
            own = luma(scene[None])[0]
            ir = F.avg_pool2d(1 - own if chance(0.4, generator) else own, 3, 1, 1, count_include_pad=False)
        low_ir = degrade_ir(ir, generator, clean_probability=0.5).image
        is_lit = chance(0.5, generator)
        if is_lit and chance(0.6, generator):
            scene = (scene * PHOTO_DARKENING.draw(generator)).pow(PHOTO_GAMMA.draw(generator))
        how = unit(generator)
        if how < 0.3:
            given = quantise(scene)
        else:  # what is only soft or coded shows no noise either, and has no detail to give back
            given = sensed(scene, generator) if how < 0.8 else degrade_vis(scene, generator, "medium").image
        frames, fall = self.model.cleared(self._on_device(given, low_ir))
        if not is_lit:
            return self._delivered(scene, ir, self.model.levelled(frames, "as_shot", fall)[0])
        unveiled = self.model.unveil(frames, fall)
        lighting = self.exposure(*unveiled)
        return self._lit(unveiled, lighting, lighting(scene[None].to(unveiled.vis.device))[0].cpu(), ir)

    def _lit(self, frames: Pair, lighting: Callable[[Tensor], Tensor], target: Tensor, ir: Tensor) -> DegradedFrame:
        """A square of unveiled frames, lit and toned; ir as it should be before it is made brighter."""
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


def _with_bar(frame: DegradedFrame, generator: Generator) -> DegradedFrame:
    """A bar that no sensor saw, black or white, at the top or at the right: a lack of noise there tells nothing."""
    side = frame.vis.shape[-1]
    thickness, level = 1 + index(side // 3, generator), 0.0 if chance(0.7, generator) else 1.0
    area = np.s_[:, :thickness] if chance(0.5, generator) else np.s_[:, :, -thickness:]
    images = [image.clone() for image in frame]
    for image in images:
        image[area] = level
    return DegradedFrame(*images)


def _in_weather(vis: Tensor, generator: Generator) -> Tensor:
    kind = WEATHER[index(len(WEATHER), generator)]
    return degrade_vis(vis, generator, kinds=[kind]).image
