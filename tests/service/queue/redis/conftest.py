"""Servers: one that all tests share and find empty, and a durable one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.service.queue.redis.queues import folder
from tests.service.redis_server import RedisServer


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with folder() as path:
        server = RedisServer(path)
        server.start()
        yield server
        server.kill()


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    assert shared_server.command("FLUSHALL") == b"+OK\r\n"
    return shared_server


@pytest.fixture
def durable() -> Iterator[RedisServer]:
    """A server of its own, with an append-only file that misses nothing."""
    with folder() as path:
        server = RedisServer(path, "--appendonly", "yes", "--appendfsync", "always")
        server.start()
        yield server
        server.kill()
