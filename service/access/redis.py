"""API keys and rate limits in the Redis that holds the queue, shared by every front end.

Keys of Redis: `{recofuse}:api-keys`, a hash of records by id; `{recofuse}:bucket:ID`, a token bucket that expires once
it would be full again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import exceptions

from service.access.keys import ApiKey
from service.access.limits import LocalLimiter
from service.queue.redis.address import PREFIX, RedisAddress
from service.terms.errors import UnavailableError
from service.terms.settings import QueueSettings

# Redis's own clock counts, so front ends whose clocks differ agree.
TAKE = """
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local kept = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = tonumber(kept[1] or burst)
tokens = math.min(burst, tokens + math.max(0, now - tonumber(kept[2] or now)) * rate)
local wait = 0
if tokens >= 1 then tokens = tokens - 1 else wait = (1 - tokens) / rate end
redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], math.ceil(burst / rate) + 1)
return tostring(wait)
"""


MAX_CALLS = 16  # at once, and thereby connections of each object


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except (exceptions.RedisError, OSError, ValueError) as error:  # ValueError: not a record of ours
        raise UnavailableError("API keys cannot be checked at the moment", retry_after_s=1.0) from error


class RedisKeys:
    """See `service.access.keys.KeyStore`."""

    def __init__(self, settings: QueueSettings, *, prefix: str = PREFIX) -> None:
        # Untyped as in the queue: redis-py's annotations name every protocol's answers at once.
        self._client: Any = RedisAddress.parse(settings.url).connect()
        self._hash = f"{prefix}:api-keys"
        self._calls = asyncio.Semaphore(MAX_CALLS)

    async def get(self, key_id: str) -> ApiKey | None:
        """See KeyStore."""
        async with self._calls:
            with _reaching():
                record = await self._client.hget(self._hash, key_id)
                return None if record is None else ApiKey.from_json(record)

    async def all(self) -> list[ApiKey]:
        """See KeyStore."""
        with _reaching():
            records = await self._client.hvals(self._hash)
            return sorted(map(ApiKey.from_json, records), key=lambda key: key.created_s)

    async def put(self, key: ApiKey) -> None:
        """See KeyStore."""
        with _reaching():
            await self._client.hset(self._hash, key.id, key.to_json())

    async def close(self) -> None:
        """See KeyStore."""
        await self._client.aclose()


class RedisLimiter:
    """Buckets that all front ends share; while Redis is away, buckets of this process."""

    def __init__(self, settings: QueueSettings, *, prefix: str = PREFIX) -> None:
        self._client: Any = RedisAddress.parse(settings.url).connect()
        self._take = self._client.register_script(TAKE)
        self._prefix = f"{prefix}:bucket"
        self._calls = asyncio.Semaphore(MAX_CALLS)
        self._local = LocalLimiter()

    async def take(self, key: ApiKey) -> float:
        """See Limiter."""
        try:
            async with self._calls:
                with _reaching():
                    return float(await self._take(keys=[f"{self._prefix}:{key.id}"], args=[key.rate_per_s, key.burst]))
        except UnavailableError:
            return await self._local.take(key)

    async def close(self) -> None:
        """See Limiter."""
        await self._client.aclose()
