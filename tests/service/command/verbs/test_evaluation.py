"""`recofuse evaluate`: files in, files and a readable last line out."""

import csv
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from recofuse_core import save_checkpoint
from recofuse_core.data import read_vis, write_image
from recofuse_core.model import ModelConfig, build_model
from recofuse_core.networks import DenoiserConfig, FusionConfig, GatedAutoencoderConfig
from recofuse_core.scenes.scene import make_scene
from recofuse_core.sde import SDEConfig
from service.command.cli import app

TINY = ModelConfig(
    GatedAutoencoderConfig(8, 8, encoder_blocks=(1, 1), decoder_blocks=(1, 1), latent_channels=4),
    DenoiserConfig(4, 8, encoder_blocks=(1, 1), decoder_blocks=(1, 1), sinusoid_dim=8, time_dim=16, prediction="clean"),
    FusionConfig(4, 32, time_dim=128, num_groups=8),
    SDEConfig(),
    sampler="ode1",
    steps=2,
)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for number in range(3):
        scene = make_scene(number, 64, 80)
        write_image(tmp_path / "pairs" / "vis" / f"{number}.png", scene.vis)
        write_image(tmp_path / "pairs" / "ir" / f"{number}.png", scene.ir)
    return tmp_path / "pairs"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, build_model(TINY).state_dict(), TINY, name="tiny", version="0.1")
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_every_output_is_written(pairs: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run(
        *("--pairs", pairs, "--weights", weights, "--device", "cpu", "--strength", "strong", "--seed", 4, "--limit", 2),
        *(
            "--steps",
            3,
            "--sampler",
            "posterior",
            "--coupling",
            "off",
            "--baselines",
            "--others",
            f"copy={pairs / 'vis'}",
        ),
        *("--json", out / "a.json", "--csv", out / "a.csv", "--markdown", out / "a.md", "--sheet", out / "a.png"),
        *("--save", out / "pictures", "--plot", out / "a.svg"),
    )
    assert code == 0, stderr
    summary = json.loads((out / "a.json").read_text())["summary"]
    expected = {
        "num_pairs": 2,
        "seed": 4,
        "strength": "strong",
        "weights": "tiny",
        "weights_version": "0.1",
        "steps": 3,
        "sampler": "posterior",
        "coupled": False,
    }
    assert expected.items() <= summary.items()
    assert isinstance(summary["vis_psnr_gain_db"], float)
    assert isinstance(summary["ir_psnr_gain_db"], float)
    rows = list(csv.DictReader((out / "a.csv").read_text().splitlines()))
    methods = {"degraded", "recofuse", "opencv", "copy", "opencv-average", "opencv-maximum", "opencv-weighted"}
    assert {row["method"] for row in rows} == methods
    assert (out / "a.md").read_text() in stdout + "\n"
    assert stdout.splitlines()[-1].startswith(
        "2 pairs, strong, seed 4, tiny 0.1, posterior 3 steps, coupling off: vis "
    )
    assert read_vis(out / "a.png").shape[0] == 3
    texts = [text.text for text in ElementTree.fromstring((out / "a.svg").read_text()).findall(".//{*}text")]
    assert {"opencv-average", "vis PSNR, dB", "Qabf"} <= set(texts)
    assert len(list((out / "pictures").iterdir())) == 11
    assert read_vis(out / "pictures" / "fused_recofuse" / "1.png").shape == (3, 64, 80)


def test_named_degradations_are_put_in_alone(pairs: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run(
        *("--pairs", pairs, "--weights", "none", "--limit", 1, "--vis-kinds", "haze,jpeg", "--ir-kinds", "stripes"),
        *("--json", tmp_path / "a.json", "--baselines"),
    )
    assert code == 0, stderr
    whole = json.loads((tmp_path / "a.json").read_text())
    (pair,) = whole["pairs"]
    assert [step.split("(")[0] for step in pair["vis_recipe"].split(" + ")] == ["haze", "jpeg"]
    assert pair["ir_recipe"].startswith("stripes(")
    assert " + " not in pair["ir_recipe"]
    assert (whole["summary"]["vis_kinds"], whole["summary"]["ir_kinds"]) == (["haze", "jpeg"], ["stripes"])
    assert "medium vis=haze+jpeg ir=stripes" in stdout


def test_other_methods_are_scored_without_a_model(pairs: Path) -> None:
    code, stdout, _ = run("--pairs", pairs, "--weights", "none", "--others", f"copy={pairs / 'vis'}")
    assert code == 0
    assert "| copy |" in stdout
    assert "| recofuse |" not in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coupling", "maybe"], "on or off"),
        (["--others", "nameless"], "NAME=DIR"),
        (["--others", "a=/x", "--others", "a=/y"], "each name once"),
        (["--others", "a=/does/not/exist"], "not a folder"),
        (["--strength", "huge"], "light, medium, strong"),
        (["--split", "train"], "'train'"),
        (["--plot", "scores.pdf"], "end in .svg"),
        (["--vis-kinds", "hail"], "accepted: blur"),
        (["--weights", "/does/not/exist.safetensors"], "exist.safetensors"),
        (["--exposure", "bright"], "as_shot or lit"),
        (["--exposure", "lit", "--protocol", "1"], "no renditions"),
        (["--each-kind", "--plot", "a.svg"], "--plot goes with"),
        (["--references", "a"], "--references goes with --pictures"),
        (["--streets", "1"], "one of --pairs, --pictures, --frames, --streets, not --pairs and --streets"),
    ],
)
def test_mistakes_get_one_line(pairs: Path, arguments: list[str], message: str) -> None:
    code, _, stderr = run("--pairs", pairs, "--weights", "none", *arguments)
    assert code == 2
    assert message in stderr
    assert "Traceback" not in stderr


def test_a_missing_matplotlib_is_said_before_anything_is_scored(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, stdout, stderr = run("--pairs", pairs, "--weights", "none", "--baselines", "--plot", tmp_path / "a.svg")
    assert (code, stdout) == (2, "")
    assert "pip install 'recofuse[plot]'" in stderr
    assert "Traceback" not in stderr


def test_kinds_one_by_one(pairs: Path, weights: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run(
        *("--pairs", pairs, "--weights", weights, "--device", "cpu", "--limit", 1, "--each-kind", "--ir-kinds", ""),
        *("--vis-kinds", "fog,downpour", "--json", tmp_path / "a.json", "--save", tmp_path / "pictures"),
    )
    assert code == 0, stderr
    summary = json.loads((tmp_path / "a.json").read_text())["summary"]
    assert list(summary["kinds"]) == ["vis fog", "vis downpour"]
    assert summary["protocol_version"] == 2
    assert stdout.splitlines()[-1].startswith(
        "1 pairs, medium, as_shot, seed 0, tiny 0.1, gain in dB of each kind alone:"
    )
    assert read_vis(tmp_path / "pictures" / "vis_fog" / "fused_recofuse" / "0.png").shape == (3, 64, 80)


def test_pictures_without_a_partner(pairs: Path, weights: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run(
        *("--pictures", pairs / "vis", "--references", pairs / "vis", "--weights", weights, "--device", "cpu"),
        *("--json", tmp_path / "a.json", "--save", tmp_path / "out", "--limit", 2),
    )
    assert code == 0, stderr
    summary = json.loads((tmp_path / "a.json").read_text())["summary"]
    assert (summary["num_pictures"], summary["num_references"]) == (2, 2)
    assert isinstance(summary["piqe"], float)
    assert stdout.splitlines()[-1].startswith("2 pictures, protocol 2, as_shot, seed 0, tiny 0.1: mean ")
    assert read_vis(tmp_path / "out" / "0.png").shape == (3, 64, 80)


def test_flicker_of_frames(pairs: Path, weights: Path, tmp_path: Path) -> None:
    scene = make_scene(0, 64, 80)
    for number in range(2):
        write_image(tmp_path / "clip" / "vis" / f"{number}.png", scene.vis)
        write_image(tmp_path / "clip" / "ir" / f"{number}.png", scene.ir)
    code, stdout, stderr = run(
        *("--frames", tmp_path / "clip", "--weights", weights, "--device", "cpu", "--json", tmp_path / "a.json")
    )
    assert code == 0, stderr
    flicker = json.loads((tmp_path / "a.json").read_text())["summary"]["flicker"]
    assert flicker["vis"]["pixels"] == flicker["vis"]["pixels_clean"] == 0  # two equal frames, two equal results
    assert stdout.splitlines()[-1].startswith("1 sequences of 2 frames in all, protocol 2, as_shot, seed 0, tiny 0.1: ")
    assert run("--frames", tmp_path / "clip", "--weights", "none")[0] == 2
    assert run("--frames", tmp_path / "clip", "--sheet", "a.png")[2].strip().endswith("--sheet goes with --pairs")
    assert "not none" in run("--weights", "none")[2]
