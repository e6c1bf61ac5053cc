"""Hostile input: requests generated from the OpenAPI document, and hand-written attacks on every layer below it.

Passes if no answer is a 5xx other than a documented 503 or 504, every refusal of the application is a problem
document, honest requests are served all the while, the process lives, and its memory does not grow over the rounds.
`tests/service/test_hostile.py` runs the same parts, smaller.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import grpc
import hypothesis
import numpy as np
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok

from benchmarks.drills import Report, Say
from benchmarks.hostile_files import crafted_files, sound_files
from benchmarks.load import BOUNDARY, fuse_request, picture_pair, png
from benchmarks.processes import Process, all_in_one, free_port

NUM_GENERATED = 2400
NUM_ROUNDS = 8
MAX_GROWTH_MIB = 24.0  # between the second round and the last; a fragmented heap moves by a few
ANSWER_S = 15.0

SETTINGS: dict[str, dict[str, Any]] = {
    "engine": {"kind": "null"},
    "http": {"body_timeout_s": 2, "head_timeout_s": 2},
    "log": {"level": "ERROR"},
}


def run(*, is_quick: bool, say: Say) -> Report:
    """A server process of its own under everything below."""
    num_generated = 200 if is_quick else NUM_GENERATED
    num_rounds = 3 if is_quick else NUM_ROUNDS
    grpc_port = free_port()
    verdict = Verdict()
    with all_in_one({**SETTINGS, "grpc": {"port": grpc_port}}) as stack:
        (process,) = stack.processes.values()
        rss_mib: list[float] = []
        for number in range(1, num_rounds + 1):
            asyncio.run(attack_http(stack.address, verdict))
            asyncio.run(attack_grpc(("127.0.0.1", grpc_port), verdict))
            rss_mib.append(process.rss_bytes() / 2**20)
            say(f"round {number} of {num_rounds}: {verdict.num_requests} attacks, {rss_mib[-1]:.0f} MiB")
        before_mib = process.rss_bytes() / 2**20
        num_done = generate(stack.address, num_generated, verdict, say)
        after_mib = process.rss_bytes() / 2**20
        asyncio.run(_expect_service(stack.address, verdict))
        verdict.expect(process.is_alive, "the process has ended")
        exit_status = _ended(process, verdict)
    growth_mib = max(rss_mib[-1] - rss_mib[1], after_mib - before_mib)
    verdict.expect(growth_mib <= MAX_GROWTH_MIB, f"memory grew by {growth_mib:.0f} MiB")
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(verdict.statuses.items()))
    line = (
        f"{num_done} generated requests and {verdict.num_attacks} attacks over HTTP and gRPC; HTTP answers {statuses}; "
        f"{verdict.num_server_errors} server errors, memory {growth_mib:+.1f} MiB, exit status {exit_status}"
    )
    if verdict.problems:
        line += f" [{len(verdict.problems)} problems, the first: {verdict.problems[0]}]"
    figures = {
        "num_generated": num_done,
        "num_attacks": verdict.num_attacks,
        "statuses": {str(status): count for status, count in verdict.statuses.items()},
        "grpc_statuses": dict(verdict.grpc_statuses),
        "rss_mib_by_round": [round(value, 1) for value in rss_mib],
        "rss_mib_generated": [round(before_mib, 1), round(after_mib, 1)],
        "problems": verdict.problems[:50],
    }
    return Report(not verdict.problems, line, figures)


def _ended(process: Process, verdict: Verdict) -> int:
    status = process.stop()
    verdict.expect(status == 0, f"SIGTERM ended it with status {status}")
    return status


@dataclass(slots=True)
class Verdict:
    """What was answered, and everything that should not have been."""

    statuses: Counter[int] = field(default_factory=Counter)
    grpc_statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_requests: int = 0
    num_attacks: int = 0
    num_server_errors: int = 0

    def expect(self, claim: bool, problem: str) -> None:
        """Note a problem unless the claim holds."""
        if not claim:
            self.problems.append(problem)

    def note(self, what: str, status: int, media_type: str, body: bytes) -> None:
        """Judge one HTTP answer."""
        self.num_requests += 1
        self.statuses[status] += 1
        is_unexpected = status >= 500 and status not in (503, 504)
        self.num_server_errors += is_unexpected
        self.expect(not is_unexpected, f"{what} was answered {status}")
        if status >= 400 and not (status == 503 and b'"unavailable"' in body):  # /health/ready has its own document
            is_problem = media_type.startswith("application/problem+json")
            self.expect(is_problem, f"{what} was answered {status} as {media_type or 'nothing'}")
            if is_problem and body:
                document = json.loads(body)
                self.expect(document["status"] == status, f"{what}: the document says {document['status']}")


# requests from the OpenAPI document


def generate(address: tuple[str, int], num_requests: int, verdict: Verdict, say: Say) -> int:
    """At least num_requests generated requests, valid and invalid by the document; returns how many were sent."""
    url = f"http://{address[0]}:{address[1]}"
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", wait_for_schema=10)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    verdict.expect(len(operations) >= 8, f"the document lists {len(operations)} operations only")
    with_input = [operation for operation in operations if operation.body or operation.path_parameters]
    vis, ir = _small_pair()
    num_before = verdict.num_requests
    session = requests.Session()

    def send(case: Case[Any], images: str) -> None:
        if images != "generated" and isinstance(case.body, dict):  # so that what comes after the images is reached
            files: dict[str, Any] = {"vis": vis if images == "valid" else vis[: len(vis) // 2], "ir": ir}
            if case.media_type == "multipart/form-data":
                case.body |= files
            else:
                case.body["inputs"] = [_file_tensor(name, content) for name, content in files.items()]
                case.path_parameters["model_name"] = "recofuse"
        answer = case.call(base_url=url, session=session, timeout=ANSWER_S)
        verdict.note(
            f"generated {case.method} {case.path}",
            answer.status_code,
            (answer.headers.get("content-type") or [""])[0],
            answer.content if case.method != "HEAD" else b"",
        )

    for operation in operations:
        modes = [GenerationMode.POSITIVE]
        share = 1  # operations without input have one request each
        if operation in with_input:
            modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
            share = -(-num_requests // (2 * len(with_input)))
        for mode in modes:
            _exhaust(operation.as_strategy(generation_mode=mode), share, send)
        say(f"{operation.label}: {verdict.num_requests - num_before} generated so far")
    round_robin = itertools.cycle(with_input)
    while verdict.num_requests - num_before < num_requests:  # narrow strategies run out of examples
        missing = num_requests - (verdict.num_requests - num_before)
        _exhaust(next(round_robin).as_strategy(generation_mode=GenerationMode.POSITIVE), missing, send)
    session.close()
    return verdict.num_requests - num_before


def _file_tensor(name: str, content: bytes) -> dict[str, Any]:
    """An image file as the inference protocol's JSON has it."""
    return {"name": name, "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(content).decode()]}


def _exhaust(cases: st.SearchStrategy[Case[Any]], count: int, send: Callable[[Case[Any], str], None]) -> None:
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, images=st.sampled_from(["generated", "valid", "cut"]))
    def each(case: Case[Any], images: str) -> None:
        send(case, images)

    each()


# attacks below the OpenAPI document


def attacks() -> Iterator[tuple[str, bytes]]:
    """Names and the raw bytes of one connection each. Some ask for an answer, some only for being hung up on."""
    vis, ir = _small_pair()
    good = fuse_request(vis, ir)
    head, body = good.split(b"\r\n\r\n", 1)
    path = b"POST /v1/fuse HTTP/1.1\r\nHost: h\r\n"
    form = b"Content-Type: multipart/form-data; boundary=%b\r\n" % BOUNDARY

    def posted(content: bytes, headers: bytes = form) -> bytes:
        return path + headers + b"Content-Length: %d\r\n\r\n" % len(content) + content

    def part(name: bytes, content: bytes, extra: bytes = b"") -> bytes:
        return b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (BOUNDARY, name, extra, content)

    end = b"--%b--\r\n" % BOUNDARY
    # multipart
    yield "no boundary", posted(body, b"Content-Type: multipart/form-data\r\n")
    yield "wrong boundary", posted(body, b"Content-Type: multipart/form-data; boundary=other\r\n")
    yield "boundary of 5000", posted(body, b"Content-Type: multipart/form-data; boundary=%b\r\n" % (b"b" * 5000))
    yield "cut multipart", posted(body[: len(body) // 2])
    yield "only dashes", posted(b"--" * 50_000)
    yield "part headers of a megabyte", posted(part(b"vis", b"x", b"; a=" + b"a" * 1_000_000) + end)
    yield "header line without end", posted(b"--%b\r\n" % BOUNDARY + b"a" * 200_000)
    yield "ten thousand part headers", posted(b"--%b\r\n" % BOUNDARY + b"x: y\r\n" * 10_000 + b"\r\n\r\n" + end)
    yield "ten thousand parts", posted(part(b"steps", b"1") * 10_000 + end)
    yield "unknown part", posted(part(b"\x00\xff<script>", b"x") + end)
    yield "nested multipart", posted(part(b"vis", body) + part(b"ir", body) + end)
    yield "line feeds only", posted(body.replace(b"\r\n", b"\n"))
    yield "option of a megabyte", posted(part(b"steps", b"9" * 1_000_000) + end)
    yield "gzip that is none", posted(body, form + b"Content-Encoding: gzip\r\n")
    yield from tensor_attacks(vis, ir)
    # HTTP
    yield "not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)
    yield "empty lines", b"\r\n" * 5000
    yield "huge header", path + b"X-Long: " + b"a" * 300_000
    yield "many headers", path + b"".join(b"X-%d: y\r\n" % index for index in range(20_000))
    yield "huge address", b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n"
    yield "address that is not text", b"GET /\xff\xfe HTTP/1.1\r\nHost: h\r\n\r\n"
    yield "two lengths", path + form + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\nhello"
    yield "negative length", path + form + b"Content-Length: -5\r\n\r\n"
    yield "length beyond all", path + form + b"Content-Length: 99999999999999999999\r\n\r\n"
    yield "announced 60 GB", path + form + b"Content-Length: 60000000000\r\n\r\n" + body[:1000]
    yield "chunk beyond all", path + form + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\nx"
    yield "bad chunk", path + form + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n"
    yield "length and chunks", path + form + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    yield "a body behind an upgrade", posted(body, form + offer)
    yield "a tunnel", b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n" + good
    yield "upgrade", b"GET /v1/models HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    yield "a hundred pipelined", b"GET /health/live HTTP/1.1\r\nHost: h\r\n\r\n" * 100
    yield "answer, then rubbish", good + b"\x00" * 1000
    yield "old HTTP", b"POST /v1/fuse HTTP/1.0\r\n\r\n"
    yield "forged log line", b"GET /x%0d%0aHTTP HTTP/1.1\r\nHost: h\r\nX-Request-ID: a\tb\x7f\r\n\r\n"
    yield "path tricks", b"GET /v1/jobs/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: h\r\n\r\n"
    # images
    for name, content in {**bombs(), **crafted_files()}.items():
        yield f"{name} as vis", fuse_request(content, ir)
        yield f"{name} as ir", fuse_request(vis, content)
    # slow ones: the connection stays open, and the server must be the one that ends it
    yield "slow head", head[:40]
    yield "slow body", head + b"\r\n\r\n" + body[:100]
    yield "silence", b""


def tensor_attacks(vis: bytes, ir: bytes) -> Iterator[tuple[str, bytes]]:
    """The same for the Open Inference Protocol: JSON, and tensors after it, that do not fit each other."""

    def posted(content: bytes, headers: bytes = b"") -> bytes:
        path = b"POST /v2/models/recofuse/infer HTTP/1.1\r\nHost: h\r\n"
        return path + headers + b"Content-Length: %d\r\n\r\n" % len(content) + content

    def binary(sizes: tuple[Any, Any], shapes: tuple[Any, Any], rest: bytes, **more: Any) -> bytes:
        inputs = [
            {"name": name, "datatype": "UINT8", "shape": shape, "parameters": {"binary_data_size": size}}
            for name, size, shape in zip(("vis", "ir"), sizes, shapes, strict=True)
        ]
        text = json.dumps({"inputs": inputs, **more}).encode()
        return posted(text + rest, b"Inference-Header-Content-Length: %d\r\n" % len(text))

    shapes = ([48, 64, 3], [48, 64, 1])
    sizes = (9216, 3072)
    pixels = bytes(sum(sizes))
    yield "tensors", binary(sizes, shapes, pixels, parameters={"binary_data_output": True})
    yield "tensors cut short", binary(sizes, shapes, pixels[:-1])
    yield "tensors that overlap", binary((12288, 3072), shapes, pixels)
    yield "a tensor of minus one byte", binary((-1, 12289), shapes, pixels)
    yield "a tensor of 2**63 bytes", binary((2**63, 3072), shapes, pixels)
    yield "a tensor of 2**124 pixels", binary(sizes, ([2**31 - 1] * 4, shapes[1]), pixels)
    yield "a tensor of no pixels", binary(sizes, ([0, 64, 3], shapes[1]), pixels)
    yield "a tensor of a thousand dimensions", binary(sizes, ([1] * 1000, shapes[1]), pixels)
    yield "2**31 pairs", binary(sizes, ([2**31 - 1, 1, 1, 3], [2**31 - 1, 1, 1, 1]), pixels)
    yield "a seed beyond all", binary(sizes, shapes, pixels, parameters={"seed": 10**4000})
    for length in (b"-1", b"99999999999999999999", b"7", b"x", b"\xff"):
        yield f"JSON of {length!r} bytes", posted(b"{}", b"Inference-Header-Content-Length: %b\r\n" % length)
    yield "JSON that only opens", posted(b"[" * 1_000_000)
    yield "JSON that only opens inside", posted(b'{"inputs": ' + b'{"data": [' * 100_000)
    yield "a number of a megabyte", posted(b'{"inputs": [], "id": ' + b"9" * 1_000_000 + b"}")
    yield "half a surrogate", posted(b'{"inputs": [], "id": "\\ud800"}')
    yield (
        "one long string among numbers",
        posted(
            json.dumps(
                {
                    "inputs": [
                        {"name": "vis", "datatype": "UINT8", "shape": [9], "data": ["a" * 1_000_000] + [1] * 300_000}
                    ]
                }
            ).encode()
        ),
    )
    yield "a zlib bomb", posted(zlib.compress(bytes(50_000_000), 9), b"Content-Encoding: deflate\r\n")
    for name, content in {**bombs(), "pair": vis}.items():
        text = json.dumps({"inputs": [_file_tensor("vis", content), _file_tensor("ir", ir)]}).encode()
        yield f"{name} as a tensor", posted(text)


def bombs() -> dict[str, bytes]:
    """Files that are small and claim much, and ones that are no image."""
    blank = png(16_000, 16_000, b"")
    flat = cv2.imencode(".png", np.zeros((4000, 4000), np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()
    text = b"a\0\0" + zlib.compress(bytes(50_000_000), 9)
    profile = b"p\0\0" + zlib.compress(bytes(50_000_000), 9)
    tiff_loop = b"II*\0\x08\0\0\0\x01\0\x00\x01\x04\0\x01\0\0\0\x40\0\0\0\x08\0\0\0"  # its next directory is itself
    stream = io.BytesIO()
    np.save(stream, np.zeros((8, 8)))
    return {
        "empty file": b"",
        "one byte": b"\x89",
        "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>" * 100,
        "npy": stream.getvalue(),
        "256 million pixels": blank,
        "2**31 wide": png(2**31 - 1, 1, b""),
        "no pixels": png(0, 0, b""),
        "16 million black pixels": flat,
        "data that ends early": png(64, 48, zlib.compress(bytes(100))),
        "data far too long": png(64, 48, zlib.compress(bytes(30_000_000), 9)),
        "data that is not deflated": png(64, 48, b"\xff" * 5000),
        "text chunk of 50 MB": png(64, 48, zlib.compress(bytes(48 * 193)), [(b"zTXt", text)]),
        "colour profile of 50 MB": png(64, 48, zlib.compress(bytes(48 * 193)), [(b"iCCP", profile)]),
        "endless TIFF": tiff_loop,
        "JPEG head": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(2000),
        "WebP head": b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(100),
        "GIF": b"GIF89a" + bytes(1000),
    }


async def attack_http(address: tuple[str, int], verdict: Verdict) -> None:
    """Every attack once, several at a time, with honest requests in between."""
    room = asyncio.Semaphore(8)

    async def one(name: str, payload: bytes) -> None:
        async with room:
            await _attack(address, name, payload, verdict)

    async with asyncio.TaskGroup() as tasks:
        for index, (name, payload) in enumerate(attacks()):
            tasks.create_task(one(name, payload))
            if index % 16 == 0:
                tasks.create_task(_expect_service(address, verdict))
    await _expect_pixels(address, verdict)
    await _hang_up_midway(address, verdict)
    await _trickle(address, verdict)
    await _expect_service(address, verdict)


async def _expect_pixels(address: tuple[str, int], verdict: Verdict) -> None:
    """Of every sound file the answer shows the file's own pixels, and nobody else's."""
    _, ir = _small_pair()
    for name, (content, expected) in sound_files().items():
        request = fuse_request(content, ir, {"output": "vis", "format": "npy"})
        answer = await _attack(address, name, request, verdict)
        verdict.num_attacks -= 1
        shown = np.load(io.BytesIO(answer)) if answer.startswith(b"\x93NUMPY") else np.zeros(0)
        is_same = shown.shape == expected.shape and int(np.abs(shown.astype(int) - expected).max()) <= 1
        verdict.expect(is_same, f"{name} came back as another picture")


async def _attack(address: tuple[str, int], name: str, payload: bytes, verdict: Verdict) -> bytes:
    """One connection; returns the answer's body, judged already, or nothing."""
    verdict.num_attacks += 1
    try:
        reader, writer = await asyncio.open_connection(*address)
    except OSError as error:
        verdict.expect(False, f"{name}: no connection: {error}")
        return b""
    received = b""
    try:
        async with asyncio.timeout(ANSWER_S):
            writer.write(payload)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            received = await _first_answer(reader)
    except TimeoutError:
        verdict.expect(False, f"{name}: neither answered nor hung up on within {ANSWER_S:g} s")
    except ConnectionError:
        pass  # hung up on: the answer to much of this
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    if received:
        head, _, body = received.partition(b"\r\n\r\n")
        status = int(head[9:12])
        lines = [line.partition(b":") for line in head.lower().split(b"\r\n")[1:]]
        media_type = next((value.strip().decode() for key, _, value in lines if key == b"content-type"), "")
        verdict.note(name, status, media_type, body)
        return body
    return b""


async def _first_answer(reader: asyncio.StreamReader) -> bytes:
    """The first complete answer, or nothing if the connection ends before."""
    received = b""
    while piece := await reader.read(1 << 16):
        received += piece
        head, separator, body = received.partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 100"):
            received = body
            continue
        if separator:
            lower = head.lower()
            start = lower.find(b"content-length:")
            length = int(lower[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(body) >= length:
                return head + separator + body[:length]
    return b""


async def _hang_up_midway(address: tuple[str, int], verdict: Verdict) -> None:
    """Clients that go away at every point of a request."""
    request = fuse_request(*_small_pair())
    for length in (1, 30, 200, len(request) // 2, len(request) - 1, len(request)):
        verdict.num_attacks += 1
        _, writer = await asyncio.open_connection(*address)
        writer.write(request[:length])
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.transport.abort()


async def _trickle(address: tuple[str, int], verdict: Verdict) -> None:
    """A body that never falls silent, and never ends: the server must end it all the same."""
    verdict.num_attacks += 1
    head, body = fuse_request(*_small_pair()).split(b"\r\n\r\n", 1)
    reader, writer = await asyncio.open_connection(*address)

    async def drip() -> None:
        writer.write(head + b"\r\n\r\n")
        for at in range(len(body) - 1):
            writer.write(body[at : at + 1])
            await asyncio.sleep(0.2)

    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(ANSWER_S):
            await reader.read(1)
    except TimeoutError:
        verdict.expect(False, f"a trickling body was neither answered nor hung up on within {ANSWER_S:g} s")
    except ConnectionError:
        pass
    finally:
        dripping.cancel()
        writer.transport.abort()


async def _expect_service(address: tuple[str, int], verdict: Verdict) -> None:
    """An honest request is served."""
    before = verdict.statuses[200]
    await _attack(address, "an honest request", fuse_request(*_small_pair()), verdict)
    verdict.num_attacks -= 1
    verdict.expect(verdict.statuses[200] > before, "an honest request was not served")


# gRPC

GRPC_FINE = frozenset(
    {
        "OK",
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        "FAILED_PRECONDITION",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
        "UNIMPLEMENTED",
    }
)


async def attack_grpc(address: tuple[str, int], verdict: Verdict) -> None:
    """Bytes that are no messages, messages without sense, and bytes that are no HTTP/2."""
    target = f"{address[0]}:{address[1]}"
    rng = np.random.default_rng(0)
    messages = [
        b"",
        b"\xff" * 100,
        b"\x0a\xff\xff\xff\xff\x0f",  # a field of 4 GB
        b"\x0a" * 10_000,
        b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" * 100,
        b"\x12\x05ab\xff\xfe\xfd",
        bytes(1_000_000),
        *(rng.integers(0, 256, size, dtype=np.uint8).tobytes() for size in (1, 10, 100, 1000, 100_000)),
    ]
    async with grpc.aio.insecure_channel(target) as channel:
        for method in ("Fuse", "FuseStream", "Nothing", "ModelInfer"):
            service = "inference.GRPCInferenceService" if method == "ModelInfer" else "recofuse.v1.FusionService"
            for message in messages:
                verdict.num_attacks += 1
                verdict.num_requests += 1
                path = f"/{service}/{method}"
                try:
                    if method == "FuseStream":
                        # One message: a second could meet the ended call in the client's own library.
                        streaming: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
                        async for _ in streaming(iter([message]), timeout=ANSWER_S):
                            pass
                    else:
                        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
                        await unary(message, timeout=ANSWER_S)
                    code, details = "OK", ""
                except grpc.aio.AioRpcError as error:
                    code, details = error.code().name, error.details() or ""
                    # A message that cannot be parsed never reaches our code: the gRPC library itself says INTERNAL.
                    if code == "INTERNAL" and "deserializ" in details.lower():
                        code = "INTERNAL (cannot be parsed)"
                verdict.grpc_statuses[code] += 1
                is_fine = code in GRPC_FINE or code.startswith("INTERNAL (")
                verdict.expect(is_fine, f"gRPC {method} with {len(message)} bytes was answered {code}: {details}")
    for raw in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000, b"\x00" * 10_000):
        verdict.num_attacks += 1
        reader, writer = await asyncio.open_connection(*address)
        writer.write(raw)
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(0.5):
                await writer.drain()
                while await reader.read(1 << 16):
                    pass
        writer.transport.abort()


def _small_pair() -> tuple[bytes, bytes]:
    return _PAIR


_PAIR = picture_pair(64, 48)
