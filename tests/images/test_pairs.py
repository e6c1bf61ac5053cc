"""Pairs of files: two folders, one folder for both, links, packed files, and what is told of the rest."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest

from recofuse_images.names import BOTH_SIDES, MAX_NAMED, NO_PARTNER, PairingError
from recofuse_images.pairs import NOT_AN_IMAGE, FoundPair, PassedOver, is_packed, pair_paths, told


def put(root: Path, *names: str) -> None:
    """Files of different content: the names decide, nothing is decoded."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def found(pairs: Iterable[FoundPair], root: Path) -> list[tuple[str, str, str]]:
    return [(pair.name, pair.vis.relative_to(root).as_posix(), pair.ir.relative_to(root).as_posix()) for pair in pairs]


def why(passed_over: Iterable[PassedOver], root: Path) -> dict[str, str]:
    return {item.path.relative_to(root).as_posix(): item.reason for item in passed_over}


def test_two_folders_and_what_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path, "vis/day/1.png", "vis/2_vis.png", "vis/.hidden.png", "vis/notes.txt", "vis/3_vis_ir.png")
    put(tmp_path, "ir/day/1.JPG", "ir/2_ir.TIF", "ir/4.png", "ir/.cache/5.png")
    pairs, passed_over = pair_paths(tmp_path / "vis", tmp_path / "ir")
    assert found(pairs, tmp_path) == [("2", "vis/2_vis.png", "ir/2_ir.TIF"), ("day/1", "vis/day/1.png", "ir/day/1.JPG")]
    assert why(passed_over, tmp_path) == {
        "vis/notes.txt": NOT_AN_IMAGE,
        "vis/3_vis_ir.png": BOTH_SIDES,
        "ir/4.png": NO_PARTNER,
    }


def test_one_folder_for_both(tmp_path: Path) -> None:
    put(
        tmp_path,
        "1_vis.png",
        "1_ir.png",
        "x/2_RGB.jpg",
        "x/2.jpeg",
        "3_vis.png",
        "4.txt",
        "out/1_vis.png",
        "out/1_ir.png",
    )
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)  # also a circle, entered never
    for ir in (tmp_path, tmp_path / "link"):
        pairs, passed_over = pair_paths(tmp_path, ir, leave_out=tmp_path / "out")
        assert found(pairs, tmp_path) == [("1", "1_vis.png", "1_ir.png"), ("x/2", "x/2_RGB.jpg", "x/2.jpeg")]
        assert why(passed_over, tmp_path) == {"3_vis.png": NO_PARTNER, "4.txt": NOT_AN_IMAGE}


def test_a_folder_within_the_other_is_one_side_only(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png", "thermal/1.png", "thermal/2.png")
    pairs, passed_over = pair_paths(tmp_path, tmp_path / "thermal")
    assert found(pairs, tmp_path) == [("1", "1.png", "thermal/1.png"), ("2", "2.png", "thermal/2.png")]
    assert passed_over == []


def test_one_file_is_no_pair_under_any_name(tmp_path: Path) -> None:
    put(tmp_path, "vis/a.png", "ir/other.png")
    real = tmp_path / "vis/a.png"
    soft, hard = tmp_path / "soft.png", tmp_path / "hard.png"
    soft.symlink_to(real)
    os.link(real, hard)
    for other in (real, tmp_path / "ir/../vis/a.png", soft, hard):
        with pytest.raises(PairingError, match="are one file"):
            pair_paths(real, other)
    os.link(real, tmp_path / "ir/a.png")
    with pytest.raises(PairingError, match=r"are one file, .*vis/a\.png \(also .*ir/a\.png\)"):
        pair_paths(tmp_path / "vis", tmp_path / "ir")
    shutil.copy(real, tmp_path / "copy.png")
    assert pair_paths(real, tmp_path / "copy.png")[0][0].name == "a"


def test_one_folder_whose_names_say_nothing_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    with pytest.raises(
        PairingError, match=r"2 images.*0001_vis\.png and 0001_ir\.png.*two folders; found 1\.png, 2\.png"
    ):
        pair_paths(tmp_path, tmp_path)
    put(tmp_path, "1.jpg", "3_vis.png", "3_ir.png")
    with pytest.raises(PairingError, match=r"1\.jpg and 1\.png .* share one name.*0001_vis\.png"):
        pair_paths(tmp_path, tmp_path)


def test_folders_that_have_nothing_in_common(tmp_path: Path) -> None:
    put(tmp_path, "vis/1.png", "ir/2.png", "ir/3.txt")
    with pytest.raises(PairingError, match=r"vis \(1 images\) and .*ir \(1 images\) have no file name in common"):
        pair_paths(tmp_path / "vis", tmp_path / "ir")
    put(tmp_path, "rgb/1_RGB.png", "t/1_T.png")
    with pytest.raises(PairingError, match="swapped"):
        pair_paths(tmp_path / "t", tmp_path / "rgb")
    with pytest.raises(PairingError, match="two files or two folders"):
        pair_paths(tmp_path / "vis", tmp_path / "ir/2.png")
    with pytest.raises(PairingError, match=r"ir: there is no file or folder .*none"):
        pair_paths(tmp_path / "vis", tmp_path / "none")


def test_a_packed_file_is_both_sides(tmp_path: Path) -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    for name, pixels in (
        ("00001D.png", rgba),
        ("00002N.png", rgba),
        ("3.png", rgba[..., :3]),
        ("4.png", rgba.astype(np.uint16)),
        ("5_vis.png", rgba),
        ("6.webp", rgba),
    ):
        assert cv2.imwrite(str(tmp_path / name), pixels)
    put(tmp_path, "7.png")
    assert [is_packed(path) for path in sorted(tmp_path.iterdir())] == [True, True, False, False, True, False, False]
    pairs, passed_over = pair_paths(tmp_path, tmp_path)
    packed = [tmp_path / "00001D.png", tmp_path / "00002N.png"]
    assert pairs == [FoundPair(path.stem, path, path, is_packed=True) for path in packed]
    assert set(why(passed_over, tmp_path)) == {"3.png", "4.png", "5_vis.png", "6.webp", "7.png"}
    assert pair_paths(packed[0], packed[0])[0] == pairs[:1]
    with pytest.raises(PairingError, match="are one file"):
        pair_paths(tmp_path / "3.png", tmp_path / "3.png")


def test_what_is_passed_over_is_told_in_one_line() -> None:
    lonely = [PassedOver(Path(f"vis/{number}.png"), NO_PARTNER) for number in range(MAX_NAMED + 3)]
    line = told([*lonely, PassedOver(Path("ir/notes.txt"), NOT_AN_IMAGE)])
    assert line.startswith("9 files are passed over (")
    assert "no partner: vis/0.png, vis/1.png, vis/2.png, vis/3.png, vis/4.png and 3 more" in line
    assert "not an image: ir/notes.txt" in line
    assert "vis/5.png" not in line
    assert told(lonely[:1]) == "1 file is passed over (no partner: vis/0.png)"
