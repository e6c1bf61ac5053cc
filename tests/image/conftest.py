"""The images, built; the compose stack in real containers; and the line that says how large and how long it was."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.deploy.compose import compose_file
from tests.deploy.conftest import missing
from tests.image.bases import TOOLS_IMAGE, cache, load_bases, locked
from tests.image.build import build
from tests.image.podman import Podman, last_line, limits
from tests.image.stack import NOT_RUN, PREFIX, Stack
from tests.service.redis_server import free_port

Note = Callable[[str], None]
PROGRAMS = ("podman", "runc", "conmon", "catatonit", "mmdebstrap", "nsenter")
NETWORK_PROGRAMS = ("iptables", "openssl", "curl")
SETTINGS = {"RECOFUSE_ENGINE__WARM_UP_SIZES": "64x48", "RECOFUSE_ENGINE__NUM_THREADS": "1"}  # what .env says

_notes = pytest.StashKey[list[str]]()


@dataclass(frozen=True)
class Images:
    """Built from this tree. api, worker: their names."""

    podman: Podman
    api: str
    worker: str


@pytest.fixture(scope="session")
def note(pytestconfig: pytest.Config) -> Note:
    """Adds to the last line of the run."""
    return pytestconfig.stash.setdefault(_notes, []).append


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line: what was measured."""
    if notes := config.stash.get(_notes, []):
        config.get_terminal_writer().line("images: " + "; ".join(notes))


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """Podman, if this machine runs containers at all. One run at a time: the next one waits."""
    if os.geteuid():
        missing("root")
    for program in PROGRAMS:
        if shutil.which(program) is None:
            missing(program)
    with locked():
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left running then, too
        podman = Podman(cache() / "work", keeps=os.environ.get("CHECK_IMAGE_KEEP", "") not in ("", "0"))
        try:
            if reason := podman.open():
                missing(f"a working podman ({reason})")
            yield podman
        finally:
            podman.close()
            signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def images(podman: Podman, note: Note) -> Images:
    """Both images, as docker-compose.yml builds them for a host without a GPU."""
    begin = time.monotonic()
    load_bases(podman)
    tried = podman.attempt("run", "--rm", "--network=none", *limits({}), TOOLS_IMAGE, "true")
    if tried.returncode:
        missing(f"containers that run ({last_line(tried.stderr)})")
    loaded = time.monotonic()
    services = compose_file()["services"]
    for name in ("worker-cpu", "api"):
        build(podman, services[name])
    built = time.monotonic()
    note(f"bases {loaded - begin:.0f} s, build {built - loaded:.0f} s")
    return Images(podman, services["api"]["image"], services["worker-cpu"]["image"])


@pytest.fixture(scope="session")
def stack(images: Images, tmp_path_factory: pytest.TempPathFactory, note: Note) -> Iterator[Stack]:
    """docker-compose.yml at work, with the profile `cpu`."""
    podman = images.podman
    for program in NETWORK_PROGRAMS:
        if shutil.which(program) is None:
            missing(program)
    podman("network", "create", f"{PREFIX}probe")
    tried = podman.attempt("run", "--rm", f"--network={PREFIX}probe", *limits({}), TOOLS_IMAGE, "true")
    if tried.returncode:
        missing(f"networks of containers, which ask for CAP_NET_ADMIN ({last_line(tried.stderr)})")
    begin = time.monotonic()
    ports = {name: str(free_port()) for name in ("HTTPS_PORT", "PROMETHEUS_PORT")}
    stack = Stack(podman, tmp_path_factory.mktemp("stack"), ports, SETTINGS)
    try:
        for service, entry in stack.services.items():
            if service not in NOT_RUN and entry.get("profiles", ["cpu"]) == ["cpu"]:
                started = stack.start(service)
                for name in started if service == "redis" else ():
                    podman.wait_healthy(name)
        for name in stack.names:
            if name.startswith(("api", "worker")):
                podman.wait_healthy(name)
        note(f"start of {len(stack.names)} containers {time.monotonic() - begin:.0f} s")
        yield stack
    finally:
        stack.close()
