"""What the cue networks are asked for lies where it should, and some steps of teaching go the right way."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
import torch

from recofuse_core.errors import DatasetError
from recofuse_core.likeness import examples, network, teaching
from recofuse_core.likeness.examples import MARGIN, RADIUS, SMALL, refinement_example, search_example, stacked
from recofuse_core.likeness.network import MAPS, SIDES, CueNetwork, write_graphs
from recofuse_core.likeness.teaching import (
    Lesson,
    Plan,
    Teacher,
    lessons_of,
    loss_and_found,
    shifted_products,
    teach,
    turned,
)
from recofuse_rigs import cues, learned, placing, refinement, search

Picture = np.ndarray[tuple[int, int], np.dtype[np.uint8]]


def blots(seed: int) -> Picture:
    """Something that looks the same to both cameras, so that plain correlation finds it."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal((480, 640)).astype(np.float32), (0, 0), 12)
    return np.asarray(cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8))  # type: ignore[call-overload]


def centred(picture: torch.Tensor) -> torch.Tensor:
    return picture - picture.mean(dim=(2, 3), keepdim=True)


def test_examples_say_where_infrared_lies() -> None:
    """What undisturbed correlation finds is what is asked for, but for what perspective and steps of scale leave."""
    off_search, off_part = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        picture = blots(seed)
        fields = stacked([search_example(rng, picture, picture, 0.0)])
        batch = {name: torch.from_numpy(values) for name, values in fields.items()}
        ir = turned(centred(batch["ir"]), batch["turn"]) * batch["seen"]
        alike = shifted_products(centred(batch["vis"]), ir, MARGIN)[0, 0]
        own = shifted_products(centred(batch["vis"]).square(), batch["seen"], MARGIN)[0, 0]
        other = shifted_products(torch.ones_like(batch["vis"]), ir.square(), MARGIN)[0, 0]
        alike = alike / (own * other).clamp(min=0).add(1e9).sqrt()
        y, x = np.unravel_index(int(alike.abs().argmax()), alike.shape)
        off_search.append(np.hypot(x - fields["shifts"][0, 0, 0], y - fields["shifts"][0, 0, 1]))

        fields = stacked([refinement_example(rng, picture, picture, 0.0)])
        batch = {name: torch.from_numpy(values) for name, values in fields.items()}
        ir, quarter = batch["ir"] * batch["seen"], (slice(0, SMALL[1] // 2), slice(0, SMALL[0] // 2))
        around = ir[0, 0, : SMALL[1] // 2 + 2 * RADIUS, : SMALL[0] // 2 + 2 * RADIUS].numpy()
        surface = cv2.matchTemplate(around, fields["vis"][0, 0][quarter], cv2.TM_CCOEFF_NORMED)
        y, x = np.unravel_index(int(np.abs(surface).argmax()), surface.shape)
        if np.isfinite(fields["shifts"][0, 0]).all():
            off_part.append(np.hypot(x - RADIUS - fields["shifts"][0, 0, 0], y - RADIUS - fields["shifts"][0, 0, 1]))
    assert np.median(off_search) < 2
    assert np.median(off_part) < 2
    assert len(off_part) > 5


def test_the_loss_is_least_at_the_asked_shift() -> None:
    shifts, blur = torch.tensor([[[2.0, -1.0], [float("nan"), 0.0]]]), torch.tensor([0.6])
    odds = torch.zeros(1, 2, 9, 9)
    flat, found = loss_and_found(odds, shifts, blur, (4, 4))
    assert float(flat) == pytest.approx(1.0)
    assert found == 0
    odds[0, 0, 4 - 1, 4 + 2] = 5
    good, found = loss_and_found(odds, shifts, blur, (4, 4))
    assert float(good) < 0.95
    assert found == 1
    nothing, _ = loss_and_found(odds, torch.full((1, 2, 2), float("nan")), blur, (4, 4))
    assert float(nothing) == 0


def test_a_few_steps_on_streets_lower_the_loss() -> None:
    torch.manual_seed(0)
    teacher = Teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    steps = list(teach(teacher, lessons_of([], 1), Plan(steps=6, searches=2, refinements=2, warmup=1)))
    assert [step.number for step in steps] == list(range(6))
    assert steps[-1].search + steps[-1].refinement < steps[0].search + steps[0].refinement
    assert all(not torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    with pytest.raises(DatasetError, match="nothing to learn from"):
        next(teach(teacher, [], Plan()))


def test_streets_are_a_fifth_of_what_is_learnt_from() -> None:
    recorded = [(blots(0), blots(1))] * 8
    found = lessons_of(recorded, 1)
    assert len(found) == 10
    assert all(isinstance(lesson, Lesson) and lesson.vis.shape == (480, 640) for lesson in found)
    assert len(lessons_of(recorded, 0)) == 8


def test_what_is_taught_is_what_calibration_does() -> None:
    """The two packages stand beside each other, so neither imports the other: what both say must be one."""
    assert (learned.MAPS, get_args(learned.Side)) == (network.MAPS, network.SIDES)
    assert (examples.WIDTH, examples.HEIGHT) == placing.SIZE
    assert examples.SMALL == (search.WIDTH, search.WIDTH * 3 // 4)
    assert tuple(search.Reach().shift * side for side in examples.SMALL) == examples.MARGIN
    assert {level.width for level in (refinement.COARSE, *refinement.FINE)} == set(examples.LEVELS)
    assert max(level.radius for level in refinement.FINE) == RADIUS
    assert (search.EMPTY, refinement._EMPTY_BLOCK) == (teaching.EMPTY, teaching.EMPTY_BLOCK)

    grey = blots(5).astype(np.float32)
    for scale in (0.2, 0.9):
        matrix = np.array([[scale, 0.05, 20], [-0.04, scale, 12], [1e-5, 0, 1]])
        picture, seen = cues.laid(grey, matrix, examples.CANVAS)
        assert np.array_equal(examples._laid(grey, matrix, examples.CANVAS), picture)
        assert np.array_equal(examples._seen(matrix, (640, 480), examples.CANVAS), cues.inner_of(seen, learned.INNER))
    ways = (1.3, 0.2, (320, 256), (70.0, 50.0))
    assert np.array_equal(examples._similarity(*ways), search._similarity(*ways))


def test_odds_are_the_likeness_of_calibration() -> None:
    """The same maps and shifts, by the code that calibrates."""
    torch.manual_seed(2)
    teacher = Teacher()
    fields = stacked([refinement_example(np.random.default_rng(3), blots(1), blots(1), 0.0)])
    batch = {name: torch.from_numpy(values) for name, values in fields.items()}
    with torch.inference_mode():
        odds = (teacher.refinement_odds(batch) / teacher.sharpness[1].exp())[0].numpy()
        vis, ir = (teacher.network(batch[side], side)[0].permute(1, 2, 0).numpy() for side in SIDES)
    ir = ir * fields["seen"][0, 0, :, :, None]
    seen = np.ones((SMALL[1], SMALL[0]), np.bool_)
    inner = np.ascontiguousarray(ir[RADIUS:-RADIUS, RADIUS:-RADIUS])
    surfaces, _ = refinement.likeness_surfaces(vis, inner, seen, RADIUS, blocks=(2, 2), overlapping=1.0)
    # Around the frame calibration sees nothing, where the example goes on: shifts towards the middle are the same.
    towards = [(slice(y, y + RADIUS + 1), slice(x, x + RADIUS + 1)) for y in (RADIUS, 0) for x in (RADIUS, 0)]
    for quarter, (rows, columns) in enumerate(towards):
        assert np.abs(odds[quarter][rows, columns] - surfaces[quarter][rows, columns]).max() < 1e-4
        assert np.ptp(odds[quarter]) > 1e-2


def test_graphs_are_the_networks(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = CueNetwork()
    paths = write_graphs(network, tmp_path)
    assert [path.name for path in paths] == ["cues_vis.onnx", "cues_ir.onnx"]
    for side, path in zip(SIDES, paths, strict=True):
        graph = cv2.dnn.readNetFromONNX(str(path))
        for height, width in ((96, 128), (120, 160), (96, 128)):
            grey = np.random.default_rng(0).uniform(0, 255, (1, 1, height, width)).astype(np.float32)
            graph.setInput(grey)
            with torch.inference_mode():
                expected = network(torch.from_numpy(grey), side).numpy()
            assert expected.shape == (1, MAPS, height, width)
            assert np.abs(graph.forward() - expected).max() < 1e-4
            assert (np.square(expected).sum(axis=1) < 1).all()
