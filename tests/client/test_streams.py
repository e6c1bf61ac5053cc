"""Streams on real connections: order, both modes, sources that fail, and connections that break."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

import recofuse_client as rc
from tests.client.conftest import Served, served
from tests.client.frames import IR, VIS, frames
from tests.client.reach import QUICK, ROOT, CommandServer, reaching
from tests.fakes import FakeEngine
from tests.service.conftest import Serving

GRPC = ("grpc", "grpc-async")


@pytest.mark.parametrize("kind", GRPC)
async def test_all_frames_come_back_in_order(running: Served, kind: str) -> None:
    client = running.reach.client(kind)
    results = await client.stream(frames(40), window=5, output="all", seed=3)
    assert [result.sequence for result in results] == list(range(40))
    for result in results:
        fusion = result.unwrap()
        assert fusion.fused[0, 0, 0] == result.sequence
        assert result.timestamp_ns == 1000 + result.sequence
        np.testing.assert_array_equal(fusion.ir, IR)
        assert 0 <= result.age_s <= result.latency_s + 1
        assert not result.num_missed
    stats = results[-1].stats
    assert (stats.offered, stats.fused) == (40, 40)
    assert (stats.failed, stats.dropped, stats.lost, stats.reconnects) == (0, 0, 0, 0)
    assert stats.age_p99_s >= stats.age_p50_s > 0
    assert {seed for batch in running.engine.batches for seed in batch} == {3}
    assert await client.stream([]) == []


@pytest.mark.parametrize("kind", GRPC)
async def test_the_window_holds_the_source_back(running: Served, kind: str) -> None:
    running.engine.gate.clear()
    taken = 0

    def source() -> Iterator[rc.Frame]:
        nonlocal taken
        for frame in frames(30):
            taken += 1
            yield frame

    reading = asyncio.ensure_future(running.reach.client(kind).stream(source(), window=4))
    await asyncio.to_thread(running.engine.started.wait, 10)
    await asyncio.sleep(0.3)
    assert taken <= 6  # four without an answer, one that waits, one in the source's hand
    running.engine.gate.set()
    assert len(await reading) == 30


@pytest.mark.parametrize("kind", GRPC)
async def test_latest_drops_what_is_stale_and_counts_it(running: Served, kind: str) -> None:
    running.engine.gate.clear()
    is_over = threading.Event()

    def source() -> Iterator[rc.Frame]:
        yield from itertools.islice(frames(200), 200)
        is_over.set()

    reading = asyncio.ensure_future(running.reach.client(kind).stream(source(), mode="latest"))
    assert await asyncio.to_thread(is_over.wait, 20)  # the source was never held back
    running.engine.gate.set()
    results = await reading
    stats = results[-1].stats
    assert results[-1].sequence == 199  # the newest is never dropped
    assert len(results) < 100
    assert stats.offered == 200
    assert stats.fused == len(results)
    assert stats.fused + stats.dropped == 200
    assert sum(result.num_missed for result in results) == stats.dropped


@pytest.mark.parametrize("kind", GRPC)
async def test_a_frame_that_cannot_be_fused_does_not_end_the_stream(running: Served, kind: str) -> None:
    pairs: list[tuple[Any, Any]] = [(VIS, IR), (b"no picture", IR), (VIS, IR)]
    first, second, third = await running.reach.client(kind).stream(pairs)
    assert isinstance(second.error, rc.UnsupportedMediaError)
    assert second.fusion is None
    assert first.unwrap().job_id != third.unwrap().job_id
    assert (third.stats.fused, third.stats.failed) == (2, 1)


@pytest.mark.parametrize("kind", GRPC)
async def test_what_the_source_raises_comes_out_behind_its_frames(running: Served, kind: str) -> None:
    def broken() -> Iterator[rc.Frame]:
        yield from frames(3)
        raise OSError("the cable is out")

    client = running.reach.client(kind)
    seen: list[rc.FrameResult] = []
    with pytest.raises(OSError, match="cable"):
        await client.stream(broken(), seen=seen)
    assert len(seen) == 3
    with pytest.raises(TypeError, match="float64"):
        await client.stream([(VIS / 255, IR)])
    with pytest.raises(ValueError, match="came after"):
        await client.stream([rc.Frame(VIS, IR, sequence=4), rc.Frame(VIS, IR, sequence=4)])


class Unplugged:
    """A source, of either kind, that cannot even be begun."""

    def __iter__(self) -> Iterator[rc.Frame]:
        raise OSError("no camera")


class AsyncUnplugged:
    def __aiter__(self) -> AsyncIterator[rc.Frame]:
        raise OSError("no camera")


def test_a_source_that_cannot_begin_ends_the_stream() -> None:
    raised: list[BaseException] = []

    def read() -> None:
        with rc.Client("grpc://127.0.0.1:9") as client:  # nobody is asked
            try:
                list(client.stream(Unplugged()))
            except OSError as error:
                raised.append(error)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(60)
    assert [str(error) for error in raised] == ["no camera"]


@pytest.mark.parametrize("source", [Unplugged, AsyncUnplugged])
async def test_a_source_that_cannot_begin_ends_an_async_stream(source: Any) -> None:
    async with rc.AsyncClient("grpc://127.0.0.1:9") as client, asyncio.timeout(60):
        with pytest.raises(OSError, match="no camera"):
            await anext(client.stream(source()))


async def test_a_stream_that_is_left_early_closes_its_source(running: Served) -> None:
    closed = threading.Event()

    def camera() -> Iterator[rc.Frame]:
        try:
            while True:
                yield rc.Frame(VIS, IR)
        finally:
            closed.set()

    def look() -> int:
        with running.reach.client("grpc").client.stream(camera()) as results:
            return int(next(results).sequence)

    assert await asyncio.to_thread(look) == 0
    assert await asyncio.to_thread(closed.wait, 10)

    closed.clear()
    kept = camera()  # so that nothing else closes it
    async with running.reach.client("grpc-async").client.stream(kept) as results:
        assert (await anext(results)).sequence == 0
    assert await asyncio.to_thread(closed.wait, 10)

    is_closed = asyncio.Event()

    async def async_camera() -> AsyncIterator[rc.Frame]:
        try:
            while True:
                yield rc.Frame(VIS, IR)
                await asyncio.sleep(0)
        finally:
            is_closed.set()

    async with running.reach.client("grpc-async").client.stream(async_camera()) as results:
        async for result in results:
            assert result.sequence == 0
            break
    await asyncio.wait_for(is_closed.wait(), 10)


async def test_a_stream_that_is_closed_elsewhere_ends_for_who_reads_it(running: Served) -> None:
    """It ends as the blocking one does; a task that nobody cancelled must not look like one."""
    came = asyncio.Event()

    async def camera() -> AsyncIterator[rc.Frame]:
        yield rc.Frame(VIS, IR)
        await asyncio.Event().wait()

    stream = running.reach.client("grpc-async").client.stream(camera())

    async def read() -> list[int]:
        sequences = []
        async for result in stream:
            sequences.append(result.sequence)
            came.set()
        return sequences

    reading = asyncio.create_task(read())
    await asyncio.wait_for(came.wait(), 20)
    await stream.close()
    assert await asyncio.wait_for(reading, 20) == [0]


def test_a_source_that_never_gives_way_keeps_no_program_from_ending() -> None:
    program = """
import asyncio, threading, recofuse_client as rc

def camera():
    threading.Event().wait()
    yield

async def main():
    async with rc.AsyncClient("grpc://127.0.0.1:9") as client, client.stream(camera()) as results:
        await asyncio.wait([asyncio.ensure_future(anext(results))], timeout=0.2)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["http", "http-async"])
async def test_streams_need_grpc(running: Served, kind: str) -> None:
    with pytest.raises(rc.RouteNotFoundError, match="grpc://"):
        running.reach.client(kind).client.stream([])


@pytest.mark.parametrize("kind", GRPC)
async def test_a_source_that_rests_longer_than_the_server_waits(serving: Serving, kind: str) -> None:
    async with served(serving, grpc={"port": 0, "stream_idle_s": 0.2}) as one:

        def source() -> Iterator[rc.Frame]:
            yield from frames(2)
            time.sleep(1.5)
            yield from (rc.Frame(VIS, IR) for _ in range(2))

        results = await one.reach.client(kind, retry=QUICK).stream(source())
        assert [result.sequence for result in results] == [0, 1, 2, 3]
        assert results[-1].stats.reconnects >= 1
        assert results[-1].stats.lost == 0


@pytest.mark.parametrize("kind", GRPC)
async def test_a_rest_of_the_source_tries_no_patience(kind: str) -> None:
    began_s = 0.0

    def source() -> Iterator[rc.Frame]:
        nonlocal began_s
        time.sleep(2.2)  # longer than the patience
        began_s = time.monotonic()
        yield rc.Frame(VIS, IR)

    async with reaching("127.0.0.1:9", "127.0.0.1:9") as reach:
        results = reach.client(kind, retry=QUICK).client.stream(source(), reconnect_s=2.0)
        results._ledger.break_off(rc.ConnectionLostError("gone"))  # just before the rest
        with pytest.raises(rc.ConnectionFailedError):
            await (anext(results) if kind == "grpc-async" else asyncio.to_thread(next, results))
    assert time.monotonic() - began_s >= 0.5  # it was tried again and again


@pytest.mark.parametrize("kind", GRPC)
async def test_rates_slow_a_stream_down_without_loss(serving: Serving, kind: str, tmp_path: Any) -> None:
    from service.access.keys import FileKeys, new_key

    record, key = new_key("camera", rate_per_s=4.0, burst=2)
    await FileKeys(tmp_path / "keys.json").put(record)
    async with served(serving, auth={"keys": f"file:{tmp_path / 'keys.json'}"}) as one:
        results = await one.reach.client(kind, api_key=key, retry=QUICK).stream(frames(5))
        assert [result.unwrap().fused[0, 0, 0] for result in results] == [0, 1, 2, 3, 4]
        with pytest.raises(rc.UnauthenticatedError):
            await one.reach.client(kind, retry=QUICK).stream(frames(2))


async def test_streams_outlive_their_servers(command_server: CommandServer) -> None:
    """Under four streams the server is killed, then stopped in order; each time another one follows at its address."""
    command_server.start("fixed", ENGINE__FIXED_BATCH_S="0.02")
    await asyncio.to_thread(command_server.wait_until_ready)
    num_frames, enough = 0, 60

    def paced(goes_on: threading.Event) -> Iterator[rc.Frame]:
        nonlocal num_frames
        for frame in frames(10_000):
            num_frames += 1
            yield frame
            if goes_on.is_set():
                return
            time.sleep(0.02)

    async with reaching(command_server.http, command_server.grpc) as reach:
        over = threading.Event()
        clients = [(reach.client(kind, retry=QUICK), mode) for kind in GRPC for mode in ("all", "latest")]
        seen: list[list[rc.FrameResult]] = [[] for _ in clients]
        reading = [
            asyncio.ensure_future(client.stream(paced(over), mode=mode, seen=results))
            for (client, mode), results in zip(clients, seen, strict=True)
        ]

        async def all_reconnected(times: int) -> None:
            async with asyncio.timeout(120):
                while not all(results and results[-1].stats.reconnects >= times for results in seen):
                    assert not any(stream.done() for stream in reading)
                    await asyncio.sleep(0.02)

        for num_ended, end in enumerate((command_server.kill, command_server.stop)):
            await all_reconnected(num_ended)
            until = num_frames + enough
            while num_frames < until:  # noqa: ASYNC110 - other threads' frames
                await asyncio.sleep(0.02)
            await asyncio.to_thread(end)
            await asyncio.to_thread(command_server.start, "fixed", ENGINE__FIXED_BATCH_S="0.02")
            await asyncio.to_thread(command_server.wait_until_ready)
        await all_reconnected(2)
        while await asyncio.to_thread(command_server.metric, "recofuse_jobs_accepted_total") < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        over.set()
        streams = await asyncio.gather(*reading)
    for (_, mode), results in zip(clients, streams, strict=True):
        sequences = [result.sequence for result in results]
        stats = results[-1].stats
        assert sequences == sorted(set(sequences))
        fused = [result for result in results if result.fusion is not None]
        assert all(result.unwrap().fused[0, 0, 0] == result.sequence % 256 for result in fused)
        # A server that stops says so for what it has not begun; such a frame of mode all goes out again.
        assert all(isinstance(result.error, rc.UnavailableError) for result in results if result.fusion is None)
        assert mode == "latest" or len(fused) == len(results)
        assert stats.reconnects >= 2
        if mode == "all":
            assert sequences == list(range(stats.offered))
        else:
            assert stats.fused + stats.failed + stats.dropped + stats.lost == stats.offered
            assert sum(result.num_missed for result in results) + len(results) == sequences[-1] + 1


def test_a_stream_ends_when_nobody_comes_back() -> None:
    with (
        rc.Client("grpc://127.0.0.1:9", retry=QUICK) as client,  # the discard service, which nobody runs
        pytest.raises(rc.ConnectionFailedError),
    ):
        list(client.stream(frames(3), reconnect_s=0.5))


async def test_many_streams_of_one_client(serving: Serving) -> None:
    async with served(serving, FakeEngine()) as one:
        client = one.reach.client("grpc-async")
        for results in await asyncio.gather(*(client.stream(frames(10)) for _ in range(8))):
            assert [result.sequence for result in results] == list(range(10))
