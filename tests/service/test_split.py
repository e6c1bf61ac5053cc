"""The split deployment as its operator meets it: real processes of `recofuse api` and `worker` on a real Redis."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from service.terms.settings import PREFIX
from tests.fakes import pair
from tests.service.redis_server import RedisServer

pytestmark = pytest.mark.redis

ROOT = Path(__file__).parents[2]
VIS, IR = pair()
FILES = {"vis": ("v.png", VIS), "ir": ("i.png", IR)}
QUICK = {"QUEUE__LEASE_S": "1.0", "WORKER__HEARTBEAT_S": "0.3"}


class Process:
    """A verb of `recofuse` in a process of its own. address: of its HTTP port."""

    def __init__(self, folder: Path, queue: str, *words: str, **settings: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        changed = {f"{PREFIX}{name}": value for name, value in {**QUICK, "QUEUE__URL": queue, **settings}.items()}
        self.log = Path(tempfile.mkstemp(suffix=".log", dir=folder)[1])
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service", *words], stderr=log, cwd=ROOT, env={**clean, **changed}
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def address(self) -> str:
        """Once it is ready."""
        end = time.monotonic() + 60
        while time.monotonic() < end and self._process.poll() is None:
            for line in self.log.read_text().splitlines():
                if line.startswith(("serving on ", "working; ")):
                    return next(word.rstrip(";") for word in line.split() if word.startswith("http"))
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait(30)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


Starter = Callable[..., Process]


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="rq-") as path:
        server = RedisServer(Path(path), "--appendonly", "yes", "--appendfsync", "always")
        server.start()
        yield server
        server.kill()


@pytest.fixture
def start(redis: RedisServer, tmp_path: Path) -> Iterator[Starter]:
    started: list[Process] = []

    def start(*words: str, **settings: str) -> Process:
        started.append(Process(tmp_path, redis.url, *words, **settings))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def front_end(start: Starter) -> Process:
    return start("api", "--port", "0", "--grpc-port", "-1")


def fuse(address: str, **options: object) -> httpx.Response:
    return httpx.post(f"{address}/v1/fuse", files=FILES, timeout=40, trust_env=False, **options)  # type: ignore[arg-type]


def get(address: str) -> httpx.Response:
    return httpx.get(address, timeout=10, trust_env=False)


def until(claim: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.02)


def until_ended(location: str) -> dict[str, object]:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        document: dict[str, object] = get(location).json()
        if document["status"] not in ("queued", "running"):
            return document
        time.sleep(0.02)
    raise AssertionError(document)


def test_a_request_crosses_processes(start: Starter) -> None:
    api = front_end(start)
    address = api.address()
    assert get(f"{address}/health/ready").status_code == 503  # nobody works yet
    worker = start("worker", "--engine", "null")
    monitor = worker.address()
    assert get(f"{address}/health/ready").status_code == 200
    answer = fuse(address)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model-name"] == "null"
    assert answer.headers["content-type"] == "image/png"
    assert get(f"{monitor}/health/ready").json()["status"] == "ready"
    assert 'recofuse_jobs_finished_total{status="succeeded"} 1.0' in get(f"{monitor}/metrics").text
    until(lambda: "recofuse_queue_bytes 0.0" in get(f"{address}/metrics").text)  # what was handed out is forgotten soon
    mapped = Path(f"/proc/{api.pid}/maps")
    if mapped.exists():
        assert "libtorch" not in mapped.read_text()
    for process in (worker, api):
        process.signal(signal.SIGTERM)
        assert process.wait() == 0, process.log.read_text()


def test_callers_are_answered_although_their_worker_is_killed(start: Starter) -> None:
    address = front_end(start).address()
    slow = {"ENGINE__FIXED_BATCH_S": "20"}
    victim = start("worker", "--engine", "fixed", **slow)
    victim.address()
    with ThreadPoolExecutor(8) as callers:
        answers = [callers.submit(fuse, address) for _ in range(8)]
        end = time.monotonic() + 20
        while "recofuse_queue_leased 8.0" not in get(f"{address}/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.05)
        victim.kill()
        start("worker", "--engine", "null").address()
        assert [answer.result().status_code for answer in answers] == [200] * 8
    assert victim.wait() == -signal.SIGKILL


def test_accepted_jobs_outlive_front_end_and_redis(start: Starter, redis: RedisServer) -> None:
    first = front_end(start)
    prefer = {"Prefer": "respond-async"}
    locations = [fuse(first.address(), headers=prefer).headers["location"] for _ in range(5)]
    first.kill()
    redis.kill()
    redis.start()
    second = front_end(start).address()
    assert get(f"{second}{locations[0]}").json()["status"] == "queued"
    start("worker", "--engine", "null")
    for location in locations:
        assert until_ended(f"{second}{location}")["status"] == "succeeded"
        assert get(f"{second}{location}/result").content[:4] == b"\x89PNG"


def test_a_stopped_worker_hands_back_what_it_cannot_finish(start: Starter) -> None:
    address = front_end(start).address()
    slow = start("worker", "--engine", "fixed", ENGINE__FIXED_BATCH_S="3", BATCH__MAX_BATCH="1", WORKER__MAX_HELD="4",
                 WORKER__DRAIN_TIMEOUT_S="0.2")  # fmt: skip
    slow.address()
    with ThreadPoolExecutor(4) as callers:
        answers = [callers.submit(fuse, address) for _ in range(4)]
        end = time.monotonic() + 20
        while "recofuse_queue_leased 4.0" not in get(f"{address}/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.05)
        slow.signal(signal.SIGTERM)
        start("worker", "--engine", "null").address()
        assert [answer.result().status_code for answer in answers] == [200] * 4
    assert slow.wait() == 0, slow.log.read_text()


def test_dead_letters_are_listed_retried_and_dropped(start: Starter, redis: RedisServer, tmp_path: Path) -> None:
    address = front_end(start).address()
    locations = [fuse(address, headers={"Prefer": "respond-async"}).headers["location"] for _ in range(2)]
    once = {"QUEUE__MAX_ATTEMPTS": "1"}
    victim = start("worker", "--engine", "fixed", ENGINE__FIXED_BATCH_S="60", **once)
    victim.address()
    end = time.monotonic() + 20
    while "recofuse_queue_leased 2.0" not in get(f"{address}/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.05)
    victim.kill()
    start("worker", "--engine", "null", **once).address()
    for location in locations:
        document = until_ended(f"{address}{location}")
        assert document["status"] == "failed"

    def letters(*words: str) -> list[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        command = [sys.executable, "-m", "service", "dead-letters", *words, "--queue", redis.url]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=clean)
        return done.stdout.splitlines()

    listed = [json.loads(line) for line in letters("list", "--json")]
    assert {f"/v1/jobs/{letter['id']}" for letter in listed} == set(locations)
    assert {letter["code"] for letter in listed} == {"attempts_exhausted"}
    assert "attempts" in "".join(letters("list"))
    ((old, new),) = (line.split() for line in letters("retry", listed[0]["id"]))
    assert old == listed[0]["id"]
    assert until_ended(f"{address}/v1/jobs/{new}")["status"] == "succeeded"
    assert letters("drop", "--all") == [listed[1]["id"]]
    assert letters("list") == ["no dead letters"]


@pytest.mark.parametrize("words", [("api",), ("worker", "--engine", "null"), ("dead-letters", "list")])
@pytest.mark.parametrize(("url", "says"), [("memory://", "--queue"), ("redis://", "host is missing")])
def test_a_queue_that_cannot_be_shared_is_refused_in_one_line(words: tuple[str, ...], url: str, says: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    command = [sys.executable, "-m", "service", *words, "--queue", url]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=clean, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert says in done.stderr.splitlines()[-1]
