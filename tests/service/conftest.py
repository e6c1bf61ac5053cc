"""A whole server on the loopback interface: uvicorn, gateway, queue and worker are real, the engine is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from service.command.processes import serve_all_in_one
from service.terms.settings import Settings
from tests.fakes import FakeEngine


@dataclass
class Server:
    """A running server. client: has its address; stop: begins an orderly end; running: ends with it.

    grpc_address: where gRPC listens; empty unless the test asks for it with grpc={"port": 0}.
    """

    client: httpx.AsyncClient
    engine: FakeEngine
    stop: asyncio.Event
    running: asyncio.Task[None]
    grpc_address: str = ""


Serving = Callable[..., AbstractAsyncContextManager[Server]]


@pytest.fixture
def serving() -> Serving:
    """`async with serving(engine=..., http={...}, queue={...}) as server:` with changed settings by group."""

    @asynccontextmanager
    async def start(engine: FakeEngine | None = None, **groups: dict[str, Any]) -> AsyncIterator[Server]:
        values: dict[str, dict[str, Any]] = {
            "http": {"port": 0},
            "grpc": {"port": -1},
            "worker": {"take_wait_s": 0.2, "drain_timeout_s": 5.0},
        }
        for group, changes in groups.items():
            values[group] = {**values.get(group, {}), **changes}
        engine = engine or FakeEngine()
        stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
        grpc_addresses: list[str] = []
        running = asyncio.create_task(
            serve_all_in_one(Settings.from_values(values), engine, stop, address.set_result, grpc_addresses.append)
        )
        await asyncio.wait({running, address}, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        try:
            async with httpx.AsyncClient(base_url=await address, timeout=20) as client:
                yield Server(client, engine, stop, running, *grpc_addresses)
        finally:
            engine.gate.set()
            stop.set()
            await asyncio.wait_for(running, 15)

    return start


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[Server]:
    """One with the settings as they are."""
    async with serving() as running:
        yield running
