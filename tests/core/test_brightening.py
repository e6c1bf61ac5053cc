"""Infrared beside lit nights: what the curve promises, when it is used, and that restored infrared keeps its levels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from recofuse_core.brightening import Brightening
from recofuse_core.checkpoint import load_pretrained
from recofuse_core.exposure import IR_AIM, IR_MOST, brightening_for
from recofuse_core.model import ReCoFuse
from recofuse_core.picture import Exposure
from recofuse_core.recording import EagerRecorder
from recofuse_core.runtime import Runtime
from recofuse_core.sampler import Pair
from recofuse_core.scenes.scene import make_scene
from tests.core.test_exposure import lit_model
from tests.core.tiny import largest_difference, pairs


def even(level: float, channels: int = 3, size: int = 40) -> Tensor:
    return torch.full((1, channels, size, size), level)


def night_model() -> ReCoFuse:
    """One that lights whatever it sees fourfold."""
    model = lit_model()
    assert model.exposure is not None
    model.exposure.curve_head.bias[3:6] = math.log(4)
    return model


@settings(deadline=None, max_examples=40)
@given(amount=st.floats(0, IR_MOST), seed=st.integers(0, 2**31))
def test_it_keeps_ends_and_order_and_can_be_undone(amount: float, seed: int) -> None:
    by = Brightening(torch.full((1, 1, 1, 1), amount), torch.ones(1, 1, 1, 1))
    levels = torch.rand(1, 1, 8, 8, generator=Generator().manual_seed(seed)).flatten().sort().values
    levels = torch.cat([torch.zeros(1), levels, torch.ones(1)]).view(1, 1, 1, -1)
    brighter = by(levels)
    assert brighter[..., 0] == 0
    assert torch.allclose(brighter[..., -1], torch.ones(1))
    assert bool((brighter >= levels - 1e-6).all())
    assert bool((brighter.diff(dim=-1) >= 0).all())
    assert torch.allclose(by.undone(brighter), levels, atol=1e-5)


@pytest.mark.parametrize(
    ("ir", "before", "after", "expected"),
    [
        (0.1, 0.1, 0.35, IR_AIM),  # a dark thermogram beside a lit night
        (0.01, 0.1, 0.35, 3 * 0.01 / 1.02),  # hardly anything was measured: no more than thrice
        (0.3, 0.1, 0.35, 0.3),  # bright enough
        (0.1, 0.35, 0.36, 0.1),  # a day
        (0.0, 0.1, 0.35, 0.0),  # a covered lens
        (0.1, 0.0, 0.35, IR_AIM),
    ],
)
def test_it_is_for_dark_infrared_beside_what_was_lit(ir: float, before: float, after: float, expected: float) -> None:
    frame = even(ir, 1)
    by = brightening_for(frame, even(before), even(after))
    assert by.amount.shape == (1, 1, 1, 1)
    assert float(by(frame).mean()) == pytest.approx(expected, abs=1e-3)


def test_a_dusk_is_in_between() -> None:
    amounts = [float(brightening_for(even(0.1, 1), even(0.2), even(0.2 * rise)).amount) for rise in (1.3, 1.65, 2.0)]
    assert amounts[0] == pytest.approx(0, abs=1e-4)
    assert amounts[1] == pytest.approx(amounts[2] / 2, rel=1e-3)


def test_every_item_of_a_batch_has_its_own() -> None:
    levels = ((0.05, 0.4, 1), (0.1, 0.4, 3), (0.3, 0.4, 3))
    ir, before, after = (torch.cat([even(dark, count), even(bright, count)]) for dark, bright, count in levels)
    amounts = brightening_for(ir, before, after).amount.flatten()
    assert amounts[0] > 1
    assert amounts[1] == 0


@pytest.mark.parametrize("steps", [2, 12])
def test_recorded_runs_undo_it_as_eager_ones_do(steps: int) -> None:
    """Of more than eight steps what was brightened has to reach another recording than the one that did it."""
    model = night_model()
    vis, ir = pairs(2, 64, 48)
    dark = 0.15 * vis, ir * torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)
    _, brightened_by = model.levelled(Pair(*dark), "lit")
    assert brightened_by is not None
    amounts = brightened_by.amount.flatten()
    assert amounts[0] > amounts[1] + 0.3 > 0.6
    runtime = Runtime(model, precision="float32", graphs=True, recorder=EagerRecorder())
    for images in (dark, tuple((255 * image).byte() for image in dark)):
        runtime.record([(2, 64, 48)], exposure="lit", steps=steps, levels=images[0].dtype == torch.uint8)
        recorded, eager = (each.fuse(*images, exposure="lit", steps=steps) for each in (runtime, model))
        assert largest_difference(recorded, eager) <= (1 if images[0].dtype == torch.uint8 else 2e-5)


@pytest.mark.slow
def test_warm_people_are_brighter_by_night_and_restored_infrared_is_as_it_was() -> None:
    """A street at night under infrared of which all but the hottest is near black, with the shipped weights."""
    model = load_pretrained("compact").requires_grad_(False)
    scene = make_scene(3, 192, 256)
    vis, ir = 0.08 * scene.vis[None], scene.ir[None, :1] ** 3
    frames, brightened_by = model.levelled(Pair(vis, ir), "lit")
    assert brightened_by is not None
    assert float(brightened_by.amount) > 0.5
    assert float(frames.ir.mean()) > 1.5 * float(model.normalise(Pair(vis, ir)).ir.mean())

    def restored(exposure: Exposure) -> Tensor:
        output = model.fuse(vis, ir, exposure=exposure, outputs=["ir"])
        assert output.ir is not None
        found: Tensor = output.ir
        return found

    assert float((restored("lit") - restored("as_shot")).square().mean().sqrt()) < 0.02
