"""Base systems from Debian's archive, in the place of images that only a container registry has. Kept from run to run.

One has Python and stands behind the tag that the Dockerfile names; the other has the programs of docker-compose.yml
that are not ours, and is of the first suite whose nginx resolves names within `upstream`. `python -m tests.image.bases`
makes them ahead of a run, as root.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.conftest import missing
from tests.image.build import python_tag
from tests.image.podman import Podman

TOOLS_IMAGE = "localhost/tools:latest"
TIMEOUT_S = 420.0
# As in Debian's slim images.
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*")


def cache() -> Path:
    """The folder of what is kept from run to run, and of what is gone after each."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "recofuse" / "check-image"


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Alone with the cache; waits until it is free."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Base:
    """What a base system holds. hooks: commands that change it, in whose words $1 is its root."""

    name: str
    suite: str
    packages: tuple[str, ...]
    hooks: tuple[str, ...]

    def words(self) -> list[str]:
        """mmdebstrap and its options."""
        return [
            "mmdebstrap",
            "--quiet",
            "--variant=essential",
            "--format=tar",
            f"--include={','.join(('ca-certificates', 'netbase', 'tzdata', *self.packages))}",
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT),
            *(f"--customize-hook={hook}" for hook in self.hooks),
        ]

    def file(self) -> Path:
        """Where it is kept."""
        key = hashlib.sha256(repr(self).encode()).hexdigest()[:12]
        return cache() / f"{self.name}-{key}.tar"


def python_base(tag: str) -> Base:
    """For a tag such as python:3.11-slim-bookworm, whose version of Python must be that of Debian's suite."""
    return Base(
        "python",
        tag.rpartition("-")[2],
        ("apt", "python3", "python3-venv"),  # with apt, as in the published image, comes libstdc++
        ('ln -s /usr/bin/python3 "$1/usr/local/bin/python"',),
    )


TOOLS = Base(
    "tools",
    "forky",
    (
        "nginx-light",
        "prometheus",
        "prometheus-blackbox-exporter",
        "prometheus-node-exporter",
        "prometheus-redis-exporter",
        "redis-server",
    ),
    (
        'rm -rf "$1/etc/redis"',  # Debian keeps it from other users; the published image has none
        'mkdir -p "$1/data" "$1/prometheus"',
        'chown 999:1000 "$1/data"',  # with the users of the published images
        'chown 65534:65534 "$1/prometheus"',
    ),
)


def load_bases(podman: Podman) -> None:
    """Give podman both base systems, made now where no earlier run has left them. Skips if they cannot be had."""
    bases = {f"docker.io/library/{python_tag()}": python_base(python_tag()), TOOLS_IMAGE: TOOLS}
    if failure := _make_all(list(bases.values()), podman.folder):
        missing(f"base systems from Debian's mirror ({failure})")
    for name, base in bases.items():
        if podman.attempt("image", "exists", name).returncode == 0:
            continue
        path = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        podman("import", f"--change=ENV PATH={path}", str(base.file()), name)


def _make_all(bases: list[Base], folder: Path) -> str:
    """Make what no earlier run has left; returns why one of them could not be made."""
    with ThreadPoolExecutor(len(bases)) as threads:
        return next(filter(None, threads.map(lambda base: _make(base, folder), bases)), "")


def _make(base: Base, folder: Path) -> str:
    """Make the file of a base system unless it is there; returns why it could not be made."""
    file = base.file()
    if file.exists():
        return ""
    file.parent.mkdir(parents=True, exist_ok=True)
    for outdated in file.parent.glob(f"{base.name}-*"):
        outdated.unlink()
    part = file.with_suffix(".part")
    options = folder / f"{base.name}.apt.conf"
    options.write_text(_said("apt-config", "dump", "Acquire"), "utf-8")  # proxies and the like of this machine
    words = [*base.words(), f"--aptopt={options}", base.suite, str(part), *_mirrors()]
    try:
        done = subprocess.run(
            words, env=os.environ | {"TMPDIR": str(folder)},
            capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"none of {base.suite} within {TIMEOUT_S:.0f} s"
    if done.returncode:
        return " ".join([line for line in done.stderr.splitlines() if line.startswith("E:")][:1]) or base.suite
    shutil.move(part, file)
    return ""


def _mirrors() -> list[str]:
    """Of Debian's archive, as this machine's apt reaches it; none leaves it to mmdebstrap."""
    listed = _said("apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages")
    found = [line.partition(" ")[2] for line in listed.splitlines() if line.startswith("Debian ")]
    return found[:1]


def _said(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Make both, and say why if that cannot be."""
    if os.geteuid() or shutil.which("mmdebstrap") is None:
        sys.exit("base systems are made by root, with mmdebstrap")
    with locked(), tempfile.TemporaryDirectory(dir=cache()) as folder:
        if failure := _make_all([python_base(python_tag()), TOOLS], Path(folder)):
            sys.exit(f"base systems could not be made: {failure}")


if __name__ == "__main__":
    main()
