"""The OpenCV baseline: each ingredient does what its name says, on images whose answer is known."""

import math

import pytest
import torch
from torch import Tensor

from recofuse_core.data import to_uint8
from recofuse_core.errors import ShapeError
from recofuse_core.evaluation.baselines import (
    BASELINES,
    destripe_columns,
    enhance_ir,
    enhance_vis,
    fuse_average,
    fuse_weighted,
)
from recofuse_core.evaluation.quality import chroma_distance, grey, noise_estimate, psnr


def blobs(seed: int, channels: int, width: int = 128) -> Tensor:
    """A smooth scene over the whole range: (C, 96, width) in [0, 1]."""
    coarse = torch.rand(1, channels, 5, 6, generator=torch.Generator().manual_seed(seed))
    scene = torch.nn.functional.interpolate(coarse, size=(96, width), mode="bicubic")[0]
    return (scene - scene.min()) / (scene.max() - scene.min())


def test_noise_is_removed() -> None:
    noise = 0.06 * torch.randn(1, 96, 128, generator=torch.Generator().manual_seed(1))
    for enhance, scene in ((enhance_vis, blobs(0, 3)), (enhance_ir, blobs(0, 1))):
        noisy = (scene + noise).clamp(0, 1)
        assert noise_estimate(enhance(noisy)) < 0.4 * noise_estimate(noisy)


def test_column_stripes_are_removed() -> None:
    scene = blobs(2, 1, width=512) * 0.8 + 0.1
    offsets = 0.03 * torch.randn(512, generator=torch.Generator().manual_seed(3))
    striped = to_uint8(scene + offsets)
    cleaned = torch.from_numpy(destripe_columns(striped[0].numpy()))[None]
    assert psnr(cleaned, to_uint8(scene)) > psnr(striped, to_uint8(scene)) + 6


def test_dark_and_flat_images_are_opened_up() -> None:
    dark, hazy = blobs(4, 3) * 0.2, blobs(4, 3) * 0.4 + 0.55
    assert grey(enhance_vis(dark)).mean() > 2 * grey(dark).mean()
    assert grey(enhance_vis(hazy)).std() > 1.5 * grey(hazy).std()
    squeezed = blobs(5, 1) * 0.3 + 0.5
    assert grey(enhance_ir(squeezed)).std() > 1.8 * grey(squeezed).std()


def test_the_rules_of_fusion() -> None:
    vis = torch.full((3, 48, 64), 100, dtype=torch.uint8)
    ir = torch.full((1, 48, 64), 50, dtype=torch.uint8)
    ir[:, :, 32:] = 180
    assert fuse_average(vis, ir)[0, 0, [0, 63]].tolist() == [75, 140]
    assert BASELINES["maximum"](vis, ir)[0, 0, [0, 63]].tolist() == [100, 180]
    assert torch.equal(fuse_weighted(vis, ir)[0, 0, [0, 63]], fuse_average(vis, ir)[0, 0, [0, 63]])  # nothing there
    assert abs(int(fuse_weighted(vis, ir)[0, 24, 33]) - 180) < 3  # the edge is infrared's


@pytest.mark.parametrize("name", list(BASELINES))
def test_fusion_keeps_the_colours(name: str) -> None:
    vis, ir = blobs(6, 3) * 0.4 + 0.3, blobs(7, 1) * 0.4 + 0.3
    fused = BASELINES[name](vis, ir)
    assert fused.shape == vis.shape
    assert fused.dtype == torch.uint8
    assert chroma_distance(fused, vis) < 0.6  # rounding
    assert math.isfinite(psnr(fused, to_uint8(vis)))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ShapeError):
        enhance_vis(torch.zeros(1, 32, 32))
    with pytest.raises(ShapeError):
        enhance_ir(torch.zeros(3, 32, 32))
    with pytest.raises(ShapeError, match="size"):
        fuse_average(torch.zeros(3, 32, 32), torch.zeros(1, 32, 33))
