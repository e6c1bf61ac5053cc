"""Whole servers with their clients, for the tests of what both agree on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.client.reach import CommandServer, Reach, reaching
from tests.service.conftest import Server, Serving, serving

__all__ = ["serving"]


@dataclass
class Served:
    """A server in this process, with a fake engine, and its clients."""

    server: Server
    reach: Reach

    @property
    def engine(self) -> Any:
        return self.server.engine

    async def num_refused(self, code: str) -> int:
        """How many requests the server has refused with this code."""
        lines = (await self.server.client.get("/metrics")).text.splitlines()
        name = f'recofuse_errors_total{{code="{code}"}} '
        return sum(int(float(line.removeprefix(name))) for line in lines if line.startswith(name))


@asynccontextmanager
async def served(start: Serving, *args: Any, tls: bool = False, **groups: dict[str, Any]) -> AsyncIterator[Served]:
    groups["grpc"] = {"port": 0, **groups.get("grpc", {})}
    async with start(*args, **groups) as server:
        url = server.client.base_url
        async with reaching(f"{url.host}:{url.port}", server.grpc_address, tls=tls) as reach:
            yield Served(server, reach)


@pytest.fixture
async def running(serving: Serving) -> AsyncIterator[Served]:
    async with served(serving) as one:
        yield one


@pytest.fixture
def command_server(tmp_path: Path) -> Iterator[CommandServer]:
    server = CommandServer(tmp_path)
    try:
        yield server
    finally:
        server.kill()
