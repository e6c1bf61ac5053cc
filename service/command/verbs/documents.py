"""`recofuse settings` and `metrics`: what the service can be told and what it tells, as `make docs` writes it."""

from __future__ import annotations

from typing import Annotated

import typer

from service.command.environment import WEIGHTS_VARIABLE
from service.command.terminal import out
from service.terms.settings import Settings


def show_settings(
    as_env: Annotated[bool, typer.Option("--env", help="As the lines of an environment file instead.")] = False,
) -> None:
    """Print every setting of the service with its default and meaning, as a Markdown document."""
    if as_env:
        typer.echo(Settings.as_environment())
        return
    typer.echo(
        "# Settings\n\nWritten by `make docs` from `service/terms/settings.py`. Settings are environment variables; "
        "a misspelt one stops\nstart-up with a message that names the nearest. With `_FILE` behind its name a variable "
        "names a file that holds\nthe value, for secrets. Options of the commands win over them. "
        f"`{WEIGHTS_VARIABLE}` names the weights for every\ncommand, and wins over `RECOFUSE_ENGINE__MODEL`.\n\n"
        f"{Settings.table()}"
    )


def show_metrics() -> None:
    """Print every metric of the service, as Markdown."""
    from service.watch.metrics import Metrics

    out.print("# Metrics\n\nWritten by `make docs`; docs/observability.md says how to read them.\n", markup=False)
    out.print(Metrics.table(), markup=False, soft_wrap=True)
