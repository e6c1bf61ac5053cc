"""Cameras that run free: pairs by time, and the offset from motion, on clips whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from recofuse_client.pairing import Motion, OffsetError, Pairer, Stamped, offset_of
from recofuse_client.video import find_offset, read_pairs
from tests.client.test_video import brightness, level, make_video

_NOTHING = np.zeros((1, 1), np.uint8)


def walk(seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Times, and where a thing is that starts and stops as it likes."""
    rng = np.random.default_rng(seed)
    times = np.arange(-4, 24, 0.01)
    speed = np.repeat(rng.uniform(0, 40, 70) * (rng.random(70) < 0.6), 40)[: len(times)]
    return times, np.cumsum(cv2.GaussianBlur(speed[None], (0, 0), 5).ravel()) * 0.01


def frame(place: float, size: tuple[int, int], seed: int, *, inverse: bool = False) -> NDArray[np.uint8]:
    """A bright square that goes round, in noise; inverse: as a camera that sees it dark."""
    width, height = size
    picture = np.full((height, width), 90.0)
    left, top = round(place / 100 * width) % width, height // 3
    picture[top : top + height // 3, left : left + width // 6] = 200
    picture += np.random.default_rng(seed).normal(0, 3, picture.shape)
    return np.asarray(np.clip(255 - picture if inverse else picture, 0, 255), np.uint8)


def clips(offset_s: float, seed: int = 0, seconds: float = 12.0) -> tuple[Motion, Motion]:
    """What infrared shows at a time, visible has shown offset_s before."""
    times, places = walk(seed)
    vis, ir = Motion(), Motion()
    for number in range(round(seconds * 30)):
        vis.add(frame(float(np.interp(number / 30, times, places)), (96, 72), number), number / 30)
    for number in range(round(seconds * 22)):
        at = float(np.interp(number / 22 - offset_s, times, places))
        flicker = np.uint8(10 * (number % 7 == 0))  # as a camera that sets its gain anew
        ir.add(frame(at, (80, 60), 10_000 + number, inverse=True) // 2 + flicker, number / 22)
    return vis, ir


def passing(*at_s: float) -> Motion:
    """Twelve seconds in which a thing shoots past at these times."""
    motion = Motion()
    for number in range(12 * 25):
        since = min((number / 25 - start for start in at_s if number / 25 >= start), default=1.0)
        motion.add(frame(min(60.0, 100 * since), (96, 72), number), number / 25)
    return motion


@pytest.mark.parametrize("offset_s", [-1.3, -0.2, 0.0, 0.07, 0.85])
def test_motion_tells_the_offset(offset_s: float) -> None:
    found = offset_of(*clips(offset_s))
    assert abs(found.seconds - offset_s) <= 0.025  # less than a frame of either
    assert found.likeness > 0.5


def test_what_does_not_tell_is_not_believed() -> None:
    other = clips(0.0, seed=7)[1]
    with pytest.raises(OffsetError):
        offset_of(clips(0.0)[0], other)  # two places
    with pytest.raises(OffsetError, match="4 s or more"):
        offset_of(*clips(0.0, seconds=3))
    with pytest.raises(OffsetError, match="may agree by chance"):
        offset_of(clips(0.0, seed=7)[0], clips(0.0, seed=11)[1])  # alike by more than a half, ahead of all others
    with pytest.raises(OffsetError, match="too little happens"):
        offset_of(passing(4.0), passing(4.9))  # one thing in each: who says that it is one?
    rhythm, still = Motion(), Motion()
    for number in range(300):
        rhythm.add(frame(30 * np.sin(number / 25 * 2 * np.pi), (96, 72), number), number / 25)
        still.add(np.full((60, 80), 50 + number % 3, np.uint8), number / 25)
    with pytest.raises(OffsetError, match="another offset is nearly as good"):
        offset_of(rhythm, rhythm)
    with pytest.raises(OffsetError, match="ir: nothing moves"):
        offset_of(rhythm, still)


@given(
    gaps=st.lists(st.tuples(st.sampled_from(["vis", "ir"]), st.integers(1, 60)), min_size=1, max_size=60),
    offset_ms=st.integers(-200, 200),
    tolerance_ms=st.integers(0, 80),
)
def test_a_pair_is_the_nearest_in_time(gaps: list[tuple[str, int]], offset_ms: int, tolerance_ms: int) -> None:
    pairer, now = Pairer(offset_ms / 1e3, tolerance_ms / 1e3), 0
    given: dict[str, list[int]] = {"vis": [], "ir": []}
    found = []
    for name, gap in gaps:
        now += gap
        given[name].append(now)
        (pairer.add_vis if name == "vis" else pairer.add_ir)(Stamped(_NOTHING, now * 1_000_000))
        found += [pair] if (pair := pairer.newest()) else []
    found += [pair] if (pair := pairer.newest(is_over=True)) else []
    moments = [(vis.ns // 1_000_000, ir.ns // 1_000_000) for vis, ir in found]
    assert moments == sorted(set(moments))  # in order, none twice
    for vis, ir in moments:
        distance = abs(ir - vis - offset_ms)
        assert distance <= tolerance_ms
        assert distance == min(abs(other - vis - offset_ms) for other in given["ir"])
    if given["ir"]:
        nearest = [min(abs(ir - vis - offset_ms) for ir in given["ir"]) for vis in given["vis"]]
        assert pairer.num_unpaired == sum(distance > tolerance_ms for distance in nearest)


def test_what_a_camera_that_stalls_has_not_sent_fills_no_memory() -> None:
    pairer = Pairer(0.5, 0.1)
    for number in range(1000):
        pairer.add_vis(Stamped(_NOTHING, number * 40_000_000))
    pairer.add_ir(Stamped(_NOTHING, 999 * 40_000_000))
    pair = pairer.newest(is_over=True)
    assert pair is not None
    assert pair[0].ns >= (999 - 41) * 40_000_000  # kept are the offset, the tolerance and a second
    assert pairer.num_unpaired > 900


@pytest.mark.parametrize("late", [-3, 4])
def test_files_are_paired_with_their_offset(tmp_path: Path, late: int) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 12), make_video(tmp_path / "ir.avi", 12)
    pairs, _ = read_pairs(str(vis), str(ir), offset_s=late / 25)
    seen = list(pairs)
    assert [round(one.timestamp_ns / 4e7) for one in seen] == list(range(max(0, -late) - (late < 0), 12 - max(0, late)))
    for one in seen[late < 0 :]:  # the first of an early camera is still within a frame
        number = round(one.timestamp_ns / 4e7)
        assert abs(brightness(one.vis) - level(number)) < 3
        assert abs(brightness(one.ir) - level(number + late)) < 3
    strict, _ = read_pairs(str(vis), str(ir), offset_s=late / 25 + 0.01, tolerance_s=0.005)
    assert not list(strict)
    assert strict.num_unpaired == 12 - max(0, late)  # to the end of infrared
    for offset_s, tolerance_s in ((2.1, None), (float("nan"), None), (0.0, -1.0)):
        with pytest.raises(ValueError, match="accepted"):
            read_pairs(str(vis), str(ir), offset_s=offset_s, tolerance_s=tolerance_s)


def test_files_that_play_are_paired_by_time(tmp_path: Path) -> None:
    vis, ir = make_video(tmp_path / "vis.avi", 8), make_video(tmp_path / "ir.avi", 8)
    pairs, _ = read_pairs(str(vis), str(ir), realtime=True, tolerance_s=2.0)
    stamps = [one.timestamp_ns for one in pairs]
    assert stamps
    assert stamps == sorted(set(stamps))


def test_the_offset_of_files(tmp_path: Path) -> None:
    vis, ir = moving_files(tmp_path, 0.4)
    assert abs(find_offset(str(vis), str(ir)).seconds - 0.4) <= 0.025
    with pytest.raises(OffsetError, match="no clock in common"):
        find_offset(str(vis), "rtsp://127.0.0.1/ir")


def moving_files(folder: Path, offset_s: float) -> tuple[Path, Path]:
    """Six seconds of one scene by two cameras."""
    times, places = walk(3)
    paths = folder / "moving_vis.avi", folder / "moving_ir.avi"
    for path, late_s in zip(paths, (0.0, offset_s), strict=True):
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (96, 72))
        for number in range(150):
            at = float(np.interp(number / 25 - late_s, times, places))
            writer.write(cv2.cvtColor(frame(at, (96, 72), number, inverse=late_s != 0), cv2.COLOR_GRAY2BGR))
        writer.release()
    return paths
