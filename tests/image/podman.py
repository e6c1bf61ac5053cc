"""Podman with storage, networks and state of its own, in one folder that is gone afterwards; others are not seen."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

WAIT_S = 300.0  # for a state that comes within seconds on an idle machine
CAP_SYS_RESOURCE = 1 << 24

_STORAGE = """\
[storage]
driver = "{driver}"
graphroot = "{folder}/graph"
runroot = "{folder}/run"
"""
# runc: crun refuses cgroups in hybrid mode. Locks are files, since the memory for them is that of the whole machine.
_CONTAINERS = """\
[containers]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{folder}/state"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""


class PodmanError(Exception):
    """A command failed: its words, and what it said."""


class Podman:
    """`podman("run", ...)`: what the command says. folder: on a real disk; emptied by `close`.

    keeps: images stay in the folder, so that the next run builds what has changed alone.
    """

    def __init__(self, folder: Path, *, keeps: bool = False) -> None:
        self.folder = folder
        self._keeps = keeps
        self._environ = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "DISABLE_HC_SYSTEMD": "true",  # health checks are asked for by hand
            "TMPDIR": str(folder / "tmp"),
        }

    def open(self) -> str:
        """Make what it needs in the folder; returns why it does not work here, or an empty string."""
        self.close()  # what a run that was killed has left
        if self._keeps and self.attempt("info").returncode == 0:
            return ""
        self._empty(*(entry.name for entry in self.folder.glob("*")))
        (self.folder / "tmp").mkdir(parents=True)
        (self.folder / "containers.conf").write_text(_CONTAINERS.format(folder=self.folder), "utf-8")
        for driver in ("overlay", "vfs"):
            (self.folder / "storage.conf").write_text(_STORAGE.format(driver=driver, folder=self.folder), "utf-8")
            told = self.attempt("info")
            if told.returncode == 0:
                return ""
            self._empty("graph", "run")
        return last_line(told.stderr)

    def __call__(self, *words: str, timeout_s: float = 180.0) -> str:
        done = self.attempt(*words, timeout_s=timeout_s)
        if done.returncode:
            raise PodmanError(f"podman {' '.join(words)}\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout.strip()

    def attempt(self, *words: str, timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
        """Run a command that may fail."""
        return subprocess.run(
            ["podman", *words], env=self._environ, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", check=False, timeout=timeout_s,
        )  # fmt: skip

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Begin a command that takes its time."""
        return subprocess.Popen(["podman", *words], env=self._environ, stdin=subprocess.DEVNULL)

    def exec(self, name: str, *words: str) -> str:
        """What a program within a container writes, errors apart."""
        return self("exec", name, *words)

    def inspect(self, name: str) -> dict[str, Any]:
        """Everything about a container."""
        (found,) = json.loads(self("container", "inspect", name))
        entry: dict[str, Any] = found
        return entry

    def is_running(self, name: str) -> bool:
        """False once it has ended."""
        return bool(self.inspect(name)["State"]["Running"])

    def logs(self, name: str) -> str:
        """What a container has written so far."""
        done = self.attempt("logs", name)
        return done.stdout + done.stderr

    def wait_healthy(self, name: str) -> None:
        """Until the health check of its image, or of its compose service, succeeds."""
        end = time.monotonic() + WAIT_S
        while self.attempt("healthcheck", "run", name).returncode:
            assert self.is_running(name), f"{name} has ended\n{self.logs(name)[-3000:]}"
            assert time.monotonic() < end, f"{name} is not healthy\n{self.logs(name)[-3000:]}"
            time.sleep(0.5)

    def close(self) -> None:
        """End and remove everything."""
        if (self.folder / "storage.conf").exists():
            self.attempt("rm", "--all", "--force", "--volumes", "--time=0")
            self.attempt("network", "prune", "--force")
        if not self._keeps:
            self._empty(*(entry.name for entry in self.folder.glob("*")))

    def _empty(self, *names: str) -> None:
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines()]
        for name in names:
            path = self.folder / name
            for mount in sorted(mounts, reverse=True):  # what is below comes first
                if Path(mount).is_relative_to(path):
                    subprocess.run(["umount", "--lazy", mount], check=True)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def limits(asked: dict[str, Any]) -> list[str]:
    """--ulimit for the `ulimits` of a compose service.

    Without CAP_SYS_RESOURCE nobody can raise what this process itself may have; podman would try it for those that are
    not named, and names `nproc` 32,768 to its children.
    """
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    may_raise = bool(int(status["CapEff"], 16) & CAP_SYS_RESOURCE)
    words = []
    for name, wanted in ({"nproc": 1 << 14, "nofile": 1 << 20} | asked).items():
        hard = wanted["hard"] if isinstance(wanted, dict) else wanted
        own = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        if not may_raise and own != resource.RLIM_INFINITY:
            hard = min(hard, own)
        words.append(f"--ulimit={name}={hard}:{hard}")
    return words


def tmpfs(mount: str) -> str:
    """--tmpfs for a mount of a compose file. As Docker mounts it: nothing can be executed there unless it says so."""
    options = mount.partition(":")[2].split(",")
    return f"--tmpfs={mount}{'' if 'exec' in options else ',noexec'},notmpcopyup"


def last_line(text: str) -> str:
    """Of what a program said."""
    return (text.strip().splitlines() or [""])[-1]
