"""The folder tree is the architecture: the code is held to `docs/floor_plan.py`, by its text and by importing it.

By its text, because an import within a function or for types alone is a dependency too; by importing it, because what
a process pulls in through others is what it pays for.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from docs.floor_plan import BEGIN, DOCUMENT, END, FLOORS, TRADES, picture

ROOT = Path(__file__).parents[1]
HEIGHTS = {room.name: height for height, floor in enumerate(reversed(FLOORS)) for room in floor}
PACKAGES = sorted({name.partition(".")[0] for name in HEIGHTS})
MAX_LINES = 600
GENERATED = "recofuse_protos"

# Rooms and modules, and what importing all of their modules may never pull in, directly or through another.
SERVERS = ("fastapi", "grpc", "redis")
CODECS = ("cv2", "imagecodecs", "tifffile", "PIL")
NEVER_PULLED_IN: dict[str, tuple[str, ...]] = {
    "service.__main__": ("torch", "recofuse_core", *SERVERS, "prometheus_client", *CODECS),
    "service.command": ("torch", "recofuse_core"),  # each verb imports what it needs
    "service.command.processes": ("torch", "recofuse_core", "grpc", "redis"),  # not every process needs them
    "service.faces.oip": ("torch", "recofuse_core", "redis", *CODECS),
    "service.faces.http": ("torch", "recofuse_core", "redis", "grpc", *CODECS),
    "service.faces.grpc": ("torch", "recofuse_core", "redis", "fastapi", *CODECS),
    "service.faces.gateway": ("torch", "recofuse_core", *SERVERS, *CODECS),
    "service.work": SERVERS,
    "service.work.batcher": ("torch", "recofuse_core", *SERVERS),
    "service.work.worker": SERVERS,
    "service.access": ("torch", "recofuse_core", "fastapi", "grpc", *CODECS),
    "service.access.guard": ("redis",),
    "service.access.keys": ("redis",),
    "service.access.limits": ("redis",),
    "service.watch": ("torch", "recofuse_core", *SERVERS, "opentelemetry.sdk", *CODECS),
    "service.queue": ("torch", "recofuse_core", "fastapi", "grpc", *CODECS),
    "service.queue.contract": ("redis",),
    "service.queue.memory": ("redis",),
    "service.terms": ("torch", "recofuse_core", *SERVERS, *CODECS),
    "recofuse_core": ("service", "pydantic", "fastapi", "grpc", "redis", "typer", "matplotlib"),
    # The client is for machines that have neither the model nor the service.
    "recofuse_client": ("torch", "recofuse_core", "service", "fastapi", "pydantic", "redis", "uvicorn", "typer"),
    "recofuse_host": ("torch", "numpy", "recofuse_core", "recofuse_images", "service", "pydantic", *SERVERS),
    "recofuse_images": ("torch", "recofuse_core", "service", "recofuse_client", "fastapi", "pydantic", "grpc"),
    "recofuse_rigs": ("torch", "recofuse_core", "service", "recofuse_client", "fastapi", "pydantic", "grpc"),
    "recofuse_rigs.rig": CODECS,  # front ends read rigs
}

# Only the command speaks to the environment, and everything else is handed its settings; but what OpenMP is told there
# is told by the library, too.
ENVIRONMENT_READERS = {"service/command/environment.py", "recofuse_host/waiting.py"}


def path_of(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def modules_of(name: str) -> tuple[str, ...]:
    """Dotted names of the modules of a package, folder or module, generated code left out."""
    path = ROOT / Path(*name.split("."))
    if not path.is_dir():
        return (name,)
    paths = (found.relative_to(ROOT).with_suffix("") for found in path.rglob("*.py"))
    return tuple(sorted(".".join(found.parts).removesuffix(".__init__") for found in paths))


def room_of(module: str) -> str:
    """The room that a module is in; empty if it is in none of the plan's."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in HEIGHTS), "")


def imports_of(source: str) -> set[str]:
    """Dotted names that a module's text imports anywhere: `from a import b` counts as a and as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "a relative import does not say where it goes"
            assert not node.level, "a relative import does not say where it goes"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def arrows() -> frozenset[tuple[str, str]]:
    """(module, imported module) of our own packages, by their texts."""
    return frozenset(
        (module, name)
        for package in PACKAGES
        if package != GENERATED
        for module in modules_of(package)
        for name in imports_of(path_of(module).read_text("utf-8"))
    )


def pulled_in(modules: Iterable[str], banned: tuple[str, ...]) -> list[str]:
    """The banned packages that importing `modules` brings along, found in a fresh interpreter."""
    probe = f"import sys, {', '.join(modules)}; print(*[name for name in {banned!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], check=False, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def is_down(module: str, imported: str) -> bool:
    """Whether an import of ours goes to a lower floor, or stays within its room."""
    here, there = room_of(module), room_of(imported)
    return here == there or HEIGHTS[here] > HEIGHTS[there]


def is_allowed(module: str, imported: str) -> bool:
    """Whether the module may name a package that is somebody's trade."""
    rooms = TRADES.get(imported.partition(".")[0])
    if rooms is None or imported.partition(".")[0] == module.partition(".")[0]:
        return True
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def test_the_probes_can_fail() -> None:
    assert not is_down("service.terms.jobs", "service.queue.contract")
    assert not is_down("service.faces.http.app", "service.faces.grpc.server")
    assert is_down("service.faces.http.app", "service.faces.gateway")
    assert is_down("service.work.worker", "service.work.batcher")
    assert not is_allowed("service.faces.http.app", "torch.nn")
    assert is_allowed("recofuse_core.sde", "torch")
    assert imports_of("def f():\n    from a.b import c") == {"a.b", "a.b.c"}
    assert pulled_in(["recofuse_core.model"], ("torch", "service")) == ["torch"]
    with pytest.raises(AssertionError, match="relative"):
        imports_of("from . import b")


def test_the_model_as_graphs_needs_no_torch() -> None:
    modules = ["recofuse_core.graphs.runtime", "recofuse_core.picture", "service.work.engines"]
    assert pulled_in(modules, ("torch",)) == []


def test_every_module_is_in_a_room() -> None:
    """But for the door of the service, which opens onto the command."""
    homeless = {module for package in PACKAGES for module in modules_of(package) if not room_of(module)}
    assert homeless == {"service", "service.__main__", "service.faces"}
    assert imports_of(path_of("service.__main__").read_text("utf-8")) == {
        "service.command.cli",
        "service.command.cli.main",
    }
    assert imports_of(path_of("service").read_text("utf-8")) == set()


@pytest.mark.parametrize("room", HEIGHTS)
def test_arrows_run_down(room: str) -> None:
    assert modules_of(room)
    up = {
        (module, name)
        for module, name in arrows()
        if room_of(module) == room and room_of(name) and not is_down(module, name)
    }
    assert up == set()


def test_no_module_goes_in_a_circle() -> None:
    """Within a room too: two modules that import each other are one."""
    known = {module for package in PACKAGES for module in modules_of(package)}
    lower: dict[str, set[str]] = {module: set() for module in known}
    for module, name in arrows():
        if name in known and name != module:
            lower[module].add(name)
    while leaves := {module for module, names in lower.items() if not names}:
        lower = {module: names - leaves for module, names in lower.items() if module not in leaves}
    assert lower == {}


def test_the_wheel_does_without_the_benchmarks() -> None:
    assert {module for module, name in arrows() if name.partition(".")[0] in ("benchmarks", "tests", "docs")} == set()


@pytest.mark.parametrize("trade", TRADES)
def test_a_package_is_named_by_its_trade_alone(trade: str) -> None:
    named = {(module, name) for module, name in arrows() if name == trade or name.startswith(f"{trade}.")}
    assert named
    assert {arrow for arrow in named if not is_allowed(*arrow)} == set()


@pytest.mark.parametrize(("name", "banned"), NEVER_PULLED_IN.items(), ids=NEVER_PULLED_IN)
def test_importing_does_not_pull_in(name: str, banned: tuple[str, ...]) -> None:
    """Every room has a row but the generated one; a room's row holds of all its modules together."""
    assert set(HEIGHTS) - set(NEVER_PULLED_IN) == {GENERATED}
    assert path_of(name).is_file()
    assert pulled_in(modules_of(name), banned) == []


def codec_calls(source: str) -> set[str]:
    """The functions that a module's text calls to turn files into pixels or pixels into files."""
    attributes = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return attributes & {"imdecode", "imencode", "imread", "imwrite", "imreadmulti", "imwritemulti"}


@pytest.mark.parametrize("package", ["recofuse_core", "recofuse_client", "recofuse_rigs", "service"])
def test_only_recofuse_images_calls_a_codec(package: str) -> None:
    assert codec_calls("import cv2\ncv2.imread('a.png')") == {"imread"}
    for name in modules_of(package):
        assert codec_calls(path_of(name).read_text("utf-8")) == set(), name


def reads_environment(source: str) -> bool:
    """Whether a module's text names `environ` or `getenv`, as an attribute or an import."""
    names = {"environ", "getenv", "environb"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            return True
    return False


def test_environment_probe_sees_a_read() -> None:
    assert reads_environment("import os\nvalue = os.environ['A']")
    assert reads_environment("from os import getenv")
    assert not reads_environment("import os\nvalue = os.getpid()")


def test_the_environment_is_read_in_two_places() -> None:
    sources = [path_of(module) for package in PACKAGES for module in modules_of(package)]
    readers = {path.relative_to(ROOT).as_posix() for path in sources if reads_environment(path.read_text("utf-8"))}
    assert readers == ENVIRONMENT_READERS


def lengths() -> Iterator[tuple[str, int]]:
    for package in PACKAGES:
        for module in modules_of(package):
            if package != GENERATED:
                yield module, len(path_of(module).read_text("utf-8").splitlines())


def test_no_file_is_too_long_to_be_read() -> None:
    assert {module: length for module, length in lengths() if length > MAX_LINES} == {}


def test_the_document_shows_the_plan() -> None:
    """`make docs` writes it."""
    _, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
    assert rest.partition(END)[0].strip("\n") == picture().strip("\n")
