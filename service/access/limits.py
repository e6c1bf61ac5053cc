"""How often a key may ask: token buckets."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from service.access.keys import ApiKey

Clock = Callable[[], float]


class Limiter(Protocol):
    """Token buckets by key."""

    async def take(self, key: ApiKey) -> float:
        """Take one token; returns 0, or the seconds after which there will be one."""

    async def close(self) -> None:
        """Let go of connections."""


class LocalLimiter:
    """Buckets of this process alone."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when they were counted

    async def take(self, key: ApiKey) -> float:
        """See Limiter."""
        now_s = self._clock()
        tokens, counted_s = self._buckets.get(key.id, (float(key.burst), now_s))
        tokens = min(float(key.burst), tokens + max(0.0, now_s - counted_s) * key.rate_per_s)
        is_there = tokens >= 1
        self._buckets[key.id] = (tokens - is_there, now_s)
        return 0.0 if is_there else (1 - tokens) / key.rate_per_s

    async def close(self) -> None:
        """See Limiter."""
