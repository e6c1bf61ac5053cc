"""The paper's ablations, Models I to VIII, trained under one budget beside the whole model. See docs/ablations.md.

What is compared is the coupled stage: branches and TIM start from random weights behind a frozen autoencoder (and tone
curves) that all runs share, see the same degraded crops, encoded once, take the same number of steps, and are scored on
the same degraded validation pairs. A variant is nothing but settings of the model and of the stage, so each can be
trained at full scale by the same keys of a training configuration.

Runs are kept in folders of their own: a second call goes on where the first one stopped, and several calls may share
the work by naming different variants once the crops are there.
"""

import hashlib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Generator

from recofuse_core.checkpoint import load_pretrained, pretrained_header, save_checkpoint
from recofuse_core.config import build_config
from recofuse_core.data import find_pairs, read_pair, write_image
from recofuse_core.degradations.recipes import Strength
from recofuse_core.errors import ConfigError
from recofuse_core.evaluation.protocol import MODEL, EvaluationSettings, evaluate
from recofuse_core.evaluation.report import Report
from recofuse_core.model import ReCoFuse
from recofuse_core.threads import use_threads
from recofuse_core.training.config import TrainConfig, parse_config
from recofuse_core.training.latents import Encoded, LatentSource
from recofuse_core.training.pairs import PairSource, read_images
from recofuse_core.training.trainer import Trainer

WHOLE = "whole"
SHARED_PARTS = ("autoencoder.", "tone.")  # taken from the initial weights, never trained here


@dataclass(frozen=True)
class Variant:
    """One row of the table: what differs from the whole model, as keys of [model] and of the stage."""

    name: str
    title: str
    model: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant(WHOLE, "whole model"),
    Variant("no-tim", "I: no TIM", model={"coupling": "none"}),
    Variant("late", "II: TIM at the end alone", model={"coupling": "late"}),
    Variant("no-time", "III: TIM without time", model={"fusion": {"uses_time": False}}),
    Variant("separated", "IV: separated", stage={"updates": "separated"}),
    Variant("joint", "V: joint", stage={"updates": "joint"}),
    Variant("decoupled", "VI: decoupled alternation", stage={"updates": "decoupled"}),
    Variant("mean-intensity", "VII: mean intensity", stage={"intensity_target": "mean"}),
    Variant("mean-gradient", "VIII: mean gradient", stage={"gradient_target": "mean"}),
    Variant("signed-gradient", "ours: signed gradient", stage={"gradient_target": "signed"}),
)

COLUMNS = {  # of the tables: a score's key, its heading and its digits
    "vis_psnr_db": ("vis PSNR, dB", 2),
    "ir_psnr_db": ("ir PSNR, dB", 2),
    "mi": ("MI", 3),
    "vif": ("VIF", 3),
    "qabf": ("Qabf", 3),
    "ssim": ("SSIM", 3),
    "sd": ("SD", 2),
    "max_corr_gradient": ("corr max grad", 3),
    "max_ssim_intensity": ("SSIM max", 3),
}


@dataclass(frozen=True)
class AblationConfig:
    """What all runs share, the [ablation] table of the file."""

    train: TrainConfig  # of the whole model; one coupled stage without rollout
    initial: str = "compact"  # weights that give the autoencoder and the tone curves
    num_crops: int = 2000
    num_seeds: int = 3
    validation_side: int = 256  # of the validation pairs' centre crops
    strength: Strength = "medium"


@dataclass(frozen=True)
class Result:
    """The scores of one run, by the keys of docs/evaluation.md."""

    variant: str
    seed: int
    scores: dict[str, float]


def read_ablations(path: Path) -> AblationConfig:
    """A training configuration with an [ablation] table. Raises ConfigError."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        shared = raw.pop("ablation", {})
        config: AblationConfig = build_config(AblationConfig, {"train": parse_config(raw, path)} | shared, "ablation")
    except (OSError, tomllib.TOMLDecodeError, ConfigError, TypeError) as error:
        raise ConfigError(f"{path} is not a configuration of ablations: {error}") from error
    stages = config.train.stages
    if len(stages) != 1 or stages[0].name != "coupled" or stages[0].rollout:
        raise ConfigError(f"{path}: ablations compare one coupled stage without rollout")
    if not config.train.data.validation_root:
        raise ConfigError(f"{path}: ablations need data.validation_root")
    return config


def config_of(config: AblationConfig, variant: Variant, seed: int) -> TrainConfig:
    """The training configuration of one run."""
    train = config.train
    model = dict(train.model)
    for name, value in variant.model.items():
        model[name] = model.get(name, {}) | value if isinstance(value, dict) else value
    return replace(train, model=model, stages=(replace(train.stages[0], **variant.stage),), seed=train.seed + seed)


def chosen_variants(names: Iterable[str] | None) -> tuple[Variant, ...]:
    """The variants of these names, all of them if None. Raises ConfigError for an unknown name."""
    known = {variant.name: variant for variant in VARIANTS}
    names = tuple(known) if names is None else tuple(names)
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(f"unknown variants {', '.join(unknown)}; known: {', '.join(known)}")
    return tuple(known[name] for name in names)


def run_ablations(
    path: Path,
    output: Path,
    *,
    variants: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Train and score what is missing below `output`; returns every result of the configuration that is there.

    Seed by seed, so that an interrupted call leaves whole comparisons. Raises ConfigError, DatasetError,
    CheckpointError or NumericsError.
    """
    config = read_ablations(path)
    use_threads(config.train.num_threads)
    chosen = chosen_variants(variants)
    initial = load_pretrained(config.initial, device=device)
    source: LatentSource | None = None
    for seed in range(config.num_seeds):
        for variant in chosen:
            folder = output / f"{variant.name}-{seed}"
            train = config_of(config, variant, seed)
            if read_result(folder, config, train) is not None:
                continue
            source = source or crops_of(config, path.parent, output, initial)
            result = _run(config, variant, seed, source, initial, folder, validation_pairs(config, path.parent, output))
            say(f"{variant.title}, seed {seed}: " + ", ".join(_cells(result.scores)))
    return collect(config, output)


def collect(config: AblationConfig, output: Path) -> list[Result]:
    """Every result of this configuration below a folder, seed by seed in the order of the table."""
    found = (
        read_result(output / f"{variant.name}-{seed}", config, config_of(config, variant, seed))
        for seed in range(config.num_seeds)
        for variant in VARIANTS
    )
    return [result for result in found if result is not None]


def crops_of(config: AblationConfig, base: Path, output: Path, initial: ReCoFuse) -> LatentSource:
    """The encoded crops that all runs train on, made by the first call."""
    stage, data = config.train.stages[0], config.train.data
    made_of = (
        asdict(data),
        pretrained_header(config.initial).checksum,
        config.num_crops,
        stage.crop,
        config.train.seed,
    )
    path = output / f"crops-{_hash(made_of)}.safetensors"
    if not path.exists():
        source = PairSource(data, read_images(base / data.root, data.split))
        generator = Generator().manual_seed(config.train.seed)
        crops = LatentSource.encode(initial, source, config.num_crops, stage.crop, generator).crops
        output.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in crops.tensors().items()}, partial)
        os.replace(partial, path)
    return LatentSource(Encoded.from_tensors(load_file(path)))


def validation_pairs(config: AblationConfig, base: Path, output: Path) -> Path:
    """A folder of the validation pairs' centre crops, made by the first call."""
    data, side, folder = config.train.data, config.validation_side, output / f"pairs-{config.validation_side}"
    if not (folder / "complete").exists():
        for files in find_pairs(base / data.validation_root, split=data.validation_split or None):
            pair = read_pair(files)
            for name, image in (("vis", pair.vis), ("ir", pair.ir)):
                height, width = image.shape[-2:]
                top, left = max(0, height - side) // 2, max(0, width - side) // 2
                cropped = image[:, top : top + side, left : left + side]
                write_image(folder / name / f"{files.vis.stem}.png", cropped)
        (folder / "complete").touch()
    return folder


def _run(
    config: AblationConfig,
    variant: Variant,
    seed: int,
    source: LatentSource,
    initial: ReCoFuse,
    folder: Path,
    pairs: Path,
) -> Result:
    train = config_of(config, variant, seed)
    trainer = Trainer(train, source, next(initial.parameters()).device)
    trainer.start_from(initial.state_dict(), SHARED_PARTS)
    for _ in trainer.run_stage():
        pass
    trainer.finish_stage()
    settings = EvaluationSettings(config.strength)
    scored = [scores for scores, _ in evaluate(trainer.model, find_pairs(pairs), settings, device=trainer.device)]
    report = Report(tuple(scored), settings)
    means = report.restoration_means(MODEL) | report.fusion_means(MODEL)
    result = Result(variant.name, seed, {name: value for name, value in means.items() if value is not None})
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        folder / "model.safetensors",
        trainer.model.state_dict(),
        trainer.model.config,
        name=f"ablation-{variant.name}",
        version=train.version,
        preset=train.preset,
        provenance={"config": asdict(train), "initial": config.initial, "torch": torch.__version__},
    )
    text = json.dumps({"config": _digest(config, train), **asdict(result)}, indent=2)
    partial = folder / "result.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, folder / "result.json")
    return result


def read_result(folder: Path, config: AblationConfig, train: TrainConfig) -> Result | None:
    """The result in a folder, None if there is none of this configuration."""
    try:
        values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if values.pop("config") != _digest(config, train):
        return None
    return Result(**values)


def _digest(config: AblationConfig, train: TrainConfig) -> str:
    shared = asdict(replace(config, train=train)) | {"num_seeds": None}  # more seeds leave the first ones as they are
    return _hash((shared, pretrained_header(config.initial).checksum))  # a release may change the weights of a name


def _hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


# --- the tables -------------------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """Mean and standard deviation over the seeds of every variant, then the differences to the whole model, Markdown.

    A difference is taken seed by seed; behind its mean stands how many of the seeds have its sign.
    """
    by_variant = [
        (variant, scores)
        for variant in VARIANTS
        if (scores := {result.seed: result.scores for result in results if result.variant == variant.name})
    ]
    heads = [heading for heading, _ in COLUMNS.values()]
    scores_rows = [
        [variant.title, str(len(scores)), *(_spread([one[name] for one in scores.values()], name) for name in COLUMNS)]
        for variant, scores in by_variant
    ]
    blocks = [_markdown(["model", "seeds", *heads], scores_rows)]
    whole = next((scores for variant, scores in by_variant if variant.name == WHOLE), {})
    differences = []
    for variant, scores in by_variant:
        shared = sorted(scores.keys() & whole.keys())
        if variant.name != WHOLE and shared:
            cells = [_difference([scores[s][name] - whole[s][name] for s in shared], name) for name in COLUMNS]
            differences.append([variant.title, str(len(shared)), *cells])
    if differences:
        blocks.append(_markdown(["less the whole model", "seeds", *heads], differences))
    return "\n\n".join(blocks) + "\n"


def _spread(values: Sequence[float], name: str) -> str:
    digits = COLUMNS[name][1]
    deviation = f" ±{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def _difference(values: Sequence[float], name: str) -> str:
    mean = fmean(values)
    agreeing = sum(value * mean > 0 for value in values)
    return f"{mean:+.{COLUMNS[name][1]}f} ({agreeing}/{len(values)})"


def _cells(scores: Mapping[str, float]) -> list[str]:
    return [f"{heading} {scores[name]:.{digits}f}" for name, (heading, digits) in COLUMNS.items()]


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
