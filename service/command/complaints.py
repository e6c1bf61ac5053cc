"""Errors that the caller can mend: one line and exit status 2, while a fault of ours keeps its traceback."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from service.command.extras import advice, requirements
from service.command.terminal import complain
from service.terms.errors import ServiceError
from service.terms.settings import SettingsError


def mendable() -> tuple[type[BaseException], ...]:
    """The errors that are the caller's to mend. The library is asked only if a verb has loaded it already."""
    kinds: list[type[BaseException]] = [ServiceError, SettingsError, OSError]
    for module, name in (
        ("recofuse_core.errors", "CoreError"),
        ("recofuse_client.errors", "RecofuseError"),
        ("recofuse_rigs.errors", "RigError"),
    ):
        if (errors := sys.modules.get(module)) is not None:
            kinds.append(getattr(errors, name))
    return tuple(kinds)


def line_of(error: Exception) -> str | None:
    """What to tell the caller about an error, None if it is a fault of ours."""
    if isinstance(error, ModuleNotFoundError):
        return advice(error.name or "", requirements())
    return str(error) if isinstance(error, mendable()) else None


class OneLineErrors(TyperGroup):
    """Turns errors that the caller can mend into one line and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if (line := line_of(error)) is None:
                raise
            complain(line)
            raise typer.Exit(2) from error
