"""Who may call, and how often: API keys, where they are kept, and the guard that both faces ask before anything else.

A key is `rf_ID_SECRET`. The id is public (logs show it); of the secret only a salted scrypt hash is kept, so whoever
reads the store cannot call. Hashing is meant to be slow, so a key that was verified is remembered by a keyed digest in
memory, and only its record is read again from time to time: that is how soon a revocation is noticed.

What a newcomer would get wrong: nothing here may log or raise a presented key, not even a part of it; and a refusal
must not tell an unknown id from a wrong secret.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from service.terms.errors import (
    PermissionDeniedError,
    RateLimitedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)
from service.terms.settings import AuthSettings, SettingsError

logger = logging.getLogger(__name__)
audit = logging.getLogger("recofuse.audit")

Clock = Callable[[], float]

SCRYPT = {"n": 1 << 14, "r": 8, "p": 1, "dklen": 32}  # 16 MiB and some 50 ms for each guess
MAX_HASHING = 2  # at once: guessing must not take all cores
MAX_HASHES_WAITING = 64
MAX_REMEMBERED = 4096
FILE_VERSION = 1

_PRESENTED = re.compile(r"rf_(?P<id>[0-9a-f]{12})_(?P<secret>[0-9A-Za-z_-]{43})")


class Scope(StrEnum):
    """What a key may do. fuse: submit and cancel work; read: see jobs, results and models."""

    FUSE = "fuse"
    READ = "read"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key. salt, digest: hexadecimal; rate_per_s: 0 for no limit; times: Unix seconds."""

    id: str
    name: str
    salt: str
    digest: str
    scopes: tuple[Scope, ...]
    rate_per_s: float
    burst: int
    created_s: float
    expires_s: float | None = None
    revoked_s: float | None = None

    def is_valid(self, now_s: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_s is None and (self.expires_s is None or now_s < self.expires_s)

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> ApiKey:
        """Raises ValueError."""
        try:
            values = json.loads(text)
            return cls(**{**values, "scopes": tuple(Scope(scope) for scope in values["scopes"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a key's record: {error}") from error


def new_key(
    name: str,
    *,
    scopes: tuple[Scope, ...] = tuple(Scope),
    rate_per_s: float = 0.0,
    burst: int = 0,
    expires_s: float | None = None,
    now_s: float | None = None,
) -> tuple[ApiKey, str]:
    """A fresh key's record, and the key itself, which is kept nowhere. burst: 0 for what two seconds allow."""
    key_id, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_bytes(16)
    record = ApiKey(
        id=key_id,
        name=name,
        salt=salt.hex(),
        digest=_digest(secret, salt).hex(),
        scopes=scopes,
        rate_per_s=rate_per_s,
        burst=burst or max(1, round(2 * rate_per_s)),
        created_s=time.time() if now_s is None else now_s,
        expires_s=expires_s,
    )
    return record, f"rf_{key_id}_{secret}"


def _digest(secret: str, salt: bytes) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=salt, **SCRYPT)


def is_secret_of(key: ApiKey, secret: str) -> bool:
    """Whether this is the key's secret: slow on purpose, and equally long for right and wrong."""
    return hmac.compare_digest(_digest(secret, bytes.fromhex(key.salt)), bytes.fromhex(key.digest))


# where keys are kept


class KeyStore(Protocol):
    """Records of keys by id. Every method raises UnavailableError while the store cannot be used."""

    async def get(self, key_id: str) -> ApiKey | None:
        """The record, None if there is none."""

    async def all(self) -> list[ApiKey]:
        """Every record, oldest first."""

    async def put(self, key: ApiKey) -> None:
        """Add a record, or replace the one of the same id."""

    async def close(self) -> None:
        """Let go of connections."""


class FileKeys:
    """Keys in a JSON file that only its owner may read. A missing file holds no keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, ApiKey] = {}

    async def get(self, key_id: str) -> ApiKey | None:
        """See KeyStore."""
        return (await asyncio.to_thread(self._load)).get(key_id)

    async def all(self) -> list[ApiKey]:
        """See KeyStore."""
        return sorted((await asyncio.to_thread(self._load)).values(), key=lambda key: key.created_s)

    async def put(self, key: ApiKey) -> None:
        """See KeyStore. Raises OSError if the file cannot be written."""
        await asyncio.to_thread(self._write, key)

    async def close(self) -> None:
        """See KeyStore."""

    def _load(self) -> dict[str, ApiKey]:
        try:
            status = self._path.stat()
            if (seen := (status.st_mtime_ns, status.st_ino, status.st_size)) != self._seen:
                document = json.loads(self._path.read_text("utf-8"))
                if document["version"] != FILE_VERSION:
                    raise ValueError(f"version {document['version']} is not {FILE_VERSION}")
                self._keys = {key.id: key for key in map(ApiKey.from_json, map(json.dumps, document["keys"]))}
                self._seen = seen
        except FileNotFoundError:
            self._keys, self._seen = {}, None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.error("the file of API keys cannot be read", extra={"path": str(self._path), "error": str(error)})
            raise UnavailableError("API keys cannot be checked at the moment", retry_after_s=5.0) from error
        return self._keys

    def _write(self, key: ApiKey) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_name(f"{self._path.name}.lock").open("w") as lock:  # two writers lose nothing
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = {**self._load(), key.id: key}
            document = {"version": FILE_VERSION, "keys": [asdict(kept) for kept in keys.values()]}
            fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
                json.dump(document, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            fresh.replace(self._path)


def file_of(where: str) -> Path | None:
    """The path of a `file:` store, None for any other. Raises SettingsError."""
    if not where.startswith("file:"):
        return None
    if not (path := where.removeprefix("file:")):
        raise SettingsError("auth.keys: file: needs a path, such as file:/etc/recofuse/keys.json")
    return Path(path)


# how often


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


# the guard


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes the current request. token: what the guard remembers the key by."""

    key: ApiKey
    guard: Guard
    token: bytes


caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def own_idempotency_key(given: str | None) -> str | None:
    """The caller's idempotency key, kept apart from equal ones of other callers."""
    current = caller.get()
    return given if given is None or current is None else f"{current.key.id}:{given}"


async def charge() -> None:
    """Count one more picture against the current caller's rate, as a stream does by frame.

    Raises RateLimitedError, and UnauthenticatedError if the key has been revoked or has expired since it was admitted.
    """
    if (current := caller.get()) is not None:
        await current.guard.charge(await current.guard.key_now(current))


@dataclass(slots=True)
class _Verified:
    key: ApiKey
    read_s: float


class Guard:
    """Decides about every request. clock: monotonic seconds; wall: Unix seconds, for expiry."""

    def __init__(
        self,
        store: KeyStore,
        limiter: Limiter,
        settings: AuthSettings,
        *,
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
    ) -> None:
        self._store = store
        self._limiter = limiter
        self._settings = settings
        self._clock = clock
        self._wall = wall
        self._pepper = secrets.token_bytes(32)  # of this process's memory; a lookup by it tells nothing by its time
        self._verified: dict[bytes, _Verified] = {}
        self._verifying: dict[bytes, asyncio.Task[ApiKey]] = {}
        self._hashing = asyncio.Semaphore(MAX_HASHING)

    async def close(self) -> None:
        """Let go of the store and the limiter."""
        await self._store.close()
        await self._limiter.close()

    async def admit(
        self, headers: Mapping[str, str], scope: Scope, *, is_charged: bool, face: str, action: str, peer: str
    ) -> Caller:
        """Let a request in, and remember in the context who makes it. headers: names in lower case.

        face, action, peer: for the audit log. Raises UnauthenticatedError, PermissionDeniedError, RateLimitedError, and
        UnavailableError if a key cannot be checked.
        """
        fields: dict[str, str] = {"face": face, "action": action, "peer": peer}
        try:
            key, token = await self._key_of(headers)
            fields |= {"key_id": key.id, "key_name": key.name}
            if scope not in key.scopes:
                raise PermissionDeniedError(
                    f"this needs the scope {scope}; the key {key.id} has {', '.join(key.scopes) or 'none'}"
                )
            if is_charged:
                await self.charge(key)
        except ServiceError as error:
            if self._settings.audit:
                audit.warning("request refused", extra={**fields, "code": error.code.value})
            raise
        if self._settings.audit:
            audit.info("request admitted", extra=fields)
        current = Caller(key, self, token)
        caller.set(current)
        return current

    async def charge(self, key: ApiKey) -> None:
        """Count one picture. Raises RateLimitedError."""
        rate = key.rate_per_s or self._settings.rate_per_s
        if not rate:
            return
        limited = key if key.rate_per_s else replace(key, rate_per_s=rate, burst=self._settings.burst)
        if wait_s := await self._limiter.take(limited):
            raise RateLimitedError(
                f"the key {key.id} may ask for {rate:g} pictures a second, {limited.burst} at once",
                retry_after_s=wait_s,
            )

    async def key_now(self, admitted: Caller) -> ApiKey:
        """The key of a call that was admitted and still goes on, as it is now. Raises UnauthenticatedError."""
        key = await self._known(admitted.token)
        if key is None:  # it is gone, or was forgotten for newer ones
            try:
                key = await self._store.get(admitted.key.id)
            except UnavailableError:
                key = admitted.key
        if key is None or key.digest != admitted.key.digest or not key.is_valid(self._wall()):
            raise _refused()
        return key

    async def _key_of(self, headers: Mapping[str, str]) -> tuple[ApiKey, bytes]:
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        if not presented.strip() or scheme.lower() != "bearer":
            presented = headers.get("x-api-key", "")
        if not (presented := presented.strip()):
            raise UnauthenticatedError("an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")
        if (parts := _PRESENTED.fullmatch(presented)) is None:
            raise _refused()
        token = hmac.digest(self._pepper, presented.encode(), "sha256")
        key = await self._known(token)
        if key is None:
            verifying = self._verifying.get(token)
            if verifying is None:  # requests that come together hash once
                if len(self._verifying) >= MAX_HASHES_WAITING:
                    raise RateLimitedError("too many keys are being checked; try again later", retry_after_s=1.0)
                verifying = asyncio.create_task(self._verify(parts["id"], parts["secret"], token))
                self._verifying[token] = verifying
                verifying.add_done_callback(lambda done: self._forget(token, done))
            key = await asyncio.shield(verifying)
        if not key.is_valid(self._wall()):
            raise _refused()
        return key, token

    def _forget(self, token: bytes, done: asyncio.Task[ApiKey]) -> None:
        del self._verifying[token]
        if not done.cancelled():
            done.exception()  # fetched, also if everyone who waited has hung up meanwhile

    async def _known(self, token: bytes) -> ApiKey | None:
        """The record of a key that was verified before, read again if that is some time ago."""
        if (verified := self._verified.get(token)) is None:
            return None
        if (now_s := self._clock()) - verified.read_s < self._settings.cache_s:
            return verified.key
        try:
            key = await self._store.get(verified.key.id)
        except UnavailableError:
            return verified.key  # while the store is away, who was known stays known
        if key is None or key.digest != verified.key.digest:
            self._verified.pop(token, None)
            return None
        verified.key, verified.read_s = key, now_s
        return key

    async def _verify(self, key_id: str, secret: str, token: bytes) -> ApiKey:
        key = await self._store.get(key_id)
        if key is None:
            raise _refused()
        async with self._hashing:
            is_right = await asyncio.to_thread(is_secret_of, key, secret)
        if not is_right:
            raise _refused()
        if len(self._verified) >= MAX_REMEMBERED:
            self._verified.pop(next(iter(self._verified)))
        self._verified[token] = _Verified(key, self._clock())
        return key


def _refused() -> UnauthenticatedError:
    return UnauthenticatedError("the API key is not valid: unknown, revoked or expired")
