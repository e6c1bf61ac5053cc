"""The wheel and what it installs, in environments that hold nothing else: `make check-package`.

Sizes are of site-packages, as `du` counts. Every process here runs outside the source tree, so that what it imports is
what was installed.
"""

from __future__ import annotations

import configparser
import email.parser
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.reach import CommandServer
from tests.extras import PACKAGES, ROOT, distributions, project
from tests.fakes import pair
from tests.packaging.conftest import Built, Note
from tests.packaging.environments import CONSTRAINTS, Environment, comparable

pytestmark = [pytest.mark.package, pytest.mark.slow, pytest.mark.timeout(600)]

MAX_LIGHT_MIB = 150
NOT_CODE = (
    "recofuse_client/py.typed",
    "recofuse_host/py.typed",
    "recofuse_images/py.typed",
    "recofuse_protos/py.typed",
    "recofuse_rigs/cues_ir.onnx",
    "recofuse_rigs/cues_vis.onnx",
    "recofuse_rigs/py.typed",
    "recofuse_core/py.typed",
    "recofuse_core/weights/compact.md",
    "recofuse_core/weights/compact.safetensors",
    "service/faces/http/docs.html",
    "service/faces/http/page/index.html",
    "service/faces/http/page/page.js",
    "service/py.typed",
    "service/queue/redis/transitions.lua",
)
TEST_TOOLS = ("hypothesis", "pytest", "pytest-asyncio", "pytest-timeout", "trustme")
# Tests that need the client and the command alone, and some that need what serves and reads pictures, too.
LIGHT_TESTS = (
    "client/test_import.py",
    "client/test_retries.py",
    "images/test_png.py",
    "service/terms/test_errors.py",
    "service/terms/test_jobs.py",
)
TORCH_FREE_TESTS = (
    "client/test_contract.py",
    "client/test_pictures.py",
    "images/test_names.py",
    "images/test_writer.py",
    "service/faces/test_gateway.py",
)


# what is published


def test_the_wheel_holds_the_packages_and_nothing_else(built: Built) -> None:
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(built.wheel) as wheel:
        held = set(wheel.namelist())
    (metadata,) = {name.split("/")[0] for name in held if ".dist-info/" in name}
    assert {name for name in held if not name.startswith(f"{metadata}/")} == in_tree
    assert set(NOT_CODE) <= held
    assert f"{metadata}/licenses/LICENSE" in held


def test_the_wheel_says_what_pyproject_says(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        metadata = email.parser.Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
        entry_points = configparser.ConfigParser()
        entry_points.read_string(wheel.read(f"{folder}/entry_points.txt").decode())
    assert dict(entry_points["console_scripts"]) == project()["scripts"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(project()["optional-dependencies"])
    base = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(base) == sorted(project()["dependencies"])
    assert metadata["Version"] == project()["version"]
    assert str(metadata.get_payload()).startswith("# recofuse")


def test_the_sdist_holds_what_its_tests_read(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        ".env.example",
        "configs/compact.toml",
        "deploy/compose.env",
        "docker-compose.yml",
        "tests/conftest.py",
        "proto/generate.py",
    }
    assert wanted <= held
    assert not [name for name in held if "__pycache__" in name or name.startswith(("shared", ".venv", "demo/"))]


# the light installation


def test_the_client_and_the_command_are_light(light: Environment, note: Note) -> None:
    assert light.check() == "No broken requirements found."
    listed = light.listed()
    assert {pin.partition("==")[0] for pin in listed} == {*distributions(), "recofuse"}
    pins = {comparable(line) for line in CONSTRAINTS.read_text("utf-8").splitlines() if "==" in line}
    assert {pin for pin in listed if not pin.startswith("recofuse==")} <= pins
    size_mib = light.size_mib()
    note(f"client and command {size_mib:.0f} MiB in {len(listed)} packages")
    assert size_mib < MAX_LIGHT_MIB


def test_how_long_the_import_takes(light: Environment, elsewhere: Path, note: Note) -> None:
    """Told, not judged, for a machine under load takes longer; tests/client/test_import.py holds what is imported."""

    def cost_s(code: str) -> float:
        told = light.run("python", "-c", f"{code}\nimport time; print(time.process_time())", cwd=elsewhere)
        return float(told.stdout)

    best_s, python_s = (min(cost_s(code) for _ in range(5)) for code in ("import recofuse_client", ""))
    note(f"import recofuse_client {best_s:.2f} s of processor time, Python's own {python_s:.2f} s included")


def test_the_command_answers(light: Environment, elsewhere: Path) -> None:
    told = light.run("recofuse", "--help", cwd=elsewhere)
    assert told.returncode == 0, told.stderr
    assert "serve" in told.stdout
    assert light.run("recofuse", "--version", cwd=elsewhere).stdout.split() == ["recofuse", project()["version"]]
    settings = light.run("recofuse", "settings", cwd=elsewhere)
    assert settings.stdout == (ROOT / "docs" / "settings.md").read_text("utf-8")


def test_a_verb_that_lacks_what_runs_the_model_names_the_extra(light: Environment, elsewhere: Path) -> None:
    done = light.run("recofuse", "info", cwd=elsewhere)
    assert done.returncode == 2
    assert "recofuse[cpu]" in re.sub(r"\s", "", done.stderr)  # a narrow terminal breaks lines


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CommandServer]:
    """A real server, of the development environment, with a stand-in for the model."""
    server = CommandServer(tmp_path)
    try:
        server.start("null")
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


@pytest.fixture
def files(elsewhere: Path) -> list[str]:
    """street.jpg and street_thermal.png, as README.md calls them."""
    names = [elsewhere / "street.jpg", elsewhere / "street_thermal.png"]
    for name, data in zip(names, pair(), strict=True):
        name.write_bytes(data)
    return list(map(str, names))


def test_the_client_reaches_a_server(
    light: Environment, server: CommandServer, files: list[str], elsewhere: Path
) -> None:
    talk = Path(__file__).with_name("talk.py")
    urls = [f"http://{server.http}", f"grpc://{server.grpc}"]
    done = light.run("python", str(talk), *urls, *files, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert Path(said["from"]).is_relative_to(light.packages)
    colour, grey = [48, 64, 3], [48, 64]
    calls = [True, ["null"], colour, grey, colour, "PNG", colour]
    assert said["http"] == calls
    assert said["grpc"] == [*calls, [colour] * 3]
    assert said["http-async"] == [True, colour, colour]
    assert said["grpc-async"] == [True, colour, colour, [colour] * 3]
    assert said["imported"] == []


def test_the_example_of_the_readme_runs(
    light: Environment, server: CommandServer, files: list[str], elsewhere: Path
) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    (example,) = re.findall(
        r"^```python\n(from recofuse_client import Client\n.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    for address, own in (
        ("http://127.0.0.1:8000", f"http://{server.http}"),
        ("grpc://127.0.0.1:8001", f"grpc://{server.grpc}"),
    ):
        assert address in example
        example = example.replace(address, own)
    pairs = f"pairs = [{files!r}] * 3\n"
    done = light.run("python", "-c", f"{pairs}{example}\nprint(fused.shape, fused.dtype)", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(48, 64, 3) uint8"
    assert len(done.stdout.splitlines()) > 1  # of a stream in mode `latest`, the newest frame at least


# their part of the tests


def run_tests(environment: Environment, folder: Path, names: tuple[str, ...], conftests: tuple[str, ...]) -> str:
    """Run some tests from a copy that has no source beside it; returns the line that sums up."""
    modules = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    for path in (*modules, *(ROOT / "tests" / name for name in conftests), ROOT / "pyproject.toml"):
        copied = folder / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    environment.install(*TEST_TOOLS)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in names)]
    done = environment.run("python", *words, cwd=folder, timeout_s=400)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    return done.stdout.splitlines()[-1]


def num_passed(summary: str) -> int:
    """How many tests passed. Fails if any did not, or was skipped."""
    match = re.fullmatch(r"=*\s*(\d+) passed in [\d.]+s.*", summary)
    assert match is not None, summary
    return int(match[1])


def test_the_light_part_of_the_tests(light: Environment, elsewhere: Path, note: Note) -> None:
    number = num_passed(run_tests(light, elsewhere, LIGHT_TESTS, ("conftest.py",)))
    assert number > 100
    note(f"{number} tests passed there")


def test_the_part_of_the_tests_without_torch(without_torch: Environment, elsewhere: Path, note: Note) -> None:
    assert without_torch.check() == "No broken requirements found."
    size_mib = without_torch.size_mib()
    conftests = ("conftest.py", "client/conftest.py", "service/conftest.py")
    number = num_passed(run_tests(without_torch, elsewhere, TORCH_FREE_TESTS, conftests))
    assert number > 200
    note(f"with server and images {size_mib:.0f} MiB, and {number} tests passed there")
