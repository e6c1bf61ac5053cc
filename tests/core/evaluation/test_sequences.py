"""Flicker: what counts as still, how change is measured there, and what the report says of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recofuse_core.data import write_image
from recofuse_core.errors import ConfigError, DatasetError
from recofuse_core.evaluation import sequences
from recofuse_core.evaluation.protocol import EvaluationSettings
from recofuse_core.evaluation.sequences import Frame, SequenceFrames, SequencesReport, evaluate_sequences
from tests.core.evaluation.fusers import Scripted, brightened

SETTINGS = EvaluationSettings()


def scene(at: int) -> tuple[Tensor, Tensor]:
    """A grey wall with a white box at a column, uint8."""
    ir = torch.full((1, 96, 160), 90, dtype=torch.uint8)
    ir[:, 20:60, at : at + 24] = 250
    return ir.expand(3, -1, -1).clone(), ir


def standing(count: int, noise: float = 0.0) -> SequenceFrames:
    def frames() -> Iterator[Frame]:
        generator = torch.Generator().manual_seed(0)
        for number in range(count):
            vis, ir = scene(10 + 8 * number)
            extra = noise * torch.randn(vis.shape, generator=generator)
            yield Frame((vis + extra).clamp(0, 255).byte(), ir, vis, ir)

    return SequenceFrames("wall", count, frames)


def test_what_moves_and_its_surroundings_are_not_still() -> None:
    before, after = (scene(at)[1] / 255 for at in (10, 18))
    is_still = sequences.still_places(before, after)
    assert not is_still[20:60, 8:44].any()
    assert is_still[:, 70:].all()
    noisy = (after + 2 / 255 * torch.randn(after.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert sequences.still_places(before, noisy)[:, 70:].all()
    assert not sequences.still_places(before, before + 5 / 255).any()


def test_noise_is_change_of_pixels_and_light_of_levels() -> None:
    everywhere = torch.ones(96, 160, dtype=torch.bool)
    before = torch.full((3, 96, 160), 0.5)
    assert sequences.change(before, before + 4 / 255, everywhere) == pytest.approx((4, 4), rel=1e-4)
    noise = 8 / 255 * torch.randn(3, 96, 160, generator=torch.Generator().manual_seed(2))
    pixels, levels = sequences.change(before, before + noise, everywhere)
    assert pixels == pytest.approx(8 * (2 / torch.pi) ** 0.5, rel=0.03)
    assert levels < 0.5
    half = everywhere.clone()
    half[:, 80:] = False
    changed = before.clone()
    changed[:, :, 80:] = 1
    assert sequences.change(before, changed, half) == (0, 0)


def test_a_wandering_result_is_told_from_a_calm_one() -> None:
    calm, wandering = (
        next(evaluate_sequences(Scripted(brightened(levels)), [standing(4)], SETTINGS, is_steady=False))
        for levels in ([0.0, 0.0, 0.0, 0.0], [0.0, 6.0, 0.0, 6.0])
    )
    assert calm.flicker["vis"].pixels == calm.flicker["vis"].levels == 0
    assert wandering.flicker["vis"].pixels == pytest.approx(6, rel=1e-3)
    assert wandering.flicker["vis"].levels == pytest.approx(6, rel=1e-3)
    assert wandering.flicker["fused"].pixels == pytest.approx(6, rel=1e-3)
    assert wandering.flicker["ir"].pixels == 0
    assert 0.3 < calm.still < 0.9
    assert wandering.flicker["vis"].ratios() == {"pixels_ratio": None, "levels_ratio": None}


def test_a_wandering_result_is_held_as_in_a_stream() -> None:
    levels = [0.0, 8.0] * 4
    alone, held = (
        next(evaluate_sequences(Scripted(brightened(levels)), [standing(8)], SETTINGS, is_steady=is_steady))
        for is_steady in (False, True)
    )
    for part in ("fused", "vis"):
        assert held.flicker[part].levels < 0.4 * alone.flicker[part].levels
    assert held.flicker["ir"].levels == 0
    lines = [
        SequencesReport((s,), SETTINGS, "adding", "1", is_steady).line()
        for s, is_steady in ((alone, False), (held, True))
    ]
    assert "adding 1, each frame alone: change" in lines[0]
    assert "adding 1: change" in lines[1]


def test_noise_is_averaged_away_as_in_a_calm_stream() -> None:
    model = Scripted(brightened([0.0] * 24))
    alone, calm = (
        next(evaluate_sequences(model, [standing(12, noise=6)], SETTINGS, is_calm=is_calm)) for is_calm in (False, True)
    )
    for part in ("fused", "vis"):
        assert calm.flicker[part].pixels < 0.4 * alone.flicker[part].pixels
    assert calm.vis_psnr_db > alone.vis_psnr_db + 1.5
    assert calm.flicker["ir"].pixels == 0
    report = SequencesReport((calm,), SETTINGS, "adding", "1", is_calm=True)
    assert "adding 1, calm: change" in report.line()
    assert report.summary()["calm"] is True
    assert ", levels not held, calm: change" in SequencesReport((calm,), SETTINGS, "a", "1", False, True).line()


def test_the_input_and_the_clean_sequence_are_measured_beside_it() -> None:
    model = Scripted(brightened([0.0] * 4))
    scores = next(evaluate_sequences(model, [standing(4, noise=5)], SETTINGS))
    assert scores.flicker["vis"].pixels_given == scores.flicker["vis"].pixels > 3
    assert scores.flicker["vis"].pixels_clean == 0
    assert len({call.seeds for call in model.calls}) == 1
    report = SequencesReport((scores,), SETTINGS, "adding", "1")
    whole = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert whole["summary"]["flicker"]["vis"]["pixels_ratio"] is None
    assert whole["sequences"][0]["num_frames"] == 4
    assert report.line().startswith("1 sequences of 4 frames in all, protocol 2, as_shot, seed 0, adding 1: change ")
    assert "| vis | 0.000 |" in report.markdown()


def test_nothing_is_said_where_nothing_stands_still() -> None:
    def frames() -> Iterator[Frame]:
        for level in (40, 90):
            ir = torch.full((1, 64, 64), level, dtype=torch.uint8)
            yield Frame(ir.expand(3, -1, -1), ir, ir.expand(3, -1, -1), ir)

    with pytest.raises(DatasetError, match="nothing stands still"):
        list(evaluate_sequences(Scripted(brightened([0.0, 0.0])), [SequenceFrames("cuts", 2, frames)], SETTINGS))
    with pytest.raises(ConfigError, match="version 1"):
        evaluate_sequences(Scripted(brightened([])), [], EvaluationSettings(version=1))


def test_folders_of_frames_are_found_with_what_degraded_them(tmp_path: Path) -> None:
    for name, parts in (("one", ("vis", "ir")), ("two", ("vis", "ir", "vis_lq", "ir_lq"))):
        for number in range(3):
            vis, ir = scene(10 + number)
            for part in parts:
                image = vis if part.startswith("vis") else ir
                write_image(tmp_path / name / part / f"{number:02}.png", 255 - image if "lq" in part else image)
    first, second = sequences.find_sequences(tmp_path)
    assert [(first.name, first.num_frames), (second.name, second.num_frames)] == [("one", 3), ("two", 3)]
    for number, frame in enumerate(first.frames()):
        assert torch.equal(frame.vis, scene(10 + number)[0])
        assert torch.equal(frame.clean_vis, frame.vis)
    for number, frame in enumerate(second.frames()):
        assert torch.equal(frame.clean_ir, scene(10 + number)[1])
        assert torch.equal(frame.ir, 255 - frame.clean_ir)
    for part in ("vis", "ir"):
        write_image(tmp_path / "three" / part / "0.png", scene(10)[0] if part == "vis" else scene(10)[1])
    with pytest.raises(DatasetError, match="one frame"):
        sequences.find_sequences(tmp_path)


def test_streets_are_filmed_alike_every_time() -> None:
    (street,) = sequences.generated_streets(1, 4, num_frames=2, size=(48, 64))
    first, again = (list(street.frames()) for _ in range(2))
    assert all(
        torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert not torch.equal(first[0].vis, first[1].vis)  # fresh noise
    assert float(first[0].vis.float().mean()) < float(first[0].clean_vis.float().mean())
