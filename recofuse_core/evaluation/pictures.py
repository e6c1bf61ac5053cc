"""Real degraded pictures without a registered partner: scored by themselves, and against a reference if any.

The model wants an infrared frame all the same. It gets one of the same name from a folder, or one of another scene:
chosen from the folder by the picture's name or, without a folder, of a generated street. What is restored must not
depend on it, so what a bad partner costs is part of the score.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recofuse_core.data import find_images, read_ir, read_vis, to_float, to_uint8
from recofuse_core.errors import ConfigError, DatasetError
from recofuse_core.evaluation.blind import brisque, piqe
from recofuse_core.evaluation.protocol import EvaluationSettings, Fuser, image_of, item_seed
from recofuse_core.evaluation.quality import grey, noise_estimate, psnr, ssim
from recofuse_core.evaluation.report import Figure, finite, mean_of, shown, table
from recofuse_core.picture import MIN_SIDE
from recofuse_core.scenes.scene import make_scene

EXPOSED = (0.28, 0.48)  # means of grey that a lit picture should have
COLUMNS = {
    "mean": "mean",
    "brisque": "BRISQUE",
    "piqe": "PIQE",
    "noise": "noise",
    "psnr_db": "PSNR, dB",
    "matched_psnr_db": "matched, dB",
    "ssim": "SSIM",
}
_TAKE = re.compile(r"__\w+$")  # SCENE__K: one of several takes of a scene


@dataclass(frozen=True)
class PictureFigures:
    """One picture: mean grey in [0, 1], scores without a reference (less is better), and against the reference if any.

    matched_psnr_db: after a gain has brought its mean to the reference's.
    """

    mean: float
    brisque: float | None
    piqe: float
    noise: float
    psnr_db: float | None = None
    matched_psnr_db: float | None = None
    ssim: float | None = None


@dataclass(frozen=True)
class PictureScores:
    """A picture as it came, and restored (the same if no model was run)."""

    name: str
    given: PictureFigures
    restored: PictureFigures


def evaluate_pictures(
    model: Fuser | None,
    folder: Path,
    settings: EvaluationSettings,
    *,
    references: Path | None = None,
    infrared: Path | None = None,
    limit: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[PictureScores, Tensor]]:
    """Score the pictures of a folder in the order of their names; yields the restored ones, uint8 (3, H, W), too.

    references: files of the same stem, without what follows "__" if there is none; they are taken as they are, in
    the rendition that is asked for. Raises DatasetError for a folder without images, and for one of references that
    has none of them.
    """
    if settings.version < 2:
        raise ConfigError("version 1 of the protocol scores pairs alone")
    found = dict(list(find_images(folder).items())[:limit])
    if not found:
        raise DatasetError(f"{folder} has no images")
    known = {} if references is None else find_images(references)
    partners = {name: known.get(name, known.get(_TAKE.sub("", name))) for name in found}
    if references is not None and not any(partners.values()):
        raise DatasetError(f"{references} has no reference for any image of {folder}")
    thermal = {} if infrared is None else find_images(infrared)
    if infrared is not None and not thermal:
        raise DatasetError(f"{infrared} has no images")

    def run() -> Iterator[tuple[PictureScores, Tensor]]:
        for name, path in found.items():
            given = read_vis(path)
            reference = partners[name]
            clean = None if reference is None else read_vis(reference)
            if clean is not None and clean.shape != given.shape:
                raise DatasetError(f"{path} and {reference} differ in size")
            if min(given.shape[1:]) < MIN_SIDE:
                raise DatasetError(f"{path} is smaller than {MIN_SIDE} px")
            restored = given
            if model is not None:
                ir = partner_of(name, thermal, (given.shape[1], given.shape[2]), settings.seed)
                result = model.fuse(
                    to_float(given)[None].to(device),
                    ir[None].to(device),
                    steps=settings.steps,
                    sampler=settings.sampler,
                    seeds=item_seed(settings.seed, name, "model"),
                    coupled=settings.coupled,
                    exposure=settings.exposure,
                )
                restored = image_of(result.vis, "vis")
            yield PictureScores(name, _figures(given, clean), _figures(restored, clean)), restored

    return run()


def partner_of(name: str, thermal: Mapping[str, Path], size: tuple[int, int], seed: int) -> Tensor:
    """The infrared frame of a picture, (1, H, W) in [0, 1], of its name or of another scene, at the picture's size."""
    choice = item_seed(seed, name, "ir")
    if not thermal:
        return make_scene(choice, *size).ir
    path = thermal[name] if name in thermal else list(thermal.values())[choice % len(thermal)]
    image = to_float(read_ir(path))
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def _figures(image: Tensor, clean: Tensor | None) -> PictureFigures:
    mean = float(grey(image).mean()) / 255
    own = PictureFigures(mean, brisque(image), piqe(image), noise_estimate(image))
    if clean is None:
        return own
    gain = float(grey(clean).mean()) / max(255 * mean, 1e-3)
    matched = to_uint8((to_float(image) * gain).clamp(0, 1))
    scores = {"psnr_db": psnr(image, clean), "matched_psnr_db": psnr(matched, clean), "ssim": ssim(image, clean)}
    return PictureFigures(**asdict(own) | scores)


@dataclass(frozen=True)
class PicturesReport:
    """Scores of all pictures and what made them."""

    scores: tuple[PictureScores, ...]
    settings: EvaluationSettings
    weights: str | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        if not self.scores:
            raise ConfigError("there is nothing to report: no picture was scored")

    def means(self, which: str) -> dict[str, Figure]:
        """Mean figures of the pictures "given" or "restored"."""
        figures = [asdict(getattr(score, which)) for score in self.scores]
        return {
            name: mean_of([figure[name] for figure in figures if figure[name] is not None])
            for name in (field.name for field in fields(PictureFigures))
        }

    def share_better(self, name: str) -> Figure:
        """Of how many pictures a score without a reference became better, a share; None if there is no such score."""
        both = [(getattr(score.given, name), getattr(score.restored, name)) for score in self.scores]
        return mean_of([float(after < before) for before, after in both if None not in (before, after)])

    def summary(self) -> dict[str, Any]:
        """Means before and after, and how many pictures became better; keys as in docs/evaluation.md."""
        lit = [EXPOSED[0] <= score.restored.mean <= EXPOSED[1] for score in self.scores]
        return {
            "num_pictures": len(self.scores),
            "num_references": sum(score.given.psnr_db is not None for score in self.scores),
            "protocol_version": self.settings.version,
            "seed": self.settings.seed,
            "exposure": self.settings.exposure,
            "weights": self.weights,
            "weights_version": self.version,
            **self.means("restored"),
            **{f"{name}_given": value for name, value in self.means("given").items()},
            "brisque_better": self.share_better("brisque"),
            "piqe_better": self.share_better("piqe"),
            "well_exposed": sum(lit) / len(lit),
        }

    def as_json(self) -> dict[str, Any]:
        """The summary and each picture's figures."""
        return {"summary": self.summary(), "pictures": [finite(asdict(score)) for score in self.scores]}

    def markdown(self) -> str:
        """One table."""
        rows = {"given": self.means("given")} | ({} if self.weights is None else {"recofuse": self.means("restored")})
        return f"{self._what()}.\n\n{table('pictures', COLUMNS, rows)}\n"

    def line(self) -> str:
        """One readable line."""
        if self.weights is None:
            return f"{self._what()}: no model was run"
        before, after = self.means("given"), self.means("restored")
        parts = [f"mean {shown(before['mean'], 2)} to {shown(after['mean'], 2)}"]
        for name, title in (("brisque", "BRISQUE"), ("piqe", "PIQE")):
            better = self.share_better(name)
            said = "not measured" if better is None else f"{shown(after[name], 1)}, better on {100 * better:.0f} %"
            parts.append(f"{title} {shown(before[name], 1)} to {said}" if better is not None else f"{title} {said}")
        if after["psnr_db"] is not None:
            matched = shown(after["matched_psnr_db"], 2)
            parts.append(f"PSNR {shown(before['psnr_db'], 2)} to {shown(after['psnr_db'], 2)} dB ({matched} matched)")
        return f"{self._what()}: {'; '.join(parts)}"

    def _what(self) -> str:
        with_model = "" if self.weights is None else f", {self.weights} {self.version}"
        settings = f"protocol {self.settings.version}, {self.settings.exposure}, seed {self.settings.seed}"
        return f"{len(self.scores)} pictures, {settings}{with_model}"
