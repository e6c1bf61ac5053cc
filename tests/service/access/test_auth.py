"""Who may call: keys, their stores, the guard's decisions, and refusals as clients meet them on real servers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.access import auth
from service.access.auth import ApiKey, FileKeys, Guard, LocalLimiter, Scope, new_key
from service.access.redis import RedisKeys, RedisLimiter
from service.terms.errors import (
    PermissionDeniedError,
    RateLimitedError,
    UnauthenticatedError,
    UnavailableError,
)
from service.terms.settings import AuthSettings, QueueSettings, Settings, SettingsError
from tests.fakes import FakeClock, pair
from tests.service.conftest import Server, Serving
from tests.service.redis_server import RedisServer

ROOT = Path(__file__).parents[3]
VIS, IR = pair()
FILES = {"vis": ("v.png", VIS), "ir": ("i.png", IR)}


# keys and where they are kept


def test_a_record_tells_nothing_of_the_secret() -> None:
    record, key = new_key("camera 1", rate_per_s=5, now_s=1.0)
    _, key_id, secret = key.split("_", 2)
    assert key_id == record.id
    assert secret not in record.to_json()
    assert ApiKey.from_json(record.to_json()) == record
    assert auth.is_secret_of(record, secret)
    assert not auth.is_secret_of(record, secret[:-1] + ("A" if secret[-1] != "A" else "B"))
    assert record.burst == 10
    with pytest.raises(ValueError, match="not a key's record"):
        ApiKey.from_json('{"id": "a"}')


def test_a_key_ends_when_it_expires_or_is_revoked() -> None:
    record, _ = new_key("a", expires_s=100.0)
    assert record.is_valid(99.0)
    assert not record.is_valid(100.0)
    assert not replace(record, revoked_s=50.0).is_valid(60.0)


@pytest.fixture(params=["file", pytest.param("redis", marks=pytest.mark.redis)])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[auth.KeyStore]]:
    """Two stores on one place, as two processes have them."""
    if request.param == "file":
        yield [FileKeys(tmp_path / "keys.json") for _ in range(2)]
        return
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        yield [RedisKeys(QueueSettings(url=server.url)) for _ in range(2)]
        server.kill()


async def test_stores_share_what_is_put(stores: list[auth.KeyStore]) -> None:
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


# the guard


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

    async def knock(self, key: str, scope: Scope = Scope.FUSE, header: str = "authorization") -> auth.Caller:
        value = f"Bearer {key}" if header == "authorization" else key
        return await self.guard.admit({header: value}, scope, is_charged=True, face="http", action="POST /", peer="me")


@pytest.fixture
def door() -> Door:
    return Door()


async def test_a_key_is_hashed_once(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = auth.is_secret_of

    def counted(key: ApiKey, secret: str) -> bool:
        hashed.append(key.id)
        return real(key, secret)

    monkeypatch.setattr(auth, "is_secret_of", counted)
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
    monkeypatch.setattr(auth, "MAX_REMEMBERED", 1)
    record, key = door.add(rate_per_s=1.0, burst=100)
    await door.knock(key)
    await auth.charge()
    door.clock.advance(AuthSettings().cache_s)
    door.keys.is_away = True
    await auth.charge()
    door.keys.is_away = False
    admitted = auth.caller.get()
    await door.knock(door.add()[1])  # for which the first one is forgotten
    auth.caller.set(admitted)
    await auth.charge()
    door.keys.is_away = True
    await auth.charge()
    door.keys.is_away = False
    await door.keys.put(replace(record, revoked_s=door.clock()))
    with pytest.raises(UnauthenticatedError):
        await auth.charge()
    door.keys.clear()
    with pytest.raises(UnauthenticatedError):
        await auth.charge()


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
    assert auth.own_idempotency_key("same") == "same"
    names = set()
    for _ in range(2):
        record, key = door.add()
        await door.knock(key)
        names.add(auth.own_idempotency_key("same"))
        assert record.id in (auth.own_idempotency_key("same") or "")
        assert auth.own_idempotency_key(None) is None
    assert len(names) == 2


def test_settings_of_keys() -> None:
    for wrong in ({"keys": "sqlite"}, {"keys": "file:"}, {"cache_s": -1}, {"keys": "redis"}):
        with pytest.raises(SettingsError):
            Settings.from_values({"auth": wrong})
    assert Settings.from_values({"auth": {"keys": "redis"}, "queue": {"url": "redis://localhost"}})


def test_a_value_may_stand_in_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("redis://:hidden@cache\n")
    settings = Settings.from_environment({"RECOFUSE_QUEUE__URL_FILE": str(secret)})
    assert settings.queue.url == "redis://:hidden@cache"
    with pytest.raises(SettingsError, match="cannot be read"):
        Settings.from_environment({"RECOFUSE_QUEUE__URL_FILE": str(tmp_path / "none")})
    with pytest.raises(SettingsError, match="both set"):
        Settings.from_environment({"RECOFUSE_QUEUE__URL_FILE": str(secret), "RECOFUSE_QUEUE__URL": "memory://"})


# on real servers


class Both:
    """One server and both of its faces, asked for the same with one key."""

    def __init__(self, server: Server, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.fusion = fusion_pb2_grpc.FusionServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def ask(self, key: str | None) -> tuple[tuple[int, str], tuple[grpc.StatusCode, str]]:
        """HTTP status and code, gRPC status and code; the codes are empty for success."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        answer = await self.server.client.post("/v1/fuse", files=FILES, headers=headers)
        code = "" if answer.is_success else answer.json()["code"]
        request = pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR))
        metadata = [] if key is None else [("authorization", f"Bearer {key}")]
        try:
            await self.fusion.Fuse(request, metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            detail = pb.ErrorDetail()
            trailing: Any = error.trailing_metadata()
            from google.rpc.status_pb2 import Status

            Status.FromString(trailing["grpc-status-details-bin"]).details[0].Unpack(detail)
            return (answer.status_code, code), (error.code(), detail.code)
        return (answer.status_code, code), (grpc.StatusCode.OK, "")

    async def stream(self, key: str, num_frames: int) -> list[str]:
        """What became of each frame of one stream: an empty string, or an error's code."""

        async def frames() -> AsyncIterator[pb.FuseStreamRequest]:
            for sequence in range(num_frames):
                frame = pb.Frame(sequence=sequence, vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR))
                yield pb.FuseStreamRequest(frame=frame)

        call = self.fusion.FuseStream(frames(), metadata=[("x-api-key", key)], timeout=20)
        return [answer.error.code async for answer in call]


@pytest.fixture
async def both(serving: Serving, tmp_path: Path) -> AsyncIterator[tuple[Both, FileKeys]]:
    path = tmp_path / "keys.json"
    options = {"keys": f"file:{path}", "cache_s": 0}
    async with (
        serving(auth=options, grpc={"port": 0}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        yield Both(server, channel), FileKeys(path)


async def test_refusals_have_the_right_status_on_both_faces(both: tuple[Both, FileKeys]) -> None:
    faces, store = both
    record, key = new_key("camera")
    reader, reading = new_key("dashboard", scopes=(Scope.READ,))
    slow, limited = new_key("slow", rate_per_s=0.001, burst=2)
    for entry in (record, reader, slow):
        await store.put(entry)
    ok = ((200, ""), (grpc.StatusCode.OK, ""))
    stranger = ((401, "unauthenticated"), (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated"))
    assert await faces.ask(key) == ok
    assert await faces.ask(None) == stranger
    assert await faces.ask(new_key("unknown")[1]) == stranger
    assert await faces.ask(key[:-2] + "AA") == stranger
    denied = ((403, "permission_denied"), (grpc.StatusCode.PERMISSION_DENIED, "permission_denied"))
    assert await faces.ask(reading) == denied
    assert await faces.ask(limited) == ok  # one of each takes both tokens
    over = ((429, "rate_limited"), (grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limited"))
    assert await faces.ask(limited) == over
    await store.put(replace(record, revoked_s=1.0))
    assert await faces.ask(key) == stranger


async def test_jobs_over_grpc_need_the_scopes_that_they_need_over_http(both: tuple[Both, FileKeys]) -> None:
    faces, store = both
    record, key = new_key("slow", rate_per_s=0.001, burst=1)
    reader, reading = new_key("dashboard", scopes=(Scope.READ,))
    for entry in (record, reader):
        await store.put(entry)
    pair = pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR))
    denied, over = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED
    named = pb.JobRequest(job_id=(await faces.fusion.SubmitFuse(pair, metadata=[("x-api-key", key)])).id)
    calls: list[tuple[Any, Any, str, grpc.StatusCode]] = [
        (faces.fusion.SubmitFuse, pair, reading, denied),
        (faces.fusion.CancelJob, named, reading, denied),
        (faces.fusion.SubmitFuse, pair, key, over),
        (faces.fusion.CancelJob, named, key, grpc.StatusCode.OK),  # costs nothing
        (faces.fusion.GetJob, named, reading, grpc.StatusCode.OK),
        (faces.fusion.ListModels, pb.ListModelsRequest(), reading, grpc.StatusCode.OK),
    ]
    for method, message, presented, expected in calls:
        call = method(message, metadata=[("x-api-key", presented)], timeout=20)
        assert await call.code() is expected, method


async def test_a_stream_is_charged_by_frame(both: tuple[Both, FileKeys]) -> None:
    faces, store = both
    record, key = new_key("camera", rate_per_s=0.001, burst=3)
    await store.put(record)
    assert sorted(await faces.stream(key, 5)) == ["", "", "", "rate_limited", "rate_limited"]


@pytest.mark.parametrize("mode", [pb.FLOW_CONTROL_ALL, pb.FLOW_CONTROL_LATEST])
async def test_a_stream_ends_with_its_key(both: tuple[Both, FileKeys], mode: pb.FlowControl.ValueType) -> None:
    faces, store = both
    record, key = new_key("camera")
    await store.put(record)
    answered = asyncio.Event()

    async def frames() -> AsyncIterator[pb.FuseStreamRequest]:
        yield pb.FuseStreamRequest(options=pb.StreamOptions(flow_control=mode))
        for sequence in range(2):
            frame = pb.Frame(sequence=sequence, vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR))
            yield pb.FuseStreamRequest(frame=frame)
            await answered.wait()
            await store.put(replace(record, revoked_s=1.0))
        await asyncio.Event().wait()  # the sender does not end it

    call = faces.fusion.FuseStream(frames(), metadata=[("x-api-key", key)], timeout=60)
    codes = []
    async for answer in call:
        codes.append(answer.error.code)
        answered.set()
        if len(codes) == 2:
            break
    assert codes == ["", "unauthenticated"]
    assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_what_a_refusal_tells(both: tuple[Both, FileKeys]) -> None:
    faces, store = both
    client = faces.server.client
    missing = await client.get("/v1/models")
    assert missing.status_code == 401
    assert missing.headers["www-authenticate"].startswith("Bearer")
    record, key = new_key("slow", rate_per_s=0.001, burst=1)
    await store.put(record)
    headers = {"X-API-Key": key}
    assert (await client.get("/v1/models", headers=headers)).status_code == 200  # reading costs nothing
    assert (await client.post("/v1/fuse", files=FILES, headers=headers)).status_code == 200
    over = await client.post("/v1/fuse", files=FILES, headers=headers)
    assert int(over.headers["retry-after"]) > 900
    assert (await client.delete("/v1/jobs/none", headers={})).status_code == 401
    metrics = (await client.get("/metrics")).text
    assert 'recofuse_errors_total{code="unauthenticated"} 2.0' in metrics
    assert 'recofuse_errors_total{code="rate_limited"} 1.0' in metrics


async def test_probes_and_pages_need_no_key(both: tuple[Both, FileKeys]) -> None:
    faces, _ = both
    for path in ("/", "/playground/page.js", "/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json"):
        answer = await faces.server.client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "strict-transport-security" not in answer.headers
    assert (await faces.health.Check(health_pb2.HealthCheckRequest(service=""))).status == 1


# TLS of HTTP; that of gRPC is in test_grpc.py


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, dict[str, str]]:
    """An authority, and the files of a server that it vouches for."""
    folder, ca = tmp_path_factory.mktemp("tls"), trustme.CA()
    server = ca.issue_cert("localhost", "127.0.0.1")
    server.private_key_pem.write_to_path(str(folder / "key.pem"))
    for blob in server.cert_chain_pems:
        blob.write_to_path(str(folder / "cert.pem"), append=True)
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    return ca, {name: str(folder / f"{name}.pem") for name in ("cert", "key", "ca")}


def client_of(server: Server, ca: trustme.CA, *, is_known: bool = False) -> httpx.AsyncClient:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    if is_known:
        ca.issue_cert("client.example").configure_cert(context)
    return httpx.AsyncClient(base_url=server.client.base_url, verify=context, trust_env=False)


async def test_http_over_tls(serving: Serving, authority: tuple[trustme.CA, dict[str, str]]) -> None:
    ca, files = authority
    async with serving(http={"tls_cert": files["cert"], "tls_key": files["key"]}) as server:
        assert server.client.base_url.scheme == "https"
        async with client_of(server, ca) as client:
            answer = await client.post("/v1/fuse", files=FILES)
        assert answer.status_code == 200
        assert "max-age" in answer.headers["strict-transport-security"]
        async with client_of(server, trustme.CA()) as doubtful:
            with pytest.raises(httpx.ConnectError):
                await doubtful.get("/health/live")


async def test_http_wants_the_clients_certificate(
    serving: Serving, authority: tuple[trustme.CA, dict[str, str]]
) -> None:
    ca, files = authority
    http = {"tls_cert": files["cert"], "tls_key": files["key"], "tls_client_ca": files["ca"]}
    async with serving(http=http) as server:
        async with client_of(server, ca, is_known=True) as known:
            assert (await known.get("/health/live")).status_code == 200
        async with client_of(server, ca) as anonymous:
            with pytest.raises(httpx.TransportError):
                await anonymous.get("/health/live")


async def test_tls_files_that_do_not_fit_stop_the_start(
    serving: Serving, authority: tuple[trustme.CA, dict[str, str]]
) -> None:
    _, files = authority
    for wrong in ({"tls_key": "/nowhere/key.pem"}, {"tls_key": files["ca"]}):
        with pytest.raises(OSError, match="TLS"):
            async with serving(http={"tls_cert": files["cert"], **wrong}):
                pass


# the command


def run(*words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RECOFUSE_")}
    command = [sys.executable, "-m", "service", "keys", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=clean, timeout=60)


async def test_keys_are_created_listed_and_revoked_by_command(tmp_path: Path) -> None:
    store = f"file:{tmp_path / 'keys.json'}"
    made = run("create", "camera 1", "--scope", "fuse", "--rate", "5", "--days", "1", "--store", store)
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    record = await FileKeys(tmp_path / "keys.json").get(key.split("_")[1])
    assert record is not None
    assert auth.is_secret_of(record, key.split("_", 2)[2])
    (line,) = run("list", "--json", "--store", store).stdout.splitlines()
    listed = json.loads(line)
    assert (listed["id"], listed["name"], listed["scopes"], listed["state"]) == (record.id, "camera 1", "fuse", "valid")
    assert run("revoke", record.id, "--store", store).stdout.split() == [record.id]
    assert '"revoked"' in run("list", "--json", "--store", store).stdout
    for wrong in (("revoke", "0" * 12), ("create", "a", "--scope", "all"), ("list", "--store", "file:")):
        failed = run(*wrong, *(() if "--store" in wrong else ("--store", store)))
        assert failed.returncode == 2
        assert "Traceback" not in failed.stderr
