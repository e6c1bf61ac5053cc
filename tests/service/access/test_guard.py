"""The guard's decisions: who gets in, how often, and what is remembered of it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.access import guard
from service.access.guard import Caller, Guard, charge, own_idempotency_key
from service.access.keys import ApiKey, Scope, is_secret_of, new_key
from service.access.limits import LocalLimiter
from service.terms.errors import PermissionDeniedError, RateLimitedError, UnauthenticatedError, UnavailableError
from service.terms.settings import AuthSettings
from tests.fakes import FakeClock


class Keys(dict[str, ApiKey]):
    """A store in memory that counts its reads, and can be away."""

    num_reads = 0
    is_away = False

    async def get(self, key_id: str) -> ApiKey | None:  # type: ignore[override]
        self.num_reads += 1
        if self.is_away:
            raise UnavailableError("away")
        return super().get(key_id)

    async def all(self) -> list[ApiKey]:
        return list(self.values())

    async def put(self, key: ApiKey) -> None:
        self[key.id] = key

    async def close(self) -> None:
        pass


class Door:
    """A guard with clocks to turn."""

    def __init__(self, **settings: Any) -> None:
        self.keys, self.clock = Keys(), FakeClock()
        limiter = LocalLimiter(self.clock)
        values = AuthSettings(keys="redis", **settings)
        self.guard = Guard(self.keys, limiter, values, clock=self.clock, wall=self.clock)

    def add(self, **values: Any) -> tuple[ApiKey, str]:
        record, key = new_key("somebody", **values)
        self.keys[record.id] = record
        return record, key

    async def knock(self, key: str, scope: Scope = Scope.FUSE, header: str = "authorization") -> Caller:
        value = f"Bearer {key}" if header == "authorization" else key
        return await self.guard.admit({header: value}, scope, is_charged=True, face="http", action="POST /", peer="me")


@pytest.fixture
def door() -> Door:
    return Door()


async def test_a_key_is_hashed_once(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = is_secret_of

    def counted(key: ApiKey, secret: str) -> bool:
        hashed.append(key.id)
        return real(key, secret)

    monkeypatch.setattr(guard, "is_secret_of", counted)
    record, key = door.add()
    callers = await asyncio.gather(*(door.knock(key) for _ in range(20)))
    assert {caller.key for caller in callers} == {record}
    await door.knock(key, header="x-api-key")
    door.clock.advance(60)
    await door.knock(key)
    assert hashed == [record.id]
    assert door.keys.num_reads == 2


async def test_wrong_keys_are_refused_alike(door: Door) -> None:
    _, key = door.add()
    other = new_key("other")[1]
    said = set()
    for wrong in (other, key[:-2] + "AA", key + "A", "rf_nonsense", "\u00e9" * 60):
        with pytest.raises(UnauthenticatedError) as refused:
            await door.knock(wrong)
        said.add(refused.value.message)
    assert len(said) == 1
    for missing in ({}, {"authorization": "Bearer "}, {"authorization": f"Basic {key}"}, {"x-api-key": ""}):
        with pytest.raises(UnauthenticatedError, match="is needed"):
            await door.guard.admit(missing, Scope.READ, is_charged=False, face="http", action="GET /", peer="me")


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["authorization", "x-api-key"]), st.text(max_size=80), st.booleans())
async def test_nothing_that_is_presented_gets_in_or_breaks_the_door(
    header: str, text: str, is_like_a_key: bool
) -> None:
    presented = f"rf_{'0' * 12}_{text}" if is_like_a_key else text
    with pytest.raises(UnauthenticatedError):
        await Door().knock(presented, header=header)


async def test_revocation_is_noticed_within_the_cache_time_and_expiry_at_once(door: Door) -> None:
    record, key = door.add()
    await door.knock(key)
    await door.keys.put(replace(record, revoked_s=door.clock()))
    await door.knock(key)
    door.clock.advance(AuthSettings().cache_s)
    with pytest.raises(UnauthenticatedError):
        await door.knock(key)
    _, brief = door.add(expires_s=door.clock() + 1)
    await door.knock(brief)
    door.clock.advance(1)
    with pytest.raises(UnauthenticatedError):
        await door.knock(brief)


async def test_a_call_that_goes_on_has_its_key_looked_at_again(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_REMEMBERED", 1)
    record, key = door.add(rate_per_s=1.0, burst=100)
    await door.knock(key)
    await charge()
    door.clock.advance(AuthSettings().cache_s)
    door.keys.is_away = True
    await charge()
    door.keys.is_away = False
    admitted = guard.caller.get()
    await door.knock(door.add()[1])  # for which the first one is forgotten
    guard.caller.set(admitted)
    await charge()
    door.keys.is_away = True
    await charge()
    door.keys.is_away = False
    await door.keys.put(replace(record, revoked_s=door.clock()))
    with pytest.raises(UnauthenticatedError):
        await charge()
    door.keys.clear()
    with pytest.raises(UnauthenticatedError):
        await charge()


async def test_a_store_that_is_away_keeps_out_only_strangers(door: Door) -> None:
    _, key = door.add()
    _, stranger = door.add()
    await door.knock(key)
    door.clock.advance(60)
    door.keys.is_away = True
    await door.knock(key)
    with pytest.raises(UnavailableError):
        await door.knock(stranger)
    door.keys.is_away = False
    door.clock.advance(60)
    door.keys.clear()  # a key that is gone is refused, as a revoked one is
    with pytest.raises(UnauthenticatedError):
        await door.knock(key)


async def test_scopes_and_rates(door: Door) -> None:
    _, reader = door.add(scopes=(Scope.READ,))
    await door.knock(reader, Scope.READ)
    with pytest.raises(PermissionDeniedError, match="scope fuse"):
        await door.knock(reader)
    _, slow = door.add(rate_per_s=0.5, burst=1)
    await door.knock(slow)
    with pytest.raises(RateLimitedError) as refused:
        await door.knock(slow)
    assert refused.value.retry_after_s == pytest.approx(2.0)
    limited = Door(rate_per_s=1.0, burst=2)
    _, usual = limited.add()
    await limited.knock(usual)
    await limited.knock(usual)
    with pytest.raises(RateLimitedError):
        await limited.knock(usual)


async def test_the_audit_log_names_callers_and_never_keys(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    record, key = door.add()
    with caplog.at_level(logging.INFO, logger="recofuse.audit"):
        await door.knock(key)
        with pytest.raises(UnauthenticatedError):
            await door.knock(key[:-2] + "AA")
    entered, refused = (entry.__dict__ for entry in caplog.records)
    assert (entered["key_id"], entered["key_name"], entered["action"]) == (record.id, "somebody", "POST /")
    assert (refused["code"], refused["peer"]) == ("unauthenticated", "me")
    assert key.split("_", 2)[2][:8] not in repr([entered, refused])


async def test_equal_idempotency_keys_of_two_callers_are_two(door: Door) -> None:
    assert own_idempotency_key("same") == "same"
    names = set()
    for _ in range(2):
        record, key = door.add()
        await door.knock(key)
        names.add(own_idempotency_key("same"))
        assert record.id in (own_idempotency_key("same") or "")
        assert own_idempotency_key(None) is None
    assert len(names) == 2
