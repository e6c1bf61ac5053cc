"""Hostile input against a real server process: the drill of `benchmarks/drills/hostile.py`, but short."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import pytest

from benchmarks.drills.hostile import SETTINGS, Verdict, attack_grpc, attack_http, generate
from benchmarks.processes import Stack, all_in_one, free_port

Address = tuple[str, int]
TIMEOUT_S = 1.5  # long enough that a busy machine does not make an honest request late


@pytest.fixture(scope="module")
def grpc_address() -> Address:
    return "127.0.0.1", free_port()


@pytest.fixture(scope="module")
def stack(grpc_address: Address) -> Iterator[Stack]:
    limits = {
        "http": {**SETTINGS["http"], "head_timeout_s": TIMEOUT_S, "body_timeout_s": TIMEOUT_S, "max_connections": 40}
    }
    with all_in_one({**SETTINGS, **limits, "grpc": {"port": grpc_address[1]}}) as running:
        yield running
        (process,) = running.processes.values()
        assert process.is_alive
        assert process.stop() == 0


async def exchange(address: Address, payload: bytes) -> tuple[bytes, float]:
    """Everything that the server sends until it hangs up, and how long that took in seconds."""
    started = time.monotonic()
    reader, writer = await asyncio.open_connection(*address)
    writer.write(payload)
    received = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    await writer.wait_closed()
    return received, time.monotonic() - started


def problem_of(answer: bytes) -> dict[str, object]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head.lower()
    assert b"connection: close" in head.lower()
    document: dict[str, object] = json.loads(body)
    assert document["status"] == int(head[9:12])
    return document


def test_generated_requests_find_no_fault(stack: Stack) -> None:
    verdict = Verdict()
    assert generate(stack.address, 60, verdict, lambda _: None) >= 60
    assert verdict.problems == []
    assert verdict.statuses[200] > 0
    assert verdict.statuses[422] > 0


def test_attacks_over_http_find_no_fault(stack: Stack) -> None:
    verdict = Verdict()
    asyncio.run(attack_http(stack.address, verdict))
    assert verdict.problems == []
    assert verdict.num_attacks > 70
    assert {200, 400, 413, 415, 422} <= set(verdict.statuses)


def test_attacks_over_grpc_find_no_fault(stack: Stack, grpc_address: Address) -> None:
    verdict = Verdict()
    asyncio.run(attack_grpc(grpc_address, verdict))
    assert verdict.problems == []
    assert verdict.grpc_statuses["INVALID_ARGUMENT"] > 0


def test_a_verdict_sees_what_is_wrong() -> None:
    verdict = Verdict()
    verdict.note("fine", 503, "application/problem+json", b'{"status": 503}')
    assert verdict.problems == []
    verdict.note("crash", 500, "application/problem+json", b'{"status": 500}')
    verdict.note("plain", 400, "text/plain", b"bad")
    verdict.note("lie", 404, "application/problem+json", b'{"status": 400}')
    assert [problem.split()[0].rstrip(":") for problem in verdict.problems] == ["crash", "plain", "lie"]
    assert verdict.num_server_errors == 1


async def test_bytes_that_are_not_http_get_a_problem_document(stack: Stack) -> None:
    answer, _ = await exchange(stack.address, b"GET / HTTP/1.1\r\nHost h\r\n\r\n")
    assert problem_of(answer)["code"] == "malformed_request"


async def test_an_endless_head_is_cut_off(stack: Stack) -> None:
    answer, _ = await exchange(stack.address, b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000)
    assert problem_of(answer)["code"] == "payload_too_large"


@pytest.mark.parametrize("sent", [b"", b"GET /health", b"GET /health/live HTTP/1.1\r\nHost: h\r\n\r\nGET /he"])
async def test_a_head_that_does_not_end_is_hung_up_on(stack: Stack, sent: bytes) -> None:
    answer, seconds = await exchange(stack.address, sent)
    assert 0.9 * TIMEOUT_S < seconds < 30
    assert answer.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


async def test_a_request_that_takes_longer_than_a_head_may_is_served(stack: Stack) -> None:
    """The head's timer ends with the head: neither a slow body nor a quiet kept connection is held against it."""
    reader, writer = await asyncio.open_connection(*stack.address)
    for _ in range(2):
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: h\r\n\r\n")
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        assert answer.startswith(b"HTTP/1.1 200")
        await reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        await asyncio.sleep(1.2 * TIMEOUT_S)
    writer.close()
    await writer.wait_closed()


async def test_too_many_connections_are_refused_with_a_problem_document(stack: Stack) -> None:
    idle = [await asyncio.open_connection(*stack.address) for _ in range(45)]
    try:
        answer, _ = await exchange(stack.address, b"GET /health/live HTTP/1.1\r\nHost: h\r\n\r\n")
        assert problem_of(answer)["code"] == "unavailable"
        assert b"retry-after: 1" in answer.lower()
    finally:
        for _, writer in idle:
            writer.close()
    for _ in range(100):  # until the server has seen that they are gone
        answer, _ = await exchange(stack.address, b"GET /health/live HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        if answer.startswith(b"HTTP/1.1 200"):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(answer)
