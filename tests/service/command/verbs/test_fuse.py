"""`recofuse fuse` as its users meet it: files in, files out, one line for what they can mend."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from recofuse_core.data import read_vis
from recofuse_images.colours import overlaid
from recofuse_images.reader import Pair
from recofuse_rigs.rig import Rig, to_json
from recofuse_rigs.warp import warp_of
from service.terms import images
from tests.fakes import file_of
from tests.images.test_metadata import FILES as TELLING
from tests.rigs.scenes import scene
from tests.rigs.streets import COUNTS, street
from tests.rigs.test_parallax import leaning, off_by
from tests.service.command.calls import assert_one_line, run


def test_fuse_writes_the_picture_on_the_vis_grid(pairs: Path, weights: Path) -> None:
    output = pairs / "new" / "fused.png"
    result = run("fuse", "--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png", "-o", output, "--weights", weights)
    assert result.exit_code == 0, result.output
    assert read_vis(output).shape == (3, 48, 64)
    assert "processor time" in result.stdout
    assert not list(output.parent.glob("*_vis.png"))


def test_all_and_sheet_write_what_they_promise(pairs: Path, weights: Path) -> None:
    pair = ("--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png", "--weights", weights)
    result = run("fuse", *pair, "-o", pairs / "out.png", "--all", "--sheet", pairs / "sheet.png")
    assert result.exit_code == 0, result.output
    assert {path.name for path in pairs.glob("*.png")} == {"out.png", "out_vis.png", "out_ir.png", "sheet.png"}
    assert np.asarray(cv2.imread(str(pairs / "out_ir.png"), cv2.IMREAD_UNCHANGED)).shape == (48, 64)
    sheet = read_vis(pairs / "sheet.png")
    assert sheet.shape[2] > 5 * 64  # five pictures side by side
    fused = read_vis(pairs / "out.png")
    assert any(torch.equal(sheet[:, y : y + 48, -64 - x : -x], fused) for y in range(1, 48) for x in range(1, 16))


def test_equal_seeds_give_equal_files_and_others_do_not(pairs: Path, weights: Path) -> None:
    pair = ("--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png", "--weights", weights)
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        assert run("fuse", *pair, "-o", pairs / f"{name}.png", "--seed", seed, "--steps", 3).exit_code == 0
    one, again, other = ((pairs / f"{name}.png").read_bytes() for name in ("one", "again", "other"))
    assert one == again
    assert one != other


def test_pictures_are_lit_or_as_dark_as_they_came(pairs: Path) -> None:
    dark = cv2.imread(str(pairs / "vis/a.png"))
    assert dark is not None
    cv2.imwrite(str(pairs / "dark.png"), ((dark / 255.0) ** 3 * 255).astype(np.uint8))
    means = {}
    for exposure in ("as_shot", "lit"):
        target = pairs / f"{exposure}.png"
        pair = ("--vis", pairs / "dark.png", "--ir", pairs / "ir/a.png", "-o", target, "--all")
        result = run("fuse", *pair, "--exposure", exposure)
        assert result.exit_code == 0, result.output
        assert exposure in result.stdout
        means[exposure] = [np.asarray(cv2.imread(str(pairs / f"{exposure}{part}.png"))).mean() for part in ("", "_vis")]
    for as_shot, lit in zip(means["as_shot"], means["lit"], strict=True):
        assert lit > 1.2 * as_shot


def test_heat_is_shown_in_colours(pairs: Path, weights: Path) -> None:
    pair = ("--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png", "--weights", weights, "--all")
    result = run("fuse", *pair, "-o", pairs / "out.png", "--colour", "iron")
    assert result.exit_code == 0, result.output
    vis = np.ascontiguousarray(np.asarray(cv2.imread(str(pairs / "out_vis.png")))[..., ::-1])
    ir = np.asarray(cv2.imread(str(pairs / "out_ir.png"), cv2.IMREAD_UNCHANGED))
    fused = np.asarray(cv2.imread(str(pairs / "out.png")))[..., ::-1]
    np.testing.assert_array_equal(fused, overlaid(vis, ir, "iron", (0.0, 255.0)))


def test_values_and_alarms_are_written_beside_the_picture(pairs: Path, weights: Path) -> None:
    counts = np.full((48, 64), 8000, np.uint16) + np.arange(64, dtype=np.uint16)
    counts[10:14, 20:26] = 9000
    (pairs / "counts.png").write_bytes(file_of(counts))
    pair = ("--vis", pairs / "vis/a.png", "--ir", pairs / "counts.png", "--weights", weights)
    asked = ("--values", "npy", "--degrees", 0.04, -273.15, "--alarm", "80C", "--outline", "--ir-range", 8000, 8500)
    result = run("fuse", *pair, "-o", pairs / "out.jpg", *asked)
    assert result.exit_code == 0, result.output
    assert "one region of 24 px at 80 °C or more, the hottest 86.8 °C" in result.stdout
    alarm = json.loads((pairs / "out_alarm.json").read_text("utf-8"))
    assert [region["box"] for region in alarm["regions"]] == [[20, 10, 6, 4]]
    values = np.load(pairs / "out_values.npy")
    assert values[11, 21] == pytest.approx(86.85, abs=1e-3)
    both = run(
        "fuse", "--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "all", "--weights", weights, *asked[:2]
    )
    assert both.exit_code == 0, both.output
    assert {path.name for path in (pairs / "all").glob("*.npy")} == {
        f"{path.stem}_values.npy" for path in (pairs / "vis").iterdir()
    }


def test_what_the_files_say_of_themselves_is_kept_when_asked_for(pairs: Path, weights: Path) -> None:
    (pairs / "street.jpg").write_bytes(TELLING["jpeg"])
    pair = ("--vis", pairs / "street.jpg", "--ir", pairs / "ir/a.png", "--weights", weights)
    for name, words in (("plain", ()), ("told", ("--keep-metadata",))):
        result = run("fuse", *pair, "-o", pairs / f"{name}.jpg", *words)
        assert result.exit_code == 0, result.output
    assert b"Camera & Sons" in (pairs / "told.jpg").read_bytes()
    assert b"Exif" not in (pairs / "plain.jpg").read_bytes()


def test_what_a_rig_leaves_is_measured_for_a_registered_pair_too(tmp_path: Path, weights: Path) -> None:
    vis, ir = scene(0)
    (tmp_path / "vis.png").write_bytes(file_of(np.repeat(vis[..., None], 3, axis=2)))
    shown = off_by(ir, leaning(4.0, -3.0)).astype(np.uint8)
    (tmp_path / "ir.png").write_bytes(file_of(shown))
    words = ("--vis", tmp_path / "vis.png", "--ir", tmp_path / "ir.png", "--weights", weights, "--ir-range", 0, 255)
    done = run("fuse", *words, "-o", tmp_path / "out.png", "--sheet", tmp_path / "sheet.png", "--align", "refine")
    assert done.exit_code == 0, done.output
    assert re.search(r"vis: residual [0-9.]+ px, moved [1-9][0-9.]* px", done.stdout)
    sheet = np.asarray(cv2.imread(str(tmp_path / "sheet.png")))  # visible, infrared, fused
    given = sheet[36 : 36 + 240, 8 + 320 + 8 : 8 + 320 + 8 + 320, 0].astype(float)
    left, was = (np.abs(each - ir)[20:-20, 20:-20].mean() for each in (given, shown.astype(float)))
    assert left < 0.5 * was
    assert_one_line(run("fuse", *words, "-o", tmp_path / "out.png", "--align", "sideways"), "align")


def test_a_rig_lays_infrared_on_the_visible_frame(tmp_path: Path) -> None:
    """Cameras of other sizes and shapes: with their rig they fuse like the registered pair."""
    for folder in ("vis", "ir"):
        (tmp_path / folder).mkdir()
    scenes = {"a": street(3, cover=0.5), "b": street(8, cover=1.3)}
    for name, seen in scenes.items():
        (tmp_path / f"vis/{name}.png").write_bytes(file_of(seen.vis))
        (tmp_path / f"ir/{name}.png").write_bytes(file_of(seen.moved))
        (tmp_path / f"{name}.json").write_text(to_json(seen.rig))
        (tmp_path / f"{name}-registered.png").write_bytes(file_of(seen.ir))
    seen, low_high = scenes["a"], ("--exposure", "as_shot", "--ir-range", *COUNTS)
    single = ("--vis", tmp_path / "vis/a.png", "--ir", tmp_path / "ir/a.png", *low_high)
    done = run("fuse", *single, "-o", tmp_path / "a.png", "--rig", tmp_path / "a.json", "--all")
    assert done.exit_code == 0, done.output
    plain = ("--vis", tmp_path / "vis/a.png", "--ir", tmp_path / "a-registered.png", "--exposure", "as_shot")
    assert run("fuse", *plain, "-o", tmp_path / "registered.png").exit_code == 0
    fused, registered, vis = (
        read_vis(tmp_path / f"{name}.png").numpy().astype(float) for name in ("a", "registered", "a_vis")
    )
    warp = warp_of(seen.rig)
    inside, outside = warp.weights == 1, warp.tone_weights == 0
    assert inside.mean() > 0.1
    assert outside.any()
    assert np.abs(fused - registered)[:, inside].mean() < 5
    # not to the bit: both are blended before they are decoded, and the decoder sees all of a frame a little
    assert np.abs(fused - vis)[:, outside].mean() < min(2.5, 0.5 * np.abs(registered - vis)[:, outside].mean())
    # along the border the picture is no rougher than the two that meet there
    border = (warp.weights < 0.5) & (warp.tone_weights > 0.9)
    steps = [
        np.abs(np.diff(picture, axis=2)).mean(axis=0)[border[:, 1:]].mean() for picture in (fused, registered, vis)
    ]
    assert steps[0] < 1.15 * max(steps[1:])

    one_rig = ("--vis", tmp_path / "vis", "--ir", tmp_path / "ir", "-o", tmp_path / "out", *low_high)
    done = run("fuse", *one_rig, "--rig", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/b.png").exists()
    done_alone = run("fuse", *single, "-o", tmp_path / "again.png", "--rig", tmp_path / "a.json")
    assert done_alone.exit_code == 0
    assert (tmp_path / "out/a.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_a_range_of_visible_values_reaches_the_model(pairs: Path, weights: Path) -> None:
    plain = cv2.imread(str(pairs / "vis/a.png"))
    assert plain is not None
    cv2.imwrite(str(pairs / "deep.png"), plain.astype(np.uint16) * 16)
    rest = ("--ir", pairs / "ir/a.png", "--weights", weights)
    for name, vis, options in (
        ("plain", "vis/a.png", ()), ("deep", "deep.png", ()), ("scaled", "deep.png", ("--vis-range", 0, 4080))
    ):  # fmt: skip
        result = run("fuse", "--vis", pairs / vis, *rest, "-o", pairs / f"{name}-out.png", *options)
        assert result.exit_code == 0, result.output
    plain_out, deep, scaled = ((pairs / f"{name}-out.png").read_bytes() for name in ("plain", "deep", "scaled"))
    assert scaled == plain_out
    assert deep != plain_out


def test_fuse_tells_what_was_read_of_the_infrared_files(
    pairs: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a decoder that says of one file what the service's own may say."""
    decode, told = images.decode_pair, (pairs / "ir/b.png").read_bytes()

    def telling(vis: bytes, ir: bytes, *arguments: Any, **options: Any) -> Pair:
        pair = decode(vis, ir, *arguments, **options)
        if ir != told:
            return pair
        return replace(pair, ir_source="palette", warnings=("ir: in colour", "ir: \x1b[31m second"))

    monkeypatch.setattr(images, "decode_pair", telling)
    call = ("fuse", "--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "out", "--weights", weights)
    result = run(*call)
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if line.startswith("recofuse: ")]
    assert said == ["recofuse: b: ir: in colour", "recofuse: b: ir: ?[31m second"]
    assert "infrared read: a false-colour picture, turned back into intensity (1 of 2); grey values (1 of 2)" in (
        result.stdout
    )
    single = run(
        "fuse", "--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png", "-o", pairs / "a.png", "--weights", weights
    )
    assert single.exit_code == 0, single.output
    assert "infrared read" not in single.stdout


def test_folders_are_matched_by_name_and_equal_single_fusions(pairs: Path, weights: Path) -> None:
    (pairs / "ir/lonely.png").write_bytes((pairs / "ir/a.png").read_bytes())
    (pairs / "ir/notes.txt").write_text("not an image")
    result = run("fuse", "--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "out", "--weights", weights)
    assert result.exit_code == 0, result.output
    assert "lonely" in result.stderr
    assert "2 fused" in result.stdout
    assert {path.name for path in (pairs / "out").iterdir()} == {"a.png", "b.png"}
    single = pairs / "b.png"
    run("fuse", "--vis", pairs / "vis/b.png", "--ir", pairs / "ir/b.png", "-o", single, "--weights", weights)
    assert single.read_bytes() == (pairs / "out/b.png").read_bytes()


def test_one_folder_for_both_sides(pairs: Path, weights: Path) -> None:
    both = pairs / "both"
    for name in "ab":
        for role in ("vis", "ir"):
            (both / "day").mkdir(parents=True, exist_ok=True)
            (pairs / role / f"{name}.png").rename(both / "day" / f"{name}_{role}.png")
    (both / "c_vis.png").write_bytes(b"lonely")
    (both / "notes.txt").write_text("not an image")
    call = ("fuse", "--vis", both, "--ir", both, "-o", both / "fused", "--weights", weights)
    for _ in range(2):  # what the first run has written is no input of the second
        result = run(*call, "--all")
        assert result.exit_code == 0, result.output
        assert "2 fused" in result.stdout
        assert "no partner: both/c_vis.png; not an image: both/notes.txt" in result.stderr
        written = {path.relative_to(both).as_posix() for path in (both / "fused").rglob("*.png")}
        assert written == {f"fused/day/{name}{part}.png" for name in "ab" for part in ("", "_vis", "_ir")}


def test_one_file_is_not_fused_with_itself(pairs: Path, weights: Path) -> None:
    for other in ("vis/a.png", "link.png"):
        if not (pairs / other).exists():
            (pairs / other).symlink_to(pairs / "vis/a.png")
        call = (
            "fuse",
            "--vis",
            pairs / "vis/a.png",
            "--ir",
            pairs / other,
            "-o",
            pairs / "x.png",
            "--weights",
            weights,
        )
        assert_one_line(run(*call), "one file")
    folder = ("fuse", "--vis", pairs / "vis", "--ir", pairs / "vis", "-o", pairs / "out", "--weights", weights)
    assert_one_line(run(*folder), "given for both sides", "0001_vis.png", "a.png, b.png")


def test_no_picture_is_written_over_another(pairs: Path, weights: Path) -> None:
    both = pairs / "both"
    for source, target in (
        ("vis/a", "1_vis"),
        ("ir/a", "1_ir"),
        ("vis/b", "1"),
        ("vis/b", "1_vis_vis"),
        ("ir/b", "1_vis_ir"),
    ):
        both.mkdir(exist_ok=True)
        (both / f"{target}.png").write_bytes((pairs / f"{source}.png").read_bytes())
    call = ("fuse", "--vis", both, "--ir", both, "--weights", weights)
    assert_one_line(run(*call, "-o", both), "1.png would destroy an input")  # in no pair, and yet the user's
    assert_one_line(run(*call, "-o", pairs / "out", "--all"), "two pictures would be written to", "1_vis.png")


def test_a_bad_pair_in_a_folder_does_not_stop_the_others(pairs: Path, weights: Path) -> None:
    (pairs / "vis/a.png").write_bytes(b"no picture")
    result = run("fuse", "--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "out", "--weights", weights)
    assert result.exit_code == 2
    assert "recofuse: a: vis: not a readable image" in result.stderr
    assert "1 of 2 pairs" in result.stderr
    assert {path.name for path in (pairs / "out").iterdir()} == {"b.png"}


BAD_CALLS: dict[str, tuple[dict[str, str], str]] = {
    "missing file": ({"--vis": "vis/none.png"}, "none.png"),
    "file beside folder": ({"--vis": "vis"}, "two files or two folders"),
    "no picture": ({"--vis": "broken.png"}, "damaged or cut short"),
    "mismatched aspect": ({"--ir": "wide.png"}, "64x48 and ir is 200x48"),
    "unknown suffix": ({"-o": "out.xyz"}, ".png"),
    "sheet without suffix": ({"--sheet": "sheet"}, ".png"),
    "overwriting an input": ({"-o": "ir/a.png"}, "destroy"),
    "unknown sampler": ({"--sampler": "magic"}, "sampler"),
    "no rig": ({"--rig": "vis/a.png"}, "not sound JSON"),
    "missing rig": ({"--rig": "none.json"}, "none.json"),
    "rig of other cameras": ({"--rig": "wide.json"}, "the rig is for 64x36"),
    "unknown colour": ({"--colour": "purple"}, "colour"),
    "range without an overlay": ({"--colour-range": "1 9"}, "colour_range goes with"),
    "unknown format of values": ({"--values": "bmp"}, "values"),
    "alarm in degrees of counts": ({"--alarm": "60C"}, "send degrees as well"),
    "values over an input": ({"--ir": "a_values.png", "-o": "a.png", "--values": "png"}, "destroy"),
    "unknown exposure": ({"--exposure": "bright"}, "exposure"),
    "exposure of other weights": ({"--exposure": "lit"}, "the weights tiny 3 have no exposure estimator"),
    "upside-down vis range": ({"--vis-range": "9 3"}, "vis_range takes two numbers, the lower one first"),
    "upside-down range": ({"--ir-range": "9 3"}, "lower one first"),
    "unknown weights": ({"--weights": "nothing"}, "nothing"),
    "no checkpoint": ({"--weights": "vis/a.png"}, "safetensors"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_one_line(case: str, pairs: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pairs)
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    cv2.imwrite("wide.png", np.zeros((48, 200), np.uint8))
    Path("wide.json").write_text(to_json(Rig((64, 36), (64, 48), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))))
    changes, word = BAD_CALLS[case]
    options = {"--vis": "vis/a.png", "--ir": "ir/a.png", "-o": "out.png", "--weights": str(weights)} | changes
    before = Path("ir/a.png").read_bytes()
    Path("a_values.png").write_bytes(before)
    result = run("fuse", *itertools.chain.from_iterable((name, *value.split()) for name, value in options.items()))
    assert_one_line(result, word)
    assert not Path("out.png").exists()
    assert Path("ir/a.png").read_bytes() == before


def test_folders_without_a_common_name_or_with_a_name_twice(pairs: Path, weights: Path) -> None:
    folders = ("--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "out", "--weights", weights)
    (pairs / "vis/a.jpg").write_bytes(b"")
    assert_one_line(run("fuse", *folders), "a.jpg and a.png")
    for path in (pairs / "vis").iterdir():
        path.unlink()
    assert_one_line(run("fuse", *folders), "no file name in common")


def test_a_misspelt_setting_stops_every_verb_that_reads_settings(pairs: Path) -> None:
    call = ("fuse", "--vis", pairs / "vis", "--ir", pairs / "ir", "-o", pairs / "out")
    assert_one_line(run(*call, RECOFUSE_LIMITS__MAX_SIDES="64"), "RECOFUSE_LIMITS__MAX_SIDE?)")


def test_a_device_that_cannot_be_had_is_one_line(pairs: Path, weights: Path) -> None:
    """Whatever the machine that runs the tests has, it has no hundred GPUs."""
    pair = ("--vis", pairs / "vis/a.png", "--ir", pairs / "ir/a.png", "--weights", weights)
    for device in ("cuda:100", "gpu"):
        assert_one_line(run("fuse", *pair, "-o", pairs / "out.png", "--device", device), "device", device)
    assert not (pairs / "out.png").exists()
