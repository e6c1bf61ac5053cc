"""Before a message is read its caller is known and has room; what is late, or larger than announced, is refused."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from recofuse_protos.inference.v2 import inference_pb2
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from service.access.held import Held
from service.access.keys import FileKeys, new_key
from service.faces.grpc.arriving import ANNOUNCED, MAX_SMALL_BYTES, Arrivals, Messages
from service.terms.errors import ErrorCode
from service.terms.settings import Settings
from tests.service.error_cases import IR, VIS
from tests.service.faces.grpc.face import FUSE, Face, Facing, checked, detail_of, eventually, frame, request

SIZE = request().ByteSize()
INFER = "/inference.GRPCInferenceService/ModelInfer"
CHECK = "/grpc.health.v1.Health/Check"


def stalled(face: Face, path: str, *metadata: tuple[str, str]) -> grpc.aio.StreamUnaryCall[bytes, bytes]:
    """A call that is there, and whose message does not come."""
    call: grpc.aio.StreamUnaryCall[bytes, bytes] = face.channel.stream_unary(path)(metadata=metadata)
    return call


async def test_a_key_is_refused_before_the_message(facing: Facing, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    record, presented = new_key("camera")
    await FileKeys(path).put(record)
    async with facing(auth={"keys": f"file:{path}"}) as face:
        for called in (FUSE, INFER):
            await detail_of(
                stalled(face, called, ("x-api-key", f"rf_000000000000_{presented[-43:]}")), ErrorCode.UNAUTHENTICATED
            )
        await face.stub.Fuse(request(), metadata=(("x-api-key", presented),))


@pytest.mark.parametrize("path", [FUSE, INFER, CHECK])
async def test_a_message_that_does_not_come_is_given_up(facing: Facing, path: str) -> None:
    async with facing(http={"body_timeout_s": 0.5}) as face:
        await detail_of(stalled(face, path), ErrorCode.TIMED_OUT)
        await face.stub.Fuse(request())


async def test_a_call_without_a_message(face: Face) -> None:
    call = stalled(face, FUSE)
    await call.done_writing()
    await detail_of(call, ErrorCode.MALFORMED_REQUEST)


async def test_a_client_that_hangs_up_while_it_sends_is_a_cancelled_call(face: Face) -> None:
    call = stalled(face, FUSE)
    await call.wait_for_connection()
    assert await eventually(face, 'recofuse_in_flight{protocol="grpc"} 1.0')
    call.cancel()
    line = f'recofuse_requests_total{{method="unary",protocol="grpc",route="{FUSE}",status="CANCELLED"}} 1.0'
    assert await eventually(face, line)


async def test_more_than_was_announced_is_refused(face: Face) -> None:
    await face.stub.Fuse(request(), metadata=((ANNOUNCED, str(SIZE)),))
    for told, code in (
        (str(SIZE - 1), ErrorCode.INVALID_INPUT),
        ("many", ErrorCode.INVALID_INPUT),
        ("-1", ErrorCode.INVALID_INPUT),
        (str(1 << 40), ErrorCode.PAYLOAD_TOO_LARGE),
    ):
        await detail_of(face.stub.Fuse(request(), metadata=((ANNOUNCED, told),)), code)


async def test_what_carries_no_pictures_is_short(face: Face) -> None:
    await detail_of(face.raw_call(CHECK)(bytes(MAX_SMALL_BYTES + 1)), ErrorCode.PAYLOAD_TOO_LARGE)


async def test_a_message_for_which_there_is_no_room_is_not_read(facing: Facing) -> None:
    async with facing(limits={"max_held_bytes": 2 * SIZE}) as face:
        face.engine.gate.clear()
        holding = asyncio.ensure_future(face.stub.Fuse(request(), metadata=((ANNOUNCED, str(SIZE)),)))
        await asyncio.to_thread(face.engine.started.wait, 10)
        for path in (FUSE, INFER):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stalled(face, path)  # nothing of it is ever sent
            assert checked(refused.value, ErrorCode.OVERLOADED).retry_after_s > 0
            assert "grpc-retry-pushback-ms" in dict(refused.value.trailing_metadata())
        announced = asyncio.ensure_future(face.stub.Fuse(request(), metadata=((ANNOUNCED, str(SIZE)),)))
        assert await eventually(face, 'recofuse_in_flight{protocol="grpc"} 2.0')
        face.engine.gate.set()
        await asyncio.gather(holding, announced)


async def test_many_calls_that_announce_nothing_wait_for_one_another(facing: Facing) -> None:
    """One that may be as large as they come fits at a time, and all that do come."""
    limits = {"max_image_bytes": 20_000, "max_held_bytes": 105_536 + 64 * SIZE}
    async with facing(limits=limits) as face:
        answers = await asyncio.gather(*(face.stub.Fuse(request()) for _ in range(64)))
        assert all(answer.fusion.pictures for answer in answers)


async def test_who_waits_for_a_message_and_is_cancelled_leaves_no_cycle() -> None:
    """Else what the call holds would stay until the collector comes."""

    class Silent:
        def invocation_metadata(self) -> tuple[()]:
            return ()

        async def read(self) -> bytes:
            await asyncio.Event().wait()
            return b""

    def waiting() -> tuple[weakref.ref[Silent], asyncio.Task[object]]:
        silent: Any = Silent()
        arrivals = Arrivals(Held(1 << 30, retry_after_s=1.0), Settings())
        messages = Messages(arrivals, silent, pb.FuseStreamRequest.FromString, FUSE)
        return weakref.ref(silent), asyncio.ensure_future(anext(messages))

    gc.disable()
    try:
        context, reading = waiting()
        await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        del reading
        await asyncio.sleep(0.01)  # the loop lets go of it
        assert context() is None
    finally:
        gc.enable()


async def test_streams_of_one_process_share_the_room(facing: Facing) -> None:
    async def frames() -> AsyncIterator[pb.FuseStreamRequest]:
        for number in range(1, 6):
            yield frame(number)

    async def outcomes(face: Face) -> list[str | None]:
        return [answer.WhichOneof("outcome") async for answer in face.stub.FuseStream(frames())]

    async with facing(limits={"max_held_bytes": 2 * SIZE}) as face:
        assert await asyncio.gather(*(outcomes(face) for _ in range(8))) == [["fusion"] * 5] * 8
        infer = inference_pb2.ModelInferRequest(model_name="recofuse")
        for name, content in (("vis", VIS), ("ir", IR)):
            infer.inputs.add(name=name, datatype="BYTES", shape=[1])
            infer.raw_input_contents.append(len(content).to_bytes(4, "little") + content)
        await face.raw_call(INFER)(infer.SerializeToString())  # everything was given back
