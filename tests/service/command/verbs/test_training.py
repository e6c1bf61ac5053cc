"""`recofuse export`, `ablate` and `train`: files in, files and a readable last line out."""

import json
from pathlib import Path

import pytest

from recofuse_core import save_checkpoint
from recofuse_core.data import write_image
from recofuse_core.scenes.scene import make_scene
from tests.core.tiny import GATED, tiny_model
from tests.core.training.test_ablations import CONFIG
from tests.service.command.calls import assert_one_line, run


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for number in range(2):
        scene = make_scene(number, 56, 64)
        write_image(tmp_path / "pairs" / "vis" / f"{number}.png", scene.vis)
        write_image(tmp_path / "pairs" / "ir" / f"{number}.png", scene.ir)
    return tmp_path / "pairs"


def test_a_labelled_folder_is_exported(pairs: Path, tmp_path: Path) -> None:
    weights = tmp_path / "tiny.safetensors"
    save_checkpoint(weights, tiny_model().state_dict(), GATED, name="tiny", version="1")
    (pairs / "labels").mkdir()
    (pairs / "labels" / "0.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    arguments = ("export", "--pairs", pairs, "--weights", weights, "--device", "cpu", "-o", tmp_path / "out")
    result = run(*arguments, "--task", "detection", "--names", "car,person")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith("2 images, 1 with a label")
    assert '1: "person"' in (tmp_path / "out" / "data.yaml").read_text()
    assert len(list((tmp_path / "out" / "images" / "train").iterdir())) == 2
    for task, message in (("tracking", "detection or segmentation"), ("segmentation", "no label")):
        assert_one_line(run(*arguments, "--task", task), message)


def test_an_ablation_is_run_and_tabulated(pairs: Path, tmp_path: Path) -> None:
    config = tmp_path / "ablations.toml"
    config.write_text(CONFIG.replace("num_seeds = 2", "num_seeds = 1"))
    arguments = ("ablate", config, "-o", tmp_path / "runs", "--device", "cpu")
    files = ("--markdown", tmp_path / "a.md", "--json", tmp_path / "a.json")
    result = run(*arguments, "--variant", "late", "--variant", "whole", *files)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "2 runs of 2 models with 1 seeds"
    assert (tmp_path / "a.md").read_text() in result.stdout
    assert [each["variant"] for each in json.loads((tmp_path / "a.json").read_text())] == ["whole", "late"]
    assert_one_line(run(*arguments, "--variant", "early"), "unknown variants early")


def test_train_tells_what_is_wrong_with_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("preset = 'compact'\nsurprise = 1\n[data]\nroot = '.'\n[[stages]]\n")
    assert_one_line(run("train", config, "-o", tmp_path / "run"), "run.toml")
    assert_one_line(run("train", config, "-o", tmp_path / "run", "--first-stage", "fourth"), "coupled")
