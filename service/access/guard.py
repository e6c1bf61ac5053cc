"""The guard that every face asks before anything else: who makes a request, and whether that is allowed now.

Hashing is meant to be slow, so a key that was verified is remembered by a keyed digest in memory, and only its record
is read again from time to time: that is how soon a revocation is noticed.

What a newcomer would get wrong: nothing here may log or raise a presented key, not even a part of it; and a refusal
must not tell an unknown id from a wrong secret.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace

from service.access.keys import PRESENTED, ApiKey, KeyStore, Scope, is_secret_of
from service.access.limits import Clock, Limiter
from service.terms.errors import (
    PermissionDeniedError,
    RateLimitedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)
from service.terms.settings import AuthSettings

audit = logging.getLogger("recofuse.audit")

MAX_HASHING = 2  # at once: guessing must not take all cores
MAX_HASHES_WAITING = 64
MAX_REMEMBERED = 4096


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
        if (parts := PRESENTED.fullmatch(presented)) is None:
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
