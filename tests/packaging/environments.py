"""Environments of their own: made empty, filled from a package index, measured, and run without this source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from service.terms.settings import PREFIX
from tests.extras import ROOT

CONSTRAINTS = ROOT / "constraints.txt"


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip: this Python's pip installs into it, and it holds what was asked for alone."""

    folder: Path

    @classmethod
    def empty(cls, folder: Path) -> Environment:
        venv.create(folder, with_pip=False, symlinks=True)
        return cls(folder)

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.folder.glob("lib/python3*/site-packages"))

    def install(self, *requirements: str) -> None:
        """Install with the versions of constraints.txt."""
        words = ["install", "--quiet", "--constraint", str(CONSTRAINTS), *requirements]
        done = self._pip(*words)
        assert done.returncode == 0, done.stderr[-3000:]

    def check(self) -> str:
        """What pip says about packages that lack others, or do not fit them."""
        return self._pip("check").stdout.strip()

    def listed(self) -> set[str]:
        """NAME==VERSION of every package, as constraints.txt compares them."""
        return {comparable(line) for line in self._pip("list", "--format=freeze").stdout.split()}

    def size_mib(self) -> float:
        """What the packages take of a disk, as `du` counts it, compiled files included."""
        return sum(path.lstat().st_blocks * 512 for path in self.packages.rglob("*")) / 2**20

    def run(self, *words: str, cwd: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment; `python` and `recofuse` are there. cwd: outside the source tree."""
        program = self.folder / "bin" / words[0]
        return subprocess.run(
            [program, *words[1:]],
            capture_output=True, text=True, check=False, cwd=cwd, env=clean_environ(), timeout=timeout_s,
        )  # fmt: skip

    def _pip(self, *words: str) -> subprocess.CompletedProcess[str]:
        return pip("--python", str(self.folder / "bin" / "python"), *words)


def pip(*words: str) -> subprocess.CompletedProcess[str]:
    """Run this Python's pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environ(), timeout=600)


def clean_environ() -> dict[str, str]:
    """The environment without settings of recofuse, and without a path to this source tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "PYTHON"))}


def comparable(pin: str) -> str:
    """NAME==VERSION in one spelling."""
    return pin.lower().replace("_", "-")
