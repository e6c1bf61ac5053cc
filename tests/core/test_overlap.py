"""Where infrared ends: inside, features are the fused picture's, far away the visible one's, and there is no seam."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from recofuse_core import Runtime
from recofuse_core.errors import ShapeError
from recofuse_core.frames import put
from recofuse_core.graphs.runtime import GraphRuntime
from recofuse_core.model import ModelConfig
from recofuse_core.overlap import Overlap, shares_of
from recofuse_core.picture import FusionOutput
from recofuse_core.programs import MAX_UNROLLED_STEPS
from recofuse_rigs.rig import Rig
from recofuse_rigs.warp import Warp, warp_of
from tests.core.tiny import CONFIGS, images_of, pairs, tiny_model
from tests.rigs.streets import street

Floats = NDArray[np.float32]


def ending_at(column: int, size: tuple[int, int] = (160, 128)) -> Warp:
    """Infrared of which nothing lies left of a column."""
    return warp_of(Rig(size, size, (1.0, 0.0, float(column), 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)))


def features(channels: int, height: int, width: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(1, channels, height, width)).astype(np.float32)


@pytest.mark.parametrize("factor", [1, 4, 8])
def test_features_are_those_of_one_or_the_other_far_from_the_border(factor: int) -> None:
    warp = ending_at(96)
    overlap = Overlap(shares_of(warp.overlap[None]), lambda a: a)
    fused, vis = (features(3, 128 // factor, 160 // factor, seed) for seed in (1, 2))
    blended = overlap.blend(fused, vis)
    detail, tone = warp.weights[0], warp.tone_weights[0]
    inside, outside = int(np.argmax(detail == 1)) // factor + 1, int(np.argmax(tone > 0)) // factor
    assert 0 < outside < 96 // factor < inside < 160 // factor
    np.testing.assert_allclose(blended[..., inside:], fused[..., inside:], atol=1e-5)
    np.testing.assert_array_equal(blended[..., :outside], vis[..., :outside])
    assert np.abs(blended - vis)[..., outside + 1 : 96 // factor].max() > 0.01  # the tone that goes on


def test_what_differs_as_a_whole_goes_on_outside_and_detail_does_not() -> None:
    warp = ending_at(96)
    overlap = Overlap(shares_of(warp.overlap[None]), lambda a: a)
    vis = features(2, 32, 40)
    shifted = overlap.blend(vis + 0.7, vis) - vis
    np.testing.assert_allclose(shifted[..., 24:], 0.7, atol=1e-5)  # beyond the border, however narrow the feather
    tone = warp.tone_weights.reshape(32, 4, 40, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(shifted[0, 0], 0.7 * tone, atol=0.003)  # shares come in 255 steps
    board = np.indices((32, 40)).sum(axis=0) % 2 - 0.5
    textured = overlap.blend(vis + np.float32(4) * board.astype(np.float32), vis) - vis
    assert np.abs(textured[..., 30:]).min() > 1.9
    assert np.abs(textured[..., :23]).max() < 0.15


@pytest.mark.parametrize("size", [(160, 128), (150, 123)], ids=str)
def test_torch_and_numpy_blend_alike_and_items_apart(size: tuple[int, int]) -> None:
    levels = np.stack([ending_at(column, size).overlap for column in (40, 90)])
    height, width = (-(-side // 16) * 4 for side in reversed(size))
    fused, vis = (
        np.concatenate([features(5, height, width, seed), features(5, height, width, seed + 9)]) for seed in (1, 2)
    )
    blended = Overlap(shares_of(levels), lambda a: a).blend(fused, vis)
    laid = torch.from_numpy(vis).contiguous(memory_format=torch.channels_last)
    by_torch = Overlap(torch.from_numpy(shares_of(levels)), torch.from_numpy).blend(torch.from_numpy(fused), laid)
    np.testing.assert_allclose(by_torch.numpy(), blended, atol=1e-5)
    assert by_torch.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(
        Overlap(shares_of(levels[1:]), lambda a: a).blend(fused[1:], vis[1:]), blended[1:], atol=1e-5
    )
    halves = [torch.from_numpy(array).bfloat16() for array in (fused, vis)]
    assert (
        Overlap(torch.from_numpy(shares_of(levels)), torch.from_numpy).blend(halves[0], halves[1]).dtype
        == torch.bfloat16
    )


@CONFIGS
def test_every_autoencoder_gives_one_picture_of_both(config: ModelConfig) -> None:
    runtime = Runtime(tiny_model(config), precision="float32")
    vis, ir = pairs(1, 128, 160)
    warp = ending_at(96)
    plain, blended = runtime.fuse(vis, ir), runtime.fuse(vis, ir, overlap=warp.overlap[None])
    assert plain.fused is not None
    assert plain.vis is not None
    assert blended.fused is not None
    assert blended.vis is not None
    torch.testing.assert_close(blended.vis, plain.vis)
    changes = [(blended.fused - picture).abs() for picture in (plain.fused, plain.vis)]
    for columns, (near, far) in (
        (slice(0, 16), (1, 0)),
        (slice(140, None), (0, 1)),
    ):  # blocks see all of a frame a little
        assert changes[near][..., columns].mean() < 0.2 * changes[far][..., columns].mean()
    with pytest.raises(ShapeError, match="overlap"):
        runtime.fuse(vis, ir, overlap=warp.overlap)


def test_overlaps_of_another_shape_are_refused() -> None:
    runtime = Runtime(tiny_model(), precision="float32")
    vis, ir = pairs(2, 32, 48)
    right = np.zeros((32, 48, 2), np.uint8)
    for wrong in ([], [right], [right, right.transpose(1, 0, 2)], [right, right[..., 0]]):
        with pytest.raises(ShapeError, match="overlap"):
            runtime.fuse(vis, ir, overlap=wrong)


def test_a_frame_of_another_shape_is_not_put_into_its_place() -> None:
    buffer = torch.zeros(1, 2, 4, 6, dtype=torch.uint8)
    frame = np.arange(48, dtype=np.uint8).reshape(4, 6, 2)
    put([frame], buffer)
    assert torch.equal(buffer[0], torch.from_numpy(frame).permute(2, 0, 1))
    with pytest.raises(ValueError, match="broadcast"):
        put([frame.reshape(6, 4, 2)], buffer)
    put([frame[..., 0]], buffer[:, :1])
    assert torch.equal(buffer[0, 0], torch.from_numpy(frame[..., 0]))


@CONFIGS
@pytest.mark.parametrize("num_steps", [2, MAX_UNROLLED_STEPS + 1])
def test_recorded_runs_blend_as_others_do(config: ModelConfig, num_steps: int) -> None:
    eager = Runtime(tiny_model(config), precision="float32")
    runtime = Runtime(tiny_model(config), precision="float32", graphs=True, batch_sizes=(2,))
    size, options = (58, 45), {"steps": num_steps, "outputs": ("fused", "ir")}
    decoded: list[int] = []
    runtime.model.autoencoder.decode = _counting(runtime.model.autoencoder.decode, decoded)  # type: ignore[method-assign]
    for batch, columns in ((2, (20, 31)), (2, (31, 20)), (1, (12,)), (2, (12, 20))):
        vis, ir = ((255 * images).byte() for images in pairs(batch, 45, 58, seed=sum(columns)))
        levels = [ending_at(column, size).overlap for column in columns]
        frames = [picture.permute(1, 2, 0).numpy() for picture in vis], [picture[0].numpy() for picture in ir]
        decoded.clear()
        recorded = runtime.fuse(*frames, overlap=levels, **options)  # type: ignore[arg-type]
        expected = eager.fuse(vis, ir, overlap=np.stack(levels), **options)  # type: ignore[arg-type]
        assert max_levels(recorded, expected) <= (1 if num_steps > MAX_UNROLLED_STEPS else 0)
    assert decoded == [2, 2]  # the fused picture and infrared, once each; not the visible one besides
    assert runtime.activity.recorded_runs == 3
    assert runtime.num_recorded == 1
    whole = runtime.fuse(*frames, **options)  # type: ignore[arg-type]
    assert max_levels(whole, eager.fuse(vis, ir, **options)) == 0  # type: ignore[arg-type]
    assert max_levels(whole, expected) > 20


def _counting(decode: Callable[..., torch.Tensor], batches: list[int]) -> Callable[..., torch.Tensor]:
    def counted(latent: torch.Tensor, *rest: object) -> torch.Tensor:
        batches.append(len(latent))
        return decode(latent, *rest)

    return counted


def max_levels(first: FusionOutput, second: FusionOutput) -> int:
    return max(
        int((one.int() - other.int()).abs().max())
        for one, other in zip(images_of(first), images_of(second), strict=True)
    )


def steps(picture: NDArray[np.float64], columns: slice) -> float:
    """The largest step from a column's mean to the next one's: what the eye takes for a line."""
    return float(np.abs(np.diff(picture.mean(axis=(0, 1))))[columns].max())


def test_the_border_of_infrared_shows_no_seam() -> None:
    """Across the border the picture changes against the visible one no more steeply than it does inside.

    On streets where a picture that is cut there shows one.
    """
    graphs = GraphRuntime("compact", num_threads=1)
    border, size = 110, (256, 192)
    warp = ending_at(border, size)
    for seed in (4, 5):
        scene = street(seed, cover=1.3, size=size)
        vis, ir = scene.vis.transpose(2, 0, 1)[None] // 4, warp.apply(scene.ir)[None, None]
        plain = graphs.fuse(vis, ir, exposure="lit")
        blended = graphs.fuse(vis, ir, exposure="lit", outputs=["fused"], overlap=warp.overlap[None])
        assert plain.fused is not None
        assert plain.vis is not None
        assert blended.fused is not None
        fused, vis, whole = (picture[0].astype(float) for picture in (plain.fused, plain.vis, blended.fused))
        around, inside = slice(border - 60, border + 20), slice(border + 20, None)
        change, cut = whole - vis, np.where(warp.coverage, fused - vis, 0)
        assert steps(cut, around) > 3
        assert steps(change, around) <= min(steps(change, inside), 0.6 * steps(cut, around))
        assert np.abs(whole - fused)[..., border + 30 :].mean() < 0.4 * np.abs(vis - fused)[..., border + 30 :].mean()
        assert np.abs(change[..., : border - 80]).mean() < 2
