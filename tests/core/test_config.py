"""Configs survive as JSON, and older ones take the defaults of what was added later."""

import dataclasses
import json

import pytest

from recofuse_core.config import model_config_from
from recofuse_core.model import PRESETS
from tests.core.states import PAPER


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_as_json(preset: str) -> None:
    config = PRESETS[preset]
    assert model_config_from(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_settings_added_later_take_their_default() -> None:
    values = json.loads(json.dumps(dataclasses.asdict(PAPER)))
    del values["sde"]["eps"]
    assert model_config_from(values) == PAPER
