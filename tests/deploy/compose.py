"""docker-compose.yml without Docker: its services as local processes, with the commands and environments it gives them.

Every container gets a loopback address of its own (127.N.SERVICE.REPLICA) and keeps its ports, so nothing about ports
is changed. What is replaced, in commands, environments and mounted files: 0.0.0.0 by the container's address, names of
services before a port by theirs, mount points by the files behind them, `/tmp/` by a folder of the container's, and
the container network's resolver by one of ours. Prometheus resolves names through the system, so its dns_sd_configs
become static ones. Images are replaced by what this machine has installed: BINARIES. Its nginx may be older than
the one of the compose file; then what that one resolves while it runs is written down as addresses.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.service.redis_server import find_redis

ROOT = Path(__file__).parents[2]
RESOLVER = "127.0.0.11"
NOT_RUN = {"grafana", "dcgm-exporter", "worker-gpu"}  # no such program or device here
BINARIES = {
    "proxy": "nginx",
    "prometheus": "prometheus",
    "alertmanager": "prometheus-alertmanager",
    "blackbox-exporter": "prometheus-blackbox-exporter",
    "node-exporter": "prometheus-node-exporter",
    "redis-exporter": "prometheus-redis-exporter",
}
HAS_ENTRYPOINT = BINARIES.keys() - {"proxy"}  # their images name the program themselves
RESOLVES_UPSTREAMS = (1, 27, 3)  # the first nginx that does
DEPLOYED_NGINX = "deploy/nginx/nginx.conf"
STOPPED_S = 90.0
READY_S = 120.0


def interpolated(text: str, variables: dict[str, str]) -> str:
    """A text with ${NAME:-default} filled in as Compose does."""

    def fill(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match["name"]) or match["default"] or ""

    return re.sub(r"\$\$|\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}", fill, text)


def compose_file(variables: dict[str, str] | None = None) -> dict[str, Any]:
    """docker-compose.yml, parsed, with its anchors resolved and its variables filled in."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return interpolated(node, variables or {}) if isinstance(node, str) else node

    filled: dict[str, Any] = walk(document)
    return filled


def image_environment(target: str) -> dict[str, str]:
    """The RECOFUSE_ variables that a stage of the Dockerfile sets."""
    stage = ""
    found: dict[str, str] = {}
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if match := re.match(r"FROM \S+ AS (\S+)", line):
            stage = match[1]
        if stage == target and line.startswith("ENV "):
            found.update((word.partition("=")[0], word.partition("=")[2]) for word in line.split()[1:])
    return {name: value for name, value in found.items() if name.startswith("RECOFUSE_")}


def image_health_check(target: str) -> list[str]:
    """The command of a stage's HEALTHCHECK."""
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    stage = text.partition(f" AS {target}\n")[2].partition("\nFROM ")[0]
    match = re.search(r"HEALTHCHECK .*?CMD (\[.*\])", stage)
    assert match is not None
    words: list[str] = yaml.safe_load(match[1])
    return words


def readme_command(start: str) -> list[str]:
    """The words after `start` of a command in README's Deploy section."""
    section = (ROOT / "README.md").read_text("utf-8").partition("\n## Deploy")[2].partition("\n## ")[0]
    match = re.search(rf"{re.escape(start)}((?:\\\n|.)*)$", section, re.MULTILINE)
    assert match is not None, f"README's Deploy section has no command {start!r}"
    return shlex.split(match[1].rstrip(")").replace("\\\n", " "))


def nginx_version() -> tuple[int, ...]:
    """Of the nginx that is installed here."""
    said = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr
    match = re.search(r"nginx/([\d.]+)", said)
    assert match is not None, said
    return tuple(map(int, match[1].split(".")))


@dataclass
class Container:
    """One local process in a container's place. check: its health check, empty for none."""

    name: str
    address: str
    command: list[str]
    environ: dict[str, str]
    folder: Path
    check: list[str] = field(default_factory=list)
    stop_signal: signal.Signals = signal.SIGTERM
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environ, cwd=self.folder
            )

    def wait_healthy(self, port: int = 0) -> None:
        """Until its health check succeeds, or, given a port, until somebody listens there."""
        end = time.monotonic() + READY_S
        while not self._is_healthy(port):
            assert self.process is not None
            assert self.process.poll() is None, f"{self.name} ended\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"{self.name} is not healthy\n{self.log.read_text()[-3000:]}"
            time.sleep(0.2)

    def _is_healthy(self, port: int) -> bool:
        if port:
            with socket.socket() as probe:
                return probe.connect_ex((self.address, port)) == 0
        return subprocess.run(self.check, env=self.environ, capture_output=True, check=False).returncode == 0

    def stop(self) -> int:
        """An orderly end as Docker does it; returns the exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(self.stop_signal)
        try:
            return self.process.wait(STOPPED_S)
        finally:
            self.process.kill()
            self.process = None


class Names(threading.Thread):
    """The container network's resolver: all addresses of a service, in random order, to A queries over UDP."""

    def __init__(self, address: str, table: dict[str, list[str]]) -> None:
        super().__init__(daemon=True)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 0))
        self.address = f"{address}:{self._socket.getsockname()[1]}"
        self._table = table

    def run(self) -> None:
        while True:
            try:
                query, sender = self._socket.recvfrom(512)
            except OSError:
                return  # closed
            labels, at = [], 12
            while length := query[at]:
                labels.append(query[at + 1 : at + 1 + length].decode())
                at += 1 + length
            end = at + 5
            known = self._table.get(".".join(labels), []) if query[at + 1 : at + 3] == b"\0\1" else []
            records = b"".join(
                b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", 2, 4) + socket.inet_aton(address)
                for address in random.sample(known, len(known))
            )
            head = query[:2] + b"\x81\x80\0\1" + struct.pack(">H", len(known)) + b"\0\0\0\0"
            self._socket.sendto(head + query[12:end] + records, sender)

    def close(self) -> None:
        self._socket.close()


def _claimed_network() -> tuple[int, socket.socket]:
    """A network 127.N that no other stack on this machine has, and the socket that says so while it is open."""
    for network in random.sample(range(64, 124), 60):
        with contextlib.suppress(OSError):
            return network, socket.create_server((f"127.{network}.0.1", 5353))
    raise RuntimeError("all networks are taken")


class LocalStack:
    """The services of docker-compose.yml as processes. settings: what a user writes into .env."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self._settings = settings
        self._compose = compose_file()
        shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("secrets", "kubernetes"))
        subprocess.run(["sh", "deploy/make-secrets.sh"], cwd=folder, check=True, capture_output=True)
        network, self._claim = _claimed_network()
        self._replicas: dict[str, list[str]] = {}
        for index, (name, service) in enumerate(self._compose["services"].items(), 1):
            count = service.get("deploy", {}).get("replicas", 1)
            self._replicas[name] = [f"127.{network}.{index}.{number}" for number in range(1, count + 1)]
        self._names = Names(f"127.{network}.0.1", self._replicas)
        self._names.start()
        self.containers: dict[str, list[Container]] = {}

    def addresses(self, name: str) -> list[str]:
        """Of a service's replicas, or of all services that can run here and share an alias."""
        services = self._compose["services"]
        aliased = [
            service
            for service, entry in services.items()
            if isinstance(entry.get("networks"), dict) and service not in NOT_RUN
            for network in entry["networks"].values()
            if name in (network or {}).get("aliases", [])
        ]
        return [address for service in aliased or [name] for address in self._replicas[service]]

    def can_run(self, name: str) -> str:
        """Why a service cannot be run here, or an empty string."""
        if name in NOT_RUN:
            return f"{name} has no program or device here"
        if name == "redis":
            return "" if find_redis() else "there is no redis-server"
        program = BINARIES.get(name)
        return "" if program is None or shutil.which(program) else f"{program} is not installed"

    def start(self, name: str) -> list[Container]:
        """Start all replicas of a service."""
        started = [self._container(name, number) for number in range(len(self._replicas[name]))]
        self.containers[name] = started
        for container in started:
            container.start()
        return started

    def close(self) -> None:
        """End everything: Redis last, without which workers cannot say what became of their jobs."""
        running = [container for name, replicas in self.containers.items() if name != "redis" for container in replicas]
        for container in running:
            if container.process is not None:
                container.process.send_signal(container.stop_signal)
        for container in (*running, *self.containers.get("redis", [])):
            container.stop()
        self._names.close()
        self._claim.close()

    def _container(self, name: str, number: int) -> Container:
        service = self._compose["services"][name]
        address = self._replicas[name][number]
        folder = self.folder / f"{name}-{number + 1}"
        (folder / "tmp").mkdir(parents=True)
        mounts = self._mounts(service, folder, address)

        def local(text: str) -> str:
            return self._local(text, address, folder, mounts)

        environ = {key: value for key, value in os.environ.items() if not key.startswith("RECOFUSE_")}
        check: list[str] = []
        command = [str(word) for word in service.get("command", [])]
        if (build := service.get("build")) is not None:
            target = build["target"]
            environ |= {key: local(value) for key, value in image_environment(target).items()}
            environ["PYTHONPATH"] = str(ROOT)
            program = [sys.executable, "-m", "service"]
            check = [local(word.replace("127.0.0.1", address)) for word in image_health_check(target)]
            check[0] = sys.executable
            if "env_file" in service:
                environ |= self._settings
        elif name == "redis":
            program, command = [str(find_redis())], command[1:]
        else:
            program = [BINARIES[name]]
            command = command if name in HAS_ENTRYPOINT else command[1:]
        environ |= {key: local(str(value)) for key, value in service.get("environment", {}).items()}
        words = [*program, *map(local, command)]
        if name == "proxy":
            words[words.index("daemon off;")] = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
        stop_signal = signal.Signals[service.get("stop_signal", "SIGTERM")]
        return Container(f"{name}-{number + 1}", address, words, environ, folder, check, stop_signal)

    def _mounts(self, service: dict[str, Any], folder: Path, address: str) -> dict[str, str]:
        """What stands behind each mount point; files are copied, with names replaced by addresses."""
        mounts: dict[str, str] = {}
        for secret in service.get("secrets", []):
            source = self.folder / self._compose["secrets"][secret]["file"]
            mounts[f"/run/secrets/{secret}"] = str(self._copied(source, folder / secret, address, folder, {}))
        for volume in service.get("volumes", []):
            source_name, target = volume.split(":")[:2]
            if source_name.startswith("./deploy"):
                mounts[target] = str(folder / f"mount{len(mounts)}")
            elif source_name == "/":
                mounts[target] = "/"
            else:  # a named volume, the same for all
                (self.folder / f"volume-{source_name}").mkdir(exist_ok=True)
                mounts[target] = str(self.folder / f"volume-{source_name}")
        for volume in service.get("volumes", []):
            source_name, target = volume.split(":")[:2]
            if source_name.startswith("./deploy"):
                self._copied(self.folder / source_name, Path(mounts[target]), address, folder, mounts)
        return mounts

    def _copied(self, source: Path, target: Path, address: str, folder: Path, mounts: dict[str, str]) -> Path:
        if source.is_dir():
            target.mkdir()
            for entry in source.iterdir():
                self._copied(entry, target / entry.name, address, folder, mounts)
            return target
        text = source.read_text("utf-8")
        if source.name == "prometheus.yml":
            text = self._without_dns(text)
        if source.name == "nginx.conf" and nginx_version() < RESOLVES_UPSTREAMS:
            text = self._for_older_nginx(text)
        target.write_text(self._local(text, address, folder, mounts), "utf-8")
        return target

    def _local(self, text: str, address: str, folder: Path, mounts: dict[str, str]) -> str:
        paths = {**mounts, "/tmp": f"{folder}/tmp"}
        longest_first = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
        text = re.sub(rf"(?<![\w/.])({longest_first})(?![\w-])", lambda match: paths[match[1]], text)
        text = text.replace("0.0.0.0", address).replace(RESOLVER, self._names.address)
        for name, addresses in self._replicas.items():
            if len(addresses) == 1:
                text = re.sub(rf"(?<![\w.$-]){name}:(?=\d)", f"{addresses[0]}:", text)
        return text.replace("localhost:9090", f"{address}:9090")

    def _for_older_nginx(self, text: str) -> str:
        def written_down(match: re.Match[str]) -> str:
            lines = [f"server {address}:{match[2]}{match[3]};" for address in self._replicas[match[1]]]
            return " ".join(lines)

        text, count = re.subn(r"server (\w+):(\d+) resolve([^;]*);", written_down, text)
        assert count == len(re.findall(r"^ *upstream ", text, re.MULTILINE))
        assert "http2 on;" in text
        return text.replace("http2 on;", "").replace("8443 ssl;", "8443 ssl http2;")

    def _without_dns(self, text: str) -> str:
        document = yaml.safe_load(text)
        for job in (*document["scrape_configs"], *document["alerting"]["alertmanagers"]):
            targets = [
                f"{address}:{found['port']}"
                for found in job.pop("dns_sd_configs", [])
                for name in found["names"]
                if name not in NOT_RUN
                for address in self.addresses(name)
            ]
            if targets:
                job["static_configs"] = [{"targets": targets}]
        document["scrape_configs"] = [job for job in document["scrape_configs"] if "static_configs" in job]
        document["global"]["scrape_interval"] = "1s"  # nobody waits a quarter of a minute for a test
        return yaml.safe_dump(document)
