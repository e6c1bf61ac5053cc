"""The protocol: reproducible, independent of order, and its means are the means of its parts."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from recofuse_core.data import PairFiles, find_pairs, read_pair, write_image
from recofuse_core.errors import ConfigError, DatasetError, ShapeError
from recofuse_core.evaluation.protocol import EvaluationSettings, Fuser, PairImages, PairScores, evaluate, item_seed
from recofuse_core.evaluation.quality import psnr
from recofuse_core.evaluation.report import Report
from recofuse_core.evaluation.sheets import SHEET_WIDTH, sheet_row, stack_rows
from recofuse_core.model import ModelConfig, build_model
from recofuse_core.networks import DenoiserConfig, FusionConfig, GatedAutoencoderConfig
from recofuse_core.picture import FusionOutput
from recofuse_core.sde import SDEConfig
from tests.core.evaluation.fusers import Scripted, smoothed, unchanged


@pytest.fixture
def pairs(tmp_path: Path) -> list[PairFiles]:
    for number, stem in enumerate(("a", "b", "c")):
        generator = torch.Generator().manual_seed(number)
        for folder, channels in (("vis", 3), ("ir", 1)):
            coarse = torch.rand(1, channels, 5, 6, generator=generator)
            image = torch.nn.functional.interpolate(coarse, size=(48, 56), mode="bilinear")[0]
            write_image(tmp_path / "pairs" / folder / f"{stem}.png", image)
    (tmp_path / "pairs" / "manifest.csv").write_text("name,dataset\na,one\nb,two\nc,two\n", encoding="utf-8")
    return find_pairs(tmp_path / "pairs")


def run(
    pairs: list[PairFiles], settings: EvaluationSettings, model: Fuser | None = None, **options: object
) -> list[tuple[PairScores, PairImages]]:
    return list(evaluate(model or Scripted(smoothed), pairs, settings, **options))  # type: ignore[arg-type]


def test_seeds_are_pinned() -> None:
    # written into docs/evaluation.md: a change here makes every published figure incomparable
    assert item_seed(0, "scene", "vis") == 0x17E49EFD  # printf 0/scene/vis | sha256sum | head -c 8
    assert (
        len({item_seed(seed, name, role) for seed in (0, 1) for name in "ab" for role in ("vis", "ir", "model")}) == 12
    )


def test_a_pair_is_degraded_alike_whatever_surrounds_it(pairs: list[PairFiles]) -> None:
    settings = EvaluationSettings(seed=3)
    forward, backward = run(pairs, settings), run(pairs[::-1], settings)[::-1]
    for (scores, images), (other_scores, other_images) in zip(forward, backward, strict=True):
        assert scores == other_scores
        assert torch.equal(images.vis_degraded, other_images.vis_degraded)
    assert run(pairs[1:2], settings)[0][0] == forward[1][0]
    assert run(pairs, replace(settings, seed=4))[0][0].vis_recipe != forward[0][0].vis_recipe


def test_both_modalities_are_degraded_and_compared_with_the_files(pairs: list[PairFiles]) -> None:
    for (scores, images), files in zip(run(pairs, EvaluationSettings()), pairs, strict=True):
        clean = read_pair(files)
        assert scores.vis_recipe
        assert scores.ir_recipe
        assert scores.restoration["degraded"].vis_psnr_db == psnr(images.vis_degraded, clean.vis)
        assert math.isfinite(scores.restoration["degraded"].ir_psnr_db)
        assert images.ir_restored is not None
        assert scores.restoration["recofuse"].ir_psnr_db == psnr(images.ir_restored, clean.ir)


def test_the_report_holds_the_means(pairs: list[PairFiles]) -> None:
    scores = [item[0] for item in run(pairs, EvaluationSettings(with_baselines=True))]
    report = Report(tuple(scores), EvaluationSettings(), weights="tiny", version="7", steps=3, sampler="ode2")
    summary = report.summary()
    restored = [score.restoration["recofuse"].vis_psnr_db for score in scores]
    degraded = [score.restoration["degraded"].vis_psnr_db for score in scores]
    assert summary["vis_psnr_db"] == pytest.approx(fmean(restored))
    assert summary["vis_psnr_gain_db"] == pytest.approx(fmean(restored) - fmean(degraded))
    assert summary["vis_psnr_degraded_db"] == pytest.approx(fmean(degraded))
    assert summary["qabf"] == pytest.approx(fmean(score.fusion["recofuse"].qabf for score in scores))
    expected = {"num_pairs": 3, "seed": 0, "strength": "medium", "weights": "tiny", "weights_version": "7"}
    assert expected.items() <= summary.items()
    assert {"ir_psnr_gain_db", "vis_ssim", "ir_ssim", "en", "max_corr_gradient", "noise"} <= summary.keys()
    whole = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert whole["summary"] == summary
    assert list(whole["sources"]) == ["one", "two"]
    assert whole["sources"]["one"]["fusion"]["recofuse"]["en"] == scores[0].fusion["recofuse"].en
    assert list(whole["methods"]["fusion"]) == ["recofuse", "opencv-average", "opencv-maximum", "opencv-weighted"]
    assert list(whole["methods"]["restoration"]) == ["degraded", "recofuse", "opencv"]

    markdown = report.markdown()
    assert f"| recofuse | {summary['vis_psnr_db']:.2f} | {summary['vis_psnr_gain_db']:+.2f} |" in markdown
    assert "### two (2)" in markdown
    assert "clean references" in markdown
    assert len({line.count("|") for line in markdown.splitlines() if line.startswith("| restoration")}) == 1
    assert f"vis {summary['vis_psnr_db']:.2f} dB" in report.line()
    assert "tiny 7" in report.line()
    assert "\n" not in report.line()

    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert [row["method"] for row in rows[:3]] == ["degraded", "recofuse", "opencv"]
    assert len(rows) == 3 * 6
    assert float(rows[1]["restored_vis_psnr_db"]) == pytest.approx(restored[0], abs=1e-5)
    assert rows[0]["en"] == ""


def test_clean_inputs_have_no_gain(pairs: list[PairFiles]) -> None:
    settings = EvaluationSettings(strength="clean")
    scores = tuple(item[0] for item in run(pairs, settings, Scripted(unchanged)))
    assert scores[0].restoration["recofuse"].vis_psnr_db == math.inf
    report = Report(scores, settings, weights="tiny", version="7", steps=1, sampler="ode1")
    summary = report.summary()
    assert summary["vis_psnr_db"] is None
    assert summary["vis_psnr_gain_db"] is None
    assert summary["vis_ssim"] == 1
    json.dumps(report.as_json(), allow_nan=False)
    assert "vis - dB (-)" in report.line()
    smoothed = Report(tuple(item[0] for item in run(pairs, settings)), settings).summary()
    assert smoothed["vis_psnr_db"] > 20
    assert smoothed["vis_psnr_gain_db"] is None


def test_given_inputs_are_compared_with_their_clean_partners_if_any(pairs: list[PairFiles], tmp_path: Path) -> None:
    settings = EvaluationSettings(strength="given")
    scores, images = run(pairs, settings)[0]
    assert scores.restoration == {}
    assert torch.equal(images.vis_degraded, images.vis_clean)
    report = Report((scores,), settings, weights="tiny", version="7", steps=1, sampler="ode1")
    assert report.reference == "inputs"
    assert report.summary()["vis_psnr_db"] is None
    assert "restoration" not in report.markdown()
    assert "dB" not in report.line()

    for stem in ("a", "b", "c"):
        write_image(tmp_path / "pairs" / "vis_lq" / f"{stem}.png", torch.full((3, 48, 56), 0.5))
    scores, images = run(find_pairs(tmp_path / "pairs"), settings)[0]
    assert set(images.vis_degraded.flatten().tolist()) == {128}
    assert math.isfinite(scores.restoration["degraded"].vis_psnr_db)
    assert scores.restoration["degraded"].ir_psnr_db == math.inf


def test_other_methods_stand_in_the_same_table(pairs: list[PairFiles], tmp_path: Path) -> None:
    for files in pairs:
        write_image(tmp_path / "theirs" / f"{files.name}.png", read_pair(files).vis)
    others = {"theirs": tmp_path / "theirs"}
    settings = EvaluationSettings()
    items = list(evaluate(None, pairs, settings, others=others))
    report = Report(tuple(item[0] for item in items), settings)
    assert report.methods == ["theirs"]
    assert report.fusion_means("theirs")["chroma"] == 0
    assert "no model was run" in report.line()
    assert report.summary()["en"] is None
    assert report.restorers == ["degraded"]

    with pytest.raises(ConfigError, match="recofuse"):
        evaluate(None, pairs, settings, others={"recofuse": tmp_path / "theirs"})
    write_image(tmp_path / "theirs" / "c.png", torch.zeros(3, 48, 57))
    with pytest.raises(DatasetError, match="57x48"):
        list(evaluate(None, pairs, settings, others=others))
    (tmp_path / "theirs" / "b.png").unlink()
    with pytest.raises(DatasetError, match="no image for b"):
        evaluate(None, pairs, settings, others=others)


def test_the_model_is_told_its_seed_and_whether_to_couple(pairs: list[PairFiles]) -> None:
    model = Scripted(smoothed)
    run(pairs, EvaluationSettings(seed=5, coupled=False), model)
    assert [(call.seeds, call.coupled) for call in model.calls] == [
        (item_seed(5, name, "model"), False) for name in "abc"
    ]


TINY = ModelConfig(
    GatedAutoencoderConfig(8, 8, encoder_blocks=(1, 1), decoder_blocks=(1, 1), latent_channels=4),
    DenoiserConfig(4, 8, encoder_blocks=(1, 1), decoder_blocks=(1, 1), sinusoid_dim=8, time_dim=16, prediction="clean"),
    FusionConfig(4, 32, time_dim=128, num_groups=8),
    SDEConfig(),
    sampler="ode1",
    steps=2,
)


def test_a_network_is_scored_reproducibly_and_coupling_matters(pairs: list[PairFiles]) -> None:
    torch.manual_seed(0)
    model = build_model(TINY).eval()
    settings = EvaluationSettings()
    first = run(pairs[:2], settings, model)
    assert [item[0] for item in first] == [item[0] for item in run(pairs[:2], settings, model)]
    alone = run(pairs[:2], replace(settings, coupled=False), model)
    assert alone[0][0].restoration["recofuse"] != first[0][0].restoration["recofuse"]
    assert alone[0][0].restoration["degraded"] == first[0][0].restoration["degraded"]
    more_steps = run(pairs[:2], replace(settings, steps=3, sampler="posterior"), model)
    assert more_steps[0][0].fusion != first[0][0].fusion


def test_a_model_that_leaves_out_an_image_is_refused(pairs: list[PairFiles]) -> None:
    with pytest.raises(ShapeError, match="fused"):
        run(pairs, EvaluationSettings(), Scripted(lambda vis, ir: FusionOutput(fused=None, vis=vis, ir=ir)))


def test_unknown_strengths_and_empty_reports_are_refused(pairs: list[PairFiles]) -> None:
    with pytest.raises(ConfigError, match="light, medium, strong"):
        run(pairs, EvaluationSettings(strength="huge"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no pair"):
        Report((), EvaluationSettings())


def test_the_sheet_shows_every_picture(pairs: list[PairFiles]) -> None:
    items = run(pairs, EvaluationSettings(with_baselines=True))
    rows = [sheet_row(scores.name, images) for scores, images in items]
    sheet = stack_rows(rows)
    assert sheet.dtype == torch.uint8
    assert sheet.shape == (3, sum(row.shape[1] for row in rows), 10 * (SHEET_WIDTH + 4))
    without_model = [images for _, images in evaluate(None, pairs[:1], EvaluationSettings())]
    assert sheet_row("a", without_model[0]).shape[2] == 4 * (SHEET_WIDTH + 4)
    parts = items[0][1].by_part()
    assert list(parts)[:6] == ["vis_clean", "vis_degraded", "vis_restored", "ir_clean", "ir_degraded", "ir_restored"]
    assert torch.equal(parts["fused_recofuse"], items[0][1].fused["recofuse"])
    with pytest.raises(ShapeError):
        stack_rows([])


def test_version_one_is_version_two_as_shot(pairs: list[PairFiles]) -> None:
    one, two = (run(pairs, EvaluationSettings(version=version)) for version in (1, 2))
    assert [item[0] for item in one] == [item[0] for item in two]
    first, second = (
        Report((item[0][0],), EvaluationSettings(version=version)).summary() for version, item in ((1, one), (2, two))
    )
    assert second == first | {"protocol_version": 2, "exposure": "as_shot"}
    with pytest.raises(ConfigError, match="no renditions"):
        EvaluationSettings(version=1, exposure="lit")
    with pytest.raises(ConfigError, match="no version 3"):
        EvaluationSettings(version=3)


def test_references_are_in_the_rendition_that_is_asked_for(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 12, 14, generator=generator)
    bright = torch.nn.functional.interpolate(coarse, size=(48, 56), mode="bilinear")[0]
    for name, image in (("bright", bright), ("dark", 0.5 * bright**2)):
        write_image(tmp_path / "vis" / f"{name}.png", image)
        write_image(tmp_path / "ir" / f"{name}.png", bright[:1])
    (_, bright_images), (scores, dark_images) = run(
        find_pairs(tmp_path), EvaluationSettings("clean", exposure="lit"), Scripted(unchanged)
    )
    assert torch.equal(bright_images.vis_clean, bright_images.vis_degraded)
    assert 0.3 < float(dark_images.vis_clean.float().mean()) / 255 < 0.45
    assert float(dark_images.vis_degraded.float().mean()) / 255 < 0.22
    assert scores.restoration["recofuse"].vis_psnr_db == psnr(dark_images.vis_degraded, dark_images.vis_clean)
    assert math.isinf(scores.restoration["recofuse"].ir_psnr_db)
