"""The protocol for one kind of degradation after the other: what weights can do, and what they cannot yet.

Each kind is put alone into its modality of every pair while the other modality stays clean, from the seeds of the
protocol. So a row is the run that `--vis-kinds KIND --ir-kinds ""` makes, or the other way round.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recofuse_core.degradations.recipes import IrKind, VisKind
from recofuse_core.errors import ConfigError
from recofuse_core.evaluation.protocol import EvaluationSettings
from recofuse_core.evaluation.report import Report, table

COLUMNS = {
    "psnr_degraded_db": "degraded, dB",
    "psnr_db": "restored, dB",
    "psnr_gain_db": "gain",
    "ssim_degraded": "degraded SSIM",
    "ssim": "restored SSIM",
    "qabf": "fused Qabf",
    "max_ssim_intensity": "fused SSIM max",
    "noise": "fused noise",
}


def each_kind(settings: EvaluationSettings) -> Iterator[tuple[str, EvaluationSettings]]:
    """The settings of every kind alone, named such as "vis fog": of those that the settings name, or of all.

    Raises ConfigError for settings that put nothing in, and for version 1, which did not know this.
    """
    if settings.strength not in ("light", "medium", "strong"):
        raise ConfigError(f"kinds are put in one by one at strength light, medium or strong, not {settings.strength}")
    if settings.version < 2:
        raise ConfigError("version 1 of the protocol does not put kinds in one by one")
    is_named = settings.vis_kinds is not None or settings.ir_kinds is not None
    for kind in (settings.vis_kinds or ()) if is_named else VisKind:
        yield f"vis {kind}", replace(settings, vis_kinds=(str(kind),), ir_kinds=())
    for kind in (settings.ir_kinds or ()) if is_named else IrKind:
        yield f"ir {kind}", replace(settings, vis_kinds=(), ir_kinds=(str(kind),))


@dataclass(frozen=True)
class KindsReport:
    """The reports of all kinds, by the names of `each_kind`."""

    reports: Mapping[str, Report]

    def __post_init__(self) -> None:
        if not self.reports:
            raise ConfigError("there is nothing to report: no kind was named")

    def rows(self) -> dict[str, dict[str, float | None]]:
        """What each kind did to its modality, what became of it, and of the fused image."""
        rows = {}
        for name, report in self.reports.items():
            modality, summary = name.split()[0], report.summary()
            rows[name] = {
                "psnr_degraded_db": summary[f"{modality}_psnr_degraded_db"],
                "psnr_db": summary[f"{modality}_psnr_db"],
                "psnr_gain_db": summary[f"{modality}_psnr_gain_db"],
                "ssim_degraded": summary[f"{modality}_ssim_degraded"],
                "ssim": summary[f"{modality}_ssim"],
                **{score: summary[score] for score in ("qabf", "max_ssim_intensity", "noise")},
            }
        return rows

    def as_json(self) -> dict[str, Any]:
        """The rows, and each kind's whole report."""
        first = next(iter(self.reports.values())).summary()
        said = ("num_pairs", "protocol_version", "seed", "strength", "weights", "weights_version", "steps", "sampler")
        return {
            "summary": {name: first[name] for name in (*said, "exposure")} | {"kinds": self.rows()},
            "kinds": {name: report.as_json() for name, report in self.reports.items()},
        }

    def markdown(self) -> str:
        """One table."""
        report = next(iter(self.reports.values()))
        settings = report.settings
        caption = replace(report, settings=replace(settings, vis_kinds=None, ir_kinds=None)).caption()
        return f"{caption}\n\n{table('one kind alone', COLUMNS, self.rows())}\n"

    def line(self) -> str:
        """One readable line: the gain in dB of every kind."""
        report = next(iter(self.reports.values()))
        settings = report.settings
        what = f"{len(report.scores)} pairs, {settings.strength}, {settings.exposure}, seed {settings.seed}"
        if report.weights is None:
            return f"{what}: no model was run"
        gains = {name: row["psnr_gain_db"] for name, row in self.rows().items()}
        said = ", ".join(f"{name} {'-' if gain is None else f'{gain:+.1f}'}" for name, gain in gains.items())
        return f"{what}, {report.weights} {report.version}, gain in dB of each kind alone: {said}"
