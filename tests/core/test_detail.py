"""Detail comes back where a frame shows that it is none of noise, and noise does not."""

from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from recofuse_core.checkpoint import load_pretrained
from recofuse_core.degradations.physics import poisson_noise
from recofuse_core.degradations.recipes import degrade_vis
from recofuse_core.detail import COARSE, Detail, DetailConfig
from recofuse_core.errors import ConfigError
from recofuse_core.losses import luma
from recofuse_core.model import PRESETS, ReCoFuse
from recofuse_core.picture import ALL_OUTPUTS, Exposure, OutputName
from recofuse_core.sampler import Pair
from recofuse_core.scenes.scene import make_scene

SIZES = [(64, 64), (40, 88)]


def frames_of(batch: int, height: int, width: int, seed: int = 0) -> Pair:
    generator = Generator().manual_seed(seed)
    return Pair(
        torch.rand(batch, 3, height, width, generator=generator),
        torch.rand(batch, 1, height, width, generator=generator),
    )


def returning(share: float) -> Detail:
    """Gates that give everything back by one share."""
    detail = Detail(DetailConfig(4)).requires_grad_(False)
    for gate in (detail.vis, detail.ir, detail.fused):
        torch.nn.init.zeros_(gate.head.weight)
        torch.nn.init.constant_(gate.head.bias, torch.tensor(share).logit().item())  # type: ignore[arg-type]
    return detail


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_share_of_the_difference_comes_back(size: tuple[int, int]) -> None:
    frames, decoded = frames_of(2, *size), torch.rand(2, 3, *size)
    detail = returning(0.25)
    assert_close(detail("vis", decoded, frames), decoded + 0.25 * (frames.vis - decoded), atol=1e-5, rtol=0)
    grey = decoded + 0.25 * (frames.ir - luma(decoded))
    assert_close(detail("ir", decoded, frames), grey, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_coarse_stays_as_it_was_fused(size: tuple[int, int]) -> None:
    frames, detail = frames_of(1, *size), returning(1 - 1e-6)
    inner = slice(COARSE, -COARSE)  # what is coarse goes on level at the ends
    slope = torch.linspace(0, 0.3, size[1]).expand(1, 3, *size)
    assert_close(
        detail("fused", frames.vis + slope, frames)[..., inner, inner],
        (frames.vis + slope)[..., inner, inner],
        atol=1e-4,
        rtol=0,
    )
    board = 0.1 * ((torch.arange(size[0])[:, None] + torch.arange(size[1])) % 2 - 0.5).expand(1, 3, *size)
    assert_close(
        detail("fused", frames.vis + board, frames)[..., inner, inner], frames.vis[..., inner, inner], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", ALL_OUTPUTS)
def test_an_item_is_the_same_alone_and_in_a_batch(name: OutputName) -> None:
    detail = Detail(DetailConfig(4)).requires_grad_(False)
    frames, decoded = frames_of(3, 40, 56), torch.rand(3, 3, 40, 56)
    for gate in (detail.vis, detail.ir, detail.fused):
        torch.nn.init.normal_(gate.head.weight)
    together = detail(name, decoded, frames)
    alone = detail(name, decoded[1:2], Pair(frames.vis[1:2], frames.ir[1:2]))
    assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_a_gate_has_a_width() -> None:
    with pytest.raises(ConfigError, match="width"):
        DetailConfig(0)


@pytest.fixture(scope="module")
def shipped() -> ReCoFuse:
    return load_pretrained("compact").requires_grad_(False)


@pytest.fixture(scope="module")
def without() -> ReCoFuse:
    """The same weights, whose pictures stay as decoded."""
    model = load_pretrained("compact").requires_grad_(False)
    model.detail = None
    return model


def error_of(model: ReCoFuse, vis: Tensor, ir: Tensor, clean: Tensor) -> float:
    """In decibels, of the restored visible frame."""
    output = model.fuse(vis[None], ir[None, :1], exposure="as_shot", outputs=["vis"])
    assert output.vis is not None
    return float(-10 * torch.log10((output.vis[0] - clean).square().mean()))


@pytest.mark.parametrize("seed", [1, 4])
def test_a_sharp_frame_keeps_its_detail_and_noise_does_not_come_back(
    shipped: ReCoFuse, without: ReCoFuse, seed: int
) -> None:
    scene = make_scene(seed, 192, 256)
    rows = torch.arange(192)[:, None] // 2 % 2  # a roof of tiles
    tiles = 0.12 * (rows - 0.5) * (torch.arange(256) < 128)
    clean = (scene.vis + tiles).clamp(0, 1)
    noisy = (clean + 0.08 * torch.randn(clean.shape, generator=Generator().manual_seed(seed))).clamp(0, 1)
    assert error_of(shipped, clean, scene.ir, clean) > error_of(without, clean, scene.ir, clean) + 3
    assert error_of(shipped, noisy, scene.ir, clean) > error_of(without, noisy, scene.ir, clean) - 0.3


@pytest.mark.parametrize("name", ALL_OUTPUTS)
def test_less_comes_back_of_a_visible_frame_that_was_treated(name: OutputName) -> None:
    frames, decoded = frames_of(3, 40, 56), torch.rand(3, 3, 40, 56)
    treated = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
    detail = returning(0.5)
    wholly, some = (detail(name, decoded, frames, how) - decoded for how in (None, treated))
    assert float(wholly.abs().mean()) > 0.05
    assert_close(some, wholly if name == "ir" else wholly * (1 - treated), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", [1, 4])
def test_noise_of_photons_does_not_come_back(shipped: ReCoFuse, without: ReCoFuse, seed: int) -> None:
    scene = make_scene(seed, 192, 256)
    noisy = poisson_noise(scene.vis, 140, Generator().manual_seed(seed))
    assert error_of(shipped, noisy, scene.ir, scene.vis) > error_of(without, noisy, scene.ir, scene.vis) - 0.2


@pytest.mark.parametrize(("what", "exposure"), [("downpour", "as_shot"), ("fog", "as_shot"), ("night", "lit")])
def test_frames_that_were_treated_stay_as_they_were_decoded(
    shipped: ReCoFuse, without: ReCoFuse, what: str, exposure: Exposure
) -> None:
    scene = make_scene(0, 160, 192)
    generator = Generator().manual_seed(0)
    vis = scene.vis * 0.05 if what == "night" else degrade_vis(scene.vis, generator, "strong", [what]).image
    frames = Pair(vis[None], scene.ir[None, :1])
    treated = shipped.delivered(frames, exposure).treated
    assert treated is not None
    assert float(treated) > 0.9
    ours, decoded = (model.fuse(*frames, exposure=exposure, outputs=["vis"]).vis for model in (shipped, without))
    assert ours is not None
    assert decoded is not None
    assert float((ours - decoded).abs().max()) < 0.01


def test_levels_that_no_estimator_read_are_those_that_come_back() -> None:
    torch.manual_seed(0)
    bare = replace(PRESETS["compact"], tone=None, exposure=None, weather=None, veil=None)
    model = ReCoFuse(bare).requires_grad_(False)
    model.detail = returning(0.9)
    levels = [(255 * image).round().byte() for image in frames_of(1, 64, 96)]
    of_levels, of_floats = (model.fuse(*images, seeds=3).vis for images in (levels, [each / 255 for each in levels]))
    assert of_levels is not None
    assert of_floats is not None
    assert float((of_levels.float() - 255 * of_floats).abs().max()) <= 1
    assert float((of_levels.float() - levels[0].float()).abs().mean()) < 20
