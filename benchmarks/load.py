"""A load generator that costs little: HTTP/1.1 keep-alive on raw sockets, the request's bytes prepared once.

Each client sends, waits for the whole answer, and sends again (a closed loop). Answers are counted, not looked at:
only the status line and the length are read.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import struct
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

BOUNDARY = b"recofuse-load-4f1c"
_BUFFER_BYTES = 256 * 1024


def picture_pair(width: int = 640, height: int = 480, *, seed: int = 0) -> tuple[bytes, bytes]:
    """A vis and an ir PNG file as large as a camera's: smooth content with some sensor noise."""
    rng = np.random.default_rng(seed)
    files = []
    for channels, noise in ((3, 2.0), (1, 2.0)):
        coarse = rng.uniform(20, 235, (12, 16, channels)).astype(np.float32)
        smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)
        noisy = np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)
        is_done, encoded = cv2.imencode(".png", noisy)
        if not is_done:
            raise RuntimeError("OpenCV cannot write PNG")
        files.append(encoded.tobytes())
    return files[0], files[1]


def png(width: int, height: int, data: bytes, chunks: list[tuple[bytes, bytes]] | None = None) -> bytes:
    """An 8-bit RGB PNG file of these parts, whatever they are; check sums are right."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *(chunks or []), (b"IDAT", data)]
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in (*parts, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


def fuse_request(vis: bytes, ir: bytes, fields: dict[str, str] | None = None, headers: str = "") -> bytes:
    """The bytes of one POST /v1/fuse. headers: further header lines, each ending in CRLF."""
    parts = [
        b'Content-Disposition: form-data; name="%b"; filename="%b.png"\r\nContent-Type: image/png\r\n\r\n%b'
        % (name, name, payload)
        for name, payload in ((b"vis", vis), (b"ir", ir))
    ]
    parts += [
        b'Content-Disposition: form-data; name="%b"\r\n\r\n%b' % (name.encode(), value.encode())
        for name, value in (fields or {}).items()
    ]
    body = b"".join(b"--%b\r\n%b\r\n" % (BOUNDARY, part) for part in parts) + b"--%b--\r\n" % BOUNDARY
    head = (
        f"POST /v1/fuse HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary={BOUNDARY.decode()}"
        f"\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


@dataclass(slots=True)
class Tally:
    """What came back. latencies_s: of answers with status 200.

    broken_s: of each request whose connection ended before its answer, when it was sent (time.perf_counter).
    """

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    broken_s: list[float] = field(default_factory=list)
    answer_bytes: int = 0

    @property
    def num_broken(self) -> int:
        """Connections that ended mid-request."""
        return len(self.broken_s)

    @property
    def num_answers(self) -> int:
        """Answers of any status."""
        return self.statuses.total()

    @property
    def num_failed(self) -> int:
        """Everything but 200."""
        return self.num_answers - self.statuses[200] + self.num_broken

    def percentile_ms(self, share: float) -> float:
        """Latency that this share (0 to 1) of the good answers did not exceed; NaN without any."""
        ordered = sorted(self.latencies_s)
        return 1e3 * ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. headers: names in lower case; seconds: from connecting to its last byte."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


async def ask(address: tuple[str, int], request: bytes, *, timeout_s: float = 60.0) -> Answer:
    """Send one request over a connection of its own.

    Raises ConnectionError if the connection ends before the answer's end, TimeoutError if there is none in time.
    """
    started = time.perf_counter()
    async with asyncio.timeout(timeout_s):
        try:
            reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
        except OSError as error:
            raise ConnectionError(f"no connection to {address[0]}:{address[1]}") from error
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ConnectionError("the connection ended before the answer did") from error
        finally:
            writer.transport.abort()
    return Answer(int(head[0].split()[1]), headers, body, time.perf_counter() - started)


def get_request(path: str) -> bytes:
    """The bytes of one GET."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


async def scrape(address: tuple[str, int]) -> dict[str, float]:
    """The metrics of one process by `name{labels}`, as it exposes them."""
    text = (await ask(address, get_request("/metrics"))).body.decode()
    pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


class Load:
    """Clients in a closed loop against one or several front ends, in turn. `tally` may be replaced at any time."""

    def __init__(self, addresses: Sequence[tuple[str, int]], requests: Sequence[bytes], concurrency: int) -> None:
        self._addresses = addresses
        self._requests = itertools.cycle(requests)
        self._concurrency = concurrency
        self._clients: list[_Client] = []
        self._reconnecting: set[asyncio.Task[None]] = set()
        self.is_running = False
        self.tally = Tally()

    async def start(self) -> None:
        """Connect all clients and let them send."""
        self.is_running = True
        for index in range(self._concurrency):
            await self._connect(index)

    async def stop(self) -> None:
        """Let every client hear its last answer, then hang up."""
        self.is_running = False
        while any(client.is_busy for client in self._clients):  # noqa: ASYNC110 - the hot path stays free of events
            await asyncio.sleep(0.002)
        for client in self._clients:
            client.close()

    def next_request(self) -> bytes:
        """The bytes to send next."""
        return next(self._requests)

    def broken(self, client: _Client) -> None:
        """A connection ended; open another one in its place."""
        self._clients.remove(client)
        if client.is_busy:
            self.tally.broken_s.append(client.sent_s)
        if self.is_running:
            task = asyncio.ensure_future(self._reconnect(client.index))
            self._reconnecting.add(task)
            task.add_done_callback(self._reconnecting.discard)

    async def _reconnect(self, index: int) -> None:
        while self.is_running:
            try:
                await self._connect(index)
                return
            except OSError:
                await asyncio.sleep(0.05)

    async def _connect(self, index: int) -> None:
        host, port = self._addresses[index % len(self._addresses)]
        client = _Client(self, index)
        await asyncio.get_running_loop().create_connection(lambda: client, host, port)
        self._clients.append(client)
        client.send()


class _Client(asyncio.BufferedProtocol):
    """One connection. The body's bytes land in one buffer again and again."""

    def __init__(self, load: Load, index: int) -> None:
        self._load = load
        self.index = index
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._head = bytearray()
        self._missing = -1  # bytes of the body still to come; -1 while reading the head
        self._status = 0
        self._is_last = False  # the server will hang up after this answer
        self.sent_s = 0.0
        self._transport: asyncio.Transport | None = None
        self.is_busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport) or hasattr(transport, "write"):
            self._transport = transport  # type: ignore[assignment]  # uvloop's class is not a subclass

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._transport = None
            self._load.broken(self)

    def send(self) -> None:
        """Send the next request."""
        if self._transport is None:
            return
        self.is_busy = True
        self._missing = -1
        self._head.clear()
        self.sent_s = time.perf_counter()
        self._transport.write(self._load.next_request())

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        if self._missing < 0:
            self._head += self._view[:nbytes]
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._head[:end]).lower()
            self._status = int(head[9:12])
            start = head.find(b"\r\ncontent-length:")
            length = int(head[start + 17 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            self._missing = length - (len(self._head) - end - 4)
            self._is_last = b"\r\nconnection: close" in head
            self._load.tally.answer_bytes += length
        else:
            self._missing -= nbytes
        if self._missing == 0:
            tally = self._load.tally
            tally.statuses[self._status] += 1
            if self._status == 200:
                tally.latencies_s.append(time.perf_counter() - self.sent_s)
            self.is_busy = False
            if self._is_last:
                self.close()
                self._load.broken(self)
            elif self._load.is_running:
                self.send()
