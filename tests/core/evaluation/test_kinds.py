"""One kind after the other: each row is the run of that kind alone."""

import json
from pathlib import Path

import pytest

from recofuse_core.data import PairFiles, find_pairs, write_image
from recofuse_core.degradations.recipes import IrKind, VisKind
from recofuse_core.errors import ConfigError
from recofuse_core.evaluation.kinds import KindsReport, each_kind
from recofuse_core.evaluation.protocol import EvaluationSettings, evaluate
from recofuse_core.evaluation.report import Report
from recofuse_core.scenes.scene import make_scene


@pytest.fixture
def pairs(tmp_path: Path) -> list[PairFiles]:
    for number in range(2):
        scene = make_scene(number, 48, 56)
        write_image(tmp_path / "vis" / f"{number}.png", scene.vis)
        write_image(tmp_path / "ir" / f"{number}.png", scene.ir)
    return find_pairs(tmp_path)


def test_every_kind_is_put_in_alone() -> None:
    settings = dict(each_kind(EvaluationSettings()))
    assert list(settings) == [f"vis {kind}" for kind in VisKind] + [f"ir {kind}" for kind in IrKind]
    assert {"vis fog", "vis downpour", "vis snowfall"} <= settings.keys()
    assert (settings["vis fog"].vis_kinds, settings["vis fog"].ir_kinds) == (("fog",), ())
    assert (settings["ir stripes"].vis_kinds, settings["ir stripes"].ir_kinds) == ((), ("stripes",))
    named = EvaluationSettings(vis_kinds=("snow",), ir_kinds=None)
    assert list(dict(each_kind(named))) == ["vis snow"]
    with pytest.raises(ConfigError, match="light, medium or strong"):
        list(each_kind(EvaluationSettings("clean")))
    with pytest.raises(ConfigError, match="version 1"):
        list(each_kind(EvaluationSettings(version=1)))


def test_a_row_tells_what_its_kind_did(pairs: list[PairFiles]) -> None:
    asked = EvaluationSettings(vis_kinds=("fog", "jpeg"), ir_kinds=("stripes",))
    reports = {
        name: Report(tuple(scores for scores, _ in evaluate(None, pairs, settings)), settings)
        for name, settings in each_kind(asked)
    }
    report = KindsReport(reports)
    rows = report.rows()
    assert list(rows) == ["vis fog", "vis jpeg", "ir stripes"]
    fog, stripes = reports["vis fog"].summary(), reports["ir stripes"].summary()
    assert rows["vis fog"]["psnr_degraded_db"] == fog["vis_psnr_degraded_db"]
    assert rows["ir stripes"]["psnr_degraded_db"] == stripes["ir_psnr_degraded_db"]
    assert fog["ir_psnr_degraded_db"] is None  # the other modality stays clean
    whole = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert whole["summary"]["kinds"]["vis fog"] == rows["vis fog"]
    assert whole["kinds"]["vis fog"]["summary"]["vis_kinds"] == ["fog"]
    assert "| vis jpeg |" in report.markdown()
    assert report.line() == "2 pairs, medium, as_shot, seed 0: no model was run"
