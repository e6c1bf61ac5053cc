"""What the tone stage learns from, its loss, and that it learns."""

from dataclasses import replace

import pytest
import torch
from torch import Generator

from recofuse_core.errors import ConfigError
from recofuse_core.networks import ToneConfig, ToneEstimator
from recofuse_core.training.tone import ToneSamples, tone_loss
from tests.core.training.small import stage, trainer


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


def test_the_tone_stage_asks_for_frames_and_an_estimator() -> None:
    with pytest.raises(ConfigError, match="context must be at least 64"):
        next(trainer(stage("tone"), context=0).run_stage())
    run = trainer(stage("tone"), context=64)
    run.model.tone = None
    with pytest.raises(ConfigError, match="no tone estimator"):
        next(run.run_stage())
