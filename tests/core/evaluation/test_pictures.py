"""Pictures without a partner: what stands in for the infrared, references, and what the report says."""

import json
from pathlib import Path

import pytest
import torch

from recofuse_core.data import to_float, write_image
from recofuse_core.degradations.physics import gaussian_noise
from recofuse_core.errors import ConfigError, DatasetError
from recofuse_core.evaluation import pictures
from recofuse_core.evaluation.protocol import EvaluationSettings
from recofuse_core.scenes.scene import make_scene
from tests.core.evaluation.fusers import Scripted, halved


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(("a__1", "a__2", "b")):
        clean = make_scene(number // 2, 64, 80).vis
        write_image(tmp_path / "given" / f"{name}.png", gaussian_noise(clean, 0.05, generator).clamp(0, 1))
        write_image(tmp_path / "clean" / f"{name[0]}.png", clean)
    return tmp_path / "given"


def test_takes_of_a_scene_share_its_reference(folder: Path) -> None:
    settings = EvaluationSettings()
    model = Scripted(halved)
    scored = list(pictures.evaluate_pictures(model, folder, settings, references=folder.parent / "clean"))
    assert [scores.name for scores, _ in scored] == ["a__1", "a__2", "b"]
    for scores, restored in scored:
        assert scores.given.psnr_db is not None
        assert scores.given.psnr_db > 24  # the noise's, if the reference is the right one
        assert scores.restored.psnr_db is not None
        assert scores.restored.psnr_db < scores.given.psnr_db
        assert scores.restored.matched_psnr_db is not None
        assert scores.restored.matched_psnr_db > 22  # a gain undoes the halving
        assert scores.restored.mean == pytest.approx(scores.given.mean / 2, abs=0.01)
        assert restored.shape == (3, 64, 80)
    report = pictures.PicturesReport(tuple(scores for scores, _ in scored), settings, "halving", "1")
    summary = json.loads(json.dumps(report.as_json(), allow_nan=False))["summary"]
    assert summary["num_references"] == summary["num_pictures"] == 3
    assert summary["piqe"] == pytest.approx(sum(scores.restored.piqe for scores, _ in scored) / 3)
    assert summary["piqe_given"] == pytest.approx(sum(scores.given.piqe for scores, _ in scored) / 3)
    assert report.line().startswith("3 pictures, protocol 2, as_shot, seed 0, halving 1: mean ")
    assert "matched" in report.line()


def test_a_picture_gets_infrared_of_its_name_or_of_another_scene(folder: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "ir" / "b.png", torch.full((1, 64, 80), 77, dtype=torch.uint8))
    write_image(tmp_path / "ir" / "x.png", torch.linspace(0, 1, 40).expand(1, 30, 40))
    model = Scripted(halved)
    settings = EvaluationSettings(exposure="lit")
    list(pictures.evaluate_pictures(model, folder, settings, infrared=tmp_path / "ir"))
    assert {call.exposure for call in model.calls} == {"lit"}
    assert torch.equal(model.calls[2].ir, to_float(torch.full((1, 64, 80), 77, dtype=torch.uint8)))
    assert all(call.ir.shape == (1, 64, 80) for call in model.calls)
    alone = [pictures.partner_of(name, {}, (64, 80), 0) for name in ("a", "a", "b")]
    assert torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[0], alone[2])


def test_how_many_became_better_is_counted() -> None:
    def scores(before: float, after: float) -> pictures.PictureScores:
        given, restored = (pictures.PictureFigures(0.3, None, piqe, 1.0) for piqe in (before, after))
        return pictures.PictureScores("a", given, restored)

    report = pictures.PicturesReport(
        (scores(40, 30), scores(40, 50), scores(40, 39), scores(40, 40)), EvaluationSettings(), "some", "1"
    )
    assert report.share_better("piqe") == 0.5
    assert report.share_better("brisque") is None
    assert report.summary()["brisque"] is None
    assert "BRISQUE not measured; PIQE 40.0 to 39.8, better on 50 %" in report.line()


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    settings = EvaluationSettings()
    (tmp_path / "none").mkdir()
    with pytest.raises(DatasetError, match="no images"):
        pictures.evaluate_pictures(None, tmp_path / "none", settings)
    with pytest.raises(DatasetError, match="no reference"):
        pictures.evaluate_pictures(None, folder, settings, references=tmp_path / "none")
    with pytest.raises(DatasetError, match="no images"):
        pictures.evaluate_pictures(None, folder, settings, infrared=tmp_path / "none")
    with pytest.raises(ConfigError, match="version 1"):
        pictures.evaluate_pictures(None, folder, EvaluationSettings(version=1))
    write_image(tmp_path / "clean" / "b.png", torch.zeros(3, 40, 40))
    with pytest.raises(DatasetError, match="differ in size"):
        list(pictures.evaluate_pictures(None, folder, settings, references=tmp_path / "clean"))
