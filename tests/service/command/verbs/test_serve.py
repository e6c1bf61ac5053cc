"""`recofuse serve` as a process of its own: it answers, ends in order, and refuses in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.command.calls import ROOT, assert_one_line, recofuse_process, run
from tests.service.error_cases import IR, VIS


@pytest.fixture
def null_server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`recofuse serve` with a stand-in engine on a port that it picked: the process and its address."""
    command = recofuse_process("serve", "--port", "0", "--grpc-port", "-1", "--engine", "null")
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(command, stderr=log, text=True, cwd=ROOT)
        try:
            yield server, _announced(server, tmp_path / "log")
        finally:
            if server.poll() is None:
                server.kill()
            server.wait()


def _announced(server: subprocess.Popen[str], log: Path) -> str:
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s and server.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("serving on "):
                return line.split()[2]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_serve_answers_and_ends_in_order(null_server: tuple[subprocess.Popen[str], str], pairs: Path) -> None:
    server, address = null_server
    assert httpx.get(f"{address}/health/ready", trust_env=False).status_code == 200
    files = {"vis": (pairs / "vis/a.png").read_bytes(), "ir": (pairs / "ir/a.png").read_bytes()}
    answer = httpx.post(f"{address}/v1/fuse", files=files, trust_env=False)
    assert answer.headers["content-type"] == "image/png"
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0


def test_options_count_before_settings_are_judged_together(tmp_path: Path) -> None:
    """A setting of the environment that goes with no model, and the option that says there is none."""
    environ = {**os.environ, "RECOFUSE_CODEC__KIND": "ready"}
    command = recofuse_process("serve", "--port", "0", "--grpc-port", "-1", "--engine", "null")
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(command, stderr=log, text=True, cwd=ROOT, env=environ)
        try:
            address = _announced(server, tmp_path / "log")
            answer = httpx.post(f"{address}/v1/fuse", files={"vis": VIS, "ir": IR}, trust_env=False)
            assert answer.content == VIS  # unread
        finally:
            server.kill()
            server.wait()
    assert_one_line(run("serve", "--engine", "core", RECOFUSE_CODEC__KIND="ready"), "real pictures")


def test_serve_refuses_bad_settings_in_one_line(weights: Path) -> None:
    assert_one_line(run("serve", "--engine", "magic"), "engine.kind")
    for options, word in (
        (("--weights", "nothing"), "nothing"),
        (("--host", "203.0.113.1"), "cannot listen"),
        (("--device", "cuda:100"), "device cuda:100: "),
    ):
        command = recofuse_process("serve", "--port", "0", "--grpc-port", "-1", *options)
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert word in done.stderr.splitlines()[-1]
