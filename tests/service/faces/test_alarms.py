"""Values and alarms from end to end: the restored infrared in its own units, and what is hot by every way in."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

import recofuse_client as rc
from recofuse_images.measures import outlined
from recofuse_images.reader import read_infrared
from recofuse_protos.inference.v2 import inference_pb2_grpc
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from recofuse_rigs.rig import Rig, to_json
from recofuse_rigs.warp import warp_of
from service.terms.errors import ErrorCode
from service.terms.jobs import Part
from tests.fakes import file_of, picture
from tests.images.test_radiometric import CONSTANTS, Flir
from tests.service.conftest import Server, Serving
from tests.service.faces.grpc.face import detail_of, one_by_one
from tests.service.faces.http.asking import problem
from tests.service.faces.oip.messages import grpc_message, outputs_of, post, refusal, tensor

VIS = picture(64, 48, seed=5)
COUNTS = (7000 + 5 * picture(64, 48, channels=1, seed=6).astype(np.uint16)).astype(np.uint16)
COUNTS[10:14, 20:26] = 9000  # hotter than all, and beyond the scale
COUNTS[30:33, 50:53] = 8800
FILES = {"vis": ("vis", file_of(VIS)), "ir": ("ir", file_of(COUNTS))}
DEGREES = 0.04, -273.15
IR_RANGE = {"ir_range": "7000,8600"}
FOUND: dict[str, Any] = {
    "num_regions": 2,
    "area": 33,
    "regions": [
        {"box": [20, 10, 6, 4], "area": 24, "centroid": [22.5, 11.5]},
        {"box": [50, 30, 3, 3], "area": 9, "centroid": [51.0, 31.0]},
    ],
}
Data = dict[str, str]


def alarm_of(threshold: float, unit: str, hottest: tuple[float, float]) -> dict[str, Any]:
    regions = [{**region, "hottest": value} for region, value in zip(FOUND["regions"], hottest, strict=True)]
    return {**FOUND, "threshold": threshold, "unit": unit, "hottest": hottest[0], "regions": regions}


def in_counts(threshold: float) -> dict[str, Any]:
    return alarm_of(threshold, "counts", (9000.0, 8800.0))


async def asked(server: Server, data: Data, **files: tuple[str, bytes]) -> httpx.Response:
    return await server.client.post("/v1/fuse", files=FILES | files, data={"format": "npy"} | data)


async def unzipped(server: Server, data: Data, **files: tuple[str, bytes]) -> tuple[dict[str, bytes], dict[str, Any]]:
    answer = (await asked(server, data, **files)).raise_for_status()
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    return entries, json.loads(entries["result.json"])


@dataclass
class Running:
    server: Server
    channel: grpc.aio.Channel

    def message(self, **options: Any) -> pb.FuseRequest:
        chosen = pb.FuseOptions(ir_range=pb.IrRange(low=7000, high=8600), **options)
        return pb.FuseRequest(
            vis=pb.Image(encoded=FILES["vis"][1]), ir=pb.Image(encoded=FILES["ir"][1]), options=chosen
        )

    @property
    def stub(self) -> fusion_pb2_grpc.FusionServiceAsyncStub:
        return fusion_pb2_grpc.FusionServiceStub(self.channel)

    @property
    def addresses(self) -> tuple[str, str]:
        return f"grpc://{self.server.grpc_address}", str(self.server.client.base_url)


@pytest.fixture
async def running(serving: Serving) -> AsyncIterator[Running]:
    async with serving(grpc={"port": 0}) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        yield Running(server, channel)


async def test_an_alarm_is_told_by_every_way_in(running: Running) -> None:
    expected = in_counts(8700)
    entries, told = await unzipped(running.server, {"alarm": "8700", **IR_RANGE})
    assert set(entries) == {"fused.npy", "result.json"}
    assert told["alarm"] == expected
    options = running.message(alarm="8700").options
    messages = [
        pb.FuseStreamRequest(options=pb.StreamOptions(fuse=options)),
        pb.FuseStreamRequest(
            frame=pb.Frame(sequence=1, vis=pb.Image(encoded=FILES["vis"][1]), ir=pb.Image(encoded=FILES["ir"][1]))
        ),
    ]
    (streamed,) = [answer async for answer in running.stub.FuseStream(one_by_one(messages))]
    unary = (await running.stub.Fuse(running.message(alarm="8700"))).fusion
    for alarm in (unary.alarm, streamed.fusion.alarm):
        assert (alarm.threshold, alarm.unit, alarm.num_regions, alarm.area) == (8700, pb.UNIT_COUNTS, 2, 33)
        assert [(region.left, region.top, region.width, region.height) for region in alarm.regions] == [
            (20, 10, 6, 4),
            (50, 30, 3, 3),
        ]
        assert [(region.hottest, region.centroid_x, region.centroid_y) for region in alarm.regions] == [
            (9000, 22.5, 11.5),
            (8800, 51, 31),
        ]
    for url in running.addresses:
        async with rc.AsyncClient(url) as client:
            fusion = await client.fuse(VIS, COUNTS, alarm=8700, ir_range=(7000, 8600))
            assert fusion.alarm is not None
            assert json.loads(json.dumps(asdict(fusion.alarm))) == expected
            assert fusion.values is None
            assert (await client.fuse(VIS, COUNTS)).alarm is None
    async with (
        rc.AsyncClient(running.addresses[0]) as client,
        client.stream([(VIS, COUNTS)], alarm="8700", ir_range=(7000, 8600)) as results,
    ):
        (result,) = [result async for result in results]
    assert result.unwrap().alarm == fusion.alarm
    inputs = (tensor("vis", VIS), tensor("ir", COUNTS[..., None]))
    parameters = {"binary_data_output": True, "alarm": "8700", **IR_RANGE}
    answer = await post(running.server.client, *inputs, outputs=[{"name": "fused"}], parameters=parameters)
    size = int(answer.headers["inference-header-content-length"])
    assert json.loads(json.loads(answer.content[:size])["parameters"]["alarms"]) == [expected]
    sent = grpc_message(*inputs)
    sent.parameters["alarm"].string_param, sent.parameters["ir_range"].string_param = "8700", IR_RANGE["ir_range"]
    inferred = await inference_pb2_grpc.GRPCInferenceServiceStub(running.channel).ModelInfer(sent)
    assert json.loads(inferred.parameters["alarms"].string_param) == [expected]


async def test_degrees_are_what_the_caller_or_the_file_makes_of_counts(running: Running) -> None:
    _, told = await unzipped(running.server, {"alarm": "75C", "degrees": "0.04,-273.15", **IR_RANGE})
    assert told["alarm"] == alarm_of(75, "celsius", (86.85, 78.85))
    _, told = await unzipped(running.server, {"alarm": "8700", "degrees": "0.04,-273.15", **IR_RANGE})
    assert told["alarm"] == in_counts(8700)  # a bare number is in the file's own values
    room = np.full((48, 64), 13000, np.uint16)
    room[10:20, 30:40] = 16000
    thermal = Flir(constants=CONSTANTS).jpeg(room)
    degrees = read_infrared(thermal).picture.values
    alarm = f"{(degrees.min() + degrees.max()) / 2:.2f}C"
    entries, told = await unzipped(running.server, {"alarm": alarm, "values": "npy"}, ir=("ir.jpg", thermal))
    (region,) = told["alarm"]["regions"]
    assert (region["box"], told["alarm"]["unit"], told["values"]["unit"]) == ([30, 10, 10, 10], "celsius", "celsius")
    assert np.load(io.BytesIO(entries["values.npy"])).max() == pytest.approx(region["hottest"], abs=1e-3)
    assert region["hottest"] == pytest.approx(float(degrees.max()), abs=1e-3)


async def test_values_come_in_the_units_of_their_source(running: Running) -> None:
    server = running.server
    entries, told = await unzipped(server, {"values": "npy", "output": "all"})
    assert set(entries) == {"fused.npy", "vis.npy", "ir.npy", "values.npy", "result.json"}
    assert told["values"] == {"file": "values.npy", "media_type": "application/x-npy", "unit": "counts"}
    assert "alarm" not in told
    values = np.load(io.BytesIO(entries["values.npy"]))
    assert values.dtype == np.float32
    assert np.abs(values - COUNTS.astype(float)).max() < 8  # this engine restores nothing, and a level is 5 counts
    assert (values[10:14, 20:26] == 9000).all()
    for suffix, media_type in (("tiff", "image/tiff"), ("png", "image/png")):
        for url in running.addresses:
            async with rc.AsyncClient(url) as client:
                answer = await client.fuse(VIS, COUNTS, values=suffix)  # type: ignore[arg-type]
            assert answer.values is not None
            assert (answer.values.media_type, answer.values.unit) == (media_type, "counts")
            assert answer.values.pixels.dtype == np.uint16
            np.testing.assert_array_equal(answer.values.pixels, np.rint(values))
    async with rc.AsyncClient(running.addresses[0]) as client:
        hot = (await client.fuse(VIS, COUNTS, values="tiff", degrees=DEGREES)).values
    assert hot is not None
    assert hot.unit == "celsius"
    np.testing.assert_allclose(hot.pixels, 0.04 * values - 273.15, atol=1e-3)


async def test_values_come_as_tensors(running: Running) -> None:
    entries, _ = await unzipped(running.server, {"values": "npy", "degrees": "0.04,-273.15"})
    expected = np.load(io.BytesIO(entries["values.npy"]))[..., None]
    inputs = tensor("vis", VIS), tensor("ir", COUNTS[..., None])
    for binary in (True, False):
        wanted = [{"name": "values", "parameters": {"binary_data": binary}}]
        answer = await post(running.server.client, *inputs, outputs=wanted, parameters={"degrees": "0.04,-273.15"})
        found = outputs_of(answer)
        assert list(found) == ["values"]
        assert found["values"].dtype == np.float32
        np.testing.assert_array_equal(found["values"], expected)
    assert running.server.engine.options[-1].parts == (Part.IR,)
    stub = inference_pb2_grpc.GRPCInferenceServiceStub(running.channel)
    batch = tensor("vis", np.stack([VIS, VIS])), tensor("ir", np.stack([COUNTS, COUNTS])[..., None])
    message = grpc_message(*batch, outputs=[{"name": "fused"}], parameters={"values": "npy"})
    told = await stub.ModelInfer(message)
    assert [(one.name, one.datatype, list(one.shape)) for one in told.outputs] == [
        ("fused", "UINT8", [2, 48, 64, 3]),
        ("values", "FP32", [2, 48, 64, 1]),
    ]
    assert told.parameters["values_unit"].string_param == "counts,counts"
    counts = np.frombuffer(told.raw_output_contents[1], "<f4").reshape(2, 48, 64)
    np.testing.assert_allclose(0.04 * counts - 273.15, np.stack([expected[..., 0]] * 2), atol=1e-3)
    # As files, where a kind of file or a format is asked for.
    for parameters, suffix in (({"values": "tiff"}, ".tiff"), ({"format": "png", "values": "npy"}, ".npy")):
        given = {**parameters, "binary_data_output": True}
        (file,) = outputs_of(await post(running.server.client, *inputs, parameters=given))["values"]
        read = np.load(io.BytesIO(file)) if suffix == ".npy" else read_infrared(file).picture.values
        np.testing.assert_array_equal(read, counts[0] if suffix == ".npy" else np.rint(counts[0]))


async def test_nothing_measured_is_null_in_json_and_json_is_bounded(running: Running, serving: Serving) -> None:
    rig = Rig((64, 48), (64, 48), (0.5, 0.0, 20.0, 0.0, 0.5, 10.0, 0.0, 0.0, 1.0))
    inputs = tensor("vis", VIS), tensor("ir", COUNTS[..., None])
    asked = {"outputs": [{"name": "values"}], "parameters": {"rig": to_json(rig)}}
    answer = await post(running.server.client, *inputs, **asked)
    data = answer.json()["outputs"][0]["data"]
    np.testing.assert_array_equal([value is not None for value in data], warp_of(rig).coverage.ravel())
    async with serving(limits={"max_json_bytes": 64 * 48 * 20}) as server:
        refused = refusal(await post(server.client, *inputs, **asked), ErrorCode.PAYLOAD_TOO_LARGE)
        assert "too many for JSON" in refused


async def test_a_job_keeps_its_values_and_its_alarm(running: Running) -> None:
    for url in running.addresses:
        async with rc.AsyncClient(url) as client:
            direct = await client.fuse(VIS, COUNTS, values="npy", alarm=8700)
            job = await client.submit(VIS, COUNTS, values="npy", alarm=8700)
            await client.wait(job.id)
            kept = await client.result(job.id)
        assert kept.values is not None
        assert direct.values is not None
        assert kept.values.encoded == direct.values.encoded
        assert kept.alarm == direct.alarm
        assert kept.alarm is not None


async def test_an_outline_is_drawn_into_the_fused_picture_alone(running: Running) -> None:
    entries, _ = await unzipped(running.server, {"alarm": "8700", "outline": "true", "output": "all", **IR_RANGE})
    np.testing.assert_array_equal(np.load(io.BytesIO(entries["fused.npy"])), outlined(VIS, COUNTS >= 8700))
    np.testing.assert_array_equal(np.load(io.BytesIO(entries["vis.npy"])), VIS)
    entries, _ = await unzipped(running.server, {"alarm": "8700", **IR_RANGE})
    np.testing.assert_array_equal(np.load(io.BytesIO(entries["fused.npy"])), VIS)
    assert running.server.engine.options[-1].parts == (Part.FUSED, Part.IR)


async def test_beyond_the_infrared_of_a_rig_nothing_is_measured(running: Running) -> None:
    rig = Rig((64, 48), (64, 48), (0.5, 0.0, 20.0, 0.0, 0.5, 10.0, 0.0, 0.0, 1.0))
    entries, told = await unzipped(running.server, {"values": "npy", "alarm": "7000", "rig": to_json(rig)})
    values = np.load(io.BytesIO(entries["values.npy"]))
    np.testing.assert_array_equal(np.isfinite(values), warp_of(rig).coverage)
    assert told["alarm"]["area"] == np.isfinite(values).sum()


BAD: dict[str, tuple[Data, str]] = {
    "degrees of counts": ({"alarm": "60C"}, "the infrared file holds counts; send degrees as well"),
    "no number": ({"alarm": "hot"}, "accepted are a number in the infrared file's values, and degrees"),
    "nan": ({"alarm": "nan"}, "alarm"),
    "infinite": ({"alarm": "1e999"}, "alarm"),
    "another unit": ({"alarm": "60F"}, "alarm"),
    "long": ({"alarm": "9" * 20}, "alarm"),
    "outline without an alarm": ({"outline": "true"}, "outline goes with an alarm"),
    "no truth": ({"alarm": "1", "outline": "perhaps"}, "outline"),
    "unknown format": ({"values": "jpeg"}, "values"),
    "degrees in a png": ({"values": "png", "degrees": "0.04,-273.15"}, "png holds whole counts"),
    "no gain": ({"degrees": "0,1", "alarm": "1C"}, "a gain that is not 0"),
    "nan gain": ({"degrees": "nan,1", "alarm": "1C"}, "degrees"),
}


async def test_what_cannot_be_measured_is_refused(running: Running) -> None:
    for data, words in BAD.values():
        told = [problem(await asked(running.server, data), ErrorCode.INVALID_INPUT)["detail"]]
        if data.get("outline") != "perhaps":
            parameters: dict[str, object] = {**data, "outline": data.get("outline") == "true"}
            inputs = (tensor("vis", VIS), tensor("ir", COUNTS[..., None]))
            answer = await post(running.server.client, *inputs, parameters=parameters)
            told.append(refusal(answer, ErrorCode.INVALID_INPUT))
        if not set(data) & {"values", "outline"}:
            gain, _, offset = data.get("degrees", "").partition(",")
            degrees = pb.Degrees(gain=float(gain), offset=float(offset)) if gain else None
            message = running.message(alarm=data["alarm"], degrees=degrees)
            told.append((await detail_of(running.stub.Fuse(message), ErrorCode.INVALID_INPUT)).message)
        for message in told:
            assert words in message
    assert not running.server.engine.batches


async def test_degrees_of_a_file_that_holds_degrees_are_refused(running: Running) -> None:
    thermal = Flir(constants=CONSTANTS).jpeg(np.tile(np.arange(13000, 13064, dtype=np.uint16), (48, 1)))
    for data, words in (
        ({"alarm": "60C", "degrees": "0.04,-273.15"}, "holds degrees Celsius already"),
        ({"values": "png"}, "png holds whole counts"),
    ):
        answer = await asked(running.server, data, ir=("ir.jpg", thermal))
        assert words in problem(answer, ErrorCode.INVALID_INPUT)["detail"]


async def test_degrees_beyond_all_numbers_are_nothing_measured(running: Running) -> None:
    for degrees in ("100000000000000000000000000000000000000000000,1", "0.0000000000000000001,1"):
        entries, told = await unzipped(running.server, {"values": "npy", "alarm": "60C", "degrees": degrees})
        values = np.load(io.BytesIO(entries["values.npy"]))
        assert not np.isinf(values).any()
        assert told["alarm"]["num_regions"] == 0


async def test_the_list_of_a_noisy_picture_is_short(running: Running) -> None:
    noise = np.random.default_rng(1).integers(0, 60000, (480, 640), dtype=np.uint16)
    files = {"vis": ("vis", file_of(picture(640, 480))), "ir": ("ir", file_of(noise))}
    _, told = await unzipped(running.server, {"alarm": "42000"}, **files)
    assert len(told["alarm"]["regions"]) == 32 < told["alarm"]["num_regions"]
    assert len(json.dumps(told)) < 6000
