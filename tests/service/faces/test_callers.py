"""Keys as callers meet them: HTTP and gRPC of a real server refuse and admit alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.access.keys import FileKeys, Scope, new_key
from tests.fakes import pair
from tests.service.conftest import Server, Serving

VIS, IR = pair()
FILES = {"vis": ("v.png", VIS), "ir": ("i.png", IR)}


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
