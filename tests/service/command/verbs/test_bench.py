"""`recofuse bench` is there with a source tree and says what is missing without one, whoever else has benchmarks."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.service.command.calls import ROOT, recofuse_process

MISSING = "recofuse: bench needs the source tree: run it from a checkout of recofuse\n"
LOUD = "raise SystemExit('somebody else was run')\n"


def process(*words: str, cwd: Path, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command in a process that looks for packages in `cwd` first and then in `path`."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "120", "TERM": "dumb"}
    return subprocess.run(
        recofuse_process(*words), check=False, capture_output=True, text=True, cwd=cwd, env=environ, timeout=120
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with `service` as a wheel leaves it there, and beside it benchmarks of somebody else."""
    shutil.copytree(ROOT / "service", tmp_path / "service", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/__init__.py").write_text(LOUD)
    (tmp_path / "benchmarks/commands.py").write_text(LOUD)
    return tmp_path


@pytest.mark.parametrize("words", [(), ("service", "--quick"), ("no-such-verb",)])
def test_without_a_source_tree_every_verb_asks_for_one(installed: Path, words: tuple[str, ...]) -> None:
    done = process("bench", *words, cwd=installed)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", MISSING)


def test_benchmarks_of_somebody_else_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/__init__.py").write_text(LOUD)
    done = process("bench", "codec", cwd=tmp_path, path=(ROOT,))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", MISSING)


def test_the_groups_help_is_the_same_with_and_without(installed: Path) -> None:
    with_tree, without = process("--help", cwd=ROOT), process("--help", cwd=installed)
    assert with_tree.returncode == without.returncode == 0
    assert "Measure; the tools are in the source tree's benchmarks folder." in with_tree.stdout
    assert without.stdout == with_tree.stdout


def test_a_checkout_has_the_verbs() -> None:
    done = process("bench", "engine", "--preset", "huge", cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "recofuse: preset: huge is none of paper, compact\n")


def test_nothing_of_the_service_imports_benchmarks() -> None:
    assert imported("from benchmarks import kept\nimport benchmarks.codec") == {"benchmarks"}
    for path in sorted((ROOT / "service").rglob("*.py")):
        assert "benchmarks" not in imported(path.read_text("utf-8")), path


def imported(source: str) -> set[str]:
    """The top-level packages that a module's text imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found
