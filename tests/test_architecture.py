"""The folder tree is the architecture: who may import what, each module probed in a fresh interpreter.

Every module of the packages must have a row here, and every row a module: a new file fails until somebody
has decided what it may pull in, and a removed one cannot leave a rule that holds of nothing.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a module may never pull in, directly or through another. `recofuse_core` has one rule for all its modules.
CORE_BANNED = ("service", "pydantic", "fastapi", "grpc", "redis", "typer", "matplotlib")
SERVICE_BANNED: dict[str, tuple[str, ...]] = {
    "service": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.__main__": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.faces.http.app": ("torch", "recofuse_core", "redis", "grpc"),
    "service.access.auth": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.work.batcher": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.command.cameras": ("torch", "recofuse_core", "fastapi", "redis"),
    "service.command.cli": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),  # each verb imports what it needs
    "service.command.demo": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.work.engine": ("fastapi", "grpc", "redis"),
    "service.command.files": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.terms.errors": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.faces.gateway": ("torch", "recofuse_core", "fastapi", "grpc"),
    "service.watch.gpu": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.faces.grpc.server": ("torch", "recofuse_core", "fastapi", "redis"),
    "service.faces.http.protocol": ("torch", "recofuse_core", "redis", "grpc"),
    "service.terms.images": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.terms.jobs": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.watch.logs": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.watch.metrics": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.faces.oip.tensors": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.faces.oip.grpc": ("torch", "recofuse_core", "fastapi", "redis"),
    "service.faces.oip.http": ("torch", "recofuse_core", "redis", "grpc"),
    "service.faces.http.playground": ("torch", "recofuse_core", "redis", "grpc"),
    "service.queue.contract": ("torch", "recofuse_core", "fastapi", "grpc"),
    "service.access.redis": ("torch", "recofuse_core", "fastapi", "grpc"),
    "service.queue.redis": ("torch", "recofuse_core", "fastapi", "grpc"),
    "service.command.processes": ("torch", "recofuse_core", "grpc"),
    "service.terms.settings": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.faces.grpc.ledger": ("torch", "recofuse_core", "fastapi", "grpc", "redis"),
    "service.watch.tracing": ("torch", "recofuse_core", "fastapi", "grpc", "redis", "opentelemetry.sdk"),
    "service.work.worker": ("fastapi", "grpc"),
}

# The client is for machines that have neither the model nor the service: of the service, only the generated messages.
CLIENT_BANNED = ("torch", "recofuse_core", "fastapi", "pydantic", "redis", "uvicorn", "typer", "prometheus_client")


# Only these speak to the environment; everything else is handed its settings.
ENVIRONMENT_READERS = {"service/command/cli.py"}


def modules_of(package: str) -> set[str]:
    """Dotted names of a package's modules, generated code left out."""
    paths = (path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))
    dotted = {".".join(path.with_suffix("").parts) for path in paths if "pb" not in path.parts}
    return {name.removesuffix(".__init__") for name in dotted}


def pulled_in(modules: list[str], banned: tuple[str, ...]) -> list[str]:
    """The banned top-level packages that importing `modules` brings along, found in a fresh interpreter."""
    probe = f"import sys, {', '.join(modules)}; print(*[name for name in {banned!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], check=False, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_core_stays_free_of_the_service() -> None:
    modules = sorted(modules_of("recofuse_core"))
    assert "recofuse_core.sde" in modules
    assert pulled_in(modules, CORE_BANNED) == []


@pytest.mark.parametrize(("module", "banned"), SERVICE_BANNED.items(), ids=SERVICE_BANNED.keys())
def test_service_module_does_not_pull_in(module: str, banned: tuple[str, ...]) -> None:
    assert pulled_in([module], banned) == []


def test_every_service_module_has_a_row() -> None:
    assert modules_of("service") == set(SERVICE_BANNED)


FRONT_END = ("api", "gateway", "grpc_api", "images", "oip_grpc", "oip_http", "playground", "queue", "redis_queue")
CODECS = ("cv2", "imagecodecs", "tifffile", "PIL")


def test_front_ends_read_headers_without_a_codec() -> None:
    assert pulled_in([f"service.{name}" for name in FRONT_END], CODECS) == []


def codec_calls(source: str) -> set[str]:
    """The functions that a module's text calls to turn files into pixels or pixels into files."""
    attributes = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return attributes & {"imdecode", "imencode", "imread", "imwrite", "imreadmulti", "imwritemulti"}


@pytest.mark.parametrize("package", ["recofuse_core", "recofuse_client", "service"])
def test_only_recofuse_images_calls_a_codec(package: str) -> None:
    assert codec_calls("import cv2\ncv2.imread('a.png')") == {"imread"}
    for name in sorted(modules_of(package)):
        path = ROOT / Path(*name.split("."))
        source = (path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py").read_text(
            "utf-8"
        )
        assert codec_calls(source) == set(), name
        assert not {"imagecodecs", "tifffile"} & set(source.split()), name


def test_the_client_stays_free_of_model_and_service() -> None:
    modules = sorted(modules_of("recofuse_client"))
    assert "recofuse_client.streams" in modules
    assert pulled_in(modules, CLIENT_BANNED) == []
    probe = "import sys, recofuse_client; print(*[name for name in sys.modules if name.startswith('service.')])"
    run = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True, cwd=ROOT)
    assert {name.split(".")[1] for name in run.stdout.split()} == {"pb"}


def test_reading_images_needs_nothing_of_ours() -> None:
    modules = sorted(modules_of("recofuse_images"))
    assert "recofuse_images.tiff" in modules
    assert pulled_in(modules, (*CLIENT_BANNED, "service", "recofuse_client", "grpc")) == []


def test_the_probe_sees_what_is_imported() -> None:
    assert pulled_in(["recofuse_core.sde"], ("torch", "service")) == ["torch"]


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


@pytest.mark.parametrize("package", ["recofuse_core", "recofuse_client", "recofuse_images", "service"])
def test_only_the_command_line_reads_the_environment(package: str) -> None:
    sources = [path for path in sorted((ROOT / package).rglob("*.py")) if "pb" not in path.parts]
    assert sources
    readers = {path.relative_to(ROOT).as_posix() for path in sources if reads_environment(path.read_text("utf-8"))}
    assert readers <= ENVIRONMENT_READERS
