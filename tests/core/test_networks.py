"""The networks against a second writing in plain functions, and what their sizes and names must stay.

The second writing takes a network's state dict, reads its entries by name and spells every step out as
docs/model.md, 2 to 4, does; tests/core/test_layers.py has checked the blocks themselves.
"""

import math
import re
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from recofuse_core.errors import ConfigError, ShapeError
from recofuse_core.layers import ConvBlockAttention, GatedConvBlock, LinearAttention
from recofuse_core.model import PRESETS, ReCoFuse
from recofuse_core.networks import (
    Denoiser,
    DenoiserConfig,
    DualDenoiser,
    FusionConfig,
    GatedAutoencoder,
    GatedAutoencoderConfig,
    LatentFusion,
    PaperAutoencoder,
    PaperAutoencoderConfig,
    ToneConfig,
    ToneCurves,
    ToneEstimator,
    build_autoencoder,
    pad_to_multiple,
)
from recofuse_core.picture import ALL_OUTPUTS
from recofuse_core.weights_file import weights_folder

PAPER_AE = PaperAutoencoderConfig(width=4, multipliers=(2, 3, 4, 5), latent_channels=3)
GATED_AE = GatedAutoencoderConfig(8, 12, encoder_blocks=(1, 2), decoder_blocks=(2, 1), latent_channels=5)
DENOISER = DenoiserConfig(
    3, 4, encoder_blocks=(1, 2), middle_blocks=1, decoder_blocks=(2, 1), sinusoid_dim=8, time_dim=16
)
FUSION = FusionConfig(latent_channels=3, width=32, time_dim=128)
SIDES = st.integers(33, 70)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def randomised(module: ModuleT, seed: int = 0) -> ModuleT:
    """All parameters drawn anew, those that start at zero or one included, so that every one of them matters."""
    generator = Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(max(fan_in, 4))
    return module.requires_grad_(False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


class Weights:
    """A state dict under a prefix, with the convolutions that its entries stand for."""

    def __init__(self, module: nn.Module) -> None:
        self.state: dict[str, Tensor] = module.state_dict()
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return self.state[name]

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self[f"{name}.weight"]
        bias = self[f"{name}.bias"] if f"{name}.bias" in self.state else None
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2 if padding is None else padding)

    def fill(self, name: str, module: nn.Module) -> nn.Module:
        """A block checked elsewhere, filled with the entries under a name."""
        entries = {key.removeprefix(f"{name}."): self[key] for key in self.state if key.startswith(f"{name}.")}
        module.load_state_dict(entries)
        return module

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        result: Tensor = (x - mean) / (variance + 1e-5).sqrt() * self[f"{name}.gain"][None, :, None, None]
        return result

    def time(self, name: str, timesteps: Tensor, dim: int) -> Tensor:
        frequencies = torch.exp(-torch.arange(dim // 2) * math.log(10000) / (dim // 2 - 1))
        angle = timesteps[:, None] * frequencies[None]
        wave = torch.cat([angle.sin(), angle.cos()], dim=1)
        wide = F.linear(wave, self[f"{name}.expand.weight"], self[f"{name}.expand.bias"])
        a, b = wide.chunk(2, dim=1)
        return F.linear(a * b, self[f"{name}.project.weight"], self[f"{name}.project.bias"])

    def assert_all_used(self) -> None:
        assert self.used == self.state.keys()


# --- padding ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(9, 40), st.integers(9, 40), st.sampled_from([4, 8]), st.sampled_from(["reflect", "constant"]))
def test_padding_appends_right_and_below(height: int, width: int, multiple: int, mode: str) -> None:
    x = normal(1, 2, height, width)
    padded = pad_to_multiple(x, multiple, mode)  # type: ignore[arg-type]  # one of the two literals
    rows, columns = padded.shape[-2:]
    assert rows % multiple == columns % multiple == 0
    assert rows - height < multiple
    assert columns - width < multiple
    assert torch.equal(padded[..., :height, :width], x)
    for i in range(height, rows):
        expected = x[..., 2 * (height - 1) - i, :] if mode == "reflect" else torch.zeros(1, 2, width)
        assert torch.equal(padded[..., i, :width], expected)
    for j in range(width, columns):
        expected = x[..., :, 2 * (width - 1) - j] if mode == "reflect" else torch.zeros(1, 2, height)
        assert torch.equal(padded[..., :height, j], expected)


@pytest.mark.parametrize("size", [(8, 32), (32, 8), (1, 1)])
def test_reflection_needs_pixels(size: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=f"{size[1]}x{size[0]} image is too small"):
        pad_to_multiple(torch.zeros(1, 3, *size), 16, "reflect")
    assert pad_to_multiple(torch.zeros(1, 3, *size), 16, "constant").shape[-1] % 16 == 0


# --- autoencoders -----------------------------------------------------------------------------------------------------


def residual_pair(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = F.silu(weights.conv(f"{name}.conv2", F.silu(weights.conv(f"{name}.conv1", x))))
    return y + (weights.conv(f"{name}.skip", x) if f"{name}.skip.weight" in weights.state else x)


def attended(weights: Weights, side: str, x: Tensor) -> Tensor:
    attention = weights.fill(f"{side}_attention", LinearAttention(x.shape[1]))
    result: Tensor = x + attention(weights.norm(f"{side}_norm", x))
    return result


@pytest.mark.parametrize("size", [(32, 48), (37, 53)])
def test_paper_autoencoder(size: tuple[int, int]) -> None:
    network = randomised(PaperAutoencoder(PAPER_AE))
    weights, image = Weights(network), normal(2, 3, *size).sigmoid()
    padded = F.pad(image, (0, -size[1] % 16, 0, -size[0] % 16), "reflect")

    x = weights.conv("init_conv", padded)
    h = [x]
    for level in range(4):
        x = residual_pair(weights, f"encoder_blocks.{level}.0", x)
        h.append(x)
        x = residual_pair(weights, f"encoder_blocks.{level}.1", x)
        x = attended(weights, "encoder", x) if level == 3 else x
        h.append(x)
        x = weights.conv("downs.3", x) if level == 3 else weights.conv(f"downs.{level}", x, stride=2, padding=1)
    z = weights.conv("latent_conv", x)
    latent, skips = network.encode(image)
    assert close(latent, z)
    assert len(skips) == len(h) == 9
    assert all(map(close, skips, h))

    x = weights.conv("post_latent_conv", z)
    for j in range(4):
        x = residual_pair(weights, f"decoder_blocks.{j}.0", torch.cat([x, h[8 - 2 * j]], dim=1))
        x = residual_pair(weights, f"decoder_blocks.{j}.1", torch.cat([x, h[7 - 2 * j]], dim=1))
        if j == 0:
            x = attended(weights, "decoder", x)
        if j < 3:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = weights.conv(f"ups.{j}", x)
    expected = weights.conv("final_conv", x + h[0])[..., : size[0], : size[1]]
    assert close(network.decode(latent, skips, size), expected)
    weights.assert_all_used()


def test_paper_skips_are_fused_by_their_mean() -> None:
    network = PaperAutoencoder(PAPER_AE)
    vis, ir = ([normal(1, 2, 3, 3, seed=seed + i) for i in range(9)] for seed in (0, 10))
    fused = network.fuse_skips(tuple(vis), tuple(ir))
    assert all(close(f, (a + b) / 2) for f, a, b in zip(fused, vis, ir, strict=True))


def test_gated_autoencoder() -> None:
    network = randomised(GatedAutoencoder(GATED_AE))
    weights, size = Weights(network), (37, 53)
    image = normal(2, 3, *size).sigmoid()

    def blocks(name: str, x: Tensor, count: int) -> Tensor:
        for index in range(count):
            x = weights.fill(f"{name}.{index}", GatedConvBlock(x.shape[1]))(x)
        return x

    def unshuffled(x: Tensor) -> Tensor:  # (c, dy, dx) in this order become channels
        return torch.stack([x[:, c, i::4, j::4] for c in range(3) for i in range(4) for j in range(4)], dim=1)

    padded = F.pad(image, (0, -size[1] % 16, 0, -size[0] % 16), "reflect") - 0.5
    skip = blocks("encoder_quarter", weights.conv("stem", unshuffled(padded)), 1)
    x = blocks("encoder_eighth", weights.conv("down", skip, stride=2, padding=0), 2)
    z = weights.conv("to_latent", x)
    latent, skips = network.encode(image)
    assert close(latent, z)
    assert latent.shape == (2, 5, 6, 8)
    assert close(skips[0], skip)

    other = (normal(*skip.shape, seed=3),)
    mixing = torch.sigmoid(weights.conv("skip_fusion", torch.cat([skip, other[0]], dim=1)))
    fused = network.fuse_skips(skips, other)
    assert close(fused[0], mixing[:, :8] * skip + mixing[:, 8:] * other[0])

    x = F.pixel_shuffle(weights.conv("up", blocks("decoder_eighth", weights.conv("from_latent", z), 2)), 2)
    trust = torch.sigmoid(weights.conv("skip_gate", torch.cat([x, fused[0]], dim=1)))
    x = x + weights.conv("skip_mix", torch.cat([x, trust * fused[0]], dim=1))
    image_out = weights.conv("head", blocks("decoder_quarter", x, 1)) + 0.5
    expected = F.pixel_shuffle(image_out, 4)[..., : size[0], : size[1]]
    assert close(network.decode(latent, fused, size), expected)
    weights.assert_all_used()


def test_gated_skips_start_as_their_mean() -> None:
    network = GatedAutoencoder(GATED_AE)
    vis, ir = (normal(1, 8, 4, 4, seed=seed) for seed in (0, 1))
    assert close(network.fuse_skips((vis,), (ir,))[0], (vis + ir) / 2)


@pytest.mark.parametrize("config", [PAPER_AE, GATED_AE], ids=["paper", "gated"])
@settings(deadline=None, max_examples=5)
@given(SIDES, SIDES)
def test_decoding_gives_back_the_size(config: PaperAutoencoderConfig, height: int, width: int) -> None:
    network = randomised(build_autoencoder(config))
    image = normal(1, 3, height, width).sigmoid()
    latent, skips = network.encode(image)
    assert latent.shape == (1, config.latent_channels, 2 * -(-height // 16), 2 * -(-width // 16))
    assert network.decode(latent, skips, (height, width)).shape == image.shape


# --- denoiser ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [torch.tensor([42]), torch.tensor([1, 99])], ids=["one", "each"])
@pytest.mark.parametrize("size", [(8, 12), (5, 7)])
def test_denoiser(size: tuple[int, int], timesteps: Tensor) -> None:
    network = randomised(Denoiser(DENOISER))
    weights = Weights(network)
    x, mu = normal(2, 3, *size), normal(2, 3, *size, seed=1)
    time = weights.time("time", timesteps, 8)

    def block(name: str, x: Tensor) -> Tensor:
        module = weights.fill(name, GatedConvBlock(x.shape[1], 16))
        assert isinstance(module, GatedConvBlock)
        result: Tensor = module(x, module.modulation(time))
        return result

    y = F.pad(torch.cat([x - mu, mu], dim=1), (0, -size[1] % 4, 0, -size[0] % 4))
    first = y = weights.conv("intro", y)
    y = block("encoders.0.0", y)
    level0 = y
    y = weights.conv("downs.0", y, stride=2, padding=0)
    y = block("encoders.1.1", block("encoders.1.0", y))
    level1 = y
    y = weights.conv("downs.1", y, stride=2, padding=0)
    y = block("middle.0", y)
    y = F.pixel_shuffle(weights.conv("ups.0", y), 2) + level1
    y = block("decoders.0.1", block("decoders.0.0", y))
    y = F.pixel_shuffle(weights.conv("ups.1", y), 2) + level0
    y = block("decoders.1.0", y)
    expected = weights.conv("ending", y + first)[..., : size[0], : size[1]]
    assert close(network(x, mu, timesteps), expected)
    weights.assert_all_used()


def test_branches_do_not_touch() -> None:
    network, t = randomised(DualDenoiser(DENOISER)), torch.tensor([7])
    vis, vis_mu, ir, ir_mu = (normal(1, 3, 8, 8, seed=seed) for seed in range(4))
    out_vis, out_ir = network(vis, vis_mu, ir, ir_mu, t)
    assert torch.equal(out_vis, network.vis(vis, vis_mu, t))
    assert torch.equal(out_ir, network.ir(ir, ir_mu, t))
    assert not close(network.vis(ir, ir_mu, t), out_ir)


def test_denoiser_levels_must_match() -> None:
    with pytest.raises(ConfigError, match="as many decoder levels"):
        DenoiserConfig(encoder_blocks=(1, 1), decoder_blocks=(1,))


# --- fusion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [torch.tensor([0]), torch.tensor([1, 99])], ids=["final", "each"])
def test_latent_fusion(timesteps: Tensor) -> None:
    network = randomised(LatentFusion(FUSION))
    weights, batch, rows, columns = Weights(network), 2, 5, 7
    vis, ir = normal(batch, 3, rows, columns), normal(batch, 3, rows, columns, seed=1)
    shift1, scale1, shift2, scale2 = weights.time("time", timesteps, 32)[:, :, None, None].chunk(4, dim=1)

    def cross(name: str, query: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            weights.conv(f"{name}.{part}", x).flatten(2)
            for part, x in (("query", query), ("key", context), ("value", context))
        )
        attention = (q.transpose(1, 2) @ k / math.sqrt(3)).softmax(dim=-1)
        return (v @ attention.transpose(1, 2)).reshape(query.shape) + query

    def norm_act_conv(name: str, x: Tensor) -> Tensor:
        groups = x.reshape(batch, 32, -1)
        mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
        x = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        x = x * weights[f"{name}.0.weight"][None, :, None, None] + weights[f"{name}.0.bias"][None, :, None, None]
        return weights.conv(f"{name}.2", x * torch.sigmoid(x))

    def cbam(name: str, x: Tensor) -> Tensor:
        result: Tensor = weights.fill(name, ConvBlockAttention(32))(x)
        return result

    p = weights.conv("intro", torch.cat([cross("vis_attention", vis, ir), cross("ir_attention", ir, vis)], dim=1))
    r = cbam("shared_attention", norm_act_conv("shared", p))
    r1 = cbam("ir_branch_attention", norm_act_conv("ir_branch", r) * (scale1 + 1) + shift1)
    r2 = cbam("vis_branch_attention", norm_act_conv("vis_branch", r) * (scale2 + 1) + shift2)
    for_ir, for_vis = torch.sigmoid(norm_act_conv("ir_weight", r1)), torch.sigmoid(norm_act_conv("vis_weight", r2))
    assert close(network(vis, ir, timesteps), for_ir * ir + for_vis * vis)
    vis_weight, ir_weight = network.weights(vis, ir, timesteps)
    assert close(vis_weight, for_vis)
    assert close(ir_weight, for_ir)
    weights.assert_all_used()


def test_fusion_width_and_time_vector_must_match() -> None:
    with pytest.raises(ConfigError, match="four parts"):
        LatentFusion(FusionConfig(width=32, time_dim=256))


# --- sizes and names --------------------------------------------------------------------------------------------------


def blank(preset: str) -> ReCoFuse:
    with torch.device("meta"):
        return ReCoFuse(PRESETS[preset])


def test_tone_curves_start_as_the_identity_and_have_one_curve_a_channel() -> None:
    tone = ToneEstimator(ToneConfig(width=8))
    vis, ir = torch.rand(2, 3, 40, 56), torch.rand(2, 1, 40, 56)
    for curves, image in zip(tone(vis, ir), (vis, ir), strict=True):
        assert torch.allclose(curves(image), image.clamp_min(1e-5))
    nn.init.normal_(tone.layers[-1].weight)  # type: ignore[arg-type]
    tone.calibrate(tone.features(vis, ir))
    vis_curves, ir_curves = tone(vis, ir)
    alone, _ = tone(vis[:1], ir[:1])
    for curves, channels in ((vis_curves, 3), (ir_curves, 1)):
        assert [part.shape for part in curves] == [(2, channels, 1, 1)] * 3
    for part, single in zip(vis_curves, alone, strict=True):
        assert torch.allclose(part[:1], single, atol=1e-6)


def test_tone_curves_invert_exposure_gamma_veil_and_contrast() -> None:
    clean = torch.rand(1, 3, 16, 16) * 0.8 + 0.1
    dark = 0.5 * clean**2.2
    dark_inverse = ToneCurves(torch.zeros(1), torch.tensor(2.0), torch.tensor(1 / 2.2))
    assert torch.allclose(dark_inverse(dark), clean, atol=1e-4)
    veiled = 0.4 * clean + 0.6 * 0.9
    assert torch.allclose(ToneCurves(torch.tensor(-0.54), torch.tensor(2.5), torch.ones(1))(veiled), clean, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 33), (64, 64), (131, 77)])
def test_tone_features_are_quantiles_and_spread(size: tuple[int, int]) -> None:
    tone = ToneEstimator(ToneConfig(grid=8, num_quantiles=5, width=8))
    vis, ir = torch.rand(1, 3, *size), torch.rand(1, 1, *size)
    features = tone.features(vis, ir)[0]
    assert features.shape == (4 * (5 + 3),)
    quantiles, spread = features[:20].view(4, 5), features[20:].view(3, 4)
    cells = F.adaptive_avg_pool2d(torch.cat([vis, ir], dim=1)[0], 8).flatten(1)
    assert torch.equal(quantiles[:, 0], cells.amin(dim=1))
    assert torch.equal(quantiles[:, -1], cells.amax(dim=1))
    assert (quantiles.diff(dim=1) >= 0).all()
    whole = torch.cat([vis, ir], dim=1)[0].flatten(1)
    assert torch.allclose(spread, torch.stack([whole.std(dim=1), whole.amin(dim=1), whole.amax(dim=1)]))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_sizes() -> None:
    model = blank("paper")
    assert num_parameters(model.autoencoder) == 2_007_859
    assert num_parameters(model.denoiser) == 153_234_064
    assert num_parameters(model.denoiser.vis) == num_parameters(model.denoiser.ir) == 76_617_032
    assert num_parameters(model.fusion) == 231_273
    tensors = [len(part.state_dict()) for part in (model.autoencoder, model.denoiser, model.fusion)]
    assert tensors == [69, 1336, 50]


def test_the_compact_model_fits_its_budget() -> None:
    model = blank("compact")
    assert 2 * num_parameters(model) <= 15 * 2**20  # bytes in float16
    assert (weights_folder() / "compact.safetensors").stat().st_size <= 15 * 2**20


def both(*layers: str) -> set[str]:
    return {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


BLOCK = both("attention", "depthwise", "expand1", "expand2", "project1", "project2") | {
    "beta",
    "gamma",
    "norm1.gain",
    "norm2.gain",
}
TIMED_BLOCK = BLOCK | both("time_projection")
ATTENTION = ["to_out.bias", "to_out.weight", "to_qkv.weight", "out_norm.gain"]
PAPER_NAMES = (
    {f"{conv}.weight" for conv in ("init_conv", "latent_conv", "post_latent_conv")}
    | both("final_conv", "downs.#", "ups.#")
    | {f"{side}_blocks.#.#.conv{i}.weight" for side in ("encoder", "decoder") for i in (1, 2)}
    | {"decoder_blocks.#.#.skip.weight", "encoder_norm.gain", "decoder_norm.gain"}
    | {f"{side}_attention.{name}" for side in ("encoder", "decoder") for name in ATTENTION}
)
GATED_NAMES = (
    both("stem", "down", "to_latent", "from_latent", "skip_gate", "skip_mix", "skip_fusion", "head")
    | {"up.weight"}
    | {
        f"{side}_{scale}.#.{name}"
        for side in ("encoder", "decoder")
        for scale in ("quarter", "eighth")
        for name in BLOCK
    }
)
BRANCH_NAMES = (
    both("time.expand", "time.project", "intro", "ending", "downs.#")
    | {"ups.#.weight"}
    | {f"{place}.{name}" for place in ("encoders.#.#", "middle.#", "decoders.#.#") for name in TIMED_BLOCK}
)
FUSION_NAMES = (
    both("intro")
    | {
        name
        for stage in ("shared", "ir_branch", "vis_branch")
        for name in both(f"{stage}.#", f"{stage}_attention.spatial")
        | {f"{stage}_attention.squeeze.weight", f"{stage}_attention.excite.weight"}
    }
    | both("ir_weight.#", "vis_weight.#")
    | both(*(f"{modality}_attention.{part}" for modality in ("vis", "ir") for part in ("query", "key", "value")))
)
FUSION_TIMES = {"paper": both("time.expand", "time.project"), "compact": {"time.vectors"}}


@pytest.mark.parametrize(("preset", "autoencoder_names"), [("paper", PAPER_NAMES), ("compact", GATED_NAMES)])
def test_parameter_names_stay(preset: str, autoencoder_names: set[str]) -> None:
    """Files of weights are read by these names: a changed one makes every file unreadable. # stands for an index."""
    expected = {f"autoencoder.{name}" for name in autoencoder_names}
    expected |= {f"fusion.{name}" for name in FUSION_NAMES | FUSION_TIMES[preset]}
    expected |= {f"denoiser.{branch}.{name}" for branch in ("vis", "ir") for name in BRANCH_NAMES}
    if preset == "compact":
        expected |= {"tone.mean", "tone.std"} | both("tone.layers.#")
        expected |= {"exposure.mean", "exposure.std"} | both(
            *(f"exposure.{part}" for part in ("summary.#", "near.#", "far.#", "of_frame", "join")),
            *(f"exposure.{head}" for head in ("curve_head", "grid_head")),
        )
        levels = ("fine", "middle.#", "coarse", "halve_fine", "halve_middle", "double_coarse")
        expected |= both(*(f"veil.{part}" for part in ("stem", *levels, "of_frame", "join", "grid", "judge", "fade")))
        expected |= {f"veil.of_fall.{part}.weight" for part in ("stem", "frame")}
        expected |= both(*(f"veil.of_fall.{head}" for head in ("grid", "fade")))
        expected |= both(*(f"weather.{part}" for part in ("stem", "witness", "judge", "head")))
        expected |= both(
            *(f"weather.{way}" for way in ("halve_fine", "halve_middle", "double_middle", "double_coarse"))
        )
        blocks = ("encoder_fine", "encoder_middle", "bottom", "decoder_middle", "decoder_fine")
        expected |= both(*(f"weather.{part}.#.conv{i}" for part in blocks for i in (1, 2)))
        expected |= both(*(f"detail.{picture}.{part}" for picture in ALL_OUTPUTS for part in ("near", "far", "head")))
    assert {re.sub(r"\.\d+(?=\.)", ".#", name) for name in blank(preset).state_dict()} == expected
