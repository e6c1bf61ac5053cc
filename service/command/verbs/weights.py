"""`recofuse info` and `convert`: what a model is, and the published files turned into one that is read here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from service.command.environment import WEIGHTS_VARIABLE, read_settings
from service.command.options import DEFAULT_WEIGHTS
from service.command.terminal import out
from service.terms.errors import InvalidInputError


def info(
    weights: Annotated[
        str,
        typer.Argument(
            envvar=WEIGHTS_VARIABLE, metavar="[NAME_OR_PATH]", help="A shipped model's name or a checkpoint."
        ),
    ] = DEFAULT_WEIGHTS,
    card: Annotated[bool, typer.Option("--card", help="Show a shipped model's card instead.")] = False,
) -> None:
    """Show what a model is (size, defaults, configuration, source of its weights) and how it would run here."""
    if card:
        out.print(Markdown(_card_of(weights)))
        return
    from recofuse_core import load_pretrained
    from recofuse_core.devices import observe, told
    from recofuse_core.threads import use_threads
    from recofuse_host.waiting import sleep_while_waiting

    settings = read_settings()
    model = load_pretrained(weights)
    facts = Table(show_header=False, title=f"{model.info.name} {model.info.version}", title_justify="left")
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("preset", model.info.preset)
    facts.add_row("parameters", f"{model.info.num_parameters:,}")
    facts.add_row("default", f"{model.info.default_sampler}, {model.info.default_steps} steps")
    facts.add_row("exposures", "as_shot" if model.exposure is None else "as_shot, lit")
    shown = (("config", asdict(model.config)), ("provenance", model.info.provenance), ("device", told(observe())))
    for group, values in shown:
        facts.add_section()
        for name, value in _flat(values):
            facts.add_row(Text(f"{group}.{name}"), Text(str(value)))
    threads = use_threads(settings.engine.num_threads, num_sharing=settings.worker.per_host)
    facts.add_section()
    facts.add_row("threads", Text(f"{threads.count} ({threads.why})"))
    facts.add_row("threads that wait", Text(sleep_while_waiting().told()))
    out.print(facts)


def _card_of(name: str) -> str:
    path = resources.files("recofuse_core") / "weights" / f"{name}.md"
    if not path.is_file():
        raise InvalidInputError(f"there is no model card for {name}; cards ship with the packaged weights only")
    return path.read_text("utf-8")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def convert(
    fusion: Annotated[Path, typer.Option(help="The published fusion network, ReCoFuse_F.pth.")],
    autoencoder: Annotated[Path, typer.Option(help="The published autoencoder, latent-AE-XY.pth.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint to write, such as paper.safetensors.")],
    generator: Annotated[Path | None, typer.Option(help="The published branches, ReCoFuse_G.pth.")] = None,
    branches: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="VIS.pth IR.pth", help="Two single branches instead of --generator."),
    ] = None,
    name: Annotated[str, typer.Option(help="What the model is called in answers and logs.")] = "paper",
    half: Annotated[bool, typer.Option("--half", help="Store float16: half the size, slightly rounded.")] = False,
) -> None:
    """Turn the authors' published .pth files into one checkpoint; no code in them is run."""
    if (generator is None) == (branches is None):
        raise InvalidInputError("give either --generator or --branches")
    import torch

    from recofuse_core import convert_official

    header = convert_official(
        generator if generator is not None else branches,  # type: ignore[arg-type]  # one of them is there
        fusion,
        autoencoder,
        output,
        name=name,
        dtype=torch.float16 if half else torch.float32,
    )
    out.print(f"wrote {output}: {header.info.num_parameters:,} parameters, {header.checksum}", soft_wrap=True)
