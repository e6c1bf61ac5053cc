"""Keys: what a record tells, and the stores that keep records."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.access.keys import ApiKey, FileKeys, KeyStore, is_secret_of, new_key
from service.access.redis import RedisKeys
from service.terms.errors import UnavailableError
from service.terms.settings import QueueSettings
from tests.service.redis_server import RedisServer


def test_a_record_tells_nothing_of_the_secret() -> None:
    record, key = new_key("camera 1", rate_per_s=5, now_s=1.0)
    _, key_id, secret = key.split("_", 2)
    assert key_id == record.id
    assert secret not in record.to_json()
    assert ApiKey.from_json(record.to_json()) == record
    assert is_secret_of(record, secret)
    assert not is_secret_of(record, secret[:-1] + ("A" if secret[-1] != "A" else "B"))
    assert record.burst == 10
    with pytest.raises(ValueError, match="not a key's record"):
        ApiKey.from_json('{"id": "a"}')


def test_a_key_ends_when_it_expires_or_is_revoked() -> None:
    record, _ = new_key("a", expires_s=100.0)
    assert record.is_valid(99.0)
    assert not record.is_valid(100.0)
    assert not replace(record, revoked_s=50.0).is_valid(60.0)


@pytest.fixture(params=["file", pytest.param("redis", marks=pytest.mark.redis)])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[KeyStore]]:
    """Two stores on one place, as two processes have them."""
    if request.param == "file":
        yield [FileKeys(tmp_path / "keys.json") for _ in range(2)]
        return
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        yield [RedisKeys(QueueSettings(url=server.url)) for _ in range(2)]
        server.kill()


async def test_stores_share_what_is_put(stores: list[KeyStore]) -> None:
    writer, reader = stores
    first, second = new_key("first", now_s=1.0)[0], new_key("second", now_s=2.0)[0]
    assert await reader.all() == []
    await writer.put(second)
    await writer.put(first)
    assert await reader.all() == [first, second]
    await writer.put(replace(first, revoked_s=3.0))
    assert (await reader.get(first.id)) == replace(first, revoked_s=3.0)
    assert await reader.get("0" * 12) is None
    for store in stores:
        await store.close()


async def test_a_key_file_is_its_owners_alone_and_a_broken_one_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.json"
    store = FileKeys(path)
    await store.put(new_key("a")[0])
    assert path.stat().st_mode & 0o077 == 0
    path.write_text('{"version": 2, "keys": []}')
    with pytest.raises(UnavailableError):
        await store.all()


@pytest.mark.redis
async def test_a_record_in_redis_that_is_none_lets_nobody_in() -> None:
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        store = RedisKeys(QueueSettings(url=server.url))
        server.command("HSET", "{recofuse}:api-keys", "a" * 12, "{}")
        with pytest.raises(UnavailableError):
            await store.get("a" * 12)
        await store.close()
        server.kill()
