"""Buckets of tokens, within a process and shared through Redis."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from service.access.keys import new_key
from service.access.limits import LocalLimiter
from service.access.redis import RedisLimiter
from service.terms.settings import QueueSettings
from tests.fakes import FakeClock
from tests.service.redis_server import RedisServer


async def test_a_bucket_fills_at_its_rate() -> None:
    clock = FakeClock()
    limiter, key = LocalLimiter(clock), new_key("a", rate_per_s=2.0, burst=3)[0]
    assert [await limiter.take(key) for _ in range(3)] == [0.0] * 3
    assert await limiter.take(key) == pytest.approx(0.5)
    clock.advance(0.5)
    assert await limiter.take(key) == 0.0
    clock.advance(100.0)
    assert [bool(await limiter.take(key)) for _ in range(4)] == [False] * 3 + [True]


@pytest.mark.redis
async def test_front_ends_share_a_bucket_and_each_counts_alone_while_redis_is_away() -> None:
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        one, two = (RedisLimiter(QueueSettings(url=server.url)) for _ in range(2))
        key = new_key("a", rate_per_s=0.001, burst=2)[0]
        assert [await one.take(key), await two.take(key)] == [0.0, 0.0]
        assert await one.take(key) == pytest.approx(1000, abs=10)
        assert await two.take(key) > 0
        server.kill()
        assert [bool(await two.take(key)) for _ in range(3)] == [False, False, True]
        for limiter in (one, two):
            await limiter.close()
