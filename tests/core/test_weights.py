"""What the shipped weights promise on pictures, beyond what their card tells of scores."""

from functools import cache

import pytest
import torch
from torch import Tensor

from recofuse_core import load_pretrained
from recofuse_core.losses import luma
from recofuse_core.model import ReCoFuse
from recofuse_core.picture import Exposure
from recofuse_core.scenes.scene import make_scene
from tests.core.tiny import psnr_of


@cache
def shipped() -> ReCoFuse:
    return load_pretrained("compact")


def grid_of(image: Tensor) -> float:
    """Peak to peak of the mean 4x4 px pattern of an even image (1, C, H, W) in [0, 1], in levels of 255."""
    _, _, height, width = image.shape
    tiles = image.mean(dim=1).reshape(height // 4, 4, width // 4, 4)
    pattern = 255 * tiles.mean(dim=(0, 2))
    return float(pattern.max() - pattern.min())


def test_black_frames_come_back_without_a_grid() -> None:
    output = shipped().fuse(torch.zeros(1, 3, 128, 128), torch.zeros(1, 1, 128, 128))
    assert output.fused is not None
    assert grid_of(output.fused[..., 32:96, 32:96]) < 1.5  # 4.0 before 1.3.0
    pattern = torch.tensor([[0.0, 1.0], [1.0, 2.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1) / 255
    assert grid_of(pattern.repeat(16, 16)[None, None]) == pytest.approx(2, abs=1e-5)


def test_people_at_night_are_seen_in_the_fused_picture_alone() -> None:
    """The purpose of it all: warm targets that the visible camera lost stand out in the fused picture."""
    scene = make_scene(3, 256, 320)
    vis, ir = 0.15 * scene.vis[None], scene.ir[None]
    output = shipped().fuse(vis, ir)
    assert output.fused is not None
    warm = ir[0, 0] > ir.quantile(0.99)

    def contrast(image: Tensor) -> float:
        y = luma(image)[0, 0]
        return float(y[warm].mean() - y[~warm].mean())

    assert contrast(output.fused) > 0.25
    assert contrast(output.fused) > 2 * abs(contrast(vis))


def restored(vis: Tensor, ir: Tensor, exposure: Exposure) -> Tensor:
    image: Tensor | None = shipped().fuse(vis, ir, outputs=["vis"], exposure=exposure).vis
    assert image is not None
    return image


@pytest.mark.parametrize("seed", [3, 8])
@pytest.mark.parametrize("gain", [0.12, 0.4])
def test_a_dark_frame_is_lit_where_that_is_asked_for(seed: int, gain: float) -> None:
    scene = make_scene(seed, 160, 224)
    clean, ir = scene.vis[None], scene.ir[None]
    lit = restored(gain * clean, ir, "lit")
    assert 0.28 < float(lit.mean()) < 0.48
    assert psnr_of(lit, clean) > psnr_of(gain * clean, clean) + 6


@pytest.mark.parametrize("seed", [0, 1, 8])
def test_a_night_in_haze_is_lit(seed: int) -> None:
    """Bright as it came and dark without its haze: lit as it came, it would be darker than as shot, at 0.07 to 0.10."""
    scene = make_scene(seed, 160, 224)
    hazy, ir = (0.35 * scene.vis**3.5 + 0.65 * 0.6)[None], scene.ir[None]
    assert float(restored(hazy, ir, "lit").mean()) > 0.2


@pytest.mark.parametrize("seed", [3, 8])
def test_lighting_leaves_a_well_exposed_frame_alone(seed: int) -> None:
    scene = make_scene(seed, 160, 224)
    clean, ir = scene.vis[None], scene.ir[None]
    as_shot, lit = restored(clean, ir, "as_shot"), restored(clean, ir, "lit")
    assert psnr_of(lit, as_shot) > 32
    assert psnr_of(lit, clean) > min(psnr_of(as_shot, clean), 45) - 3


def test_a_covered_lens_stays_black() -> None:
    black = torch.zeros(1, 3, 96, 96)
    as_shot, lit = restored(black, black[:, :1], "as_shot"), restored(black, black[:, :1], "lit")
    assert float(lit.mean()) < float(as_shot.mean()) + 0.05


def test_fog_is_thinned() -> None:
    scene = make_scene(8, 160, 224)
    clean, ir = scene.vis[None], scene.ir[None]
    foggy = 0.35 * clean + 0.65 * 0.85
    as_shot, lit = restored(foggy, ir, "as_shot"), restored(foggy, ir, "lit")
    assert psnr_of(lit, clean) > psnr_of(foggy, clean) + 6
    assert psnr_of(lit, clean) > psnr_of(as_shot, clean) - 4
