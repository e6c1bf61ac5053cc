"""Does starting a frame from the one before it save steps? Quality and flicker on moving scenes: `bench warm-start`.

Streets in which cars and people move under a standing camera get the degradations of a bad camera: fixed low light and
contrast, fresh noise in every frame. Each frame is restored cold (from noise) and warm (from the restored latents of
the frame before, re-noised to a step), with different numbers of evaluations; and, so that it is seen what the frame
before contributes, late: from the frame's own degraded latents, noised to the same step.

Figures, of frames after the first three, means over frames and scenes: PSNR of both restored images to the clean
frame, whole and where the clean scene moves (ghosts would show there); flicker, the mean absolute difference of two
successive results where the clean scene stands still, in 8-bit levels: 0 in the clean sequence itself.

Warm starting wins if one of its settings saves evaluations against the model's default and costs neither quality
(0.1 dB) nor flicker (2 %), while every start of as few evaluations without the frame before does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from benchmarks.processes import machine
from service.command.cameras import degraded_clip

if TYPE_CHECKING:
    from torch import Tensor

    from recofuse_core.model import ReCoFuse
    from recofuse_core.picture import FusionOutput
    from recofuse_core.scenes.scene import Scene

SEEDS = (1, 5, 9)
NUM_FRAMES = 10
SETTLED = 3  # frames after which a warm start has forgotten its cold first frame
SIZE = (240, 320)
STILL, MOVING = 0.5 / 255, 8 / 255  # a pixel's change in the clean pair
MAX_LOSS_DB, MAX_FLICKER = 0.1, 1.02


@dataclass(frozen=True, slots=True)
class Setting:
    """How every frame but the first is computed. start: the step at which it begins, None: the last one."""

    steps: int
    start: int | None = None
    is_warm: bool = False

    @property
    def name(self) -> str:
        """Such as `cold, 3` or `warm from 50, 1`."""
        if self.start is None:
            return f"cold, {self.steps}"
        return f"{'warm' if self.is_warm else 'late'} from {self.start}, {self.steps}"


@dataclass(frozen=True, slots=True)
class Row:
    """One setting's figures. PSNR in dB, flicker in 8-bit levels, cpu_ms of one frame."""

    name: str
    steps: int
    is_warm: bool
    vis_db: float
    ir_db: float
    moving_vis_db: float
    moving_ir_db: float
    flicker_vis: float
    flicker_ir: float
    flicker_fused: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All rows, the default setting first, and what they say."""

    rows: list[Row]
    is_won: bool
    line: str


def run(
    *,
    weights: str = "compact",
    is_quick: bool = False,
    json_path: Path | None = None,
    say: Callable[[str], None],
) -> Outcome:
    """Measure all settings. Raises recofuse_core's CheckpointError for weights that cannot be read."""
    from recofuse_core import load_pretrained

    model = load_pretrained(weights)
    steps, cold_plan = model.info.default_steps, model.plan().timesteps
    settings = [Setting(count) for count in dict.fromkeys((steps, *range(min(steps, 3) - 1, 0, -1)))]
    warm = [(2, cold_plan[len(cold_plan) // 3]), (2, 50), (1, 50), (1, cold_plan[-1])]
    settings += [Setting(count, start, is_warm=True) for count, start in dict.fromkeys(warm)]
    settings += [Setting(count, 50) for count in (2, 1)]
    num_frames, seeds = (5, SEEDS[:1]) if is_quick else (NUM_FRAMES, SEEDS)
    scenes = [degraded_clip(seed, num_frames, *SIZE) for seed in seeds]
    rows = []
    for setting in settings:
        rows.append(_row(model, setting, scenes))
        say(_line(rows[-1]))
    outcome = judge(rows)
    if json_path is not None:
        document = {
            "machine": machine(),
            "model": f"{model.info.name} {model.info.version}",
            "is_won": outcome.is_won,
            "line": outcome.line,
            "rows": [asdict(row) for row in rows],
        }
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    say(markdown(rows))
    say(outcome.line)
    return outcome


def _row(model: ReCoFuse, setting: Setting, scenes: list[tuple[list[Scene], list[tuple[Tensor, Tensor]]]]) -> Row:
    figures: dict[str, list[float]] = {}
    spent_s, num_frames = 0.0, 0
    for clean, frames in scenes:
        results: list[FusionOutput] = []
        for vis, ir in frames:
            started_s = time.process_time()
            steps = setting.steps if results else None  # the first frame is always a cold one of the default
            results.append(
                model.fuse(
                    vis[None],
                    ir[None],
                    steps=steps,
                    previous=results[-1].latents if results and setting.is_warm else None,
                    start=setting.start if results else None,
                    exposure="as_shot",
                )
            )
            if len(results) > 1:
                spent_s += time.process_time() - started_s
                num_frames += 1
        for name, values in _figures(clean, results).items():
            figures.setdefault(name, []).extend(values)
    means = {name: mean(values) for name, values in figures.items()}
    return Row(setting.name, setting.steps, setting.is_warm, cpu_ms=1e3 * spent_s / num_frames, **means)


def _figures(clean: list[Scene], results: list[FusionOutput]) -> dict[str, list[float]]:
    import torch

    figures: dict[str, list[float]] = {}
    for now in range(min(SETTLED, len(clean) - 1), len(clean)):
        before, scene, result, earlier = clean[now - 1], clean[now], results[now], results[now - 1]
        change = torch.maximum((scene.vis - before.vis).abs().amax(0), (scene.ir - before.ir).abs().amax(0))
        is_still, is_moving = change < STILL, change > MOVING
        for part, truth in (("vis", scene.vis), ("ir", scene.ir)):
            error = (getattr(result, part)[0] - truth) ** 2
            figures.setdefault(f"{part}_db", []).append(_db(error))
            figures.setdefault(f"moving_{part}_db", []).append(_db(error[:, is_moving]))
        for part in ("vis", "ir", "fused"):
            difference = (getattr(result, part)[0] - getattr(earlier, part)[0]).abs()[:, is_still]
            figures.setdefault(f"flicker_{part}", []).append(255 * float(difference.mean()))
    return figures


def _db(squared_error: Tensor) -> float:
    return float(-10 * squared_error.mean().log10())


def judge(rows: list[Row]) -> Outcome:
    """What the rows, the default first, say about warm starting."""
    default = rows[0]

    def is_as_good(row: Row) -> bool:
        return (
            min(row.vis_db - default.vis_db, row.ir_db - default.ir_db) >= -MAX_LOSS_DB
            and min(row.moving_vis_db - default.moving_vis_db, row.moving_ir_db - default.moving_ir_db) >= -MAX_LOSS_DB
            and row.flicker_fused <= MAX_FLICKER * default.flicker_fused
        )

    saving = [row for row in rows[1:] if row.steps < default.steps and is_as_good(row)]
    warm = min((row for row in saving if row.is_warm), key=lambda row: row.steps, default=None)
    other = min((row for row in saving if not row.is_warm), key=lambda row: row.steps, default=None)
    is_won = warm is not None and (other is None or warm.steps < other.steps)
    fewest = [f"{row.name}: {_short(row)}" for row in (warm, other) if row is not None]
    line = (
        f"warm start {'wins' if is_won else 'does not win'}: {default.name}: {_short(default)}; "
        f"as good with fewer evaluations: {'; '.join(fewest) or 'none'}"
    )
    return Outcome(rows, is_won, line)


def _short(row: Row) -> str:
    return f"vis {row.vis_db:.2f} dB, ir {row.ir_db:.2f} dB, flicker {row.flicker_fused:.2f}, {row.cpu_ms:.0f} ms"


def _line(row: Row) -> str:
    return f"{row.name}: {_short(row)}"


def markdown(rows: list[Row]) -> str:
    """A table of the rows."""
    lines = [
        "| Start, evaluations | vis, dB | ir, dB | moving vis, dB | moving ir, dB | flicker vis | ir | fused | ms |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.name} | {row.vis_db:.2f} | {row.ir_db:.2f} | {row.moving_vis_db:.2f} | {row.moving_ir_db:.2f} "
        f"| {row.flicker_vis:.2f} | {row.flicker_ir:.2f} | {row.flicker_fused:.2f} | {row.cpu_ms:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)
