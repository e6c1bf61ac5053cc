"""The rig's file: what is written is read again, and no bytes do more than be refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recofuse_rigs.errors import BadRigError
from recofuse_rigs.rig import MAX_FILE_BYTES, Distortion, Rig, flat, from_json, mapped, resizing, to_json

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def a_rig(**values: Any) -> Rig:
    return Rig(**{"vis_size": (640, 480), "ir_size": (640, 480), "matrix": IDENTITY, **values})


rigs = st.builds(
    lambda zoom, turn, x, y, lean, name, sure, spread, lens: Rig(
        vis_size=(640, 480),
        ir_size=(320, 256),
        matrix=flat(
            np.array([
                [zoom * math.cos(turn), -zoom * math.sin(turn), x],
                [zoom * math.sin(turn), zoom * math.cos(turn), y],
                [lean, -lean, 1.0],
            ])
        ),
        name=name,
        is_sure=sure,
        spread_px=spread,
        distortion=Distortion((400.0, 410.0), (160.0, 128.0), (lens, 0.0, 1e-3, 0.0, 0.0)) if lens else None,
        date="2026-01-31",
        num_pairs=7,
        method="scenes",
    ),
    st.floats(1.0, 3.0), st.floats(-0.3, 0.3), st.floats(0, 60), st.floats(0, 60), st.floats(-2e-4, 2e-4),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True),
    st.booleans(), st.floats(0, 5), st.floats(-0.2, 0.2),
)  # fmt: skip


@given(rigs)
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_read_again(rig: Rig) -> None:
    assert from_json(to_json(rig)) == rig


@given(st.binary(max_size=300) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_bytes_do_more_than_be_refused(content: bytes) -> None:
    with pytest.raises(BadRigError):
        from_json(content)


@given(
    st.sampled_from(sorted(json.loads(to_json(a_rig())))),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.floats(), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_a_changed_value_is_taken_or_refused(name: str, value: Any) -> None:
    document = {**json.loads(to_json(a_rig())), name: value}
    try:
        rig = from_json(json.dumps(document))
    except BadRigError:
        return
    assert np.isfinite(rig.array).all()
    assert abs(np.linalg.det(rig.array)) > 0


HOSTILE = {
    "singular": {"matrix": (1.0, 2.0, 0.0, 2.0, 4.0, 0.0, 0.0, 0.0, 1.0)},
    "all but singular": {"matrix": (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.1e-308, 1.0)},
    "mirrored": {"matrix": (-1.0, 0.0, 640.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)},
    "all zero": {"matrix": (0.0,) * 9},
    "not a number": {"matrix": (math.nan, *IDENTITY[1:])},
    "infinite": {"matrix": (math.inf, *IDENTITY[1:])},
    "huge": {"matrix": (1e6, 0.0, 0.0, 0.0, 1e6, 0.0, 0.0, 0.0, 1.0)},
    "a speck": {"matrix": (1e-4, 0.0, 0.0, 0.0, 1e-4, 0.0, 0.0, 0.0, 1.0)},
    "behind the camera": {"matrix": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, -1 / 300, 0.0, 1.0)},
    "elsewhere": {"matrix": (1.0, 0.0, 5000.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)},
    "a needle": {"matrix": (20.0, 0.0, 0.0, 0.0, 0.05, 0.0, 0.0, 0.0, 1.0)},
    "eight numbers": {"matrix": IDENTITY[:8]},
    "a path": {"name": "../etc/passwd"},
    "a dotted name": {"name": "a.json"},
    "no size": {"vis_size": (0, 480)},
    "a vast size": {"ir_size": (1 << 30, 480)},
    "a negative spread": {"spread_px": -1.0},
    "no day": {"date": "yesterday"},
    "another way": {"method": "guess"},
    "a folding lens": {"distortion": Distortion((400.0, 400.0), (320.0, 240.0), (50.0, 0.0, 0.0, 0.0, 0.0))},
    "no lens": {"distortion": Distortion((0.0, 400.0), (320.0, 240.0), (0.0,) * 5)},
}


@pytest.mark.parametrize("values", HOSTILE.values(), ids=HOSTILE)
def test_hostile_rigs_are_refused(values: dict[str, Any]) -> None:
    assert a_rig().overlap == 1
    with pytest.raises(BadRigError):
        a_rig(**values)


def test_hostile_files_are_refused() -> None:
    sound = to_json(a_rig())
    for content in (
        sound.replace("640", "NaN", 1),
        sound[:-2] + ', "matrix": []}',
        sound[:-2] + ', "extra": 1}',
        sound.replace('"version": 1', '"version": true'),
        sound.replace('"spread_px": 0.0', '"spread_px": 1' + "0" * 400),
        "[" * 60_000,
        " " * (MAX_FILE_BYTES + 1),
    ):
        with pytest.raises(BadRigError):
            from_json(content)


def test_other_resolutions_of_the_same_cameras() -> None:
    rig = a_rig(ir_size=(320, 240), matrix=(2.0, 0.0, 0.5, 0.0, 2.0, 0.5, 0.0, 0.0, 1.0))
    half = rig.resized((320, 240), (160, 120))
    point = np.array([[40.0, 30.0]])
    seen = mapped(resizing((640, 480), (320, 240)), mapped(rig.array, point))
    assert np.allclose(mapped(half.array, mapped(resizing((320, 240), (160, 120)), point)), seen)
    with pytest.raises(BadRigError, match="aspect ratio"):
        rig.resized((640, 360), (320, 240))


def test_the_overlap_is_what_infrared_covers() -> None:
    half = a_rig(matrix=(1.0, 0.0, 320.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    assert half.overlap == pytest.approx(0.5, abs=0.02)
