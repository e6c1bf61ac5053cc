"""`recofuse train-cues`: the networks behind calibration are made from registered pairs and generated streets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from service.command.extras import require
from service.command.options import Threads
from service.command.terminal import err, out
from service.terms.errors import InvalidInputError

if TYPE_CHECKING:
    from recofuse_core.likeness.teaching import Step

TOLD_EVERY = 50  # steps
WRITTEN_EVERY = 250


def train_cues(
    pairs: Annotated[
        list[Path] | None, typer.Option(help="Folder with vis and ir, registered; may be given more than once.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for cues_vis.onnx and cues_ir.onnx.")] = Path(
        "runs/cues"
    ),
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="SET", help="Leave out a data set: pairs whose names begin so, up to - or _."),
    ] = None,
    streets: Annotated[int, typer.Option(min=0, help="Generated streets to learn from beside.")] = 40,
    steps: Annotated[int, typer.Option(min=1, help="Steps at the most.")] = 3000,
    minutes: Annotated[
        float, typer.Option(help="Minutes of steps at the most, to whose end the rate falls.")
    ] = math.inf,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and of all that is drawn.")] = 0,
    threads: Threads = 0,
) -> None:
    """Train the networks that calibration looks through beside edges (docs/rigs.md).

    Their files are written every 250 steps and at the end. A run begins anew; it is not resumed.
    """
    if not pairs and not streets:
        raise InvalidInputError("train-cues needs --pairs, --streets or both")
    if exclude and not pairs:
        raise InvalidInputError("exclude: there are no --pairs to leave anything out of")
    if not minutes > 0:
        raise InvalidInputError(f"minutes: must be more than 0, got {minutes:g}")
    if output.exists() and not output.is_dir():
        raise InvalidInputError(f"output: {output} is no folder")
    require("cv2")
    require("onnx")  # with which the files are written, at the end
    import torch

    from recofuse_core.likeness.network import write_graphs
    from recofuse_core.likeness.teaching import Plan, Teacher, lessons_of, teach
    from recofuse_core.threads import use_threads
    from recofuse_rigs.placing import placed_sets

    def say(line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)

    use_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    lessons = lessons_of(placed_sets(pairs or [], exclude or [], say), streets)
    torch.manual_seed(seed)  # initial weights; everything later draws from the plan's
    teacher = Teacher()
    untold: list[Step] = []
    for step in teach(teacher, lessons, Plan(steps=steps, seed=seed), minutes * 60):
        untold.append(step)
        if len(untold) == TOLD_EVERY:
            say(_told(untold))
            untold = []
        if (step.number + 1) % WRITTEN_EVERY == 0:
            write_graphs(teacher.network, output)
    if untold:
        say(_told(untold))
    paths = write_graphs(teacher.network, output)
    out.print(f"wrote {' and '.join(str(path) for path in paths)}", markup=False, soft_wrap=True)


def _told(steps: Sequence[Step]) -> str:
    """Means over the steps since the last line."""
    search, search_found = fmean(step.search for step in steps), fmean(step.search_found for step in steps)
    refinement = fmean(step.refinement for step in steps)
    refinement_found = fmean(step.refinement_found for step in steps)
    return (
        f"step {steps[-1].number + 1}: search {search:.3f}, {search_found:.0%} found; "
        f"refinement {refinement:.3f}, {refinement_found:.0%} found"
    )
