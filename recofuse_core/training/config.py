"""What a training run is told, in one TOML file: its data, and its stages with the settings of each."""

import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from recofuse_core.config import build_config, model_config_from
from recofuse_core.degradations.recipes import Strength
from recofuse_core.errors import ConfigError
from recofuse_core.losses import GradientTarget, IntensityTarget
from recofuse_core.model import PRESETS, ModelConfig

StageName = Literal[
    "weather", "weather_odds", "exposure", "tone", "veil", "veil_fall", "autoencoder", "branches", "coupled", "detail"
]
Updates = Literal["alternating", "decoupled", "joint", "separated"]


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and how often. Prefixes are compared with a pair's name and with its data set's.

    Files that are degraded already (LQ/HQ folders, see recofuse_core/data.py) are taken as they are; what a pair lacks
    is made.
    """

    root: str  # relative to the configuration file; any layout of recofuse_core/data.py
    split: str = ""  # only this split of a data set, "train" as a rule; all if empty
    references: str = (
        ""  # exposure, lit pairs: dark, foggy and clean photographs, as exposure.py has them; none if empty
    )
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
    num_frames: int = 18_000  # all estimators but weather: degraded frames that are drawn once and kept
    lit_probability: float = 0.0  # coupled, detail: of a pair that comes lit, from the frames of the exposure stage
    weather_probability: float = 0.0  # with lit pairs: of another pair in rain, snow or fog
    rise_weight: float = 0.0  # detail: of a rise of the logarithm of a visible picture's squared error
    photo_probability: float = 0.0  # tone, detail: of a photograph, or part of one, in place of a pair
    thermal_probability: float = 0.0  # tone: of another camera's infrared frame in place of the pair's
    swap_probability: float = 0.0  # exposure, tone: of meeting the infrared frame of another pair
    spread_weight: float = 0.0  # tone: of the difference in std; averages over what may be are too flat

    def __post_init__(self) -> None:
        if self.updates not in get_args(Updates):
            raise ConfigError(f"updates must be one of {', '.join(get_args(Updates))}, got {self.updates!r}")
        if self.updates != "alternating" and (self.name != "coupled" or self.rollout):
            raise ConfigError(f"updates = {self.updates!r} belongs to a coupled stage without rollout")
        if self.rollout_steps and not (self.rollout and all(steps >= 1 for steps in self.rollout_steps)):
            raise ConfigError(f"rollout_steps = {self.rollout_steps} belongs to a rollout, of one step or more each")
        if self.lit_probability and self.name not in ("coupled", "detail"):
            raise ConfigError("lit_probability belongs to a coupled or a detail stage")
        if self.weather_probability and not self.lit_probability:
            raise ConfigError("weather_probability belongs to a stage with lit_probability")
        takes_photos = self.name == "tone" or (self.name == "detail" and self.lit_probability > 0)
        if self.photo_probability and not takes_photos:
            raise ConfigError("photo_probability belongs to a tone stage or a detail stage with lit_probability")
        if self.thermal_probability and self.name != "tone":
            raise ConfigError("thermal_probability belongs to a tone stage")
        for name, kinds in (("intensity_target", IntensityTarget), ("gradient_target", GradientTarget)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")

    @property
    def asks_for_references(self) -> bool:
        """Whether frames of `DataConfig.references` are drawn."""
        is_of_frames = self.name in ("weather", "weather_odds", "exposure", "veil", "veil_fall")
        return is_of_frames or self.lit_probability + self.photo_probability + self.thermal_probability > 0


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
    num_threads: int = 0  # CPU threads; 0: as many as the process may use

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
