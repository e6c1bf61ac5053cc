"""ReCoFuse: autoencoder, two denoising branches, latent fusion and the SDE, assembled: image pair in, fused out."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from recofuse_core.errors import ConfigError, NumericsError, ShapeError
from recofuse_core.networks import (
    AutoencoderConfig,
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
from recofuse_core.sampler import SAMPLERS, Pair, Prediction, SamplerName, plan_timesteps, seeded_noise
from recofuse_core.sde import MeanRevertingSDE, SDEConfig
from recofuse_core.tiling import Tile, TilingConfig, blend, plan_tiles

OutputName = Literal["fused", "vis", "ir"]
ALL_OUTPUTS: tuple[OutputName, ...] = ("fused", "vis", "ir")
MIN_SIDE = 32
LATENT_FACTOR = 8


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape of a model, and how it is sampled unless the caller says otherwise."""

    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig
    fusion: FusionConfig
    sde: SDEConfig
    tone: ToneConfig | None = None
    sampler: SamplerName = "euler"
    steps: int = 100

    def __post_init__(self) -> None:
        channels = {self.autoencoder.latent_channels, self.denoiser.latent_channels, self.fusion.latent_channels}
        if len(channels) != 1:
            raise ConfigError(f"the networks disagree on the number of latent channels: {sorted(channels)}")
        if not 1 <= self.steps <= self.sde.num_steps:
            raise ConfigError(f"default steps must be within 1..{self.sde.num_steps}, got {self.steps}")


PRESETS = {
    "paper": ModelConfig(PaperAutoencoderConfig(), DenoiserConfig(), FusionConfig(), SDEConfig()),
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
        FusionConfig(latent_channels=16),
        SDEConfig(),
        tone=ToneConfig(),
        sampler="ode2",
        steps=3,
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
    """Images in [0, 1]; None where not asked for. fused, vis: (B, 3, H, W). ir: (B, 1, H, W)."""

    fused: Tensor | None
    vis: Tensor | None
    ir: Tensor | None


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
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the fast layout of every network
        self.info = ModelInfo(
            name=name,
            version=version,
            preset=preset,
            default_steps=config.steps,
            default_sampler=config.sampler,
            num_parameters=sum(p.numel() for p in self.parameters()),
        )

    def predict(self, state: Pair, mu: Pair, t: Tensor | int, *, coupled: bool = True) -> Prediction:
        """One evaluation: TIM fuses both states, both branches start from the result (from their own if not coupled).

        state, mu: pairs of (B, C, h, w); t: one step, or (B,) steps. Differentiable.
        """
        timesteps = torch.tensor([t], device=state.vis.device) if isinstance(t, int) else t
        start = state
        if coupled:
            fused = self.fusion(state.vis, state.ir, timesteps)
            start = Pair(fused, fused)
        output = Pair(*self.denoiser(start.vis, mu.vis, start.ir, mu.ir, timesteps))
        return Prediction(start, output, self.config.denoiser.prediction)

    def final_fusion(self, clean: Pair) -> Tensor:
        """TIM at step 0 on the restored latents: the latent (B, C, h, w) of the fused image."""
        fused: Tensor = self.fusion(clean.vis, clean.ir, torch.zeros(1, dtype=torch.long, device=clean.vis.device))
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
    ) -> FusionOutput:
        """Restore and fuse registered pairs.

        Tensors: vis (B, 3, H, W), ir (B, 1, H, W), floats in [0, 1], sides from 32 px up. `seeds` is one seed for
        every item or B of them; an item gives the same picture alone and in a batch. Only `outputs` are decoded.
        `coupled=False` keeps TIM out of the sampling loop (for ablations). Frames above `tiling.max_pixels` are worked
        on in blended tiles.
        Raises ShapeError for wrong tensors, ConfigError for unknown names or steps, NumericsError for a result that is
        not finite.
        """
        batch, height, width = _require_pair(vis, ir)
        wanted = _require_outputs(outputs)
        sampler = sampler or self.config.sampler
        timesteps = plan_timesteps(sampler, self.sde, steps or self.config.steps)
        seed_list = [seeds] * batch if isinstance(seeds, int) else list(seeds)
        if len(seed_list) != batch:
            raise ShapeError(f"{batch} pairs need {batch} seeds or one, got {len(seed_list)}")

        tiling = tiling or TilingConfig()
        vis, ir = self.normalise(Pair(vis, ir))
        padded = Pair(
            pad_to_multiple(vis, 16, "reflect").contiguous(memory_format=torch.channels_last),
            pad_to_multiple(ir, 16, "reflect").expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last),
        )
        frame = _Frame(padded.vis.shape[-2] // LATENT_FACTOR, padded.vis.shape[-1] // LATENT_FACTOR, tiling)

        vis_mu, vis_skips = frame.encode(self.autoencoder.encode, padded.vis)
        ir_mu, ir_skips = frame.encode(self.autoencoder.encode, padded.ir)
        mu = Pair(vis_mu, ir_mu)
        draw = seeded_noise(seed_list, mu.vis)
        noise = draw()
        state = Pair(self.sde.noise_state(mu.vis, noise.vis), self.sde.noise_state(mu.ir, noise.ir))

        def predict(state: Pair, mu: Pair, t: int) -> Prediction:
            return frame.predict(lambda s, m: self.predict(s, m, t, coupled=coupled), state, mu)

        clean = SAMPLERS[sampler](predict, self.sde, state, mu, draw, timesteps)

        def decode(latent: Tensor, skips: Skips) -> Tensor:
            image = frame.decode(self.autoencoder.decode, latent, skips)[..., :height, :width]
            if not bool(torch.isfinite(image).all()):
                raise NumericsError("the decoded image is not finite")
            return image.clamp(0, 1)

        fused = restored_vis = restored_ir = None
        if "fused" in wanted:
            latent = frame.fuse(self.final_fusion, clean)
            fused = decode(latent, self.autoencoder.fuse_skips(vis_skips, ir_skips))
        if "vis" in wanted:
            restored_vis = decode(clean.vis, vis_skips)
        if "ir" in wanted:
            restored_ir = decode(clean.ir, ir_skips).mean(dim=1, keepdim=True)
        return FusionOutput(fused, restored_vis, restored_ir)


class _Frame:
    """Applies the networks to a whole latent grid, tile by tile where it is larger than the limit."""

    def __init__(self, rows: int, columns: int, tiling: TilingConfig) -> None:
        self.grid = (rows, columns)
        self.tiles: tuple[Tile, ...] = ()
        if rows * columns * LATENT_FACTOR**2 > tiling.max_pixels:
            self.tiles = plan_tiles(rows, columns, tiling.tile // LATENT_FACTOR, tiling.overlap // LATENT_FACTOR)

    def _join(self, parts: list[tuple[Tensor, ...]], scales: Sequence[int]) -> tuple[Tensor, ...]:
        def column(index: int) -> Iterator[Tensor]:
            return (part[index] for part in parts)

        return tuple(blend(self.tiles, column(i), self.grid, scale) for i, scale in enumerate(scales))

    def encode(self, encode: Callable[[Tensor], tuple[Tensor, Skips]], image: Tensor) -> tuple[Tensor, Skips]:
        if not self.tiles:
            return encode(image)
        parts = []
        for tile in self.tiles:
            latent, skips = encode(tile.cut(image, LATENT_FACTOR).contiguous(memory_format=torch.channels_last))
            parts.append((latent, *skips))
        tile_rows = self.tiles[0].bottom - self.tiles[0].top
        scales = [part.shape[-2] // tile_rows for part in parts[0]]
        latent, *skips_list = self._join(parts, scales)
        return latent, tuple(skips_list)

    def predict(self, predict: Callable[[Pair, Pair], Prediction], state: Pair, mu: Pair) -> Prediction:
        if not self.tiles:
            return predict(state, mu)
        parts: list[tuple[Tensor, ...]] = []
        for tile in self.tiles:
            prediction = predict(_cut_pair(tile, state), _cut_pair(tile, mu))
            parts.append((*prediction.start, *prediction.output))
        start_vis, start_ir, output_vis, output_ir = self._join(parts, [1] * 4)
        return Prediction(Pair(start_vis, start_ir), Pair(output_vis, output_ir), prediction.kind)

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


def _require_pair(vis: Tensor, ir: Tensor) -> tuple[int, int, int]:
    """(B, H, W) of a valid pair; ShapeError otherwise."""
    if vis.ndim != 4 or vis.shape[1] != 3:
        raise ShapeError(f"vis must be (B, 3, H, W), got {tuple(vis.shape)}")
    if ir.shape != (vis.shape[0], 1, *vis.shape[-2:]):
        raise ShapeError(f"ir must be (B, 1, H, W) of the size of vis {tuple(vis.shape)}, got {tuple(ir.shape)}")
    if not vis.is_floating_point() or not ir.is_floating_point():
        raise ShapeError(f"vis and ir must be floating point in [0, 1], got {vis.dtype} and {ir.dtype}")
    height, width = vis.shape[-2:]
    if vis.shape[0] < 1 or min(height, width) < MIN_SIDE:
        raise ShapeError(f"both sides must be at least {MIN_SIDE} px, got {width}x{height}")
    return vis.shape[0], height, width


def _require_outputs(outputs: Collection[OutputName]) -> frozenset[OutputName]:
    unknown = set(outputs) - set(ALL_OUTPUTS)
    if unknown or not outputs:
        raise ConfigError(f"outputs must be some of {', '.join(ALL_OUTPUTS)}, got {sorted(outputs)}")
    return frozenset(outputs)


def build_model(config: ModelConfig, *, name: str = "untrained", version: str = "0", preset: str = "") -> ReCoFuse:
    """A model of a config with fresh random weights (the global torch generator draws them)."""
    return ReCoFuse(config, name=name, version=version, preset=preset)
