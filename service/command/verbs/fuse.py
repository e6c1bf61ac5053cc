"""`recofuse fuse`: pairs of files through the model without a server, what each stage cost, and a sheet to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from service.command.environment import read_settings
from service.command.options import (
    DEFAULT_WEIGHTS,
    AlarmAt,
    Align,
    Colour,
    ColourRange,
    Degrees,
    Device,
    Exposure,
    IrRange,
    Outline,
    Threads,
    VisRange,
    Weights,
)
from service.command.terminal import SOURCES, complain, out, progress_bar
from service.terms.errors import InvalidInputError, ServiceError

if TYPE_CHECKING:
    from recofuse_images.pairs import FoundPair
    from recofuse_rigs.rig import Rig
    from recofuse_rigs.warp import Warps
    from service.command.files import Cost, Fusion, Pixels
    from service.terms.jobs import FusionOptions, Stage

MAX_SHEET_ROWS = 12  # of full-size pictures; more would be a file that no viewer opens


def fuse(
    vis: Annotated[Path, typer.Option(help="Visible image, or a folder of them and of folders.")],
    ir: Annotated[
        Path,
        typer.Option(
            help="Infrared image, or a folder: files of the same names, or of names that differ by a word such as vis "
            "and ir, RGB and T. May be the folder of --vis, if such words tell the files apart."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Fused image to write, or a folder for them.")],
    all_: Annotated[
        bool, typer.Option("--all", help="Write the restored inputs too, as NAME_vis and NAME_ir.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps; the model's own if unset.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="euler, posterior, ode1 or ode2; the model's own if unset.")
    ] = None,
    exposure: Exposure = None,
    rig: Annotated[
        Path | None, typer.Option(help="Rig file of the cameras; infrared is laid on the visible frame by it.")
    ] = None,
    align: Align = "rig",
    colour: Colour = "natural",
    colour_range: ColourRange = None,
    values: Annotated[
        str | None,
        typer.Option(
            metavar="npy|tiff|png",
            help="Also write the restored infrared in the values of its source, as NAME_values.",
        ),
    ] = None,
    degrees: Degrees = None,
    alarm: AlarmAt = None,
    outline: Outline = False,
    keep_metadata: Annotated[
        bool,
        typer.Option("--keep-metadata", help="Copy what the files say of themselves: camera, time, place (EXIF, XMP)."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise; equal seeds give equal pictures.")] = 0,
    vis_range: VisRange = None,
    ir_range: IrRange = None,
    sheet: Annotated[Path | None, typer.Option(help="Also write inputs and results side by side.")] = None,
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Fuse one pair of files, or folders of pairs matched by file name (docs/training.md, How names pair)."""
    from service.work.engine import PassOptions
    from service.work.engines import model_engine

    settings = read_settings()
    # What runs the model is asked for first: its extra brings the codecs too.
    asked_engine = {"model": weights, "device": device, "num_threads": threads}
    engine = model_engine(settings.engine.model_copy(update=asked_engine))
    from recofuse_images.pairs import told
    from service.command.files import (
        beside_of,
        contact_sheet,
        fuse_files,
        match_pairs,
        paths_of_parts,
        told_alarm,
        write_picture,
    )
    from service.terms.jobs import Output, printable

    pairs, passed_over = match_pairs(vis, ir, leave_out=output)
    parts = (Output.ALL if all_ else Output.FUSED).parts
    is_folder = vis.is_dir()
    if is_folder and output.exists() and not output.is_dir():
        raise InvalidInputError(f"output: {output} is a file, but two folders need a folder")
    targets = [paths_of_parts(output / f"{pair.name}.png" if is_folder else output, parts) for pair in pairs]
    if sheet is not None:
        paths_of_parts(sheet, Output.FUSED.parts)  # an impossible suffix is told before the work, not after it
    given = [path for pair in pairs for path in (pair.vis, pair.ir)] + [item.path for item in passed_over]
    asked = _valid_options(
        output=Output.ALL if all_ else Output.FUSED,
        steps=steps,
        sampler=sampler,
        exposure=exposure,
        colour=colour,
        colour_range=colour_range,
        values=values,
        degrees=degrees,
        alarm=alarm,
        outline=outline,
        metadata="keep" if keep_metadata else "drop",
        align=align,
        seed=seed,
        vis_range=vis_range,
        ir_range=ir_range,
    )
    beside = [path for paths in targets for path in beside_of(paths, asked).values()]
    written = [path for paths in targets for path in paths.values()] + beside + ([sheet] if sheet else [])
    _refuse_to_overwrite(given, written)
    known = None if rig is None else _rig_of(rig)
    warps = None if rig is None and align == "rig" else _warps()
    if passed_over:
        complain(told(passed_over))

    engine.load()
    options = PassOptions.of(asked, engine.info)
    costs: list[Mapping[Stage, Cost]] = []
    sources: Counter[str] = Counter()
    rows: list[list[tuple[str, Pixels]]] = []
    num_failed = 0
    with progress_bar() as progress:
        for pair, paths in progress.track(list(zip(pairs, targets, strict=True)), description="fusing"):
            try:
                fusion = fuse_files(
                    engine,
                    pair,
                    paths,
                    options,
                    asked,
                    settings.limits,
                    settings.codec,
                    known,
                    warps,
                )
            except ServiceError as error:
                if not is_folder:
                    raise
                num_failed += 1
                complain(f"{pair.name}: {error}")
                continue
            costs.append(fusion.costs)
            sources[fusion.inputs.ir_source] += 1
            for warning in printable((*fusion.inputs.warnings, *fusion.warnings)):
                complain(f"{pair.name}: {warning}")
            if fusion.alarm is not None and fusion.alarm.num_regions:
                out.print(f"{pair.name}: {told_alarm(fusion.alarm)}", markup=False, soft_wrap=True)
            if fusion.alignment is not None:
                out.print(f"{pair.name}: {fusion.alignment.line}", markup=False, soft_wrap=True)
            if sheet is not None and len(rows) < MAX_SHEET_ROWS:
                rows.append(_sheet_row(pair, fusion))
    if costs:
        made = f"{engine.info.model_name}, {options.sampler}, {options.steps} steps, {options.exposure}"
        out.print(_cost_table(costs, made))
        if set(sources) != {"grey"}:
            found = "; ".join(f"{SOURCES[name]} ({sources[name]} of {len(costs)})" for name in SOURCES if sources[name])
            out.print(f"infrared read: {found}", markup=False, soft_wrap=True)
        out.print(f"wrote {output}", markup=False, soft_wrap=True)
    if sheet is not None and rows:
        write_picture(sheet, contact_sheet(rows), settings.codec)
        first = f" (the first {len(rows)} pairs)" if len(rows) < len(costs) else ""
        out.print(f"wrote {sheet}{first}", markup=False, soft_wrap=True)
    if num_failed:
        complain(f"{num_failed} of {len(pairs)} pairs could not be fused")
        raise typer.Exit(2)


def _rig_of(path: Path) -> Rig:
    from recofuse_rigs.rig import from_file

    return from_file(path)


def _warps() -> Warps:
    from recofuse_rigs.warp import Warps

    return Warps()


def _valid_options(**values: object) -> FusionOptions:
    from pydantic import ValidationError

    from service.terms.jobs import FusionOptions
    from service.terms.records import problems_of

    try:
        return FusionOptions.model_validate(values)
    except ValidationError as error:
        raise InvalidInputError(problems_of(error)) from error


def _refuse_to_overwrite(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    """Refuse targets that are inputs (those passed over too), and two pictures in one file."""
    known = {path.resolve() for path in sources}
    written: set[Path] = set()
    for target in targets:
        place = target.resolve()
        if place in known:
            raise InvalidInputError(f"output: writing {target} would destroy an input; choose another name or folder")
        if place in written:
            raise InvalidInputError(f"output: two pictures would be written to {target}; rename one of their inputs")
        written.add(place)


def _sheet_row(pair: FoundPair, fusion: Fusion) -> list[tuple[str, Pixels]]:
    from service.terms.jobs import Part

    row = [(f"{pair.name}: visible", fusion.inputs.vis), ("infrared", fusion.inputs.ir)]
    labels = {Part.VIS: "visible, restored", Part.IR: "infrared, restored", Part.FUSED: "fused"}
    row += [(label, fusion.pictures[part]) for part, label in labels.items() if part in fusion.pictures]
    return row


def _cost_table(costs: Sequence[Mapping[Stage, Cost]], title: str) -> Table:
    """Mean cost of a pair by stage."""
    table = Table(title=f"per pair ({len(costs)} fused; {title})", title_justify="left")
    table.add_column("stage")
    table.add_column("time, ms", justify="right")
    table.add_column("processor time, ms", justify="right")
    totals = [0.0, 0.0]
    for stage in costs[0]:
        wall_ms = 1e3 * sum(cost[stage].wall_s for cost in costs) / len(costs)
        cpu_ms = 1e3 * sum(cost[stage].cpu_s for cost in costs) / len(costs)
        totals = [totals[0] + wall_ms, totals[1] + cpu_ms]
        table.add_row(stage.value, f"{wall_ms:.1f}", f"{cpu_ms:.1f}")
    table.add_section()
    table.add_row("total", f"{totals[0]:.1f}", f"{totals[1]:.1f}")
    return table
