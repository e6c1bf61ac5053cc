"""What a request leaves behind once it is answered: nothing that has to wait for the cyclic collector.

The collector counts objects, not bytes. A few objects in a cycle that hold an upload are small to it, so hundreds of
megabytes may lie there before it looks; and an allocator does not give all of that back.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import service
from recofuse_protos.inference.v2 import inference_pb2
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.command.processes import serve_front_end
from service.queue.choice import build_queue
from service.terms.jobs import FusionJob
from service.terms.settings import Settings
from tests.fakes import FakeEngine, job
from tests.service.conftest import Serving
from tests.service.error_cases import ERROR_CASES, IR, VIS
from tests.service.redis_server import RedisServer

SOURCES = str(Path(service.__file__).parent)
FILES = {"vis": VIS, "ir": IR}

Left = Callable[[], Counter[str]]


@contextlib.contextmanager
def without_collector() -> Iterator[Left]:
    """Yields what tells, once, which objects and frames of the service lie in cycles that nobody reaches any more."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def left() -> Counter[str]:
        gc.collect()
        return Counter(filter(None, map(_kind, gc.garbage)))

    try:
        yield left
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _kind(found: object) -> str:
    if isinstance(found, FrameType):
        return found.f_code.co_qualname if found.f_code.co_filename.startswith(SOURCES) else ""
    return type(found).__qualname__ if type(found).__module__.startswith("service.") else ""


class _Ring:
    def __init__(self, payload: FusionJob) -> None:
        self.payload = payload
        self.ring = self


def test_what_lies_in_a_cycle_is_found() -> None:
    with without_collector() as left:
        _Ring(job())
        assert left() == {"FusionJob": 1, "FusionOptions": 1}


async def test_http_requests_leave_nothing(serving: Serving) -> None:
    async with serving() as server:
        bad = [(case.files(), case.form, 0) for case in ERROR_CASES.values()]
        with without_collector() as left:
            for files, form, status in [(FILES, {}, 200), *bad, (FILES, {"no": "1"}, 422), (FILES, {}, 200)]:
                answer = await server.client.post("/v1/fuse", files=files, data=form)
                assert answer.status_code == status or (not status and 400 <= answer.status_code < 500)
            for headers in ({"Prefer": "respond-async"}, {"Idempotency-Key": "k"}):
                assert (await server.client.post("/v1/fuse", files=FILES, headers=headers)).is_success
            for content in (b"", b"--x\r\nrubbish", b"--x\r\n\r\n" + bytes(9)):
                content_type = {"Content-Type": "multipart/form-data; boundary=x"}
                assert (await server.client.post("/v1/fuse", content=content, headers=content_type)).is_client_error
            assert not left()


async def test_grpc_calls_leave_nothing(serving: Serving) -> None:
    async with serving(grpc={"port": 0}) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        raw: Callable[[str], Any] = channel.unary_unary  # takes any bytes
        with without_collector() as left:
            for case in ERROR_CASES.values():
                await refused(stub.Fuse(case.message()))
            await refused(stub.SubmitFuse(pb.FuseRequest()))
            await refused(stub.GetJobResult(pb.JobRequest(job_id="none")))
            await refused(raw("/recofuse.v1.FusionService/Fuse")(b"\xff" * 100))
            await refused(raw("/recofuse.v1.FusionService/Nothing")(b"\xff" * 100))
            infer = raw("/inference.GRPCInferenceService/ModelInfer")
            for files in ([VIS[:-20]], [VIS, VIS[:-20]], []):
                await refused(infer(inference_request(files).SerializeToString()))
            await refused(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="none")))
            await infer(inference_request([VIS, VIS]).SerializeToString())
            await stub.Fuse(pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR)))
            assert not left()


async def test_streams_leave_nothing(serving: Serving) -> None:
    engine = FakeEngine()
    async with (
        serving(engine, grpc={"port": 0}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        raw: Callable[[str], Any] = channel.stream_stream  # takes any bytes
        with without_collector() as left:
            for numbers in ([1, 2, 3], [2, 1], [1, 2, 2, 3]):
                answers = 0
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for answer in stub.FuseStream(frames(numbers)):
                        answers += answer.WhichOneof("outcome") == "fusion"
                assert answers
            await refused(raw("/recofuse.v1.FusionService/FuseStream")(iter([b"\xff" * 100])).read())
            for _ in range(3):
                engine.gate.clear()
                engine.started.clear()
                cancelled = stub.FuseStream(frames([1, 2, 3, 4]))
                await cancelled.wait_for_connection()
                await asyncio.to_thread(engine.started.wait, 10)
                cancelled.cancel()
                engine.gate.set()
                await stub.Fuse(pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR)))
            assert not left()


@pytest.mark.redis
async def test_a_stalled_redis_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("service.queue.redis.address.CALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr("service.faces.gateway.PATIENCE_S", 0.5)
    server = RedisServer(tmp_path)
    server.start()
    settings = Settings.from_values({"queue": {"url": server.url}, "http": {"port": 0}, "grpc": {"port": 0}})
    stop, http_address, grpc_address = asyncio.Event(), *(asyncio.get_running_loop().create_future() for _ in range(2))
    queue = build_queue(settings.queue)
    running = asyncio.create_task(
        serve_front_end(settings, queue, stop, http_address.set_result, grpc_address.set_result)
    )
    try:
        async with (
            httpx.AsyncClient(base_url=await http_address, timeout=20) as client,
            grpc.aio.insecure_channel(await grpc_address) as channel,
        ):
            stub = fusion_pb2_grpc.FusionServiceStub(channel)
            server.stall()
            with without_collector() as left:
                for headers in ({}, {"Prefer": "respond-async"}):
                    assert (await client.post("/v1/fuse", files=FILES, headers=headers)).status_code == 503
                await refused(stub.Fuse(pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR))))
                assert not left()
    finally:
        server.kill()
        stop.set()
        await asyncio.wait_for(running, 15)


async def refused(call: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await call


async def frames(numbers: list[int]) -> AsyncIterator[pb.FuseStreamRequest]:
    for number in numbers:
        yield pb.FuseStreamRequest(frame=pb.Frame(sequence=number, vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR)))


def inference_request(files: list[bytes]) -> inference_pb2.ModelInferRequest:
    """These files as vis, and as many good ones as ir."""
    asked = inference_pb2.ModelInferRequest(model_name="recofuse")
    for name, contents in (("vis", files), ("ir", [IR] * len(files))):
        asked.inputs.add(name=name, datatype="BYTES", shape=[len(contents)])
        asked.raw_input_contents.append(b"".join(len(each).to_bytes(4, "little") + each for each in contents))
    return asked
