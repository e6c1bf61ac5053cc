"""Levels that wander come back calm; what moves, a cut and the order of levels are left alone."""

import numpy as np
import pytest
from numpy.typing import NDArray

from recofuse_images import steady
from recofuse_images.steady import GRID, Memory, Seen

Levels = NDArray[np.uint8]
SIZE = (96, 128)


def scene(seed: int = 0) -> tuple[Levels, Levels]:
    """A smooth pair, vis (H, W, 3) and ir (H, W)."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] / 20 + seed
    vis = np.stack([110 + 60 * np.sin(x + phase) * np.cos(y) for phase in (0, 0.4, 0.8)], axis=-1)
    return vis.astype(np.uint8), (120 + 80 * np.cos(x) * np.sin(y)).astype(np.uint8)


def wandering(picture: Levels, number: int) -> Levels:
    """As curves that are estimated anew leave it: another gain and another power in every frame."""
    generator = np.random.default_rng(number)
    gain, power = 1 + generator.normal(0, 0.03), 1 + generator.normal(0, 0.04)
    return (255 * np.clip(gain * picture / 255, 0, 1) ** power).round().astype(np.uint8)


def noisy(picture: Levels, number: int) -> Levels:
    noise = np.random.default_rng(100 + number).normal(0, 6, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def shown(count: int, lag: int) -> tuple[list[dict[str, Levels]], list[dict[str, Levels]]]:
    """Pictures of a standing scene as they came from a model, and as they were shown; `lag` frames are at work."""
    vis, ir = scene()
    memory, told = Memory(), list[Seen]()
    before, after = [], []
    for number in range(count):
        given = steady.inputs(noisy(vis, number), noisy(ir, number))
        pictures = {"fused": wandering(noisy(vis, number), number), "ir": wandering(noisy(ir, number), number + 50)}
        told.append(steady.seen(pictures, given))
        before.append(pictures)
        after.append(steady.steadied(pictures, told[-1], memory.means))
        if len(told) >= lag:
            memory.add(told[-lag])
    return before, after


def change(frames: list[dict[str, Levels]], part: str) -> float:
    """Mean change of the picture's mean from frame to frame, once the stream has begun."""
    return float(np.abs(np.diff([frame[part].mean() for frame in frames[8:]])).mean())


@pytest.mark.parametrize("lag", [1, 4])
@pytest.mark.parametrize("part", ["fused", "ir"])
def test_levels_that_wander_are_held(part: str, lag: int) -> None:
    before, after = shown(24, lag)
    assert change(after, part) < 0.35 * change(before, part)
    total = [np.mean([frame[part].mean() for frame in frames[8:]]) for frames in (before, after)]
    assert abs(total[1] - total[0]) < 2  # held to their own mean, and not to anything else


def test_a_stream_follows_where_its_levels_go() -> None:
    vis, ir = scene()
    memory, given = Memory(), steady.inputs(vis, ir)
    for picture, count in ((vis, 3), (vis // 2 + 80, 40)):
        for _ in range(count):
            frame = steady.seen({"vis": picture}, given)
            held = steady.steadied({"vis": picture}, frame, memory.means)["vis"]
            memory.add(frame)
    assert np.abs(held.astype(int) - (vis // 2 + 80)).max() <= 1


def test_what_does_not_wander_stays_as_it_is() -> None:
    vis, ir = scene()
    frame = steady.seen({"vis": vis, "ir": ir}, steady.inputs(vis, ir))
    memory = Memory()
    memory.add(frame)
    held = steady.steadied({"vis": vis, "ir": ir}, frame, memory.means)
    np.testing.assert_array_equal(held["vis"], vis)
    np.testing.assert_array_equal(held["ir"], ir)
    assert steady.steadied({"vis": vis}, frame, None)["vis"] is vis


def test_a_cut_begins_anew() -> None:
    memory = Memory()
    for seed in (0, 0, 2):
        vis, ir = scene(seed)
        frame = steady.seen({"vis": vis}, steady.inputs(vis, ir))
        held = steady.steadied({"vis": vis}, frame, memory.means)
        np.testing.assert_array_equal(held["vis"], vis)
        memory.add(frame)
    assert memory.means is not None
    np.testing.assert_array_equal(memory.means.given, frame.given)
    np.testing.assert_array_equal(memory.means.shown["vis"], frame.shown["vis"])


def test_what_moves_decides_nothing() -> None:
    """A bright thing that comes into the picture does not make the rest of it darker."""
    vis, ir = scene()
    memory = Memory()
    memory.add(steady.seen({"vis": vis}, steady.inputs(vis, ir)))
    moved_vis, moved_ir = vis.copy(), ir.copy()
    moved_vis[20:70, 30:90] = 250
    moved_ir[20:70, 30:90] = 250
    frame = steady.seen({"vis": moved_vis}, steady.inputs(moved_vis, moved_ir))
    held = steady.steadied({"vis": moved_vis}, frame, memory.means)["vis"]
    np.testing.assert_array_equal(held, moved_vis)
    memory.add(frame)
    assert memory.means is not None
    assert memory.means.shown["vis"][12, 14].tolist() == [250, 250, 250]  # begun anew, not mixed with what was there


def test_the_order_of_levels_and_grey_stay() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    grey = np.repeat(ramp[..., None], 3, axis=2)
    odd = np.where(np.arange(256) % 60 < 30, np.minimum(ramp + 20, 255), np.maximum(ramp.astype(int) - 20, 0))
    memory, given = Memory(), steady.inputs(grey, ramp)
    memory.add(steady.seen({"vis": np.repeat(odd.astype(np.uint8)[..., None], 3, axis=2)}, given))
    frame = steady.seen({"vis": grey}, given)
    held = steady.steadied({"vis": grey}, frame, memory.means)["vis"]
    assert (np.diff(held[0, :, 0].astype(int)) >= 0).all()
    assert (held[..., 0] == held[..., 1]).all()
    assert (held != grey).any()


def test_a_memory_of_other_parts_is_not_asked() -> None:
    vis, ir = scene()
    given = steady.inputs(vis, ir)
    memory = Memory()
    memory.add(steady.seen({"vis": vis}, given))
    frame = steady.seen({"fused": vis // 2}, given)
    np.testing.assert_array_equal(steady.steadied({"fused": vis // 2}, frame, memory.means)["fused"], vis // 2)
    memory.add(frame)
    assert memory.means is not None
    assert list(memory.means.shown) == ["fused"]


def test_means_are_of_all_pixels_whatever_the_size() -> None:
    generator = np.random.default_rng(3)
    for height, width in ((GRID, GRID), (45, 77), (480, 640), (9000, 33)):
        picture = generator.integers(0, 256, (height, width, 3), np.uint8)
        means = steady.averaged(picture)
        assert means.shape == (GRID, GRID, 3)
        row, column = slice(height * 5 // GRID, height * 6 // GRID), slice(width * 31 // GRID, width)
        np.testing.assert_allclose(means[5, 31], picture[row, column].reshape(-1, 3).mean(axis=0), rtol=1e-5)


def test_what_was_seen_survives_its_bytes() -> None:
    vis, ir = scene()
    frame = steady.seen({"fused": vis, "ir": ir}, steady.inputs(vis, ir))
    again = Seen.from_bytes(frame.to_bytes())
    assert set(again.shown) == {"ir", "fused"}
    np.testing.assert_allclose(again.given, frame.given, atol=1 / 256)
    for part in frame.shown:
        np.testing.assert_allclose(again.shown[part], frame.shown[part], atol=1 / 256)
    for wrong in (b"", b"RFS1", b"RFS1vis\n", frame.to_bytes()[:-1], b"RFS1deep\n", b"RFS1vis,vis\n", b"RFS2\n"):
        with pytest.raises(ValueError, match="seen of a frame"):
            Seen.from_bytes(wrong)
