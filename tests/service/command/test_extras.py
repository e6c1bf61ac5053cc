"""Whoever lacks a package reads which extra brings it: by given requirements, and from the real command without it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from recofuse_images.writer import png_bytes
from service.command.extras import advice, distribution_of, name_of
from tests.extras import PACKAGES
from tests.fakes import picture
from tests.service.command.calls import ROOT

SERVER = [
    "fastapi",
    "redis[hiredis]",
    "prometheus-client",
    "grpcio-health-checking",
    "python_multipart",
    "nvidia-ml-py",
    "uvicorn",
]
REQUIREMENTS = [
    "numpy>=2.0",
    "grpcio>=1.85.1",
    *(f"{name}>=0.1; extra == 'server'" for name in SERVER),
    'uvloop>=0.21; (sys_platform == "linux") and extra == "server"',
    *(f"{name}; extra=='cpu'" for name in ("onnxruntime>=1.20", "safetensors")),
    *(f"{name}; extra=='torch'" for name in ("torch>=2.6", "safetensors", "opencv-python-headless", "pillow<99")),
    *(f"{name} ; extra == 'train'" for name in ("tensorboard>=2.18", "tqdm", "matplotlib")),
    "matplotlib~=3.10; extra == 'plot'",
    "recofuse[server,torch,train,plot]; extra == 'all'",
    *(f"{name}; extra == 'everything'" for name in (*SERVER, "torch", "matplotlib", "tqdm", "six", "tensorboard")),
]


@pytest.mark.parametrize(
    ("module", "distribution", "extra"),
    [
        ("torch", "torch", "torch"),
        ("torch.utils.flop_counter", "torch", "torch"),
        ("cv2", "opencv-python-headless", "torch"),
        ("PIL.Image", "pillow", "torch"),
        ("redis.asyncio", "redis", "server"),
        ("prometheus_client", "prometheus-client", "server"),
        ("python_multipart.multipart", "python-multipart", "server"),
        ("grpc_health.v1", "grpcio-health-checking", "server"),
        ("pynvml", "nvidia-ml-py", "server"),
        ("starlette.types", "fastapi", "server"),
        ("uvloop", "uvloop", "server"),
        ("matplotlib", "matplotlib", "plot"),
        ("tqdm", "tqdm", "train"),
        ("six", "six", "everything"),
    ],
)
def test_the_smallest_extra_that_brings_it_is_named(module: str, distribution: str, extra: str) -> None:
    told = f"this needs {distribution}, which is not installed: pip install 'recofuse[{extra}]'"
    assert advice(module, REQUIREMENTS) == told


@pytest.mark.parametrize("module", ["numpy", "grpc", "service.command.nothing", "sympy", "google.rpc", ""])
def test_what_no_extra_brings_is_a_fault_of_ours(module: str) -> None:
    assert advice(module, REQUIREMENTS) is None
    assert advice("torch", []) is None


def test_a_dotted_name_decides_over_the_one_that_it_lies_in() -> None:
    names = (
        "google.protobuf.message",
        "google.rpc.status_pb2",
        "opentelemetry.sdk.trace",
        "opentelemetry.exporter.otlp",
    )
    assert [distribution_of(name) for name in names] == [
        "protobuf",
        "googleapis-common-protos",
        "opentelemetry-sdk",
        "opentelemetry-exporter-otlp-proto-http",
    ]


SILENT = {"tensorboard"}  # torch.utils imports it
BROUGHT = {"triton"}  # by torch for CUDA; without it nothing of ours asks for it


def test_every_package_that_is_imported_is_required_under_the_name_that_is_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = {
        name_of(line)
        for line in (*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name]))
    }
    modules: set[str] = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module)
    known = {*sys.stdlib_module_names, *PACKAGES}
    foreign = {module for module in modules if module.split(".")[0] not in known}
    assert {"torch", "cv2", "redis.asyncio", "google.rpc.status_pb2"} <= foreign
    assert {module for module in foreign if distribution_of(module) not in required | BROUGHT} == set()
    parts = {"recofuse", "redis"}  # our own extras; redis[hiredis] is named as redis
    assert required - parts - {distribution_of(module) for module in foreign} == SILENT


# the real command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair, and with the metadata of an installed recofuse that has the extras above."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "vis.png").write_bytes(png_bytes(picture()))
    (folder / "ir.png").write_bytes(png_bytes(picture(channels=1)))
    (folder / "recofuse-9.dist-info").mkdir()
    lines = [f"Requires-Dist: {line}" for line in REQUIREMENTS]
    metadata = "\n".join(["Metadata-Version: 2.4", "Name: recofuse", "Version: 9", *lines])
    (folder / "recofuse-9.dist-info" / "METADATA").write_text(metadata + "\n")
    return folder


def without(packages: str, words: str, place: Path) -> subprocess.CompletedProcess[str]:
    """The command in `place`, where these packages cannot be imported."""
    code = (
        "import sys\n"
        f"for name in {packages.split()!r}: sys.modules[name] = None\n"
        "from service.__main__ import main\n"
        f"sys.argv = ['recofuse', *{words.split()!r}]\n"
        "main()\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RECOFUSE_")}
    environ["PYTHONPATH"] = os.pathsep.join(map(str, (place, ROOT)))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=place, env=environ, timeout=120)


@pytest.mark.parametrize(
    ("packages", "words", "told"),
    [
        ("torch onnxruntime", "fuse --vis vis.png --ir ir.png -o out.png", "onnxruntime recofuse[cpu]"),
        ("torch onnxruntime PIL cv2", "fuse --vis vis.png --ir ir.png -o out.png", "onnxruntime recofuse[cpu]"),
        ("torch", "fuse --vis vis.png --ir ir.png -o out.png --device cuda", "torch recofuse[torch]"),
        ("PIL", "fuse --vis vis.png --ir ir.png -o out.png", "pillow recofuse[torch]"),
        ("torch", "evaluate --pairs .", "torch recofuse[torch]"),
        ("safetensors", "bench steps --pairs .", "safetensors recofuse[cpu]"),
        ("cv2", "evaluate --pairs .", "opencv-python-headless recofuse[torch]"),
        ("fastapi", "serve --port 0 --engine null", "fastapi recofuse[server]"),
        ("grpc_health", "serve --port 0 --engine null", "grpcio-health-checking recofuse[server]"),
        ("torch onnxruntime", "serve --port 0 --grpc-port -1", "onnxruntime recofuse[cpu]"),
        ("redis", "worker --queue redis://127.0.0.1:1", "redis recofuse[server]"),
        ("redis", "dead-letters list --queue redis://127.0.0.1:1", "redis recofuse[server]"),
        ("redis", "keys list --store redis --queue redis://127.0.0.1:1", "redis recofuse[server]"),
        ("prometheus_client", "metrics", "prometheus-client recofuse[server]"),
    ],
)
def test_a_verb_says_in_one_line_what_it_lacks(packages: str, words: str, told: str, place: Path) -> None:
    done = without(packages, words, place)
    package, extra = told.split()
    line = f"recofuse: this needs {package}, which is not installed: pip install '{extra}'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize(
    ("packages", "words", "line"),
    [
        ("tensorboard tqdm", "train run.toml", "training needs tensorboard and tqdm: pip install 'recofuse[train]'"),
        ("tqdm", "train run.toml", "training needs tqdm: pip install 'recofuse[train]'"),
        ("matplotlib", "evaluate --pairs . --plot a.svg", "plots need matplotlib: pip install 'recofuse[plot]'"),
    ],
)
def test_what_is_asked_for_before_the_work_keeps_its_words(packages: str, words: str, line: str, place: Path) -> None:
    done = without(packages, words, place)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"recofuse: {line}\n")


def test_help_needs_none_of_the_extras(place: Path) -> None:
    done = without("torch cv2 PIL safetensors fastapi starlette uvicorn redis grpc matplotlib", "--help", place)
    assert (done.returncode, done.stderr) == (0, "")
    assert "simulate-cameras" in done.stdout


def test_a_module_of_nobody_keeps_its_traceback(place: Path) -> None:
    done = without("recofuse_images.names", "fuse --vis vis.png --ir ir.png -o out.png", place)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "recofuse_images.names" in done.stderr.splitlines()[-1]
