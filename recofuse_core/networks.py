"""The networks of ReCoFuse, each beside its frozen config: autoencoder, denoiser (DiM), latent fusion (TIM), tone.

The tone estimator is ours and optional: one curve a channel for the whole frame, applied before the encoder. Two
autoencoders share one interface (`encode`, `decode`, `fuse_skips`): `PaperAutoencoder` is the published one, whose
official weights can be loaded; `GatedAutoencoder` is the compact one, with a denser latent and a gated skip at quarter
resolution. A network computes in the dtype of its weights; images and latents cross its border in float32, skips do
not. What a denoiser and TIM make of the time step alone is their `conditioning`: it depends on no image, so it can be
made once for a schedule.

Letters: B batch, H and W image size, h and w latent size (an eighth, rounded up), C latent channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.errors import ConfigError, ShapeError
from recofuse_core.layers import (
    ChannelNorm,
    ConvBlockAttention,
    CrossAttention,
    GatedConvBlock,
    LinearAttention,
    Modulation,
    TimeEmbedding,
    TimeTable,
    average_to,
    double,
    halve,
    modulate,
)

Skips = tuple[Tensor, ...]


def pad_to_multiple(x: Tensor, multiple: int, mode: Literal["reflect", "constant"]) -> Tensor:
    """Pad right and below until both sides are multiples. Raises ShapeError where reflection needs more pixels."""
    height, width = x.shape[-2:]
    pad_h, pad_w = -height % multiple, -width % multiple
    if mode == "reflect" and not torch.compiler.is_compiling() and (pad_h >= height or pad_w >= width):
        raise ShapeError(f"a {width}x{height} image is too small to be padded to multiples of {multiple} by reflection")
    if torch.compiler.is_compiling():  # sizes are free there, and so is what is missing
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        is_whole = statically_known_true(pad_h == 0) and statically_known_true(pad_w == 0)
    else:
        is_whole = pad_h == pad_w == 0
    return x if is_whole else F.pad(x, (0, pad_w, 0, pad_h), mode)


def unit_range(image: Tensor) -> Tensor:
    """Floats in [0, 1] of floats or levels."""
    return image / 255 if image.dtype == torch.uint8 else image.float()


# --- autoencoders -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaperAutoencoderConfig:
    """Sizes of the published autoencoder (docs/model.md, 2); the defaults are the release's."""

    width: int = 8
    multipliers: tuple[int, int, int, int] = (4, 8, 8, 16)
    latent_channels: int = 8
    kind: Literal["paper"] = "paper"


class ResidualPair(nn.Module):
    """Two 3x3 convolutions with SiLU, plus the input (through 1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        return y + (x if self.skip is None else self.skip(x))


class Rows(nn.Module):
    """The rows of numbers that the first convolution reads of an image: those of `factor` x `factor` pixels each.

    It has no weights: a place for what runs this otherwise (kernels/ends.py).
    """

    def __init__(self, factor: int, middle: float) -> None:
        super().__init__()
        self.factor, self.middle = factor, middle

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 3, H, W), floats in [0, 1] or levels, as they lie, to (B, 3 factor**2, H/factor, W/factor) less `middle`.

        Sides are multiples of `factor`; a row is ordered by channel, then row, then column.
        """
        pixels = unit_range(image.contiguous(memory_format=torch.channels_last))
        pixels = pixels if self.middle == 0 else pixels - self.middle
        return (pixels if self.factor == 1 else F.pixel_unshuffle(pixels, self.factor)).to(dtype)


class PaperAutoencoder(nn.Module):
    """U-Net of four levels with latent factor 8 and nine skip features (OmniFuse's autoencoder)."""

    multiple = 16

    def __init__(self, config: PaperAutoencoderConfig) -> None:
        super().__init__()
        outs = [config.width * m for m in config.multipliers]
        ins = [config.width, *outs[:-1]]
        self.rows = Rows(1, 0.0)
        self.init_conv = nn.Conv2d(3, config.width, 3, padding=1, bias=False)
        self.encoder_blocks = nn.ModuleList(nn.ModuleList([ResidualPair(d, d), ResidualPair(d, d)]) for d in ins)
        self.encoder_norm = ChannelNorm(ins[-1])
        self.encoder_attention = LinearAttention(ins[-1])
        downs: list[nn.Module] = [nn.Conv2d(ins[i], outs[i], 4, stride=2, padding=1) for i in range(3)]
        self.downs = nn.ModuleList([*downs, nn.Conv2d(ins[3], outs[3], 3, padding=1, bias=False)])
        self.latent_conv = nn.Conv2d(outs[-1], config.latent_channels, 1, bias=False)
        self.post_latent_conv = nn.Conv2d(config.latent_channels, outs[-1], 1, bias=False)
        self.decoder_blocks = nn.ModuleList(
            nn.ModuleList([ResidualPair(o + d, o), ResidualPair(o + d, o)])
            for d, o in zip(reversed(ins), reversed(outs), strict=True)
        )
        self.decoder_norm = ChannelNorm(outs[-1])
        self.decoder_attention = LinearAttention(outs[-1])
        ups: list[nn.Module] = [nn.Conv2d(outs[i], ins[i], 3, padding=1) for i in (3, 2, 1)]
        self.ups = nn.ModuleList([*ups, nn.Conv2d(outs[0], ins[0], 3, padding=1, bias=False)])
        self.final_conv = nn.Conv2d(config.width, 3, 3, padding=1)

    def encode(self, image: Tensor) -> tuple[Tensor, Skips]:
        """(B, 3, H, W) in [0, 1] to the latent (B, C, ceil16(H)/8, ceil16(W)/8) and nine skips, finest first.

        An image whose sides are multiples of 16 may be levels. Raises ShapeError if it is too small for the reflection
        padding.
        """
        rows = self.rows(pad_to_multiple(image, self.multiple, "reflect"), self.init_conv.weight.dtype)
        x = self.init_conv(rows).to(self.latent_conv.weight.dtype)
        skips = [x]
        for level, pair in enumerate(self.encoder_blocks):
            first, second = pair.children()
            x = first(x)
            skips.append(x)
            x = second(x)
            if level == 3:
                x = x + self.encoder_attention(self.encoder_norm(x))
            skips.append(x)
            x = self.downs[level](x)
        return self.latent_conv(x).float(), tuple(skips)

    def decode(self, latent: Tensor, skips: Skips, size: tuple[int, int]) -> Tensor:
        """Latent (B, C, h, w) and skips back to an image (B, 3, *size), not clamped."""
        x = self.post_latent_conv(latent.to(self.post_latent_conv.weight.dtype))
        for level, pair in enumerate(self.decoder_blocks):
            first, second = pair.children()
            x = first(torch.cat([x, skips[8 - 2 * level]], dim=1))
            x = second(torch.cat([x, skips[7 - 2 * level]], dim=1))
            if level == 0:
                x = x + self.decoder_attention(self.decoder_norm(x))
            if level < 3:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = self.ups[level](x)
        image: Tensor = self.final_conv((x + skips[0]).to(self.final_conv.weight.dtype)).float()
        return image[..., : size[0], : size[1]]

    def fuse_skips(self, vis: Skips, ir: Skips) -> Skips:
        """Skip features for the fused image: the mean, entry by entry."""
        return tuple((a + b) / 2 for a, b in zip(vis, ir, strict=True))


@dataclass(frozen=True)
class GatedAutoencoderConfig:
    """Sizes of the compact autoencoder (docs/decisions/0002)."""

    quarter_width: int = 64
    eighth_width: int = 128
    encoder_blocks: tuple[int, int] = (2, 3)  # at 1/4 and 1/8
    decoder_blocks: tuple[int, int] = (4, 3)  # at 1/8 and 1/4
    latent_channels: int = 16
    kind: Literal["gated"] = "gated"


class GatedAutoencoder(nn.Module):
    """Pixel-unshuffle autoencoder with one gated skip at quarter resolution.

    The skip carries content of the degraded image; the gate, computed from the decoded latent and the skip together,
    decides position by position how much of it to believe.
    """

    multiple = 16  # latent sides are even, so that a denoiser of one or more levels needs no padding of its own
    stem_factor = 4

    def __init__(self, config: GatedAutoencoderConfig) -> None:
        super().__init__()
        quarter, eighth, latent = config.quarter_width, config.eighth_width, config.latent_channels
        self.rows = Rows(self.stem_factor, 0.5)
        self.stem = nn.Conv2d(48, quarter, 3, padding=1)
        self.encoder_quarter = nn.ModuleList(GatedConvBlock(quarter) for _ in range(config.encoder_blocks[0]))
        self.down = nn.Conv2d(quarter, eighth, 2, stride=2)
        self.encoder_eighth = nn.ModuleList(GatedConvBlock(eighth) for _ in range(config.encoder_blocks[1]))
        self.to_latent = nn.Conv2d(eighth, latent, 1)
        self.from_latent = nn.Conv2d(latent, eighth, 3, padding=1)
        self.decoder_eighth = nn.ModuleList(GatedConvBlock(eighth) for _ in range(config.decoder_blocks[0]))
        self.up = nn.Conv2d(eighth, 4 * quarter, 1, bias=False)
        self.skip_gate = nn.Conv2d(2 * quarter, quarter, 3, padding=1)
        self.skip_mix = nn.Conv2d(2 * quarter, quarter, 1)
        self.decoder_quarter = nn.ModuleList(GatedConvBlock(quarter) for _ in range(config.decoder_blocks[1]))
        self.head = nn.Conv2d(quarter, 48, 3, padding=1)
        # Zero weights give 0.5 each, the published mean of both skips, to start from.
        self.skip_fusion = nn.Conv2d(2 * quarter, 2 * quarter, 1)
        nn.init.zeros_(self.skip_fusion.weight)
        nn.init.zeros_(self.skip_fusion.bias)  # type: ignore[arg-type]

    def encode(self, image: Tensor) -> tuple[Tensor, Skips]:
        """(B, 3, H, W) in [0, 1] to the latent (B, C, ceil16(H)/8, ceil16(W)/8) and one skip (B, width, .../4).

        An image whose sides are multiples of 16 may be levels. Raises ShapeError if it is too small for the reflection
        padding.
        """
        skip = self.stemmed(pad_to_multiple(image, self.multiple, "reflect"))
        for block in self.encoder_quarter:
            skip = block(skip)
        x = self.down(skip)
        for block in self.encoder_eighth:
            x = block(x)
        return self.to_latent(x).float(), (skip,)

    def stemmed(self, image: Tensor) -> Tensor:
        """The first features (B, width, H/4, W/4) of an image whose sides are multiples of `multiple`."""
        features: Tensor = self.stem(self.rows(image, self.stem.weight.dtype))
        return features

    def decode(self, latent: Tensor, skips: Skips, size: tuple[int, int]) -> Tensor:
        """Latent (B, C, h, w) and the skip back to an image (B, 3, *size), not clamped."""
        x = self.from_latent(latent.to(self.from_latent.weight.dtype))
        for block in self.decoder_eighth:
            x = block(x)
        x = F.pixel_shuffle(self.up(x), 2)
        trust = self.skip_gate(torch.cat([x, skips[0]], dim=1)).sigmoid()
        x = x + self.skip_mix(torch.cat([x, trust * skips[0]], dim=1))
        for block in self.decoder_quarter:
            x = block(x)
        return F.pixel_shuffle(self.head(x), 4)[..., : size[0], : size[1]].float() + 0.5

    def fuse_skips(self, vis: Skips, ir: Skips) -> Skips:
        """Skip for the fused image: both, weighed by position and channel from both together."""
        vis_weight, ir_weight = self.skip_fusion(torch.cat([vis[0], ir[0]], dim=1)).sigmoid().chunk(2, dim=1)
        return (vis_weight * vis[0] + ir_weight * ir[0],)


AutoencoderConfig = PaperAutoencoderConfig | GatedAutoencoderConfig
LatentAutoencoder = PaperAutoencoder | GatedAutoencoder


def build_autoencoder(config: AutoencoderConfig) -> LatentAutoencoder:
    """The autoencoder that a config describes."""
    return PaperAutoencoder(config) if isinstance(config, PaperAutoencoderConfig) else GatedAutoencoder(config)


# --- denoiser ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of one DiM branch (docs/model.md, 3); the defaults are the release's.

    `prediction` says what the output means: "noise" is eps, as published; "clean" is x_0 - mu.
    """

    latent_channels: int = 8
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 1, 1, 28)
    middle_blocks: int = 1
    decoder_blocks: tuple[int, ...] = (1, 1, 1, 1)
    sinusoid_dim: int = 64
    time_dim: int = 256
    prediction: Literal["noise", "clean"] = "noise"

    def __post_init__(self) -> None:
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ConfigError("a denoiser needs as many decoder levels as encoder levels")


BlockModulations = tuple[tuple[Modulation, Modulation], ...]


class Denoiser(nn.Module):
    """One DiM branch: a time-conditioned U-Net of gated convolution blocks over [x - mu; mu]."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.multiple = 2 ** len(config.encoder_blocks)
        width, time_dim = config.width, config.time_dim
        self.time = TimeEmbedding(config.sinusoid_dim, time_dim)
        self.intro = nn.Conv2d(2 * config.latent_channels, width, 3, padding=1)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        for num_blocks in config.encoder_blocks:
            self.encoders.append(nn.ModuleList(GatedConvBlock(width, time_dim) for _ in range(num_blocks)))
            self.downs.append(nn.Conv2d(width, 2 * width, 2, stride=2))
            width *= 2
        self.middle = nn.ModuleList(GatedConvBlock(width, time_dim) for _ in range(config.middle_blocks))
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        for num_blocks in config.decoder_blocks:
            self.ups.append(nn.Conv2d(width, 2 * width, 1, bias=False))
            width //= 2
            self.decoders.append(nn.ModuleList(GatedConvBlock(width, time_dim) for _ in range(num_blocks)))
        self.ending = nn.Conv2d(width, config.latent_channels, 3, padding=1)

    def blocks(self) -> Iterator[GatedConvBlock]:
        """All blocks in the order of execution."""
        for level in (*self.encoders, self.middle, *self.decoders):
            yield from level.children()

    def conditioning(self, timesteps: Tensor) -> BlockModulations:
        """What the steps (B,), or (1,) for the whole batch, make of every block; no image enters it."""
        time = self.time(timesteps)
        return tuple(block.modulation(time) for block in self.blocks())

    def forward(self, x: Tensor, mu: Tensor, timesteps: Tensor) -> Tensor:
        """x, mu: (B, C, h, w); timesteps: (B,) or (1,) integers. Returns (B, C, h, w) of `prediction`'s meaning."""
        return self.denoise(x, mu, self.conditioning(timesteps))

    def denoise(self, x: Tensor, mu: Tensor, conditioning: BlockModulations) -> Tensor:
        """`forward` with the steps' conditioning made already."""
        height, width = x.shape[-2:]
        modulations = iter(conditioning)
        both = torch.cat([x - mu, mu], dim=1).to(self.intro.weight.dtype)
        first = x = self.intro(pad_to_multiple(both, self.multiple, "constant"))
        kept = []
        for blocks, down in zip(self.encoders, self.downs, strict=True):
            x = _through(blocks, x, modulations)
            kept.append(x)
            x = halve(x, down)  # type: ignore[arg-type]  # a ModuleList does not say what it holds
        x = _through(self.middle, x, modulations)
        for blocks, up in zip(self.decoders, self.ups, strict=True):
            x = _through(blocks, kept.pop() + double(x, up), modulations)  # type: ignore[arg-type]
        out: Tensor = self.ending(x + first)
        return out[..., :height, :width].float()


def _through(blocks: nn.Module, x: Tensor, modulations: Iterator[tuple[Modulation, Modulation]]) -> Tensor:
    for block in blocks.children():
        x = block(x, next(modulations))
    return x


class DualDenoiser(nn.Module):
    """DiM-vis and DiM-ir: two unconnected branches of one shape."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.vis = Denoiser(config)
        self.ir = Denoiser(config)

    def conditioning(self, timesteps: Tensor) -> tuple[BlockModulations, BlockModulations]:
        """What the steps (B,), or (1,) for the whole batch, make of both branches."""
        return self.vis.conditioning(timesteps), self.ir.conditioning(timesteps)

    def forward(
        self, vis: Tensor, vis_mu: Tensor, ir: Tensor, ir_mu: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States and degraded latents (B, C, h, w) of both modalities to both predictions."""
        return self.denoise(vis, vis_mu, ir, ir_mu, self.conditioning(timesteps))

    def denoise(
        self,
        vis: Tensor,
        vis_mu: Tensor,
        ir: Tensor,
        ir_mu: Tensor,
        conditioning: tuple[BlockModulations, BlockModulations],
    ) -> tuple[Tensor, Tensor]:
        """`forward` with the steps' conditioning made already."""
        return self.vis.denoise(vis, vis_mu, conditioning[0]), self.ir.denoise(ir, ir_mu, conditioning[1])


# --- fusion -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of TIM (docs/model.md, 4); the defaults are the release's."""

    latent_channels: int = 8
    width: int = 64
    time_dim: int = 256
    num_groups: int = 32
    uses_time: bool = True  # False: every step is taken for step 0 (an ablation)
    context_pool: int = 1  # least side of the squares that either latent attends to in the other: `context_square`
    tabulated_steps: int | None = None  # vectors of the steps up to this one are kept themselves, not what makes them

    def __post_init__(self) -> None:
        if self.context_pool < 1:
            raise ConfigError(f"context_pool must be 1 or more, got {self.context_pool}")
        if self.tabulated_steps is not None and self.tabulated_steps < 1:
            raise ConfigError(f"tabulated_steps must be 1 or more, got {self.tabulated_steps}")


class NormActConv(nn.Sequential):
    """Group norm, SiLU, 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        super().__init__(nn.GroupNorm(num_groups, in_channels), nn.SiLU(), conv)


class LatentFusion(nn.Module):
    """TIM: both latents and the step to one fused latent.

    The result is weight_ir * ir + weight_vis * vis with weights in (0, 1) per channel and position that need not sum to
    one. In the published weights the head called `_v` weighs the infrared latent; the names here say what they weigh.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        channels, width, groups = config.latent_channels, config.width, config.num_groups
        self.uses_time = config.uses_time
        embedding = TimeEmbedding(width, config.time_dim)
        self.time = embedding if config.tabulated_steps is None else TimeTable(config.tabulated_steps, embedding)
        if config.time_dim != 4 * width:
            raise ConfigError("the fusion module splits its time vector into four parts of its width")
        self.vis_attention = CrossAttention(channels, config.context_pool)
        self.ir_attention = CrossAttention(channels, config.context_pool)
        self.intro = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.shared = NormActConv(width, width, groups)
        self.shared_attention = ConvBlockAttention(width)
        self.ir_branch = NormActConv(width, width, groups)
        self.ir_branch_attention = ConvBlockAttention(width)
        self.vis_branch = NormActConv(width, width, groups)
        self.vis_branch_attention = ConvBlockAttention(width)
        self.ir_weight = NormActConv(width, channels, groups)
        self.vis_weight = NormActConv(width, channels, groups)

    def conditioning(self, timesteps: Tensor) -> tuple[Tensor, ...]:
        """(shift1, scale1, shift2, scale2), each (B, width, 1, 1), of the steps (B,), or (1,) for the whole batch."""
        if not self.uses_time:
            timesteps = torch.zeros_like(timesteps)
        time: Tensor = self.time(timesteps).to(self.intro.weight.dtype)
        return time[:, :, None, None].chunk(4, dim=1)

    def weights(self, vis: Tensor, ir: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, C, h, w) in (0, 1) of the visible and of the infrared latent."""
        return self._weights(vis, ir, self.conditioning(timesteps))

    def _weights(self, vis: Tensor, ir: Tensor, conditioning: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        shift1, scale1, shift2, scale2 = conditioning
        vis, ir = vis.to(self.intro.weight.dtype), ir.to(self.intro.weight.dtype)
        attended = torch.cat([self.vis_attention(vis, ir), self.ir_attention(ir, vis)], dim=1)
        x = self.shared_attention(self.shared(self.intro(attended)))
        for_ir = self.ir_branch_attention(modulate(self.ir_branch(x), shift1, scale1))
        for_vis = self.vis_branch_attention(modulate(self.vis_branch(x), shift2, scale2))
        return self.vis_weight(for_vis).sigmoid(), self.ir_weight(for_ir).sigmoid()

    def forward(self, vis: Tensor, ir: Tensor, timesteps: Tensor) -> Tensor:
        """vis, ir: (B, C, h, w); timesteps: (B,) or (1,) integers, 0 for the final fusion. Returns (B, C, h, w)."""
        return self.fuse(vis, ir, self.conditioning(timesteps))

    def fuse(self, vis: Tensor, ir: Tensor, conditioning: tuple[Tensor, ...]) -> Tensor:
        """`forward` with the steps' conditioning made already. The latents themselves are never rounded."""
        vis_weight, ir_weight = self._weights(vis, ir, conditioning)
        return ir_weight * ir + vis_weight * vis


# --- tone -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToneConfig:
    """Sizes of the tone estimator (docs/decisions/0005)."""

    grid: int = 64  # the frame is averaged to this many cells a side, so that noise hardly moves the quantiles
    num_quantiles: int = 24
    width: int = 256


class ToneCurves(NamedTuple):
    """y = clamp((x + shift) * gain, 0, 1) ** gamma, one curve an image and channel; each (B, C, 1, 1)."""

    shift: Tensor
    gain: Tensor
    gamma: Tensor

    def __call__(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to the same."""
        # The floor keeps the gradient of the power finite, and stays dark under any gamma.
        straight = ((image + self.shift) * self.gain).clamp(1e-5, 1.0)
        if torch.compiler.is_exporting():  # other runtimes take powers one by one, at five times the cost
            return (straight.log() * self.gamma).exp()
        return straight.pow(self.gamma)


class ToneEstimator(nn.Module):
    """Curves that undo what acts on a whole frame alike: dark exposure, veil, colour cast, squeezed infrared contrast.

    Each of these is, or nearly is, a shift, a gain and a power a channel, whose inverse is a curve of the same family.
    Convolutions see too little of a frame to tell it from the scene; the quantiles of both whole frames do.
    """

    CHANNELS = 4  # vis, then ir
    SHIFT_UNIT = 0.3
    GAMMA_UNIT = 0.5

    def __init__(self, config: ToneConfig) -> None:
        super().__init__()
        self.config = config
        num_features = self.CHANNELS * (config.num_quantiles + 3)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.layers = nn.Sequential(
            nn.Linear(num_features, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, 3 * self.CHANNELS),
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]  # identity to start from
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def features(self, vis: Tensor, ir: Tensor) -> Tensor:
        """Quantiles of the averaged frames, then std, minimum and maximum of the full ones: (B, features).

        vis: (B, 3, H, W), ir: (B, 1, H, W), float32 in [0, 1].
        """
        grid, count = self.config.grid, self.config.num_quantiles
        cells = average_to(grid, vis, ir).flatten(2).sort(dim=-1).values  # (B, 4, grid**2)
        ranks = [round(rank * (grid**2 - 1) / (count - 1)) for rank in range(count)]
        quantiles = torch.stack([cells[..., rank] for rank in ranks], dim=-1)
        frames = (vis.flatten(2), ir.flatten(2))  # not joined: that is a copy of both
        stds, least, most = ([told(frame, dim=-1) for frame in frames] for told in (torch.std, torch.amin, torch.amax))
        return torch.cat([quantiles.flatten(1), *stds, *least, *most], dim=1)

    def infrared_features(self) -> Tensor:
        """Which features are of the infrared frame: (features,) booleans."""
        is_ir = torch.arange(self.CHANNELS) == self.CHANNELS - 1
        return torch.cat([is_ir.repeat_interleave(self.config.num_quantiles), is_ir.repeat(3)])

    def calibrate(self, features: Tensor) -> None:
        """Take the scale of the features (N, F) of a training set over, so that all weigh alike."""
        self.get_buffer("mean").copy_(features.mean(dim=0))
        self.get_buffer("std").copy_(features.std(dim=0) + 1e-3)

    def curves(self, features: Tensor) -> ToneCurves:
        """(B, features) to curves of four channels: vis, then ir."""
        scaled = (features - self.get_buffer("mean")) / self.get_buffer("std")
        values = self.layers(scaled)[:, :, None, None]
        shift, gain, gamma = values.chunk(3, dim=1)
        return ToneCurves(self.SHIFT_UNIT * shift, gain.exp(), (self.GAMMA_UNIT * gamma).exp())

    def forward(self, vis: Tensor, ir: Tensor) -> tuple[ToneCurves, ToneCurves]:
        """The curves of both modalities: (B, 3, 1, 1) and (B, 1, 1, 1) parameters. See `features` for the input."""
        curves = self.curves(self.features(vis, ir))
        return ToneCurves(*(x[:, :3] for x in curves)), ToneCurves(*(x[:, 3:] for x in curves))
