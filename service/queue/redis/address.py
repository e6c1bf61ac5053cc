"""Where Redis is: the URL, the clients that it leads to, and the prefix of all that is ours in there.

The prefix's hash tag puts all keys into one slot. With Redis Cluster that means: one shard does all the work, and the
URL has to name that shard's primary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis.asyncio import Redis, Sentinel
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.terms.settings import SettingsError

PREFIX = "{recofuse}"
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")

CALL_TIMEOUT_S = 5.0  # for one answer
CONNECT_TIMEOUT_S = 2.0
READ_BYTES = 1 << 20  # in one go: images are larger than the usual 64 KiB


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A parsed URL: where Redis is, or who knows it.

    options: arguments of redis-py's connection, without host and port if there are sentinels. sentinels: host and port
    of each. service: the name that they know the primary by. sentinel_options: arguments of the connections to them.
    """

    options: dict[str, Any]
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str = ""
    sentinel_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """From a URL of one of these forms; TLS details follow as a query, such as `?ssl_ca_certs=/etc/ca.pem`.

            redis://[USER:PASSWORD@]HOST[:PORT][/DB]            rediss:// the same over TLS
            unix://[USER:PASSWORD@]/PATH/OF/SOCKET[?db=DB]
            redis+sentinel://[USER:PASSWORD@]HOST[:PORT],HOST[:PORT]/SERVICE[/DB]
                [?sentinel_username=...&sentinel_password=...]  rediss+sentinel:// the same over TLS

        Raises SettingsError, without the password.
        """
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise SettingsError(f"queue.url: {parts.scheme or 'no scheme'} is not one of memory, {', '.join(SCHEMES)}")
        try:
            if not parts.scheme.endswith("+sentinel"):
                options = _options(url)
                if parts.scheme != "unix" and not options.get("host"):
                    raise ValueError("the host is missing")
                return cls(options)
            login, _, hosts = parts.netloc.rpartition("@")
            sentinels = tuple(_host_and_port(host) for host in hosts.split(",") if host)
            service, _, db = parts.path.strip("/").partition("/")
            if not sentinels or not service:
                raise ValueError("the sentinels' hosts or the service's name are missing")
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            own = {name: query.pop(f"sentinel_{name}", None) for name in ("username", "password")}
            scheme = parts.scheme.removesuffix("+sentinel")
            options = _options(f"{scheme}://{login}{'@' if login else ''}host/{db}?{urlencode(query)}")
        except (ValueError, TypeError) as error:
            raise SettingsError(f"queue.url: {error}") from error
        del options["host"]
        tls = {name: value for name, value in options.items() if name.startswith("ssl")}
        known = {name: value for name, value in own.items() if value is not None}
        return cls(options, sentinels, unquote(service), {**tls, **known})

    def connect(self) -> Redis:
        """A client; nothing is sent yet."""
        # Nothing is repeated behind our back: callers back off by themselves, with the whole transition in view.
        common: dict[str, Any] = {
            "socket_timeout": CALL_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_read_size": READ_BYTES,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        if self.sentinels:
            known = {**common, **self.sentinel_options}
            sentinel = Sentinel(self.sentinels, sentinel_kwargs=known)  # type: ignore[no-untyped-call]  # theirs
            master: Redis = sentinel.master_for(self.service, **{**common, **self.options})
            return master
        options = dict(self.options)
        if "path" in options:
            options["unix_socket_path"] = options.pop("path")
        return Redis(**{**common, **options})


def _options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(parse_url(url))
    kind = options.pop("connection_class", None)
    if kind is not None and "SSL" in kind.__name__:
        options["ssl"] = True
    return options


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text} is not a host and port")
    return parts.hostname, parts.port or 26379
