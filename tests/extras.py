"""What each extra of pyproject.toml brings, and a Python that has nothing else, without installing anything."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.terms.settings import PREFIX

ROOT = Path(__file__).parents[1]
PACKAGES = (  # that are published, all in one wheel
    "recofuse_client",
    "recofuse_core",
    "recofuse_host",
    "recofuse_images",
    "recofuse_protos",
    "recofuse_rigs",
    "service",
)


@cache
def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def named(*extras: str) -> dict[str, Requirement]:
    """What pyproject.toml asks for by name: the dependencies, and those of the extras and of what they include."""
    lines = [
        *project()["dependencies"],
        *(line for extra in extras for line in project()["optional-dependencies"][extra]),
    ]
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, lines):
        if requirement.name == project()["name"]:
            found |= named(*requirement.extras)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def distributions(*extras: str) -> set[str]:
    """Everything that is installed with these extras, as the packages installed here describe themselves."""
    found: set[str] = set()
    waiting = list(named(*extras).values())
    while waiting:
        requirement = waiting.pop()
        for line in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(line)
            name = canonicalize_name(needed.name)
            wanted = any(
                needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            )
            if wanted and name not in found:
                found.add(name)
                waiting.append(needed)
        found.add(canonicalize_name(requirement.name))
    return found


@cache
def modules_without(*extras: str) -> list[str]:
    """The modules that are importable here, and are not where only these extras are installed."""
    kept = {*distributions(*extras), canonicalize_name(project()["name"])}
    return sorted(
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & kept and module not in ("pip", "_distutils_hack")
    )


def run_with(code: str, *extras: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python whose imports fail as if only the dependencies and these extras were installed."""
    prelude = f"import sys\nfor name in {modules_without(*extras)!r}: sys.modules[name] = None\n"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environ, timeout=timeout_s,
    )  # fmt: skip


def recofuse(words: list[str]) -> str:
    """A program that is the command with these words."""
    return f"sys.argv = {['recofuse', *words]!r}\nfrom service.command.cli import main\nmain()\n"
