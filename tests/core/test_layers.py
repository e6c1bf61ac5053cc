"""Each block against an independent writing of its formula in float64, with nothing fused or rearranged."""

import math
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from recofuse_core.layers import (
    MAX_CONTEXT_SIDE,
    ChannelNorm,
    ConvBlockAttention,
    CrossAttention,
    GatedConvBlock,
    LinearAttention,
    TimeEmbedding,
    average_to,
    block_means,
    channel_norm,
    coarser,
    context_square,
    double,
    gate,
    halve,
    mean_and_most,
    mixed,
    modulate,
    ramp,
    sinusoid,
    stretched,
    surroundings,
)
from recofuse_core.layers import pointwise as product_or_convolution
from tests.core.tiny import exported

SIDES = st.integers(1, 7)
SEEDS = st.integers(0, 2**31)
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


def pointwise(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 1x1 convolution as a sum over channels, in float64."""
    y = torch.einsum("bchw,oc->bohw", x.double(), layer.weight[:, :, 0, 0].double())
    return y if layer.bias is None else y + layer.bias.double()[None, :, None, None]


def normalised(x: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.double()
    mean = x.mean(dim=1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * gain.double()[None, :, None, None]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 4, 6), (1, 66, 64)])
def test_a_product_is_the_convolution(dtype: torch.dtype, batch: int, height: int, width: int) -> None:
    """Few positions in bfloat16 take another way than many."""
    layer = randomised(nn.Conv2d(6, 10, 1)).to(dtype)
    x = normal(batch, 6, height, width).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert close(product_or_convolution(x, layer), pointwise(x, layer), tolerance)
    down = randomised(nn.Conv2d(6, 10, 2, stride=2)).to(dtype)
    even = normal(batch, 6, 2 * height, 2 * width).to(dtype)
    quads = even.double().view(batch, 6, height, 2, width, 2)
    expected = torch.einsum("bchiwj,ocij->bohw", quads, down.weight.double())
    assert down.bias is not None
    assert close(halve(even, down), expected + down.bias.double()[None, :, None, None], tolerance)


@settings(deadline=None, max_examples=15)
@given(SIDES, SIDES, st.integers(2, 9), SEEDS)
def test_channel_norm_is_the_definition(height: int, width: int, channels: int, seed: int) -> None:
    x, gain = 3 * normal(2, channels, height, width, seed=seed) + 1, normal(channels, seed=seed + 1)
    assert close(channel_norm(x, gain), normalised(x, gain), 1e-4)
    assert close(channel_norm(x, gain, eps=1e-3), normalised(x, gain, eps=1e-3), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_channel_norm_keeps_float32_statistics(dtype: torch.dtype) -> None:
    """Far from zero, half statistics would lose the variance altogether; only the result may be rounded."""
    x = (100 + normal(2, 16, 4, 5)).to(dtype)
    result = channel_norm(x, torch.ones(16))
    assert result.dtype == dtype
    expected = normalised(x, torch.ones(16))
    assert float((result.double() - expected).abs().max()) <= torch.finfo(dtype).eps * float(expected.abs().max())


def test_gate_multiplies_the_halves() -> None:
    x = normal(2, 6, 3, 4)
    assert torch.equal(gate(x), x[:, :3] * x[:, 3:])
    vector = normal(2, 6)
    assert torch.equal(gate(vector), vector[:, :3] * vector[:, 3:])


def test_modulate() -> None:
    x, shift, scale = normal(2, 3, 4, 5), normal(2, 3, 1, 1, seed=1), normal(2, 3, 1, 1, seed=2)
    assert close(modulate(x, shift, scale), x * (1 + scale) + shift)


@pytest.mark.parametrize("dim", [8, 64])
def test_sinusoid_is_the_definition(dim: int) -> None:
    steps = np.array([0, 1, 2, 42, 100])
    half = dim // 2
    frequencies = np.exp(-np.arange(half) * math.log(10000) / (half - 1))
    angles = steps[:, None] * frequencies[None]
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    actual = sinusoid(torch.from_numpy(steps), dim)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, atol=2e-5)
    assert torch.equal(actual[0], torch.cat([torch.zeros(half), torch.ones(half)]))


def test_time_embedding_is_linear_gate_linear() -> None:
    embedding = randomised(TimeEmbedding(8, 12))
    steps = torch.tensor([0, 7, 100])
    wide = sinusoid(steps, 8) @ embedding.expand.weight.T + embedding.expand.bias
    expected = (wide[:, :12] * wide[:, 12:]) @ embedding.project.weight.T + embedding.project.bias
    assert close(embedding(steps), expected)


def depthwise_by_shifts(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 3x3 depthwise convolution with zero borders as nine shifted products."""
    assert layer.bias is not None
    height, width = x.shape[-2:]
    padded = torch.zeros(*x.shape[:2], height + 2, width + 2, dtype=torch.float64)
    padded[..., 1:-1, 1:-1] = x
    y = layer.bias.double()[None, :, None, None].expand_as(x).clone()
    for i in range(3):
        for j in range(3):
            tap = layer.weight[:, 0, i, j].double()[None, :, None, None]
            y += tap * padded[..., i : i + height, j : j + width]
    return y


@settings(deadline=None, max_examples=15)
@given(SIDES, SIDES, st.booleans(), st.sampled_from([1, 2]), SEEDS)
def test_gated_conv_block_is_the_naf_block(height: int, width: int, timed: bool, num_times: int, seed: int) -> None:
    channels, time_dim = 4, 6
    block = randomised(GatedConvBlock(channels, time_dim if timed else None), seed)
    x = normal(2, channels, height, width, seed=seed)
    shift1 = scale1 = shift2 = scale2 = torch.zeros(1, channels, 1, 1, dtype=torch.float64)
    modulation = None
    if timed:
        assert block.time_projection is not None
        time = normal(num_times, time_dim, seed=seed + 1)
        modulation = block.modulation(time)
        time = time.double()
        projection = (time[:, :3] * time[:, 3:]) @ block.time_projection.weight.T.double()
        projection = projection + block.time_projection.bias.double()
        shift1, scale1, shift2, scale2 = projection[:, :, None, None].chunk(4, dim=1)

    u = normalised(x, block.norm1.gain) * (scale1 + 1) + shift1
    u = depthwise_by_shifts(pointwise(u, block.expand1), block.depthwise)
    u = u[:, :channels] * u[:, channels:]
    u = u * pointwise(u.mean(dim=(2, 3), keepdim=True), block.attention)
    y = x.double() + block.beta.double() * pointwise(u, block.project1)
    v = pointwise(normalised(y, block.norm2.gain) * (scale2 + 1) + shift2, block.expand2)
    expected = y + block.gamma.double() * pointwise(v[:, :channels] * v[:, channels:], block.project2)
    assert close(block(x, modulation), expected, 2e-4)


def test_a_new_gated_conv_block_is_the_identity() -> None:
    block, x = GatedConvBlock(4, 6), normal(2, 4, 5, 3)
    assert torch.equal(block(x, block.modulation(normal(2, 6))), x)


@settings(deadline=None, max_examples=10)
@given(SIDES, SIDES, SEEDS)
def test_linear_attention_is_the_definition(height: int, width: int, seed: int) -> None:
    channels, count = 5, height * width
    attention = randomised(LinearAttention(channels), seed)
    x = normal(2, channels, height, width, seed=seed)
    qkv = pointwise(x, attention.to_qkv).reshape(2, 384, count)
    mixed = torch.empty(2, 128, count, dtype=torch.float64)
    for head in range(4):
        rows = slice(32 * head, 32 * head + 32)
        q = qkv[:, :128][:, rows].softmax(dim=1) / math.sqrt(32)
        k = qkv[:, 128:256][:, rows].softmax(dim=2)
        v = qkv[:, 256:][:, rows] / count
        for batch in range(2):
            context = sum(torch.outer(k[batch, :, n], v[batch, :, n]) for n in range(count))
            assert isinstance(context, Tensor)
            mixed[batch, rows] = context.T @ q[batch]
    projected = pointwise(mixed.reshape(2, 128, height, width), attention.to_out)
    assert close(attention(x), normalised(projected, attention.out_norm.gain), 1e-3)


def test_linear_attention_does_not_underflow_in_half_precision() -> None:
    attention, x = randomised(LinearAttention(8)), 1e-2 * normal(1, 8, 96, 96)
    attention.to_out.bias = None  # the bias would hide that nothing is left of v / n
    exact = attention(x)
    # The projection to q, k, v rounds its input; what follows runs in float32.
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(x)
    assert float((half - exact).std()) < 0.05 * float(exact.std())


@settings(deadline=None, max_examples=10)
@given(SIDES, SIDES, st.sampled_from([1, 2, 4]), SEEDS)
def test_cross_attention_is_a_materialised_softmax(height: int, width: int, pool: int, seed: int) -> None:
    channels = 3
    attention = randomised(CrossAttention(channels, pool), seed)
    query, context = normal(2, channels, height, width, seed=seed), normal(2, channels, height, width, seed=seed + 1)
    squares = [
        [context[..., y : y + pool, x : x + pool].mean(dim=(2, 3)) for x in range(0, width, pool)]
        for y in range(0, height, pool)
    ]
    attended_to = torch.stack([torch.stack(row, dim=-1) for row in squares], dim=-2)
    q, k, v = (
        pointwise(x, layer).flatten(2)
        for x, layer in ((query, attention.query), (attended_to, attention.key), (attended_to, attention.value))
    )
    logits = torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(channels)  # rows: positions of the query
    weights = torch.exp(logits) / torch.exp(logits).sum(dim=2, keepdim=True)
    expected = torch.einsum("bnm,bcm->bcn", weights, v).reshape(query.shape) + query
    assert close(attention(query, context), expected)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([2, 4]))
def test_a_context_has_no_more_squares_in_larger_frames(height: int, width: int, pool: int) -> None:
    square = context_square(pool, height, width)
    longest = -(-max(height, width) // pool)
    if longest <= MAX_CONTEXT_SIDE:
        assert square == pool
    else:
        assert square % pool == 0
        assert MAX_CONTEXT_SIDE / 2 < -(-max(height, width) // square) <= MAX_CONTEXT_SIDE
    assert context_square(1, height, width) == 1  # as published


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 90), st.integers(70, 100), SEEDS)
def test_a_large_context_is_averaged_over_larger_squares(height: int, width: int, seed: int) -> None:
    attention, context = randomised(CrossAttention(3, 4), seed), normal(2, 3, height, width, seed=seed)
    side = 4 if max(height, width) <= 80 else 8
    squares = [
        [context[..., y : y + side, x : x + side].mean(dim=(2, 3)) for x in range(0, width, side)]
        for y in range(0, height, side)
    ]
    attended_to = torch.stack([torch.stack(row, dim=-1) for row in squares], dim=-2)
    assert close(attention.pooled(context), attended_to)


@settings(deadline=None, max_examples=10)
@given(SIDES, SIDES, SEEDS)
def test_conv_block_attention_is_the_definition(height: int, width: int, seed: int) -> None:
    channels = 32
    attention = randomised(ConvBlockAttention(channels), seed)
    x = normal(2, channels, height, width, seed=seed)

    def shared(pooled: Tensor) -> Tensor:
        return pointwise(pointwise(pooled, attention.squeeze).clamp(min=0), attention.excite)

    logits = shared(x.double().mean(dim=(2, 3), keepdim=True)) + shared(x.double().amax(dim=(2, 3), keepdim=True))
    y = x.double() / (1 + torch.exp(-logits))
    maps = torch.stack([y.mean(dim=1), y.max(dim=1).values], dim=1)  # the mean first
    padded = torch.zeros(2, 2, height + 6, width + 6, dtype=torch.float64)
    padded[..., 3:-3, 3:-3] = maps
    assert attention.spatial.bias is not None
    spatial = attention.spatial.bias.double() + sum(
        attention.spatial.weight[0, c, i, j].double() * padded[:, c, i : i + height, j : j + width]
        for c in range(2)
        for i in range(7)
        for j in range(7)
    )
    assert isinstance(spatial, Tensor)
    assert close(attention(x), y / (1 + torch.exp(-spatial[:, None])))


@pytest.mark.parametrize(
    "block",
    [GatedConvBlock(16), LinearAttention(16), ConvBlockAttention(16), ChannelNorm(16)],
    ids=lambda b: type(b).__name__,
)
def test_memory_layout_changes_nothing(block: nn.Module) -> None:
    block, x = randomised(block), normal(2, 16, 6, 5)
    assert close(block(x.contiguous(memory_format=torch.channels_last)), block(x))


@pytest.mark.parametrize("size", [(32, 48), (33, 46), (35, 31)], ids=str)
def test_means_as_other_runtimes_take_them_are_the_same(size: tuple[int, int]) -> None:
    image, plane = normal(2, 3, *size), normal(2, 1, *size, seed=1)
    for side in (2, 4):
        assert close(exported(lambda frame, side=side: block_means(frame, side), image), block_means(image, side))
    assert close(exported(surroundings, plane), surroundings(plane))
    joined = torch.cat([image, plane], dim=1)
    assert close(exported(lambda *frames: average_to(8, *frames), image, plane), average_to(8, joined))
    for times in (1, 2, 3):
        merged = exported(lambda frame, times=times: coarser(block_means(frame, 4), size, 4, times), image)
        assert close(merged, block_means(image, 4 * times))
    assert torch.equal(coarser(block_means(image, 4), size, 4, 1), block_means(image, 4))


@pytest.mark.parametrize("size", [(20, 48), (5, 90), (82, 81)], ids=str)
def test_so_is_a_pooled_context(size: tuple[int, int]) -> None:
    attention, context = CrossAttention(3, 4), normal(2, 3, *size)
    assert close(exported(attention.pooled, context), attention.pooled(context))


def test_so_are_doubled_sides_and_pools_over_channels() -> None:
    up, x = randomised(nn.Conv2d(16, 12, 1, bias=False)), normal(2, 16, 5, 7)
    assert close(exported(lambda x: double(x, up), x), double(x, up))
    for channels in (16, 6):
        part = x[:, :channels]
        mean, most = mean_and_most(part)
        assert close(exported(lambda x: mean_and_most(x)[0], part), mean)
        assert torch.equal(exported(lambda x: mean_and_most(x)[1], part), most)


@pytest.mark.parametrize(("start", "end", "most"), [(0.2, 0.7, 1.0), (0.7, 0.2, 1.0), (-1.5, 2.0, 0.95)])
def test_a_ramp_rises_or_falls_between_its_ends(start: float, end: float, most: float) -> None:
    values = torch.linspace(-3, 3, 61)
    expected = ((values.double() - start) / (end - start)).clamp(0, most)
    assert close(ramp(values, start, end, most), expected)


def test_mixing_and_stretching_are_the_same_in_graphs() -> None:
    first, second, share = normal(2, 3, 9, 8), normal(2, 3, 9, 8, seed=1), torch.linspace(0, 1, 144).view(2, 1, 9, 8)
    assert close(mixed(first, second, share), first + share * (second - first))
    assert close(exported(mixed, first, second, share), mixed(first, second, share))
    joined = torch.cat([first, share], dim=1)
    parts = stretched(joined, (35, 31), 3, 1)
    assert [part.shape for part in parts] == [(2, 3, 35, 31), (2, 1, 35, 31)]
    for index, part in enumerate((first, share)):
        alone = nn.functional.interpolate(part, (35, 31), mode="bilinear", align_corners=False)
        assert close(parts[index], alone)
        assert close(exported(lambda x, index=index: stretched(x, (35, 31), 3, 1)[index], joined), alone)
