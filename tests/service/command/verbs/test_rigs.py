"""`recofuse calibrate` and `align`, from files to files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from recofuse_images.reader import read_infrared
from recofuse_images.writer import png_bytes
from recofuse_rigs.rig import Rig, corners_of, from_json, mapped, to_json
from tests.rigs.scenes import IR_SIZE, VIS_SIZE, moved, scene, truth
from tests.rigs.test_parallax import leaning, off_by, streets
from tests.service.command.calls import assert_one_line, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pairs of one rig, infrared of 16 bits."""
    for side in ("vis", "ir"):
        (tmp_path / side).mkdir()
    for seed in range(4):
        vis, ir = scene(seed)
        (tmp_path / "vis" / f"{seed}.png").write_bytes(png_bytes(vis))
        counts = 7000 + 10 * moved(ir, truth()).astype(np.uint16)
        (tmp_path / "ir" / f"{seed}.png").write_bytes(png_bytes(counts))
    return tmp_path


def test_a_rig_is_calibrated_and_applied(folder: Path) -> None:
    file = folder / "rigs" / "roof.json"
    done = run("calibrate", "--vis", folder / "vis", "--ir", folder / "ir", "-o", file)
    assert done.exit_code == 0, done.output
    rig = from_json(file.read_bytes())
    corners = corners_of(IR_SIZE)
    assert np.linalg.norm(mapped(rig.array, corners) - mapped(truth(), corners), axis=1).mean() < 1
    assert (rig.name, rig.num_pairs, rig.is_sure, rig.parallax_px) == ("roof", 4, True, None)
    sheet = cv2.imread(str(folder / "rigs" / "roof_sheet.png"))
    assert sheet is not None
    assert sheet.shape[1] == 2 * VIS_SIZE[0]

    done = run("align", "--vis", folder / "vis", "--ir", folder / "ir", "--rig", file, "-o", folder / "aligned")
    assert done.exit_code == 0, done.output
    aligned = read_infrared((folder / "aligned" / "0.png").read_bytes()).picture.values
    assert aligned.dtype == np.uint16
    registered = 7000 + 10 * scene(0)[1].astype(int)
    inner = np.s_[80:160, 110:210]
    assert aligned.shape == registered.shape
    assert np.median(np.abs(aligned[inner].astype(int) - registered[inner])) < 30


def test_a_rig_of_scenes_with_depth_knows_its_bound(tmp_path: Path) -> None:
    for side in ("vis", "ir"):
        (tmp_path / side).mkdir()
    for seed, pair in enumerate(streets(0.12)[0]):
        for side, grey in (("vis", pair.vis), ("ir", pair.ir)):
            (tmp_path / side / f"{seed}.png").write_bytes(png_bytes(np.rint(grey).astype(np.uint8)))
    file = tmp_path / "roof.json"
    done = run("calibrate", "--vis", tmp_path / "vis", "--ir", tmp_path / "ir", "-o", file)
    assert done.exit_code == 0, done.output
    rig = from_json(file.read_bytes())
    assert rig.parallax_px is not None
    assert 1 < rig.parallax_px < 12
    assert f"nearer and farther things may lie off by {rig.parallax_px:.1f} px" in done.stdout


def test_what_is_unsure_is_written_by_force_alone(folder: Path) -> None:
    vis, ir = folder / "vis" / "1.png", folder / "ir" / "0.png"  # of two scenes
    file = folder / "wrong.json"
    assert_one_line(run("calibrate", "--vis", vis, "--ir", ir, "-o", file), "unsure", "--force")
    assert_one_line(run("align", "--vis", vis, "--ir", ir, "-o", folder / "out.png"), "unsure")
    assert not file.exists()
    assert not (folder / "out.png").exists()


def test_points_given_by_hand(folder: Path) -> None:
    ir = np.random.default_rng(0).uniform((0, 0), IR_SIZE, (8, 2))
    lines = [" ".join(map(str, row)) for row in np.hstack([mapped(truth(), ir), ir])]
    points, file = folder / "points.txt", folder / "rig.json"
    points.write_text("\n".join(["# vis x, vis y, ir x, ir y", *lines]))
    words = ("calibrate", "--vis", folder / "vis" / "0.png", "--ir", folder / "ir" / "0.png", "-o", file)
    done = run(*words, "--corners", points)
    assert done.exit_code == 0, done.output
    rig = from_json(file.read_bytes())
    assert rig.method == "corners"
    assert np.allclose(rig.array, truth() / truth()[2, 2], atol=1e-3)
    points.write_text("1 2 3\n")
    assert_one_line(run(*words, "--corners", points), "four numbers")
    assert_one_line(run(*words, "--checkerboard", "7"), "COLUMNSxROWS")
    assert_one_line(run(*words, "--checkerboard", "7x5", "--force"), "checkerboard")
    assert_one_line(run(*words, "--name", "../roof"), "name")
    assert_one_line(run(*words, "--sheet", folder / "sheet.gif"), "sheet.gif")
    assert_one_line(run(*words, "--sheet", folder / "vis" / "0.png"), "destroy an input")


def test_rigs_that_do_not_fit_are_refused(folder: Path) -> None:
    file = folder / "rig.json"
    words = ("align", "--vis", folder / "vis" / "0.png", "--ir", folder / "ir" / "0.png", "--rig", file)
    file.write_text("{}")
    assert_one_line(run(*words, "-o", folder / "out.png"), "no rig")
    file.write_text(to_json(Rig((640, 360), (160, 128), (4.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 1.0))))
    assert_one_line(run(*words, "-o", folder / "out.png"), "aspect ratio")
    assert_one_line(run(*words, "-o", folder / "out.jpg"), "keep the depth")
    assert_one_line(run(*words, "-o", folder / "ir" / "0.png"), "destroy an input")


def test_what_a_rig_leaves_is_put_right(tmp_path: Path) -> None:
    vis, ir = scene(0)
    shown = off_by(ir, leaning(4.0, -3.0)).astype(np.uint16) * 10 + 7000
    pair = ("--vis", tmp_path / "vis.png", "--ir", tmp_path / "ir.png")
    (tmp_path / "vis.png").write_bytes(png_bytes(vis))
    (tmp_path / "ir.png").write_bytes(png_bytes(shown))
    rig = Rig(VIS_SIZE, VIS_SIZE, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    (tmp_path / "rig.json").write_text(to_json(rig))
    done = run("align", *pair, "--rig", tmp_path / "rig.json", "--refine", "-o", tmp_path / "out.png")
    assert done.exit_code == 0, done.output
    assert ", moved " in done.stdout
    aligned = read_infrared((tmp_path / "out.png").read_bytes()).picture.values
    inner = np.s_[20:-20, 20:-20]
    left, was = (np.abs(each[inner] - (7000.0 + 10.0 * ir[inner])).mean() for each in (aligned, shown))
    assert left < 0.5 * was
