"""Flicker: how much the pictures of consecutive frames change where the scene stands still.

Where that is, the clean sequence says. Its own change there (its noise, its codec) is what a result is held against: a
result that changes as much is as calm as the scene was filmed. "Pixels" is the mean change of a pixel, which noise
decides; "levels" that of 32x32 px means, in which noise is averaged away, so that it tells of tones and lighting that
wander from frame to frame.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recofuse_core.data import PairFiles, find_pairs, read_pair, to_float, to_uint8
from recofuse_core.degradations.recipes import bad_camera
from recofuse_core.errors import ConfigError, DatasetError
from recofuse_core.evaluation.protocol import EvaluationSettings, Fuser, image_of, item_seed
from recofuse_core.evaluation.quality import psnr
from recofuse_core.evaluation.renditions import rendition_of
from recofuse_core.evaluation.report import Figure, finite, mean_of, shown, table
from recofuse_core.losses import luma
from recofuse_core.picture import OutputName
from recofuse_core.scenes.scene import moving_scene
from recofuse_images import calm, steady
from recofuse_images.steady import Memory

STILL = 3.0  # levels that the smoothed clean frames may change where a scene stands still
SMOOTHING = 9  # px a side of the mean that tells a move from noise
MARGIN = 9  # px around what moves that count as moving
CELL = 32  # px a side of the means whose change is that of levels
MIN_STILL = 0.05  # share of the frame below which a step says nothing
STREET_FRAMES, STREET_SIZE = 10, (240, 320)
PARTS: tuple[OutputName, ...] = ("fused", "vis", "ir")
COLUMNS = {
    "pixels_clean": "pixels, clean",
    "pixels_given": "given",
    "pixels": "restored",
    "pixels_ratio": "to clean",
    "levels_clean": "levels, clean",
    "levels_given": "given",
    "levels": "restored",
    "levels_ratio": "to clean",
}


class Frame(NamedTuple):
    """One frame as it came and as it was, uint8: vis (3, H, W), ir (1, H, W)."""

    vis: Tensor
    ir: Tensor
    clean_vis: Tensor
    clean_ir: Tensor


class SequenceFrames(NamedTuple):
    """Consecutive frames, read as they are needed."""

    name: str
    num_frames: int
    frames: Callable[[], Iterator[Frame]]


def find_sequences(root: Path) -> list[SequenceFrames]:
    """The sequences below a folder: one for each folder of vis/ and ir/, in the order of their files' names.

    Where a sequence has degraded files too (vis_lq/, ir_lq/), these are what comes in. Raises DatasetError if there is
    none, or one of a single frame.
    """
    by_source: dict[str, list[PairFiles]] = {}
    for pair in find_pairs(root):
        by_source.setdefault(pair.source, []).append(pair)

    def reading(pairs: Sequence[PairFiles]) -> Callable[[], Iterator[Frame]]:
        return lambda: map(_read, pairs)

    for source, pairs in by_source.items():
        if len(pairs) < 2:
            raise DatasetError(f"{root / source} has one frame: flicker is seen in two or more")
    return [SequenceFrames(source or root.name, len(pairs), reading(pairs)) for source, pairs in by_source.items()]


def _read(files: PairFiles) -> Frame:
    pair = read_pair(files)
    vis = pair.vis if pair.vis_degraded is None else pair.vis_degraded
    return Frame(vis, pair.ir if pair.ir_degraded is None else pair.ir_degraded, pair.vis, pair.ir)


def generated_streets(
    count: int, seed: int, *, num_frames: int = STREET_FRAMES, size: tuple[int, int] = STREET_SIZE
) -> list[SequenceFrames]:
    """Streets in which cars and people move under a standing camera, filmed badly: fixed tones, fresh noise a frame."""

    def filming(number: int) -> Callable[[], Iterator[Frame]]:
        return lambda: _filmed(number, num_frames, size)

    return [SequenceFrames(f"street {seed + k}", num_frames, filming(seed + k)) for k in range(count)]


def _filmed(seed: int, num_frames: int, size: tuple[int, int]) -> Iterator[Frame]:
    generator = torch.Generator().manual_seed(seed)
    for scene in moving_scene(seed, num_frames, *size):
        given = bad_camera(scene.vis, scene.ir, generator)
        yield Frame(*(to_uint8(image) for image in (*given, scene.vis, scene.ir)))


@dataclass(frozen=True)
class Flicker:
    """Mean change from frame to frame where the scene stands still, 0..255 levels, of one part of the pictures.

    clean: of the clean sequence in the rendition that was asked for (fused: of the maximum of both modalities).
    """

    pixels_clean: float
    pixels_given: float
    pixels: float
    levels_clean: float
    levels_given: float
    levels: float

    def ratios(self) -> dict[str, Figure]:
        """What of the clean sequence's change the result's is; None where that one has none."""
        pairs = {"pixels": (self.pixels, self.pixels_clean), "levels": (self.levels, self.levels_clean)}
        return {f"{name}_ratio": of / clean if clean > 0 else None for name, (of, clean) in pairs.items()}


@dataclass(frozen=True)
class SequenceScores:
    """One sequence: flicker by part, PSNR of what was restored, and the share of the frame that stands still."""

    name: str
    num_frames: int
    still: float
    flicker: dict[OutputName, Flicker]
    vis_psnr_db: float
    ir_psnr_db: float


def evaluate_sequences(
    model: Fuser,
    sequences: Iterable[SequenceFrames],
    settings: EvaluationSettings,
    *,
    is_steady: bool = True,
    is_calm: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[SequenceScores]:
    """Score sequences one after the other.

    Every frame gets the same noise, and its levels are held to those before it if `is_steady`, as a stream's frames
    are; if `is_calm`, its pixels are averaged with theirs, as in a stream that has one frame at work. Raises
    ConfigError for version 1, DatasetError for a sequence in which nothing stands still.
    """
    if settings.version < 2:
        raise ConfigError("version 1 of the protocol scores pairs alone")
    return (_evaluate_sequence(model, sequence, settings, is_steady, is_calm, device) for sequence in sequences)


class _Seen(NamedTuple):
    """What is kept of one frame for the next, floats in [0, 1]: the frames, and each part clean, given and restored."""

    frame: Tensor  # clean, (2, H, W): luma and ir
    parts: dict[OutputName, tuple[Tensor, Tensor, Tensor]]


def _evaluate_sequence(
    model: Fuser,
    sequence: SequenceFrames,
    settings: EvaluationSettings,
    is_steady: bool,
    is_calm: bool,
    device: torch.device | str,
) -> SequenceScores:
    changes: dict[OutputName, list[tuple[float, ...]]] = {part: [] for part in PARTS}
    stills, psnrs = [], []
    rendition: Callable[[Tensor], Tensor] | None = None
    before: _Seen | None = None
    memory = Memory() if is_steady else None
    history = b""
    for frame in sequence.frames():
        clean_vis, clean_ir = to_float(frame.clean_vis), to_float(frame.clean_ir)
        rendition = rendition or rendition_of(clean_vis, settings.exposure)  # one for all, so that it cannot flicker
        result = model.fuse(
            to_float(frame.vis)[None].to(device),
            to_float(frame.ir)[None].to(device),
            steps=settings.steps,
            sampler=settings.sampler,
            seeds=item_seed(settings.seed, sequence.name, "model"),
            coupled=settings.coupled,
            exposure=settings.exposure,
        )
        restored = {part: image_of(getattr(result, part), part) for part in PARTS}
        if memory is not None:
            restored = _held(memory, frame, restored)
        if is_calm:
            restored, history = _calmed(history, frame, restored)
        lit, given = rendition(clean_vis), (to_float(frame.vis), to_float(frame.ir))
        parts: dict[OutputName, tuple[Tensor, Tensor, Tensor]] = {
            "fused": (torch.maximum(lit, clean_ir), torch.maximum(*given), to_float(restored["fused"])),
            "vis": (lit, given[0], to_float(restored["vis"])),
            "ir": (clean_ir, given[1], to_float(restored["ir"])),
        }
        psnrs.append((psnr(restored["vis"], to_uint8(lit)), psnr(restored["ir"], frame.clean_ir)))
        now = _Seen(torch.cat([luma(clean_vis[None])[0], clean_ir]), parts)
        if before is not None:
            is_still = still_places(before.frame, now.frame)
            stills.append(float(is_still.float().mean()))
            if stills[-1] >= MIN_STILL:
                for part in PARTS:
                    each = zip(before.parts[part], now.parts[part], strict=True)
                    changes[part].append(tuple(figure for pair in each for figure in change(*pair, is_still)))
        before = now
    if not changes["vis"]:
        raise DatasetError(f"{sequence.name}: nothing stands still from one frame to the next")
    means = {part: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for part, rows in changes.items()}
    vis_db, ir_db = (sum(column) / len(psnrs) for column in zip(*psnrs, strict=True))
    flicker = {part: Flicker(*row[::2], *row[1::2]) for part, row in means.items()}
    return SequenceScores(sequence.name, sequence.num_frames, sum(stills) / len(stills), flicker, vis_db, ir_db)


def _held(memory: Memory, frame: Frame, restored: dict[OutputName, Tensor]) -> dict[OutputName, Tensor]:
    """What a stream shows of a frame, which the memory then holds, too."""
    vis, ir = (image.permute(1, 2, 0).numpy() for image in (frame.vis, frame.ir))
    pictures = {part: image.permute(1, 2, 0).numpy() for part, image in restored.items()}
    seen = steady.seen(pictures, steady.inputs(vis, ir[..., 0]))
    held = steady.steadied(pictures, seen, memory.means)
    memory.add(seen)
    return {part: torch.from_numpy(held[part]).permute(2, 0, 1) for part in restored}


def _calmed(history: bytes, frame: Frame, restored: dict[OutputName, Tensor]) -> tuple[dict[OutputName, Tensor], bytes]:
    """What a calm stream shows of a frame, and what the next one is averaged with."""
    vis, ir = (image.permute(1, 2, 0).numpy() for image in (frame.vis, frame.ir))
    pictures = {part: image.permute(1, 2, 0).numpy() for part, image in restored.items()}
    shown, history = calm.calmed(pictures, calm.given(vis, ir[..., 0]), history)
    return {part: torch.from_numpy(picture).permute(2, 0, 1) for part, picture in shown.items()}, history


def still_places(before: Tensor, after: Tensor) -> Tensor:
    """Where two clean frames (C, H, W) in [0, 1] show a scene that stands still: (H, W) booleans."""
    move = F.avg_pool2d((after - before)[None], SMOOTHING, 1, SMOOTHING // 2, count_include_pad=False).abs()
    largest = F.max_pool2d(move.amax(dim=1, keepdim=True), 2 * MARGIN + 1, 1, MARGIN)
    return largest[0, 0] <= STILL / 255


def change(before: Tensor, after: Tensor, is_still: Tensor) -> tuple[float, float]:
    """Mean absolute change of pixels, and of levels, of (C, H, W) in [0, 1] at still places, in 0..255 levels."""
    difference = 255 * (after - before) * is_still
    pixels = float(difference.abs().sum() / (is_still.sum() * len(difference)))
    shares = F.avg_pool2d(is_still[None, None].float(), CELL, ceil_mode=True)[0]  # (1, h, w), of a cell
    means = F.avg_pool2d(difference[None], CELL, ceil_mode=True)[0] / shares.clamp_min(1e-6)
    is_told = (shares >= 0.5).expand_as(means)
    return pixels, float(means[is_told].abs().mean()) if bool(is_told.any()) else pixels


@dataclass(frozen=True)
class SequencesReport:
    """Scores of all sequences and what made them."""

    scores: tuple[SequenceScores, ...]
    settings: EvaluationSettings
    weights: str
    version: str
    is_steady: bool = True
    is_calm: bool = False

    def __post_init__(self) -> None:
        if not self.scores:
            raise ConfigError("there is nothing to report: no sequence was scored")

    def rows(self) -> dict[str, dict[str, Figure]]:
        """Mean figures by part; ratios are those of the means."""
        rows: dict[str, dict[str, Figure]] = {}
        for part in PARTS:
            each = [asdict(score.flicker[part]) for score in self.scores]
            mean = Flicker(**{name: sum(item[name] for item in each) / len(each) for name in each[0]})
            rows[part] = asdict(mean) | mean.ratios()
        return rows

    def summary(self) -> dict[str, Any]:
        """Means over the sequences; keys as in docs/evaluation.md."""
        return {
            "num_sequences": len(self.scores),
            "num_frames": sum(score.num_frames for score in self.scores),
            "protocol_version": self.settings.version,
            "seed": self.settings.seed,
            "exposure": self.settings.exposure,
            "steady": self.is_steady,
            "calm": self.is_calm,
            "weights": self.weights,
            "weights_version": self.version,
            "vis_psnr_db": mean_of([score.vis_psnr_db for score in self.scores]),
            "ir_psnr_db": mean_of([score.ir_psnr_db for score in self.scores]),
            "flicker": self.rows(),
        }

    def as_json(self) -> dict[str, Any]:
        """The summary and each sequence's figures."""
        return {"summary": self.summary(), "sequences": [finite(asdict(score)) for score in self.scores]}

    def markdown(self) -> str:
        """One table of the means, and one of each sequence if there are several."""
        blocks = [f"{self._what()}.", table("flicker", COLUMNS, self.rows())]
        if len(self.scores) > 1:
            rows = {
                f"{score.name}, {part}": asdict(flicker) | flicker.ratios()
                for score in self.scores
                for part, flicker in score.flicker.items()
            }
            blocks.append(table("by sequence", COLUMNS, rows))
        return "\n\n".join(blocks) + "\n"

    def line(self) -> str:
        """One readable line."""
        parts = []
        for part, row in self.rows().items():
            pixels, levels = (_told(row, name) for name in ("pixels", "levels"))
            parts.append(f"{part} {pixels}, levels {levels}")
        return f"{self._what()}: change where nothing moves: {'; '.join(parts)}"

    def _what(self) -> str:
        settings, count = self.settings, sum(score.num_frames for score in self.scores)
        who = f"{self.weights} {self.version}"
        what = f"{len(self.scores)} sequences of {count} frames in all"
        how = ("" if self.is_steady else ", levels not held") + (", calm" if self.is_calm else "")
        how = how if self.is_steady or self.is_calm else ", each frame alone"
        return f"{what}, protocol {settings.version}, {settings.exposure}, seed {settings.seed}, {who}{how}"


def _told(row: dict[str, Figure], name: str) -> str:
    ratio = row[f"{name}_ratio"]
    return shown(row[name], 2) + ("" if ratio is None else f" ({shown(ratio, 2)} of clean)")
