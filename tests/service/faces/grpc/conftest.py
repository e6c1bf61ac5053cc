"""A whole server with its gRPC side on, as `facing` with settings of the test's and as plain `face`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from tests.fakes import FakeEngine
from tests.service.conftest import Serving
from tests.service.faces.grpc.face import Face, Facing


@pytest.fixture
def facing(serving: Serving) -> Facing:
    @asynccontextmanager
    async def start(engine: FakeEngine | None = None, **groups: dict[str, Any]) -> AsyncIterator[Face]:
        groups["grpc"] = {"port": 0, **groups.get("grpc", {})}
        async with (
            serving(engine, **groups) as server,
            grpc.aio.insecure_channel(server.grpc_address, [("grpc.max_receive_message_length", -1)]) as channel,
        ):
            yield Face(server, channel, fusion_pb2_grpc.FusionServiceStub(channel))

    return start


@pytest.fixture
async def face(facing: Facing) -> AsyncIterator[Face]:
    async with facing() as running:
        yield running
