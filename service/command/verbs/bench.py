"""`recofuse bench`: the benchmarks of a source tree as a group of verbs, looked for by name, since a wheel has none.

Nothing of `service` imports them: they import it. Where they are missing the group is there all the same and says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from service.terms.errors import InvalidInputError

PACKAGE = "benchmarks"
ENTRY = f"{PACKAGE}.commands"  # it holds the group as `bench`
HELP = "Measure; the tools are in the source tree's benchmarks folder."
_ROOT = Path(__file__).resolve().parents[3]


class WithoutSourceTree(TyperGroup):
    """The group where there is nothing to measure with: whatever its verb, it says what is missing."""

    def invoke(self, ctx: Any) -> Any:
        """Run no verb. Raises InvalidInputError."""
        raise InvalidInputError("bench needs the source tree: run it from a checkout of recofuse")


def bench_group() -> typer.Typer:
    """The verbs of the source tree's benchmarks, or a group that asks for a source tree."""
    if not is_source_tree():
        return typer.Typer(cls=WithoutSourceTree, invoke_without_command=True)
    group: typer.Typer = importlib.import_module(ENTRY).bench
    return group


def is_source_tree() -> bool:
    """Whether there are benchmarks, and they are ours: an installed recofuse may have somebody else's beside it."""
    spec = importlib.util.find_spec(PACKAGE)  # runs nothing of it
    if spec is None or spec.origin is None:
        return False
    return Path(spec.origin).resolve() == _ROOT / PACKAGE / "__init__.py" and (_ROOT / "pyproject.toml").is_file()
