"""`recofuse sample` and `demo`: a generated pair to try the other verbs on, and the service tried on one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from service.command.environment import read_settings
from service.command.options import DEFAULT_WEIGHTS, Weights, sides_of
from service.command.terminal import SOURCES, complain, out
from service.terms.errors import InvalidInputError


def sample(
    output: Annotated[Path, typer.Argument(help="Folder for vis.png and ir.png.")],
    seed: Annotated[int, typer.Option(min=0, help="Which street.")] = 7,
    vis: Annotated[str, typer.Option(help="What is done to vis, comma-separated.")] = "low_light,gaussian_noise",
    ir: Annotated[str, typer.Option(help="What is done to ir.")] = "low_contrast,stripes,gaussian_noise",
    degradation_seed: Annotated[int, typer.Option(min=0, help="How exactly.")] = 3,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT.")] = "640x480",
) -> None:
    """Write a generated, degraded pair: something to try the other commands on."""
    from service.command.demo import SampleRecipe, copy_sample, write_sample

    settings = read_settings()
    width, height = sides_of(size)
    recipe = SampleRecipe(seed, degradation_seed, _kinds(vis), _kinds(ir), width, height)
    if recipe == SampleRecipe():  # which needs no torch
        output.mkdir(parents=True, exist_ok=True)
        vis_path, ir_path, _ = copy_sample(output, settings.limits)
        out.print(f"wrote {vis_path} and {ir_path}", soft_wrap=True)
        return
    from recofuse_core.degradations.recipes import IrKind, VisKind

    for name, given, known in (("vis", vis, tuple(VisKind)), ("ir", ir, tuple(IrKind))):
        if unknown := set(_kinds(given)) - set(known):
            raise InvalidInputError(f"{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    output.mkdir(parents=True, exist_ok=True)
    vis_path, ir_path, _ = write_sample(output, recipe, settings.codec)
    out.print(f"wrote {vis_path} and {ir_path}", soft_wrap=True)


def _kinds(given: str) -> tuple[str, ...]:
    return tuple(filter(None, given.split(",")))


def demo(
    vis: Annotated[Path | None, typer.Option(help="Your own visible image; a generated pair if unset.")] = None,
    ir: Annotated[Path | None, typer.Option(help="Your own infrared image of the same view.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the pictures.")] = Path("demo"),
    weights: Weights = DEFAULT_WEIGHTS,
) -> None:
    """Start a server on a free loopback port, fuse one pair through it, and stop it again."""
    from service.command.demo import run_demo

    if (vis is None) != (ir is None):
        raise InvalidInputError("give both --vis and --ir, or neither")
    result = run_demo(output, weights, read_settings(), own_pair=None if vis is None or ir is None else (vis, ir))
    for warning in result.warnings:
        complain(warning)
    table = Table(show_header=False, box=None)
    for label, value in (
        ("fused picture", result.fused),
        ("side by side", result.sheet),
        ("server log", result.server_log),
        ("model", result.model),
        ("time", result.server_timing),
        ("infrared read", SOURCES.get(result.ir_source, "") if result.ir_source != "grey" else ""),
    ):
        if not value:
            continue
        table.add_row(label, Text(str(value), overflow="fold"))
    out.print(table)
