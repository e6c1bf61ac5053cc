"""The images of the unchanged Dockerfile, by podman, whatever pip needs on this machine to reach its packages.

How pip is set up here (files and PIP_ variables alike) is written into one pip.conf, which is there during the build
alone, together with the local folders and certificates that it names.
"""

from __future__ import annotations

import ast
import os
import re
import urllib.parse
from pathlib import Path
from typing import Any

from tests.deploy.compose import ROOT
from tests.deploy.conftest import missing
from tests.image.podman import Podman
from tests.packaging.conftest import OFFLINE
from tests.packaging.environments import pip

TIMEOUT_S = 1500.0
REACHES_PACKAGES = (
    "cert",
    "client-cert",
    "default-timeout",
    "extra-index-url",
    "find-links",
    "index-url",
    "proxy",
    "retries",
    "timeout",
    "trusted-host",
)
CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # which pip believes, too


def python_tag() -> str:
    """What the Dockerfile is built on."""
    match = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert match is not None
    return match[1]


def build(podman: Podman, service: dict[str, Any], timeout_s: float = TIMEOUT_S) -> None:
    """Build the image of a compose service, under its name there. Skips if no package index can be reached."""
    arguments = {name: str(value) for name, value in service["build"].get("args", {}).items()}
    done = podman.attempt(
        "build",
        "--isolation=chroot",
        "--format=docker",  # the other one has no health checks
        "--layers",
        "--jobs=2",
        "--network=host",
        "--pull=never",
        *_pip_mounts(podman.folder / "pip.conf"),
        *(f"--build-arg={name}={value}" for name, value in arguments.items()),
        f"--target={service['build']['target']}",
        f"--tag={service['image']}",
        str(ROOT / service["build"]["context"]),
        timeout_s=timeout_s,
    )
    said = done.stdout + done.stderr
    if done.returncode and any(word in said.lower() for word in OFFLINE):
        missing("a package index")
    assert done.returncode == 0, said[-5000:]


def _pip_mounts(target: Path) -> list[str]:
    """--volume for a pip.conf as this machine's pip is set up, and for what it names."""
    settings: dict[str, str] = {}
    listed = pip("config", "list").stdout.splitlines()
    for line in sorted(listed, key=lambda line: (line.startswith(":env:"), line)):  # what comes later wins
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = ast.literal_eval(value)
    for variable in CERTIFICATES:
        if os.environ.get(variable):
            settings.setdefault("cert", os.environ[variable])
    settings = {name: value for name, value in settings.items() if name in REACHES_PACKAGES}
    lines = [f"{name} = {' '.join(value.split())}" for name, value in settings.items()]
    target.write_text("\n".join(["[global]", *lines, ""]), "utf-8")
    words = [word for value in settings.values() for word in value.split()]
    paths = {Path(word) for word in words if word.startswith("/")}
    # An index in a folder may name files beside it.
    paths |= {Path(urllib.parse.urlparse(word).path).parent for word in words if word.startswith("file://")}
    return [f"--volume={target}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in sorted(paths))]
