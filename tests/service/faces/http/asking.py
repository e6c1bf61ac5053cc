"""What the tests of the HTTP face ask with, and what all of its answers have in common."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from service.terms.errors import STATUS, ErrorCode
from tests.fakes import pair

VIS, IR = pair()
FILES = {"vis": ("v.png", VIS), "ir": ("i.png", IR)}
FORM_KIND = "multipart/form-data; boundary=edge"
INFER = "/v2/models/recofuse/infer"


def form_of(**fields: bytes) -> bytes:
    """A multipart body with boundary `edge`."""
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), value)
        for name, value in fields.items()
    ]
    return b"".join([*parts, b"--edge--\r\n"])


def chunked(body: bytes) -> bytes:
    """A body in chunks of 1000 bytes."""
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]
    return b"".join([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"])


def problem(answer: httpx.Response, code: ErrorCode) -> dict[str, Any]:
    """The answer's problem document, checked for everything that all of them have."""
    document: dict[str, Any] = answer.json()
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert document["code"] == code
    assert answer.status_code == document["status"] == STATUS[code][0]
    assert document["request_id"] == answer.headers["x-request-id"]
    assert document["title"]
    assert document["type"] == f"urn:recofuse:problem:{code}"
    return document


async def finished(client: httpx.AsyncClient, location: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            document: dict[str, Any] = (await client.get(location)).json()
            if document["status"] not in ("queued", "running"):
                return document
            await asyncio.sleep(0.01)


class Line:
    """A connection of which the test writes every byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, *pieces: bytes) -> None:
        """Each piece in a segment of its own, as far as one may tell."""
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(0.02)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers, body."""
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 20)
        first, *lines = head.decode().strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        status = int(first.split()[1])
        return status, headers, await self._reader.readexactly(int(headers.get("content-length", "0")))
