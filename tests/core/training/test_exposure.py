"""What the exposure stage learns from: the folder, targets of nights, frames of all kinds; and that it learns."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from recofuse_core.data import write_image
from recofuse_core.degradations.physics import haze
from recofuse_core.errors import ConfigError, DatasetError
from recofuse_core.exposure import ExposureConfig, ExposureEstimator
from recofuse_core.losses import luma
from recofuse_core.scenes.scene import make_scene
from recofuse_core.training.config import DataConfig, StageConfig, TrainConfig
from recofuse_core.training.exposure import (
    SHARES,
    TRUE_NIGHT,
    VEILED_MEAN,
    WELL_EXPOSED,
    Frame,
    FrameKind,
    FrameSource,
    LightSamples,
    References,
    is_crisp,
    lighting_loss,
    read_references,
    transmission,
    well_exposed,
)
from recofuse_core.training.pairs import PairSource
from recofuse_core.training.trainer import Trainer

SMALL = ExposureConfig(cells=16, num_quantiles=6, width=32, channels=(4, 6, 8), num_levels=3)
SIDE = 64


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def levels(image: Tensor) -> np.ndarray:
    """(C, H, W) in [0, 1] to (H, W, C) levels."""
    made: np.ndarray = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return made


@cache
def day(seed: int) -> Tensor:
    """A well exposed frame with black and white in it."""
    vis = make_scene(seed, 96, 128).vis
    stretched = ((vis - vis.quantile(0.02)) / (vis.quantile(0.98) - vis.quantile(0.02))).clamp(0, 1)
    return stretched.pow(torch.tensor(0.42).log() / stretched.mean().log())


@cache
def pairs() -> list[tuple[str, np.ndarray, np.ndarray]]:
    made = []
    for seed in range(4):
        vis = day(seed) if seed < 3 else 0.15 * day(seed)
        made.append((f"Road_{seed}D", levels(vis), levels(make_scene(seed, 96, 128).ir)[..., 0]))
    return made


@cache
def references() -> References:
    lit = levels(day(5))
    dark = [Frame((lit * 0.2).astype(np.uint8), lit)]
    hazy = levels(haze(day(1), 0.8, 0.4))
    return References(dark, [levels(day(6))], {"road_1d": hazy})


def source() -> FrameSource:
    return FrameSource(pairs(), references())


# --- the folder -------------------------------------------------------------------------------------------------------


def test_references_are_read_by_their_names(tmp_path: Path) -> None:
    frames = {
        "lowlight/low/alley__1.png": 0.1,
        "lowlight/low/alley__2.png": 0.2,
        "lowlight/normal/alley.png": 0.5,
        "haze/hazy/Road_1D.png": 0.7,
        "photos/bird.png": 0.4,
    }
    for name, level in frames.items():
        write_image(tmp_path / name, torch.full((3, 32, 40), level))
    write_image(tmp_path / "thermal/yard.png", torch.full((1, 24, 30), 0.3))
    read = read_references(tmp_path)
    assert [(frame.given.mean().round(), frame.lit.mean().round()) for frame in read.dark] == [(26, 128), (51, 128)]
    assert [photo.shape for photo in read.photos] == [(32, 40, 3)] * 2
    assert [frame.shape for frame in read.thermal] == [(24, 30)]
    assert list(read.foggy) == ["road_1d"]


def test_a_dark_frame_without_its_reference_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "lowlight/low/alley__1.png", torch.zeros(3, 32, 32))
    with pytest.raises(DatasetError, match="alley__1, but lowlight/normal has no alley"):
        read_references(tmp_path)
    with pytest.raises(DatasetError, match="is not a folder"):
        read_references(tmp_path / "nowhere")


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_night_is_lit_to_the_mean_of_a_road_and_keeps_its_order(seed: int) -> None:
    night = (0.4 * day(seed)).pow(1.6)
    lit = well_exposed(night)
    assert 0.29 < float(lit.mean()) < 0.41
    before, after = luma(night[None]).flatten(), luma(lit[None]).flatten()
    darkest, brightest = before < before.quantile(0.1), before > before.quantile(0.95)
    assert after[darkest].mean() < 0.5 * after[brightest].mean()


def test_a_black_sky_is_not_lit_to_grey() -> None:
    night = torch.full((3, 128, 128), 0.01)
    night[:, 96:, 32:96] = (0.5 * day(0))[:, 64:96, 32:96]
    lit = well_exposed(night)
    assert float(lit[:, :90].mean()) < 0.1
    assert float(lit.mean()) < 0.25
    assert float(lit[:, 96:, 32:96].mean()) > float(night[:, 96:, 32:96].mean()) * 1.3


@pytest.mark.parametrize("level", [0.0, 0.004, 0.3, 1.0])
def test_frames_without_content_have_finite_targets(level: float) -> None:
    lit = well_exposed(torch.full((3, 64, 64), level))
    assert torch.isfinite(lit).all()
    assert float(lit.mean()) <= max(0.2, level + 0.1)


def test_haze_of_its_own_tells_a_frame_that_is_not_crisp() -> None:
    assert is_crisp(levels(day(0)))
    assert not is_crisp(levels(haze(day(0), 0.8, 0.5)))


def test_transmission_is_found_again() -> None:
    clear, through = day(2), torch.linspace(0.2, 0.9, 96).view(1, -1, 1).expand(1, 96, 128)
    hazy = haze(clear, 1.0, through)
    found = transmission(hazy, clear)
    assert float((found - through)[:, 8:-8].abs().mean()) < 0.08


# --- frames and samples -----------------------------------------------------------------------------------------------


def test_frames_are_of_every_kind_and_the_generators() -> None:
    made = source()
    first, again = ([made.draw(SIDE, generator) for _ in range(120)] for generator in (seeded(1), seeded(1)))
    assert {kind for *_, kind in first} == set(FrameKind)
    for (given, lit, ir, kind), (same, *_) in zip(first, again, strict=True):
        assert torch.equal(given, same)
        assert given.shape == lit.shape == (3, SIDE, SIDE)
        assert ir.shape == (1, SIDE, SIDE)
        for image in (given, lit, ir):
            assert 0 <= float(image.min()) <= float(image.max()) <= 1
        if kind in (FrameKind.KEPT, FrameKind.EMPTY):
            assert float((given.mean() - lit.mean()).abs()) < 0.02
        if kind in (FrameKind.DARK_PAIR, FrameKind.DARKENED, FrameKind.NIGHT):
            assert given.mean() < lit.mean() + 0.02
        if kind in (FrameKind.FOG_PAIR, FrameKind.FOGGED):  # no veil is asked to be lifted, and no darkness kept
            assert float(lit.mean()) > max(WELL_EXPOSED[0], float(given.mean())) - 0.03
            assert float(lit.std() - given.std()) < (0.02 if float(given.mean()) > WELL_EXPOSED[0] + 0.02 else 0.2)


def test_the_target_of_a_veiled_frame_has_no_step() -> None:
    """Frames that differ by a thousandth are to be lit alike: as they are from the first mean on that is right."""
    made = source()
    made.kinds = [FrameKind.FOGGED]
    means = torch.arange(150, 400) / 1000
    targets = []
    for mean in means.tolist():
        fogged = torch.full((3, SIDE, SIDE), mean)
        made.scene = lambda *_, fogged=fogged: (fogged, fogged, fogged[:1], FrameKind.FOGGED)  # type: ignore[method-assign]
        targets.append(float(made.draw(SIDE, seeded(0))[1].mean()))
    found = torch.tensor(targets)
    assert float(found.diff().abs().max()) < 0.005
    is_right = means > WELL_EXPOSED[0]
    assert torch.allclose(found[is_right], means[is_right], atol=1e-5)
    assert torch.allclose(found[means < TRUE_NIGHT], torch.tensor(VEILED_MEAN), atol=1e-4)


def test_a_covered_lens_is_to_stay_black() -> None:
    made = source()
    made.kinds = [FrameKind.EMPTY]
    frames = [made.scene(SIDE, seeded(seed)) for seed in range(40)]
    assert all(torch.equal(given, lit) for given, lit, *_ in frames)
    assert sum(float(given.max()) < 0.04 for given, *_ in frames) > 20
    assert all(float(given.std()) < 0.2 for given, *_ in frames)


def test_kinds_without_frames_are_passed_over() -> None:
    made = FrameSource(pairs()[:2], References())
    assert {made.scene(SIDE, seeded(seed))[3] for seed in range(120)} == {
        FrameKind.DARKENED,
        FrameKind.KEPT,
        FrameKind.FOGGED,
        FrameKind.EMPTY,
    }
    with pytest.raises(DatasetError, match="no frame to learn exposure from"):
        FrameSource([], references())


def test_samples_exchange_infrared_and_mirror_without_touching_features() -> None:
    estimator = ExposureEstimator(SMALL)
    samples = LightSamples.draw(estimator, source(), 4, SIDE, seeded(0))
    order, where = torch.tensor([1, 2, 3, 0]), torch.tensor([True, False, True, False])
    mixed = samples.with_infrared_of(samples.take(order), where, estimator)
    assert torch.equal(mixed.given, samples.given)
    assert torch.equal(mixed.ir[0], samples.ir[1])
    assert torch.equal(mixed.ir[1], samples.ir[1])
    cells = torch.cat([mixed.given, mixed.ir], dim=1).float()
    assert torch.allclose(estimator.features(cells), mixed.features, atol=2e-3)
    mirrored = samples.flipped()
    assert torch.equal(mirrored.lit.flip(-1), samples.lit)
    assert mirrored.features is samples.features
    with pytest.raises(ConfigError, match="at least 16 px"):
        LightSamples.draw(estimator, source(), 1, 8, seeded(0))


def test_a_perfect_lighting_has_no_loss_but_the_logarithms_floor() -> None:
    estimator = ExposureEstimator(SMALL).requires_grad_(False)  # the identity
    cells = 0.1 + 0.8 * torch.rand(2, 3, 16, 16, generator=seeded(0))
    features = estimator.features(torch.cat([cells, cells[:, :1]], dim=1))
    losses = lighting_loss(estimator, LightSamples(features, cells, cells, cells[:, :1]))
    assert float(losses["light"]) < 1e-6
    assert float(losses["spread"]) < 1e-6
    assert float(losses["log"]) == pytest.approx(-0.5, abs=1e-2)


# --- the stage --------------------------------------------------------------------------------------------------------


def trainer(steps: int, frames: FrameSource | None, num_frames: int = 8) -> Trainer:
    stage = StageConfig(
        name="exposure",
        steps=steps,
        batch_size=16,
        crop=SIDE,
        learning_rate=3e-3,
        warmup_steps=10,
        num_frames=num_frames,
        swap_probability=0.3,
    )
    data = DataConfig(root="scenes")
    model = {
        "exposure": {"cells": 16, "num_quantiles": 6, "width": 32, "channels": (8, 12, 16), "num_levels": 3},
        "tone": {"width": 4},
    }
    config = TrainConfig(preset="compact", version="test", data=data, stages=(stage,), model=model)
    return Trainer(config, PairSource(data, pairs()), frames=frames)


def test_the_stage_learns_to_light_and_to_leave_alone() -> None:
    run = trainer(80, source(), num_frames=40)
    frozen = {name: value.clone() for name, value in run.model.state_dict().items() if not name.startswith("exposure.")}
    list(run.run_stage())
    run.finish_stage()
    estimator = run.model.exposure
    assert estimator is not None
    for name, value in frozen.items():
        assert torch.equal(run.model.state_dict()[name], value), name
    with torch.no_grad():
        vis, ir = day(1)[None], make_scene(1, 96, 128).ir[None]
        dark = (0.2 * vis).clamp(0, 1)
        lit, kept = estimator(dark, ir)(dark), estimator(vis, ir)(vis)
    assert float((lit - vis).abs().mean()) < 0.4 * float((dark - vis).abs().mean())
    assert float((kept - vis).abs().mean()) < 0.1


def test_the_stage_asks_for_frames_and_an_estimator() -> None:
    with pytest.raises(ConfigError, match=r"data\.references"):
        next(trainer(1, None).run_stage())
    run = trainer(1, source())
    run.model.exposure = None
    with pytest.raises(ConfigError, match="no exposure estimator"):
        next(run.run_stage())


def test_older_weights_leave_the_estimator_as_the_identity() -> None:
    run = trainer(1, source())
    older = {name: value for name, value in run.model.state_dict().items() if not name.startswith("exposure.")}
    again = trainer(1, source())
    again.start_from(older)
    assert all(torch.equal(again.model.state_dict()[name], value) for name, value in older.items())
    assert again.model.exposure is not None
    vis, ir = day(1)[None], make_scene(1, 96, 128).ir[None]
    with torch.no_grad():
        assert torch.allclose(again.model.exposure(vis, ir)(vis), vis.clamp_min(1e-5), atol=1e-6)


def test_a_resumed_stage_goes_on_as_it_would_have(tmp_path: Path) -> None:
    whole = trainer(6, source())
    list(whole.run_stage())
    first = trainer(6, source())
    steps = first.run_stage()
    for _ in range(3):
        next(steps)
    first.save(tmp_path / "state.pt")
    second = trainer(6, source())
    second.resume(tmp_path / "state.pt")
    list(second.run_stage())
    expected = whole.model.state_dict()
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_shares_name_every_kind() -> None:
    assert set(SHARES) == set(FrameKind)
    assert sum(SHARES.values()) == pytest.approx(1)
