"""`recofuse train-cues`: the networks behind calibration are made from registered pairs and generated streets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from service.command.options import Threads
from service.command.terminal import err, out
from service.terms.errors import InvalidInputError


def train_cues(
    pairs: Annotated[
        list[Path] | None, typer.Option(help="Folder with vis and ir, registered; may be given more than once.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for cues_vis.onnx and cues_ir.onnx.")] = Path(
        "runs/cues"
    ),
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="SET", help="Leave out pairs whose names begin so, up to - or _."),
    ] = None,
    streets: Annotated[int, typer.Option(min=0, help="Generated streets to learn from beside.")] = 40,
    steps: Annotated[int, typer.Option(min=1, help="Steps at the most.")] = 3000,
    minutes: Annotated[float, typer.Option(min=0, help="Minutes at the most, to whose end the rate falls.")] = math.inf,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and of all that is drawn.")] = 0,
    threads: Threads = 0,
) -> None:
    """Train the networks that calibration looks through beside edges (docs/rigs.md)."""
    if not pairs and not streets:
        raise InvalidInputError("train-cues needs --pairs, --streets or both")
    import torch

    from recofuse_core.likeness.network import write_graphs
    from recofuse_core.likeness.teaching import Plan, Teacher, lessons, teach
    from recofuse_core.threads import use_threads
    from recofuse_rigs.placing import placed_sets

    def say(line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)

    use_threads(threads)
    torch.manual_seed(seed)
    examples = lessons(placed_sets(pairs or [], exclude or [], say), streets)
    teacher = Teacher()
    for step in teach(teacher, examples, Plan(steps=steps, seed=seed), minutes * 60):
        if step.number % 50 == 0:
            say(
                f"step {step.number}: search {step.search:.3f}, {step.search_found:.0%} found; "
                f"refinement {step.refinement:.3f}, {step.refinement_found:.0%} found"
            )
    output.mkdir(parents=True, exist_ok=True)
    paths = write_graphs(teacher.network, output)
    out.print(f"wrote {' and '.join(str(path) for path in paths)}", markup=False, soft_wrap=True)
