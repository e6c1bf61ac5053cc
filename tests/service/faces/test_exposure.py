"""Exposure from end to end: real weights, a dark pair, and every way in; and weights that cannot light a picture."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import grpc
import httpx
import numpy as np
import pytest

import recofuse_client as rc
from recofuse_core import build_model, save_checkpoint
from recofuse_core import picture as core
from recofuse_core.scenes.scene import make_scene
from recofuse_protos.inference.v2 import inference_pb2 as oip
from recofuse_protos.inference.v2 import inference_pb2_grpc
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.terms.errors import ErrorCode
from service.terms.jobs import DEFAULT_EXPOSURE, Exposure, FusionOptions, Output, Part
from service.work.engine import PassOptions, Pixels
from tests.fakes import file_of
from tests.service.command.calls import TINY
from tests.service.conftest import Server, Serving
from tests.service.faces.grpc.face import detail_of, one_by_one, pixels_of
from tests.service.faces.http.asking import problem
from tests.service.faces.oip.messages import grpc_message, outputs_of, post, refusal, tensor
from tests.service.faces.real import RealEngine


def dark_pair() -> tuple[Pixels, Pixels]:
    """A street that lies in the dark but for its brightest spots: (64, 96, 3) and (64, 96)."""
    scene = make_scene(2, 64, 96)
    vis = (scene.vis.permute(1, 2, 0).numpy() ** 3 * 255).astype(np.uint8)
    return np.ascontiguousarray(vis), np.ascontiguousarray((scene.ir[0].numpy() * 255).astype(np.uint8))


VIS, IR = dark_pair()
FILES = {"vis": ("vis", file_of(VIS)), "ir": ("ir", file_of(IR))}


@dataclass
class Ways:
    """A server and all the ways in. Each takes an exposure, None for naming none, and gives the restored vis."""

    server: Server
    channel: grpc.aio.Channel

    def message(self, exposure: str | None) -> pb.FuseRequest:
        number = pb.Exposure.Value(f"EXPOSURE_{(exposure or 'unspecified').upper()}")
        options = pb.FuseOptions(output=pb.OUTPUT_VIS, format=pb.IMAGE_FORMAT_RAW, exposure=number)
        return pb.FuseRequest(
            vis=pb.Image(encoded=FILES["vis"][1]), ir=pb.Image(encoded=FILES["ir"][1]), options=options
        )

    @property
    def stub(self) -> fusion_pb2_grpc.FusionServiceAsyncStub:
        return fusion_pb2_grpc.FusionServiceStub(self.channel)

    async def form(self, exposure: str | None) -> httpx.Response:
        data = {"output": "vis", "format": "npy", "exposure": exposure or ""}
        return await self.server.client.post("/v1/fuse", files=FILES, data=data)

    async def http(self, exposure: str | None) -> Pixels:
        return np.asarray(np.load(io.BytesIO((await self.form(exposure)).raise_for_status().content)))

    async def unary(self, exposure: str | None) -> Pixels:
        answer = await self.stub.Fuse(self.message(exposure))
        return pixels_of(answer.fusion.pictures[0].image)

    async def streamed(self, exposure: str | None) -> pb.FuseStreamResponse:
        asked = self.message(exposure)
        messages = [
            pb.FuseStreamRequest(options=pb.StreamOptions(fuse=asked.options)),
            pb.FuseStreamRequest(frame=pb.Frame(sequence=1, vis=asked.vis, ir=asked.ir)),
        ]
        (answer,) = [answer async for answer in self.stub.FuseStream(one_by_one(messages))]
        return answer

    async def stream(self, exposure: str | None) -> Pixels:
        return pixels_of((await self.streamed(exposure)).fusion.pictures[0].image)

    async def tensors(self, exposure: str | None) -> Pixels:
        parameters = {"binary_data_output": True, "exposure": exposure}
        inputs = (tensor("vis", VIS), tensor("ir", IR[..., None]))
        answer = await post(self.server.client, *inputs, outputs=[{"name": "vis_restored"}], parameters=parameters)
        return np.asarray(outputs_of(answer)["vis_restored"])

    def infer_message(self, exposure: str | None) -> oip.ModelInferRequest:
        sent = grpc_message(tensor("vis", VIS), tensor("ir", IR[..., None]))
        sent.outputs.add(name="vis_restored")
        if exposure is not None:
            sent.parameters["exposure"].string_param = exposure
        return sent

    async def tensors_over_grpc(self, exposure: str | None) -> Pixels:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        answer = await stub.ModelInfer(self.infer_message(exposure))
        return np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(VIS.shape)

    async def client(self, exposure: Exposure | None) -> Pixels:
        async with rc.AsyncClient(f"grpc://{self.server.grpc_address}") as client:
            return (await client.fuse(VIS, IR, output="vis", exposure=exposure)).vis

    async def client_stream(self, exposure: Exposure | None) -> Pixels:
        async with (
            rc.AsyncClient(f"grpc://{self.server.grpc_address}") as client,
            client.stream([(VIS, IR)], output="vis", exposure=exposure) as results,
        ):
            (result,) = [result async for result in results]
        return result.unwrap().vis


@pytest.fixture
async def lighting(serving: Serving) -> AsyncIterator[Ways]:
    real = RealEngine("compact")
    async with (
        serving(real, grpc={"port": 0}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        yield Ways(server, channel)


async def test_a_dark_scene_is_lit_or_stays_dark_by_every_way_in(lighting: Ways) -> None:
    engine = lighting.server.engine
    expected: dict[Exposure, Pixels] = {}
    for exposure in engine.info.exposures:
        options = PassOptions.of(FusionOptions(output=Output.VIS, exposure=exposure), engine.info)
        expected[exposure] = (await asyncio.to_thread(engine.fuse, VIS[None], IR[None], options, [0]))[Part.VIS][0]
    assert set(expected) == {"as_shot", "lit"}
    assert expected["as_shot"].mean() < 1.5 * VIS.mean()
    assert expected["lit"].mean() > 2.5 * VIS.mean()
    named: tuple[Exposure | None, ...] = ("as_shot", "lit", None)
    for asked in named:
        wanted = expected[asked or engine.info.default_exposure]
        for way in (
            lighting.http, lighting.unary, lighting.stream, lighting.tensors, lighting.tensors_over_grpc,
            lighting.client, lighting.client_stream,
        ):  # fmt: skip
            np.testing.assert_array_equal(await way(asked), wanted, err_msg=f"{way.__name__}, {asked}")


async def test_weights_without_an_estimator_say_so_by_every_way_in(serving: Serving, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, build_model(TINY).state_dict(), TINY, name="tiny", version="3")
    words = "exposure: the weights tiny 3 have no exposure estimator and cannot give lit; accepted is as_shot"
    real = RealEngine(str(path))
    async with (
        serving(real, grpc={"port": 0}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        ways = Ways(server, channel)
        assert problem(await ways.form("lit"), ErrorCode.INVALID_INPUT)["detail"] == words
        assert (await detail_of(ways.stub.Fuse(ways.message("lit")), ErrorCode.INVALID_INPUT)).message == words
        frame = await ways.streamed("lit")
        assert (frame.error.code, frame.error.message) == (ErrorCode.INVALID_INPUT, words)
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        await detail_of(stub.ModelInfer(ways.infer_message("lit")), ErrorCode.INVALID_INPUT)
        inputs = (tensor("vis", VIS), tensor("ir", IR[..., None]))
        refused = await post(server.client, *inputs, parameters={"exposure": "lit"})
        assert refusal(refused, ErrorCode.INVALID_INPUT) == words
        for exposure in ("as_shot", None):  # whatever the default is, these weights give what they can
            np.testing.assert_array_equal(await ways.http(exposure), await ways.unary("as_shot"))
        (model,) = (await server.client.get("/v1/models")).json()["models"]
        config = (await server.client.get("/v2/models/recofuse/config")).json()["parameters"]
    assert (model["default_exposure"], model["exposures"]) == ("as_shot", ["as_shot"])
    assert config["default_exposure"] == config["exposures"] == {"string_value": "as_shot"}


def test_the_default_exposure_is_one_that_there_is() -> None:
    assert DEFAULT_EXPOSURE in get_args(Exposure)
    assert get_args(Exposure) == get_args(core.Exposure)
