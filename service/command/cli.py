"""The `recofuse` command: thin verbs over library and service, joined in the order in which its help shows them.

Each verb imports what it needs, because torch takes seconds to import and most verbs of a server's operator do without.
What the caller can mend is one line on standard error and exit status 2, never a traceback; a fault of ours keeps its
traceback, since that is what a report needs. Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated

import typer

from recofuse_host.waiting import sleep_while_waiting
from service.command.complaints import OneLineErrors
from service.command.terminal import out
from service.command.verbs import (
    bench,
    cues,
    dead_letters,
    documents,
    evaluation,
    fuse,
    keys,
    rigs,
    samples,
    serve,
    streams,
    training,
    weights,
)

VERBS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {
        "fuse": fuse.fuse,
        "calibrate": rigs.calibrate,
        "align": rigs.align,
        "serve": serve.serve,
        "api": serve.api,
        "worker": serve.worker,
        "settings": documents.show_settings,
        "metrics": documents.show_metrics,
        "info": weights.info,
        "convert": weights.convert,
        "train": training.train,
        "ablate": training.ablate,
        "export": training.export,
        "train-cues": cues.train_cues,
        "evaluate": evaluation.evaluate,
        "sample": samples.sample,
        "simulate-cameras": streams.simulate_cameras,
        "stream": streams.stream,
        "demo": samples.demo,
    }
)

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Restore and fuse infrared/visible image pairs.",
)
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)
app.add_typer(keys.keys, name="keys")
app.add_typer(dead_letters.dead_letters, name="dead-letters")
app.add_typer(bench.bench_group(), name="bench", help=bench.HELP)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        out.print(f"recofuse {importlib.metadata.version('recofuse')}")
        raise typer.Exit


@app.callback()
def recofuse(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Restore and fuse infrared/visible image pairs."""


def main() -> None:
    """Entry point of the console script."""
    sleep_while_waiting()  # before a verb imports torch
    app(prog_name="recofuse")
