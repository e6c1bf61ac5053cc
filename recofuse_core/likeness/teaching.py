"""Teaching the cue networks: of all shifts, the one at which infrared lies is to be the most alike.

The likeness is the one that `recofuse_rigs` works out with the maps (a product summed over pixels, over the root of
both energies), so a map that is short where it knows nothing costs nothing there. It is a softmax's logits, with a
temperature that is learnt, and the target is a narrow bell about the true shift. One temperature serves all, so what a
quarter says adds up with what others say.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.errors import DatasetError
from recofuse_core.likeness.examples import (
    HEIGHT,
    MARGIN,
    RADIUS,
    SMALL,
    WIDTH,
    Example,
    refinement_example,
    search_example,
    stacked,
)
from recofuse_core.likeness.network import CueNetwork
from recofuse_core.scenes.scene import make_scene
from recofuse_core.training.optimisation import WeightAverage

Grey = NDArray[np.uint8]

RECORDED_PX, STREET_PX = 1.5, 0.3  # how exactly they lie
_FIRST_STREET = 1001  # seeds below are for tests and benchmarks
EMPTY = 0.3  # as in recofuse_rigs.search
EMPTY_BLOCK = 0.01  # as in recofuse_rigs.refinement


@dataclass(frozen=True, slots=True)
class Lesson:
    """A registered pair, both (480, 640), and how exactly it lies, in pixels."""

    vis: Grey
    ir: Grey
    off_px: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how. searches, refinements: examples of a step."""

    steps: int = 3000
    searches: int = 3
    refinements: int = 5
    learning_rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.995  # of the averaged weights, which are what is taken
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What a step came to: losses as shares of what knowing nothing costs, and of shifts found within 1.5 pixels."""

    number: int
    search: float
    refinement: float
    search_found: float
    refinement_found: float


def lessons_of(recorded: Iterable[tuple[Grey, Grey]], num_streets: int) -> list[Lesson]:
    """Recorded pairs that lie where they should, and generated streets, repeated until they are a fifth of all.

    recorded: (480, 640), uint8, visible and infrared.
    """
    found = [Lesson(vis, ir, RECORDED_PX) for vis, ir in recorded]
    exact = []
    for seed in range(_FIRST_STREET, _FIRST_STREET + num_streets):
        scene = make_scene(seed, HEIGHT, WIDTH)
        vis = np.einsum("chw,c->hw", scene.vis.numpy(), np.array([0.299, 0.587, 0.114], np.float32))
        pictures = [np.rint(values * 255).astype(np.uint8) for values in (vis, scene.ir.numpy()[0])]
        exact.append(Lesson(pictures[0], pictures[1], STREET_PX))
    return found + exact * (max(1, round(len(found) / (4 * num_streets))) if exact else 0)


class Teacher(nn.Module):
    """The networks, and the temperatures that turn likeness into odds."""

    def __init__(self) -> None:
        super().__init__()
        self.network = CueNetwork()
        self.sharpness = nn.Parameter(torch.tensor([math.log(30.0), math.log(15.0)]))

    def search_odds(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of shifts, (B, 1, 2 margin + 1 of y, of x)."""
        vis = self.network(batch["vis"], "vis")
        ir = turned(self.network(batch["ir"], "ir"), batch["turn"]) * batch["seen"]
        alike = shifted_products(vis, ir, MARGIN).sum(dim=1, keepdim=True)
        energy = vis.square().sum(dim=1, keepdim=True)
        floor = EMPTY * energy.sum(dim=(2, 3), keepdim=True)
        own = shifted_products(energy, batch["seen"], MARGIN).clamp(min=0)
        other = shifted_products(torch.ones_like(energy), ir.square().sum(dim=1, keepdim=True), MARGIN).clamp(min=0)
        odds: Tensor = self.sharpness[0].exp() * alike / ((own + floor) * (other + floor)).sqrt()
        return odds

    def refinement_odds(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of shifts of each quarter, (B, 4, 2 radius + 1, 2 radius + 1)."""
        vis = self.network(batch["vis"], "vis")
        ir = self.network(batch["ir"], "ir") * batch["seen"]
        wide, high = SMALL[0] // 2, SMALL[1] // 2
        found = []
        for top in (0, high):
            for left in (0, wide):
                block = vis[:, :, top : top + high, left : left + wide]
                around = ir[:, :, top : top + high + 2 * RADIUS, left : left + wide + 2 * RADIUS]
                alike = shifted_products(block, around, (RADIUS, RADIUS)).sum(dim=1)
                energy = around.square().sum(dim=1, keepdim=True)
                other = F.avg_pool2d(energy, (high, wide), 1)[:, 0] * (wide * high)
                floor = EMPTY_BLOCK * wide * high
                bound = (block.square().sum(dim=(1, 2, 3))[:, None, None] + floor) * (other + floor)
                found.append(alike / bound.sqrt())
        odds: Tensor = self.sharpness[1].exp() * torch.stack(found, dim=1)
        return odds


def shifted_products(block: Tensor, around: Tensor, margin: tuple[int, int]) -> Tensor:
    """For shifts from 0 to twice the margin (x, y), the sum of products of `block` and what lies there in `around`."""
    size = around.shape[-2:]
    spectrum = torch.fft.rfft2(around) * torch.fft.rfft2(block, s=size).conj()
    products: Tensor = torch.fft.irfft2(spectrum, s=size)
    return products[..., : 2 * margin[1] + 1, : 2 * margin[0] + 1]


def turned(maps: Tensor, turn: Tensor) -> Tensor:
    """Maps (B, C, H, W) through (B, 3, 3), which takes output pixels to input ones."""
    height, width = maps.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1).to(maps)
    places = torch.einsum("bij,hwj->bhwi", turn, points)[..., :2]
    scaled = places * (2 / torch.tensor([width - 1, height - 1])) - 1
    return F.grid_sample(maps, scaled, align_corners=True, padding_mode="border")


def loss_and_found(odds: Tensor, shifts: Tensor, blur: Tensor, margin: tuple[int, int]) -> tuple[Tensor, float]:
    """Cross-entropy as a share of what knowing nothing costs, and the share of shifts found within 1.5 pixels.

    odds: (B, n, H, W). shifts: (B, n, 2), x and y, NaN for what is not asked. blur: (B,) pixels.
    """
    height, width = odds.shape[-2:]
    asked = ~shifts.isnan().any(dim=-1) & (shifts.abs() <= torch.tensor(margin)).all(dim=-1)
    if not asked.any():
        return odds.sum() * 0, 0.0
    x = torch.arange(width) - margin[0] - shifts[..., 0, None]
    y = torch.arange(height) - margin[1] - shifts[..., 1, None]
    scale = 2 * blur[:, None, None].square()
    target = (-(y.square() / scale)[..., :, None] - (x.square() / scale)[..., None, :]).flatten(2).softmax(dim=-1)
    logs = odds.flatten(2).log_softmax(dim=-1)
    costs = -(target.nan_to_num() * logs).sum(dim=-1)[asked] / math.log(height * width)
    best = odds.flatten(2).argmax(dim=-1)
    off = torch.hypot(best % width - margin[0] - shifts[..., 0], best // width - margin[1] - shifts[..., 1])
    return costs.mean(), float((off[asked] < 1.5).float().mean())


def teach(teacher: Teacher, lessons: Sequence[Lesson], plan: Plan, seconds: float = math.inf) -> Iterator[Step]:
    """Teach for the plan's steps, or as many as the time allows, to whose end the rate falls; `teacher` ends averaged.

    Whoever looks in between sees what is taken, too. Raises DatasetError without lessons.
    """
    if not lessons:
        raise DatasetError("nothing to learn from: of no pair it is sure where it lies, and there are no streets")
    rng = np.random.default_rng(plan.seed)
    optimizer = torch.optim.AdamW(teacher.parameters(), plan.learning_rate, weight_decay=1e-4)
    average = WeightAverage(teacher, plan.decay)
    began = time.monotonic()
    for number in range(plan.steps):
        done = max(number / plan.steps, (time.monotonic() - began) / seconds)
        if done >= 1:
            break
        rate = plan.learning_rate * min(1, (number + 1) / plan.warmup) * (0.02 + 0.98 * math.cos(done * math.pi / 2))
        for group in optimizer.param_groups:
            group["lr"] = rate
        searches = _batch(rng, lessons, plan.searches, search_example)
        refinements = _batch(rng, lessons, plan.refinements, refinement_example)
        first, first_found = loss_and_found(
            teacher.search_odds(searches), searches["shifts"] - torch.tensor(MARGIN), searches["blur"], MARGIN
        )
        second, second_found = loss_and_found(
            teacher.refinement_odds(refinements), refinements["shifts"], refinements["blur"], (RADIUS, RADIUS)
        )
        optimizer.zero_grad()
        torch.autograd.backward(first + second)
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        average.update(teacher)
        live = {name: value.clone() for name, value in teacher.state_dict().items()}
        teacher.load_state_dict(average.weights)
        yield Step(number, float(first.detach()), float(second.detach()), first_found, second_found)
        teacher.load_state_dict(live)
    teacher.load_state_dict(average.weights)


def _batch(
    rng: np.random.Generator,
    lessons: Sequence[Lesson],
    count: int,
    make: Callable[[np.random.Generator, Grey, Grey, float], Example],
) -> dict[str, Tensor]:
    examples = []
    for index in rng.integers(0, len(lessons), count):
        lesson = lessons[int(index)]
        examples.append(make(rng, lesson.vis, lesson.ir, lesson.off_px))
    fields: dict[str, NDArray[Any]] = stacked(examples)
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in fields.items()}
