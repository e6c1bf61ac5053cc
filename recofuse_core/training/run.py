"""A whole run from a configuration file: data, stages, checkpoints, a progress bar and TensorBoard."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recofuse_core.checkpoint import load_state, save_checkpoint
from recofuse_core.threads import use_threads
from recofuse_core.training.config import StageConfig, StageName, read_config
from recofuse_core.training.exposure import FrameSource, read_references
from recofuse_core.training.pairs import PairSource, read_images
from recofuse_core.training.trainer import StepReport, Trainer
from recofuse_core.training.validation import Validation

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


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
    last one is also model.safetensors. `first_stage` skips the stages before it. `initial` is a checkpoint to start
    from, of this recipe or an earlier one (see `Trainer.start_from`). In a group of processes each calls this with a
    device of its own.
    Raises ConfigError, DatasetError, CheckpointError or NumericsError.
    """
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    config = read_config(path)
    use_threads(config.num_threads)
    pairs = list(read_images(path.parent / config.data.root, config.data.split))
    source = PairSource(config.data, pairs)
    frames = None
    if config.data.references and any(stage.asks_for_references for stage in config.stages):
        known = [pair for pair in pairs if not pair.starts_with(config.data.exclude_prefixes)]
        references = read_references(path.parent / config.data.references)
        frames = FrameSource(((pair.name, pair.vis, pair.ir) for pair in known), references)
    trainer = Trainer(config, source, device, frames)
    validation_root = config.data.validation_root
    validation = Validation(config.data, path.parent / validation_root) if validation_root else None
    is_writer = trainer.group.is_first
    output.mkdir(parents=True, exist_ok=True)
    state_path = output / "state.pt"
    if first_stage is not None:
        trainer.skip_to(first_stage)  # first: which stages are to come decides what may begin anew
    if initial is not None:
        trainer.start_from(load_state(initial))
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
                    is_due = report.step % config.validation_interval == 0 and stage.name in _VALIDATED
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


_VALIDATED = ("branches", "coupled", "detail")  # stages whose pictures tell how far they are
_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def _log(writer: "SummaryWriter", report: StepReport) -> None:
    for name, loss in report.losses.items():
        writer.add_scalar(f"{report.stage}/{name}", loss, report.step)
    writer.add_scalar(f"{report.stage}/learning_rate", report.learning_rate, report.step)
