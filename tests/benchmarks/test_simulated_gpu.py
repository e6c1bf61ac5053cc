"""Whatever may be recorded as a CUDA graph can be, and asks for no more than the committed table says.

The models lie on the meta device, so this needs no GPU and hardly any memory. It cannot show what happens within cuDNN,
cuBLAS and the driver. `recofuse bench engine --model-gpu` tries every kind of run; here are those in which every two
values meet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import engine, simulated_gpu
from benchmarks.simulated_capture import DEVICE, OF_OURS, Capture, Demand, small
from benchmarks.simulated_gpu import (
    BLOCKS,
    CARDS,
    FUSED,
    LAUNCH_S,
    SMALL_SIZE,
    SMALL_TILES,
    TABLE_BATCHES,
    Kind,
    Way,
    all_kinds,
    captured,
    captured_kind,
    count,
    covering,
    recorded,
    run_operations,
    table,
)
from recofuse_core.kernels.choice import KernelChoice
from recofuse_core.model import PRESETS, ReCoFuse, build_model
from recofuse_core.picture import Exposure
from recofuse_core.precision import DTYPES, Precision
from recofuse_core.sampler import SAMPLERS, SamplerName
from service.command.cli import app

SERVED: Way = ("bfloat16", True, "eager")
OURS: Way = ("bfloat16", True, "triton")
OTHERS: tuple[Way, ...] = (
    ("bfloat16", False, "eager"),
    ("float32", True, "eager"),
    ("bfloat16", False, "triton"),
    ("float16", True, "triton"),
)


@cache
def small_model(preset: str, precision: Precision, stacked: bool, kernels: KernelChoice) -> ReCoFuse:
    return simulated_gpu.small_model(preset, (precision, stacked, kernels))


ALL_KINDS = list(all_kinds())


def test_every_kind_of_run_is_looked_at() -> None:
    """What may be asked for, and what precisions and kernels are chosen."""
    columns = [set(column) for column in zip(*ALL_KINDS, strict=True)]
    presets, ways, samplers, outputs, levels, exposures, forms = columns
    assert (presets, samplers, levels) == (set(PRESETS), set(SAMPLERS), {True, False})
    assert {precision for precision, _, _ in ways} == set(DTYPES)
    assert {stacked for _, stacked, _ in ways} == {True, False}
    assert {kernels for _, _, kernels in ways} == set(BLOCKS)
    assert outputs == {("fused",), ("vis",), ("ir",), ("fused", "vis", "ir")}
    assert exposures == set(get_args(Exposure))
    assert forms == {"whole", "tiled", "long", "partial"}
    assert len(ALL_KINDS) == len(set(ALL_KINDS)) == 672


def test_few_cover_every_two_values_of_all() -> None:
    few = covering(ALL_KINDS)
    assert len(few) < 40
    every, covered = (
        {pair for kind in kinds for pair in combinations(enumerate(kind), 2)} for kinds in (ALL_KINDS, few)
    )
    assert covered == every


@pytest.mark.parametrize("kind", covering(ALL_KINDS), ids=str)
def test_every_two_wishes_can_be_captured_together(kind: Kind) -> None:
    """Of all 672 kinds, which take minutes, those in which every sampler meets every output, dtype, form and so on."""
    found = captured_kind(small_model(kind.preset, *kind.way), kind)
    assert found.flags == []
    assert found.demand.kernels > 100


@pytest.mark.parametrize(
    ("preset", "way", "sampler"),
    [
        *(("compact", SERVED, sampler) for sampler in SAMPLERS),
        *(("compact", way, "ode2") for way in (OURS, *OTHERS)),
        ("paper", OURS, "ode1"),
        *(("paper", SERVED, sampler) for sampler in SAMPLERS),  # it predicts noise, and is read otherwise
    ],
    ids=str,
)
def test_every_sampler_can_be_captured(preset: str, way: Way, sampler: SamplerName) -> None:
    found = captured(small_model(preset, *way), 2, *SMALL_SIZE, sampler=sampler, steps=2)
    assert found.flags == []
    assert found.demand.kernels > 150
    ours = [operation for operation in found.operations if operation.name in OF_OURS]
    assert bool(ours) == (way[2] == "triton")


@pytest.mark.parametrize(
    ("preset", "way"), [("compact", SERVED), ("compact", OURS), ("compact", OTHERS[1]), ("paper", SERVED)], ids=str
)
def test_tiled_frames_can_be_captured(preset: str, way: Way) -> None:
    model = small_model(preset, *way)
    found = captured(model, 1, 64, 96, steps=1, tiling=SMALL_TILES)
    assert found.flags == []
    whole = captured(model, 1, 64, 96, steps=1).demand
    assert found.demand.num_bytes > 1.1 * whole.num_bytes
    assert found.demand.kernels < 1.4 * whole.kernels  # both tiles go as one batch


@pytest.mark.parametrize(("preset", "way"), [("compact", OURS), ("paper", SERVED)], ids=str)
@pytest.mark.parametrize("is_long", [False, True])
def test_pairs_whose_infrared_ends_within_the_frame_can_be_captured(preset: str, way: Way, is_long: bool) -> None:
    model = small_model(preset, *way)
    options: dict[str, Any] = {"steps": 1, "outputs": FUSED, "is_long": is_long}
    found = captured(model, 2, *SMALL_SIZE, is_partial=True, **options)
    assert found.flags == []
    whole = captured(model, 2, *SMALL_SIZE, **options).demand
    twice = captured(model, 2, *SMALL_SIZE, **(options | {"outputs": ("fused", "vis")})).demand
    assert whole.flops < found.demand.flops < (whole.flops + twice.flops) / 2  # one decoding, and some blending


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("preset", "batch"), [("compact", 1), ("compact", 8), ("paper", 1)])
def test_a_run_asks_for_no_more_than_the_table_says(preset: str, batch: int, blocks: KernelChoice) -> None:
    """Whoever saves some writes it down, too: python -m benchmarks.simulated_gpu."""
    (known,) = [row for row in table() if (row.preset, row.batch, row.blocks) == (preset, batch, blocks)]
    now = count(preset, batch, blocks)
    assert known.kernels * 0.97 <= now.kernels <= known.kernels
    assert known.gigabytes * 0.97 <= now.gigabytes <= known.gigabytes + 0.01


def test_our_kernels_are_few_and_move_little() -> None:
    """At most 950 kernels (900 are aimed at) and 16 GB for a batch of compact, 9,000 kernels for a pair of paper."""
    ours = {(row.preset, row.batch): row for row in table() if row.blocks == "triton"}
    assert ours["compact", 8].kernels <= 950
    assert ours["compact", 8].gigabytes <= 16
    assert ours["paper", 1].kernels <= 9000


@pytest.mark.slow
def test_the_targets_for_a_card_are_what_the_model_of_one_supports() -> None:
    """With torch's kernels, a baseline of 1,600 operations of 7 us a step, and a quarter left to error."""
    card, config = CARDS["H200"], PRESETS["paper"]
    single_s, eight_s = (
        sum(map(card.seconds, run_operations(config, batch, outputs=FUSED))) for batch in TABLE_BATCHES
    )
    baseline_step_s = 1600 * 7e-6
    error = 4 / 3
    assert baseline_step_s / (error * single_s / config.steps) > engine.GPU_STEP_RATIO
    assert engine.BASELINE_STEPS * baseline_step_s / (error * single_s) > engine.GPU_RATIO
    assert 8 / (error * eight_s) > engine.GPU_PAIRS_S
    width, height = engine.NAMED_SIZE
    with DEVICE:
        costs = engine.count_costs(build_model(config).eval(), height, width, item_bytes=2)
    floor_s = costs.floor_s(8, config.steps, 1, engine.Ceilings(card.half_flops_s, card.bytes_s, card.precision))
    assert error * eight_s / floor_s < engine.GPU_FLOOR_FACTOR


@pytest.mark.parametrize(("preset", "sampler"), [("compact", "ode2"), ("compact", "euler"), ("paper", "posterior")])
def test_a_long_run_is_recorded_as_its_beginning_one_step_and_its_end(preset: str, sampler: SamplerName) -> None:
    """Any number of steps is one small graph, of hardly more kernels than a run of one step has."""
    model = small_model(preset, *SERVED)
    for tiling in (None, SMALL_TILES):
        options = {"sampler": sampler, "tiling": tiling}
        of_100 = recorded(model, 1, 64, 96, steps=100, **options)  # type: ignore[arg-type]
        assert of_100.capture.flags == []
        assert len(of_100.parts) == 3
        of_1 = captured(model, 1, 64, 96, steps=1, **options).demand
        assert of_100.capture.demand.kernels <= of_1.kernels + 30


def test_a_run_of_many_steps_is_put_together_from_its_parts() -> None:
    model = small_model("compact", *SERVED)
    options = {"sampler": "ode2", "outputs": FUSED}
    begin, step, end = map(Demand.of, recorded(model, is_long=True, **options).parts)  # type: ignore[arg-type]
    many = Demand.of(run_operations(replace(small("compact"), steps=20), 1, outputs=FUSED))
    assert many.kernels == begin.kernels + 20 * (step.kernels + 2) + end.kernels
    assert many.num_bytes == begin.num_bytes + 20 * step.num_bytes + end.num_bytes
    # As much work as the same run in one recording asks for, but for how the samplers count.
    unrolled = [captured(model, steps=steps, **options).demand.flops for steps in (2, 3)]  # type: ignore[arg-type]
    assert many.flops == unrolled[0] + 18 * (unrolled[1] - unrolled[0])


@pytest.mark.parametrize(
    ("run", "flag"),
    [
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: x + torch.ones(3).to(x.device), "ones"),
        (lambda x: x.copy_(torch.ones(3)), "copy_"),
        (lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=x.device), "tensor: numbers"),
        (lambda x: torch.arange(3), "arange"),
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
    ],
)
@torch.inference_mode()
def test_what_a_capture_may_not_hold_is_seen(run: Callable[[Tensor], object], flag: str) -> None:
    x = torch.zeros(3, device=DEVICE)
    with Capture() as found:
        run(x)
    assert any(flag in line for line in found.flags), found.flags


@torch.inference_mode()
def test_what_is_counted() -> None:
    x, weight, bias = torch.zeros(8, 4, device=DEVICE), torch.zeros(4, 4, device=DEVICE), torch.zeros(4, device=DEVICE)
    number = torch.tensor(2.0)  # goes along with the kernel
    with Capture() as found:
        y = (x * number).view(4, 8).t()
        torch.addmm(bias, x, weight)
    assert (found.demand.kernels, found.flags, y.shape) == (2, [], (8, 4))
    assert found.demand.num_bytes == 2 * 8 * 4 * 4 + (4 + 2 * 8 * 4 + 4 * 4) * 4
    assert found.demand.flops == 2 * 8 * 4 * 4
    biases = torch.zeros(2, 1, 4, device=DEVICE)
    with Capture() as found:
        torch.baddbmm(biases, x.expand(2, 8, 4), weight.expand(2, 4, 4))
    assert found.demand.kernels == 2


@pytest.mark.parametrize("card", CARDS)
@torch.inference_mode()
def test_a_small_operation_takes_its_launch_and_a_large_one_its_bytes(card: str) -> None:
    small, large = torch.zeros(8, device=DEVICE), torch.zeros(1 << 30, device=DEVICE)
    with Capture() as found:
        _ = small + 1
        _ = large + 1
    seconds = [CARDS[card].seconds(operation) for operation in found.operations]
    assert seconds == pytest.approx([LAUNCH_S, 2 * 4 * (1 << 30) / (CARDS[card].bytes_s / 2)])


def test_the_command_models_a_card(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    arguments = ["bench", "engine", "--model-gpu", "T4", "--preset", "compact", "--quick", "--json", str(path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    document = json.loads(path.read_text())
    rows = [(row["preset"], row["batch"], row["form"]) for row in document["rows"]]
    assert rows == [("compact", batch, form) for batch in (1, 8) for form in ("kernels", "stacked")]
    for row in document["rows"]:
        assert 0 < row["floor_ms"] < row["modelled_ms"]
        assert row["launch_ms"] == pytest.approx(1e3 * LAUNCH_S * row["kernels"])
    assert document["host_ms"] > 0
    assert document["host_copying_ms"] > 0
    assert done.output.strip().splitlines()[-1] == document["line"]


def test_an_unknown_card_is_refused() -> None:
    done = CliRunner().invoke(app, ["bench", "engine", "--model-gpu", "V100"])
    assert done.exit_code != 0
    assert simulated_gpu.CARDS.keys().isdisjoint({"V100"})
