"""Offers to speak something else than HTTP/1.1, as clients of many kinds make them, over a real socket."""

from __future__ import annotations

import asyncio
import json
import re
import socket

import cv2
import numpy as np
import pytest

from tests.fakes import picture
from tests.images.files import png_header
from tests.service.conftest import Server
from tests.service.faces.http.asking import FORM_KIND, INFER, IR, VIS, Line, chunked, form_of

JAVA = (
    b"Connection: Upgrade, HTTP2-Settings\r\nContent-Length: %d\r\nHost: h\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\nUser-Agent: Java-http-client/17\r\n"
)
OFFERS = {
    "java": JAVA,
    "websocket": b"Host: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: %d\r\n",
    "loud": b"HOST: h\r\nCONNECTION: keep-alive, UPGRADE\r\nContent-Length: %d\r\nUPGRADE: TLS/1.0, IRC/6.9\r\n",
    "twice": b"Host: h\r\nupgrade: a\r\nconnection: upgrade\r\nUpgrade: b\r\nContent-Length: %d\r\n",
}


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("way", ["at once", "head first", "in chunks"])
async def test_an_offer_to_upgrade_is_declined_and_the_request_served(line: Line, offer: str, way: str) -> None:
    """Twice on one connection, with another request behind."""
    body = form_of(vis=VIS, ir=IR)
    head = b"POST /v1/fuse?seed=3 HTTP/1.1\r\n" + OFFERS[offer] % len(body)
    head += b"Content-Type: %b\r\n\r\n" % FORM_KIND.encode()
    if way == "in chunks":
        head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
        body = chunked(body)
    for _ in range(2):
        await line.send(*([head + body] if way == "at once" else [head[:30], head[30:], body[:500], body[500:]]))
        status, headers, content = await line.answer()
        assert (status, headers["content-type"]) == (200, "image/png"), content
        assert "upgrade" not in headers
        decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(decoded, picture())
    await line.send(b"GET /health/live HTTP/1.1\r\nHost: h\r\n\r\n")
    assert (await line.answer())[0] == 200


async def test_pipelined_requests_may_offer_to_upgrade(line: Line) -> None:
    body = form_of(vis=VIS, ir=IR)
    fuse = b"POST /v1/fuse HTTP/1.1\r\n" + JAVA % len(body) + b"Content-Type: %b\r\n\r\n" % FORM_KIND.encode() + body
    infer = b"POST %b HTTP/1.1\r\n" % INFER.encode() + OFFERS["loud"] % 2 + b"\r\n{}"
    live = b"GET /health/live HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    await line.send(live + fuse + infer + live)
    assert [(await line.answer())[0] for _ in range(4)] == [200, 200, 422, 200]


async def test_an_offer_does_not_keep_a_connection_that_is_to_close(line: Line) -> None:
    await line.send(b"POST %b HTTP/1.1\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n" % INFER.encode())
    await line.send(b"Content-Length: 2\r\n\r\n{}")
    status, headers, _ = await line.answer()
    assert (status, headers["connection"]) == (422, "close")


async def test_an_offer_with_a_question_gets_its_answer(line: Line) -> None:
    """`curl --http2` asks before it sends much, and offers in the same head."""
    body = form_of(vis=VIS, ir=IR)
    head = b"POST /v1/fuse HTTP/1.1\r\n" + JAVA % len(body)
    await line.send(head + b"Expect: 100-continue\r\nContent-Type: %b\r\n\r\n" % FORM_KIND.encode())
    assert (await line.answer())[0] == 100
    await line.send(body)
    assert (await line.answer())[0] == 200


@pytest.mark.parametrize("head", [b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
async def test_tunnels_and_unasked_http_2_are_refused(line: Line, head: bytes) -> None:
    await line.send(head + b"\0" * 20)
    status, headers, body = await line.answer()
    assert (status, json.loads(body)["code"], headers["connection"]) == (400, "malformed_request", "close")


async def test_bytes_that_are_not_http_do_not_hurt(server: Server) -> None:
    port = server.client.base_url.port
    assert port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, family=socket.AF_INET)
    writer.write(b"\x16\x03\x01" + png_header(3, 3))
    await writer.drain()
    await asyncio.wait_for(reader.read(), 5)
    writer.close()
    await writer.wait_closed()
    assert (await server.client.get("/health/live")).status_code == 200
