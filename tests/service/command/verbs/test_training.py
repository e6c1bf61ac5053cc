"""`recofuse export`, `ablate` and `train`: files in, files and a readable last line out."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from recofuse_core import devices, save_checkpoint
from recofuse_core.data import write_image
from recofuse_core.devices import Card, Sight
from recofuse_core.scenes.scene import make_scene
from recofuse_core.training.config import StageName
from service.command.verbs import training
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


def test_every_stage_may_be_the_first() -> None:
    assert get_args(StageName) == training.STAGES


def test_a_process_of_a_group_sets_its_own_gpu_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen by torch's calls, for want of GPUs: NCCL takes the current one, which is the first until it is set."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set", device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **more: calls.append((backend, more)))
    training._join_group(torch.device("cuda:2"))
    training._join_group(torch.device("cpu"))
    assert calls == [("set", torch.device("cuda:2")), ("nccl", {"device_id": torch.device("cuda:2")}), ("gloo", {})]


@pytest.mark.parametrize(("asked", "device"), [("auto", "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", ""), ("cpu", "cpu")])
def test_each_process_of_a_group_takes_the_gpu_of_its_rank(
    asked: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[torch.device] = []
    cards = tuple(Card("Tesla T4", (7, 5)) for _ in range(4))
    sight = Sight("2.13.0+cu130", "13.0", ("sm_75",), cards, "580.95.05", has_device_files=True)
    monkeypatch.setattr(devices, "observe", lambda: sight)
    monkeypatch.setattr(training, "_join_group", joined.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    config = tmp_path / "none.toml"
    result = run("train", config, "-o", tmp_path / "r", "--device", asked, TORCHELASTIC_RUN_ID="1", LOCAL_RANK="3")
    assert_one_line(result, "none.toml" if device else "takes the GPU of its rank")
    assert joined == ([torch.device(device)] if device else [])
