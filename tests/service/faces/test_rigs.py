"""Rigs from end to end: two cameras that are not registered, by every way in; and what is no rig, refused by each."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import torch

import recofuse_client as rc
from recofuse_client.values import RigLike
from recofuse_core.evaluation.quality import fusion_scores
from recofuse_protos.inference.v2 import inference_pb2 as oip
from recofuse_protos.inference.v2 import inference_pb2_grpc
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from recofuse_rigs.rig import Rig, to_json
from recofuse_rigs.warp import Warps, warp_of
from service.terms import images
from service.terms.errors import ErrorCode
from service.terms.jobs import FusionOptions, Part
from service.terms.settings import LimitSettings
from service.work.engine import PassOptions, Pixels
from tests.fakes import FakeEngine, file_of
from tests.rigs.streets import COUNTS, Street, street
from tests.service.conftest import Server, Serving
from tests.service.faces.grpc.face import detail_of, one_by_one, pixels_of
from tests.service.faces.http.asking import problem
from tests.service.faces.oip.messages import grpc_message, outputs_of, post, refusal, tensor
from tests.service.faces.real import RealEngine

SCENE = street(3, cover=0.85)
FILES = {"vis": ("vis", file_of(SCENE.vis)), "ir": ("ir", file_of(SCENE.moved))}
IR_RANGE = "7000,9550"
MATRIX = ",".join(f"{value!r}" for value in SCENE.rig.matrix)


@dataclass
class Ways:
    """A server and all the ways in. Each takes what `rig` says and gives the fused picture."""

    server: Server
    channel: grpc.aio.Channel

    def message(self, rig: str) -> pb.FuseRequest:
        low, high = COUNTS
        options = pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW, rig=rig, ir_range=pb.IrRange(low=low, high=high))
        return pb.FuseRequest(
            vis=pb.Image(encoded=FILES["vis"][1]), ir=pb.Image(encoded=FILES["ir"][1]), options=options
        )

    @property
    def stub(self) -> fusion_pb2_grpc.FusionServiceAsyncStub:
        return fusion_pb2_grpc.FusionServiceStub(self.channel)

    async def form(self, rig: str) -> httpx.Response:
        data = {"format": "npy", "rig": rig, "ir_range": IR_RANGE}
        return await self.server.client.post("/v1/fuse", files=FILES, data=data)

    async def http(self, rig: str) -> Pixels:
        return np.asarray(np.load(io.BytesIO((await self.form(rig)).raise_for_status().content)))

    async def unary(self, rig: str) -> Pixels:
        return pixels_of((await self.stub.Fuse(self.message(rig))).fusion.pictures[0].image)

    async def streamed(self, rig: str) -> pb.FuseStreamResponse:
        asked = self.message(rig)
        messages = [
            pb.FuseStreamRequest(options=pb.StreamOptions(fuse=asked.options)),
            pb.FuseStreamRequest(frame=pb.Frame(sequence=1, vis=asked.vis, ir=asked.ir)),
        ]
        (answer,) = [answer async for answer in self.stub.FuseStream(one_by_one(messages))]
        return answer

    async def stream(self, rig: str) -> Pixels:
        return pixels_of((await self.streamed(rig)).fusion.pictures[0].image)

    async def asked_with_tensors(self, rig: str) -> httpx.Response:
        parameters = {"binary_data_output": True, "rig": rig, "ir_range": IR_RANGE}
        inputs = (tensor("vis", SCENE.vis), tensor("ir", SCENE.moved[..., None]))
        return await post(self.server.client, *inputs, outputs=[{"name": "fused"}], parameters=parameters)

    async def tensors(self, rig: str) -> Pixels:
        return np.asarray(outputs_of(await self.asked_with_tensors(rig))["fused"])

    def infer_message(self, rig: str) -> oip.ModelInferRequest:
        sent = grpc_message(tensor("vis", SCENE.vis), tensor("ir", SCENE.moved[..., None]))
        sent.outputs.add(name="fused")
        sent.parameters["rig"].string_param = rig
        sent.parameters["ir_range"].string_param = IR_RANGE
        return sent

    @property
    def inference(self) -> inference_pb2_grpc.GRPCInferenceServiceAsyncStub:
        return inference_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    async def tensors_over_grpc(self, rig: str) -> Pixels:
        answer = await self.inference.ModelInfer(self.infer_message(rig))
        return np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(SCENE.vis.shape)

    async def client(self, rig: RigLike) -> Pixels:
        async with rc.AsyncClient(f"grpc://{self.server.grpc_address}") as client:
            return (await client.fuse(SCENE.vis, SCENE.moved, rig=rig, ir_range=COUNTS)).fused

    async def client_over_http(self, rig: RigLike) -> Pixels:
        async with rc.AsyncClient(str(self.server.client.base_url)) as client:
            return (await client.fuse(SCENE.vis, SCENE.moved, rig=rig, ir_range=COUNTS)).fused

    async def client_stream(self, rig: RigLike) -> Pixels:
        async with (
            rc.AsyncClient(f"grpc://{self.server.grpc_address}") as client,
            client.stream([(SCENE.vis, SCENE.moved)], rig=rig, ir_range=COUNTS) as results,
        ):
            (result,) = [result async for result in results]
        return result.unwrap().fused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of an operator: one rig, one file that is damaged, and one whose name is none."""
    (tmp_path / "roof.json").write_text(to_json(SCENE.rig))
    (tmp_path / "broken.json").write_text('{"format": "recofuse-rig"')
    (tmp_path / "no name.json").write_text(to_json(SCENE.rig))
    (tmp_path / "notes.txt").write_text("not a rig")
    return tmp_path


@pytest.fixture
async def rigged(serving: Serving, folder: Path) -> AsyncIterator[Ways]:
    async with (
        serving(grpc={"port": 0}, rigs={"directory": str(folder)}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        yield Ways(server, channel)


def scores(fused: Pixels, scene: Street) -> np.ndarray:
    """Of the middle, where both cameras see."""
    vis, ir, picture = (
        torch.from_numpy(np.ascontiguousarray(levels[30:-30, 45:-45])).float() / 255
        for levels in (scene.vis, scene.ir[..., None], fused)
    )
    found = asdict(fusion_scores(picture.permute(2, 0, 1), vis.permute(2, 0, 1), ir.permute(2, 0, 1)))
    return np.array([found[name] for name in ("sd", "mi", "cc", "scd", "vif", "qabf", "ssim")])


async def test_a_rig_fuses_what_two_cameras_see_by_every_way_in(serving: Serving, folder: Path) -> None:
    async with (
        serving(RealEngine("compact"), grpc={"port": 0}, rigs={"directory": str(folder)}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        ways, engine = Ways(server, channel), server.engine
        options = PassOptions.of(FusionOptions(), engine.info)
        pair = await asyncio.to_thread(engine.fuse, SCENE.vis[None], SCENE.ir[None], options, [0])
        registered = pair[Part.FUSED][0]
        fused = await ways.http("roof")
        # as good as the registered pair, which the moved one is not without its rig
        assert (scores(fused, SCENE) / scores(registered, SCENE)).mean() > 0.95
        unaligned = await asyncio.to_thread(engine.fuse, SCENE.vis[None], _resampled(SCENE.moved)[None], options, [0])
        assert (scores(unaligned[Part.FUSED][0], SCENE) / scores(registered, SCENE)).mean() < 0.92
        for way in (ways.unary, ways.stream, ways.tensors, ways.tensors_over_grpc):
            np.testing.assert_array_equal(await way("roof"), fused, err_msg=way.__name__)
        file = folder / "roof.json"
        np.testing.assert_array_equal(await ways.client(file), fused)
        np.testing.assert_array_equal(await ways.client_over_http(SCENE.rig.array), fused)
        np.testing.assert_array_equal(await ways.client_stream(file.read_text("utf-8")), fused)
        np.testing.assert_array_equal(await ways.http(MATRIX), fused)
        uploaded = {**FILES, "rig": ("roof.json", file.read_bytes())}  # as curl's -F rig=@roof.json
        data = {"format": "npy", "ir_range": IR_RANGE}
        answer = await server.client.post("/v1/fuse", files=uploaded, data=data)
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.raise_for_status().content)), fused)


def _resampled(counts: np.ndarray) -> Pixels:
    import cv2

    levels = np.clip((counts - COUNTS[0]) / (COUNTS[1] - COUNTS[0]) * 255, 0, 255).astype(np.uint8)
    return np.asarray(cv2.resize(levels, SCENE.vis.shape[1::-1]), np.uint8)


async def test_the_worker_warps_once_and_asks_the_model_for_what_the_blend_needs(rigged: Ways) -> None:
    fused = await rigged.http("roof")
    engine = rigged.server.engine
    assert [options.parts for options in engine.options] == [(Part.FUSED, Part.VIS)]
    np.testing.assert_array_equal(fused, SCENE.vis)  # this engine's fused picture is vis
    expected = images.decode_rigged(
        FILES["vis"][1], FILES["ir"][1], SCENE.rig, Warps(), LimitSettings(), ir_range=COUNTS
    )
    data = {"format": "npy", "rig": "roof", "ir_range": IR_RANGE, "output": "ir"}
    answer = await rigged.server.client.post("/v1/fuse", files=FILES, data=data)
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), expected.pair.ir)
    assert [options.parts for options in engine.options[1:]] == [(Part.IR,)]


async def test_an_engine_that_blends_is_told_where_infrared_lies(serving: Serving, folder: Path) -> None:
    async with serving(FakeEngine(blends=True), rigs={"directory": str(folder)}, batch={"max_batch": 4}) as server:
        warp = warp_of(SCENE.rig)
        shares = np.stack([warp.weights, warp.tone_weights, warp.tone_weights], axis=-1)
        asked = {"format": "npy", "rig": "roof", "ir_range": IR_RANGE}

        async def fused(**more: str) -> Pixels:
            answer = await server.client.post("/v1/fuse", files=FILES, data=asked | more)
            return np.asarray(np.load(io.BytesIO(answer.raise_for_status().content)))

        np.testing.assert_array_equal(await fused(), np.rint(255 * shares))
        engine = server.engine
        assert isinstance(engine, FakeEngine)
        assert [(options.parts, options.is_partial) for options in engine.options] == [((Part.FUSED,), True)]
        # A shift of nothing covers all, so there is nothing to tell; colours are laid over vis as ever.
        np.testing.assert_array_equal(await fused(rig="1.6,0,0,0,1.6,0,0,0,1"), SCENE.vis)
        await fused(colour="iron")
        assert [(options.parts, options.is_partial) for options in engine.options[1:]] == [
            ((Part.FUSED,), False),
            ((Part.VIS, Part.IR), False),
        ]


def rig_file(**changes: object) -> str:
    return json.dumps({**json.loads(to_json(SCENE.rig)), **changes})


BAD_RIGS: dict[str, tuple[str, str]] = {
    "unknown": ("cellar", "there is no rig cellar; there are broken, roof"),
    "path": ("../roof", "letters, digits"),
    "absolute path": ("/etc/passwd", "letters, digits"),
    "file name": ("roof.json", "letters, digits"),
    "blank": ("  ", "letters, digits"),
    "control character": ("roof\x00", "letters, digits"),
    "damaged file": ("broken", "the file of broken cannot be used"),
    "eight numbers": ("1,0,0,0,1,0,0,0", "nine finite numbers"),
    "words": ("1,0,0,0,1,0,0,0,one", "nine finite numbers"),
    "nan": ("1,0,0,0,nan,0,0,0,1", "nine finite numbers"),
    "infinite": ("1,0,0,0,1,0,0,0,inf", "nine finite numbers"),
    "huge numbers": ("1e300,0,0,0,1e300,0,0,0,1", "nine finite numbers"),
    "zeros": ("0,0,0,0,0,0,0,0,0", "leans further"),
    "singular": ("1,1,0,1,1,0,0,0,1", "singular"),
    "mirrored": ("-1,0,250,0,1,0,0,0,1", "mirrored"),
    "huge warp": ("100,0,0,0,100,0,0,0,1", "enlarging by more than 32"),
    "far away": ("1,0,100000,0,1,0,0,0,1", "far outside"),
    "beside": ("1,0,300,0,1,0,0,0,1", "covers 0.0%"),
    "no rig file": ("{}", "the file is no rig"),
    "cut short": ('{"format"', "not sound JSON"),
    "nan in a file": (rig_file(matrix=[[float("nan"), 0, 0], [0, 1, 0], [0, 0, 1]]), "not sound JSON"),
    "deep": ("{" * 5000, "not sound JSON"),
    "another shape": (rig_file(vis_size=[640, 240]), "the same aspect ratio"),
    "another version": (rig_file(version=2), "another version"),
}


@pytest.mark.parametrize("case", BAD_RIGS)
async def test_what_is_no_rig_is_refused_before_any_work(rigged: Ways, case: str) -> None:
    text, words = BAD_RIGS[case]
    told = []
    if text.isprintable() and text.strip():  # a form's empty option is none, and a field is plain text
        told.append(problem(await rigged.form(text), ErrorCode.INVALID_INPUT)["detail"])
    told.append((await detail_of(rigged.stub.Fuse(rigged.message(text)), ErrorCode.INVALID_INPUT)).message)
    told.append((await detail_of(rigged.stub.SubmitFuse(rigged.message(text)), ErrorCode.INVALID_INPUT)).message)
    error = (await rigged.streamed(text)).error
    assert error.code == ErrorCode.INVALID_INPUT
    told.append(error.message)
    told.append(refusal(await rigged.asked_with_tensors(text), ErrorCode.INVALID_INPUT))
    call = rigged.inference.ModelInfer(rigged.infer_message(text))
    told.append((await detail_of(call, ErrorCode.INVALID_INPUT)).message)
    for message in told:
        assert message.startswith("rig: ")
        assert words in message
    assert not rigged.server.engine.batches


async def test_a_rig_that_is_too_long_is_refused_as_it_comes(rigged: Ways) -> None:
    text = rig_file(name="a" * (64 << 10))
    assert "65536 bytes" in problem(await rigged.form(text), ErrorCode.PAYLOAD_TOO_LARGE)["detail"]
    assert "65536" in refusal(await rigged.asked_with_tensors(text), ErrorCode.PAYLOAD_TOO_LARGE)
    await detail_of(rigged.stub.Fuse(rigged.message(text)), ErrorCode.INVALID_INPUT)
    assert not rigged.server.engine.batches


async def test_one_file_as_both_sides_has_no_rig(rigged: Ways) -> None:
    both = file_of(np.zeros((48, 64, 4), np.uint8) + np.arange(4, dtype=np.uint8))
    files = {"vis": ("a", both), "ir": ("b", both)}
    answer = await rigged.server.client.post("/v1/fuse", files=files, data={"rig": "1,0,0,0,1,0,0,0,1"})
    assert "needs no rig" in problem(answer, ErrorCode.INVALID_INPUT)["detail"]


async def test_without_a_rig_other_shapes_are_still_refused(rigged: Ways) -> None:
    assert "256x192" in problem(await rigged.form(""), ErrorCode.INVALID_INPUT)["detail"]


async def test_rigs_are_listed_by_every_face(rigged: Ways) -> None:
    (told,) = (await rigged.server.client.get("/v1/rigs")).json()["rigs"]
    assert (told["name"], told["vis_size"], told["ir_size"], told["is_sure"]) == ("roof", [256, 192], [200, 160], True)
    assert told["overlap"] == round(SCENE.rig.overlap, 3)
    assert told["matrix"] == list(SCENE.rig.matrix)
    assert (told["has_distortion"], told["parallax_px"]) == (False, None)
    async with rc.AsyncClient(f"grpc://{rigged.server.grpc_address}") as client:
        over_grpc = await client.rigs()
    async with rc.AsyncClient(str(rigged.server.client.base_url)) as client:
        assert await client.rigs() == over_grpc
    (listed,) = over_grpc
    assert asdict(listed) == told | {"vis_size": (256, 192), "ir_size": (200, 160), "matrix": SCENE.rig.matrix}
    config = (await rigged.server.client.get("/v2/models/recofuse/config")).json()["parameters"]
    assert config["rigs"] == {"string_value": "roof"}


async def test_a_server_without_a_folder_has_no_rigs_and_takes_those_that_come(serving: Serving) -> None:
    async with serving(grpc={"port": 0}) as server:
        assert (await server.client.get("/v1/rigs")).json() == {"rigs": []}
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            ways = Ways(server, channel)
            refused = problem(await ways.form("roof"), ErrorCode.INVALID_INPUT)["detail"]
            assert refused == "rig: there is no rig roof; there are none here"
            assert (await ways.http(to_json(SCENE.rig))).shape == SCENE.vis.shape


async def test_a_job_keeps_the_rig_that_it_was_accepted_with(serving: Serving, folder: Path) -> None:
    engine = FakeEngine()
    async with serving(engine, rigs={"directory": str(folder)}) as server:
        data = {"format": "npy", "rig": "roof", "ir_range": IR_RANGE, "output": "ir"}

        async def ir() -> Pixels:
            answer = await server.client.post("/v1/fuse", files=FILES, data=data)
            return np.asarray(np.load(io.BytesIO(answer.raise_for_status().content)))

        before = await ir()
        engine.gate.clear()
        engine.started.clear()
        first = asyncio.ensure_future(ir())
        await asyncio.to_thread(engine.started.wait, 20)
        moved = Rig(SCENE.rig.vis_size, SCENE.rig.ir_size, (1.0, 0.0, 30.0, 0.0, 1.0, 20.0, 0.0, 0.0, 1.0))
        (folder / "roof.json").write_text(to_json(moved))
        engine.gate.set()
        np.testing.assert_array_equal(await first, before)
        assert (await ir() != before).any()
        (folder / "roof.json").unlink()
        answer = await server.client.post("/v1/fuse", files=FILES, data=data)
        assert "no rig roof" in problem(answer, ErrorCode.INVALID_INPUT)["detail"]
