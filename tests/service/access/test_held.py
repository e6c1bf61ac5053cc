"""What requests hold in memory is counted over all faces, from the first byte to the answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from recofuse_host.memory import usable_memory
from recofuse_protos.inference.v2 import inference_pb2, inference_pb2_grpc
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.access.held import SHARE, Held, Spare
from service.terms.errors import OverloadedError
from tests.fakes import FakeEngine
from tests.service.conftest import Serving
from tests.service.error_cases import IR, VIS

SIZE = len(VIS) + len(IR)
FILES = {"vis": VIS, "ir": IR}
PAIR = pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR))


def test_what_one_request_holds_is_missing_to_the_others() -> None:
    held = Held(100, retry_after_s=3.0)
    with held.holding() as first, held.holding() as second:
        first.add(60)
        second.add(40)
        with pytest.raises(OverloadedError) as refused:
            first.add(1)
        assert refused.value.retry_after_s == 3.0
    with held.holding() as third:
        third.add(100)


def test_it_is_given_back_whatever_ends_the_request() -> None:
    held = Held(100, retry_after_s=1.0)
    for _ in range(3):
        with contextlib.suppress(ZeroDivisionError), held.holding() as holding:
            holding.add(100)  # raises unless the one before was given back
            raise ZeroDivisionError


def test_by_default_it_is_a_share_of_the_memory() -> None:
    most = int(SHARE * usable_memory())
    with Held(0, retry_after_s=1.0).holding() as holding:
        holding.add(most)
        with pytest.raises(OverloadedError):
            holding.add(1)


async def test_every_face_is_in_the_same_count(serving: Serving) -> None:
    """While one pair is with the model, no other fits; a pair that is answered makes room again."""
    engine = FakeEngine()
    limits = {"max_held_bytes": SIZE + 2000}  # and the words of a form around them
    async with (
        serving(engine, grpc={"port": 0}, limits=limits) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        infer = inference_pb2.ModelInferRequest(model_name="recofuse")
        for name, content in (("vis", VIS), ("ir", IR)):
            infer.inputs.add(name=name, datatype="BYTES", shape=[1])
            infer.raw_input_contents.append(len(content).to_bytes(4, "little") + content)
        http_infer = "/v2/models/recofuse/infer"
        for holder in ("http", "grpc"):
            engine.gate.clear()
            engine.started.clear()
            holding = asyncio.ensure_future(
                server.client.post("/v1/fuse", files=FILES) if holder == "http" else stub.Fuse(PAIR)
            )
            await asyncio.to_thread(engine.started.wait, 10)
            assert (await server.client.post("/v1/fuse", files=FILES)).status_code == 429
            assert (await server.client.post(http_infer, content=bytes(SIZE))).status_code == 429
            for call in (stub.Fuse(PAIR), stub.SubmitFuse(PAIR), inference.ModelInfer(infer)):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            engine.gate.set()
            await holding
            assert (await server.client.post("/v1/fuse", files=FILES)).status_code == 200
            await inference.ModelInfer(infer)


async def test_frames_wait_for_room(serving: Serving) -> None:
    """A stream in mode `all` slows down instead of failing."""

    async def requests() -> AsyncIterator[pb.FuseStreamRequest]:
        for number in range(1, 6):
            frame = pb.Frame(sequence=number, vis=pb.Image(encoded=VIS), ir=pb.Image(encoded=IR))
            yield pb.FuseStreamRequest(frame=frame)

    async with (
        serving(grpc={"port": 0}, limits={"max_held_bytes": SIZE + 2000}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        outcomes = [answer.WhichOneof("outcome") async for answer in stub.FuseStream(requests())]
    assert outcomes == ["fusion"] * 5


async def test_promises_are_granted_in_order() -> None:
    held = Held(100, retry_after_s=1.0)
    order: list[str] = []

    async def take(name: str, num_bytes: int) -> None:
        with held.holding() as holding:
            await holding.promise(num_bytes, within_s=60)
            order.append(name)
            await asyncio.sleep(0)

    with held.holding() as first:
        await first.promise(100, within_s=60)
        tasks = []
        for name, num_bytes in (("large", 99), ("small", 1), ("third", 60)):
            tasks.append(asyncio.create_task(take(name, num_bytes)))
            await asyncio.sleep(0)
        assert order == []
        first.arrive(1)
    await asyncio.gather(*tasks)
    assert order == ["large", "small", "third"]


async def test_promises_leave_room_for_what_comes_without_them() -> None:
    held = Held(100, retry_after_s=1.0)
    with held.holding() as first, held.holding() as second, held.holding() as other:
        await first.promise(40, within_s=60)
        assert not second.promise_now(20)  # half of it is not for promises
        other.add(60)
        with pytest.raises(OverloadedError):
            other.add(1)
        first.arrive(5)
        other.add(35)


async def test_who_waits_for_what_is_held_is_told_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.access.held.ROOM_WAIT_S", 0.05)
    held = Held(100, retry_after_s=2.0)
    with held.holding() as holder, held.holding() as large, held.holding() as small:
        holder.add(60)
        waiting = asyncio.create_task(large.promise(50, within_s=60))
        await asyncio.sleep(0)
        await small.promise(10, within_s=60)
        with pytest.raises(OverloadedError) as refused:
            await waiting
        assert refused.value.retry_after_s == 2.0
    with held.holding() as holding:
        holding.add(100)


async def test_a_slow_promise_gives_way_to_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.access.held.ROOM_WAIT_S", 0.05)
    monkeypatch.setattr("service.access.held.GRACE_S", 0.0)
    held = Held(100, retry_after_s=1.0)
    with held.holding() as slow, held.holding() as next_one:
        await slow.promise(100, within_s=60)
        slow.on_wanted = slow.release
        await next_one.promise(100, within_s=60)


async def test_a_promise_whose_caller_left_is_given_back() -> None:
    held = Held(100, retry_after_s=1.0)
    with held.holding() as first:
        await first.promise(100, within_s=60)
        with held.holding() as second:
            waiting = asyncio.create_task(second.promise(100, within_s=60))
            await asyncio.sleep(0)
            first.release()  # which grants it
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
    with held.holding() as third:
        third.add(100)


class Kept:
    """Spares of so many bytes, and which of them have yielded."""

    def __init__(self, held: Held, *sizes: int) -> None:
        self.yielded: list[int] = []
        self.spares = [Spare(held, lambda number=number: self.yielded.append(number)) for number in range(len(sizes))]  # type: ignore[misc]
        self.are_kept = [spare.keep(size) for spare, size in zip(self.spares, sizes, strict=True)]


async def test_what_can_be_done_without_yields_the_oldest_first() -> None:
    held = Held(100, retry_after_s=1.0)
    kept = Kept(held, 30, 30, 30)
    assert kept.spares[0].keep(30)  # anew, so that it is the youngest
    with held.holding() as first, held.holding() as second, held.holding() as third:
        first.add(10)
        assert kept.yielded == []
        await second.promise(25, within_s=60)
        assert kept.yielded == [1]
        second.arrive(40)
        assert kept.yielded == [1, 2]
        third.add(50)
        assert kept.yielded == [1, 2, 0]
        with pytest.raises(OverloadedError):
            third.add(1)
    with held.holding() as holding:
        holding.add(100)


async def test_who_waits_gets_the_room_of_what_was_kept_meanwhile() -> None:
    held = Held(100, retry_after_s=1.0)
    with held.holding() as first, held.holding() as second, held.holding() as third:
        first.add(20)
        await second.promise(40, within_s=60)
        waiting = asyncio.create_task(third.promise(40, within_s=None))  # beyond the half that is for promises
        await asyncio.sleep(0)
        kept = Kept(held, 40)
        second.release()
        await asyncio.wait_for(waiting, 10)
        assert kept.yielded == []
        third.arrive(80)
        assert kept.yielded == [0]


def test_nothing_yields_in_vain() -> None:
    held = Held(100, retry_after_s=1.0)
    kept = Kept(held, 60)
    with held.holding() as first, held.holding() as second:
        first.add(30)
        with pytest.raises(OverloadedError):
            second.add(80)
        assert kept.yielded == []


def test_what_is_kept_takes_room_that_is_left_over_alone() -> None:
    held = Held(100, retry_after_s=1.0)
    kept = Kept(held, 60, 50, 40)
    assert kept.are_kept == [True, False, True]
    assert not kept.spares[2].keep(41)  # and what was before is let go of
    kept.spares[0].release()
    kept.spares[0].release()
    with held.holding() as holding:
        holding.add(100)
    assert kept.yielded == []
