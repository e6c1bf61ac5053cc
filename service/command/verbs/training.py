"""`recofuse train`, `ablate` and `export`: models are made and compared, and data made by them for other trainings."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from service.command.environment import is_torchrun, local_rank
from service.command.options import DEFAULT_WEIGHTS, Device, Threads, Weights
from service.command.terminal import err, out, progress_bar
from service.terms.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

STAGES = (
    "weather",
    "weather_odds",
    "exposure",
    "tone",
    "veil",
    "veil_fall",
    "autoencoder",
    "branches",
    "coupled",
    "detail",
)


def train(
    config: Annotated[Path, typer.Argument(help="Training configuration (TOML), such as configs/compact.toml.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the run; a run found there is resumed.")
    ] = Path("runs/compact"),
    initial: Annotated[
        Path | None, typer.Option(help="Checkpoint to start from; what does not fit begins anew in its stage.")
    ] = None,
    first_stage: Annotated[
        str | None,
        typer.Option(metavar="|".join(STAGES), help="Skip the stages before this one."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train a model in its stages, and write the checkpoint that every other verb reads.

    Under torchrun every process trains on a share of its own: torchrun --nproc-per-node 4 -m service train CONFIG.
    """
    if first_stage not in (None, *STAGES):
        raise InvalidInputError(f"first-stage: {first_stage!r} is not one of {', '.join(STAGES)}")
    if missing := [name for name in ("tensorboard", "tqdm") if importlib.util.find_spec(name) is None]:
        raise InvalidInputError(f"training needs {' and '.join(missing)}: pip install 'recofuse[train]'")
    import torch

    from recofuse_core.devices import named_device
    from recofuse_core.training.run import train_from_config

    is_group = is_torchrun()
    device = named_device(device)
    if is_group and device != "cpu":
        if device != "cuda":
            raise InvalidInputError(f"device: under torchrun each process takes the GPU of its rank, not {device} all")
        device = named_device(f"cuda:{local_rank()}")
    if is_group:
        _join_group(torch.device(device))
    try:
        written = train_from_config(
            config, output, initial=initial, first_stage=cast("Any", first_stage), device=device
        )
    finally:
        if is_group:
            torch.distributed.destroy_process_group()
    out.print(f"wrote {written}", markup=False, soft_wrap=True)


def _join_group(device: torch.device) -> None:
    """Make this process one of torchrun's. NCCL speaks from the current GPU, which is the first unless it is set."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", device_id=device)
    else:
        torch.distributed.init_process_group("gloo")


def ablate(
    config: Annotated[Path, typer.Argument(help="Configuration (TOML), such as configs/ablations.toml.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the runs; what is finished there is not run again.")
    ] = Path("runs/ablations"),
    variants: Annotated[
        list[str] | None, typer.Option("--variant", metavar="NAME", help="Only these, such as late; all if unset.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the scores of every run as JSON.")] = None,
    device: Device = "auto",
) -> None:
    """Train and score the paper's ablations under one budget (docs/ablations.md)."""
    import json

    from recofuse_core.devices import named_device
    from recofuse_core.training import ablations

    def say(line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)

    results = ablations.run_ablations(config, output, variants=variants, device=named_device(device), say=say)
    text = ablations.table(results)
    for path, content in (
        (markdown, text),
        (json_path, json.dumps([asdict(each) for each in results], indent=2) + "\n"),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    out.print(text, markup=False, soft_wrap=True)
    num_seeds = len({each.seed for each in results})
    num_variants = len({each.variant for each in results})
    out.print(f"{len(results)} runs of {num_variants} models with {num_seeds} seeds", soft_wrap=True)


def export(
    pairs: Annotated[Path, typer.Option(help="Root of a data set with labels below it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    task: Annotated[str, typer.Option(metavar="detection|segmentation", help="Which labels, in which layout.")],
    split: Annotated[str | None, typer.Option(help="Only this split: train, val or test.")] = None,
    strength: Annotated[
        str, typer.Option(help="given: the files as they are; light, medium or strong: degraded first.")
    ] = "given",
    seed: Annotated[int, typer.Option(min=0, help="Seed of degradations and noise.")] = 0,
    names: Annotated[str, typer.Option(metavar="NAME,...", help="Class names of YOLO labels, from class 0.")] = "",
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Fuse a labelled data set into one that a detector or a segmenter can be trained on (docs/training.md)."""
    from recofuse_core import load_pretrained
    from recofuse_core.data import find_pairs
    from recofuse_core.devices import named_device
    from recofuse_core.evaluation.downstream import export_pairs, plan_export
    from recofuse_core.threads import use_threads

    use_threads(threads)
    device = named_device(device)
    items = plan_export(pairs, find_pairs(pairs, split=split), cast("Any", task))
    model = load_pretrained(weights, device=device)
    written = export_pairs(
        model,
        items,
        output,
        cast("Any", task),
        root=pairs,
        strength=cast("Any", strength),
        seed=seed,
        names=tuple(filter(None, names.split(","))),
        device=device,
    )
    with progress_bar() as progress:
        done = list(progress.track(written, total=len(items), description="fusing"))
    num_labels = sum(item.label is not None for item in done)
    out.print(f"wrote {output}: {len(done)} images, {num_labels} with a label", markup=False, soft_wrap=True)
