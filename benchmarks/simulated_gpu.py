"""What a run would ask of a GPU, counted without one: `recofuse bench engine --model-gpu H200`.

Every operation of a run that would be captured is seen (simulated_capture.py) and counted: so many kernels each as
cuDNN, cuBLAS and ATen launch for it, as far as their sources tell, and the bytes that they read and write. From both
comes a time: each operation takes its launches, or its multiplications, or its bytes, whichever is longest, at half of
what the card's maker says. All of that is an estimate, good for comparing two states of the code and no promise of what
a card does. `benchmarks/kernels.json` holds the counts of the presets, so that nobody adds a thousand kernels unseen.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from benchmarks.engine import BATCHES, NAMED_SIZE, Ceilings, count_costs
from benchmarks.host_work import host_work
from benchmarks.simulated_capture import DEVICE, Capture, Demand, Operation, SimulatedRecorder, simulation, small
from recofuse_core.kernels.choice import KernelChoice, use_kernels
from recofuse_core.model import PRESETS, ModelConfig, ReCoFuse, build_model
from recofuse_core.picture import ALL_OUTPUTS, Exposure, OutputName
from recofuse_core.precision import DTYPES, Precision, frozen_copy
from recofuse_core.programs import MAX_UNROLLED_STEPS, ProgramKey, build_program
from recofuse_core.sampler import SAMPLERS, SamplerName
from recofuse_core.supplies import Supplies
from recofuse_core.tiling import TilingConfig

FUSED: tuple[OutputName, ...] = ("fused",)
TABLE = Path(__file__).with_name("kernels.json")
TABLE_BATCHES = (1, 8)
BLOCKS: tuple[KernelChoice, ...] = ("eager", "triton")

LAUNCH_S = 2e-6  # from one kernel to the next that waits for it, within a graph


@dataclass(frozen=True, slots=True)
class Card:
    """What its maker says of a card: dense products in its half precision and in float32, memory, and its cache."""

    name: str
    half_flops_s: float
    float_flops_s: float
    bytes_s: float
    cache_bytes: float
    precision: Precision = "bfloat16"  # or float16, which is as fast where both are there

    def seconds(self, operation: Operation) -> float:
        """What one operation takes, at half of everything."""
        flops_s = self.half_flops_s if operation.is_half else self.float_flops_s
        bytes_s = self.bytes_s if operation.num_bytes > self.cache_bytes else CACHE_FACTOR * self.bytes_s
        return max(LAUNCH_S * operation.kernels, operation.flops / (flops_s / 2), operation.num_bytes / (bytes_s / 2))


CACHE_FACTOR = 2.0  # what fits the cache moves so much faster
CARDS = {
    card.name: card
    for card in (
        Card("H200", 790e12, 67e12, 4.8e12, 25e6),
        Card("H100", 790e12, 67e12, 3.35e12, 25e6),
        Card("4090", 165e12, 82e12, 1.01e12, 36e6),
        Card("T4", 65e12, 8.1e12, 0.32e12, 2e6, precision="float16"),
    )
}


def on_device(
    config: ModelConfig, precision: Precision = "bfloat16", *, stacked: bool = True, kernels: KernelChoice = "eager"
) -> ReCoFuse:
    """A model for inference on the device that stands for a GPU, its weights never filled."""
    with DEVICE:
        model = build_model(config).eval()
    frozen = frozen_copy(model, DTYPES[precision], stacked=stacked)
    use_kernels(frozen, kernels)
    return frozen


@torch.inference_mode()
def recorded(
    model: ReCoFuse,
    batch: int = 1,
    height: int = 480,
    width: int = 640,
    *,
    levels: bool = True,
    sampler: SamplerName | None = None,
    steps: int | None = None,
    outputs: Collection[OutputName] = ALL_OUTPUTS,
    tiling: TilingConfig | None = None,
    exposure: Exposure | None = None,
    is_long: bool = False,
    is_partial: bool = False,
) -> SimulatedRecorder:
    """The recordings of one kind of run of a model from `on_device`.

    is_long: as for many steps, however few. is_partial: infrared was not measured everywhere.
    """
    plan = model.plan(steps=steps, sampler=sampler, outputs=outputs, tiling=tiling, exposure=exposure)
    # What tiles are weighed by, and what features are blended with, is made once.
    recorder = SimulatedRecorder(warms_up=plan.tiles(height, width) or is_partial)
    with simulation():
        key = ProgramKey.of(plan, batch, height, width, levels=levels, partial=is_partial)
        key = replace(key, plan=replace(plan, timesteps=())) if is_long else key
        build_program(model, key, DEVICE, recorder, Supplies(model, DEVICE))
    return recorder


def captured(model: ReCoFuse, batch: int = 1, height: int = 480, width: int = 640, **options: Any) -> Capture:
    """What the captures of `recorded` would be."""
    return recorded(model, batch, height, width, **options).capture


def run_operations(
    config: ModelConfig, batch: int, precision: Precision = "bfloat16", **options: Any
) -> list[Operation]:
    """The operations of a run at 640x480 with a preset's own sampler and steps."""
    model = on_device(config, precision, stacked=options.pop("stacked", True), kernels=options.pop("kernels", "eager"))
    width, height = NAMED_SIZE
    parts = recorded(model, batch, height, width, steps=config.steps, **options).parts
    if config.steps <= MAX_UNROLLED_STEPS:
        return parts[0]
    begin, step, end = parts
    # Before every step its numbers and its conditioning are put in place; noise is not counted.
    put = [Operation("copy_", 1, 0, 0, is_half=False)] * 2
    return [*begin, *(put + step) * config.steps, *end]


@dataclass(frozen=True, slots=True)
class Count:
    """One line of the committed table: a preset at 640x480 in bfloat16, its own steps, the fused picture alone.

    blocks: what they and the fusion module run on, torch's kernels ("eager") or ours ("triton").
    """

    preset: str
    batch: int
    blocks: KernelChoice
    kernels: int
    gigabytes: float


def count(preset: str, batch: int, blocks: KernelChoice) -> Count:
    """What the code asks for now."""
    demand = Demand.of(run_operations(PRESETS[preset], batch, outputs=FUSED, kernels=blocks))
    return Count(preset, batch, blocks, demand.kernels, round(demand.num_bytes / 1e9, 2))


def table() -> list[Count]:
    """What the code asked for when the table was written."""
    return [Count(**line) for line in json.loads(TABLE.read_text(encoding="utf-8"))]


def write_table() -> list[Count]:
    """Count again, for whoever changes what a run asks for: `python -m benchmarks.simulated_gpu`."""
    made = list(itertools.starmap(count, itertools.product(("compact", "paper"), TABLE_BATCHES, BLOCKS)))
    TABLE.write_text(json.dumps([asdict(row) for row in made], indent=2) + "\n", encoding="utf-8")
    return made


# --- what a capture may not hold --------------------------------------------------------------------------------------

SMALL_SIZE = (50, 70)  # height, width; padded on both sides
SMALL_TILES = TilingConfig(max_pixels=64 * 64, tile=64, overlap=32)

Way = tuple[Precision, bool, KernelChoice]  # the second: stacked or not
WAYS: tuple[Way, ...] = (
    ("bfloat16", True, "eager"),
    ("bfloat16", True, "triton"),
    ("bfloat16", False, "triton"),
    ("bfloat16", False, "eager"),
    ("float16", True, "triton"),
    ("float32", True, "eager"),
)


Form = Literal["whole", "tiled", "long", "partial"]


class Kind(NamedTuple):
    """A kind of run that may be recorded. form: of a whole frame or of tiles, of many steps, of partial infrared."""

    preset: str
    way: Way
    sampler: SamplerName
    outputs: tuple[OutputName, ...]
    levels: bool
    exposure: Exposure
    form: Form

    def __str__(self) -> str:
        precision, stacked, kernels = self.way
        way = f"{precision} {'stacked' if stacked else 'apart'} {kernels}"
        images = "levels" if self.levels else "floats"
        return f"{self.preset} {way} {self.sampler} {'+'.join(self.outputs)} {images} {self.exposure} {self.form}"


def all_kinds() -> Iterator[Kind]:
    """Every one that is looked at: of both presets, all ways, samplers, outputs and forms."""
    asked: tuple[tuple[OutputName, ...], ...] = (FUSED, ("vis",), ("ir",), ALL_OUTPUTS)
    for preset, way in itertools.product(PRESETS, WAYS):
        can_light = PRESETS[preset].exposure is not None
        for sampler, outputs, levels in itertools.product(SAMPLERS, asked, (True, False)):
            exposure: Exposure = "lit" if levels and can_light else "as_shot"
            for form in get_args(Form) if outputs == ALL_OUTPUTS else ("whole",):
                yield Kind(preset, way, sampler, outputs, levels, exposure, form)


def covering(kinds: Iterable[Kind]) -> list[Kind]:
    """Few of them in which every two values stand beside each other that do so in any of them."""
    pairs = {kind: set(itertools.combinations(enumerate(kind), 2)) for kind in kinds}
    left = set().union(*pairs.values())
    chosen = []
    while left:
        best = max(pairs, key=lambda kind: len(pairs[kind] & left))  # the first of several
        chosen.append(best)
        left -= pairs[best]
    return chosen


def captured_kind(model: ReCoFuse, kind: Kind) -> Capture:
    """The capture of a small run of a kind, of three steps, by a model of its preset and way."""
    batch, height, width = (1, 64, 96) if kind.form == "tiled" else (2, *SMALL_SIZE)
    return captured(
        model,
        batch,
        height,
        width,
        sampler=kind.sampler,
        steps=3,
        outputs=kind.outputs,
        levels=kind.levels,
        exposure=kind.exposure,
        tiling=SMALL_TILES if kind.form == "tiled" else None,
        is_long=kind.form == "long",
        is_partial=kind.form == "partial",
    )


def small_model(preset: str, way: Way) -> ReCoFuse:
    """A model for `captured_kind`."""
    precision, stacked, kernels = way
    return on_device(small(preset), precision, stacked=stacked, kernels=kernels)


def all_captures() -> Iterator[tuple[Kind, Capture]]:
    """The captures of `all_kinds`, each with its kind."""
    for (preset, way), kinds in itertools.groupby(all_kinds(), key=lambda kind: kind[:2]):
        model = small_model(preset, way)
        yield from ((kind, captured_kind(model, kind)) for kind in kinds)


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One run at 640x480 on a card that is not there. floor_ms as in benchmarks/engine.py, at the maker's figures.

    form: the branches stacked or apart on torch's kernels, or stacked on ours ("kernels").
    """

    preset: str
    batch: int
    outputs: str
    form: str
    operations: int
    kernels: int
    gigabytes: float
    gigaflops: float
    floor_ms: float
    launch_ms: float  # what launching alone takes
    modelled_ms: float

    def text(self) -> str:
        """A line of the table."""
        return (
            f"{self.preset:8} {self.batch:>3}  {self.outputs:5} {self.form:7} "
            f"{self.operations:>6} {self.kernels:>7} {self.gigabytes:>7.2f} {self.gigaflops:>7.0f} "
            f"{self.floor_ms:>8.2f} {self.launch_ms:>9.2f} {self.modelled_ms:>8.2f} "
            f"{1e3 * self.batch / self.modelled_ms:>8.0f}"
        )


HEADING = "preset batch outputs form      ops kernels      GB  GFLOP floor ms launch ms  model ms  pairs/s"


@dataclass(frozen=True, slots=True)
class Outcome:
    """All figures. flags: operations that no graph could hold. line: the last one said."""

    rows: list[Row]
    flags: list[str]
    line: str


def run(
    card: str,
    *,
    presets: Sequence[str] = ("compact", "paper"),
    is_quick: bool = False,
    json_path: Path | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Model runs on a card; say one row at a time, and a summary as the last line. quick: few runs, and no captures."""
    model_of = CARDS[card]
    say(f"{card}, modelled: launches of {1e6 * LAUNCH_S:.0f} us, half of the maker's figures, {model_of.precision}")
    say(HEADING)
    rows, flags = [], []
    for preset in presets:
        for batch in TABLE_BATCHES if is_quick else BATCHES:
            for form in ("kernels", "stacked") if is_quick else ("kernels", "stacked", "apart"):
                for outputs in (FUSED,) if is_quick or form == "apart" else (FUSED, ALL_OUTPUTS):
                    rows.append(_row(model_of, preset, batch, outputs, form))
                    say(rows[-1].text())
    line = "; ".join(
        f"{row.preset} batch {row.batch} {row.form}: {row.kernels} kernels, {row.gigabytes:.1f} GB, "
        f"{row.modelled_ms:.1f} ms"
        for row in rows
        if row.batch in TABLE_BATCHES and row.form != "apart" and row.outputs == "fused"
    )
    host = host_work()
    line += (
        f"; {host.ms:.1f} ms of one thread of this host for a batch of 8, {host.copying_ms:.1f} for copying its bytes"
    )
    if not is_quick:
        num_captures = 0
        for kind, found in all_captures():
            num_captures += 1
            flags += [f"{kind}: {flag}" for flag in found.flags]
        for flag in flags:
            say(flag)
        line += f"; {num_captures} captures, {len(flags) or 'no'} operations that none may hold"
    line = f"engine modelled on {card}: {line}"
    if json_path is not None:
        document = {
            "card": asdict(model_of),
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
            "host_ms": host.ms,
            "host_copying_ms": host.copying_ms,
        }
        json_path.write_text(json.dumps({**document, "flags": flags, "line": line}, indent=2) + "\n", encoding="utf-8")
    say(line)
    return Outcome(rows, flags, line)


def _row(card: Card, preset: str, batch: int, outputs: tuple[OutputName, ...], form: str) -> Row:
    config = PRESETS[preset]
    kernels: KernelChoice = "triton" if form == "kernels" else "eager"
    operations = run_operations(
        config, batch, card.precision, outputs=outputs, stacked=form != "apart", kernels=kernels
    )
    demand = Demand.of(operations)
    is_half = card.precision != "float32"
    with DEVICE:
        bare = build_model(config).eval()
    width, height = NAMED_SIZE
    costs = count_costs(bare, height, width, 2 if is_half else 4)
    ceilings = Ceilings(card.half_flops_s if is_half else card.float_flops_s, card.bytes_s, card.precision)
    return Row(
        preset,
        batch,
        "all" if len(outputs) == len(ALL_OUTPUTS) else "+".join(outputs),
        form,
        demand.operations,
        demand.kernels,
        round(demand.num_bytes / 1e9, 3),
        round(demand.flops / 1e9, 1),
        round(1e3 * costs.floor_s(batch, config.steps, len(outputs), ceilings), 3),
        round(1e3 * LAUNCH_S * demand.kernels, 3),
        round(1e3 * sum(map(card.seconds, operations)), 3),
    )


if __name__ == "__main__":
    for line in write_table():
        name = f"{line.preset:8} batch {line.batch} {line.blocks:6}"
        print(f"{name}: {line.kernels:>6} kernels, {line.gigabytes:>6.2f} GB")
