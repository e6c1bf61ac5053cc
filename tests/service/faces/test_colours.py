"""Colours from end to end: by every way in one overlay, made of both restored pictures, in the values of the source."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import httpx
import numpy as np
import pytest

import recofuse_client as rc
from recofuse_client.values import Colour
from recofuse_images.colours import greyed, overlaid
from recofuse_protos.inference.v2 import inference_pb2 as oip
from recofuse_protos.inference.v2 import inference_pb2_grpc
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from recofuse_rigs.rig import Rig, to_json
from recofuse_rigs.warp import warp_of
from service.terms.errors import ErrorCode
from service.terms.jobs import Part
from service.work.engine import PassOptions, Pixels
from tests.fakes import FakeEngine, file_of, picture
from tests.service.conftest import Server, Serving
from tests.service.faces.grpc.face import detail_of, one_by_one, pixels_of
from tests.service.faces.http.asking import problem
from tests.service.faces.oip.messages import grpc_message, outputs_of, post, refusal, tensor

VIS = picture(64, 48, seed=5)
COUNTS = (7000 + 10 * picture(64, 48, channels=1, seed=6).astype(np.uint16)).astype(np.uint16)
IR_RANGE = 7000.0, 9550.0
COLOUR_RANGE = 7800.0, 8800.0
FILES = {"vis": ("vis", file_of(VIS)), "ir": ("ir", file_of(COUNTS))}
IR = ((COUNTS - 7000) // 10).astype(np.uint8)  # as the worker reads it

Range = tuple[float, float]


def text_of(given: Range | None) -> str:
    return "" if given is None else f"{given[0]!r},{given[1]!r}"


class WideningEngine(FakeEngine):
    """Gives back infrared of twice the contrast, as the model does of dull frames."""

    def fuse(
        self, vis: Pixels, ir: Pixels, options: PassOptions, seeds: list[int], overlap: Pixels | None = None
    ) -> dict[Part, Pixels]:
        widened = np.clip(2 * ir.astype(int) - 110, 0, 255).astype(np.uint8)
        return super().fuse(vis, widened, options, seeds, overlap)


@dataclass
class Ways:
    """A server and all the ways in. Each takes a colour and its range, and gives the fused picture."""

    server: Server
    channel: grpc.aio.Channel

    def message(self, colour: str, given: Range | None) -> pb.FuseRequest:
        options = pb.FuseOptions(
            format=pb.IMAGE_FORMAT_RAW,
            colour=pb.Colour.Value(f"COLOUR_{colour.upper()}"),
            colour_range=None if given is None else pb.ColourRange(low=given[0], high=given[1]),
            ir_range=pb.IrRange(low=IR_RANGE[0], high=IR_RANGE[1]),
        )
        return pb.FuseRequest(
            vis=pb.Image(encoded=FILES["vis"][1]), ir=pb.Image(encoded=FILES["ir"][1]), options=options
        )

    @property
    def stub(self) -> fusion_pb2_grpc.FusionServiceAsyncStub:
        return fusion_pb2_grpc.FusionServiceStub(self.channel)

    async def form(self, colour: str, given: Range | None, **more: str) -> httpx.Response:
        data = {"format": "npy", "ir_range": text_of(IR_RANGE), "colour": colour, "colour_range": text_of(given)}
        return await self.server.client.post("/v1/fuse", files=FILES, data=data | more)

    async def http(self, colour: str, given: Range | None, **more: str) -> Pixels:
        return np.asarray(np.load(io.BytesIO((await self.form(colour, given, **more)).raise_for_status().content)))

    async def unary(self, colour: str, given: Range | None) -> Pixels:
        return pixels_of((await self.stub.Fuse(self.message(colour, given))).fusion.pictures[0].image)

    async def streamed(self, colour: str, given: Range | None) -> pb.FuseStreamResponse:
        asked = self.message(colour, given)
        messages = [
            pb.FuseStreamRequest(options=pb.StreamOptions(fuse=asked.options)),
            pb.FuseStreamRequest(frame=pb.Frame(sequence=1, vis=asked.vis, ir=asked.ir)),
        ]
        (answer,) = [answer async for answer in self.stub.FuseStream(one_by_one(messages))]
        return answer

    async def stream(self, colour: str, given: Range | None) -> Pixels:
        return pixels_of((await self.streamed(colour, given)).fusion.pictures[0].image)

    async def asked_with_tensors(self, colour: str, given: Range | None) -> httpx.Response:
        parameters = {"binary_data_output": True, "colour": colour, "ir_range": text_of(IR_RANGE)}
        parameters |= {} if given is None else {"colour_range": text_of(given)}
        inputs = (tensor("vis", VIS), tensor("ir", COUNTS[..., None]))
        return await post(self.server.client, *inputs, outputs=[{"name": "fused"}], parameters=parameters)

    async def tensors(self, colour: str, given: Range | None) -> Pixels:
        return np.asarray(outputs_of(await self.asked_with_tensors(colour, given))["fused"])

    def infer_message(self, colour: str, given: Range | None) -> oip.ModelInferRequest:
        sent = grpc_message(tensor("vis", VIS), tensor("ir", COUNTS[..., None]))
        sent.outputs.add(name="fused")
        sent.parameters["colour"].string_param = colour
        sent.parameters["ir_range"].string_param = text_of(IR_RANGE)
        if given is not None:
            sent.parameters["colour_range"].string_param = text_of(given)
        return sent

    @property
    def inference(self) -> inference_pb2_grpc.GRPCInferenceServiceAsyncStub:
        return inference_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    async def tensors_over_grpc(self, colour: str, given: Range | None) -> Pixels:
        answer = await self.inference.ModelInfer(self.infer_message(colour, given))
        return np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(VIS.shape)

    async def clients(self, colour: Colour, given: Range | None) -> list[Pixels]:
        fused = []
        for url in (f"grpc://{self.server.grpc_address}", str(self.server.client.base_url)):
            async with rc.AsyncClient(url) as client:
                answer = await client.fuse(VIS, COUNTS, colour=colour, colour_range=given, ir_range=IR_RANGE)
                fused.append(answer.fused)
        return fused

    async def client_stream(self, colour: Colour, given: Range | None) -> Pixels:
        async with (
            rc.AsyncClient(f"grpc://{self.server.grpc_address}") as client,
            client.stream([(VIS, COUNTS)], colour=colour, colour_range=given, ir_range=IR_RANGE) as results,
        ):
            (result,) = [result async for result in results]
        return result.unwrap().fused


@pytest.fixture
async def ways(serving: Serving) -> AsyncIterator[Ways]:
    async with serving(grpc={"port": 0}) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        yield Ways(server, channel)


async def test_every_way_in_gives_the_same_colours(ways: Ways) -> None:
    cases: list[tuple[Colour, Range | None, Pixels]] = [
        ("natural", None, VIS),  # this engine's fused picture is vis
        ("grey", None, greyed(VIS)),
        ("white_hot", COLOUR_RANGE, overlaid(VIS, IR, "white_hot", IR_RANGE, COLOUR_RANGE)),
        ("iron", None, overlaid(VIS, IR, "iron", IR_RANGE)),
        ("rainbow", COLOUR_RANGE, overlaid(VIS, IR, "rainbow", IR_RANGE, COLOUR_RANGE)),
    ]
    for colour, given, expected in cases:
        for way in (ways.http, ways.unary, ways.stream, ways.tensors, ways.tensors_over_grpc, ways.client_stream):
            np.testing.assert_allclose(await way(colour, given), expected, atol=2, err_msg=f"{way.__name__}, {colour}")
        for fused in await ways.clients(colour, given):
            np.testing.assert_allclose(fused, expected, atol=2)


async def test_a_range_means_the_values_also_where_the_model_widens_the_contrast(serving: Serving) -> None:
    """A dull scale: the model's levels are not those that it was shown."""
    async with serving(WideningEngine()) as server:
        data = {"format": "npy", "ir_range": "5000,11800", "colour": "iron", "colour_range": text_of(COLOUR_RANGE)}
        answer = await server.client.post("/v1/fuse", files=FILES, data=data)
        shown = np.load(io.BytesIO(answer.raise_for_status().content)).astype(int)
    cold, hot = COUNTS < 7800 - 40, COUNTS > 8800 + 40  # a level is 27 counts
    np.testing.assert_array_equal(shown[cold], greyed(VIS)[cold])
    assert (shown[hot] == 255).all()
    assert hot.any()


async def test_an_overlay_asks_the_model_for_both_restored_pictures_in_place_of_the_fused_one(ways: Ways) -> None:
    engine = ways.server.engine
    restored = (Part.VIS, Part.IR)
    cases: dict[str, tuple[Part, ...]] = {"iron": restored, "grey": (Part.FUSED,), "natural": (Part.FUSED,)}
    for colour, parts in cases.items():
        await ways.http(colour, None)
        assert engine.options[-1].parts == parts
    np.testing.assert_array_equal(await ways.http("iron", None, output="ir"), IR)
    assert [*engine.options[-1].parts] == [Part.IR]
    (await ways.form("iron", None, output="all")).raise_for_status()
    assert engine.options[-1].parts == restored


async def test_where_a_rig_has_no_infrared_there_is_no_colour(ways: Ways) -> None:
    rig = Rig((64, 48), (64, 48), (0.6, 0.0, 10.0, 0.0, 0.6, 8.0, 0.0, 0.0, 1.0))
    shown = await ways.http("iron", (0.0, 1.0), rig=to_json(rig))  # all that is measured is beyond
    weights = warp_of(rig).weights
    assert (shown[weights == 1] == 255).all()
    np.testing.assert_array_equal(shown[weights == 0], greyed(VIS)[weights == 0])
    plain = await ways.http("grey", None, rig=to_json(rig))
    np.testing.assert_array_equal(plain, greyed(VIS))


BAD: dict[str, tuple[str, Range | None, str]] = {
    "reversed": ("iron", (9.0, 1.0), "the lower one first"),
    "empty": ("iron", (1.0, 1.0), "the lower one first"),
    "nan": ("iron", (float("nan"), 1.0), "finite number"),
    "infinite": ("rainbow", (0.0, float("inf")), "finite number"),
    "without an overlay": ("grey", (0.0, 1.0), "goes with colour=white_hot, iron, rainbow"),
}


async def test_what_cannot_be_drawn_is_refused_by_every_face(ways: Ways) -> None:
    for colour, given, words in BAD.values():
        told = [
            problem(await ways.form(colour, given), ErrorCode.INVALID_INPUT)["detail"],
            (await detail_of(ways.stub.Fuse(ways.message(colour, given)), ErrorCode.INVALID_INPUT)).message,
            (
                await detail_of(ways.inference.ModelInfer(ways.infer_message(colour, given)), ErrorCode.INVALID_INPUT)
            ).message,
            refusal(await ways.asked_with_tensors(colour, given), ErrorCode.INVALID_INPUT),
        ]
        for message in told:
            assert "colour_range" in message
            assert words in message
    assert not ways.server.engine.batches


async def test_an_unknown_colour_is_refused_by_every_face(ways: Ways) -> None:
    assert "'natural'" in problem(await ways.form("purple", None), ErrorCode.INVALID_INPUT)["detail"]
    assert "colour" in refusal(await ways.asked_with_tensors("purple", None), ErrorCode.INVALID_INPUT)
    asked = ways.message("iron", None)
    asked.options.colour = 99  # type: ignore[assignment]
    assert "COLOUR_IRON" in (await detail_of(ways.stub.Fuse(asked), ErrorCode.INVALID_INPUT)).message
    async with rc.AsyncClient(str(ways.server.client.base_url)) as client:
        with pytest.raises(ValueError, match="accepted are natural"):
            await client.fuse(VIS, COUNTS, colour="purple")  # type: ignore[arg-type]
