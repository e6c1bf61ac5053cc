"""`recofuse train` and `ablate`: models are made, and the paper's ablations of them are compared."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from service.command.environment import is_torchrun, local_rank
from service.command.options import Device
from service.command.terminal import err, out
from service.terms.errors import InvalidInputError


def train(
    config: Annotated[Path, typer.Argument(help="Training configuration (TOML), such as configs/compact.toml.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the run; a run found there is resumed.")
    ] = Path("runs/compact"),
    initial: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    first_stage: Annotated[
        str | None, typer.Option(metavar="tone|autoencoder|branches|coupled", help="Skip the stages before this one.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train a model in its stages, and write the checkpoint that every other verb reads.

    Under torchrun every process trains on a share of its own: torchrun --nproc-per-node 4 -m service train CONFIG.
    """
    if first_stage not in (None, *(stages := ("tone", "autoencoder", "branches", "coupled"))):
        raise InvalidInputError(f"first-stage: {first_stage!r} is not one of {', '.join(stages)}")
    if missing := [name for name in ("tensorboard", "tqdm") if importlib.util.find_spec(name) is None]:
        raise InvalidInputError(f"training needs {' and '.join(missing)}: pip install 'recofuse[train]'")
    import torch

    from recofuse_core.training import train_from_config

    if device == "auto":
        device = f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
    if is_group := is_torchrun():
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        written = train_from_config(
            config, output, initial=initial, first_stage=cast("Any", first_stage), device=device
        )
    finally:
        if is_group:
            torch.distributed.destroy_process_group()
    out.print(f"wrote {written}", markup=False, soft_wrap=True)


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

    from recofuse_core import ablations
    from recofuse_core.runtime import named_device

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
