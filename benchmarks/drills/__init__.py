"""Drills: each one proves a promise of the service on real processes. `python -m benchmarks.drills NAME [--quick]`.

A drill is a module of this package with a function `run(is_quick, say) -> Report`. `say` shows progress on standard
error; the report's line is the drill's last line on standard output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What a drill found. line: one readable line of figures; figures: the same for programs; table: Markdown."""

    is_passed: bool
    line: str
    figures: dict[str, Any] = field(default_factory=dict)
    table: str = ""
