"""How many steps are enough: quality against steps for every sampler, `recofuse bench steps --pairs DIR`.

Clean pairs are degraded by the protocol of docs/evaluation.md (the middle of each, so that many settings can be tried),
restored and fused by each sampler with each number of steps, and scored against the clean pair. The yardstick is the
published setting, 100 Euler steps of the same weights in float32. A setting loses nothing if the restored pictures are
at most 0.1 dB below it and no fusion score is worse by more than 0.5 % of it; being better is no loss.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from recofuse_core.checkpoint import load_pretrained
from recofuse_core.data import Pair, PairFiles, find_pairs, read_pair, to_float, to_uint8
from recofuse_core.devices import named_device
from recofuse_core.evaluation import plots, protocol
from recofuse_core.evaluation.quality import fusion_scores, psnr
from recofuse_core.precision import Precision
from recofuse_core.runtime import Runtime
from recofuse_core.sampler import SamplerName

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = (1, 2, 3, 4, 5, 8, 10, 20, 50, 100)
SAMPLERS: tuple[SamplerName, ...] = ("ode1", "ode2", "posterior")
MORE_IS_BETTER = ("en", "sd", "mi", "cc", "scd", "vif", "qabf", "ssim")
LESS_IS_BETTER = ("noise", "chroma")
SCORES = (*MORE_IS_BETTER, *LESS_IS_BETTER)
MAX_LOSS_DB = 0.1
MAX_LOSS = 0.005


@dataclass(frozen=True)
class Setting:
    """What is tried. precision: of the networks."""

    sampler: SamplerName
    steps: int
    precision: Precision = "auto"


YARDSTICK = Setting("euler", 100, "float32")


@dataclass(frozen=True)
class Quality:
    """Means over the pairs. PSNR of restored pictures to the clean ones, of the fused one to the yardstick's."""

    setting: Setting
    vis_psnr_db: float
    ir_psnr_db: float
    fused_psnr_db: float
    scores: dict[str, float]

    def loss_db(self, best: Quality) -> float:
        """How far the worse of both restored pictures is below the yardstick's; negative: above it."""
        return max(best.vis_psnr_db - self.vis_psnr_db, best.ir_psnr_db - self.ir_psnr_db)

    def loss(self, best: Quality) -> tuple[float, str]:
        """The largest relative loss of a fusion score, and whose; negative: all are better."""
        losses = [((best.scores[n] - self.scores[n]) / abs(best.scores[n]), n) for n in MORE_IS_BETTER]
        losses += [((self.scores[n] - best.scores[n]) / abs(best.scores[n]), n) for n in LESS_IS_BETTER]
        return max(losses)

    def loses_nothing(self, best: Quality) -> bool:
        """Whether it is within both tolerances."""
        return self.loss_db(best) <= MAX_LOSS_DB and self.loss(best)[0] <= MAX_LOSS

    def cells(self, best: Quality) -> list[str]:
        """Of the table."""
        loss, name = self.loss(best)
        precision = " float32" if self.setting.precision == "float32" else ""
        return [
            f"{self.setting.sampler} {self.setting.steps}{precision}",
            f"{self.vis_psnr_db:.2f}",
            f"{self.ir_psnr_db:.2f}",
            f"{self.fused_psnr_db:.1f}",
            *(f"{self.scores[name]:.3f}" for name in SCORES),
            f"{self.loss_db(best):+.2f}",
            f"{100 * loss:+.1f} % ({name})",
            "nothing" if self.loses_nothing(best) else "",
        ]


HEAD = ["Setting", "vis dB", "ir dB", "fused dB", *(s.upper() if len(s) < 4 else s for s in SCORES)]
HEAD += ["loss dB", "worst score", "loses"]


@dataclass(frozen=True)
class Outcome:
    """Everything, the yardstick first. enough: the fewest steps of each sampler that lose nothing; line: the last."""

    qualities: list[Quality]
    enough: dict[str, int | None]
    line: str


def run(
    pairs: Path,
    *,
    weights: str = "compact",
    limit: int = 8,
    side: int = 256,
    strength: protocol.EvaluationStrength = "medium",
    steps: Sequence[int] = STEPS,
    samplers: Sequence[SamplerName] = SAMPLERS,
    device: str = "auto",
    json_path: Path | None = None,
    csv_path: Path | None = None,
    plot_path: Path | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Measure every setting on `limit` pairs spread over a folder; say a Markdown table and a last line.

    side: of the middle square that is used, in pixels; 0 takes whole frames.
    """
    if plot_path is not None:
        plots.require_matplotlib()
    chosen = named_device(device)
    model = load_pretrained(weights, device=chosen)
    own = Setting(model.info.default_sampler, model.info.default_steps)
    settings = [YARDSTICK, replace(own, precision="float32"), own]
    settings += [replace(YARDSTICK, precision="auto")]
    settings += [Setting(sampler, count) for sampler in samplers for count in steps]
    settings = list(dict.fromkeys(settings))
    runtimes = {precision: Runtime(model, precision=precision) for precision in ("float32", "auto")}
    files = find_pairs(pairs)
    spread = files[:: max(1, len(files) // limit)][:limit]
    found: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
    for item in spread:
        measured = _of_pair(runtimes, item, settings, side, strength)  # type: ignore[arg-type]
        for setting, values in measured.items():
            found[setting].append(values)
    qualities = [_mean(setting, values) for setting, values in found.items()]
    best = qualities[0]
    say(f"{weights} {model.info.version}; {len(spread)} pairs, {strength}, {side or 'whole'} px; yardstick first\n")
    say(f"| {' | '.join(HEAD)} |\n|---|{'--:|' * (len(HEAD) - 2)}---|")
    for quality in qualities:
        say(f"| {' | '.join(quality.cells(best))} |")
    enough: dict[str, int | None] = {
        sampler: next(
            (q.setting.steps for q in qualities if _is_try(q, sampler) and q.loses_nothing(best)),
            None,
        )
        for sampler in samplers
    }
    default = next(q for q in qualities if q.setting == own)
    loss, name = default.loss(best)
    fewest = ", ".join(f"{sampler} {count or 'none'}" for sampler, count in enough.items())
    line = (
        f"steps: fewest that lose nothing against euler 100: {fewest}; the default {own.sampler} {own.steps} is "
        f"{-default.loss_db(best):+.2f} dB, its worst score {-100 * loss:+.1f} % ({name})"
    )
    if json_path is not None:
        rows = [asdict(quality) for quality in qualities]
        document = {"weights": weights, "version": model.info.version, "num_pairs": len(spread), "side": side}
        document |= {"strength": strength, "rows": rows, "enough": enough, "line": line}
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if csv_path is not None:
        with csv_path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(HEAD)
            writer.writerows(quality.cells(best) for quality in qualities)
    if plot_path is not None:
        figure = chart(qualities, samplers, f"{weights} {model.info.version}")
        plot_path.write_text(plots.svg(figure), encoding="utf-8")
    say("\n" + line)
    return Outcome(qualities, enough, line)


@plots.look()
def chart(qualities: Sequence[Quality], samplers: Sequence[SamplerName], name: str) -> Figure:
    """Mean PSNR of both restored pictures over steps; the dashed level is the yardstick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.0))
    axes = figure.subplots()
    axes.set(title=f"{name}: quality against steps", xlabel="steps", ylabel="restored PSNR, dB", xscale="log")
    for sampler in samplers:
        tries = sorted((q.setting.steps, _psnr_db(q)) for q in qualities if _is_try(q, sampler))
        axes.plot([steps for steps, _ in tries], [db for _, db in tries], "o-", markersize=4, label=sampler)
    best = qualities[0]
    axes.axhline(_psnr_db(best), color=plots.OTHER, linestyle="--", label=best.cells(best)[0])
    ticks = sorted({q.setting.steps for q in qualities if q.setting.sampler in samplers})
    axes.set_xticks(ticks, [str(steps) for steps in ticks])
    axes.minorticks_off()
    axes.grid(axis="y")
    figure.legend(loc="outside right upper")
    return figure


def _psnr_db(quality: Quality) -> float:
    return (quality.vis_psnr_db + quality.ir_psnr_db) / 2


def _is_try(quality: Quality, sampler: SamplerName) -> bool:
    return quality.setting.sampler == sampler and quality.setting.precision == "auto"


def _of_pair(
    runtimes: dict[Literal["float32", "auto"], Runtime],
    files: PairFiles,
    settings: Sequence[Setting],
    side: int,
    strength: protocol.EvaluationStrength,
) -> dict[Setting, dict[str, float]]:
    pair = read_pair(files)
    if side:
        pair = replace(pair, vis=_middle(pair.vis, side), ir=_middle(pair.ir, side))
    vis, ir, _, _ = protocol.degrade_pair(pair, strength, 0)
    seed = protocol.item_seed(0, files.name, "model")
    measured: dict[Setting, dict[str, float]] = {}
    yardstick: Tensor | None = None
    for setting in settings:
        runtime = runtimes["float32" if setting.precision == "float32" else "auto"]
        output = runtime.fuse(
            to_float(vis)[None],
            to_float(ir)[None],
            steps=setting.steps,
            sampler=setting.sampler,
            seeds=seed,
            exposure="as_shot",
        )
        if output.fused is None or output.vis is None or output.ir is None:
            raise RuntimeError("a run without all three pictures")
        fused = to_uint8(output.fused[0])
        yardstick = fused if yardstick is None else yardstick
        measured[setting] = _figures(pair, to_uint8(output.vis[0]), to_uint8(output.ir[0]), fused, yardstick)
    return measured


def _figures(pair: Pair, vis: Tensor, ir: Tensor, fused: Tensor, yardstick: Tensor) -> dict[str, float]:
    scores = asdict(fusion_scores(fused, pair.vis, pair.ir))
    figures = {name: float(scores[name]) for name in SCORES}
    figures["vis_psnr_db"], figures["ir_psnr_db"] = psnr(vis, pair.vis), psnr(ir, pair.ir)
    figures["fused_psnr_db"] = min(psnr(fused, yardstick), 99.0)  # equal pictures: a figure that has a mean
    return figures


def _mean(setting: Setting, values: Sequence[dict[str, float]]) -> Quality:
    means = {name: fmean(value[name] for value in values) for name in values[0]}
    scores = {name: means[name] for name in SCORES}
    return Quality(setting, means["vis_psnr_db"], means["ir_psnr_db"], means["fused_psnr_db"], scores)


def _middle(image: Tensor, side: int) -> Tensor:
    height, width = image.shape[-2:]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return image[..., top : top + side, left : left + side].contiguous()
