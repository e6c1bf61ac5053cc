"""`recofuse calibrate` and `align`: how infrared lies in the visible frame, found once, and applied to files."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.command.environment import read_settings
from service.command.extras import require
from service.command.terminal import complain, out, progress_bar
from service.terms.errors import InvalidInputError

if TYPE_CHECKING:
    from recofuse_images.pairs import FoundPair
    from recofuse_rigs.rig import Matrix, Rig
    from recofuse_rigs.search import GreyPair

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PAIRS = 40  # that are read; more add time and little else

Vis = Annotated[Path, typer.Option(help="Visible image, or a folder of them.")]
Ir = Annotated[Path, typer.Option(help="Infrared image, or a folder; names pair as for fuse.")]


def calibrate(
    vis: Vis,
    ir: Ir,
    output: Annotated[Path, typer.Option("-o", "--output", help="Rig file to write, such as roof.json.")],
    name: Annotated[str, typer.Option(help="Name of the rig; the file's own if unset.")] = "",
    corners: Annotated[
        Path | None,
        typer.Option(help="Points seen by both, given by hand: a text file, in each line vis x, vis y, ir x, ir y."),
    ] = None,
    checkerboard: Annotated[
        str | None, typer.Option(metavar="COLUMNSxROWS", help="Inner corners of a board that both cameras see.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Picture to check by; NAME_sheet.png beside the rig file if unset.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write the rig though it is unsure.")] = False,
) -> None:
    """Find how the infrared camera lies in the visible one's frame, from pairs of a rig (docs/rigs.md)."""
    require("cv2")
    from recofuse_images.writer import encoded
    from recofuse_rigs.calibration import calibrate as calibrated
    from recofuse_rigs.parallax import bound_of
    from recofuse_rigs.rig import check_name, to_json
    from recofuse_rigs.sheet import calibration_sheet
    from recofuse_rigs.targets import from_boards, from_points
    from service.command.files import match_pairs

    if corners is not None and checkerboard is not None:
        raise InvalidInputError("give --corners or --checkerboard, not both")
    name = name or output.stem
    check_name(name)
    sheet = sheet or output.with_name(f"{output.stem}_sheet.png")
    if sheet.suffix.lower() not in SHEET_SUFFIXES:
        raise InvalidInputError(f"sheet: {sheet.name} ends in none of {', '.join(SHEET_SUFFIXES)}")
    found, passed_over = match_pairs(vis, ir)
    inputs = {path.resolve() for pair in found for path in (pair.vis, pair.ir)}
    inputs |= {item.path.resolve() for item in passed_over if item.path not in (output, sheet)}
    for target in (output, sheet):
        if target.resolve() in inputs:
            raise InvalidInputError(f"output: writing {target} would destroy an input; choose another name or folder")
    if len(found) > MAX_PAIRS:
        step = len(found) / MAX_PAIRS
        found = [found[int(index * step)] for index in range(MAX_PAIRS)]
    pairs = _read(found[:1] if corners is not None else found)
    today = datetime.date.today().isoformat()
    doubts: tuple[str, ...] = ()
    if corners is not None:
        points = _points_of(corners)
        rig = from_points(points[:, :2], points[:, 2:], *_sizes_of(pairs[0]))
        doubts = () if rig.is_sure else (_doubt_of_points(rig),)
    elif checkerboard is not None:
        rig = from_boards(pairs, _board_of(checkerboard))
        doubts = () if rig.is_sure else (_doubt_of_points(rig),)
    else:
        result = calibrated(pairs)
        for index in result.left_out:
            complain(f"{found[index].name}: contradicts the other pairs, and was left out")
        _require_sure(result.doubts, force)  # before it is made a rig, which it may be too wild to be
        rig, doubts = result.as_rig(), result.doubts
        if rig.is_sure:
            kept = [pair for index, pair in enumerate(pairs) if index not in result.left_out]
            rig = replace(rig, parallax_px=bound_of(kept, rig))
    _require_sure(doubts, force)
    rig = replace(rig, name=name, date=today)
    for line in _summary(rig):
        out.print(line, markup=False, soft_wrap=True)
    for doubt in doubts:
        complain(f"unsure: {doubt}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(to_json(rig), encoding="utf-8")
    text = f"{rig.name}: residual {rig.residual_px:.2f} px, spread {rig.spread_px:.2f} px, {rig.num_pairs} pairs"
    sheet.write_bytes(encoded(calibration_sheet(pairs, rig, text), sheet.suffix))
    out.print(f"wrote {output} and {sheet}", markup=False, soft_wrap=True)


def align(
    vis: Vis,
    ir: Ir,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Aligned infrared image (png, tif, npy), or a folder for them.")
    ],
    rig: Annotated[Path | None, typer.Option(help="Rig file; each pair is calibrated for itself if unset.")] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Also put right what the rig leaves in each pair, where that is clear.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Without a rig: also write what is unsure.")] = False,
) -> None:
    """Lay infrared images on the visible grid at their own depth, for one pair or folders of pairs."""
    require("cv2")
    from recofuse_images.errors import ImageError
    from recofuse_rigs.errors import RigError
    from recofuse_rigs.rig import from_file
    from service.command.files import match_pairs

    given = None if rig is None else from_file(rig)
    found, passed_over = match_pairs(vis, ir, leave_out=output)
    is_folder = vis.is_dir()
    targets = [output / f"{pair.name}.png" if is_folder else output for pair in found]
    inputs = {path.resolve() for pair in found for path in (pair.vis, pair.ir)}
    inputs |= {item.path.resolve() for item in passed_over}
    for target in targets:
        if target.resolve() in inputs:
            raise InvalidInputError(f"output: writing {target} would destroy an input; choose another name or folder")
        if target.suffix.lower() not in (".png", ".tif", ".tiff", ".npy"):
            raise InvalidInputError(
                f"output: {target.name} ends in none of .png, .tif, .tiff, .npy, which keep the depth"
            )
    num_failed = 0
    with progress_bar() as progress:
        for pair, target in progress.track(list(zip(found, targets, strict=True)), description="aligning"):
            try:
                _align_one(pair, target, given, is_folder=is_folder, refine=refine, force=force)
            except (RigError, ImageError) as error:
                if not is_folder:
                    raise InvalidInputError(str(error)) from error
                num_failed += 1
                complain(f"{pair.name}: {error}")
    if num_failed:
        complain(f"{num_failed} of {len(found)} pairs could not be aligned")
        raise typer.Exit(2)
    out.print(f"wrote {output}", markup=False, soft_wrap=True)


def _require_sure(doubts: Sequence[str], force: bool) -> None:
    """Raises UnsureError where there are doubts and nobody forces."""
    from recofuse_rigs.errors import UnsureError

    if doubts and not force:
        raise UnsureError(
            f"unsure, and nothing was written: {'; '.join(doubts)}. Give more pairs with structure all over the frame, "
            "points by hand (--corners), a rig (align --rig), or --force"
        )


def _align_one(pair: FoundPair, target: Path, given: Rig | None, *, is_folder: bool, refine: bool, force: bool) -> None:
    import numpy as np

    from recofuse_images.writer import encoded
    from recofuse_rigs.calibration import calibrate as calibrated
    from recofuse_rigs.calibration import grey_pair
    from recofuse_rigs.pairs import read_aligned
    from service.terms.images import limits_of
    from service.terms.measures import Alignment

    limits = limits_of(read_settings().limits)
    vis, ir = pair.vis.read_bytes(), pair.ir.read_bytes()
    rig = given
    if rig is None:
        from recofuse_images.reader import read_infrared, read_vis

        result = calibrated([grey_pair(read_vis(vis, limits), read_infrared(ir, limits).picture.values)])
        _require_sure(result.doubts, force)
        rig = result.as_rig()
    aligned = read_aligned(vis, ir, rig, limits, is_refined=refine)
    if aligned.refined is not None:
        left = aligned.refined.residual_px
        told = Alignment(residual_px=left, moved_px=aligned.refined.moved_px).line
        out.print(f"{pair.name}: {told}", markup=False, soft_wrap=True)
    values = aligned.infrared.picture.values
    if values.dtype not in (np.uint8, np.uint16) and target.suffix.lower() != ".npy":
        if not is_folder:
            raise InvalidInputError(f"output: {pair.name} holds {values.dtype} values, which only .npy keeps")
        target = target.with_suffix(".npy")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(encoded(values, target.suffix))


def _read(found: list[FoundPair]) -> list[GreyPair]:
    from recofuse_images.errors import ImageError
    from recofuse_images.reader import read_infrared, read_vis
    from recofuse_rigs.calibration import grey_pair
    from service.terms.images import limits_of

    limits = limits_of(read_settings().limits)
    pairs = []
    for pair in found:
        try:
            vis = read_vis(pair.vis.read_bytes(), limits)
            pairs.append(grey_pair(vis, read_infrared(pair.ir.read_bytes(), limits).picture.values))
        except ImageError as error:
            raise InvalidInputError(f"{pair.name}: {error}") from error
    return pairs


def _sizes_of(pair: GreyPair) -> tuple[tuple[int, int], tuple[int, int]]:
    return (pair.vis.shape[1], pair.vis.shape[0]), (pair.ir.shape[1], pair.ir.shape[0])


def _points_of(path: Path) -> Matrix:
    """(N, 4) of a text file."""
    import numpy as np

    try:
        rows = [
            [float(word) for word in line.replace(",", " ").split()]
            for line in path.read_text("utf-8").splitlines()
            if line.strip() and not line.startswith("#")
        ]
    except ValueError as error:
        raise InvalidInputError(
            f"corners: {path} holds more than numbers; accepted are lines of vis x, vis y, ir x, ir y"
        ) from error
    if not rows or any(len(row) != 4 for row in rows):
        raise InvalidInputError(f"corners: each line of {path} must hold four numbers: vis x, vis y, ir x, ir y")
    return np.array(rows)


def _board_of(text: str) -> tuple[int, int]:
    columns, _, rows = text.partition("x")
    if not (columns.isdecimal() and rows.isdecimal() and len(text) <= 5 and min(int(columns), int(rows)) >= 3):
        raise InvalidInputError(f"checkerboard: expected COLUMNSxROWS of inner corners, 3 and more each, got {text}")
    return int(columns), int(rows)


def _doubt_of_points(rig: Rig) -> str:
    return f"the points fit to {rig.residual_px:.2f} px; four always fit, and more must to 1.5 px at a width of 640"


def _summary(rig: Rig) -> list[str]:
    parallax = [] if rig.parallax_px is None else [f"nearer and farther things may lie off by {rig.parallax_px:.1f} px"]
    return [
        f"{rig.name}: infrared {rig.ir_size[0]}x{rig.ir_size[1]} covers {rig.overlap:.0%} of the visible "
        f"{rig.vis_size[0]}x{rig.vis_size[1]}",
        f"from {rig.num_pairs} pairs: residual {rig.residual_px:.2f} px, spread {rig.spread_px:.2f} px, "
        f"{'sure' if rig.is_sure else 'unsure'}",
        *parallax,
    ]
