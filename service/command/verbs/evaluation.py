"""`recofuse evaluate`: a model, baselines and other methods scored over a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from service.command.environment import WEIGHTS_VARIABLE
from service.command.options import DEFAULT_WEIGHTS, Device, Threads
from service.command.terminal import out, progress_bar
from service.terms.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable


def evaluate(
    pairs: Annotated[Path, typer.Option(help="Folder of clean pairs: vis/ and ir/ below it, or a known data set.")],
    strength: Annotated[
        str, typer.Option(help="Degradations put in: light, medium, strong; clean; given: the files have them already.")
    ] = "medium",
    split: Annotated[str | None, typer.Option(help="Only this split of a data set: train, val or test.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the protocol.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps; the model's own if unset.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="euler, posterior, ode1 or ode2; the model's own if unset.")
    ] = None,
    vis_kinds: Annotated[
        str | None, typer.Option(metavar="KIND,...", help="Put exactly these into vis (docs/degradations.md).")
    ] = None,
    ir_kinds: Annotated[str | None, typer.Option(metavar="KIND,...", help="And these into ir.")] = None,
    coupling: Annotated[str, typer.Option(help="on, or off: each branch restores alone.")] = "on",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N pairs by name.")] = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also score fusion after OpenCV enhancement.")] = False,
    others: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Also score a folder of another method's fused images.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write one line a pair and method.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write bar plots of the means, as SVG.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a sheet of small pictures.")] = None,
    save: Annotated[Path | None, typer.Option(help="Folder for all pictures at full size.")] = None,
    weights: Annotated[
        str, typer.Option(envvar=WEIGHTS_VARIABLE, metavar="NAME_OR_PATH", help="As for fuse; none: run no model.")
    ] = DEFAULT_WEIGHTS,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Score a model, baselines and other methods by the protocol of docs/evaluation.md."""
    import json

    from recofuse_core import load_pretrained
    from recofuse_core.data import find_pairs, write_image
    from recofuse_core.devices import named_device
    from recofuse_core.evaluation import protocol, sheets
    from recofuse_core.evaluation.plots import bar_plots, require_matplotlib, svg
    from recofuse_core.evaluation.report import Report
    from recofuse_core.threads import use_threads

    if coupling not in ("on", "off"):
        raise InvalidInputError(f"coupling must be on or off, not {coupling}")
    if plot is not None and plot.suffix.lower() != ".svg":
        raise InvalidInputError(f"plot: the plots are SVG, so the file must end in .svg, not {plot.name}")
    if plot is not None:
        require_matplotlib()
    folders = {}
    for item in others or ():
        name, separator, folder = item.partition("=")
        if not (name and separator and folder) or name in folders:
            raise InvalidInputError(f"others: expected NAME=DIR, each name once, got {item}")
        folders[name] = Path(folder)
    use_threads(threads)
    device = named_device(device)
    files = find_pairs(pairs, split=split)[:limit]
    model = None if weights == "none" else load_pretrained(weights, device=device)
    settings = protocol.EvaluationSettings(
        strength=cast(protocol.EvaluationStrength, strength),
        seed=seed,
        steps=steps,
        sampler=cast(Any, sampler),
        coupled=coupling == "on",
        with_baselines=baselines,
        vis_kinds=None if vis_kinds is None else tuple(filter(None, vis_kinds.split(","))),
        ir_kinds=None if ir_kinds is None else tuple(filter(None, ir_kinds.split(","))),
    )
    scores, rows = [], []
    results = protocol.evaluate(model, files, settings, others=folders, device=device)
    with progress_bar() as progress:
        for pair_scores, images in progress.track(results, total=len(files), description="evaluating"):
            scores.append(pair_scores)
            if sheet is not None:
                rows.append(sheets.sheet_row(pair_scores.name, images))
            if save is not None:
                for part, image in images.by_part().items():
                    write_image(save / part / f"{pair_scores.name}.png", image)
    report = Report(
        tuple(scores),
        settings,
        weights=model.info.name if model else None,
        version=model.info.version if model else None,
        steps=(steps or model.info.default_steps) if model else None,
        sampler=(sampler or model.info.default_sampler) if model else None,
    )
    texts: dict[Path | None, Callable[[], str]] = {
        json_path: lambda: json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n",
        csv_path: report.csv,
        markdown: report.markdown,
        plot: lambda: svg(bar_plots(report)),
    }
    for path, text in texts.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(), encoding="utf-8")
    if sheet is not None:
        write_image(sheet, sheets.stack_rows(rows))
    out.print(report.markdown(), markup=False, soft_wrap=True)
    out.print(report.line(), markup=False, soft_wrap=True)
