"""Health over gRPC is the gateway's readiness."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.command.processes import serve_all_in_one, serve_front_end
from service.queue.memory import MemoryQueue
from service.terms.errors import ErrorCode
from service.terms.settings import Settings
from tests.fakes import FakeEngine
from tests.service.faces.grpc.face import Facing, detail_of, request

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_is_readiness() -> None:
    allowed, stop = threading.Event(), asyncio.Event()
    ready, address = asyncio.get_running_loop().create_future(), asyncio.get_running_loop().create_future()

    def load() -> None:
        assert allowed.wait(10)

    engine = FakeEngine(on_load=load)
    values = Settings.from_values({"http": {"port": 0}, "grpc": {"port": 0}, "worker": {"take_wait_s": 0.2}})
    running = asyncio.create_task(serve_all_in_one(values, engine, stop, ready.set_result, address.set_result))
    async with grpc.aio.insecure_channel(await address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "recofuse.v1.FusionService"):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        allowed.set()
        await asyncio.wait_for(ready, 10)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        assert (await asyncio.wait_for(watch.read(), 5)).status == SERVING
        engine.gate.clear()
        held = asyncio.ensure_future(fusion_pb2_grpc.FusionServiceStub(channel).Fuse(request()))
        await asyncio.to_thread(engine.started.wait, 5)
        stop.set()
        assert (await asyncio.wait_for(watch.read(), 5)).status == NOT_SERVING
        engine.gate.set()
        await held
        assert await watch.read() is grpc.aio.EOF
        await asyncio.wait_for(running, 10)


async def test_watching_takes_no_places_from_fusing(facing: Facing) -> None:
    """Watching needs no key and has no end."""
    async with facing(grpc={"max_calls": 16}) as face:
        stub, asked = health_pb2_grpc.HealthStub(face.channel), health_pb2.HealthCheckRequest()
        watches = [stub.Watch(asked) for _ in range(15)]
        first = await asyncio.gather(*(watch.read() for watch in watches), return_exceptions=True)
        assert [getattr(answer, "status", None) for answer in first].count(SERVING) == 2
        refused = [error for error in first if isinstance(error, grpc.aio.AioRpcError)]
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        await asyncio.gather(*(face.stub.Fuse(request(), timeout=20) for _ in range(4)))
        for watch in watches:
            watch.cancel()
        async with asyncio.timeout(20):
            while True:  # until the server has seen that they are gone
                with contextlib.suppress(grpc.aio.AioRpcError):
                    if await stub.Watch(asked).read() != grpc.aio.EOF:
                        break


async def test_a_front_end_alone_is_not_ready_without_workers() -> None:
    stop = asyncio.Event()
    ready, address = asyncio.get_running_loop().create_future(), asyncio.get_running_loop().create_future()
    values = Settings.from_values({"http": {"port": 0}, "grpc": {"port": 0}})
    queue = MemoryQueue(values.queue)
    running = asyncio.create_task(serve_front_end(values, queue, stop, ready.set_result, address.set_result))
    async with grpc.aio.insecure_channel(await address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        await detail_of(stub.Fuse(request(timeout_ms=100)), ErrorCode.TIMED_OUT)
        stop.set()
        await asyncio.wait_for(running, 10)
