"""What is told of many pairs' scores: means, tables, JSON, CSV and one line."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any

from recofuse_core.errors import ConfigError
from recofuse_core.evaluation.protocol import (
    DEGRADED,
    MODEL,
    EvaluationSettings,
    PairScores,
    RestorationResult,
)

Figure = float | None  # None: not defined (no reference) or not finite (PSNR of equal images)
RESTORATION_COLUMNS = {
    "vis_psnr_db": "vis PSNR, dB",
    "vis_psnr_gain_db": "gain",
    "ir_psnr_db": "ir PSNR, dB",
    "ir_psnr_gain_db": "gain",
    "vis_ssim": "vis SSIM",
    "ir_ssim": "ir SSIM",
}
FUSION_COLUMNS = {
    "en": "EN",
    "sd": "SD",
    "mi": "MI",
    "cc": "CC",
    "scd": "SCD",
    "vif": "VIF",
    "qabf": "Qabf",
    "ssim": "SSIM",
    "noise": "noise",
    "chroma": "chroma",
    "max_corr_intensity": "corr max",
    "max_corr_gradient": "corr max grad",
    "max_ssim_intensity": "SSIM max",
    "max_ssim_gradient": "SSIM max grad",
}


@dataclass(frozen=True)
class Report:
    """Scores of all pairs and what made them; the tables, the JSON and the one line are views of it."""

    scores: tuple[PairScores, ...]
    settings: EvaluationSettings
    weights: str | None = None  # the model's name and version; None: no model was run
    version: str | None = None
    steps: int | None = None  # as they were run, the model's defaults filled in
    sampler: str | None = None

    def __post_init__(self) -> None:
        if not self.scores:
            raise ConfigError("there is nothing to report: no pair was scored")

    @property
    def reference(self) -> str:
        """What the fusion scores compare with."""
        return "clean references" if any(score.restoration for score in self.scores) else "inputs"

    def restoration_means(self, method: str, source: str | None = None) -> dict[str, Figure]:
        """Mean restoration figures of one method, of one data set or of all pairs."""
        chosen = [
            score for score in self.scores if method in score.restoration and (source is None or score.source == source)
        ]
        values: dict[str, list[float]] = {name: [] for name in RESTORATION_COLUMNS}
        for score in chosen:
            result, degraded = score.restoration[method], score.restoration[DEGRADED]
            for name, value in asdict(result).items():
                values[name].append(value)
            # an input that equals its reference has no gain to speak of
            for modality in ("vis", "ir"):
                before = getattr(degraded, f"{modality}_psnr_db")
                gain = getattr(result, f"{modality}_psnr_db") - before if math.isfinite(before) else math.nan
                if not math.isnan(gain):
                    values[f"{modality}_psnr_gain_db"].append(gain)
        return {name: mean_of(numbers) for name, numbers in values.items()}

    def fusion_means(self, method: str, source: str | None = None) -> dict[str, Figure]:
        """Mean fusion scores of one method, of one data set or of all pairs."""
        chosen = [
            asdict(score.fusion[method])
            for score in self.scores
            if method in score.fusion and (source is None or score.source == source)
        ]
        return {name: mean_of([scores[name] for scores in chosen]) for name in FUSION_COLUMNS}

    @property
    def methods(self) -> list[str]:
        """Methods with fused images, the model first."""
        return list(self.scores[0].fusion)

    @property
    def restorers(self) -> list[str]:
        """Methods with restored images, the degraded input first; none without references."""
        return list(self.scores[0].restoration)

    @property
    def sources(self) -> list[str]:
        """Data sets in alphabetical order."""
        return sorted({score.source for score in self.scores})

    def summary(self) -> dict[str, Any]:
        """The model's means over all pairs beside what was run; keys as in docs/evaluation.md."""
        restored = self.restoration_means(MODEL)
        degraded = self.restoration_means(DEGRADED)
        return {
            "num_pairs": len(self.scores),
            "protocol_version": self.settings.version,
            "seed": self.settings.seed,
            "strength": self.settings.strength,
            "vis_kinds": self.settings.vis_kinds,
            "ir_kinds": self.settings.ir_kinds,
            "reference": self.reference,
            "weights": self.weights,
            "weights_version": self.version,
            "steps": self.steps,
            "sampler": self.sampler,
            "coupled": self.settings.coupled,
            **({"exposure": self.settings.exposure} if self.settings.version > 1 else {}),
            **restored,
            "vis_psnr_degraded_db": degraded["vis_psnr_db"],
            "ir_psnr_degraded_db": degraded["ir_psnr_db"],
            "vis_ssim_degraded": degraded["vis_ssim"],
            "ir_ssim_degraded": degraded["ir_ssim"],
            **self.fusion_means(MODEL),
        }

    def as_json(self) -> dict[str, Any]:
        """Everything: the summary, the means by method and by data set, and the figures of each pair."""

        def means(source: str | None) -> dict[str, Any]:
            return {
                "restoration": {name: self.restoration_means(name, source) for name in self.restorers},
                "fusion": {name: self.fusion_means(name, source) for name in self.methods},
            }

        return {
            "summary": self.summary(),
            "methods": means(None),
            "sources": {source: means(source) for source in self.sources},
            "pairs": [finite(asdict(score)) for score in self.scores],
        }

    def line(self) -> str:
        """One readable line."""
        strength = f"{self.settings.strength}{self._kinds()}{self._rendition()}"
        what = f"{len(self.scores)} pairs, {strength}, seed {self.settings.seed}"
        if self.weights is None:
            return f"{what}: no model was run"
        summary = self.summary()
        coupling = "" if self.settings.coupled else ", coupling off"
        parts = []
        for modality in ("vis", "ir") if self.restorers else ():
            gain = shown(summary[f"{modality}_psnr_gain_db"], 2, sign=True)
            similarity = shown(summary[f"{modality}_ssim"])
            parts.append(f"{modality} {shown(summary[f'{modality}_psnr_db'], 2)} dB ({gain}), SSIM {similarity}")
        names = ("en", "sd", "mi", "qabf", "ssim", "noise")
        parts.append("fused " + ", ".join(f"{FUSION_COLUMNS[name]} {shown(summary[name], 2)}" for name in names))
        return f"{what}, {self.weights} {self.version}, {self.sampler} {self.steps} steps{coupling}: {'; '.join(parts)}"

    def caption(self) -> str:
        """What the tables and plots show."""
        strength = f"{self.settings.strength}{self._kinds()}"
        what = f"protocol {self.settings.version}, strength {strength}{self._rendition()}, seed {self.settings.seed}"
        if self.weights is not None:
            coupling = "on" if self.settings.coupled else "off"
            what += (
                f"; {MODEL} = {self.weights} {self.version}, {self.sampler}, {self.steps} steps, coupling {coupling}"
            )
        return f"{len(self.scores)} pairs; {what}; sources of the fusion scores: {self.reference}."

    def _kinds(self) -> str:
        chosen = (("vis", self.settings.vis_kinds), ("ir", self.settings.ir_kinds))
        return "".join(f" {name}={'+'.join(kinds) or 'clean'}" for name, kinds in chosen if kinds is not None)

    def _rendition(self) -> str:
        return "" if self.settings.exposure == "as_shot" else f", {self.settings.exposure}"

    def markdown(self) -> str:
        """The tables: overall, then by data set if there are several."""
        blocks = [self.caption(), *self._tables(None)]
        if len(self.sources) > 1:
            for source in self.sources:
                count = sum(score.source == source for score in self.scores)
                blocks += [f"### {source or 'unnamed'} ({count})", *self._tables(source)]
        return "\n\n".join(blocks) + "\n"

    def csv(self) -> str:
        """One line a pair and method; a figure that a method does not have stays empty."""
        restoration = [field.name for field in fields(RestorationResult)]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        heads = [f"restored_{name}" for name in restoration] + list(FUSION_COLUMNS)
        writer.writerow(["name", "source", "method", "vis_recipe", "ir_recipe", *heads])
        for score in self.scores:
            for method in dict.fromkeys([*score.restoration, *score.fusion]):
                restored, fused = score.restoration.get(method), score.fusion.get(method)
                writer.writerow(
                    [score.name, score.source, method, score.vis_recipe, score.ir_recipe]
                    + [f"{getattr(restored, name):.5f}" if restored else "" for name in restoration]
                    + [f"{getattr(fused, name):.5f}" if fused else "" for name in FUSION_COLUMNS]
                )
        return buffer.getvalue()

    def _tables(self, source: str | None) -> list[str]:
        tables = []
        if self.restorers:
            rows = {name: self.restoration_means(name, source) for name in self.restorers}
            rows[DEGRADED] |= {"vis_psnr_gain_db": None, "ir_psnr_gain_db": None}
            tables.append(table("restoration", RESTORATION_COLUMNS, rows))
        if self.methods:
            rows = {name: self.fusion_means(name, source) for name in self.methods}
            tables.append(table("fusion", FUSION_COLUMNS, rows))
        return tables


def table(title: str, columns: Mapping[str, str], rows: Mapping[str, Mapping[str, Figure]]) -> str:
    """Rows of figures under their columns as Markdown, "-" for what is not defined."""
    lines = [f"| {title} | {' | '.join(columns.values())} |", "| --- |" + " ---: |" * len(columns)]
    for method, figures in rows.items():
        cells = [
            shown(figures[name], 2 if name.endswith("_db") else 3, sign=name.endswith("gain_db")) for name in columns
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: Figure, digits: int = 3, *, sign: bool = False) -> str:
    """A figure with so many decimals, "-" if it is not defined."""
    if value is None:
        return "-"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def mean_of(values: Sequence[float]) -> Figure:
    """The mean, None if there is none that is finite."""
    mean = fmean(values) if values else math.nan
    return mean if math.isfinite(mean) else None


def finite(value: Any) -> Any:
    """The same structure with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
