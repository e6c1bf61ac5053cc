"""The seeded evaluation protocol: degrade clean pairs, restore and fuse them, score everything. See docs/evaluation.md.

Every random choice of a pair follows from the protocol seed and the pair's name alone, so neither the order of the
files nor the presence of other pairs changes its degradations. All images are rounded to 8 bits before they are scored
or handed to a method, as files would be; none is resized.
"""

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from recofuse_core.baselines import BASELINES, enhance_ir, enhance_vis
from recofuse_core.data import Pair, PairFiles, find_images, read_pair, read_vis, to_float, to_uint8
from recofuse_core.degradations.recipes import Step, degrade_ir, degrade_vis
from recofuse_core.errors import ConfigError, DatasetError, ShapeError
from recofuse_core.model import FusionOutput
from recofuse_core.quality import FusionScores, fusion_scores, psnr, ssim
from recofuse_core.sampler import SamplerName
from recofuse_images.names import listed

PROTOCOL_VERSION = 1
MODEL = "recofuse"  # the model's row in every table
DEGRADED = "degraded"
ENHANCED = "opencv"
RESERVED = frozenset({MODEL, DEGRADED, ENHANCED, *(f"{ENHANCED}-{name}" for name in BASELINES)})

EvaluationStrength = Literal["light", "medium", "strong", "clean", "given"]


class Fuser(Protocol):
    """What the protocol asks of a model; `ReCoFuse` is one."""

    def fuse(
        self, vis: Tensor, ir: Tensor, *, steps: int | None, sampler: SamplerName | None, seeds: int, coupled: bool
    ) -> FusionOutput:
        """Fuse vis (1, 3, H, W) and ir (1, 1, H, W) in [0, 1]; the output holds all three images."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What distinguishes one run of the protocol from another.

    strength: of the degradations put in; "clean": the inputs are the files as they are; "given": the files are degraded
    already, and compared with their clean partners where a folder has both (LQ/HQ), otherwise with themselves.
    """

    strength: EvaluationStrength = "medium"
    seed: int = 0
    steps: int | None = None  # None: the model's own
    sampler: SamplerName | None = None
    coupled: bool = True  # False: each branch restores alone
    with_baselines: bool = False
    vis_kinds: tuple[str, ...] | None = None  # put in exactly these degradations; None: a random recipe
    ir_kinds: tuple[str, ...] | None = None


@dataclass(frozen=True)
class RestorationResult:
    """One method's restored pair against the clean one, all channels; PSNR of equal images is infinite."""

    vis_psnr_db: float
    ir_psnr_db: float
    vis_ssim: float
    ir_ssim: float


@dataclass(frozen=True)
class PairScores:
    """All figures of one pair, by method. restoration is empty if there is no clean reference."""

    name: str
    source: str
    vis_recipe: str
    ir_recipe: str
    restoration: dict[str, RestorationResult]
    fusion: dict[str, FusionScores]


@dataclass(frozen=True)
class PairImages:
    """The images behind the scores, uint8: vis (3, H, W), ir (1, H, W), fused (3, H, W) by method."""

    vis_clean: Tensor
    ir_clean: Tensor
    vis_degraded: Tensor
    ir_degraded: Tensor
    vis_restored: Tensor | None
    ir_restored: Tensor | None
    fused: dict[str, Tensor]

    def by_part(self) -> dict[str, Tensor]:
        """The images there are, by a name fit for a folder: vis_clean, ..., fused_recofuse, fused_opencv-average."""
        parts = {
            "vis_clean": self.vis_clean,
            "vis_degraded": self.vis_degraded,
            "vis_restored": self.vis_restored,
            "ir_clean": self.ir_clean,
            "ir_degraded": self.ir_degraded,
            "ir_restored": self.ir_restored,
        }
        fused = {f"fused_{method}": image for method, image in self.fused.items()}
        return {name: image for name, image in parts.items() if image is not None} | fused


# --- the protocol -----------------------------------------------------------------------------------------------------


def item_seed(seed: int, name: str, role: str) -> int:
    """The seed of one random stream of one pair, in [0, 2**32): the first four bytes of SHA-256 of "seed/name/role".

    role: "vis" and "ir" for the degradations, "model" for the sampler's noise.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{role}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def degrade_pair(
    pair: Pair,
    strength: EvaluationStrength,
    seed: int,
    vis_kinds: Sequence[str] | None = None,
    ir_kinds: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor, str, str]:
    """The inputs of the methods, vis (3, H, W) and ir (1, H, W) uint8, and the recipes that made them."""
    name = pair.files.name
    if strength == "clean":
        return pair.vis, pair.ir, "", ""
    if strength == "given":
        vis = pair.vis if pair.vis_degraded is None else pair.vis_degraded
        return vis, pair.ir if pair.ir_degraded is None else pair.ir_degraded, "", ""
    if strength not in ("light", "medium", "strong"):
        raise ConfigError(f"strength must be light, medium, strong, clean or given, not {strength!r}")
    vis_result = degrade_vis(to_float(pair.vis), _generator(seed, name, "vis"), strength, vis_kinds)
    ir_result = degrade_ir(to_float(pair.ir), _generator(seed, name, "ir"), strength, ir_kinds)
    return to_uint8(vis_result.image), to_uint8(ir_result.image), _text(vis_result.recipe), _text(ir_result.recipe)


def evaluate(
    model: Fuser | None,
    pairs: Sequence[PairFiles],
    settings: EvaluationSettings,
    *,
    others: Mapping[str, Path] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[PairScores, PairImages]]:
    """Score the pairs one after the other; the model must be on `device` already. None: score the other methods alone.

    others: folders of fused images by method name, files named by the pair or by one of its files. Raises DatasetError
    if one of them lacks an image (before the first pair is worked on) or has one of another size, ConfigError if a name
    is reserved.
    """
    outputs = {name: _outputs_of(name, folder, pairs) for name, folder in (others or {}).items()}

    def run() -> Iterator[tuple[PairScores, PairImages]]:
        for files in pairs:
            loaded = {name: found[files.name] for name, found in outputs.items()}
            yield _evaluate_pair(model, read_pair(files), settings, loaded, device)

    return run()


def _evaluate_pair(
    model: Fuser | None,
    pair: Pair,
    settings: EvaluationSettings,
    others: Mapping[str, Path],
    device: torch.device | str,
) -> tuple[PairScores, PairImages]:
    vis, ir, vis_recipe, ir_recipe = degrade_pair(
        pair, settings.strength, settings.seed, settings.vis_kinds, settings.ir_kinds
    )
    restored: dict[str, tuple[Tensor, Tensor]] = {DEGRADED: (vis, ir)}
    fused: dict[str, Tensor] = {}
    if model is not None:
        result = model.fuse(
            to_float(vis)[None].to(device),
            to_float(ir)[None].to(device),
            steps=settings.steps,
            sampler=settings.sampler,
            seeds=item_seed(settings.seed, pair.files.name, "model"),
            coupled=settings.coupled,
        )
        restored[MODEL] = (_image(result.vis, "vis"), _image(result.ir, "ir"))
        fused[MODEL] = _image(result.fused, "fused")
    if settings.with_baselines:
        restored[ENHANCED] = (enhance_vis(vis), enhance_ir(ir))
        for name, fuse in BASELINES.items():
            fused[f"{ENHANCED}-{name}"] = fuse(*restored[ENHANCED])
    for name, path in others.items():
        fused[name] = _read_output(name, path, pair)

    has_reference = settings.strength != "given" or pair.vis_degraded is not None or pair.ir_degraded is not None
    scores = PairScores(
        name=pair.files.name,
        source=pair.files.source,
        vis_recipe=vis_recipe,
        ir_recipe=ir_recipe,
        restoration={
            name: RestorationResult(
                psnr(images[0], pair.vis), psnr(images[1], pair.ir), ssim(images[0], pair.vis), ssim(images[1], pair.ir)
            )
            for name, images in restored.items()
        }
        if has_reference
        else {},
        fusion={name: fusion_scores(image, pair.vis, pair.ir) for name, image in fused.items()},
    )
    vis_restored, ir_restored = restored.get(MODEL, (None, None))
    return scores, PairImages(pair.vis, pair.ir, vis, ir, vis_restored, ir_restored, fused)


def _outputs_of(name: str, folder: Path, pairs: Sequence[PairFiles]) -> dict[str, Path]:
    if name in RESERVED:
        raise ConfigError(f"a method cannot be called {name!r}: the table uses that name itself")
    found = find_images(folder)
    outputs = {pair.name: found[stem] for pair in pairs for stem in reversed(pair.stems) if stem in found}
    missing = [pair.stems[0] for pair in pairs if pair.name not in outputs]
    if missing:
        raise DatasetError(f"{name}: {folder} has no image for {listed(missing)}")
    return outputs


def _read_output(name: str, path: Path, pair: Pair) -> Tensor:
    image = read_vis(path)
    if image.shape != pair.vis.shape:
        raise DatasetError(
            f"{name}: {path} is {image.shape[2]}x{image.shape[1]}, the pair {pair.vis.shape[2]}x{pair.vis.shape[1]}"
        )
    return image


def _image(batch: Tensor | None, part: str) -> Tensor:
    if batch is None:
        raise ShapeError(f"the model returned no {part} image")
    return to_uint8(batch[0]).cpu()


def _generator(seed: int, name: str, role: str) -> Generator:
    return Generator().manual_seed(item_seed(seed, name, role))


def _text(recipe: Iterable[Step]) -> str:
    return " + ".join(str(step) for step in recipe)


# --- the report -------------------------------------------------------------------------------------------------------

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
        return {name: _mean(numbers) for name, numbers in values.items()}

    def fusion_means(self, method: str, source: str | None = None) -> dict[str, Figure]:
        """Mean fusion scores of one method, of one data set or of all pairs."""
        chosen = [
            asdict(score.fusion[method])
            for score in self.scores
            if method in score.fusion and (source is None or score.source == source)
        ]
        return {name: _mean([scores[name] for scores in chosen]) for name in FUSION_COLUMNS}

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
            "protocol_version": PROTOCOL_VERSION,
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
            "pairs": [_finite(asdict(score)) for score in self.scores],
        }

    def line(self) -> str:
        """One readable line."""
        what = f"{len(self.scores)} pairs, {self.settings.strength}{self._kinds()}, seed {self.settings.seed}"
        if self.weights is None:
            return f"{what}: no model was run"
        summary = self.summary()
        coupling = "" if self.settings.coupled else ", coupling off"
        parts = []
        for modality in ("vis", "ir") if self.restorers else ():
            gain = _format(summary[f"{modality}_psnr_gain_db"], 2, sign=True)
            similarity = _format(summary[f"{modality}_ssim"])
            parts.append(f"{modality} {_format(summary[f'{modality}_psnr_db'], 2)} dB ({gain}), SSIM {similarity}")
        names = ("en", "sd", "mi", "qabf", "ssim", "noise")
        parts.append("fused " + ", ".join(f"{FUSION_COLUMNS[name]} {_format(summary[name], 2)}" for name in names))
        return f"{what}, {self.weights} {self.version}, {self.sampler} {self.steps} steps{coupling}: {'; '.join(parts)}"

    def caption(self) -> str:
        """What the tables and plots show."""
        strength = f"{self.settings.strength}{self._kinds()}"
        what = f"protocol {PROTOCOL_VERSION}, strength {strength}, seed {self.settings.seed}"
        if self.weights is not None:
            coupling = "on" if self.settings.coupled else "off"
            what += (
                f"; {MODEL} = {self.weights} {self.version}, {self.sampler}, {self.steps} steps, coupling {coupling}"
            )
        return f"{len(self.scores)} pairs; {what}; sources of the fusion scores: {self.reference}."

    def _kinds(self) -> str:
        chosen = (("vis", self.settings.vis_kinds), ("ir", self.settings.ir_kinds))
        return "".join(f" {name}={'+'.join(kinds) or 'clean'}" for name, kinds in chosen if kinds is not None)

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
            tables.append(_table("restoration", RESTORATION_COLUMNS, rows))
        if self.methods:
            rows = {name: self.fusion_means(name, source) for name in self.methods}
            tables.append(_table("fusion", FUSION_COLUMNS, rows))
        return tables


def _table(title: str, columns: Mapping[str, str], rows: Mapping[str, Mapping[str, Figure]]) -> str:
    lines = [f"| {title} | {' | '.join(columns.values())} |", "| --- |" + " ---: |" * len(columns)]
    for method, figures in rows.items():
        cells = [
            _format(figures[name], 2 if name.endswith("_db") else 3, sign=name.endswith("gain_db")) for name in columns
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _format(value: Figure, digits: int = 3, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def _mean(values: Sequence[float]) -> Figure:
    mean = fmean(values) if values else math.nan
    return mean if math.isfinite(mean) else None


def _finite(value: Any) -> Any:
    """The same structure with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --- the picture sheet ------------------------------------------------------------------------------------------------

SHEET_WIDTH = 240  # px of one picture
_LABEL_HEIGHT, _GAP = 18, 4


def sheet_row(name: str, images: PairImages) -> Tensor:
    """One pair as a row of labelled small pictures: uint8 (3, H', W')."""
    cells: list[NDArray[np.uint8]] = []
    for label, image in images.by_part().items():
        height = max(1, round(image.shape[1] * SHEET_WIDTH / image.shape[2]))
        pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        small = cv2.resize(pixels, (SHEET_WIDTH, height), interpolation=cv2.INTER_AREA)
        cell = np.full((height + _LABEL_HEIGHT + _GAP, SHEET_WIDTH + _GAP, 3), 24, dtype=np.uint8)
        cell[_LABEL_HEIGHT : _LABEL_HEIGHT + height, :SHEET_WIDTH] = small
        text = label if cells else f"{name}: {label}"
        cv2.putText(cell, text[:38], (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (230, 230, 230), 1, cv2.LINE_AA)
        cells.append(cell)
    return torch.from_numpy(np.concatenate(cells, axis=1)).permute(2, 0, 1).contiguous()


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """Rows of `sheet_row` one below the other: uint8 (3, H', W'). Raises ShapeError if there is none."""
    if not rows:
        raise ShapeError("a sheet needs at least one row")
    return torch.cat(list(rows), dim=1)
