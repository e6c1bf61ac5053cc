"""Frames through weather: what the estimator is to find, and a stage that learns it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from recofuse_core.degradations.recipes import Fall, VisKind
from recofuse_core.errors import ConfigError
from recofuse_core.training import weather
from recofuse_core.training.config import DataConfig, TrainConfig
from recofuse_core.training.pairs import PairSource
from recofuse_core.training.trainer import Trainer
from recofuse_core.training.weather import WeatherSource, weather_loss
from recofuse_core.weather import WeatherConfig, WeatherEstimator
from tests.core.training.small import scenes, stage

SIDE = 48
SIZES: dict[str, Any] = {"channels": (8, 8, 8), "blocks": (1, 1, 1)}


def source(photos: tuple[np.ndarray, ...] = ()) -> WeatherSource:
    return WeatherSource(PairSource(DataConfig(root="scenes"), scenes()), photos)


def test_frames_have_weather_or_none_and_say_what_it_added(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SENSED_PROBABILITY", "NOISY_PROBABILITY", "OTHER_PROBABILITY"):
        monkeypatch.setattr(weather, name, 0.0)
    batch = source().draw(32, SIDE, Generator().manual_seed(0))
    assert batch.given.shape == batch.added.shape == (32, 3, SIDE, SIDE)
    assert batch.ir.shape == (32, 1, SIDE, SIDE)
    assert 0 <= float(batch.given.min()) <= float(batch.given.max()) <= 1
    scene = batch.given - batch.added
    assert -0.01 < float(scene.min()) <= float(scene.max()) < 1.01
    has_weather = batch.added.flatten(1).abs().amax(dim=1) > 0.02
    assert 16 <= int(has_weather.sum()) <= 30  # three quarters
    assert float(batch.added[~has_weather].abs().max()) == 0


def test_noise_of_the_camera_is_no_weather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weather, "FALL_PROBABILITY", 0.0)
    monkeypatch.setattr(weather, "SENSED_PROBABILITY", 0.0)
    monkeypatch.setattr(weather, "NOISY_PROBABILITY", 1.0)
    batch = source().draw(16, SIDE, Generator().manual_seed(0))
    assert float(batch.added.abs().max()) == 0
    assert float(batch.given.flatten(1).std(dim=1).min()) > 0


def test_photographs_come_in_beside_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weather, "FALL_PROBABILITY", 0.0)
    for name in ("SENSED", "NOISY", "OTHER", "DARKER", "GREY"):
        monkeypatch.setattr(weather, f"{name}_PROBABILITY", 0.0)
    red = np.zeros((120, 90, 3), np.uint8)
    red[..., 0] = 200
    batch = source((red,)).draw(40, SIDE, Generator().manual_seed(0))
    is_red = (batch.given[:, 0] > 0.75).flatten(1).all(dim=1) & (batch.given[:, 1:] == 0).flatten(1).all(dim=1)
    assert 3 <= int(is_red.sum()) <= 16  # 22 % of them


def test_a_right_answer_costs_less_than_a_wrong_one() -> None:
    estimator = WeatherEstimator(WeatherConfig(**SIZES))
    drawn = source().draw(4, SIDE, Generator().manual_seed(1))
    rainy, clear = (drawn._replace(added=torch.full_like(drawn.added, added)) for added in (0.1, 0.0))
    assert all(term.requires_grad for term in weather_loss(estimator, rainy).values())
    estimator.requires_grad_(False)  # it finds nothing
    assert estimator.head.bias is not None
    least = math.log10(weather.FLOOR)
    missed = weather_loss(estimator, rainy)["log"]
    assert weather_loss(estimator, clear)["log"] == pytest.approx(weather.CLEAR_WEIGHT * least)
    estimator.head.bias.fill_(0.1)
    assert weather_loss(estimator, rainy)["log"] == pytest.approx(least, abs=1e-4)
    assert missed > least + 1
    estimator.judge.weight.zero_()
    estimator.judge.bias.fill_(3.0)  # it is sure of weather
    assert weather_loss(estimator, rainy)["odds"] < 0.1 * weather_loss(estimator, clear)["odds"]


def test_the_stage_learns_and_moves_the_estimator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fall that is learnt at once: half of every pixel."""
    monkeypatch.setattr(weather, "SHARES", {VisKind.SNOWFALL: 1.0})
    monkeypatch.setattr(weather, "draw_fall", lambda scene, *_: Fall(scene, torch.full((1, 1, 1), 0.5), 1.0))
    data = DataConfig(root="scenes")
    few = replace(stage("weather", 60), warmup_steps=5, learning_rate=3e-3)
    trainer = Trainer(
        TrainConfig("compact", "test", data, (few,), model={"weather": SIZES}), PairSource(data, scenes())
    )
    seen = source().draw(8, SIDE, Generator().manual_seed(2))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.model.weather is not None
    untrained = {name: float(term.detach()) for name, term in weather_loss(trainer.model.weather, seen).items()}
    reports = list(trainer.run_stage())
    trained = {name: float(term.detach()) for name, term in weather_loss(trainer.model.weather, seen).items()}
    assert set(reports[0].losses) == set(trained)
    assert trained["log"] < untrained["log"] - 0.3  # half of the squared error, as decimal logarithm
    after = trainer.model.state_dict()
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])} == {"weather"}


def test_odds_are_learnt_on_features_that_stay() -> None:
    data = DataConfig(root="scenes")
    config = TrainConfig(
        "compact", "test", data, (replace(stage("weather_odds", 3), num_frames=5),), model={"weather": SIZES}
    )
    trainer = Trainer(config, PairSource(data, scenes()))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert [set(report.losses) for report in trainer.run_stage()] == [{"odds"}] * 3
    after = trainer.model.state_dict()
    moved = {name.rpartition(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"weather.witness", "weather.judge"}


def test_a_model_without_an_estimator_cannot_train_one() -> None:
    data = DataConfig(root="scenes")
    config = TrainConfig("paper", "test", data, (stage("weather", 1),))
    with pytest.raises(ConfigError, match="weather estimator"):
        Trainer(config, PairSource(data, scenes()))
