"""What a request's `rig` may say: whatever it is, a sound rig comes of it or a refusal."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recofuse_rigs.rig import MAX_FILE_BYTES, Rig, to_json
from service.terms.errors import InvalidInputError
from service.terms.rigs import Rigs
from service.terms.settings import RigSettings, SettingsError

VIS, IR = (640, 480), (320, 256)
TWICE = (2.0, 0.0, 0.5, 0.0, 1.875, 0.4375, 0.0, 0.0, 1.0)
RIG = Rig(VIS, IR, TWICE, name="roof", is_sure=False, num_pairs=12, method="scenes", date="2026-01-31")
NUMBERS = st.one_of(
    st.floats(), st.integers(-5, 5), st.sampled_from(["", "x", "nan", "-inf", "1e400", "0x1p3", "1_0", " 1", "²"])
).map(str)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "roof.json").write_text(to_json(RIG))
    return tmp_path


def rigs(folder: Path | str = "") -> Rigs:
    return Rigs(RigSettings(directory=str(folder)))


def test_names_files_and_matrices_are_understood(folder: Path) -> None:
    there = rigs(folder)
    assert there.asked("roof", VIS, IR) == RIG
    assert there.asked(" roof\n", (1280, 960), (160, 128)) == RIG  # other resolutions of the same cameras
    assert rigs().asked(to_json(RIG), VIS, IR) == RIG
    assert rigs().asked(",".join(map(str, TWICE)), VIS, IR) == Rig(VIS, IR, TWICE)
    scaled = ", ".join(str(-3 * value) for value in TWICE)  # a homography has no scale
    np.testing.assert_allclose(rigs().asked(scaled, VIS, IR).matrix, TWICE)


def test_the_size_of_a_thermal_jpeg_is_judged_where_its_values_are_read(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="rig: ir is 320x240, and the rig is for 320x256"):
        rigs(folder).asked("roof", VIS, (320, 240))
    assert rigs(folder).asked("roof", VIS, (320, 240), is_ir_sure=False) == RIG
    with pytest.raises(InvalidInputError, match="rig: vis is 640x360"):
        rigs(folder).asked("roof", (640, 360), IR, is_ir_sure=False)


@settings(deadline=None, max_examples=150)
@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(NUMBERS, min_size=8, max_size=10).map(",".join),
        st.lists(st.floats(-1e3, 1e3), min_size=9, max_size=9).map(lambda row: ",".join(map(repr, row))),
        st.text(max_size=60).map(lambda text: "{" + text),
        st.tuples(st.integers(0, len(to_json(RIG))), st.text(max_size=3)).map(
            lambda change: to_json(RIG)[: change[0]] + change[1] + to_json(RIG)[change[0] + 1 :]
        ),
    )
)
def test_whatever_is_said_is_a_sound_rig_or_a_refusal(text: str) -> None:
    try:
        rig = rigs().asked(text, VIS, IR)
    except InvalidInputError as error:
        rig, said = None, str(error)
    if rig is None:
        assert said.startswith("rig: ")
        assert len(said) < 1000
        return
    assert np.isfinite(rig.array).all()
    assert abs(np.linalg.det(rig.array)) > 0
    assert rig.overlap >= 0.01


@pytest.mark.parametrize(
    "name",
    ["../roof", "/etc/passwd", "roof.json", "roof/../roof", "..", ".", "-roof", "ro of", "roof\0", "röof", "r" * 65],
)
def test_a_name_is_never_a_path(folder: Path, name: str) -> None:
    (folder.parent / "roof.json").write_text(to_json(RIG))
    with pytest.raises(InvalidInputError, match="rig: name: accepted are letters"):
        rigs(folder).asked(name, VIS, IR)


def test_a_file_is_read_again_when_it_has_changed(folder: Path) -> None:
    there, path = rigs(folder), folder / "roof.json"
    assert there.asked("roof", VIS, IR) == RIG
    changed = Rig(VIS, IR, (*TWICE[:2], 9.5, *TWICE[3:]), name="roof")
    new = folder / "new"
    new.write_text(to_json(changed))
    os.replace(new, path)  # as careful operators write
    assert there.asked("roof", VIS, IR) == changed
    path.write_text("{}")
    with pytest.raises(InvalidInputError, match="the file of roof cannot be used: the file is no rig"):
        there.asked("roof", VIS, IR)
    path.write_text(to_json(RIG))
    assert there.asked("roof", VIS, IR) == RIG
    path.unlink()
    with pytest.raises(InvalidInputError, match="there is no rig roof; there are none here"):
        there.asked("roof", VIS, IR)


def test_what_cannot_be_used_is_not_listed(folder: Path) -> None:
    (folder / "vast.json").write_text(to_json(RIG) + " " * MAX_FILE_BYTES)
    (folder / "bad name.json").write_text(to_json(RIG))
    (folder / "folder.json").mkdir()
    (folder / "attic.json").write_text(to_json(Rig(VIS, IR, TWICE, name="other")))
    (folder / "binary.json").write_bytes(bytes(range(256)))
    assert [rig.name for rig in rigs(folder).listed()] == ["attic", "roof"]  # as the files are called
    assert rigs().listed() == []
    with pytest.raises(InvalidInputError, match="the file of vast cannot be used"):
        rigs(folder).asked("vast", VIS, IR)
    with pytest.raises(InvalidInputError, match="there is no rig folder"):
        rigs(folder).asked("folder", VIS, IR)


def test_a_folder_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"rigs\.directory: .* is no folder"):
        rigs(tmp_path / "nowhere")
