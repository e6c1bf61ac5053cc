"""ReCoFuse: autoencoder, two denoising branches, latent fusion and the SDE, assembled: image pair in, fused out."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.arithmetic import full_float32
from recofuse_core.errors import ConfigError, NumericsError, ShapeError
from recofuse_core.exposure import Exposure, ExposureConfig, ExposureEstimator, require_exposure
from recofuse_core.losses import luma
from recofuse_core.networks import (
    AutoencoderConfig,
    BlockModulations,
    DenoiserConfig,
    DualDenoiser,
    FusionConfig,
    GatedAutoencoderConfig,
    LatentFusion,
    PaperAutoencoderConfig,
    Skips,
    ToneConfig,
    ToneEstimator,
    build_autoencoder,
    pad_to_multiple,
)
from recofuse_core.sampler import (
    SAMPLERS,
    NoiseSource,
    Pair,
    Prediction,
    SamplerName,
    late_start,
    num_draws,
    plan_timesteps,
    seeded_noise,
)
from recofuse_core.sde import MeanRevertingSDE, SDEConfig
from recofuse_core.tiling import Mosaic, Tile, TilingConfig, blend, plan_tiles

OutputName = Literal["fused", "vis", "ir"]
Coupling = Literal["every_step", "late", "none"]
ALL_OUTPUTS: tuple[OutputName, ...] = ("fused", "vis", "ir")
MIN_SIDE = 32
LATENT_FACTOR = 8
PADDING = 16  # images are padded to multiples of it


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape of a model, and how it is sampled unless the caller says otherwise.

    coupling: where TIM acts. "every_step" is the paper's; "late" fuses the restored latents alone, "none" takes their
    mean instead (both ablations, docs/ablations.md).
    widening: how far the range of the fused image is widened towards black and white, see `widen_range`.
    """

    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig
    fusion: FusionConfig
    sde: SDEConfig
    tone: ToneConfig | None = None
    exposure: ExposureConfig | None = None
    sampler: SamplerName = "euler"
    steps: int = 100
    coupling: Coupling = "every_step"
    widening: float = 0.0

    def __post_init__(self) -> None:
        channels = {self.autoencoder.latent_channels, self.denoiser.latent_channels, self.fusion.latent_channels}
        if len(channels) != 1:
            raise ConfigError(f"the networks disagree on the number of latent channels: {sorted(channels)}")
        if not 1 <= self.steps <= self.sde.num_steps:
            raise ConfigError(f"default steps must be within 1..{self.sde.num_steps}, got {self.steps}")
        if not 0 <= self.widening < 1:
            raise ConfigError(f"widening must be at least 0 and below 1, got {self.widening}")


PRESETS = {
    "paper": ModelConfig(
        PaperAutoencoderConfig(), DenoiserConfig(), FusionConfig(), SDEConfig(), sampler="ode1", steps=20
    ),
    "compact": ModelConfig(
        GatedAutoencoderConfig(decoder_blocks=(4, 4)),
        DenoiserConfig(
            latent_channels=16,
            width=48,
            encoder_blocks=(2, 4),
            middle_blocks=6,
            decoder_blocks=(2, 2),
            time_dim=64,
            prediction="clean",
        ),
        FusionConfig(latent_channels=16, context_pool=4),
        SDEConfig(),
        tone=ToneConfig(width=512),
        exposure=ExposureConfig(),
        sampler="ode2",
        steps=2,
        widening=0.4,
    ),
}


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, for people and for response headers."""

    name: str
    version: str
    preset: str
    default_steps: int
    default_sampler: SamplerName
    num_parameters: int
    provenance: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class FusionOutput:
    """Images in [0, 1], or uint8 levels if the input was; None where not asked for.

    fused, vis: (B, 3, H, W). ir: (B, 1, H, W). latents: the restored latents, both (B, C, h, w), from which the next
    frame of a sequence may start; None from a `Runtime`.
    """

    fused: Tensor | None
    vis: Tensor | None
    ir: Tensor | None
    latents: Pair | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class FusionPlan:
    """A checked request without its images: hashable, and all that decides what is computed for a shape."""

    sampler: SamplerName
    timesteps: tuple[int, ...]
    outputs: frozenset[OutputName]
    coupled: bool
    tiling: TilingConfig
    exposure: Exposure = "as_shot"

    @property
    def num_draws(self) -> int:
        """Pairs of noise that a run draws."""
        return num_draws(self.sampler, len(self.timesteps))

    def tiles(self, height: int, width: int) -> bool:
        """Whether a frame of this size is worked on in tiles."""
        return _padded(height) * _padded(width) > self.tiling.max_pixels


class Conditioning(NamedTuple):
    """What the networks make of a time step alone (no image enters it): TIM's share and both branches'."""

    fusion: tuple[Tensor, ...]
    denoiser: tuple[BlockModulations, BlockModulations]


Conditions = Callable[[int], Conditioning]


class ReCoFuse(nn.Module):
    """The assembled model. It remembers no image, so one instance may serve many requests in turn."""

    def __init__(self, config: ModelConfig, *, name: str = "untrained", version: str = "0", preset: str = "") -> None:
        super().__init__()
        self.config = config
        self.autoencoder = build_autoencoder(config.autoencoder)
        self.denoiser = DualDenoiser(config.denoiser)
        self.fusion = LatentFusion(config.fusion)
        self.sde = MeanRevertingSDE(config.sde)
        self.tone = None if config.tone is None else ToneEstimator(config.tone)
        self.exposure = None if config.exposure is None else ExposureEstimator(config.exposure)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the fast layout of every network
        self.info = ModelInfo(
            name=name,
            version=version,
            preset=preset,
            default_steps=config.steps,
            default_sampler=config.sampler,
            num_parameters=sum(p.numel() for p in self.parameters()),
        )

    def condition(self, timesteps: Tensor | int) -> Conditioning:
        """Conditioning of one step for the whole batch, or of (B,) steps."""
        if isinstance(timesteps, int):
            timesteps = torch.tensor([timesteps], device=next(self.parameters()).device)
        return Conditioning(self.fusion.conditioning(timesteps), self.denoiser.conditioning(timesteps))

    def predict(
        self,
        state: Pair,
        mu: Pair,
        t: Tensor | int,
        *,
        coupled: bool = True,
        conditioning: Conditioning | None = None,
    ) -> Prediction:
        """One evaluation: TIM fuses both states, both branches start from the result (from their own if not coupled).

        A model whose config says another coupling than "every_step" is never coupled here.
        state, mu: pairs of (B, C, h, w); t: one step, or (B,) steps; conditioning: that of t, if it is made already.
        Differentiable.
        """
        conditioning = conditioning or self.condition(t)
        start = state
        if coupled and self.config.coupling == "every_step":
            fused = self.fusion.fuse(state.vis, state.ir, conditioning.fusion)
            start = Pair(fused, fused)
        output = Pair(*self.denoiser.denoise(start.vis, mu.vis, start.ir, mu.ir, conditioning.denoiser))
        return Prediction(start, output, self.config.denoiser.prediction)

    def final_fusion(self, clean: Pair, conditioning: Conditioning | None = None) -> Tensor:
        """TIM at step 0 on the restored latents: the latent (B, C, h, w) of the fused image. Their mean without TIM."""
        if self.config.coupling == "none":
            return (clean.vis + clean.ir) / 2
        steps = self.condition(0) if conditioning is None else conditioning
        fused: Tensor = self.fusion.fuse(clean.vis, clean.ir, steps.fusion)
        return fused

    def normalise(self, images: Pair, context: Pair | None = None) -> Pair:
        """Images under the tone curves of `context`, whole frames (the images themselves if None), ir of one channel.

        Images come back unchanged from a model without a tone estimator.
        """
        if self.tone is None:
            return images
        frames = images if context is None else context
        vis_curves, ir_curves = self.tone(frames.vis, frames.ir)
        return Pair(vis_curves(images.vis), ir_curves(images.ir))

    def light(self, frames: Pair) -> Pair:
        """Whole frames with the visible one well exposed, ir of one channel and as it was.

        Raises ConfigError for a model without an exposure estimator.
        """
        estimator = self._require_estimator()
        return Pair(estimator(frames.vis, frames.ir)(frames.vis), frames.ir)

    def _require_estimator(self) -> ExposureEstimator:
        if self.exposure is None:
            raise ConfigError(
                f"the weights {self.info.name} {self.info.version} have no exposure estimator and cannot give exposure "
                "'lit'; take other weights, or 'as_shot'"
            )
        return self.exposure

    def latent_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(B, C, h, w) of the latents of images of a size."""
        channels = self.config.autoencoder.latent_channels
        return batch, channels, _padded(height) // LATENT_FACTOR, _padded(width) // LATENT_FACTOR

    def plan(
        self,
        *,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        outputs: Collection[OutputName] = ALL_OUTPUTS,
        coupled: bool = True,
        tiling: TilingConfig | None = None,
        start: int | None = None,
        exposure: Exposure = "as_shot",
    ) -> FusionPlan:
        """Check a request and fill in the model's defaults.

        Raises ConfigError for unknown names or steps, and for a rendition that the weights cannot give.
        """
        require_exposure(exposure)
        if exposure == "lit":
            self._require_estimator()
        sampler = sampler or self.config.sampler
        count = self.config.steps if steps is None else steps
        if start is None and sampler != "euler" and self.config.denoiser.prediction == "noise":
            start = late_start(self.sde, count)
        timesteps = plan_timesteps(sampler, self.sde, count, start)
        return FusionPlan(sampler, timesteps, _require_outputs(outputs), coupled, tiling or TilingConfig(), exposure)

    @torch.inference_mode()
    def fuse(
        self,
        vis: Tensor,
        ir: Tensor,
        *,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        seeds: int | Sequence[int] = 0,
        outputs: Collection[OutputName] = ALL_OUTPUTS,
        coupled: bool = True,
        tiling: TilingConfig | None = None,
        previous: Pair | None = None,
        start: int | None = None,
        exposure: Exposure = "as_shot",
    ) -> FusionOutput:
        """Restore and fuse registered pairs.

        Tensors: vis (B, 3, H, W), ir (B, 1, H, W), floats in [0, 1] or 8-bit levels, sides from 32 px up. `seeds` is
        one seed for every item or B of them; an item gives the same picture alone and in a batch, but for rounding.
        Only `outputs` are decoded. `coupled=False` keeps TIM out of the sampling loop (for ablations). Frames above
        `tiling.max_pixels` are worked on in blended tiles. `start` begins the reverse process at an earlier step than
        T, from the degraded latents noised to it or, if `previous` is given, from those (the `latents` of the frame
        before); docs/decisions/0009 says what that brings. `exposure` is the rendition: "as_shot" keeps how dark a
        scene came, "lit" makes a well exposed photograph of the visible frame first, and lifts what veils it
        (docs/decisions/0015).
        Raises ShapeError for wrong tensors, ConfigError for unknown names or steps, NumericsError for a result that is
        not finite.
        """
        batch, height, width = require_pair(vis, ir)
        plan = self.plan(
            steps=steps,
            sampler=sampler,
            outputs=outputs,
            coupled=coupled,
            tiling=tiling,
            start=start,
            exposure=exposure,
        )
        like = torch.empty(self.latent_shape(batch, height, width), device=vis.device)
        with full_float32():
            output, is_finite = self.run(vis, ir, plan, seeded_noise(seed_list(seeds, batch), like), previous=previous)
        require_finite(is_finite)
        return output

    def run(
        self,
        vis: Tensor,
        ir: Tensor,
        plan: FusionPlan,
        draw: NoiseSource,
        conditions: Conditions | None = None,
        previous: Pair | None = None,
    ) -> tuple[FusionOutput, Tensor]:
        """What `fuse` computes, for checked arguments: the images, and whether all of them are finite (no dimensions).

        `draw` gives noise of `latent_shape`; `conditions` gives the conditioning of a step; `previous` holds clean
        latents to start from at the plan's first step, in place of mu. Nothing here waits for the device or copies to
        it, so that a run can be captured. Raises ShapeError for `previous` of another size.
        """
        conditions = conditions or self.condition
        height, width = vis.shape[-2:]
        levels = vis.dtype == torch.uint8
        frames = Pair(_unit_range(vis), _unit_range(ir))
        images = self.normalise(self.light(frames) if plan.exposure == "lit" else frames)
        padded = Pair(
            pad_to_multiple(images.vis, PADDING, "reflect").contiguous(memory_format=torch.channels_last),
            pad_to_multiple(images.ir, PADDING, "reflect")
            .expand(-1, 3, -1, -1)
            .contiguous(memory_format=torch.channels_last),
        )
        grid = (padded.vis.shape[-2] // LATENT_FACTOR, padded.vis.shape[-1] // LATENT_FACTOR)
        frame = _Frame(grid, plan.tiling if plan.tiles(height, width) else None)

        vis_mu, vis_skips = frame.encode(self.autoencoder.encode, padded.vis)
        ir_mu, ir_skips = frame.encode(self.autoencoder.encode, padded.ir)
        mu = Pair(vis_mu, ir_mu)
        noise = draw()
        state = self._start(mu, noise, previous, plan.timesteps[0])

        def predict(state: Pair, mu: Pair, t: int) -> Prediction:
            conditioning = conditions(t)
            return frame.predict(
                lambda s, m: self.predict(s, m, t, coupled=plan.coupled, conditioning=conditioning), state, mu
            )

        clean = SAMPLERS[plan.sampler](predict, self.sde, state, mu, draw, plan.timesteps)

        flags: list[Tensor] = []

        def decode(latent: Tensor, skips: Skips) -> Tensor:
            image = frame.decode(self.autoencoder.decode, latent, skips)[..., :height, :width]
            flags.append(torch.isfinite(image).all())
            return image.clamp(0, 1)

        def finish(image: Tensor) -> Tensor:
            return (image * 255).round().byte() if levels else image

        fused = restored_vis = restored_ir = None
        if "fused" in plan.outputs:
            conditioning = conditions(0)
            latent = frame.fuse(lambda pair: self.final_fusion(pair, conditioning), clean)
            image = decode(latent, self.autoencoder.fuse_skips(vis_skips, ir_skips))
            fused = finish(widen_range(image, self.config.widening))
        if "vis" in plan.outputs:
            restored_vis = finish(decode(clean.vis, vis_skips))
        if "ir" in plan.outputs:
            restored_ir = finish(decode(clean.ir, ir_skips).mean(dim=1, keepdim=True))
        return FusionOutput(fused, restored_vis, restored_ir, latents=clean), torch.stack(flags).all()

    def _start(self, mu: Pair, noise: Pair, previous: Pair | None, t: int) -> Pair:
        """Where the reverse process starts: mu + lam n at T, else the marginal at t of `previous` or mu itself."""
        if previous is None and t == self.sde.num_steps:
            return Pair(self.sde.noise_state(mu.vis, noise.vis), self.sde.noise_state(mu.ir, noise.ir))
        states = []
        for clean, m, n in zip(previous or mu, mu, noise, strict=True):
            mean, std = self.sde.marginal(clean, m, t)
            states.append(mean + std * n)
        return Pair(*states)


WIDENING_GRID = 64  # cells a side that a frame is averaged to, so that noise and hot pixels hardly move its ends
WIDENING_TAIL = 0.005  # share of the cells beyond either end
WIDENING_GAIN = 1.5  # at most, so that fog and flat frames do not come back as noise


def widen_range(image: Tensor, share: float) -> Tensor:
    """Move both ends of each image's range of luma by a share of their way to black and to white.

    image: (B, 3, H, W) in [0, 1]; returns the same. The curve has three straight parts, from (0, 0) to the lower end,
    to the upper and to (1, 1): it clips no luma and keeps its order. Chroma stays. The share is less where the middle
    part would be steeper than `WIDENING_GAIN`; a frame that uses the whole range comes back as it is.
    """
    if share == 0:
        return image
    y = luma(image)
    cells = F.adaptive_avg_pool2d(y, WIDENING_GRID).flatten(1).sort(dim=1).values[:, :, None, None]
    tail = round(WIDENING_TAIL * cells.shape[1])
    low, high = cells[:, tail : tail + 1], cells[:, -tail - 1 : cells.shape[1] - tail]
    used = (high - low).clamp(1e-6, 1 - 1e-6)
    unused = 1 - used
    moved = ((WIDENING_GAIN - 1) * used / unused).clamp(max=share)
    # How far luma moves: outwards by the share of its way at and beyond either end, and in between along a line.
    between = (moved * unused / used) * (y - low) - moved * low
    change = torch.maximum(-moved * y, torch.minimum(between, moved * (1 - y)))
    return (image + change).clamp(0, 1)


def _padded(side: int) -> int:
    return -(-side // PADDING) * PADDING


def _unit_range(image: Tensor) -> Tensor:
    """Floats in [0, 1] of floats or levels."""
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


class _Frame:
    """Applies the networks to a whole latent grid, tile by tile where it is larger than the limit."""

    def __init__(self, grid: tuple[int, int], tiling: TilingConfig | None) -> None:
        self.grid = grid
        self.tiles: tuple[Tile, ...] = ()
        if tiling is not None:
            self.tiles = plan_tiles(*grid, tiling.tile // LATENT_FACTOR, tiling.overlap // LATENT_FACTOR)

    def _join(self, parts: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Join the results of all tiles, each a tuple of tensors of any scales; one tile's tuple is alive at a time."""
        mosaics: list[Mosaic] = []
        for tile, part in zip(self.tiles, parts, strict=True):
            if not mosaics:
                scales = [tensor.shape[-2] // (tile.bottom - tile.top) for tensor in part]
                mosaics = [Mosaic(self.tiles, self.grid, scale) for scale in scales]
            for mosaic, tensor in zip(mosaics, part, strict=True):
                mosaic.add(tile, tensor)
        return tuple(mosaic.joined() for mosaic in mosaics)

    def encode(self, encode: Callable[[Tensor], tuple[Tensor, Skips]], image: Tensor) -> tuple[Tensor, Skips]:
        if not self.tiles:
            return encode(image)

        def parts() -> Iterator[tuple[Tensor, ...]]:
            for tile in self.tiles:
                latent, skips = encode(tile.cut(image, LATENT_FACTOR).contiguous(memory_format=torch.channels_last))
                yield latent, *skips

        latent, *skips = self._join(parts())
        return latent, tuple(skips)

    def predict(self, predict: Callable[[Pair, Pair], Prediction], state: Pair, mu: Pair) -> Prediction:
        if not self.tiles:
            return predict(state, mu)
        predictions = (predict(_cut_pair(tile, state), _cut_pair(tile, mu)) for tile in self.tiles)
        kinds: list[Literal["noise", "clean"]] = []

        def parts() -> Iterator[tuple[Tensor, ...]]:
            for prediction in predictions:
                kinds.append(prediction.kind)
                yield *prediction.start, *prediction.output

        start_vis, start_ir, output_vis, output_ir = self._join(parts())
        return Prediction(Pair(start_vis, start_ir), Pair(output_vis, output_ir), kinds[0])

    def fuse(self, fuse: Callable[[Pair], Tensor], clean: Pair) -> Tensor:
        if not self.tiles:
            return fuse(clean)
        return blend(self.tiles, (fuse(_cut_pair(tile, clean)) for tile in self.tiles), self.grid, 1)

    def decode(
        self, decode: Callable[[Tensor, Skips, tuple[int, int]], Tensor], latent: Tensor, skips: Skips
    ) -> Tensor:
        rows, columns = self.grid
        if not self.tiles:
            return decode(latent, skips, (rows * LATENT_FACTOR, columns * LATENT_FACTOR))

        def parts() -> Iterator[Tensor]:
            for tile in self.tiles:
                tile_skips = tuple(tile.cut(skip, skip.shape[-2] // rows) for skip in skips)
                size = ((tile.bottom - tile.top) * LATENT_FACTOR, (tile.right - tile.left) * LATENT_FACTOR)
                yield decode(tile.cut(latent, 1), tile_skips, size)

        return blend(self.tiles, parts(), self.grid, LATENT_FACTOR)


def _cut_pair(tile: Tile, pair: Pair) -> Pair:
    return Pair(tile.cut(pair.vis, 1).contiguous(), tile.cut(pair.ir, 1).contiguous())


def require_pair(vis: Tensor, ir: Tensor) -> tuple[int, int, int]:
    """(B, H, W) of a valid pair; ShapeError otherwise."""
    if vis.ndim != 4 or vis.shape[1] != 3:
        raise ShapeError(f"vis must be (B, 3, H, W), got {tuple(vis.shape)}")
    if ir.shape != (vis.shape[0], 1, *vis.shape[-2:]):
        raise ShapeError(f"ir must be (B, 1, H, W) of the size of vis {tuple(vis.shape)}, got {tuple(ir.shape)}")
    levels = vis.dtype == ir.dtype == torch.uint8
    if not levels and not (vis.is_floating_point() and ir.is_floating_point()):
        raise ShapeError(f"vis and ir must be floating point in [0, 1] or both uint8, got {vis.dtype} and {ir.dtype}")
    height, width = vis.shape[-2:]
    if vis.shape[0] < 1 or min(height, width) < MIN_SIDE:
        raise ShapeError(f"both sides must be at least {MIN_SIDE} px, got {width}x{height}")
    return vis.shape[0], height, width


def seed_list(seeds: int | Sequence[int], batch: int) -> list[int]:
    """One seed an item. Raises ShapeError if there are neither one nor `batch`."""
    result = [seeds] * batch if isinstance(seeds, int) else list(seeds)
    if len(result) != batch:
        raise ShapeError(f"{batch} pairs need {batch} seeds or one, got {len(result)}")
    return result


def require_finite(is_finite: Tensor) -> None:
    """Raise NumericsError unless the flag of a run is true. Waits for the device."""
    if not bool(is_finite):
        raise NumericsError("a decoded image is not finite")


def _require_outputs(outputs: Collection[OutputName]) -> frozenset[OutputName]:
    unknown = set(outputs) - set(ALL_OUTPUTS)
    if unknown or not outputs:
        raise ConfigError(f"outputs must be some of {', '.join(ALL_OUTPUTS)}, got {sorted(outputs)}")
    return frozenset(outputs)


def build_model(config: ModelConfig, *, name: str = "untrained", version: str = "0", preset: str = "") -> ReCoFuse:
    """A model of a config with fresh random weights (the global torch generator draws them)."""
    return ReCoFuse(config, name=name, version=version, preset=preset)
