"""The packages as they would be published, an environment with them, and the line that says what came of it."""

from __future__ import annotations

import tarfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.conftest import missing
from tests.extras import ROOT
from tests.packaging.environments import Environment, pip

OFFLINE = ("connection", "timed out", "resolution", "unreachable")
Note = Callable[[str], None]

_notes = pytest.StashKey[list[str]]()


@dataclass(frozen=True)
class Built:
    """The files that a package index would get."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="session")
def note(pytestconfig: pytest.Config) -> Note:
    """Adds to the last line of the run."""
    return pytestconfig.stash.setdefault(_notes, []).append


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line: what was measured."""
    if notes := config.stash.get(_notes, []):
        config.get_terminal_writer().line("packages: " + "; ".join(notes))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, note: Note) -> Built:
    """An sdist of this tree, and the wheel that comes out of it: the way a package goes that has no wheel."""
    folder = tmp_path_factory.mktemp("build")
    (backend,) = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    probe = pip("download", "--quiet", "--no-deps", "--dest", str(folder / "probe"), backend)
    if probe.returncode and any(word in probe.stderr.lower() for word in OFFLINE):
        note("not checked, since no package index can be reached")
        missing("a package index")
    assert probe.returncode == 0, probe.stderr[-3000:]
    builder = Environment.empty(folder / "builder")
    builder.install(backend)
    _build(builder, "sdist", ROOT, folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    _build(builder, "wheel", source, folder)
    (wheel,) = folder.glob("*.whl")
    return Built(sdist, wheel)


def _build(builder: Environment, target: str, source: Path, output: Path) -> None:
    done = builder.run("python", "-m", "hatchling", "build", "--target", target, "--directory", str(output), cwd=source)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def light(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel and what it depends on: no extra."""
    environment = Environment.empty(tmp_path_factory.mktemp("light"))
    environment.install(str(built.wheel))
    return environment


@pytest.fixture(scope="session")
def without_torch(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment that has all of recofuse but what computes: it reads pictures and serves."""
    environment = Environment.empty(tmp_path_factory.mktemp("without-torch"))
    environment.install(f"{built.wheel}[images,server]")
    return environment


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside the source tree."""
    assert ROOT not in tmp_path.parents
    return tmp_path
