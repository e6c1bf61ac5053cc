"""What every engine that runs the model promises, whatever it runs it with."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from recofuse_core.degradations.recipes import degrade_ir, degrade_vis
from recofuse_core.scenes.scene import make_scene
from service.terms.errors import InternalError, InvalidInputError
from service.terms.jobs import Exposure, FusionOptions, Output, Part
from service.terms.settings import EngineSettings
from service.work.engine import Engine, PassOptions, Pixels
from service.work.engines import model_engine


@pytest.fixture(scope="module", params=["onnx", "torch"])
def engine(request: pytest.FixtureRequest) -> Engine:
    engine = model_engine(EngineSettings(runtime=request.param, device="cpu", warm_up_sizes=("32x48",)))
    with pytest.raises(InternalError):
        _ = engine.info
    engine.load()
    engine.warm_up()
    return engine


def frames(batch: int, height: int = 48, width: int = 64) -> tuple[Pixels, Pixels]:
    rng = np.random.default_rng(7)
    vis, ir = (rng.integers(0, 256, shape, np.uint8) for shape in ((batch, height, width, 3), (batch, height, width)))
    return vis, ir


def options(engine: Engine, **asked: object) -> PassOptions:
    return PassOptions.of(FusionOptions.model_validate(asked), engine.info)


def test_it_says_what_runs(engine: Engine) -> None:
    info = engine.info
    assert (info.model_name, info.device) == ("compact", "cpu")
    assert info.default_steps >= 1
    assert info.exposures == get_args(Exposure)
    assert engine.prepares_in_s is None


@pytest.mark.parametrize("output", Output)
def test_pictures_have_the_shape_of_their_frames(engine: Engine, output: Output) -> None:
    vis, ir = frames(2, 41, 67)
    pictures = engine.fuse(vis, ir, options(engine, output=output), [0, 1])
    assert set(pictures) == set(output.parts)
    for part, pixels in pictures.items():
        assert pixels.dtype == np.uint8
        assert pixels.shape == (ir.shape if part is Part.IR else vis.shape)
        assert pixels.flags.c_contiguous


def test_an_item_depends_on_itself_and_its_seed_alone(engine: Engine) -> None:
    vis, ir = frames(2)
    asked = options(engine, sampler="euler", steps=3)
    both = engine.fuse(vis, ir, asked, [3, 4])[Part.FUSED]
    again = engine.fuse(vis, ir, asked, [3, 4])[Part.FUSED]
    alone = engine.fuse(vis[1:], ir[1:], asked, [4])[Part.FUSED]
    other = engine.fuse(vis[1:], ir[1:], asked, [5])[Part.FUSED]
    assert np.array_equal(both, again)
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(alone, other)


def test_a_shape_that_can_never_work_is_the_callers_fault(engine: Engine) -> None:
    vis, ir = frames(1, 16, 64)
    with pytest.raises(InvalidInputError, match="at least 32"):
        engine.fuse(vis, ir, options(engine), [0])


def psnr(picture: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.square(picture.astype(float) - reference).mean()))


def test_what_was_put_in_comes_out(engine: Engine) -> None:
    """Noise, squeezed contrast and stripes on a generated street: both pictures are restored."""
    scene, generator = make_scene(3, 192, 256), torch.Generator().manual_seed(1)
    clean_vis, clean_ir = levels(scene.vis), levels(scene.ir)[..., 0]
    vis = levels(degrade_vis(scene.vis, generator, kinds=["gaussian_noise"]).image)
    ir = levels(degrade_ir(scene.ir, generator, kinds=["low_contrast", "stripes"]).image)[..., 0]
    asked = replace(options(engine, output="all"), exposure="as_shot")
    pictures = engine.fuse(vis[None], ir[None], asked, [0])
    assert psnr(pictures[Part.VIS][0], clean_vis) - psnr(vis, clean_vis) > 3  # dB; 5.4 with compact 2.0.0
    assert psnr(pictures[Part.IR][0], clean_ir) - psnr(ir, clean_ir) > 1.5  # 2.7


def levels(image: torch.Tensor) -> NDArray[np.uint8]:
    """(C, H, W) in [0, 1] to (H, W, C)."""
    return np.ascontiguousarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
