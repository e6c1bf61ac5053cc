"""What is around every call: failures have a status and a detail, and the metrics tell of all of them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from service.terms.errors import ErrorCode
from tests.fakes import FakeEngine
from tests.service.faces.grpc.face import FUSE, STREAM, Face, Facing, checked, detail_of, frame, one_by_one, request

# failures


async def test_a_full_queue_refuses_and_says_when_to_come_back(facing: Facing) -> None:
    async with facing(queue={"max_jobs": 1, "retry_after_s": 3.0}) as face:
        face.engine.gate.clear()
        held = asyncio.ensure_future(face.stub.Fuse(request()))
        await asyncio.to_thread(face.engine.started.wait, 5)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await face.stub.Fuse(request())
        assert checked(refused.value, ErrorCode.OVERLOADED).retry_after_s == 3.0
        assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "3000"
        face.engine.gate.set()
        await held


async def test_an_unforeseen_failure_has_no_detail(facing: Facing) -> None:
    async with facing(FakeEngine(poison_seeds=frozenset({13}))) as face:
        detail = await detail_of(face.stub.Fuse(request(seed=13)), ErrorCode.INTERNAL)
        assert "poison" not in detail.message
        await face.stub.Fuse(request())


async def test_unknown_methods(face: Face) -> None:
    for path in ("/recofuse.v1.FusionService/Nothing", "/other.Service/Fuse"):
        await detail_of(face.raw_call(path)(b"x"), ErrorCode.ROUTE_NOT_FOUND)


async def test_bytes_that_are_no_message(face: Face) -> None:
    await detail_of(face.raw_call(FUSE)(b"\xff\xff"), ErrorCode.MALFORMED_REQUEST)
    stream: Any = face.channel.stream_stream(STREAM, response_deserializer=pb.FuseStreamResponse.FromString)
    call = stream()
    await call.write(frame(1).SerializeToString())
    await call.write(b"\xff\xff")
    assert (await call.read()).sequence == 1  # what came before is answered
    await detail_of(call.read(), ErrorCode.MALFORMED_REQUEST)


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60), min_size=10, max_size=10), st.data())
async def test_fuzzed_messages_are_answered_or_refused(
    facing: Facing, garbage: list[bytes], data: st.DataObject
) -> None:
    whole = request().SerializeToString()
    for _ in range(10):
        damaged = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 6))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        garbage.append(bytes(damaged))
    async with facing() as face:
        call = face.raw_call(FUSE)
        accepted = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED}  # it may damage a timeout
        for raw in garbage:
            try:
                await call(raw, timeout=10)
            except grpc.aio.AioRpcError as error:
                assert error.code() in accepted, error  # noqa: PT017
        assert isinstance(await face.stub.Fuse(request()), pb.FuseResponse)


# metrics


async def test_metrics_tell_what_happened(face: Face) -> None:
    await face.stub.Fuse(request())
    await detail_of(face.stub.Fuse(pb.FuseRequest()), ErrorCode.INVALID_INPUT)
    await detail_of(face.raw_call("/some/path-of-mine")(b""), ErrorCode.ROUTE_NOT_FOUND)
    assert len([answer async for answer in face.stub.FuseStream(one_by_one([frame(0), frame(1, vis=b"x")]))]) == 2
    text = (await face.server.client.get("/metrics")).text
    for line in (
        f'recofuse_requests_total{{method="unary",protocol="grpc",route="{FUSE}",status="OK"}} 1.0',
        f'recofuse_requests_total{{method="unary",protocol="grpc",route="{FUSE}",status="INVALID_ARGUMENT"}} 1.0',
        f'recofuse_requests_total{{method="stream",protocol="grpc",route="{STREAM}",status="OK"}} 1.0',
        'recofuse_requests_total{method="other",protocol="grpc",route="unmatched",status="UNIMPLEMENTED"} 1.0',
        f'recofuse_request_seconds_count{{protocol="grpc",route="{FUSE}"}} 2.0',
        'recofuse_in_flight{protocol="grpc"} 0.0',
        'recofuse_errors_total{code="invalid_input"} 1.0',
        'recofuse_errors_total{code="unsupported_media"} 1.0',
        'recofuse_stream_frames_total{mode="all",outcome="fused"} 1.0',
        'recofuse_stream_frames_total{mode="all",outcome="failed"} 1.0',
    ):
        assert line in text, line
    assert "path-of-mine" not in text
