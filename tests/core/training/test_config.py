"""Configurations of a run: what is read, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recofuse_core import PRESETS
from recofuse_core.errors import ConfigError
from recofuse_core.training.config import DataConfig, TrainConfig, read_config
from tests.core.training.small import CONFIG, ROOT, stage


def test_a_model_differs_from_its_preset_where_the_configuration_says_so() -> None:
    data = DataConfig(root="x")
    model = {"coupling": "late", "fusion": {"uses_time": False, "width": 32, "time_dim": 128, "num_groups": 16}}
    config = TrainConfig("compact", "0", data, (stage("coupled"),), model=model).model_config
    assert (config.coupling, config.fusion.uses_time, config.fusion.width) == ("late", False, 32)
    assert config.denoiser == PRESETS["compact"].denoiser
    wrongs: tuple[dict[str, Any], ...]
    wrongs = ({"fusion": {"weight": 3}}, {"steps": "many"}, {"tonality": {}}, {"coupling": "sometimes"})
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            _ = replace(TrainConfig("compact", "0", data, ()), model=wrong).model_config


@pytest.mark.parametrize(
    "change",
    [
        {"updates": "sometimes"},
        {"updates": "joint", "rollout": True},
        {"rollout_steps": (3,)},
        {"rollout": True, "rollout_steps": (3, 0)},
        {"name": "branches", "updates": "joint"},
        {"intensity_target": "minimum"},
    ],
)
def test_stages_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(stage("coupled"), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("preset = ", "perset = "), "not a training configuration"),
        (('preset = "compact"', 'preset = "huge"'), "unknown preset"),
        (("steps = 2", "stepz = 2"), "not a training configuration"),
        (("steps = 2", 'steps = "2"'), r"stage 1\.steps cannot be '2'"),
        (("steps = 2", "steps = 2\nupdates = 'joint'"), "coupled stage without rollout"),
        (('optimizer = "lion"', 'optimizer = "adam"'), r"stage 2\.optimizer cannot be 'adam'"),
        (("[data]", "[data]\ngroup_weights = { a = 'b' }"), r"data\.group_weights"),
        (("[data]", "[model.fusion]\nwidth = 'wide'\n[data]"), r"fusion\.width cannot be 'wide'"),
        (("[data]", "[date]"), "not a training configuration"),
        (("[[stages]]", "[[stages"), "not a training configuration"),
    ],
)
def test_wrong_configurations_are_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.replace(*change))
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_the_shipped_configuration_reads() -> None:
    config = read_config(ROOT / "configs" / "compact.toml")
    weather = ["weather", "weather", "weather_odds"]
    others = [
        "exposure",
        "tone",
        "veil",
        "veil_fall",
        "autoencoder",
        "branches",
        "coupled",
        "coupled",
        "coupled",
        "detail",
    ]
    assert [s.name for s in config.stages] == weather + others
    assert "llvip_" in config.data.exclude_prefixes
