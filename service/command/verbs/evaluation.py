"""`recofuse evaluate`: a model, baselines and other methods scored over pairs, pictures or sequences."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

import typer

from service.command.environment import WEIGHTS_VARIABLE
from service.command.options import DEFAULT_WEIGHTS, Device, Threads
from service.command.terminal import out, progress_bar
from service.terms.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from recofuse_core.data import PairFiles
    from recofuse_core.evaluation.protocol import EvaluationSettings, PairImages
    from recofuse_core.evaluation.report import Report
    from recofuse_core.model import ReCoFuse


def evaluate(
    pairs: Annotated[
        Path | None, typer.Option(help="Folder of clean pairs: vis/ and ir/ below it, or a known data set.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Instead of pairs: a folder of degraded visible pictures without a partner.")
    ] = None,
    frames: Annotated[
        Path | None, typer.Option(help="Instead: folders of consecutive frames, for flicker (docs/evaluation.md).")
    ] = None,
    streets: Annotated[int, typer.Option(min=0, help="Instead: so many generated streets, for flicker.")] = 0,
    steady: Annotated[
        bool, typer.Option(help="Of sequences: levels held steady from frame to frame, as streams have them.")
    ] = True,
    calm: Annotated[
        bool, typer.Option("--calm", help="Of sequences: noise averaged away where nothing moves, as calm streams do.")
    ] = False,
    strength: Annotated[
        str, typer.Option(help="Degradations put in: light, medium, strong; clean; given: the files have them already.")
    ] = "medium",
    exposure: Annotated[
        str, typer.Option(help="The rendition, of results and references: as_shot, or lit.")
    ] = "as_shot",
    each_kind: Annotated[
        bool, typer.Option("--each-kind", help="Put in one kind alone after the other: the named ones, or all.")
    ] = False,
    references: Annotated[Path | None, typer.Option(help="With --pictures: clean ones of the same names.")] = None,
    thermal: Annotated[
        Path | None, typer.Option(help="With --pictures: infrared of the same names, or of any other scenes.")
    ] = None,
    version: Annotated[int, typer.Option("--protocol", min=1, max=2, help="Version of the protocol.")] = 2,
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
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N pairs or pictures by name.")] = None,
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
    from recofuse_core.evaluation import kinds, protocol, sheets
    from recofuse_core.evaluation.plots import bar_plots, require_matplotlib, svg
    from recofuse_core.threads import use_threads

    asked = {"--pairs": pairs, "--pictures": pictures, "--frames": frames, "--streets": streets or None}
    _require_one(asked)
    if coupling not in ("on", "off"):
        raise InvalidInputError(f"coupling must be on or off, not {coupling}")
    if plot is not None and plot.suffix.lower() != ".svg":
        raise InvalidInputError(f"plot: the plots are SVG, so the file must end in .svg, not {plot.name}")
    if plot is not None:
        require_matplotlib()
    of_pairs = {
        "--each-kind": each_kind, "--baselines": baselines, "--others": others, "--csv": csv_path, "--plot": plot,
        "--sheet": sheet, "--split": split, "--vis-kinds": vis_kinds, "--ir-kinds": ir_kinds,
    }  # fmt: skip
    if pairs is None:
        _refuse(of_pairs, "--pairs")
    if pictures is None:
        _refuse({"--references": references, "--thermal": thermal}, "--pictures")
    if pairs is None and pictures is None:
        _refuse({"--limit": limit, "--save": save}, "--pairs or --pictures")
    if each_kind:
        _refuse({name: of_pairs[name] for name in ("--others", "--csv", "--plot", "--sheet")}, "one recipe a pair")
    folders = {}
    for item in others or ():
        name, separator, folder = item.partition("=")
        if not (name and separator and folder) or name in folders:
            raise InvalidInputError(f"others: expected NAME=DIR, each name once, got {item}")
        folders[name] = Path(folder)
    use_threads(threads)
    device = named_device(device)
    settings = protocol.EvaluationSettings(
        strength=cast(protocol.EvaluationStrength, strength),
        seed=seed,
        steps=steps,
        sampler=cast(Any, sampler),
        coupled=coupling == "on",
        with_baselines=baselines,
        vis_kinds=None if vis_kinds is None else tuple(filter(None, vis_kinds.split(","))),
        ir_kinds=None if ir_kinds is None else tuple(filter(None, ir_kinds.split(","))),
        exposure=cast(Any, exposure),
        version=version,
    )
    model = None if weights == "none" else load_pretrained(weights, device=device)
    texts: dict[Path | None, Callable[[], str]] = {}
    report: _Report
    if pairs is not None:
        files = find_pairs(pairs, split=split)[:limit]
        rows: list[Tensor] = []

        def see(name: str, images: protocol.PairImages, kind: str = "") -> None:
            if sheet is not None:
                rows.append(sheets.sheet_row(name, images))
            if save is not None:
                for part, image in images.by_part().items():
                    write_image(save / kind / part / f"{name}.png", image)

        if each_kind:
            reports = {}
            for kind, alone in kinds.each_kind(settings):
                see_kind = functools.partial(see, kind=kind.replace(" ", "_"))
                reports[kind] = _of_pairs(model, files, alone, {}, device, see_kind, f"evaluating {kind}")
            report = kinds.KindsReport(reports)
        else:
            report = plain = _of_pairs(model, files, settings, folders, device, see)
            texts |= {csv_path: plain.csv, plot: lambda: svg(bar_plots(plain))}
        if sheet is not None:
            write_image(sheet, sheets.stack_rows(rows))
    elif pictures is not None:
        report = _of_pictures(model, pictures, settings, references, thermal, limit, device, save)
    else:
        report = _of_sequences(model, frames, streets, settings, steady, calm, device)
    texts |= {
        json_path: lambda: json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n",
        markdown: report.markdown,
    }
    for path, text in texts.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(), encoding="utf-8")
    out.print(report.markdown(), markup=False, soft_wrap=True)
    out.print(report.line(), markup=False, soft_wrap=True)


class _Report(Protocol):
    """What is told of any of them."""

    def as_json(self) -> dict[str, Any]: ...

    def markdown(self) -> str: ...

    def line(self) -> str: ...


def _require_one(asked: Mapping[str, object]) -> None:
    named = [name for name, value in asked.items() if value is not None]
    if len(named) != 1:
        given = " and ".join(named) or "none"
        raise InvalidInputError(f"evaluate takes one of {', '.join(asked)}, not {given}")


def _refuse(options: Mapping[str, object], wanted: str) -> None:
    for name, value in options.items():
        if value not in (None, False):
            raise InvalidInputError(f"{name} goes with {wanted}")


def _of_pairs(
    model: ReCoFuse | None,
    files: Sequence[PairFiles],
    settings: EvaluationSettings,
    others: Mapping[str, Path],
    device: str,
    see: Callable[[str, PairImages], None],
    description: str = "evaluating",
) -> Report:
    from recofuse_core.evaluation import protocol
    from recofuse_core.evaluation.report import Report

    scores = []
    results = protocol.evaluate(model, files, settings, others=others, device=device)
    with progress_bar() as progress:
        for pair_scores, images in progress.track(results, total=len(files), description=description):
            scores.append(pair_scores)
            see(pair_scores.name, images)
    return Report(
        tuple(scores),
        settings,
        weights=model.info.name if model else None,
        version=model.info.version if model else None,
        steps=(settings.steps or model.info.default_steps) if model else None,
        sampler=(settings.sampler or model.info.default_sampler) if model else None,
    )


def _of_pictures(
    model: ReCoFuse | None,
    folder: Path,
    settings: EvaluationSettings,
    references: Path | None,
    thermal: Path | None,
    limit: int | None,
    device: str,
    save: Path | None,
) -> _Report:
    from recofuse_core.data import write_image
    from recofuse_core.evaluation.pictures import PicturesReport, evaluate_pictures

    scores = []
    results = evaluate_pictures(
        model, folder, settings, references=references, infrared=thermal, limit=limit, device=device
    )
    with progress_bar() as progress:
        for picture, restored in progress.track(results, total=None, description="evaluating"):
            scores.append(picture)
            if save is not None and model is not None:
                write_image(save / f"{picture.name}.png", restored)
    info = None if model is None else model.info
    return PicturesReport(tuple(scores), settings, info.name if info else None, info.version if info else None)


def _of_sequences(
    model: ReCoFuse | None,
    folder: Path | None,
    streets: int,
    settings: EvaluationSettings,
    is_steady: bool,
    is_calm: bool,
    device: str,
) -> _Report:
    from recofuse_core.evaluation.sequences import (
        SequencesReport,
        evaluate_sequences,
        find_sequences,
        generated_streets,
    )

    if model is None:
        raise InvalidInputError("flicker is of a model's pictures: weights cannot be none")
    sequences = generated_streets(streets, settings.seed) if folder is None else find_sequences(folder)
    results = evaluate_sequences(model, sequences, settings, is_steady=is_steady, is_calm=is_calm, device=device)
    with progress_bar() as progress:
        scores = tuple(progress.track(results, total=len(sequences), description="evaluating"))
    return SequencesReport(scores, settings, model.info.name, model.info.version, is_steady, is_calm)
