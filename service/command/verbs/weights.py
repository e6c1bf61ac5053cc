"""`recofuse info` and `convert`: what a model is, and the published files turned into one that is read here."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from service.command.environment import WEIGHTS_VARIABLE, read_settings
from service.command.options import DEFAULT_WEIGHTS, Exposure, Weights
from service.command.terminal import out
from service.terms.errors import InvalidInputError
from service.terms.settings import Settings


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
    from recofuse_core.weights_file import read_label, resolve
    from service.work.engines import choose_runtime

    settings = read_settings()
    label = read_label(resolve(weights))
    config: dict[str, Any] = label.config
    facts = Table(show_header=False, title=f"{label.about.name} {label.about.version}", title_justify="left")
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("preset", label.about.preset)
    facts.add_row("parameters", f"{sum(map(math.prod, label.shapes.values())):,}")
    facts.add_row("default", f"{config['sampler']}, {config['steps']} steps")
    facts.add_row("exposures", "as_shot, lit" if config.get("exposure") else "as_shot")
    runtime, why = choose_runtime(settings.engine.model_copy(update={"model": weights}))
    shown = (("config", config), ("provenance", label.about.provenance), ("device", _devices()))
    for group, values in shown:
        facts.add_section()
        for name, value in _flat(values):
            facts.add_row(Text(f"{group}.{name}"), Text(str(value)))
    facts.add_section()
    for name, told in (("runtime", f"{runtime} ({why})"), *_threads(settings, runtime).items()):
        facts.add_row(name, Text(told))
    for name, told in _kernels(settings).items():
        facts.add_row(Text(f"kernels.{name}"), Text(told))
    out.print(facts)


def _devices() -> dict[str, str]:
    """What torch sees of GPUs, in words."""
    if importlib.util.find_spec("torch") is None:
        return {"torch": "not installed"}
    from recofuse_core.devices import observe, told

    return told(observe())


def _kernels(settings: Settings) -> dict[str, str]:
    """Whether the model would run on kernels of our own, and what they need; nothing without torch."""
    if importlib.util.find_spec("torch") is None:
        return {}
    from recofuse_core.devices import choose, observe
    from recofuse_core.errors import DeviceError
    from recofuse_core.kernels.needs import look, told

    try:
        on_gpu = choose(settings.engine.device, observe()).device.startswith("cuda")
    except DeviceError:
        on_gpu = False
    return told(settings.engine.kernels, look(), on_gpu=on_gpu)


def _threads(settings: Settings, runtime: str) -> dict[str, str]:
    """How many threads the model would have, and how they wait."""
    from recofuse_host.processors import decide_threads, read_processors
    from recofuse_host.waiting import sleep_while_waiting

    asked, per_host = settings.engine.num_threads, settings.worker.per_host
    if runtime == "onnx":
        threads, waiting = decide_threads(asked, read_processors(), per_host), "asleep"
    else:
        from recofuse_core.threads import use_threads

        threads, waiting = use_threads(asked, num_sharing=per_host), sleep_while_waiting().told()
    return {"threads": f"{threads.count} ({threads.why})", "threads that wait": waiting}


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


class Form(StrEnum):
    """What `convert` writes."""

    CHECKPOINT = "checkpoint"
    GRAPHS = "graphs"
    ONNX = "onnx"


def convert(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write, such as paper.safetensors or compact.onnx."),
    ] = None,
    to: Annotated[
        Form,
        typer.Option(
            help="checkpoint: of the published files; graphs: of weights, beside them, what runs them without torch; "
            "onnx: of weights, one graph that makes a picture (docs/onnx.md)."
        ),
    ] = Form.CHECKPOINT,
    fusion: Annotated[Path | None, typer.Option(help="The published fusion network, ReCoFuse_F.pth.")] = None,
    autoencoder: Annotated[Path | None, typer.Option(help="The published autoencoder, latent-AE-XY.pth.")] = None,
    generator: Annotated[Path | None, typer.Option(help="The published branches, ReCoFuse_G.pth.")] = None,
    branches: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="VIS.pth IR.pth", help="Two single branches instead of --generator."),
    ] = None,
    name: Annotated[str, typer.Option(help="What the model is called in answers and logs.")] = "paper",
    half: Annotated[bool, typer.Option("--half", help="Store float16: half the size, slightly rounded.")] = False,
    weights: Weights = DEFAULT_WEIGHTS,
    steps: Annotated[
        int | None, typer.Option(min=1, help="For onnx: sampling steps; the model's own if unset.")
    ] = None,
    exposure: Exposure = None,
    outputs: Annotated[str, typer.Option(help="For onnx: some of fused, vis and ir, comma-separated.")] = "fused",
) -> None:
    """Turn the authors' published .pth files into a checkpoint, or weights into ONNX graphs; no code in them is run."""
    if to is Form.GRAPHS:
        from recofuse_core.graphs.export import write_parts
        from recofuse_core.weights_file import resolve

        for path in write_parts(resolve(weights)):
            out.print(f"wrote {path}", soft_wrap=True)
        return
    if output is None:
        raise InvalidInputError("give --output, the file to write")
    if to is Form.ONNX:
        from recofuse_core.graphs.export import write_picture

        wishes = {"steps": steps, "exposure": exposure, "outputs": outputs.split(",")}
        write_picture(weights, output, **wishes)
        out.print(f"wrote {output}: {output.stat().st_size:,} bytes", soft_wrap=True)
        return
    if fusion is None or autoencoder is None or (generator is None) == (branches is None):
        raise InvalidInputError("give --fusion, --autoencoder, and either --generator or --branches")
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
