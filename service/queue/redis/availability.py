"""Whether Redis is there for now, and whether it is one that can hold a queue.

It should run with AOF and without eviction; opening a queue logs a warning where it does not.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from redis import exceptions

from service.terms.errors import UnavailableError
from service.terms.settings import SettingsError

logger = logging.getLogger(__name__)

MIN_VERSION = (6, 2)

# Redis is away, starting, failing over, or was emptied: come back later.
_AWAY = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.ExecAbortError,
    exceptions.OutOfMemoryError,
    OSError,
)
_AWAY_WORDS = ("NOGROUP", "UNBLOCKED", "LOADING", "MASTERDOWN", "NOREPLICAS", "MISCONF", "BUSY")
_WITHIN_SCRIPT = {": -OOM ": exceptions.OutOfMemoryError, ": -READONLY ": exceptions.ReadOnlyError}  # by Redis 6


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Turns what says that Redis is away for now into UnavailableError; anything else passes."""
    try:
        yield
    except _AWAY as error:
        raise UnavailableError("the queue cannot be reached", retry_after_s=1.0) from _without_frames(error)
    except exceptions.ResponseError as error:
        if str(error).startswith(_AWAY_WORDS):
            raise UnavailableError("the queue cannot be reached", retry_after_s=1.0) from _without_frames(error)
        for words, kind in _WITHIN_SCRIPT.items():
            if words in str(error):
                raise UnavailableError("the queue cannot be reached", retry_after_s=1.0) from kind(str(error))
        raise


def _without_frames(error: Exception) -> Exception:
    """The error, whose chain keeps no frame: redis-py's hold the errors in turn, and with them all that was sent.

    Twelve uploads of 60 MB that a stalled Redis did not take would stay until a collection.
    """
    links: list[BaseException | None] = [error]
    while links:
        if (link := links.pop()) is not None and link.__traceback__ is not None:
            link.__traceback__ = None
            links += [link.__cause__, link.__context__]
    return error


async def check_server(client: Any) -> None:
    """Raises UnavailableError, or SettingsError if Redis is too old or refuses the credentials."""
    try:
        with reaching():
            info = await client.info()
    except UnavailableError as error:
        if isinstance(error.__cause__, exceptions.AuthenticationError | exceptions.AuthorizationError):
            raise SettingsError("queue.url: Redis refuses the credentials") from error
        raise
    except (exceptions.NoPermissionError, exceptions.AuthenticationWrongNumberOfArgsError) as error:
        raise SettingsError("queue.url: Redis refuses the credentials") from error
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        raise SettingsError(f"queue.url: Redis {version} is too old; 6.2 or newer is needed, 7 recommended")
    if not info.get("aof_enabled", 0):
        logger.warning("Redis keeps no append-only file: accepted jobs do not survive its restart")
    if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
        logger.warning("Redis may evict accepted jobs", extra={"maxmemory_policy": policy})
