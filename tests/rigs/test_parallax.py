"""What a rig leaves in a frame: found where it is, put right, and nothing done where it is not clear."""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recofuse_core.scenes.scene import two_views
from recofuse_images.writer import png_bytes
from recofuse_rigs import warp as warp_module
from recofuse_rigs.errors import BadRigError
from recofuse_rigs.pairs import read_aligned
from recofuse_rigs.parallax import Refined, Track, bound_of, refined_warp
from recofuse_rigs.rig import Distortion, Rig
from recofuse_rigs.search import GreyPair
from recofuse_rigs.warp import Warp, warp_of
from tests.rigs.scenes import IR_SIZE, VIS_SIZE, moved, scene, truth

WIDTH, HEIGHT = VIS_SIZE
REGISTERED = Rig(VIS_SIZE, VIS_SIZE, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
Field = NDArray[np.floating[Any]]  # (H, W, 2)


def leaning(x: float, y: float) -> Field:
    """A field that grows downwards, as nearer ground has it."""
    down = np.linspace(-0.5, 1, HEIGHT)[:, None]
    return np.stack([np.broadcast_to(x * down, (HEIGHT, WIDTH)), np.broadcast_to(y * down, (HEIGHT, WIDTH))], axis=-1)


def off_by(ir: NDArray[Any], field: Field) -> NDArray[Any]:
    """Infrared that shows at p + field what belongs at p, about: the field is smooth."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    shifts = field.astype(np.float32)
    return np.asarray(cv2.remap(ir, x - shifts[..., 0], y - shifts[..., 1], cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT))


def field_of(refined: Refined) -> Field:
    """What was found, for each pixel."""
    if refined.moved_px == 0 or refined.track is None:
        return np.zeros((HEIGHT, WIDTH, 2))
    return np.asarray(cv2.resize(refined.track.field * WIDTH, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR))


def error(field: Field, found: Field | float) -> float:
    return float(np.linalg.norm(field - found, axis=2).mean())


def noisy(levels: NDArray[Any], seed: int, strength: float = 6.0) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).normal(0, strength, levels.shape)
    return np.asarray(np.clip(levels + noise, 0, 255), np.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_a_registered_pair_is_left_as_it_is(seed: int) -> None:
    vis, ir = scene(seed)
    warp = warp_of(REGISTERED)
    refined = refined_warp(noisy(vis, seed), noisy(ir, seed + 50), warp)
    assert refined.warp is warp
    assert refined.moved_px == 0
    assert refined.residual_px is not None
    assert refined.residual_px < 1.5


@pytest.mark.parametrize(("seed", "way"), [(0, (5.0, 0.0)), (1, (-3.0, 4.0)), (2, (0.0, -6.0)), (3, (-4.0, -4.0))])
def test_a_smooth_field_is_found_and_undone(seed: int, way: tuple[float, float]) -> None:
    vis, ir = scene(seed)
    field = leaning(*way)
    shown = off_by(ir, field)
    refined = refined_warp(noisy(vis, seed), noisy(shown, seed + 50), warp_of(REGISTERED))
    assert error(field, field_of(refined)) < 0.5 * error(field, 0.0)
    inner = np.s_[20:-20, 20:-20]
    undone = np.abs(refined.warp.apply(shown)[inner].astype(float) - ir[inner])
    assert undone.mean() < 0.6 * np.abs(shown[inner].astype(float) - ir[inner]).mean()


@pytest.mark.parametrize("seed", [101, 103])
def test_what_depth_leaves_of_a_rig_is_halved_at_least(seed: int) -> None:
    views = two_views(seed, across_m=0.16, up_m=-0.05, height=HEIGHT, width=WIDTH)
    vis = np.rint(views.vis.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
    counts = np.rint(7000 + 2500 * views.ir[0].numpy()).astype(np.uint16)
    calibrated_m = 14.0
    across, up = views.focal * 0.16, views.focal * -0.05
    shift = (1.0, 0.0, across / calibrated_m, 0.0, 1.0, -up / calibrated_m, 0.0, 0.0, 1.0)
    warp = warp_of(Rig(VIS_SIZE, VIS_SIZE, shift))
    nearer = 1 / views.depth_m.numpy() - 1 / calibrated_m
    field = np.stack([-across * nearer, up * nearer], axis=-1)
    refined = refined_warp(vis, counts, warp)
    assert refined.moved_px > 1
    assert error(field, field_of(refined)) <= 0.5 * error(field, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_what_has_nothing_in_common_is_left_as_it_is(seed: int) -> None:
    vis, _ = scene(seed)
    _, ir = scene(seed + 100)
    assert refined_warp(vis, ir, warp_of(REGISTERED)).moved_px == 0


def test_nothing_moves_further_than_the_rig_allows() -> None:
    vis, ir = scene(1)
    field = np.broadcast_to(np.array([7.0, 0.0]), (HEIGHT, WIDTH, 2))
    for bound in (2.0, 10.0):
        warp = warp_of(Rig(VIS_SIZE, VIS_SIZE, REGISTERED.matrix, parallax_px=bound))
        found = field_of(refined_warp(vis, off_by(ir, field), warp))
        assert np.linalg.norm(found, axis=2).max() <= bound + 1e-3
    assert error(field, found) < 1
    still = warp_of(Rig(VIS_SIZE, VIS_SIZE, REGISTERED.matrix, parallax_px=0.0))
    refined = refined_warp(vis, off_by(ir, field), still)
    assert (refined.warp, refined.residual_px, refined.track) == (still, None, None)


@pytest.mark.parametrize(
    "infrared",
    [
        np.zeros((HEIGHT, WIDTH), np.uint8),
        np.full((HEIGHT, WIDTH), np.nan, np.float32),
        np.full((HEIGHT, WIDTH), np.inf, np.float64),
        np.linspace(-1e29, 1e29, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH),
        np.linspace(-1e307, 1e307, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH),
    ],
    ids=["black", "nan", "infinite", "vast", "beyond sense"],
)
def test_pictures_of_nothing_are_left_as_they_are(infrared: NDArray[Any]) -> None:
    vis, _ = scene(2)
    for visible in (vis, np.zeros_like(vis)):
        assert refined_warp(visible, infrared, warp_of(REGISTERED)).moved_px == 0


@pytest.mark.parametrize("size", [(16, 12), (4000, 16), (700, 90)])
def test_pictures_too_small_to_be_compared_are_left_as_they_are(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 255, size[::-1]).astype(np.uint8)
    assert refined_warp(picture, picture, warp_of(Rig(size, size, REGISTERED.matrix))).moved_px == 0


def test_missing_measurements_do_not_hide_the_rest() -> None:
    vis, ir = scene(3)
    field = leaning(0.0, 5.0)
    values = 7000 + 10 * off_by(ir, field).astype(np.float32)
    values[::7, ::9] = np.nan
    assert error(field, field_of(refined_warp(vis, values, warp_of(REGISTERED)))) < 0.7 * error(field, 0.0)


# the warp


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_moved_warp_is_the_rig_of_that_place(is_kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_kept:
        monkeypatch.setattr(warp_module, "MAX_KEPT_PIXELS", 0)
    matrix = truth()
    rig = Rig(VIS_SIZE, IR_SIZE, tuple(matrix.ravel() / matrix[2, 2]))
    there = np.array([[1, 0, -4.0], [0, 1, 2.5], [0, 0, 1]]) @ matrix
    counts = (moved(scene(4)[1], matrix) * 100.0).astype(np.uint16)
    warp = warp_of(rig)
    shifted = warp.moved(np.broadcast_to(np.array([4.0, -2.5]), (6, 8, 2)))
    expected = warp_of(Rig(VIS_SIZE, IR_SIZE, tuple(there.ravel() / there[2, 2])))
    inner = warp.coverage & expected.coverage
    difference = np.abs(shifted.apply(counts)[inner].astype(float) - expected.apply(counts)[inner])
    assert np.percentile(difference, 99) <= 100  # a level of 8 bits: the shift is linear between nodes, the rig is not
    assert np.array_equal(shifted.coverage, warp.coverage)
    fused, vis = np.random.default_rng(5).integers(0, 256, (2, HEIGHT, WIDTH, 3)).astype(np.uint8)
    np.testing.assert_array_equal(shifted.blended(fused, vis), warp.blended(fused, vis))


@given(st.integers(0, 2**32 - 1), st.floats(0, 12), st.booleans())
@settings(max_examples=8, deadline=None)
def test_no_field_makes_values_that_were_not_measured(seed: int, strength: float, is_bent: bool) -> None:
    rng = np.random.default_rng(seed)
    lens = Distortion((160.0, 160.0), (80.0, 64.0), (-0.2, 0.0, 0.0, 0.0, 0.0)) if is_bent else None
    warp = warp_of(Rig(VIS_SIZE, IR_SIZE, tuple(truth().ravel()), distortion=lens))
    counts = rng.integers(7000, 9000, IR_SIZE[::-1]).astype(np.uint16)
    warped = warp.moved(rng.normal(0, strength, (6, 8, 2))).apply(counts)
    assert warped.dtype == np.uint16
    assert counts.min() <= warped.min() <= warped.max() <= counts.max()


# streams


def frames(num: int, field: Field, seed: int = 7) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    vis, ir = scene(seed)
    return [(noisy(vis, index, 12), noisy(off_by(ir, field), 100 + index, 12)) for index in range(num)]


def followed(sent: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], warp: Warp, *, is_tracked: bool) -> list[Refined]:
    found: list[Refined] = []
    for vis, ir in sent:
        found.append(refined_warp(vis, ir, warp, track=found[-1].track if found and is_tracked else None))
    return found


def test_a_stream_is_steadier_than_its_frames() -> None:
    field, warp = leaning(-4.0, 3.0), warp_of(REGISTERED)
    sent = frames(5, field)
    steps = []
    for is_tracked in (False, True):
        fields = [field_of(refined) for refined in followed(sent, warp, is_tracked=is_tracked)]
        steps.append(np.mean([error(one, other) for one, other in pairwise(fields[2:])]))
        assert error(field, fields[-1]) < 0.5 * error(field, 0.0)
    assert steps[1] < 0.6 * steps[0]


def test_a_cut_begins_anew() -> None:
    warp = warp_of(REGISTERED)
    before = followed(frames(1, leaning(-4.0, 3.0)), warp, is_tracked=True)[-1]
    vis, ir = scene(8)
    shown = off_by(ir, leaning(5.0, 0.0))
    assert before.track is not None
    fresh, cut = refined_warp(vis, shown, warp), refined_warp(vis, shown, warp, track=before.track)
    np.testing.assert_array_equal(field_of(cut), field_of(fresh))
    assert cut.track is not None
    assert cut.track.num_frames == 1


def test_what_was_true_of_frames_before_does_not_harm_a_registered_one() -> None:
    vis, ir = scene(7)
    before = followed(frames(3, leaning(0.0, 6.0)), warp_of(REGISTERED), is_tracked=True)[-1]
    assert before.moved_px > 1
    assert refined_warp(vis, ir, warp_of(REGISTERED), track=before.track).moved_px < 0.2


def test_a_track_is_told_and_read_again() -> None:
    track = followed(frames(2, leaning(3.0, 3.0)), warp_of(REGISTERED), is_tracked=True)[-1].track
    assert track is not None
    again = Track.from_text(track.to_text())
    np.testing.assert_array_equal(again.field, track.field)
    np.testing.assert_array_equal(again.thumbnail, track.thumbnail)
    assert again.num_frames == track.num_frames == 2
    assert len(track.to_text()) < 1000


@given(st.text(max_size=60) | st.binary(min_size=577, max_size=577).map(lambda data: base64.b64encode(data).decode()))
@settings(max_examples=60, deadline=None)
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        track = Track.from_text(text)
    except BadRigError:
        return
    assert np.abs(track.field).max() <= 1
    assert 1 <= track.num_frames <= 5


# files


def test_files_are_refined_at_their_depth() -> None:
    vis, ir = scene(9)
    field = leaning(0.0, 5.0)
    counts = 7000 + 10 * off_by(ir, field).astype(np.uint16)
    files = png_bytes(np.repeat(vis[..., None], 3, axis=2)), png_bytes(counts)
    plain = read_aligned(*files, REGISTERED)
    assert plain.refined is None
    aligned = read_aligned(*files, REGISTERED, is_refined=True)
    assert aligned.refined is not None
    assert aligned.refined.moved_px > 1
    assert aligned.infrared.picture.values.dtype == np.uint16
    registered = 7000 + 10 * ir.astype(float)
    left, was = (np.abs(each.infrared.picture.values - registered).mean() for each in (aligned, plain))
    assert left < 0.6 * was


def streets(across_m: float, count: int = 5, right_m: float = 12.0) -> tuple[list[GreyPair], Rig, float]:
    """Streets as cameras so far apart see them, a rig that is right for one distance, and how far off the rest lies."""
    pairs, farthest, x = [], 0.0, 0.0
    for seed in range(count):
        views = two_views(seed, across_m=across_m, up_m=0.0, height=HEIGHT, width=WIDTH)
        x = -views.focal * across_m
        vis, ir = (np.asarray(side.numpy().mean(axis=0) * 255, np.float32) for side in (views.vis, views.ir))
        pairs.append(GreyPair(vis, ir))
        farthest = max(farthest, float(np.abs(x * (1 / views.depth_m.numpy() - 1 / right_m)).max()))
    return pairs, Rig(VIS_SIZE, VIS_SIZE, (1.0, 0.0, -x / right_m, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)), farthest


def test_pairs_tell_how_far_off_other_distances_lie() -> None:
    pairs, rig, farthest = streets(0.12)
    found = bound_of(pairs, rig)
    assert found is not None
    assert 0.8 * farthest <= found <= 1.6 * farthest
    assert bound_of(pairs[:3], rig) is None  # too few
    assert bound_of(streets(0.0)[0], REGISTERED) is None  # nothing is off, so nothing is told
