"""ReCoFuse: autoencoder, two denoising branches, latent fusion and the SDE, assembled: image pair in, fused out."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import recofuse_core.threads  # noqa: F401 - no more threads than the process may use
from recofuse_core.arithmetic import full_float32
from recofuse_core.brightening import Brightening
from recofuse_core.detail import Detail, DetailConfig
from recofuse_core.errors import ConfigError, ShapeError
from recofuse_core.exposure import ExposureConfig, ExposureEstimator, brightened
from recofuse_core.finishing import Finish, Finishing
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
    unit_range,
)
from recofuse_core.overlap import Overlap
from recofuse_core.picture import (
    ALL_OUTPUTS,
    LATENT_FACTOR,
    PADDING,
    Defaults,
    Exposure,
    FusionOutput,
    FusionPlan,
    ModelInfo,
    OutputName,
    Prepared,
    cannot_light,
    latent_size,
    make_plan,
    require_finite,
    require_shapes,
    run,
    seed_list,
)
from recofuse_core.sampler import NoiseSource, Pair, Prediction, SamplerName, seeded_noise
from recofuse_core.sde import MeanRevertingSDE, SDEConfig
from recofuse_core.tiling import Ramps, Spans, TilingConfig, ramps
from recofuse_core.veil import Fall, VeilConfig, VeilEstimator
from recofuse_core.weather import STRIDE, WeatherConfig, WeatherEstimator, without

Coupling = Literal["every_step", "late", "none"]
GPU_TILE_BATCH = 8  # tiles of a large frame at a time


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape of a model, and how it is sampled unless the caller says otherwise.

    coupling: where TIM acts. "every_step" is the paper's; "late" fuses the restored latents alone, "none" takes their
    mean instead (both ablations, docs/ablations.md).
    widening: how far the range of the fused image is widened towards black and white, see `finishing.widen_range`.
    """

    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig
    fusion: FusionConfig
    sde: SDEConfig
    tone: ToneConfig | None = None
    exposure: ExposureConfig | None = None
    weather: WeatherConfig | None = None
    veil: VeilConfig | None = None
    detail: DetailConfig | None = None
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
        if self.fusion.tabulated_steps is not None and self.fusion.tabulated_steps < self.sde.num_steps:
            raise ConfigError(f"fusion.tabulated_steps must be {self.sde.num_steps} at least, the steps of the SDE")
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
        FusionConfig(latent_channels=16, context_pool=4, tabulated_steps=100),
        SDEConfig(),
        tone=ToneConfig(width=496),
        exposure=ExposureConfig(),
        weather=WeatherConfig(),
        veil=VeilConfig(knows_fall=True),
        detail=DetailConfig(),
        sampler="ode2",
        steps=1,
        widening=0.4,
    ),
}


class Conditioning(NamedTuple):
    """What the networks make of a time step alone (no image enters it): TIM's share and both branches'."""

    fusion: tuple[Tensor, ...]
    denoiser: tuple[BlockModulations, BlockModulations]


Conditions = Callable[[int], Conditioning]
Constants = dict[object, Any]  # by what they were made for
Found = tuple[Pair, Tensor | None]  # frames without what lay over them, and how much of it was taken off, (B,)
Cleared = tuple[Pair, Fall | None]  # frames without weather, and what fell


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
        self.weather = None if config.weather is None else WeatherEstimator(config.weather)
        self.veil = None if config.veil is None else VeilEstimator(config.veil)
        self.detail = None if config.detail is None else Detail(config.detail)
        self.finish = Finish(config.widening)
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
            mean: Tensor = (clean.vis + clean.ir) / 2
            return mean
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
        if self.exposure is None:
            raise cannot_light(self.info)
        return Pair(self.exposure(frames.vis, frames.ir)(frames.vis), frames.ir)

    def clear(self, frames: Pair) -> Pair:
        """Frames without the weather in front of the visible one, ir of one channel and as it was.

        They come back unchanged from a model without a weather estimator.
        """
        return self.cleared(frames)[0]

    def cleared(self, frames: Pair) -> Cleared:
        """The same, and what fell, for who lifts its veil; None if nothing did."""
        if self.weather is None:
            return frames, None
        height, width = frames.vis.shape[-2:]
        padded = Pair(*(pad_to_multiple(image, STRIDE, "reflect") for image in frames))
        seen = self.weather.look(padded.vis, padded.ir)
        share = self.weather.share(seen.coarse)
        if _is_nothing(share):
            return frames, None
        cleared = without(frames.vis, self.weather.added(seen)[..., :height, :width], share)
        return Pair(cleared, frames.ir), Fall(share, frames.vis)

    def lift(self, toned: Pair, seen: Pair, onto: Pair | None = None, fall: Fall | None = None) -> Pair:
        """Whole frames under their tone curves without the veil over the visible one, and `onto` where there was none.

        seen: the frames as they came, without weather. onto: frames of the same size, the toned ones if None. fall:
        what was taken off of it, if anything was. A model without a veil estimator finds no veil.
        """
        return self._lifted(toned, seen, onto, fall)[0]

    def _lifted(self, toned: Pair, seen: Pair, onto: Pair | None = None, fall: Fall | None = None) -> Found:
        onto = toned if onto is None else onto
        if self.veil is None:
            return onto, None
        veil = self.veil(toned.vis, toned.ir, seen.vis, fall)
        if onto is toned:  # what the curves left is what stays anyway
            veil = veil._replace(darkened=None)
        if _is_nothing(veil.share) and (veil.darkened is None or _is_nothing(veil.darkened)):
            return onto, None
        return Pair(veil.lifted(toned.vis, onto.vis), onto.ir), veil.share

    def unveil(self, frames: Pair, fall: Fall | None = None) -> Pair:
        """Whole frames as they are lit: as they were, but toned and without a veil where one lies over the visible one.

        Lighting that is left to lift a veil makes skies dark and green.
        """
        return self._unveiled(frames, fall)[0]

    def _unveiled(self, frames: Pair, fall: Fall | None) -> Found:
        if self.veil is None:
            return frames, None
        return self._lifted(self.normalise(frames), frames, onto=frames, fall=fall)

    def levelled(self, frames: Pair, exposure: Exposure, fall: Fall | None = None) -> tuple[Pair, Brightening | None]:
        """Frames without weather as the branches see them: under tone curves, without a veil, lit if asked for.

        And what made infrared brighter, beside lit frames.
        """
        return self._levelled(frames, exposure, fall)[:2]

    def _levelled(self, frames: Pair, exposure: Exposure, fall: Fall | None) -> Prepared:
        """The same; `treated` is by how much of a veil was lifted and how far a frame is a night that was lit."""
        if exposure == "lit":
            unveiled, share = self._unveiled(frames, fall)
            images, by = brightened(self.normalise(self.light(unveiled)), unveiled.vis)
            return Prepared(images, by, _most(share, by.lit))
        lifted, share = self._lifted(self.normalise(frames), frames, fall=fall)
        return Prepared(lifted, treated=_most(share))

    def delivered(self, frames: Pair, exposure: Exposure) -> Prepared:
        """Whole frames as they come, in [0, 1] and ir of one channel, as they are encoded; ir is of one still."""
        cleared, fall = self.cleared(frames)
        prepared = self._levelled(cleared, exposure, fall)
        return prepared._replace(treated=_most(None if fall is None else fall.share, prepared.treated))

    def latent_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(B, C, h, w) of the latents of images of a size."""
        channels = self.config.autoencoder.latent_channels
        return batch, channels, *latent_size(height, width)

    def plan(
        self,
        *,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        outputs: Collection[OutputName] = ALL_OUTPUTS,
        coupled: bool = True,
        tiling: TilingConfig | None = None,
        start: int | None = None,
        exposure: Exposure | None = None,
    ) -> FusionPlan:
        """Check a request and fill in the model's defaults.

        Raises ConfigError for unknown names or steps, and for a rendition that the weights cannot give.
        """
        config = self.config
        defaults = Defaults(config.sampler, config.steps, config.denoiser.prediction, self.exposure is not None)
        return make_plan(
            self.info,
            self.sde,
            defaults,
            steps=steps,
            sampler=sampler,
            outputs=outputs,
            coupled=coupled,
            tiling=tiling,
            start=start,
            exposure=exposure,
        )

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
        exposure: Exposure | None = None,
    ) -> FusionOutput:
        """Restore and fuse registered pairs.

        Tensors: vis (B, 3, H, W), ir (B, 1, H, W), floats in [0, 1] or 8-bit levels, sides from 32 px up. `seeds` is
        one seed for every item or B of them; an item gives the same picture alone and in a batch, but for rounding.
        Only `outputs` are decoded. `coupled=False` keeps TIM out of the sampling loop (for ablations). Frames above
        `tiling.max_pixels` are worked on in blended tiles. `start` begins the reverse process at an earlier step than
        T, from the degraded latents noised to it or, if `previous` is given, from those (the `latents` of the frame
        before); docs/decisions/0009 says what that brings. `exposure` is the rendition: "lit" makes a well exposed
        photograph of the visible frame first, and is the default of weights that can; "as_shot" keeps how dark a scene
        came (docs/decisions/0015, 0038).
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
            output, is_finite = self.run(vis, ir, plan, noise_like(seed_list(seeds, batch), like), previous=previous)
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
        overlap: Overlap | None = None,
        constants: Constants | None = None,
    ) -> tuple[FusionOutput, Tensor]:
        """What `fuse` computes, for checked arguments: the images, and whether all of them are finite (no dimensions).

        `draw` gives noise of `latent_shape`; `conditions` gives the conditioning of a step; `previous` holds clean
        latents to start from at the plan's first step, in place of mu; `overlap` says where infrared was measured, if
        not everywhere; `constants`: see TorchNetworks. Nothing here waits for the device or, once the constants are
        there, copies to it, so that a run can be captured. Raises ShapeError for `previous` of another size.
        """
        levels = vis.dtype == torch.uint8
        networks = TorchNetworks(self, conditions or self.condition, coupled=plan.coupled, constants=constants)
        size = (int(vis.shape[-2]), int(vis.shape[-1]))
        frames, brightened_by, treated = self.prepared(vis, ir, plan.exposure)
        tone = None if overlap is None else overlap.tone
        finish = Finishing(self.finish, levels=levels, tone=tone, brightened_by=brightened_by)
        pictures, clean = run(networks, self.sde, plan, frames, size, draw, finish, previous, overlap, treated)
        output = FusionOutput(pictures.get("fused"), pictures.get("vis"), pictures.get("ir"), latents=clean)
        return output, finish.is_finite

    def prepared(self, vis: Tensor, ir: Tensor, exposure: Exposure) -> Prepared:
        """Images of `run` as they are encoded, without weather, `levelled`, padded, each RGB.

        They lie in memory as they come, the three channels of infrared in one place: an encoder lays its rows itself.
        Levels stay levels if nothing reads them before it, and whole sides need no padding, which is for floats alone.
        """
        if exposure == "as_shot" and self._is_bare and not any(side % PADDING for side in vis.shape[-2:]):
            return Prepared(Pair(vis, ir.expand(-1, 3, -1, -1)))
        delivered = self.delivered(Pair(unit_range(vis), unit_range(ir)), exposure)
        padded = Pair(*(pad_to_multiple(image, PADDING, "reflect") for image in delivered.frames))
        return delivered._replace(frames=Pair(padded.vis, padded.ir.expand(-1, 3, -1, -1)))

    @property
    def _is_bare(self) -> bool:
        """Whether the encoder alone reads the frames."""
        return all(network is None for network in (self.weather, self.tone, self.veil, self.detail))


class TorchNetworks:
    """The networks of a model as `picture.run` calls them.

    constants: what is made for a size alone and put on the device, kept here for as long as somebody reads it where it
    lies. Else it is kept in a cache that others share.
    """

    def __init__(
        self,
        model: ReCoFuse,
        conditions: Conditions,
        *,
        coupled: bool = True,
        constants: Constants | None = None,
    ) -> None:
        self.model = model
        self.conditions = conditions
        self.coupled = coupled
        self.constants = {} if constants is None else constants

    def encode(self, image: Tensor) -> tuple[Tensor, Skips]:
        """See Networks."""
        return self.model.autoencoder.encode(image)

    def predict(self, state: Pair, mu: Pair, t: int) -> Prediction:
        """See Networks."""
        return self.model.predict(state, mu, t, coupled=self.coupled, conditioning=self.conditions(t))

    def fuse(self, clean: Pair) -> Tensor:
        """See Networks."""
        return self.model.final_fusion(clean, self.conditions(0))

    def fuse_skips(self, vis: Skips, ir: Skips) -> Skips:
        """See Networks."""
        return self.model.autoencoder.fuse_skips(vis, ir)

    def decode(self, latent: Tensor, skips: Skips) -> Tensor:
        """See Networks."""
        size = (latent.shape[-2] * LATENT_FACTOR, latent.shape[-1] * LATENT_FACTOR)
        return self.model.autoencoder.decode(latent, skips, size)

    def detail(self, name: OutputName, decoded: Tensor, shown: Pair, treated: Tensor | None) -> Tensor:
        """See Networks."""
        return decoded if self.model.detail is None else self.model.detail(name, decoded, shown, treated)

    def contiguous(self, part: Tensor) -> Tensor:
        """See Networks."""
        return part.contiguous()

    @property
    def tile_batch(self) -> int:
        """See Networks. A GPU takes as long for one tile as for a few; a CPU gains nothing by batches."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        return 1 if on_cpu else GPU_TILE_BATCH

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """See Networks."""
        return torch.cat(list(parts))

    def zeros(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """See Canvas."""
        return like.new_zeros(shape).contiguous(memory_format=torch.channels_last)

    def ramps(self, spans: Spans, length: int, scale: int, like: Tensor) -> Ramps:
        """See Canvas. Made once for a device: a run that was made once copies nothing to it."""
        key = (spans, length, scale)
        if key not in self.constants:
            self.constants[key] = _ramps_on(like.device, *key)
        made: Ramps = self.constants[key]
        return made


@functools.lru_cache(maxsize=256)
def _ramps_on(device: torch.device, spans: Spans, length: int, scale: int) -> Ramps:
    with torch.inference_mode(False):  # they may serve a run with gradients later
        return {span: torch.from_numpy(ramp).to(device) for span, ramp in ramps(spans, length, scale).items()}


def noise_like(seeds: Sequence[int], like: Tensor) -> NoiseSource:
    """`seeded_noise` as tensors like `like` (B, C, h, w), on its device."""
    _, *shape = like.shape
    return seeded_noise(seeds, shape, lambda noise: torch.from_numpy(noise).to(like.device))


def _most(*shares: Tensor | None) -> Tensor | None:
    """The largest of shares (B,) or (B, 1, 1, 1), as (B, 1, 1, 1); None if there is none."""
    found = [share.view(-1, 1, 1, 1) for share in shares if share is not None]
    return functools.reduce(torch.maximum, found) if found else None


def _is_nothing(share: Tensor) -> bool:
    """Whether nothing of what was found is wanted, (B,), so that its work can be left out.

    Asked on processors alone: elsewhere it would wait for the device, and a graph has one way.
    """
    return share.device.type == "cpu" and not torch.compiler.is_exporting() and not bool(share.any())


def require_pair(vis: Tensor, ir: Tensor) -> tuple[int, int, int]:
    """(B, H, W) of a valid pair; ShapeError otherwise."""
    size = require_shapes(vis.shape, ir.shape)
    levels = vis.dtype == ir.dtype == torch.uint8
    if not levels and not (vis.is_floating_point() and ir.is_floating_point()):
        raise ShapeError(f"vis and ir must be floating point in [0, 1] or both uint8, got {vis.dtype} and {ir.dtype}")
    return size


def build_model(config: ModelConfig, *, name: str = "untrained", version: str = "0", preset: str = "") -> ReCoFuse:
    """A model of a config with fresh random weights (the global torch generator draws them)."""
    return ReCoFuse(config, name=name, version=version, preset=preset)
