"""The packages of the images (deploy/requirements-*.txt): all pinned, all hashed, and as the project says elsewhere.

`make lock` writes these files; here they are read, beside constraints.txt, pyproject.toml and the packages that are
installed with its extras.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.extras import distributions

ROOT = Path(__file__).parents[2]
LISTS = ("api", "build", "runtime-cpu", "runtime-cu130", "worker")
PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.+]+)(?P<hashes>(?: --hash=sha256:[0-9a-f]{64})+)")
OF_A_GPU_BUILD = re.compile(r"triton|ziglang|cuda-[a-z-]+|nvidia-[a-z0-9-]+")
# torch asks for it, for those who build extensions; an image has nothing that installs packages.
LEFT_OUT = {"setuptools"}
# redis asks for it on the first releases of Python 3.11 alone.
OF_OTHER_RELEASES = {"async-timeout"}


@dataclass(frozen=True)
class Pin:
    """A package's one version, and the hashes of its files."""

    version: str
    hashes: tuple[str, ...]


def pins(text: str) -> dict[str, Pin]:
    """What a list holds, by name. Fails at a line that is neither a pin with hashes nor a comment."""
    found = {}
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    for line in (line for line in lines if not line.startswith("#")):
        match = PIN.fullmatch(line)
        assert match is not None, line
        assert match["name"] not in found
        found[match["name"]] = Pin(match["version"], tuple(match["hashes"].split()))
    return found


def listed(name: str) -> dict[str, Pin]:
    return pins((ROOT / "deploy" / f"requirements-{name}.txt").read_text("utf-8"))


def constraints() -> dict[str, str]:
    """The versions of constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    split = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in split}


@pytest.mark.parametrize(
    "line",
    ["numpy", "numpy==2.4", "numpy>=2.4 --hash=sha256:" + "0" * 64, "--extra-index-url https://example.org/simple"],
)
def test_what_is_no_pin_with_a_hash_is_seen(line: str) -> None:
    with pytest.raises(AssertionError):
        pins(f"# some\n{line}\n")


@pytest.mark.parametrize("name", LISTS)
def test_versions_are_those_of_the_constraints(name: str) -> None:
    known = constraints()
    for package, pin in listed(name).items():
        if package in known:
            assert pin.version == known[package], package
        else:  # what this platform's development environment need not have
            assert OF_A_GPU_BUILD.fullmatch(package) or package in OF_OTHER_RELEASES or name == "build", package


def test_there_is_no_other_list() -> None:
    assert {path.name for path in (ROOT / "deploy").glob("requirements*")} == {
        f"requirements-{name}.txt" for name in LISTS
    }


def test_a_front_end_has_what_its_extras_bring() -> None:
    assert listed("api").keys() == distributions("server", "otel") | OF_OTHER_RELEASES


def test_a_worker_has_what_its_extras_bring_and_nothing_twice() -> None:
    api, worker = listed("api").keys(), listed("worker").keys()
    on_cpu, on_gpu = listed("runtime-cpu").keys(), listed("runtime-cu130").keys()
    assert worker == (distributions("images") | {"safetensors"}) - api
    assert on_cpu == distributions("server", "otel", "cpu") - api - worker
    of_torch = {name for name in on_gpu if not OF_A_GPU_BUILD.fullmatch(name)}  # what is installed here may be a CPU's
    needed = distributions("server", "otel", "torch") - LEFT_OUT - api - worker
    assert of_torch == {name for name in needed if not OF_A_GPU_BUILD.fullmatch(name)}
    assert {"torch", "triton", "ziglang", "nvidia-cuda-runtime"} <= on_gpu
    assert not {"torch", "ziglang"} & on_cpu


def test_the_name_of_the_gpu_variant_is_its_cuda() -> None:
    cuda = listed("runtime-cu130")["nvidia-cuda-runtime"].version.split(".")
    assert "cu" + cuda[0] + cuda[1] == "cu130"


def test_what_builds_is_what_pyproject_asks_for() -> None:
    (line,) = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    backend = Requirement(line)
    assert str(backend.specifier) == f"=={listed('build')[backend.name].version}"


def test_the_dockerfile_installs_them_by_their_hashes_alone() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    installs = re.findall(r"pip(?: --python \S+)? install (.*?)(?:&&|$)", text, re.MULTILINE)
    from_an_index = [words for words in installs if "dist/*.whl" not in words]
    used = {match for words in from_an_index for match in re.findall(r'-r "?requirements-(\S+?)\.txt', words)}
    assert used == {"api", "build", "runtime-${VARIANT}", "worker"}
    assert len(from_an_index) == len(used)
    for words in from_an_index:
        assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(words.split()), words
    assert "--extra-index-url" not in text
