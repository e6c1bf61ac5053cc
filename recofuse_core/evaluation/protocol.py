"""The seeded evaluation protocol: degrade clean pairs, restore and fuse them, score everything. See docs/evaluation.md.

Version 2 asks for a rendition, and compares with clean frames in the same one; with "as_shot" it has the figures of
version 1. Beside pairs it scores one kind after the other (kinds.py), pictures without a partner (pictures.py) and
sequences (sequences.py).

Every random choice of a pair follows from the protocol seed and the pair's name alone, so neither the order of the
files nor the presence of other pairs changes its degradations. All images are rounded to 8 bits before they are scored
or handed to a method, as files would be; none is resized.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor

from recofuse_core.data import Pair, PairFiles, find_images, read_pair, read_vis, to_float, to_uint8
from recofuse_core.degradations.recipes import Step, degrade_ir, degrade_vis
from recofuse_core.errors import ConfigError, DatasetError, ShapeError
from recofuse_core.evaluation.baselines import BASELINES, enhance_ir, enhance_vis
from recofuse_core.evaluation.quality import FusionScores, fusion_scores, psnr, ssim
from recofuse_core.evaluation.renditions import rendition_of
from recofuse_core.picture import Exposure, FusionOutput
from recofuse_core.sampler import SamplerName
from recofuse_images.names import listed

PROTOCOL_VERSIONS = (1, 2)
MODEL = "recofuse"  # the model's row in every table
DEGRADED = "degraded"
ENHANCED = "opencv"
RESERVED = frozenset({MODEL, DEGRADED, ENHANCED, *(f"{ENHANCED}-{name}" for name in BASELINES)})

EvaluationStrength = Literal["light", "medium", "strong", "clean", "given"]


class Fuser(Protocol):
    """What the protocol asks of a model; `ReCoFuse` is one."""

    def fuse(
        self,
        vis: Tensor,
        ir: Tensor,
        *,
        steps: int | None,
        sampler: SamplerName | None,
        seeds: int,
        coupled: bool,
        exposure: Exposure,
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
    exposure: Exposure = "as_shot"  # the rendition that is asked for, and that the references are brought into
    version: int = PROTOCOL_VERSIONS[-1]

    def __post_init__(self) -> None:
        if self.version not in PROTOCOL_VERSIONS:
            raise ConfigError(f"there is no version {self.version} of the protocol; there are 1 and 2")
        if self.version == 1 and self.exposure != "as_shot":
            raise ConfigError("version 1 of the protocol knows no renditions: it takes the default exposure alone")


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
    """The images behind the scores, uint8: vis (3, H, W), ir (1, H, W), fused (3, H, W) by method.

    vis_clean: in the rendition that was asked for.
    """

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
    vis_reference = pair.vis
    if settings.exposure != "as_shot":
        clean = to_float(pair.vis)
        vis_reference = to_uint8(rendition_of(clean, settings.exposure)(clean))
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
            exposure=settings.exposure,
        )
        restored[MODEL] = (image_of(result.vis, "vis"), image_of(result.ir, "ir"))
        fused[MODEL] = image_of(result.fused, "fused")
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
                psnr(images[0], vis_reference),
                psnr(images[1], pair.ir),
                ssim(images[0], vis_reference),
                ssim(images[1], pair.ir),
            )
            for name, images in restored.items()
        }
        if has_reference
        else {},
        fusion={name: fusion_scores(image, vis_reference, pair.ir) for name, image in fused.items()},
    )
    vis_restored, ir_restored = restored.get(MODEL, (None, None))
    return scores, PairImages(vis_reference, pair.ir, vis, ir, vis_restored, ir_restored, fused)


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


def image_of(batch: Tensor | None, part: str) -> Tensor:
    """The one image of a part of a result, uint8 on the CPU. Raises ShapeError if there is none."""
    if batch is None:
        raise ShapeError(f"the model returned no {part} image")
    return to_uint8(batch[0]).cpu()


def _generator(seed: int, name: str, role: str) -> Generator:
    return Generator().manual_seed(item_seed(seed, name, role))


def _text(recipe: Iterable[Step]) -> str:
    return " + ".join(str(step) for step in recipe)
