"""Training in stages, from one config: tone, autoencoder, branches, coupled (the paper's alternating regularisation).

- "exposure" is ours, for models that have an exposure estimator: see exposure_training.py and docs/decisions/0015.
- "tone" is ours, for models that have a tone estimator (docs/decisions/0005). Features and sampled cells of many
  degraded frames are drawn once and kept, so that a step costs milliseconds.
- "autoencoder": every latent is decoded with degraded skip features and must give the image it belongs to (feature
  reorganisation), so that content and degradation live in the latent and the decoder learns to distrust the skips.
- "branches": the autoencoder is frozen; states of random steps are drawn from the marginal, and the prediction is
  compared with the clean latent ("clean" denoisers) or with the optimum step of the own state ("noise", as published).
- "coupled": a restoration update of both branches and TIM, then a fusion update of TIM, within every iteration. With
  `rollout` set, states come from the sampler's own trajectory instead of the marginal and the loss is taken in the
  image too, with gradients through all its steps; this closes the gap between training and few-step sampling, and lets
  the decoder meet the latents that it will be given (docs/decisions/0003).

A stage yields a StepReport after each step; `train_from_config` adds checkpoints, a progress bar and TensorBoard.
All randomness is one torch.Generator whose state is saved, so a resumed run goes on exactly where it stopped.

Where a torch.distributed group is initialised, every process of it draws batches of its own and gradients are averaged,
so that N processes train on N times the batch; the first one alone writes files.
"""

import json
import math
import os
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from recofuse_core.checkpoint import build_config, load_checkpoint, model_config_from, save_checkpoint
from recofuse_core.data import find_pairs, read_pair, to_float, to_uint8
from recofuse_core.degradations import Strength, degrade_ir, degrade_vis
from recofuse_core.errors import CheckpointError, ConfigError, DatasetError, NumericsError
from recofuse_core.exposure import ExposureEstimator
from recofuse_core.exposure_training import FrameSource, LightSamples, lighting_loss, read_references
from recofuse_core.losses import (
    FusionTargets,
    FusionTerms,
    GradientTarget,
    IntensityTarget,
    fusion_loss,
    log_error,
    matching_loss,
    strongest,
)
from recofuse_core.model import PRESETS, ModelConfig, ReCoFuse
from recofuse_core.networks import Skips, ToneEstimator
from recofuse_core.quality import psnr
from recofuse_core.sampler import SAMPLERS, NoiseSource, Pair, Prediction, clean_latents

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

StageName = Literal["exposure", "tone", "autoencoder", "branches", "coupled"]
Updates = Literal["alternating", "decoupled", "joint", "separated"]

# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and how often. Prefixes are compared with a pair's name and with its data set's.

    Files that are degraded already (LQ/HQ folders, see data.py) are taken as they are; what a pair lacks is made.
    """

    root: str  # relative to the configuration file; any layout of data.py
    split: str = ""  # only this split of a data set, "train" as a rule; all if empty
    references: str = ""  # exposure: dark, foggy and clean photographs, as exposure_training.py has them; none if empty
    exclude_prefixes: tuple[str, ...] = ()
    group_weights: dict[str, float] = field(default_factory=dict)  # prefix -> weight; the rest shares `other_weight`
    other_weight: float = 1.0
    rescale_probability: float = 0.5  # crops of a region up to `max_rescale` times larger, reduced: scene-wide context
    max_rescale: float = 4.0
    vary_ir_probability: float = 0.5
    ir_gain: tuple[float, float] = (0.75, 1.15)
    ir_offset: tuple[float, float] = (-0.05, 0.1)
    ir_log_gamma: float = 0.4  # gamma is drawn from e^-x to e^x
    clean_probability: float = 0.05
    strengths: tuple[Strength, ...] = ("medium",)  # one is drawn for every pair
    context: int = 0  # side of the frames that the tone curves are taken from; crops are cut from them. 0: the crops
    validation_root: str = ""  # pairs for the score during training; none if empty
    validation_split: str = ""
    dark_below: float = 0.18  # visible images of lower mean are truly dark
    enhance_dark: bool = True  # whether truly dark visible images are given enhanced targets
    dark_log_gamma: float = 0.0  # dark visible crops and their targets are varied by a gamma of e^-x to e^x


@dataclass(frozen=True)
class StageConfig:
    """One stage. The learning rate warms up, then falls along a cosine to `final_ratio` of its peak."""

    name: StageName
    steps: int
    batch_size: int
    crop: int
    learning_rate: float
    optimizer: Literal["adamw", "lion"] = "adamw"
    weight_decay: float = 0.0
    warmup_steps: int = 200
    final_ratio: float = 0.02
    max_minutes: float | None = None  # the schedule shrinks to fit; makes a run depend on the machine's speed
    rollout: bool = False
    rollout_steps: tuple[int, ...] = ()  # one of these numbers of steps is drawn for every batch; the model's if empty
    image_weight: float = 1.0
    log_weight: float = 0.0  # of the logarithm of each image's squared error, see image_loss
    latent_weight: float = 0.25
    fusion_weight: float = 1.0
    fusion_log_weight: float = 0.0  # of `log_error` of the fused image, so that dark scenes count too
    updates: Updates = "alternating"  # coupled, without rollout: which loss moves what, see Trainer._coupled_update
    fusion_batch: int = 0  # items of a batch that the fusion loss is taken on, for its decoding is dear; 0: all
    intensity_target: IntensityTarget = "maximum"
    gradient_target: GradientTarget = "maximum"
    degraded_weight: float = 0.3  # autoencoder: of the reconstruction of the degraded image
    unit_weight: float = 0.002  # autoencoder: keeps latent channels near unit power, so that lam means the same in each
    num_frames: int = 18_000  # exposure, tone: degraded frames that are drawn once and kept
    swap_probability: float = 0.0  # exposure, tone: of meeting the infrared frame of another pair
    spread_weight: float = 0.0  # tone: of the difference in std; averages over what may be are too flat

    def __post_init__(self) -> None:
        if self.updates not in get_args(Updates):
            raise ConfigError(f"updates must be one of {', '.join(get_args(Updates))}, got {self.updates!r}")
        if self.updates != "alternating" and (self.name != "coupled" or self.rollout):
            raise ConfigError(f"updates = {self.updates!r} belongs to a coupled stage without rollout")
        if self.rollout_steps and not (self.rollout and all(steps >= 1 for steps in self.rollout_steps)):
            raise ConfigError(f"rollout_steps = {self.rollout_steps} belongs to a rollout, of one step or more each")
        for name, kinds in (("intensity_target", IntensityTarget), ("gradient_target", GradientTarget)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    preset: str
    version: str
    data: DataConfig
    stages: tuple[StageConfig, ...]
    model: dict[str, Any] = field(
        default_factory=dict
    )  # what differs from the preset, such as {"fusion": {"width": 32}}
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float = 0.99
    ema_interval: int = 10
    clip_norm: float = 1.0
    patience: int = 0  # validations without a better score that end a stage, with its best weights; 0: no early end
    checkpoint_interval: int = 500
    log_interval: int = 50
    validation_interval: int = 500
    num_threads: int = 0  # CPU threads; 0: torch's default

    @property
    def model_config(self) -> ModelConfig:
        """The preset's, changed as `model` says. Raises ConfigError for settings that do not exist or do not fit."""
        values = asdict(PRESETS[self.preset])
        for name, value in self.model.items():
            values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
        try:
            return model_config_from(values)
        except (TypeError, KeyError) as error:
            raise ConfigError(f"the model's configuration does not fit: {error}") from error


def read_config(path: Path) -> TrainConfig:
    """Read a TOML file: top-level keys, [data], [model], [[stages]]. Raises ConfigError for unknown or wrong keys."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not a training configuration: {error}") from error
    return parse_config(raw, path)


def parse_config(raw: dict[str, Any], path: Path) -> TrainConfig:
    """The configuration in a parsed file; `path` names it in errors. Raises ConfigError."""
    try:
        raw["data"] = build_config(DataConfig, raw["data"], "data")
        raw["stages"] = tuple(
            build_config(StageConfig, stage, f"stage {i}") for i, stage in enumerate(raw["stages"], 1)
        )
        config: TrainConfig = build_config(TrainConfig, raw, "the file")
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a training configuration: {error}") from error
    if not config.stages:
        raise ConfigError(f"{path} names no stage")
    if config.preset not in PRESETS:
        raise ConfigError(f"unknown preset {config.preset!r}; known: {', '.join(PRESETS)}")
    _ = config.model_config  # told now, not after the data have been read
    return config


# --- data -------------------------------------------------------------------------------------------------------------


def enhance_dark(vis: np.ndarray, dark_below: float) -> np.ndarray:
    """Target for a truly dark visible image: lightly smoothed and lifted by a gamma curve; others come back unchanged.

    (H, W, 3) uint8. The mean is moved half-way to 1.2 * dark_below: a night stays a night, yet shows what is in it.
    """
    mean = float(vis.mean()) / 255
    if mean >= dark_below:
        return vis
    smooth = cv2.bilateralFilter(vis, 5, 12, 2)
    histogram = np.bincount(smooth.ravel(), minlength=256) / smooth.size
    levels = np.arange(256) / 255
    gammas = np.linspace(0.3, 1.0, 71)
    means = np.array([(histogram * levels**gamma).sum() for gamma in gammas])
    gamma = gammas[np.abs(means - (mean + 0.5 * (1.2 * dark_below - mean))).argmin()]
    lifted: np.ndarray = cv2.LUT(smooth, (255 * levels**gamma).round().astype(np.uint8))
    return lifted


@dataclass(frozen=True)
class Batch:
    """Clean targets and degraded inputs, (B, 3, H, W) each; infrared repeated to three channels.

    context: the degraded frames that the inputs were cut from, infrared of one channel; None if they are the inputs.
    """

    clean: Pair
    degraded: Pair
    context: Pair | None = None

    @property
    def frame(self) -> Pair:
        """What tone curves are taken from: the context, or the inputs themselves; infrared of one channel."""
        return self.context or Pair(self.degraded.vis, self.degraded.ir[:, :1])

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""

        def moved(pair: Pair) -> Pair:
            return Pair(pair.vis.to(device), pair.ir.to(device))

        return Batch(moved(self.clean), moved(self.degraded), None if self.context is None else moved(self.context))


class RawPair(NamedTuple):
    """A pair in memory, uint8: vis (H, W, 3), ir (H, W), and what its files hold degraded already, if anything."""

    name: str
    vis: np.ndarray
    ir: np.ndarray
    vis_degraded: np.ndarray | None = None
    ir_degraded: np.ndarray | None = None
    source: str = ""  # its data set

    def starts_with(self, prefixes: tuple[str, ...]) -> bool:
        """Whether the name or the data set's does."""
        return self.name.startswith(prefixes) or self.source.startswith(prefixes)


@dataclass(frozen=True)
class _Images:
    """What crops are cut from: source of the degradations and target (H, W, 3), ir (H, W), given degraded ones."""

    vis: np.ndarray
    target: np.ndarray
    ir: np.ndarray
    vis_degraded: np.ndarray | None
    ir_degraded: np.ndarray | None


class PairSource:
    """Draws training batches from pairs held in memory as uint8. Every draw comes from the generator passed in."""

    def __init__(self, config: DataConfig, pairs: Iterable[RawPair | tuple[str, np.ndarray, np.ndarray]]) -> None:
        self.config = config
        groups: dict[str, list[_Images]] = {}
        for pair in (RawPair(*pair) for pair in pairs):
            if pair.starts_with(config.exclude_prefixes):
                continue
            prefix = next((p for p in config.group_weights if pair.starts_with((p,))), "")
            # A clean file beside a degraded one is the target as it is, however dark.
            is_enhanced = config.enhance_dark and pair.vis_degraded is None
            target = enhance_dark(pair.vis, config.dark_below) if is_enhanced else pair.vis
            images = _Images(pair.vis, target, pair.ir, pair.vis_degraded, pair.ir_degraded)
            groups.setdefault(prefix, []).append(images)
        if not groups:
            raise DatasetError(f"no training pair in {config.root}")
        self.groups = list(groups.values())
        weights = torch.tensor([config.group_weights.get(prefix, config.other_weight) for prefix in groups])
        self.cumulative = (weights / weights.sum()).cumsum(0)

    def draw(self, batch_size: int, crop: int, generator: Generator) -> Batch:
        """A batch of `crop` x `crop` pairs, degraded anew."""
        config = self.config
        side = max(crop, config.context)
        parts: list[tuple[Tensor, ...]] = []
        for _ in range(batch_size):
            target, ir, low_vis, low_ir = self.frame(side, generator)
            top, left = (torch.rand(2, generator=generator) * (side - crop + 1)).int().tolist()
            area = np.s_[..., top : top + crop, left : left + crop]
            parts.append((target[area], ir[area], low_vis[area], low_ir[area], low_vis, low_ir))
        target, ir, low_vis, low_ir, vis_frame, ir_frame = (torch.stack(column) for column in zip(*parts, strict=True))
        clean = Pair(_fast(target), _fast(ir.expand(-1, 3, -1, -1)))
        degraded = Pair(_fast(low_vis), _fast(low_ir.expand(-1, 3, -1, -1)))
        return Batch(clean, degraded, Pair(vis_frame, ir_frame) if config.context else None)

    def frame(self, side: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One square: clean vis (3, side, side) and ir (1, side, side), then both degraded."""
        vis, target, ir, low_vis, low_ir = self._crop(side, generator)
        if low_ir is None:
            ir = self._vary_ir(ir, generator)
        if low_vis is None:
            vis, target = self._vary_dark(vis, target, generator)
        config = self.config
        pick = float(torch.rand(1, generator=generator))
        strength = config.strengths[int(pick * len(config.strengths))]
        if low_vis is None:
            low_vis = degrade_vis(vis, generator, strength, clean_probability=config.clean_probability).image
        if low_ir is None:
            low_ir = degrade_ir(ir, generator, strength, clean_probability=config.clean_probability).image
        return target, ir, low_vis, low_ir

    def _crop(self, size: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The same square of vis, target and ir of one pair, and of the degraded files that it has."""
        pick, item, zoom, scale, top, left, flip, turn = torch.rand(8, generator=generator).tolist()
        group = self.groups[min(int((self.cumulative < pick).sum()), len(self.groups) - 1)]
        images = group[int(item * len(group))]
        height, width = images.ir.shape
        side = size
        if zoom < self.config.rescale_probability:
            side = int(size * (1 + scale * (self.config.max_rescale - 1)))
        side = min(side, height, width)
        y, x = int(top * (height - side + 1)), int(left * (width - side + 1))

        def crop(image: np.ndarray) -> Tensor:
            part = image[y : y + side, x : x + side]
            if side != size:
                method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
                part = cv2.resize(part, (size, size), interpolation=method)
            part = part[:, ::-1] if flip < 0.5 else part
            part = np.rot90(part) if turn < 0.1 else part
            tensor = torch.from_numpy(np.ascontiguousarray(part)).float().div_(255)
            return tensor.permute(2, 0, 1).contiguous() if tensor.ndim == 3 else tensor[None]

        low_vis = None if images.vis_degraded is None else crop(images.vis_degraded)
        low_ir = None if images.ir_degraded is None else crop(images.ir_degraded)
        return crop(images.vis), crop(images.target), crop(images.ir), low_vis, low_ir

    def _vary_ir(self, ir: Tensor, generator: Generator) -> Tensor:
        """Gain, offset and gamma, input and target alike: cameras differ, and a target must stay unambiguous."""
        chance, gamma, gain, offset = torch.rand(4, generator=generator).tolist()
        if chance >= self.config.vary_ir_probability:
            return ir
        low, high = self.config.ir_gain
        curve = math.exp((2 * gamma - 1) * self.config.ir_log_gamma)
        shift = self.config.ir_offset[0] + (self.config.ir_offset[1] - self.config.ir_offset[0]) * offset
        varied: Tensor = (ir.pow(curve) * (low + (high - low) * gain) + shift).clamp(0, 1)
        return varied

    def _vary_dark(self, vis: Tensor, target: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """A gamma, input and target alike, for truly dark crops: nights differ, and few are at hand."""
        spread = self.config.dark_log_gamma
        if spread == 0 or float(vis.mean()) >= self.config.dark_below:
            return vis, target
        gamma = math.exp((2 * float(torch.rand(1, generator=generator)) - 1) * spread)
        return vis.pow(gamma), target.pow(gamma)


def _fast(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Encoded:
    """A batch behind the frozen encoder.

    clean, mu: latents (B, C, h, w) float32 of the clean and the degraded images; skips: of the degraded ones;
    references: the clean latents decoded with those skips, (B, 3, H, W) each, which the published fusion loss aims at.
    """

    clean: Pair
    mu: Pair
    skips: tuple[Skips, Skips]
    references: Pair

    def to(self, device: torch.device) -> "Encoded":
        """The batch on a device."""
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Encoded":
        """The batch with every tensor changed."""
        vis_skips, ir_skips = (tuple(change(skip) for skip in skips) for skips in self.skips)
        clean, mu, references = (Pair(*map(change, pair)) for pair in (self.clean, self.mu, self.references))
        return Encoded(clean, mu, (vis_skips, ir_skips), references)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as `from_tensors` takes them."""
        names: dict[str, Tensor] = {}
        for part, pair in (("clean", self.clean), ("mu", self.mu), ("references", self.references)):
            names |= {f"{part}.vis": pair.vis, f"{part}.ir": pair.ir}
        for modality, skips in zip(("vis", "ir"), self.skips, strict=True):
            names |= {f"skips.{modality}.{index}": skip for index, skip in enumerate(skips)}
        return names

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Encoded":
        """The inverse of `tensors`."""
        clean, mu, references = (
            Pair(tensors[f"{part}.vis"], tensors[f"{part}.ir"]) for part in ("clean", "mu", "references")
        )
        count = sum(name.startswith("skips.vis.") for name in tensors)
        vis_skips, ir_skips = (
            tuple(tensors[f"skips.{modality}.{index}"] for index in range(count)) for modality in ("vis", "ir")
        )
        return cls(clean, mu, (vis_skips, ir_skips), references)


class LatentSource:
    """Batches from crops that were degraded and encoded once, for stages that leave the autoencoder alone.

    `crops` holds all of them in one `Encoded`, in half precision, the references as uint8 levels.
    """

    def __init__(self, crops: Encoded) -> None:
        self.crops = crops

    def __len__(self) -> int:
        return len(self.crops.mu.vis)

    @classmethod
    def encode(cls, model: ReCoFuse, source: PairSource, count: int, crop: int, generator: Generator) -> "LatentSource":
        """`count` crops of `crop` x `crop` drawn from pairs, normalised and encoded by the model."""
        parts = []
        for start in range(0, count, 16):
            batch = source.draw(min(16, count - start), crop, generator).to(next(model.parameters()).device)
            with torch.no_grad():
                degraded = model.normalise(batch.degraded, batch.frame)
                clean, _, _ = encode_pair(model, batch.clean)
                mu, vis_skips, ir_skips = encode_pair(model, degraded)
                references = reconstruct(model, clean, (vis_skips, ir_skips), batch.clean)
            levels = Pair(*(to_uint8(image) for image in references))
            kept = Encoded(clean, mu, (vis_skips, ir_skips), levels).mapped(_halved)
            parts.append(kept.tensors())
        return cls(Encoded.from_tensors({name: torch.cat([part[name] for part in parts]) for name in parts[0]}))

    def draw(self, batch_size: int, generator: Generator) -> Encoded:
        """A batch of different crops in float32, references in [0, 1]."""
        chosen = torch.randperm(len(self), generator=generator)[:batch_size]

        def taken(tensor: Tensor) -> Tensor:
            part = tensor[chosen]
            return _fast(to_float(part) if part.dtype == torch.uint8 else part.float())

        return self.crops.mapped(taken)


def _halved(tensor: Tensor) -> Tensor:
    return tensor.half().cpu() if tensor.is_floating_point() else tensor.cpu()


# --- losses of the stages ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToneSamples:
    """Degraded frames, drawn once: features (N, F), and cells of the averaged frames, degraded and clean, (N, 4, P)."""

    features: Tensor
    degraded: Tensor
    clean: Tensor

    @classmethod
    def draw(cls, tone: ToneEstimator, source: PairSource, count: int, generator: Generator) -> "ToneSamples":
        """Frames of the source's context side; every seventh cell is kept, in half precision."""
        side = source.config.context
        if side < tone.config.grid:
            raise ConfigError(f"data.context must be at least {tone.config.grid} for the tone stage, got {side}")
        features: list[Tensor] = []
        degraded: list[Tensor] = []
        clean: list[Tensor] = []
        for _ in range(count):
            target, ir, low_vis, low_ir = source.frame(side, generator)
            features.append(tone.features(low_vis[None], low_ir[None])[0])
            for kept, pair in ((degraded, (low_vis, low_ir)), (clean, (target, ir))):
                cells = F.adaptive_avg_pool2d(torch.cat(pair), tone.config.grid)
                kept.append(cells.flatten(1)[:, ::7].half())
        return cls(torch.stack(features), torch.stack(degraded), torch.stack(clean))

    def take(self, batch: Tensor) -> "ToneSamples":
        """The samples with the indices `batch`."""
        return ToneSamples(self.features[batch], self.degraded[batch], self.clean[batch])

    def with_infrared_of(self, other: "ToneSamples", where: Tensor, tone: ToneEstimator) -> "ToneSamples":
        """These samples with the infrared of `other`, as many, at the positions `where` (B,) is true.

        Every feature is of one channel, so frames of different pairs can be put together.
        """
        of_ir = tone.infrared_features().to(where.device)
        features = torch.where(where[:, None] & of_ir, other.features, self.features)
        joined = []
        for own, others in ((self.degraded, other.degraded), (self.clean, other.clean)):
            ir = torch.where(where[:, None, None], others[:, 3:], own[:, 3:])
            joined.append(torch.cat([own[:, :3], ir], dim=1))
        return ToneSamples(features, *joined)

    def to(self, device: torch.device) -> "ToneSamples":
        """The samples on a device."""
        return ToneSamples(self.features.to(device), self.degraded.to(device), self.clean.to(device))


def tone_loss(tone: ToneEstimator, samples: ToneSamples, spread_weight: float = 0.0) -> dict[str, Tensor]:
    """Image loss of the corrected cells of samples, for both modalities.

    `spread_weight` is that of the difference in std between corrected and clean cells, all channels of a modality.
    """
    curves = tone.curves(samples.features)
    corrected = curves(samples.degraded.float()[..., None])
    clean = samples.clean.float()[..., None]
    losses: dict[str, Tensor] = {}
    for name, channels in (("vis", slice(3)), ("ir", slice(3, 4))):
        ours, wanted = corrected[:, channels], clean[:, channels]
        spread = (ours.flatten(1).std(dim=1) - wanted.flatten(1).std(dim=1)).abs().mean()
        losses[name] = image_loss(ours, wanted, TONE_LOG_WEIGHT) + spread_weight * spread
    return losses


TONE_LOG_WEIGHT = 0.05


def autoencoder_loss(model: ReCoFuse, batch: Batch, stage: StageConfig) -> dict[str, Tensor]:
    """Two terms of feature reorganisation: a latent decoded with degraded skips gives the image it belongs to."""
    clean, degraded = torch.cat(batch.clean), torch.cat(batch.degraded)
    size = (clean.shape[-2], clean.shape[-1])
    latents, skips = model.autoencoder.encode(torch.cat([clean, degraded]))
    clean_latent, degraded_latent = latents.chunk(2)
    degraded_skips: Skips = tuple(skip.chunk(2)[1] for skip in skips)
    restored = model.autoencoder.decode(clean_latent, degraded_skips, size).float()
    repeated = model.autoencoder.decode(degraded_latent, degraded_skips, size).float()
    power = clean_latent.float().square().mean(dim=(0, 2, 3))
    return {
        "clean": F.l1_loss(restored, clean),
        "degraded": stage.degraded_weight * F.l1_loss(repeated, degraded),
        "unit": stage.unit_weight * (power - 1).square().mean(),
    }


@torch.no_grad()
def reconstruct(model: ReCoFuse, clean: Pair, skips: tuple[Skips, Skips], like: Pair) -> Pair:
    """Clean latents decoded with degraded skips, in the size of `like`: references of the published fusion update."""
    size = (like.vis.shape[-2], like.vis.shape[-1])
    return Pair(*(model.autoencoder.decode(z, skip, size).float() for z, skip in zip(clean, skips, strict=True)))


@torch.no_grad()
def encode_pair(model: ReCoFuse, images: Pair) -> tuple[Pair, Skips, Skips]:
    """Latents (float32) and the skips of both modalities, without gradient: the encoder is frozen after its stage."""
    latent, skips = model.autoencoder.encode(torch.cat(images))
    halves = [skip.chunk(2) for skip in skips]
    return Pair(*latent.float().chunk(2)), tuple(h[0] for h in halves), tuple(h[1] for h in halves)


def predict_marginal(model: ReCoFuse, clean: Pair, mu: Pair, timesteps: Tensor, noise: Pair) -> tuple[Pair, Prediction]:
    """States of the marginal at the steps (B,), and the model's evaluation of them; all pairs are (B, C, h, w)."""
    states = []
    for x0, m, eps in zip(clean, mu, noise, strict=True):
        mean, std = model.sde.marginal(x0, m, timesteps)
        states.append(mean + std * eps)
    state = Pair(*states)
    return state, model.predict(state, mu, timesteps)


def restoration_loss(model: ReCoFuse, clean: Pair, mu: Pair, timesteps: Tensor, noise: Pair) -> tuple[Tensor, Tensor]:
    """Losses of both modalities at random steps of the marginal (docs/model.md, 7).

    clean, mu, noise: (B, C, h, w) pairs; timesteps (B,). "noise" denoisers are compared at the optimum step of the own
    state, "clean" ones at x_0.
    """
    state, prediction = predict_marginal(model, clean, mu, timesteps, noise)
    return prediction_losses(model, state, prediction, clean, mu, timesteps)


def prediction_losses(
    model: ReCoFuse, state: Pair, prediction: Prediction, clean: Pair, mu: Pair, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """`restoration_loss` of an evaluation that is made already."""
    losses = []
    for start, output, x, x0, m in zip(prediction.start, prediction.output, state, clean, mu, strict=True):
        if prediction.kind == "clean":
            losses.append(matching_loss(m + output.float(), x0))
        else:
            estimate = model.sde.reverse_mean(start, m, output, timesteps)
            losses.append(matching_loss(estimate, model.sde.optimum_step(x, x0, m, timesteps)))
    return losses[0], losses[1]


def rollout(model: ReCoFuse, mu: Pair, draw: NoiseSource, steps: int | None = None) -> tuple[Pair, list[Pair]]:
    """The model's default sampler with gradients. Returns its result and the clean estimate of every evaluation.

    `steps` is the model's own number if None.
    """
    estimates: list[Pair] = []

    def predict(state: Pair, mu: Pair, t: int) -> Prediction:
        prediction = model.predict(state, mu, t)
        output = Pair(prediction.output.vis.float(), prediction.output.ir.float())
        prediction = replace(prediction, output=output)
        estimates.append(clean_latents(model.sde, prediction, state, mu, t))
        return prediction

    noise = draw()
    state = Pair(*(model.sde.noise_state(m, n) for m, n in zip(mu, noise, strict=True)))
    plan = model.plan(steps=steps)
    result = SAMPLERS[plan.sampler](predict, model.sde, state, mu, draw, plan.timesteps)
    return result, estimates


def image_loss(image: Tensor, target: Tensor, log_weight: float) -> Tensor:
    """L1 plus `log_weight` times `log_error`."""
    return F.l1_loss(image, target) + log_weight * log_error(image, target)


def final_fusion_loss(
    model: ReCoFuse,
    clean: Pair,
    skips: tuple[Skips, Skips],
    references: Pair,
    targets: FusionTargets | None = None,
) -> tuple[FusionTerms, Tensor]:
    """Fusion update: TIM at step 0 on clean latents, decoded with the fused skips. Returns the terms and the image."""
    size = (references.vis.shape[-2], references.vis.shape[-1])
    image = model.autoencoder.decode(model.final_fusion(clean), model.autoencoder.fuse_skips(*skips), size).float()
    return fusion_loss(image, references.vis, references.ir, targets=targets), image


# --- optimisation -----------------------------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al., 2023): sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 3e-5,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(momentum.lerp(parameter.grad, 1 - beta1).sign_(), alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - beta2)
        return loss


def build_optimizer(stage: StageConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The stage's optimizer over some parameters."""
    if stage.optimizer == "lion":
        return Lion(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)
    return torch.optim.AdamW(parameters, lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=stage.weight_decay)


class WeightAverage:
    """Exponential moving average of a model's weights with a warm-up of (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's present weights."""
        self.num_updates += 1
        keep = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, tensor in model.state_dict().items():
            self.weights[name].lerp_(tensor, 1 - keep)


def learning_rate(stage: StageConfig, step: int, progress: float) -> float:
    """Rate at a step (from 0) and a progress in [0, 1]: linear warm-up, then a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    ramp = min(1.0, (step + 1) / max(stage.warmup_steps, 1))
    return stage.learning_rate * ramp * (stage.final_ratio + (1 - stage.final_ratio) * cosine)


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepReport:
    """What one step gave: losses by name, the rate, and how far the stage is."""

    stage: StageName
    step: int
    progress: float
    learning_rate: float
    losses: dict[str, float]


@dataclass(frozen=True)
class BestWeights:
    """The averaged weights of the best validation of a stage."""

    score: float
    weights: dict[str, Tensor]


class ProcessGroup:
    """The processes that train together: torch.distributed's default group, or this process alone."""

    def __init__(self) -> None:
        is_shared = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_shared else 0
        self.size = dist.get_world_size() if is_shared else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their means over the group."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        means = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def of_first(self, value: float, device: torch.device) -> float:
        """The first process's value, so that all take the same decisions."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def gather(self, state: Tensor) -> list[Tensor]:
        """The generator states of all processes, in the order of their ranks."""
        if self.size == 1:
            return [state]
        states: list[Any] = [None] * self.size
        dist.all_gather_object(states, state)
        return states


class Trainer:
    """A model under training, with everything that a resumed run needs to go on exactly."""

    def __init__(
        self,
        config: TrainConfig,
        source: PairSource | LatentSource,
        device: torch.device | str = "cpu",
        frames: FrameSource | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.frames = frames  # what the exposure stage draws from
        self.device = torch.device(device)
        self.group = ProcessGroup()
        torch.manual_seed(config.seed)  # initial weights; everything later draws from self.generator
        self.model = ReCoFuse(config.model_config).to(self.device)
        self.generator = Generator().manual_seed(config.seed + 1_000_003 * self.group.rank)
        self.stage_index = 0
        self.start_stage()

    @property
    def stage(self) -> StageConfig:
        """The present stage."""
        return self.config.stages[self.stage_index]

    def start_stage(self) -> None:
        """Fresh optimizer and average for the present stage."""
        self.step = 0
        self.elapsed_s = 0.0
        autoencoder, others = self.model.autoencoder, [self.model.denoiser, self.model.fusion]
        decoder = [p for name, p in autoencoder.named_parameters() if _is_decoder(name)]
        tone = [] if self.model.tone is None else list(self.model.tone.parameters())
        exposure = [] if self.model.exposure is None else list(self.model.exposure.parameters())
        trained = {
            "exposure": exposure,
            "tone": tone,
            "autoencoder": list(autoencoder.parameters()),
            "branches": [p for m in others for p in m.parameters()],
            "coupled": [p for m in others for p in m.parameters()] + (decoder if self.stage.rollout else []),
        }[self.stage.name]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self.parameters = trained
        # The published fusion update moves TIM alone; after rollouts the decoder must also learn the fused latents.
        fusion = list(self.model.fusion.parameters()) + (decoder if self.stage.rollout else [])
        self.fusion_parameters = fusion
        self.optimizer = build_optimizer(self.stage, trained)
        self.best: BestWeights | None = None
        self.num_without_gain = 0
        self.tone_samples: ToneSamples | None = None
        self.light_samples: LightSamples | None = None
        self.average = WeightAverage(self.model, self.config.ema_decay)

    def run_stage(self) -> Iterator[StepReport]:
        """Train the present stage to its end, one report a step; `judge` may end it early.

        Raises ConfigError if the model lacks the stage's part, NumericsError for a loss that is not finite.
        """
        if self.stage.name == "tone":
            self._draw_tone_samples()
        if self.stage.name == "exposure":
            self._draw_light_samples()
        started = time.monotonic() - self.elapsed_s
        while (progress := self._progress()) < 1 and not self.is_exhausted:
            rate = learning_rate(self.stage, self.step, progress)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = self._update()
            if not all(math.isfinite(loss) for loss in losses.values()):
                raise NumericsError(f"a loss of step {self.step} of stage {self.stage.name} is not finite: {losses}")
            self.step += 1
            self.elapsed_s = self.group.of_first(time.monotonic() - started, self.device)
            if self.step % self.config.ema_interval == 0:
                self.average.update(self.model)
            yield StepReport(self.stage.name, self.step, self._progress(), rate, losses)

    @property
    def is_exhausted(self) -> bool:
        """Whether the score has not improved for `patience` validations."""
        return 0 < self.config.patience <= self.num_without_gain

    def judge(self, score: float) -> bool:
        """Take the score of the averaged weights (more is better). True if it is the stage's best so far."""
        if self.best is not None and score <= self.best.score:
            self.num_without_gain += 1
            return False
        self.num_without_gain = 0
        self.best = BestWeights(score, {name: tensor.clone() for name, tensor in self.average.weights.items()})
        return True

    def _progress(self) -> float:
        by_time = self.elapsed_s / (60 * self.stage.max_minutes) if self.stage.max_minutes else 0.0
        return max(self.step / self.stage.steps, by_time)

    def _draw_tone_samples(self) -> None:
        """The stage's frames, from a generator of their own: a resumed run draws the same again."""
        tone = self.model.tone
        if tone is None:
            raise ConfigError(f"preset {self.config.preset!r} has no tone estimator to train")
        if isinstance(self.source, LatentSource):
            raise ConfigError("the tone stage needs frames, not encoded crops")
        generator = Generator().manual_seed(self.config.seed + 1)
        samples = ToneSamples.draw(tone, self.source, self.stage.num_frames, generator)
        self.tone_samples = samples.to(self.device)
        if self.step == 0:
            tone.calibrate(self.tone_samples.features)
            self.average = WeightAverage(self.model, self.config.ema_decay)

    def _draw_light_samples(self) -> None:
        """The stage's frames, from a generator of their own, as those of the tone stage."""
        estimator = self.model.exposure
        if estimator is None:
            raise ConfigError(f"preset {self.config.preset!r} has no exposure estimator to train")
        if self.frames is None:
            raise ConfigError("the exposure stage needs frames, from pairs and from data.references")
        generator = Generator().manual_seed(self.config.seed + 2)
        samples = LightSamples.draw(estimator, self.frames, self.stage.num_frames, self.stage.crop, generator)
        self.light_samples = samples.to(self.device)
        if self.step == 0:
            estimator.calibrate(self.light_samples.features)
            self.average = WeightAverage(self.model, self.config.ema_decay)

    def _exposure_update(self, samples: LightSamples, estimator: ExposureEstimator) -> dict[str, float]:
        """One step on frames of all kinds, some of which meet the infrared frame of another scene."""
        stage, count = self.stage, len(samples.features)
        chosen, partners = (torch.randint(count, (stage.batch_size,), generator=self.generator) for _ in range(2))
        is_swapped = torch.rand(stage.batch_size, generator=self.generator) < stage.swap_probability
        batch, others = samples.take(chosen.to(self.device)), samples.take(partners.to(self.device))
        batch = batch.with_infrared_of(others, is_swapped.to(self.device), estimator)
        if float(torch.rand((), generator=self.generator)) < 0.5:
            batch = batch.flipped()
        terms = lighting_loss(estimator, batch)
        self._descend(_sum(terms), self.parameters)
        return _reported(terms)

    def _update(self) -> dict[str, float]:
        stage = self.stage
        if self.light_samples is not None and self.model.exposure is not None:
            return self._exposure_update(self.light_samples, self.model.exposure)
        if self.tone_samples is not None and self.model.tone is not None:
            tone, count = self.model.tone, len(self.tone_samples.features)
            chosen = torch.randint(count, (stage.batch_size,), generator=self.generator)
            samples = self.tone_samples.take(chosen.to(self.device))
            if stage.swap_probability > 0:
                where = torch.rand(stage.batch_size, generator=self.generator) < stage.swap_probability
                partners = torch.randint(count, (stage.batch_size,), generator=self.generator)
                others = self.tone_samples.take(partners.to(self.device))
                samples = samples.with_infrared_of(others, where.to(self.device), tone)
            terms = tone_loss(tone, samples, stage.spread_weight)
            self._descend(_sum(terms), self.parameters)
            return _reported(terms)
        if isinstance(self.source, LatentSource):
            if stage.name == "autoencoder" or stage.rollout:
                raise ConfigError("encoded crops serve the branches and the coupled stage without rollout")
            with self._autocast():
                return self._marginal_update(self.source.draw(stage.batch_size, self.generator).to(self.device))
        batch = self.source.draw(stage.batch_size, stage.crop, self.generator).to(self.device)
        if stage.name == "autoencoder":
            with self._autocast():
                terms = autoencoder_loss(self.model, batch, stage)
            self._descend(_sum(terms), self.parameters)
            return _reported(terms)
        with torch.no_grad():
            degraded = self.model.normalise(batch.degraded, batch.frame)
        with self._autocast():
            clean, _, _ = encode_pair(self.model, batch.clean)
            mu, vis_skips, ir_skips = encode_pair(self.model, degraded)
            if stage.rollout:
                return self._rollout_update(batch, clean, mu, (vis_skips, ir_skips))
            references = batch.clean  # nobody asks for them in the branch stage
            if stage.name == "coupled":
                references = reconstruct(self.model, clean, (vis_skips, ir_skips), batch.clean)
            return self._marginal_update(Encoded(clean, mu, (vis_skips, ir_skips), references))

    def _marginal_update(self, batch: Encoded) -> dict[str, float]:
        """Random steps of the marginal: restoration of both modalities, and in the coupled stage the fusion loss."""
        clean, mu = batch.clean, batch.mu
        timesteps = torch.randint(1, self.model.sde.num_steps + 1, (len(clean.vis),), generator=self.generator)
        timesteps = timesteps.to(self.device)
        noise = Pair(self._noise(mu.vis), self._noise(mu.ir))
        if self.stage.name == "coupled" and self.model.config.coupling != "none":
            return self._coupled_update(batch, timesteps, noise)
        vis_loss, ir_loss = restoration_loss(self.model, clean, mu, timesteps, noise)
        self._descend(vis_loss + ir_loss, self.parameters)
        return {"vis": float(vis_loss.detach()), "ir": float(ir_loss.detach())}

    def _coupled_update(self, batch: Encoded, timesteps: Tensor, noise: Pair) -> dict[str, float]:
        """Restoration and fusion loss, each moving what `updates` says.

        "alternating" is published: restoration moves both branches and TIM, then fusion moves TIM. "decoupled": each
        task its own, restoration the branches and fusion TIM. "joint": one step of everything down the sum, with the
        fusion loss on the branches' own estimates, so that it reaches them too. "separated": restoration alone for the
        first half of the stage, then fusion alone, of TIM, with the branches at rest.
        """
        updates = self.stage.updates
        losses: dict[str, float] = {}
        if updates != "separated" or self._progress() < 0.5:
            state, prediction = predict_marginal(self.model, batch.clean, batch.mu, timesteps, noise)
            vis_loss, ir_loss = prediction_losses(self.model, state, prediction, batch.clean, batch.mu, timesteps)
            losses = {"vis": float(vis_loss.detach()), "ir": float(ir_loss.detach())}
            if updates == "joint":
                estimates = clean_latents(self.model.sde, prediction, state, batch.mu, timesteps)
                fusion = self._fusion_losses(estimates, batch.skips, batch.references)
                self._descend(vis_loss + ir_loss + _sum(fusion), self.parameters)
                return losses | _reported(fusion)
            branches = list(self.model.denoiser.parameters())
            self._descend(vis_loss + ir_loss, branches if updates == "decoupled" else self.parameters)
            if updates == "separated":
                return losses
        return losses | self._fusion_update(batch.clean, batch.skips, batch.references)

    def _rollout_update(self, batch: Batch, clean: Pair, mu: Pair, skips: tuple[Skips, Skips]) -> dict[str, float]:
        """Restoration through the sampler's own trajectory to the image, then the fusion update on its result."""
        stage = self.stage
        size = (batch.clean.vis.shape[-2], batch.clean.vis.shape[-1])
        steps = None
        if stage.rollout_steps:
            pick = float(torch.rand(1, generator=self.generator))
            steps = stage.rollout_steps[int(pick * len(stage.rollout_steps))]
        result, estimates = rollout(self.model, mu, lambda: Pair(self._noise(mu.vis), self._noise(mu.ir)), steps)
        losses: dict[str, Tensor] = {}
        for name, index in (("vis", 0), ("ir", 1)):
            image = self.model.autoencoder.decode(result[index], skips[index], size).float()
            losses[name] = stage.image_weight * image_loss(image, batch.clean[index], stage.log_weight)
            latent = sum(matching_loss(estimate[index], clean[index]) for estimate in estimates) / len(estimates)
            losses[f"{name}_latent"] = stage.latent_weight * torch.as_tensor(latent)
        self._descend(_sum(losses), self.parameters)
        detached = Pair(result.vis.detach(), result.ir.detach())
        return _reported(losses) | self._fusion_update(detached, skips, batch.clean)

    def _fusion_update(self, clean: Pair, skips: tuple[Skips, Skips], references: Pair) -> dict[str, float]:
        losses = self._fusion_losses(clean, skips, references)
        self._descend(_sum(losses), self.fusion_parameters)
        return _reported(losses)

    def _fusion_losses(self, clean: Pair, skips: tuple[Skips, Skips], references: Pair) -> dict[str, Tensor]:
        """The stage's fusion losses on the first `fusion_batch` items."""
        stage, count = self.stage, self.stage.fusion_batch or len(clean.vis)
        vis_skips, ir_skips = (tuple(skip[:count] for skip in part) for part in skips)
        latents, images = (Pair(pair.vis[:count], pair.ir[:count]) for pair in (clean, references))
        targets = FusionTargets(stage.intensity_target, stage.gradient_target)
        terms, image = final_fusion_loss(self.model, latents, (vis_skips, ir_skips), images, targets)
        losses = {name: stage.fusion_weight * getattr(terms, name) for name in ("intensity", "gradient", "colour")}
        if stage.fusion_log_weight > 0:
            losses["fused"] = stage.fusion_log_weight * log_error(image, strongest(images.vis, images.ir))
        return losses

    def _descend(self, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        moved = {id(parameter) for parameter in parameters}
        for parameter in self.parameters:
            if id(parameter) not in moved:
                parameter.grad = None
        self.group.average([parameter.grad for parameter in parameters if parameter.grad is not None])
        nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.optimizer.step()

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def finish_stage(self) -> bool:
        """Take the averaged weights over (after an early end the best ones), go to the next stage. False: none left."""
        self.average.update(self.model)
        ended_early = self.best is not None and self.is_exhausted
        self.model.load_state_dict(self.best.weights if ended_early and self.best else self.average.weights)
        if self.stage_index + 1 == len(self.config.stages):
            return False
        self.stage_index += 1
        self.start_stage()
        return True

    def start_from(self, weights: Mapping[str, Tensor], parts: tuple[str, ...] = ("",)) -> None:
        """Begin the present stage with given weights instead of random ones, or with those that start with `parts`.

        Weights from before there was an exposure estimator leave it as the identity.
        Raises CheckpointError if a weight of the model that is asked for is not among them, or has another shape.
        """
        own = self.model.state_dict()
        has_exposure = any(name.startswith("exposure.") for name in weights)
        asked = [name for name in own if name.startswith(parts) and (has_exposure or not name.startswith("exposure."))]
        if missing := [name for name in asked if name not in weights]:
            raise CheckpointError(f"{len(missing)} weights to start from are missing, such as {missing[0]}")
        if wrong := [name for name in asked if weights[name].shape != own[name].shape]:
            shapes = f"{tuple(weights[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
            raise CheckpointError(f"{len(wrong)} weights to start from have another shape: {wrong[0]} has {shapes}")
        if not asked:
            raise CheckpointError(f"the model has no weights whose names start with {' or '.join(parts)}")
        self.model.load_state_dict(own | {name: weights[name] for name in asked})
        self.start_stage()

    def skip_to(self, name: StageName) -> None:
        """Begin with a later stage. Raises ConfigError if the configuration has none of that name."""
        names = [stage.name for stage in self.config.stages]
        if name not in names:
            raise ConfigError(f"no stage {name!r} in this configuration; it has {', '.join(names)}")
        self.stage_index = names.index(name)
        self.start_stage()

    @contextmanager
    def averaged(self) -> Iterator[ReCoFuse]:
        """The model with its averaged weights, put back afterwards."""
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.weights)
        try:
            yield self.model
        finally:
            self.model.load_state_dict(own)

    def save(self, path: Path) -> None:
        """Write the whole state, atomically; every process of a group must call it."""
        state = {
            "config": json.dumps(asdict(self.config)),
            "stage_index": self.stage_index,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "model": self.model.state_dict(),
            "average": self.average.weights,
            "average_updates": self.average.num_updates,
            "optimizer": self.optimizer.state_dict(),
            "generators": self.group.gather(self.generator.get_state()),
            "best_score": None if self.best is None else self.best.score,
            "best_weights": None if self.best is None else self.best.weights,
            "num_without_gain": self.num_without_gain,
        }
        if not self.group.is_first:
            return
        temporary = path.with_suffix(".partial")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def resume(self, path: Path) -> None:
        """Go on from a saved state. Raises CheckpointError if it is unreadable or of another configuration."""
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.device)
            if state["config"] != json.dumps(asdict(self.config)):
                raise CheckpointError(f"{path} was written with another configuration; remove it to start anew")
            self.stage_index = state["stage_index"]
            self.start_stage()
            self.step, self.elapsed_s = state["step"], state["elapsed_s"]
            self.model.load_state_dict(state["model"])
            self.average.weights, self.average.num_updates = state["average"], state["average_updates"]
            self.optimizer.load_state_dict(state["optimizer"])
            if len(state["generators"]) != self.group.size:
                raise CheckpointError(
                    f"{path} was written by {len(state['generators'])} processes, this run has {self.group.size}"
                )
            self.generator.set_state(state["generators"][self.group.rank].cpu())
            if state["best_score"] is not None:
                self.best = BestWeights(state["best_score"], state["best_weights"])
            self.num_without_gain = state["num_without_gain"]
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is not a training state: {error}") from error


def _sum(losses: Mapping[str, Tensor]) -> Tensor:
    return sum(losses.values(), torch.zeros(()))


def _reported(losses: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(loss.detach()) for name, loss in losses.items()}


def _is_decoder(name: str) -> bool:
    """Whether a parameter of the compact autoencoder lies behind the latent or the skips."""
    return not name.startswith(("stem", "encoder", "down", "to_latent"))


# --- the run ----------------------------------------------------------------------------------------------------------


def read_images(root: Path, split: str = "") -> Iterator[RawPair]:
    """Every pair below a folder, or of one split of it, with its degraded files where it has them."""

    def pixels(image: Tensor | None) -> np.ndarray | None:
        if image is None:
            return None
        levels: np.ndarray = image.permute(1, 2, 0).contiguous().numpy()
        return levels[..., 0] if levels.shape[2] == 1 else levels

    for files in find_pairs(root, split=split or None):
        pair = read_pair(files)
        vis, ir = pair.vis.permute(1, 2, 0).contiguous().numpy(), pair.ir[0].numpy()
        yield RawPair(files.name, vis, ir, pixels(pair.vis_degraded), pixels(pair.ir_degraded), files.source)


class Validation:
    """Restoration scores of a model on a fixed set of degraded centre crops."""

    SIDE = 256
    SEED = 11

    def __init__(self, config: DataConfig, root: Path) -> None:
        generator = Generator().manual_seed(self.SEED)
        self.items: list[tuple[Pair, Pair]] = []
        for pair in read_images(root, config.validation_split):
            if pair.starts_with(config.exclude_prefixes):
                continue
            clean_vis, clean_ir = self._centre(pair.vis), self._centre(pair.ir)
            strength = config.strengths[0]
            low_vis = degrade_vis(clean_vis, generator, strength).image
            low_ir = degrade_ir(clean_ir, generator, strength).image
            if pair.vis_degraded is not None:
                low_vis = self._centre(pair.vis_degraded)
            if pair.ir_degraded is not None:
                low_ir = self._centre(pair.ir_degraded)
            self.items.append((Pair(clean_vis[None], clean_ir[None]), Pair(low_vis[None], low_ir[None])))

    def _centre(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) or (H, W) levels to the crop (C, H', W') in [0, 1]."""
        height, width = (min(side, self.SIDE) for side in image.shape[:2])
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        pixels = np.atleast_3d(image)[top : top + height, left : left + width]
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    def __call__(self, model: ReCoFuse) -> tuple[dict[str, float], list[Tensor]]:
        """Mean PSNR of both modalities before and after, in dB, and a few rows (3, H, W) of pictures."""
        sums = dict.fromkeys(("vis_degraded", "vis", "ir_degraded", "ir"), 0.0)
        rows: list[Tensor] = []
        for clean, degraded in self.items:
            device = next(model.parameters()).device
            output = model.fuse(degraded.vis.to(device), degraded.ir.to(device))
            if output.vis is None or output.ir is None or output.fused is None:
                raise NumericsError("the model left an output out")
            sums["vis_degraded"] += float(psnr(degraded.vis[0], clean.vis[0]))
            sums["ir_degraded"] += float(psnr(degraded.ir[0], clean.ir[0]))
            vis, ir, fused = output.vis[0].cpu(), output.ir[0].cpu(), output.fused[0].cpu()
            sums["vis"] += float(psnr(vis, clean.vis[0]))
            sums["ir"] += float(psnr(ir, clean.ir[0]))
            if len(rows) < 4:
                grey = (degraded.ir[0].expand(3, -1, -1), ir.expand(3, -1, -1))
                rows.append(torch.cat([degraded.vis[0], vis, *grey, fused], dim=2))
        return {name: total / len(self.items) for name, total in sums.items()}, rows


def train_from_config(
    path: Path,
    output: Path,
    *,
    initial: Path | None = None,
    first_stage: StageName | None = None,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> Path:
    """Run every stage of a configuration file; returns the checkpoint that `load_pretrained` reads.

    `output` receives state.pt (a run that finds one of its own configuration goes on from it), tensorboard/,
    best.safetensors (the averaged weights of a stage's best validation) and, after every stage, STAGE.safetensors; the
    last one is also model.safetensors. `initial` is a checkpoint to start from, `first_stage` skips the stages before
    it. In a group of processes each calls this with a device of its own.
    Raises ConfigError, DatasetError, CheckpointError or NumericsError.
    """
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    config = read_config(path)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    pairs = list(read_images(path.parent / config.data.root, config.data.split))
    source = PairSource(config.data, pairs)
    frames = None
    if config.data.references and any(stage.name == "exposure" for stage in config.stages):
        known = [pair for pair in pairs if not pair.starts_with(config.data.exclude_prefixes)]
        references = read_references(path.parent / config.data.references)
        frames = FrameSource(((pair.name, pair.vis, pair.ir) for pair in known), references)
    trainer = Trainer(config, source, device, frames)
    validation_root = config.data.validation_root
    validation = Validation(config.data, path.parent / validation_root) if validation_root else None
    is_writer = trainer.group.is_first
    output.mkdir(parents=True, exist_ok=True)
    state_path = output / "state.pt"
    if initial is not None:
        trainer.start_from(load_checkpoint(initial).state)
    if first_stage is not None:
        trainer.skip_to(first_stage)
    if state_path.exists():
        trainer.resume(state_path)

    def write(target: Path, weights: Mapping[str, Tensor], stage: StageConfig) -> None:
        if is_writer:
            provenance = {"stage": stage.name, "config": asdict(config), "torch": torch.__version__}
            save_checkpoint(
                target,
                weights,
                trainer.model.config,
                name=config.preset,
                version=config.version,
                preset=config.preset,
                provenance=provenance,
            )

    writer = SummaryWriter(str(output / "tensorboard")) if is_writer else None
    written = output / "model.safetensors"
    try:
        while True:
            stage = trainer.stage
            with tqdm(total=100.0, desc=stage.name, unit="%", disable=quiet or not is_writer, bar_format=_BAR) as bar:
                for report in trainer.run_stage():
                    bar.update(100 * report.progress - bar.n)
                    if writer and report.step % config.log_interval == 0:
                        _log(writer, report)
                        bar.set_postfix({name: f"{loss:.4f}" for name, loss in report.losses.items()}, refresh=False)
                    is_due = report.step % config.validation_interval == 0 and stage.name in ("branches", "coupled")
                    if validation and is_due:
                        with trainer.averaged() as model:
                            scores, rows = validation(model)
                        if trainer.judge(scores["vis"] + scores["ir"]) and trainer.best:
                            write(output / "best.safetensors", trainer.best.weights, stage)
                        if writer:
                            bar.write(f"{report.step} " + ", ".join(f"{name} {x:.2f} dB" for name, x in scores.items()))
                            for name, score in scores.items():
                                writer.add_scalar(f"{stage.name}/psnr_{name}", score, report.step)
                            for index, row in enumerate(rows):
                                writer.add_image(f"{stage.name}/{index}", row.clamp(0, 1), report.step)
                    if report.step % config.checkpoint_interval == 0:
                        trainer.save(state_path)
            is_last = not trainer.finish_stage()
            for target in [output / f"{stage.name}.safetensors"] + [written] * is_last:
                write(target, trainer.model.state_dict(), stage)
            if is_last:
                return written
            trainer.save(state_path)
    finally:
        if writer:
            writer.close()


_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def _log(writer: "SummaryWriter", report: StepReport) -> None:
    for name, loss in report.losses.items():
        writer.add_scalar(f"{report.stage}/{name}", loss, report.step)
    writer.add_scalar(f"{report.stage}/learning_rate", report.learning_rate, report.step)
