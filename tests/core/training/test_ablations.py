"""The ablations: every variant is settings alone, runs share their data, and the tables say what the runs say."""

import json
from pathlib import Path

import pytest
import torch

from recofuse_core import load_pretrained, save_checkpoint
from recofuse_core.data import write_image
from recofuse_core.errors import ConfigError
from recofuse_core.scenes.scene import make_scene
from recofuse_core.training.ablations import (
    COLUMNS,
    SHARED_PARTS,
    VARIANTS,
    WHOLE,
    Result,
    collect,
    config_of,
    read_ablations,
    run_ablations,
    table,
)

ROOT = Path(__file__).parents[3]
CONFIG = """
preset = "compact"
version = "t"
[ablation]
num_crops = 6
num_seeds = 2
validation_side = 48
[data]
root = "pairs"
validation_root = "pairs"
[model]
steps = 1
[model.denoiser]
width = 8
encoder_blocks = [1]
middle_blocks = 1
decoder_blocks = [1]
[model.fusion]
width = 32
time_dim = 128
num_groups = 8
[[stages]]
name = "coupled"
steps = 2
batch_size = 2
fusion_batch = 1
crop = 32
learning_rate = 1e-3
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for seed in range(2):
        scene = make_scene(seed, 56, 64)
        write_image(tmp_path / "pairs" / "vis" / f"{seed}.png", scene.vis)
        write_image(tmp_path / "pairs" / "ir" / f"{seed}.png", scene.ir)
    (tmp_path / "ablations.toml").write_text(CONFIG)
    return tmp_path / "ablations.toml"


def test_the_shipped_configuration_holds_every_variant() -> None:
    config = read_ablations(ROOT / "configs" / "ablations.toml")
    assert config.num_seeds == 3
    assert len({variant.name for variant in VARIANTS}) == 10
    described = set()
    for variant in VARIANTS:
        train = config_of(config, variant, 2)
        assert train.seed == config.train.seed + 2
        described.add((train.model_config, train.stages))
    assert len(described) == 10  # each differs from every other in model or stage


def test_runs_share_what_is_frozen_and_are_not_run_twice(config: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    output = tmp_path / "runs"
    results = run_ablations(config, output, variants=["no-time", WHOLE], say=lines.append)
    assert [(result.variant, result.seed) for result in results] == [
        (WHOLE, 0),
        ("no-time", 0),
        (WHOLE, 1),
        ("no-time", 1),
    ]
    assert set(COLUMNS) <= results[0].scores.keys()
    assert results[0].scores != results[2].scores  # another seed
    assert len(lines) == 4
    shipped = load_pretrained("compact").state_dict()
    model = load_pretrained(output / "no-time-1" / "model.safetensors")
    assert not model.config.fusion.uses_time
    for name, tensor in model.state_dict().items():
        if name.startswith(SHARED_PARTS):
            assert torch.allclose(tensor, shipped[name], rtol=1e-2, atol=1e-3), name
    first = load_pretrained(output / "whole-0" / "model.safetensors").state_dict()
    second = load_pretrained(output / "whole-1" / "model.safetensors").state_dict()
    assert not torch.equal(first["denoiser.vis.intro.weight"], second["denoiser.vis.intro.weight"])

    assert run_ablations(config, output, variants=[WHOLE], say=lines.append) == results
    assert len(lines) == 4
    config.write_text(CONFIG.replace("learning_rate = 1e-3", "learning_rate = 2e-3"))
    assert collect(read_ablations(config), output) == []  # of another configuration
    weights = tmp_path / "other.safetensors"
    initial = load_pretrained("compact")
    save_checkpoint(weights, initial.state_dict(), initial.config, name="compact", version="other")
    config.write_text(CONFIG.replace("[ablation]", f'[ablation]\ninitial = "{weights}"'))
    assert collect(read_ablations(config), output) == []  # behind other weights
    config.write_text(CONFIG.replace("num_seeds = 2", "num_seeds = 1"))
    assert collect(read_ablations(config), output) == results[:2]  # fewer seeds of the same


def test_tables_give_means_spreads_and_agreement() -> None:
    def result(variant: str, seed: int, value: float) -> Result:
        return Result(variant, seed, dict.fromkeys(COLUMNS, value))

    results = [result(WHOLE, seed, value) for seed, value in enumerate((20.0, 21.0, 22.0))]
    results += [result("late", seed, value) for seed, value in enumerate((19.0, 21.5, 20.0))]
    text = table(results)
    scores, differences = text.split("\n\n")
    assert "| whole model | 3 | 21.00 ±1.00 |" in scores
    assert "| II: TIM at the end alone | 3 | -0.83 (2/3) |" in differences
    assert "whole model |" not in differences.split("\n", 1)[1]
    assert "±" not in table(results[:1])
    assert json.dumps(results[0].scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "coupled"', 'name = "branches"'), "one coupled stage"),
        (("steps = 2", "steps = 2\nrollout = true"), "one coupled stage"),
        (('validation_root = "pairs"\n', ""), "validation_root"),
        (("num_crops", "num_craps"), "not a configuration of ablations"),
        (("[ablation]", "[ablation"), "not a configuration of ablations"),
    ],
)
def test_configurations_that_compare_nothing_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(CONFIG.replace(*change))
    with pytest.raises(ConfigError, match=message):
        read_ablations(path)


def test_unknown_variants_are_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown variants early; known: whole, no-tim"):
        run_ablations(config, tmp_path / "runs", variants=["early"])
