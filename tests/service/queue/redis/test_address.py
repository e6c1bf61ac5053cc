"""URLs of Redis: which there are, and what stops the start."""

from __future__ import annotations

import pytest

from service.queue.redis.address import RedisAddress
from service.queue.redis.queue import RedisQueue
from service.terms.settings import QueueSettings, SettingsError


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://localhost", {"host": "localhost"}),
        (
            "redis://me:p%40ss@cache.example:6380/3",
            {"host": "cache.example", "port": 6380, "db": 3, "username": "me", "password": "p@ss"},
        ),
        (
            "rediss://:secret@cache.example?ssl_ca_certs=/etc/ca.pem",
            {"host": "cache.example", "password": "secret", "ssl": True, "ssl_ca_certs": "/etc/ca.pem"},
        ),
        ("unix:///run/redis.sock?db=2", {"path": "/run/redis.sock", "db": 2}),
    ],
)
def test_urls_of_one_server(url: str, options: dict[str, object]) -> None:
    assert RedisAddress.parse(url) == RedisAddress(options)


def test_urls_of_sentinels() -> None:
    address = RedisAddress.parse("redis+sentinel://me:p%40ss@a,b:26380,[::1]:5/main/2?sentinel_password=s")
    assert address.sentinels == (("a", 26379), ("b", 26380), ("::1", 5))
    assert address.service == "main"
    assert address.options == {"username": "me", "password": "p@ss", "db": 2}
    assert address.sentinel_options == {"password": "s"}
    secure = RedisAddress.parse("rediss+sentinel://a/main?ssl_ca_certs=/ca.pem")
    assert secure.options == secure.sentinel_options == {"ssl": True, "ssl_ca_certs": "/ca.pem"}


@pytest.mark.parametrize(
    "url",
    ["http://host", "redis://", "localhost:6379", "redis+sentinel://a", "redis+sentinel:///main", "redis://h:port",
     "redis+sentinel://me:secret@a:port/main", "redis+cluster://a"],
)  # fmt: skip
def test_urls_that_cannot_be_are_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"queue\.url") as refused:
        RedisQueue(QueueSettings(url=url))
    assert "secret" not in str(refused.value)
