"""What the tone stage learns from, its loss, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Generator

from recofuse_core.errors import ConfigError
from recofuse_core.networks import ToneConfig, ToneEstimator
from recofuse_core.training.config import DataConfig
from recofuse_core.training.pairs import PairSource
from recofuse_core.training.tone import ToneSamples, ToneSource, tone_loss, using_its_range
from tests.core.training.small import scenes, stage, trainer


def test_frames_of_different_pairs_can_be_put_together() -> None:
    tone = ToneEstimator(ToneConfig(grid=8, num_quantiles=5, width=4))
    generator = Generator().manual_seed(2)
    vis, ir = torch.rand(3, 3, 20, 20, generator=generator), torch.rand(3, 1, 20, 20, generator=generator)
    cells = torch.cat([vis, ir], dim=1).flatten(2)
    samples = ToneSamples(tone.features(vis, ir), cells, cells + 1)
    order, where = torch.tensor([1, 2, 0]), torch.tensor([True, False, True])
    mixed = samples.with_infrared_of(samples.take(order), where, tone)
    wanted = torch.where(where[:, None, None, None], ir[order], ir)
    assert torch.equal(mixed.features, tone.features(vis, wanted))
    assert torch.equal(mixed.degraded, torch.cat([vis, wanted], dim=1).flatten(2))
    assert torch.equal(mixed.clean, mixed.degraded + 1)


def test_flat_curves_cost_more_with_a_spread_weight() -> None:
    tone = ToneEstimator(ToneConfig(grid=8, num_quantiles=5, width=4)).requires_grad_(False)  # the identity
    clean = torch.rand(2, 4, 50, generator=Generator().manual_seed(0)) * 0.5 + 0.25
    features = torch.zeros(2, len(tone.infrared_features()))
    flat = ToneSamples(features, clean * 0.5 + 0.25, clean)
    without, with_spread = (tone_loss(tone, flat, weight) for weight in (0.0, 2.0))
    for name, channels in (("vis", slice(3)), ("ir", slice(3, 4))):
        wanted = clean[:, channels].flatten(1).std(dim=1).mean()  # half of it is missing, and it counts twice
        assert float(with_spread[name] - without[name]) == pytest.approx(float(wanted), rel=1e-3)
    exact = ToneSamples(features, clean, clean)
    assert float(tone_loss(tone, exact, 2.0)["ir"]) == pytest.approx(float(tone_loss(tone, exact)["ir"]), abs=1e-3)


def test_tone_curves_learn_to_undo_what_acts_on_whole_frames() -> None:
    run = trainer(replace(stage("tone", 150), batch_size=16, num_frames=60), context=64)
    losses = [sum(report.losses.values()) for report in run.run_stage()]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


PHOTO = np.random.default_rng(0).integers(60, 200, (70, 90, 3)).astype(np.uint8)
THERMAL = np.random.default_rng(1).integers(20, 240, (60, 50)).astype(np.uint8)


def tone_source(photos: float = 0.0, thermal: float = 0.0) -> ToneSource:
    pairs = PairSource(DataConfig(root="scenes", context=32), scenes())
    return ToneSource(pairs, [PHOTO], [THERMAL], photos, thermal)


def test_photographs_and_other_cameras_are_left_so_or_degraded() -> None:
    source, generator = tone_source(photos=1, thermal=1), Generator().manual_seed(3)
    frames = [source.frame(48, generator) for _ in range(40)]
    for frame in frames:
        assert frame.vis.shape == frame.degraded_vis.shape == (3, 48, 48)
        assert frame.ir.shape == frame.degraded_ir.shape == (1, 48, 48)
        assert all(0 <= float(image.min()) <= float(image.max()) <= 1 for image in frame)
    level = 0.5 / 255 + 1e-6
    as_they_are = [float((frame.degraded_vis - frame.vis).abs().max()) < level for frame in frames]
    assert 4 <= sum(as_they_are) <= 24
    undegraded = [float((frame.degraded_ir - frame.ir).abs().max()) < level for frame in frames]
    assert 2 <= sum(undegraded) <= 24


@pytest.mark.parametrize(("photos", "thermal"), [(0, 0), (1, 0), (0, 1)])
def test_frames_of_pairs_are_replaced_as_often_as_asked(photos: float, thermal: float) -> None:
    tone = ToneEstimator(ToneConfig(grid=8, num_quantiles=5, width=4))
    source = tone_source(photos, thermal)
    source.photos, source.thermal = [np.zeros_like(PHOTO)], [np.zeros_like(THERMAL)]
    samples = ToneSamples.draw(tone, source, 6, Generator().manual_seed(4))
    assert [float(each.max()) < 0.01 for each in samples.clean[:, :3]] == 6 * [photos == 1]
    assert [float(each.std()) < 1e-3 for each in samples.clean[:, 3:]] == 6 * [thermal == 1]


def test_a_flat_thermogram_is_given_more_contrast_and_never_more_than_twice() -> None:
    assert np.array_equal(using_its_range(THERMAL), THERMAL)
    flat = 80 + THERMAL // 8
    stretched = using_its_range(flat)
    assert np.ptp(stretched) == 2 * np.ptp(flat)
    assert 15 <= stretched.min() <= 25
    even = np.full((20, 30), 90, np.uint8)
    assert np.ptp(using_its_range(even)) == 0


def test_the_tone_stage_asks_for_frames_and_an_estimator() -> None:
    with pytest.raises(ConfigError, match="context must be at least 64"):
        next(trainer(stage("tone"), context=0).run_stage())
    with pytest.raises(ConfigError, match=r"photographs .* data\.references"):
        next(trainer(replace(stage("tone"), photo_probability=0.5), context=64).run_stage())
    with pytest.raises(ConfigError, match=r"other cameras' .* data\.references"):
        next(trainer(replace(stage("tone"), thermal_probability=0.5), context=64).run_stage())
    with pytest.raises(ConfigError, match="tone stage"):
        replace(stage("coupled"), photo_probability=0.5)
    with pytest.raises(ConfigError, match="tone stage"):
        replace(stage("coupled"), thermal_probability=0.5)
    run = trainer(stage("tone"), context=64)
    run.model.tone = None
    with pytest.raises(ConfigError, match="no tone estimator"):
        next(run.run_stage())
