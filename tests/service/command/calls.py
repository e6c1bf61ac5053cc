"""The `recofuse` command called here, within this process or as one of its own; and a model that costs nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from recofuse_core import ModelConfig
from recofuse_core.networks import DenoiserConfig, FusionConfig, GatedAutoencoderConfig
from recofuse_core.sde import SDEConfig
from service.command.cli import app

ROOT = Path(__file__).parents[3]
TINY = ModelConfig(
    GatedAutoencoderConfig(8, 8, encoder_blocks=(1, 1), decoder_blocks=(1, 1), latent_channels=4),
    DenoiserConfig(4, 8, encoder_blocks=(1,), decoder_blocks=(1,), sinusoid_dim=8, time_dim=16, prediction="clean"),
    FusionConfig(4, 32, time_dim=128, num_groups=8),
    SDEConfig(),
    sampler="posterior",
    steps=2,
)


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def assert_one_line(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("recofuse: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


def recofuse_process(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "service", *map(str, arguments)]
