"""What is tried again and when, without a server; and what answers that are not recofuse's are taken for."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import recofuse_client as rc
from recofuse_client import errors
from recofuse_client.errors import BY_CODE, RecofuseError, error_of
from recofuse_client.http import _translated
from recofuse_client.protocols import Target
from recofuse_client.retries import Deadline, Operation, Pause, Send, is_safe_to_repeat, retried, run, run_async
from recofuse_client.rpc import error_of_call
from service.terms.errors import ErrorCode
from tests.client.reach import KINDS, NO_RETRY, QUICK, Any4

VIS, IR = np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), np.uint8)
TRANSPORT = {"connection_failed", "connection_lost", "bad_answer"}
REFUSED = {ErrorCode.OVERLOADED, ErrorCode.RATE_LIMITED, ErrorCode.UNAVAILABLE}


# the tree


def test_every_error_of_the_server_has_a_class_of_its_own() -> None:
    assert set(BY_CODE) == {*ErrorCode, *TRANSPORT}
    for code, kind in BY_CODE.items():
        assert kind.code == code
        assert kind is getattr(rc, kind.__name__)
    drawn = (inspect.getdoc(errors) or "").partition("An error of the server")[0]
    for kind in BY_CODE.values():
        assert kind.__name__ in drawn


def test_an_error_of_a_newer_server_is_told_and_never_repeated() -> None:
    error = error_of("moon_phase", "the moon is wrong", request_id="r1", retry_after_s=2)
    assert type(error) is rc.InternalError
    assert str(error) == "the moon is wrong (moon_phase)"
    assert error.request_id == "r1"
    assert not is_safe_to_repeat(error, is_idempotent=True)
    assert type(error_of("connection_lost", "")) is rc.InternalError  # not the server's to say


@pytest.mark.parametrize("code", [*ErrorCode, *sorted(TRANSPORT)])
@pytest.mark.parametrize("is_idempotent", [True, False])
def test_what_is_safe_to_repeat(code: str, is_idempotent: bool) -> None:
    expected = code in REFUSED or code == "connection_failed" or (code == "connection_lost" and is_idempotent)
    assert is_safe_to_repeat(BY_CODE[code](""), is_idempotent=is_idempotent) is expected


# pauses and deadlines


@given(
    st.integers(1, 10_000),
    st.none() | st.floats(0, 1e4),
    st.floats(0, 1),
    st.floats(0.001, 1),
    st.floats(1, 100),
)
def test_pauses_keep_to_their_bounds(
    num: int, advice_s: float | None, chance: float, first: float, most: float
) -> None:
    retry = rc.Retry(first_pause_s=first, max_pause_s=most)
    pause_s = retry.pause_s(num, advice_s, chance)
    if advice_s is None:
        assert 0 < pause_s <= min(most, first * 2.0 ** min(num - 1, 60)) * (1 + 1e-9)
    else:
        assert advice_s <= pause_s <= 1.25 * advice_s


def attempts(outcomes: list[RecofuseError | str]) -> Any:
    """An operation whose attempts come to these ends, one after the other."""

    def attempt(timeout_s: float) -> Operation[str, str]:
        assert timeout_s > 0
        yield Send("request", timeout_s)
        outcome = outcomes.pop(0)
        if isinstance(outcome, RecofuseError):
            raise outcome
        return outcome

    return attempt


def drive(operation: Operation[str, str]) -> tuple[str, list[float]]:
    pauses: list[float] = []
    return run(operation, lambda request, timeout_s: None, pauses.append), pauses


def test_attempts_follow_the_servers_advice_and_then_succeed() -> None:
    busy = rc.OverloadedError("full", retry_after_s=3.0)
    outcomes: list[RecofuseError | str] = [busy, rc.ConnectionFailedError("down"), "done"]
    answer, pauses = drive(retried(attempts(outcomes), rc.Retry(), Deadline(60), is_idempotent=False))
    assert answer == "done"
    assert 3.0 <= pauses[0] <= 3.75
    assert 0 < pauses[1] <= 0.4


@pytest.mark.parametrize(
    ("error", "is_idempotent", "num_left"),
    [
        (rc.ConnectionLostError("gone"), False, 5),
        (rc.ConnectionLostError("gone"), True, 2),  # four attempts
        (rc.OverloadedError("full"), False, 2),
        (rc.OverloadedError("full", retry_after_s=1000), False, 5),  # beyond the deadline
        (rc.InvalidInputError("bad", retry_after_s=0.1), True, 5),
        (rc.TimedOutError("late"), True, 5),
        (rc.OutOfMemoryError("large"), True, 5),
    ],
)
def test_attempts_end(error: RecofuseError, is_idempotent: bool, num_left: int) -> None:
    outcomes: list[RecofuseError | str] = [error] * 6
    operation = retried(attempts(outcomes), rc.Retry(max_attempts=4), Deadline(60), is_idempotent=is_idempotent)
    with pytest.raises(type(error)) as raised:
        drive(operation)
    assert raised.value is error
    assert len(outcomes) == num_left


async def test_both_drivers_do_the_same() -> None:
    seen: list[str] = []

    def operation() -> Operation[str, str]:
        first = yield Send("a", 1.0)
        yield Pause(0.0)
        try:
            yield Send("b", 1.0)
        except rc.ConnectionLostError:
            return f"{first}, then lost"
        return "never"

    def send(request: str, timeout_s: float) -> str:
        seen.append(request)
        if request == "b":
            raise rc.ConnectionLostError("gone")
        return f"answer to {request}"

    async def send_async(request: str, timeout_s: float) -> str:
        return send(request, timeout_s)

    assert run(operation(), send) == await run_async(operation(), send_async) == "answer to a, then lost"
    assert seen == ["a", "b", "a", "b"]


def test_impossible_policies_and_addresses() -> None:
    for wrong in ({"max_attempts": 0}, {"first_pause_s": 0}, {"first_pause_s": 3, "max_pause_s": 2}):
        with pytest.raises(ValueError, match="max_attempts"):
            rc.Retry(**wrong)
    for url in ("localhost:8000", "ftp://host", "http://", "grpc://host:1/path", "http://host?x=1"):
        with pytest.raises(ValueError, match=r"accepted are|no path"):
            rc.Client(url)
    with pytest.raises(ValueError, match="both cert and key"):
        rc.Client("https://host", cert="cert.pem")
    with pytest.raises(ValueError, match="grpcs"):
        rc.Client("grpc://host:1", ca="ca.pem")
    with pytest.raises(OSError, match="none"):
        rc.Client("grpcs://host:1", ca="/none")
    assert Target.of("https://host/fusion/").address == "host/fusion"


@pytest.mark.parametrize("scheme", ["http", "grpc"])
async def test_keys_that_no_header_can_hold_are_refused_and_not_told(scheme: str) -> None:
    for secret in ("rf_secret\n", "rf secret", "rf_sécret", "rf_secret\x7f"):
        for kind in (rc.Client, rc.AsyncClient):
            with pytest.raises(ValueError, match="api_key: accepted") as raised:
                kind(f"{scheme}://127.0.0.1:9", api_key=secret)
            assert "rf" not in str(raised.value)
    with rc.Client(f"{scheme}://127.0.0.1:9", api_key="rf_secret", retry=NO_RETRY) as client:
        for key in ("a b", "a\n", "ä", "a" * 256):
            for call in (client.fuse, client.submit):
                with pytest.raises(ValueError, match="idempotency_key"):
                    call(VIS, IR, idempotency_key=key)


def test_what_http_cannot_say_is_not_tried_again_and_not_quoted() -> None:
    error = _translated(httpx.LocalProtocolError("Illegal header value b'Bearer rf_secret'"))
    assert type(error) is rc.MalformedRequestError
    assert "rf_secret" not in str(error)
    assert not is_safe_to_repeat(error, is_idempotent=True)


# answers of others


@asynccontextmanager
async def answering(raw: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Something on a socket that reads a request and answers these bytes, then hangs up; and the requests so far."""
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line), 0
        )
        await reader.readexactly(length)
        heads.append(head)
        writer.write(raw)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", heads


@pytest.mark.parametrize("kind", ["http", "http-async"])
async def test_a_deadline_holds_against_an_answer_that_trickles(kind: str) -> None:
    is_over, is_left = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
        while not is_over.is_set():
            writer.write(b" ")
            await asyncio.sleep(0.1)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        is_left.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        client = Any4(kind, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", retry=NO_RETRY)
        asking = asyncio.ensure_future(client.models(timeout_s=0.5))
        try:
            done, _ = await asyncio.wait([asking], timeout=30)
        finally:
            is_over.set()
        assert done
        with pytest.raises(rc.TimedOutError):
            await asking
        await client.close()
        await is_left.wait()


def plain(status: str, body: bytes = b"<h1>sorry</h1>", kind: str = "text/html", more: str = "") -> bytes:
    """An answer that says that the connection ends with it; a client might send its next request into one that does."""
    more += "Connection: close\r\n"
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


def proxy_says(code: str) -> tuple[bytes, str]:
    """The body and type of an answer of the proxy in deploy/nginx."""
    return json.dumps({"code": code, "detail": "sorry"}).encode(), "application/problem+json"


@pytest.mark.parametrize("kind", ["http", "http-async"])
@pytest.mark.parametrize(
    ("raw", "expected", "num_requests"),
    [
        (plain("502 Bad Gateway"), rc.ConnectionLostError, 1),
        (plain("504 Gateway Timeout"), rc.ConnectionLostError, 1),
        (plain("502 Bad Gateway", *proxy_says("connection_lost")), rc.ConnectionLostError, 1),
        (plain("502 Bad Gateway", *proxy_says("unavailable")), rc.UnavailableError, 3),
        (plain("504 Gateway Timeout", *proxy_says("timed_out")), rc.TimedOutError, 1),
        (plain("500 Internal", *proxy_says("connection_lost")), rc.InternalError, 1),
        (plain("503 Service Unavailable"), rc.UnavailableError, 3),
        (plain("429 Too Many Requests", more="Retry-After: 1000\r\n"), rc.OverloadedError, 1),
        (plain("413 Too Large"), rc.PayloadTooLargeError, 1),
        (plain("401 No"), rc.UnauthenticatedError, 1),
        (plain("418 Teapot"), rc.BadAnswerError, 1),
        (plain("302 Found", more="Location: /login\r\n"), rc.BadAnswerError, 1),
        (plain("200 OK"), rc.BadAnswerError, 1),
        (plain("200 OK", b"\x93NUMPY junk", "application/x-npy"), rc.BadAnswerError, 1),
        (plain("200 OK", b"GIF", "image/gif", "X-Picture: aura\r\n"), rc.BadAnswerError, 1),
        (plain("200 OK", b"PK junk", "application/zip"), rc.BadAnswerError, 1),
        (plain("422 Bad", b"{", "application/problem+json"), rc.BadAnswerError, 1),
        (b"", rc.ConnectionLostError, 1),
        (b"SSH-2.0 hello\r\n", rc.ConnectionLostError, 1),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort", rc.ConnectionLostError, 1),
    ],
)
async def test_what_answers_of_others_are_taken_for(
    kind: str, raw: bytes, expected: type[RecofuseError], num_requests: int
) -> None:
    async with answering(raw) as (url, heads):
        client = Any4(kind, url, retry=rc.Retry(max_attempts=3, first_pause_s=0.01, max_pause_s=0.02), timeout_s=20)
        with pytest.raises(expected) as raised:
            await client.fuse(VIS, IR)
        await client.close()
    assert type(raised.value) is expected
    assert len(heads) == num_requests
    assert b"idempotency-key" not in heads[0].lower()


@pytest.mark.parametrize("kind", ["http", "http-async"])
async def test_what_a_newer_server_tells_of_its_models_is_left_out(kind: str) -> None:
    model = {"name": "compact", "version": "9", "default_steps": 4, "default_sampler": "ode1", "devices": ["cpu"]}
    body = json.dumps({"models": [{**model, "num_workers": 2, "mood": "good"}]}).encode()
    async with answering(plain("200 OK", body, "application/json")) as (url, _):
        client = Any4(kind, url, retry=NO_RETRY, timeout_s=20)
        (told,) = await client.models()
        assert (told.name, told.devices, told.num_workers) == ("compact", ("cpu",), 2)
        assert (told.default_exposure, told.exposures) == (
            "as_shot",
            ("as_shot",),
        )  # of an older one, which says neither
        await client.close()


@pytest.mark.parametrize("kind", ["http", "http-async"])
async def test_what_may_be_repeated_is_repeated_under_one_key(kind: str) -> None:
    async with answering(plain("502 Bad Gateway")) as (url, heads):
        client = Any4(kind, url, retry=rc.Retry(max_attempts=3, first_pause_s=0.01, max_pause_s=0.02), timeout_s=20)
        for call in (client.submit(VIS, IR), client.job("a1"), client.cancel("a1"), client.models()):
            heads.clear()
            with pytest.raises(rc.ConnectionLostError):
                await call
            assert len(heads) == 3
        heads.clear()
        with pytest.raises(rc.ConnectionLostError):
            await client.submit(VIS, IR)
        await client.close()
    keys = {line for head in heads for line in head.lower().split(b"\r\n") if line.startswith(b"idempotency-key")}
    assert len(keys) == 1


@pytest.mark.parametrize("kind", ["grpc", "grpc-async"])
async def test_grpc_to_something_that_is_none(kind: str) -> None:
    async with answering(plain("200 OK")) as (url, _):
        client = Any4(kind, url.replace("http", "grpc"), retry=NO_RETRY, timeout_s=10)
        with pytest.raises((rc.TransportError, rc.TimedOutError)):
            await client.fuse(VIS, IR)
        await client.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_nobody_there(kind: str) -> None:
    url = f"{kind.partition('-')[0]}://127.0.0.1:9"  # the discard service, which nobody runs
    client = Any4(kind, url, retry=NO_RETRY, timeout_s=20)
    with pytest.raises(rc.ConnectionFailedError, match="no connection"):
        await client.fuse(VIS, IR)
    patient = Any4(kind, url, retry=QUICK, timeout_s=0.5)
    started_s = time.monotonic()
    with pytest.raises((rc.ConnectionFailedError, rc.TimedOutError)):
        await patient.fuse(VIS, IR)
    assert time.monotonic() - started_s < 15
    for one in (client, patient):
        await one.close()


def test_statuses_of_grpc_itself() -> None:
    import grpc

    class Ended(grpc.RpcError):
        def __init__(self, code: grpc.StatusCode, text: str) -> None:
            self._code, self._text = code, text

        def code(self) -> grpc.StatusCode:
            return self._code

        def details(self) -> str:
            return self._text

        def trailing_metadata(self) -> Any:
            return (("x-request-id", "r1"), ("grpc-status-details-bin", b"\xff junk"))

    cases = {
        rc.ConnectionLostError: [
            ("UNAVAILABLE", "Socket closed"), ("INTERNAL", "Received RST_STREAM with error code 2"),
            ("UNKNOWN", "Stream removed"), ("CANCELLED", "CANCELLED"), ("CANCELLED", ""),
        ],
        rc.CancelledError: [("CANCELLED", "Locally cancelled by application!")],
        rc.ConnectionFailedError: [("UNAVAILABLE", "failed to connect to all addresses; last error: ...")],
        rc.PayloadTooLargeError: [("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (8 vs. 4)")],
        rc.OverloadedError: [("RESOURCE_EXHAUSTED", "Concurrent RPC limit exceeded!")],
        rc.TimedOutError: [("DEADLINE_EXCEEDED", "Deadline Exceeded")],
        rc.RouteNotFoundError: [("UNIMPLEMENTED", "Method not found!")],
        rc.BadAnswerError: [("DATA_LOSS", "?")],
    }  # fmt: skip
    for kind, ends in cases.items():
        for name, text in ends:
            assert type(error_of_call(Ended(grpc.StatusCode[name], text))) is kind
