"""Noise on what stands still is averaged away; what moves, a cut and the first frame are shown as they are."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from recofuse_images import calm
from recofuse_images.calm import History

Levels = NDArray[np.uint8]
Pair = tuple[Levels, Levels]
SIZE = (120, 160)
NOISE = 5.0


def scene(phase: float = 0.0, size: tuple[int, int] = SIZE) -> Pair:
    """A smooth pair, vis (H, W, 3) and ir (H, W)."""
    y, x = np.mgrid[: size[0], : size[1]] / 20 + phase
    vis = np.stack([110 + 60 * np.sin(x + shift) * np.cos(y) for shift in (0, 0.4, 0.8)], axis=-1)
    return vis.astype(np.uint8), (120 + 80 * np.cos(x) * np.sin(y)).astype(np.uint8)


def noisy(picture: NDArray[Any], seed: int, noise: float = NOISE) -> Levels:
    return (picture + np.random.default_rng(seed).normal(0, noise, picture.shape)).round().clip(0, 255).astype(np.uint8)


def shown(clean: Iterable[Pair], noise: float = NOISE, lag: int = 1) -> tuple[list[Levels], list[Levels]]:
    """The visible pictures of frames with noise, and what is shown of them; `lag` frames are at work."""
    came, calm_ones, histories = [], [], [b""] * lag
    for number, (clean_vis, clean_ir) in enumerate(clean):
        vis, ir = noisy(clean_vis, number, noise), noisy(clean_ir, 1000 + number, noise)
        pictures, history = calm.calmed({"vis": vis, "ir": ir}, calm.given(vis, ir), histories[-lag])
        histories.append(history)
        came.append(vis)
        calm_ones.append(pictures["vis"])
        assert pictures["ir"].shape == ir.shape
    return came, calm_ones


def error(picture: Levels, clean: Levels) -> float:
    return float(np.sqrt(np.mean((picture.astype(float) - clean) ** 2)))


def change(frames: list[Levels]) -> float:
    return float(
        np.mean([np.abs(np.subtract(one, other, dtype=float)).mean() for one, other in itertools.pairwise(frames)])
    )


@pytest.mark.parametrize("size", [SIZE, (121, 163), (17, 16)])
@pytest.mark.parametrize(("lag", "left"), [(1, 0.3), (2, 0.5)])
def test_noise_on_what_stands_still_is_averaged_away(size: tuple[int, int], lag: int, left: float) -> None:
    clean = scene(size=size)
    came, calm_ones = shown([clean] * 24, lag=lag)
    assert change(calm_ones[12:]) < left * change(came[12:])
    assert error(calm_ones[-1], clean[0]) < 0.55 * error(came[-1], clean[0])
    np.testing.assert_array_equal(calm_ones[0], came[0])


def test_a_frame_after_a_cut_is_shown_as_it_is() -> None:
    came, calm_ones = shown([scene()] * 6 + [scene(2.0)] * 12)
    np.testing.assert_array_equal(calm_ones[6], came[6])
    assert error(calm_ones[-1], scene(2.0)[0]) < 0.6 * NOISE  # and then a new mean begins


def moving(paint: Callable[[Levels, int, int], None], count: int, levels: tuple[int, int]) -> list[Pair]:
    """The scene with something in it that is painted into both frames, so many levels brighter."""
    pairs = []
    for number in range(count):
        vis, ir = (picture.copy() for picture in scene())
        for picture, more in zip((vis, ir), levels, strict=True):
            paint(picture, number, more)
        pairs.append((vis, ir))
    return pairs


def block(picture: Levels, number: int, more: int) -> None:
    place = picture[40:70, 10 + 4 * number : 30 + 4 * number]
    place[:] = place // 2 + more


def pole(picture: Levels, number: int, more: int) -> None:
    picture[20:100, 30 + 5 * number : 32 + 5 * number] = more


@pytest.mark.parametrize("paint", [block, pole])
@pytest.mark.parametrize("levels", [(130, 130), (20, 20)])
def test_what_moves_leaves_no_ghost(paint: Callable[[Levels, int, int], None], levels: tuple[int, int]) -> None:
    pairs = moving(paint, 16, levels)
    came, calm_ones = shown(pairs)
    background = scene()[0].astype(int)
    for number in (6, 10, 15):
        clean = pairs[number][0]
        assert error(calm_ones[number], clean) < error(came[number], clean)
        # What was covered in the last frames is seen again: no mean of it is darker or brighter than it should be.
        was = np.any([(pair[0] != background).any(axis=2) for pair in pairs[number - 3 : number]], axis=0)
        was &= (clean == background).all(axis=2)
        assert was.sum() > 100
        assert abs(float((calm_ones[number].astype(int) - background)[was].mean())) < 1.0


def test_what_moves_in_one_modality_alone_is_seen() -> None:
    """The picture that is shown may tell little of it: the frames as they came do."""
    still, moves = scene(), moving(block, 12, (0, 230))
    pictures: dict[str, Levels] = {}
    history = b""
    for number in range(12):
        vis, ir = noisy(still[0], number), noisy(moves[number][1], 100 + number)
        pictures, history = calm.calmed({"vis": vis}, calm.given(vis, ir), history)
    known = History.from_bytes(history, pictures)
    assert known is not None
    frames = known.frames / 16
    at = slice((10 + 44) // 2 + 2, (30 + 44) // 2 - 2)
    assert frames[22:33, at].max() < 1.5
    assert np.median(frames) > 5


def test_without_noise_a_scene_that_stands_still_stays_as_it_is() -> None:
    clean = scene()
    _, calm_ones = shown([clean] * 5, noise=0.0)
    for picture in calm_ones:
        np.testing.assert_array_equal(picture, clean[0])


def test_a_slow_change_of_light_is_followed() -> None:
    vis, ir = scene()
    pairs = [((vis * (0.6 + 0.01 * number)).astype(np.uint8), ir) for number in range(30)]
    _, calm_ones = shown(pairs, noise=1.0)
    for number in (10, 20, 29):
        assert abs(float(calm_ones[number].mean()) - float(pairs[number][0].mean())) < 4  # some frames of it


@pytest.mark.parametrize("rate", [0.1, -0.1, 0.3])
@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_what_changes_too_slowly_to_be_noticed_is_followed(rate: float, noise: float) -> None:
    """Each frame differs from the mean by less than would move it by a whole level."""
    vis = np.full((48, 64, 3), 100.3) + np.linspace(0, 20, 64)[:, None]
    history, known = b"", None
    for number in range(70):
        clean = vis + rate * min(number, 20)
        came = noisy(clean, number, noise)
        ir = noisy(clean[..., 0], 1000 + number, noise)
        pictures, history = calm.calmed({"vis": came}, calm.given(came, ir), history)
        known = History.from_bytes(history, pictures)
    assert known is not None
    assert np.median(known.frames) == 16 * calm.FRAMES  # it did not begin anew
    assert abs(float(pictures["vis"].mean()) - float(clean.mean())) < 0.25
    for plane in known.planes:
        assert abs(float(plane.mean()) - float(clean.mean())) < 0.5
    assert float((pictures["vis"] - clean).std()) < 0.8 * noise  # and no pixel stays at its own first guess


def test_a_camera_that_moves_blurs_nothing() -> None:
    generator = np.random.default_rng(3)
    wide = np.kron(generator.integers(20, 230, (40, 60)), np.ones((8, 8))).astype(np.uint8)
    pairs = []
    for number in range(10):
        plane = wide[:120, 3 * number : 3 * number + 160]
        pairs.append((np.repeat(plane[..., None], 3, axis=2), plane.copy()))
    came, calm_ones = shown(pairs, noise=2.0)
    for number in (4, 9):
        clean = pairs[number][0]
        assert error(calm_ones[number], clean) < 1.1 * error(came[number], clean)


def test_a_history_goes_and_comes_as_bytes() -> None:
    vis, ir = (noisy(picture, 1) for picture in scene(size=(33, 47)))
    pictures = {"fused": vis, "ir": ir[..., None]}
    history = History(calm.given(vis, ir).planes, np.full((17, 24), 40, np.uint8), pictures)
    raw = history.to_bytes()
    back = History.from_bytes(raw, pictures)
    assert back is not None
    for one, other in zip((*history.planes, history.frames), (*back.planes, back.frames), strict=True):
        np.testing.assert_array_equal(one, other)
    for part, picture in pictures.items():
        np.testing.assert_array_equal(back.shown[part], picture)
    assert back.to_bytes() == raw


def test_a_history_of_something_else_is_none() -> None:
    vis, ir = scene()
    frame = calm.given(vis, ir)
    _, history = calm.calmed({"vis": vis}, frame, b"")
    assert History.from_bytes(history, {"vis": vis[:60]}) is None
    assert History.from_bytes(history, {"fused": vis}) is None
    pictures, anew = calm.calmed({"fused": vis}, frame, history)
    np.testing.assert_array_equal(pictures["fused"], vis)
    assert History.from_bytes(anew, pictures) is not None


def test_what_is_no_history_is_refused() -> None:
    vis, ir = scene()
    frame = calm.given(vis, ir)
    _, history = calm.calmed({"vis": vis}, frame, b"")
    longer = calm.History(frame.planes, np.zeros_like(frame.planes[0]), {"vis": np.repeat(vis, 2, axis=0)}).to_bytes()
    bomb = history.partition(b"\n")[0] + b"\n" + longer.partition(b"\n")[2]
    for wrong in (b"x", b"RFS1" + history[4:], history[:-9], history.partition(b"\n")[0] + b"\n", bomb):
        with pytest.raises(ValueError, match="history"):
            calm.calmed({"vis": vis}, frame, wrong)


def test_a_picture_that_is_too_small_is_shown_as_it_is() -> None:
    vis, ir = scene(size=(15, 200))
    pictures, history = calm.calmed({"vis": vis}, calm.given(vis, ir), b"")
    assert (history, pictures["vis"] is vis) == (b"", True)
