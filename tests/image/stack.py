"""docker-compose.yml in real containers: its services with everything it says of them, as options of `podman run`.

The images of others are replaced by Debian's packages of the same programs, run as the users of the published images.
`restart` is left out on purpose: a container that ends must be seen, not started again. A key that is not known here
is an error, so that nothing in the compose file can go unproved without somebody's decision.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.deploy.compose import ROOT, compose_file
from tests.image.bases import TOOLS_IMAGE
from tests.image.podman import WAIT_S, Podman, limits

PREFIX = "check-image-"  # of networks: all podmans of a machine have one list of the names in them
BACK = f"{PREFIX}back"
NOT_RUN = {"grafana"}  # is in no distribution
# Program, unless the command names it, and user of the published images.
STAND_INS = {
    "redis": ("", ""),
    "proxy": ("", "101"),
    "prometheus": ("/usr/bin/prometheus", "65534:65534"),
    "blackbox-exporter": ("/usr/bin/prometheus-blackbox-exporter", "0:0"),
    "redis-exporter": ("/usr/bin/prometheus-redis-exporter", "59000:59000"),
    "node-exporter": ("/usr/bin/prometheus-node-exporter", "65534:65534"),
}
NOTHING = ("build", "command", "deploy", "depends_on", "image", "logging", "profiles", "restart")


def _each(option: str) -> Callable[[list[str]], list[str]]:
    return lambda values: [f"{option}={value}" for value in values]


def _one(option: str) -> Callable[[Any], list[str]]:
    return lambda value: [f"{option}={value}"]


def _networks(networks: list[str] | dict[str, Any], service: str) -> list[str]:
    entries = networks if isinstance(networks, dict) else dict.fromkeys(networks)
    aliases = {name: [service, *(entry or {}).get("aliases", [])] for name, entry in entries.items()}
    return [f"--network={PREFIX}{name}:{','.join(f'alias={alias}' for alias in aliases[name])}" for name in aliases]


def volume_options(volume: dict[str, Any]) -> list[str]:
    """Of `podman volume create`, which takes a size for a quota of the disk: that is left out."""
    options = dict(volume.get("driver_opts", {}))
    if "o" in options:
        options["o"] = ",".join(part for part in options["o"].split(",") if not part.startswith("size="))
    return [f"--opt={name}={value}" for name, value in options.items()]


class Stack:
    """Running containers, named SERVICE-N. folder: where deploy/ is copied to and given secrets."""

    def __init__(self, podman: Podman, folder: Path, variables: dict[str, str], settings: dict[str, str]) -> None:
        self.podman = podman
        self.folder = folder
        self.services: dict[str, dict[str, Any]] = compose_file(variables)["services"]
        self._secrets = compose_file(variables)["secrets"]
        self._forwarder: subprocess.Popen[str] | None = None
        self.names: list[str] = []
        shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("secrets", "kubernetes"))
        subprocess.run(["sh", "deploy/make-secrets.sh"], cwd=folder, check=True, capture_output=True)
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()), "utf-8")
        for name, volume in compose_file()["volumes"].items():
            podman.attempt("volume", "rm", "--force", name)  # of a run whose storage was kept
            if volume:  # a plain one comes with the first container, whose user it is given to
                podman("volume", "create", *volume_options(volume), name)
        for name, network in compose_file()["networks"].items():
            podman("network", "create", *(["--internal"] if (network or {}).get("internal") else []), f"{PREFIX}{name}")

    def start(self, service: str) -> list[str]:
        """Start a service's replicas; returns their names."""
        entry = self.services[service]
        started = [f"{service}-{number}" for number in range(1, entry.get("deploy", {}).get("replicas", 1) + 1)]
        for name in started:
            self.run(name, self._flags(service), self._image(service), entry.get("command", []))
        if service == "proxy":
            self._forward_dns("proxy-1")
        return started

    def run(self, name: str, flags: list[str], image: list[str], command: list[str]) -> None:
        """Start one container."""
        self.podman("run", "--detach", f"--name={name}", "--pull=never", *flags, *image, *command)
        self.names.append(name)

    def address(self, name: str) -> str:
        """Of a container within the inner network, which this machine reaches, too."""
        return str(self.podman.inspect(name)["NetworkSettings"]["Networks"][BACK]["IPAddress"])

    def close(self) -> None:
        """End what is not a container; podman ends those."""
        if self._forwarder is not None:
            self._forwarder.kill()
            self._forwarder.communicate()

    def _image(self, service: str) -> list[str]:
        if service not in STAND_INS:
            return [self.services[service]["image"]]
        program, user = STAND_INS[service]
        return [f"--entrypoint={program}", *([f"--user={user}"] if user else []), TOOLS_IMAGE]

    def _flags(self, service: str) -> list[str]:
        flags_of: dict[str, Callable[[Any], list[str]]] = {
            "cap_drop": _each("--cap-drop"),
            "env_file": lambda files: [f"--env-file={self.folder / entry['path']}" for entry in files],
            "environment": lambda values: [f"--env={name}={value}" for name, value in values.items()],
            "healthcheck": lambda check: [f"--health-cmd={json.dumps(check['test'])}", "--health-interval=disable"],
            "init": lambda is_on: ["--init"] if is_on else [],
            "mem_limit": _one("--memory"),
            "networks": lambda networks: _networks(networks, service),
            "pid": _one("--pid"),
            "pids_limit": _one("--pids-limit"),
            "ports": _each("--publish"),
            "read_only": lambda is_on: ["--read-only", "--read-only-tmpfs=false"] if is_on else [],
            "secrets": lambda names: [f"--volume={self._secret(name)}:/run/secrets/{name}:ro" for name in names],
            "security_opt": _each("--security-opt"),
            "stop_grace_period": lambda period: [f"--stop-timeout={period.removesuffix('s')}"],
            "stop_signal": _one("--stop-signal"),
            "tmpfs": lambda mounts: [f"--tmpfs={mount},notmpcopyup" for mount in mounts],
            "ulimits": limits,
            "user": _one("--user"),
            "volumes": lambda volumes: [f"--volume={volume.replace('./', f'{self.folder}/', 1)}" for volume in volumes],
        }
        entry = self.services[service]
        return [flag for key, value in entry.items() if key not in NOTHING for flag in flags_of[key](value)]

    def _secret(self, name: str) -> Path:
        return self.folder / str(self._secrets[name]["file"])

    def _forward_dns(self, name: str) -> None:
        entry = self.podman.inspect(name)
        gateway = entry["NetworkSettings"]["Networks"][BACK]["Gateway"]
        within = ["nsenter", f"--target={entry['State']['Pid']}", "--net"]
        script = Path(__file__).with_name("forward_dns.py")
        self._forwarder = subprocess.Popen(
            [*within, sys.executable, str(script), gateway], stdout=subprocess.PIPE, text=True
        )
        assert self._forwarder.stdout is not None
        assert self._forwarder.stdout.readline() == "ready\n"


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Wait for a state."""
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end, f"not within {WAIT_S:.0f} s: {what}"
        time.sleep(0.2)
