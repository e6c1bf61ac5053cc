"""Simulated cameras against real servers: what they count is what happened."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import streams
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from recofuse_rigs.rig import Rig
from recofuse_rigs.warp import warp_of
from service.command.cameras import CameraPlan, message_of, render_loop, simulate
from service.watch.metrics import FlowMode
from tests.fakes import picture
from tests.service.conftest import Serving

ROOT = Path(__file__).parents[3]
LOOPS = [
    [(message_of(picture(seed=seed), "raw"), message_of(picture(channels=1, seed=seed), "raw"))] for seed in (0, 1)
]


def plan(mode: FlowMode, **changes: object) -> CameraPlan:
    values: dict[str, object] = {"num_streams": 4, "fps": 20.0, "seconds": 1.5, "mode": mode, "size": (64, 48)}
    return CameraPlan(**{**values, "encoding": "raw", "answer": "raw", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", FlowMode)
async def test_every_frame_is_accounted_for(serving: Serving, mode: FlowMode) -> None:
    async with serving(grpc={"port": 0}) as server:
        report = await simulate([server.grpc_address], plan(mode), LOOPS)
    total = report.total
    assert total("num_sent") == total("num_fused") + total("num_dropped") > 0
    for name in ("num_failed", "num_missing", "num_unanswered", "num_out_of_order", "num_gaps_unreported"):
        assert total(name) == 0, name
    assert len(server.engine.batches) > 0
    assert 0 < report.latency_s(0.5) <= report.latency_s(0.99) < 60
    if mode is FlowMode.ALL:
        assert total("num_dropped") == 0
    assert json.loads(json.dumps(report.figures))["num_sent"] == total("num_sent")


async def test_cameras_may_ask_for_an_exposure(serving: Serving) -> None:
    async with serving(grpc={"port": 0}) as server:
        for exposure, expected in (("lit", "lit"), ("as_shot", "as_shot"), (None, server.engine.info.default_exposure)):
            server.engine.options.clear()
            asked = plan(FlowMode.ALL, num_streams=1, seconds=0.5, exposure=exposure)
            report = await simulate([server.grpc_address], asked, LOOPS)
            assert report.figures["exposure"] == exposure
            assert {options.exposure for options in server.engine.options} == {expected}


class Listening(fusion_pb2_grpc.FusionServiceServicer):
    """Answers frames without pictures, and keeps what streams were opened with."""

    def __init__(self) -> None:
        self.opened: list[pb.StreamOptions] = []

    async def FuseStream(  # noqa: N802 - the name in the contract
        self, requests: AsyncIterator[pb.FuseStreamRequest], context: object
    ) -> AsyncIterator[pb.FuseStreamResponse]:
        async for request in requests:
            if request.HasField("options"):
                self.opened.append(request.options)
            else:
                yield pb.FuseStreamResponse(sequence=request.frame.sequence, fusion=pb.Fusion())


@pytest.mark.parametrize(("steady", "calm"), [(True, False), (False, True), (True, True)])
async def test_cameras_may_ask_for_steady_levels_and_calm_pixels(steady: bool, calm: bool) -> None:
    server, listening = grpc.aio.server(), Listening()  # type: ignore[abstract]  # the other calls never come
    fusion_pb2_grpc.add_FusionServiceServicer_to_server(listening, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    asked = plan(FlowMode.ALL, num_streams=2, seconds=0.3, steady=steady, calm=calm)
    try:
        report = await simulate([address], asked, LOOPS)
    finally:
        await server.stop(None)
    assert [(opened.steady, opened.calm) for opened in listening.opened] == [(steady, calm)] * 2
    assert (report.figures["steady"], report.figures["calm"]) == (steady, calm)


async def test_stale_frames_are_dropped_and_counted(serving: Serving) -> None:
    async with serving(grpc={"port": 0}) as server:
        server.engine.gate.clear()
        running = asyncio.create_task(simulate([server.grpc_address], plan(FlowMode.LATEST, num_streams=1), LOOPS))
        await asyncio.to_thread(server.engine.started.wait, 10)
        await asyncio.sleep(1.0)
        server.engine.gate.set()
        report = await running
    assert report.total("num_dropped") > 0
    assert report.total("num_sent") == report.total("num_fused") + report.total("num_dropped")


async def test_cameras_resume_at_the_next_server(serving: Serving) -> None:
    async with serving(grpc={"port": 0}) as first, serving(grpc={"port": 0}) as second:
        targets = [first.grpc_address, second.grpc_address]
        first.engine.gate.clear()  # so that its cameras have sent more than they have seen, however late it is stopped
        cameras = plan(FlowMode.ALL, seconds=4.0, max_in_flight=1)
        running = asyncio.create_task(simulate(targets, cameras, LOOPS))
        await asyncio.to_thread(first.engine.started.wait, 60)
        first.stop.set()
        first.engine.gate.set()
        report = await running
    assert report.total("num_resumed") >= 2  # the cameras of the first server
    for name in ("num_failed", "num_unanswered", "num_out_of_order", "num_gaps_unreported", "num_missing"):
        assert report.total(name) == 0, (name, report.figures["errors"])
    assert report.total("num_sent") == report.total("num_fused") > 0
    assert report.figures["errors"]  # how their streams ended; gRPC itself may end them first, in words of its own


async def test_a_target_that_is_not_there_is_passed_over(serving: Serving) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{probe.getsockname()[1]}"  # bound, and nobody listens
        async with serving(grpc={"port": 0}) as server:
            report = await simulate([nowhere, server.grpc_address], plan(FlowMode.ALL, num_streams=1), LOOPS)
    assert report.total("num_resumed") >= 1
    assert report.total("num_sent") == report.total("num_fused") > 0


async def test_what_cannot_be_fused_is_counted_as_failed(serving: Serving) -> None:
    bad = [[(pb.Image(encoded=b"no picture"), LOOPS[0][0][1])]]
    async with serving(grpc={"port": 0}) as server:
        report = await simulate([server.grpc_address], plan(FlowMode.ALL, num_streams=1, seconds=0.5), bad)
    assert report.total("num_failed") == report.total("num_sent") > 0
    assert report.fused_per_s == 0
    assert report.figures["errors"][0].startswith("unsupported_media")


def test_scenes_move_and_are_encoded() -> None:
    loops = render_loop(plan(FlowMode.ALL, size=(96, 64), num_frames=3, num_scenes=2, encoding="jpeg"))
    assert [len(loop) for loop in loops] == [3, 3]
    frames = [cv2.imdecode(np.frombuffer(vis.encoded, np.uint8), cv2.IMREAD_COLOR) for loop in loops for vis, _ in loop]
    assert all(frame is not None and frame.shape == (64, 96, 3) for frame in frames)
    assert len({frame.tobytes() for frame in frames if frame is not None}) == 6
    raw = render_loop(plan(FlowMode.ALL, size=(96, 64), num_frames=1, num_scenes=1))[0][0]
    assert (len(raw[0].raw.data), len(raw[1].raw.data)) == (96 * 64 * 3, 96 * 64)


async def test_cameras_see_through_a_rig_that_puts_them_right(serving: Serving) -> None:
    size, rig = (96, 64), Rig((192, 128), (40, 32), (4.0, 0.2, 15.0, -0.1, 3.9, 6.0, 1e-4, 0.0, 1.0))
    asked = plan(FlowMode.ALL, num_streams=1, seconds=0.5, size=size, num_frames=1, num_scenes=1, rig=rig)
    ((vis, ir),) = render_loop(asked)[0]
    ((_, registered),) = render_loop(replace(asked, rig=None))[0]
    assert (ir.raw.width, ir.raw.height, vis.raw.width, vis.raw.height) == (40, 32, *size)
    seen = np.frombuffer(ir.raw.data, np.uint8).reshape(32, 40)
    whole = np.frombuffer(registered.raw.data, np.uint8).reshape(64, 96).astype(float)
    warp = warp_of(rig.resized(size, (40, 32)))
    covered = warp.coverage

    def off(laid: NDArray[Any]) -> float:
        return float(np.abs(cv2.blur(laid.astype(float), (5, 5)) - cv2.blur(whole, (5, 5)))[covered].mean())

    assert off(warp.apply(seen)) < 0.5 * off(cv2.resize(seen, size))
    async with serving(grpc={"port": 0}) as server:
        report = await simulate([server.grpc_address], asked, [[(vis, ir)]])
    assert report.total("num_fused") == report.total("num_sent") > 0
    assert report.figures["has_rig"]


def test_the_command_starts_a_server_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "service", "simulate-cameras", "--streams", "2", "--fps", "5", "--seconds", "1"]
    command += ["--size", "64x64", "--engine", "null", "--mode", "all", "--no-steady", "--calm", "--json", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "200"})
    assert run.returncode == 0, run.stderr
    figures = json.loads(out.read_text())
    assert figures["num_sent"] == figures["num_fused"] > 0
    assert (figures["steady"], figures["calm"]) == (False, True)
    assert run.stdout.splitlines()[-1].startswith("2 cameras of 64x64 at 5 fps, mode all: ")


def test_what_a_frame_costs_is_measured_on_a_server() -> None:
    row = streams._row("null", plan(FlowMode.ALL, num_streams=2, fps=50.0, seconds=1.0, size=(64, 64), num_scenes=1))
    assert (row.size, row.engine, row.num_streams) == ("64x64", "null", 2)
    assert row.frames_per_s > 1
    assert row.cpu_ms > 0
    assert row.mib_per_frame == pytest.approx(64 * 64 * 4 / 2**20, rel=0.01)
    assert streams.markdown([row]).count("\n") == 2


@pytest.mark.parametrize("options", [["--mode", "some"], ["--size", "9x9"], ["--encoding", "bmp"], ["--format", "gif"]])
def test_options_that_cannot_be_are_refused(options: list[str]) -> None:
    from typer.testing import CliRunner

    from service.command.cli import app

    result = CliRunner().invoke(app, ["simulate-cameras", *options])
    assert result.exit_code == 2
