"""`align=refine` from end to end: what a rig leaves is put right by every way in, told, followed, and counted."""

from __future__ import annotations

import io
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

import recofuse_client as rc
from recofuse_protos.inference.v2 import inference_pb2 as oip
from recofuse_protos.inference.v2 import inference_pb2_grpc
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from recofuse_rigs.pairs import read_aligned
from recofuse_rigs.parallax import Track
from recofuse_rigs.rig import Rig, to_json
from service.terms.errors import ErrorCode
from service.terms.jobs import FusionOptions
from tests.fakes import file_of
from tests.rigs.scenes import VIS_SIZE, scene
from tests.rigs.test_parallax import leaning, noisy, off_by
from tests.service.conftest import Server, Serving
from tests.service.faces.grpc.face import detail_of, one_by_one, pixels_of
from tests.service.faces.http.asking import problem
from tests.service.faces.oip.messages import grpc_message, post, refusal, tensor

Pixels = NDArray[np.uint8]

RIG = Rig(VIS_SIZE, VIS_SIZE, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), name="roof")
VIS, REGISTERED = scene(0)
COLOUR = np.repeat(VIS[..., None], 3, axis=2)
SHOWN = off_by(REGISTERED, leaning(4.0, -3.0)).astype(np.uint8)
FILES = {"vis": ("vis", file_of(COLOUR)), "ir": ("ir", file_of(SHOWN))}
EXPECTED = read_aligned(FILES["vis"][1], FILES["ir"][1], RIG, is_refined=True)


@dataclass
class Ways:
    """A server and all the ways in. Each takes a rig and `align`, and gives what the model was shown of infrared."""

    server: Server
    channel: grpc.aio.Channel

    async def form(self, rig: str, align: str, **options: str) -> httpx.Response:
        data = {"format": "npy", "output": "ir", "rig": rig, "align": align, "ir_range": "0,255", **options}
        return await self.server.client.post("/v1/fuse", files=FILES, data=data)

    def message(self, rig: str, align: pb.Align.ValueType = pb.ALIGN_REFINE) -> pb.FuseRequest:
        options = pb.FuseOptions(
            format=pb.IMAGE_FORMAT_RAW,
            output=pb.OUTPUT_IR,
            rig=rig,
            align=align,
            ir_range=pb.IrRange(low=0, high=255),
        )
        vis, ir = (pb.Image(encoded=FILES[name][1]) for name in ("vis", "ir"))
        return pb.FuseRequest(vis=vis, ir=ir, options=options)

    @property
    def stub(self) -> fusion_pb2_grpc.FusionServiceAsyncStub:
        return fusion_pb2_grpc.FusionServiceStub(self.channel)

    async def stream(
        self, options: pb.FuseOptions, pairs: Sequence[tuple[bytes, bytes]], max_in_flight: int = 1
    ) -> list[pb.FuseStreamResponse]:
        messages = [pb.FuseStreamRequest(options=pb.StreamOptions(fuse=options, max_in_flight=max_in_flight))]
        for number, (vis, ir) in enumerate(pairs):
            frame = pb.Frame(sequence=number, vis=pb.Image(encoded=vis), ir=pb.Image(encoded=ir))
            messages.append(pb.FuseStreamRequest(frame=frame))
        return [answer async for answer in self.stub.FuseStream(one_by_one(messages))]

    async def tensors(self, rig: str, align: str) -> httpx.Response:
        parameters = {"binary_data_output": True, "rig": rig, "align": align, "ir_range": "0,255"}
        inputs = (tensor("vis", COLOUR), tensor("ir", SHOWN[..., None]))
        return await post(self.server.client, *inputs, outputs=[{"name": "ir_restored"}], parameters=parameters)

    def infer_message(self, rig: str, align: str) -> oip.ModelInferRequest:
        sent = grpc_message(tensor("vis", COLOUR), tensor("ir", SHOWN[..., None]))
        sent.outputs.add(name="ir_restored")
        for name, value in {"rig": rig, "align": align, "ir_range": "0,255"}.items():
            if value:
                sent.parameters[name].string_param = value
        return sent

    @property
    def inference(self) -> inference_pb2_grpc.GRPCInferenceServiceAsyncStub:
        return inference_pb2_grpc.GRPCInferenceServiceStub(self.channel)


@pytest.fixture
async def ways(serving: Serving, tmp_path: Path) -> AsyncIterator[Ways]:
    (tmp_path / "roof.json").write_text(to_json(RIG))
    async with (
        serving(grpc={"port": 0}, rigs={"directory": str(tmp_path)}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        yield Ways(server, channel)


def ir_of(answer: httpx.Response) -> Pixels:
    return np.asarray(np.load(io.BytesIO(answer.raise_for_status().content)))


async def test_what_the_rig_leaves_is_put_right_and_told_by_every_way_in(ways: Ways) -> None:
    refined = EXPECTED.refined
    assert refined is not None
    assert refined.moved_px > 1
    assert refined.residual_px is not None
    told = pytest.approx((refined.residual_px, refined.moved_px), abs=1e-9)
    rounded = pytest.approx((refined.residual_px, refined.moved_px), abs=0.051)
    expected = read_aligned(FILES["vis"][1], FILES["ir"][1], RIG, is_refined=True, ir_range=(0, 255)).pair.ir
    left, was = (np.abs(ir.astype(float) - REGISTERED)[20:-20, 20:-20].mean() for ir in (expected, SHOWN))
    assert left < 0.5 * was
    for rig in ("roof", ""):  # without a rig, a registered pair is one
        answer = await ways.form(rig, "refine")
        np.testing.assert_array_equal(ir_of(answer), expected)
        found = re.fullmatch(r"residual ([0-9.]+) px, moved ([0-9.]+) px", answer.headers["X-Alignment"])
        assert found is not None
        assert (float(found[1]), float(found[2])) == rounded
        unary = (await ways.stub.Fuse(ways.message(rig))).fusion
        (streamed,) = await ways.stream(ways.message(rig).options, [(FILES["vis"][1], FILES["ir"][1])])
        for fusion in (unary, streamed.fusion):
            np.testing.assert_array_equal(pixels_of(fusion.pictures[0].image), expected)
            assert (fusion.alignment.residual_px, fusion.alignment.moved_px) == told
        over_grpc = await ways.inference.ModelInfer(ways.infer_message(rig, "refine"))
        assert np.array_equal(np.frombuffer(over_grpc.raw_output_contents[0], np.uint8), expected.ravel())
        over_http = await ways.tensors(rig, "refine")
        document = json.loads(over_http.content[: int(over_http.headers["Inference-Header-Content-Length"])])
        for alignments in (over_grpc.parameters["alignments"].string_param, document["parameters"]["alignments"]):
            (alignment,) = json.loads(alignments)
            assert (alignment["residual_px"], alignment["moved_px"]) == told
        for url, close in ((f"grpc://{ways.server.grpc_address}", told), (str(ways.server.client.base_url), rounded)):
            async with rc.AsyncClient(url) as client:
                answered = await client.fuse(
                    COLOUR, SHOWN, rig=rig or None, align="refine", output="ir", ir_range=(0, 255)
                )
                np.testing.assert_array_equal(answered.ir, expected)
                assert answered.alignment is not None
                assert (answered.alignment.residual_px, answered.alignment.moved_px) == close


async def test_nothing_is_measured_unless_it_is_asked_for(ways: Ways) -> None:
    for align in ("rig", ""):
        answer = await ways.form("roof", align)
        np.testing.assert_array_equal(ir_of(answer), SHOWN)
        assert "X-Alignment" not in answer.headers
    assert not (await ways.stub.Fuse(ways.message("roof", pb.ALIGN_UNSPECIFIED))).fusion.HasField("alignment")
    async with rc.AsyncClient(str(ways.server.client.base_url)) as client:
        assert (await client.fuse(COLOUR, SHOWN, rig="roof")).alignment is None
    assert "align" not in json.loads(FusionOptions().model_dump_json())  # which older workers do not know
    assert json.loads(FusionOptions(align="refine").model_dump_json())["align"] == "refine"


async def test_a_zip_tells_it_too(ways: Ways) -> None:
    import zipfile

    answer = await ways.form("roof", "refine", output="all")
    with zipfile.ZipFile(io.BytesIO(answer.raise_for_status().content)) as archive:
        alignment = json.loads(archive.read("result.json"))["alignment"]
    assert EXPECTED.refined is not None
    assert alignment["moved_px"] == pytest.approx(EXPECTED.refined.moved_px)


async def test_what_was_seen_of_nothing_is_told_as_unknown(ways: Ways) -> None:
    flat = file_of(np.full((33, 44), 90, np.uint8))
    files = {"vis": ("vis", file_of(np.full((33, 44, 3), 90, np.uint8))), "ir": ("ir", flat)}
    answer = await ways.server.client.post("/v1/fuse", files=files, data={"align": "refine"})
    assert answer.raise_for_status().headers["X-Alignment"] == "residual unknown, moved 0.0 px"
    async with rc.AsyncClient(str(ways.server.client.base_url)) as client:
        fusion = await client.fuse(files["vis"][1], flat, align="refine")
    assert fusion.alignment == rc.Alignment(None, 0.0)


# streams


def frames(count: int) -> list[tuple[bytes, bytes]]:
    return [(file_of(noisy(COLOUR, index, 10)), file_of(noisy(SHOWN, 50 + index, 10))) for index in range(count)]


async def test_a_stream_begins_with_what_the_frames_before_have_shown(ways: Ways) -> None:
    sent = frames(3)
    answers = await ways.stream(ways.message("roof").options, sent)
    assert [answer.sequence for answer in answers] == [0, 1, 2]
    track: Track | None = None
    alone = []
    for answer, (vis, ir) in zip(answers, sent, strict=True):
        expected = read_aligned(vis, ir, RIG, is_refined=True, track=track, ir_range=(0, 255))
        assert expected.refined is not None
        np.testing.assert_array_equal(pixels_of(answer.fusion.pictures[0].image), expected.pair.ir)
        assert answer.fusion.alignment.moved_px == pytest.approx(expected.refined.moved_px)
        fresh = read_aligned(vis, ir, RIG, is_refined=True).refined
        assert fresh is not None
        alone.append(fresh.moved_px)
        assert expected.refined.track is not None
        track = Track.from_text(expected.refined.track.to_text())  # as it crosses the queue
    moved = [answer.fusion.alignment.moved_px for answer in answers]
    assert moved[0] == pytest.approx(alone[0])
    assert moved[1:] != pytest.approx(alone[1:])


async def test_a_stream_with_many_frames_in_flight_stays_in_order_and_drops_nothing(ways: Ways) -> None:
    answers = await ways.stream(ways.message("roof").options, frames(6), max_in_flight=4)
    assert [answer.sequence for answer in answers] == list(range(6))
    assert all(answer.fusion.alignment.moved_px > 1 for answer in answers)
    assert answers[-1].stats.dropped == 0


async def test_frames_that_differ_in_size_do_not_disturb_each_other(ways: Ways) -> None:
    small = file_of(np.full((48, 64, 3), 90, np.uint8)), file_of(np.full((48, 64), 90, np.uint8))
    sent = [*frames(1), small, *frames(1)]
    answers = await ways.stream(ways.message("").options, sent)
    assert [answer.WhichOneof("outcome") for answer in answers] == ["fusion"] * 3


# refused


def hostile(value: str) -> str:
    return to_json(RIG).replace('"num_pairs"', f'"parallax_px": {value}, "num_pairs"')


@pytest.mark.parametrize("value", ["-1", "1e400", "NaN", "1000", '"wide"', "true", "[3]"])
async def test_a_hostile_bound_is_refused_before_any_work(ways: Ways, value: str) -> None:
    told = [
        problem(await ways.form(hostile(value), "refine"), ErrorCode.INVALID_INPUT)["detail"],
        (await detail_of(ways.stub.Fuse(ways.message(hostile(value))), ErrorCode.INVALID_INPUT)).message,
        refusal(await ways.tensors(hostile(value), "refine"), ErrorCode.INVALID_INPUT),
    ]
    assert all(message.startswith("rig: ") for message in told)
    assert not ways.server.engine.batches


async def test_other_ways_to_align_are_refused(ways: Ways) -> None:
    for align in ("sideways", "REFINE", "0"):
        told = [
            problem(await ways.form("roof", align), ErrorCode.INVALID_INPUT)["detail"],
            refusal(await ways.tensors("roof", align), ErrorCode.INVALID_INPUT),
        ]
        call = ways.inference.ModelInfer(ways.infer_message("roof", align))
        told.append((await detail_of(call, ErrorCode.INVALID_INPUT)).message)
        assert all(message.startswith("align: ") for message in told)
    request = ways.message("roof")
    request.options.align = 7  # type: ignore[assignment]
    message = (await detail_of(ways.stub.Fuse(request), ErrorCode.INVALID_INPUT)).message
    assert "ALIGN_REFINE" in message
    with pytest.raises(ValueError, match="align: accepted are rig, refine"):
        rc.Options(align="sideways")  # type: ignore[arg-type]
    assert not ways.server.engine.batches


async def test_without_a_rig_only_what_may_be_registered_is_refined(ways: Ways) -> None:
    other = {**FILES, "ir": ("ir", file_of(np.zeros((240, 200), np.uint8)))}
    answer = await ways.server.client.post("/v1/fuse", files=other, data={"align": "refine"})
    assert "320x240" in problem(answer, ErrorCode.INVALID_INPUT)["detail"]
    both = {"vis": FILES["vis"], "ir": ("ir", FILES["vis"][1])}
    answer = await ways.server.client.post("/v1/fuse", files=both, data={"align": "refine"})
    assert problem(answer, ErrorCode.INVALID_INPUT)["detail"].startswith("align: ")


# what a dashboard sees


async def test_the_drift_of_a_named_rig_is_a_metric_and_that_of_others_is_none(ways: Ways) -> None:
    for rig in ("roof", " roof ", to_json(RIG), "1,0,0,0,1,0,0,0,1", ""):
        (await ways.form(rig, "refine")).raise_for_status()
    (await ways.form("roof", "rig")).raise_for_status()
    text = (await ways.server.client.get("/metrics")).text
    counts = re.findall(r'recofuse_rig_(moved|residual)_pixels_count\{rig="([^"]*)"\} ([0-9.]+)', text)
    assert sorted(counts) == [("moved", "roof", "2.0"), ("residual", "roof", "2.0")]
    (total,) = re.findall(r'recofuse_rig_moved_pixels_sum\{rig="roof"\} ([0-9.e+-]+)', text)
    assert EXPECTED.refined is not None
    assert float(total) == pytest.approx(2 * EXPECTED.refined.moved_px * 640 / VIS_SIZE[0])
