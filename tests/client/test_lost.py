"""Calls under which the server dies, as a real process that is really killed, and is back at the same address later."""

from __future__ import annotations

import asyncio

import pytest

import recofuse_client as rc
from tests.client.reach import KINDS, QUICK, CommandServer, reaching
from tests.fakes import picture

VIS, IR = picture(), picture(channels=1, seed=1)


async def test_only_what_is_safe_is_repeated_after_a_crash(command_server: CommandServer) -> None:
    command_server.start("fixed", ENGINE__FIXED_BATCH_S="100")  # whatever it takes will never be done
    await asyncio.to_thread(command_server.wait_until_ready)
    async with reaching(command_server.http, command_server.grpc) as reach:
        clients = {kind: reach.client(kind, retry=QUICK, timeout_s=100) for kind in KINDS}
        plain = {kind: asyncio.ensure_future(one.fuse(VIS, IR)) for kind, one in clients.items()}
        keyed = {
            kind: asyncio.ensure_future(one.fuse(VIS, IR, idempotency_key=f"key-{kind}"))
            for kind, one in clients.items()
        }
        while await asyncio.to_thread(command_server.metric, "recofuse_jobs_accepted_total") < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await asyncio.to_thread(command_server.kill)
        for call in plain.values():
            with pytest.raises(rc.ConnectionLostError):
                await call
        late = [asyncio.ensure_future(one.submit(VIS, IR)) for one in clients.values()]  # nobody is there yet
        command_server.start("null")
        for call in keyed.values():
            assert (await call).model_name == "null"
        for job, one in zip(await asyncio.gather(*late), clients.values(), strict=True):
            assert (await one.wait(job.id)).model_name == "null"
        # Four keyed and four late ones: nothing of the calls that were given up came again.
        assert await asyncio.to_thread(command_server.metric, "recofuse_jobs_accepted_total") == 8


async def test_a_server_that_stops_in_order_fails_nobody(command_server: CommandServer) -> None:
    command_server.start("fixed", ENGINE__FIXED_BATCH_S="0.05")
    await asyncio.to_thread(command_server.wait_until_ready)
    num_done = 0

    async def ask(kind: str) -> None:
        nonlocal num_done
        for number in range(60):
            assert (await clients[kind].fuse(VIS, IR, idempotency_key=f"{kind}-{number}")).fused.size
            num_done += 1

    async with reaching(command_server.http, command_server.grpc) as reach:
        clients = {kind: reach.client(kind, retry=QUICK, timeout_s=100) for kind in KINDS}
        asking = [asyncio.ensure_future(ask(kind)) for kind in KINDS]
        while num_done < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await asyncio.to_thread(command_server.stop)
        await asyncio.to_thread(command_server.start, "null")
        await asyncio.gather(*asking)
    assert num_done == 60 * len(KINDS)
