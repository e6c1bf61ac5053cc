"""Ways to a server: the four clients that a test runs over, two protocols, blocking and awaiting; and real processes.

It needs no server in this process, so that what uses only this also runs where nothing but the client is installed.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from recofuse_client import AsyncClient, Client, Retry
from service.terms.settings import PREFIX

ROOT = Path(__file__).parents[2]
NO_RETRY = Retry(max_attempts=1)
QUICK = Retry(max_attempts=1000, first_pause_s=0.02, max_pause_s=0.2)
KINDS = ("http", "grpc", "http-async", "grpc-async")


class Any4:
    """A client of either kind, awaited: the blocking one's calls run in threads."""

    def __init__(self, kind: str, url: str, **options: Any) -> None:
        self.kind = kind
        self.client: Any = AsyncClient(url, **options) if kind.endswith("async") else Client(url, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.client, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            if inspect.iscoroutinefunction(method):
                return await method(*arguments, **options)
            return await asyncio.to_thread(method, *arguments, **options)

        return call

    async def stream(self, frames: Any, *, seen: list[Any] | None = None, **options: Any) -> list[Any]:
        """All results of a stream, collected in `seen`."""
        collected: list[Any] = [] if seen is None else seen
        if self.kind.endswith("async"):
            async with self.client.stream(frames, **options) as results:
                async for result in results:
                    collected.append(result)
            return collected

        def read() -> None:
            with self.client.stream(frames, **options) as results:
                collected.extend(results)

        await asyncio.to_thread(read)
        return collected


@dataclass
class Reach:
    """How to reach a server: makes clients, and closes them."""

    addresses: dict[str, str]
    made: list[Any4]

    def client(self, kind: str, **options: Any) -> Any4:
        """A client of one of KINDS. It does not try again unless told to."""
        one = Any4(kind, self.addresses[kind.partition("-")[0]], **{"retry": NO_RETRY, "timeout_s": 20.0, **options})
        self.made.append(one)
        return one

    async def close(self) -> None:
        for one in self.made:
            await one.close()


@asynccontextmanager
async def reaching(http: str, grpc: str, *, tls: bool = False) -> AsyncIterator[Reach]:
    """Clients of a server at these addresses, host:port."""
    suffix = "s" if tls else ""
    reach = Reach({"http": f"http{suffix}://{http}", "grpc": f"grpc{suffix}://{grpc}"}, [])
    try:
        yield reach
    finally:
        await reach.close()


# real processes


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class CommandServer:
    """`recofuse serve` with a stand-in engine on two ports that stay the same, started and ended as often as needed."""

    def __init__(self, folder: Path) -> None:
        self.http_port, self.grpc_port = free_ports(2)
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def start(self, engine: str = "null", **settings: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        changed = {f"{PREFIX}{name}": value for name, value in settings.items()}
        ports = ["--port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service", "serve", *ports, "--engine", engine],
                stderr=log,
                cwd=ROOT,
                env={**clean, **changed},
            )

    def wait_until_ready(self) -> None:
        end_s = time.monotonic() + 90
        while time.monotonic() < end_s:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()
            try:
                if httpx.get(f"http://{self.http}/health/ready", trust_env=False, timeout=5).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(self._log.read_text())

    def metric(self, name: str) -> float:
        """A metric's value, 0 if it is not there."""
        lines = httpx.get(f"http://{self.http}/metrics", trust_env=False, timeout=10).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def kill(self) -> None:
        """End it as a crash would."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None
