"""A connection to a server of which the test writes every byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.service.conftest import Server
from tests.service.faces.http.asking import Line


@pytest.fixture
async def line(server: Server) -> AsyncIterator[Line]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.client.base_url.port)
    yield Line(reader, writer)
    writer.close()
    await writer.wait_closed()
