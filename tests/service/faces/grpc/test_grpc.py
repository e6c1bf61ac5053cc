"""The gRPC contract, over a real socket with a real client."""

from __future__ import annotations

import asyncio
import contextlib
import io
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest
import trustme
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recofuse_protos.inference.v2 import inference_pb2_grpc
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.command.processes import serve_all_in_one, serve_front_end
from service.faces.grpc import server as grpc_api
from service.faces.oip.grpc import InferenceServicer
from service.queue.contract import MemoryQueue
from service.terms import jobs
from service.terms.errors import STATUS, ErrorCode
from service.terms.settings import Settings, SettingsError
from service.watch.metrics import FlowMode
from tests.fakes import FakeEngine, TellingCodec, file_of, pair, picture
from tests.service.conftest import Server, Serving
from tests.service.error_cases import ERROR_CASES, IR, VIS, ErrorCase

ROOT = Path(__file__).parents[4]
FUSE = "/recofuse.v1.FusionService/Fuse"
STREAM = "/recofuse.v1.FusionService/FuseStream"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Face:
    """A running server and a client of its gRPC side."""

    server: Server
    channel: grpc.aio.Channel
    stub: fusion_pb2_grpc.FusionServiceAsyncStub

    @property
    def engine(self) -> FakeEngine:
        return self.server.engine

    def raw_call(self, path: str) -> Callable[..., Awaitable[Any]]:
        """A method that takes any bytes, for messages that no stub would send."""
        call: Callable[..., Awaitable[Any]] = self.channel.unary_unary(path)
        return call


Facing = Callable[..., AbstractAsyncContextManager[Face]]


@pytest.fixture
def facing(serving: Serving) -> Facing:
    @asynccontextmanager
    async def start(engine: FakeEngine | None = None, **groups: dict[str, Any]) -> AsyncIterator[Face]:
        groups["grpc"] = {"port": 0, **groups.get("grpc", {})}
        async with (
            serving(engine, **groups) as server,
            grpc.aio.insecure_channel(server.grpc_address, [("grpc.max_receive_message_length", -1)]) as channel,
        ):
            yield Face(server, channel, fusion_pb2_grpc.FusionServiceStub(channel))

    return start


@pytest.fixture
async def face(facing: Facing) -> AsyncIterator[Face]:
    async with facing() as running:
        yield running


def request(vis: bytes = VIS, ir: bytes = IR, **options: Any) -> pb.FuseRequest:
    return pb.FuseRequest(vis=pb.Image(encoded=vis), ir=pb.Image(encoded=ir), options=pb.FuseOptions(**options))


def frame(sequence: int, vis: bytes = VIS, ir: bytes = IR, **fields: Any) -> pb.FuseStreamRequest:
    return pb.FuseStreamRequest(
        frame=pb.Frame(sequence=sequence, vis=pb.Image(encoded=vis), ir=pb.Image(encoded=ir), **fields)
    )


def raw_frame(sequence: int, vis: pb.RawImage, ir: pb.RawImage) -> pb.FuseStreamRequest:
    return pb.FuseStreamRequest(frame=pb.Frame(sequence=sequence, vis=pb.Image(raw=vis), ir=pb.Image(raw=ir)))


async def one_by_one(messages: Iterable[pb.FuseStreamRequest]) -> AsyncIterator[pb.FuseStreamRequest]:
    for message in messages:
        yield message


async def detail_of(call: Awaitable[Any], code: ErrorCode) -> pb.ErrorDetail:
    """The detail of a call that must fail with this code, checked for everything that all of them have."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return checked(refused.value, code)


def checked(error: grpc.aio.AioRpcError, code: ErrorCode) -> pb.ErrorDetail:
    status = rpc_status.from_call(error)
    assert status is not None, error
    detail = pb.ErrorDetail()
    assert status.details[0].Unpack(detail)
    assert detail.code == code, detail
    assert error.code() is grpc.StatusCode[STATUS[code][1]]
    assert error.code().value[0] == status.code == detail.status
    assert error.details() == status.message == detail.message
    assert dict(error.trailing_metadata())["x-request-id"] == detail.request_id
    return detail


def pixels_of(image: pb.Image) -> NDArray[np.uint8]:
    """An answer's raw picture."""
    raw = image.raw
    channels = {pb.PIXEL_FORMAT_RGB8: 3, pb.PIXEL_FORMAT_MONO8: 1}[raw.pixel_format]
    assert raw.stride == raw.width * channels
    pixels = np.frombuffer(raw.data, np.uint8).reshape(raw.height, raw.width, channels)
    return pixels if channels == 3 else pixels[..., 0]


# unary


async def test_a_pair_comes_back_fused(face: Face) -> None:
    call = face.stub.Fuse(request(), metadata=(("x-request-id", "my-id.1"),))
    answer = await call
    (fused,) = answer.fusion.pictures
    assert (fused.part, fused.media_type) == (pb.PART_FUSED, "image/png")
    decoded = cv2.imdecode(np.frombuffer(fused.image.encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(decoded, picture())
    assert (answer.fusion.model.name, answer.fusion.model.version) == ("fake", "7")
    assert (answer.fusion.width, answer.fusion.height, answer.fusion.batch_size) == (64, 48, 1)
    timings = answer.fusion.timings
    stages = [getattr(timings, f"{stage}_s") for stage in jobs.Stage]
    assert min(stages) > 0
    assert sum(stages) <= timings.total_s
    assert answer.fusion.job_id
    assert answer.request_id == "my-id.1"
    assert dict(await call.trailing_metadata())["x-request-id"] == "my-id.1"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "NPY", "RAW"])
async def test_outputs_and_formats(face: Face, kind: str) -> None:
    for output, parts in {"FUSED": 1, "VIS": 1, "IR": 1, "ALL": 3}.items():
        answer = await face.stub.Fuse(request(output=f"OUTPUT_{output}", format=f"IMAGE_FORMAT_{kind}"))
        assert len(answer.fusion.pictures) == parts
        for shown in answer.fusion.pictures:
            shape = (48, 64) if shown.part == pb.PART_IR else (48, 64, 3)
            if kind == "RAW":
                assert shown.media_type == ""
                assert pixels_of(shown.image).shape == shape
            elif kind == "NPY":
                assert np.load(io.BytesIO(shown.image.encoded), allow_pickle=False).shape == shape
            else:
                assert shown.media_type == f"image/{kind.lower()}"
                decoded = cv2.imdecode(np.frombuffer(shown.image.encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
                assert decoded is not None
                assert decoded.shape == (48, 64, 3)  # WebP has no grey


async def test_options_reach_the_engine(face: Face) -> None:
    await face.stub.Fuse(request(steps=17, sampler="SAMPLER_EULER", seed=99, priority="PRIORITY_HIGH", timeout_ms=5000))
    assert face.engine.batches[-1] == [99]
    assert (face.engine.options[-1].steps, face.engine.options[-1].sampler) == (17, "euler")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (pb.Output, jobs.Output), (pb.Part, jobs.Part), (pb.Priority, jobs.Priority), (pb.FlowControl, FlowMode),
        (pb.PixelFormat, jobs.PixelFormat), (pb.ImageFormat, [*jobs.ImageFormat, "raw"]),
        (pb.Sampler, ["euler", "posterior", "ode1", "ode2"]), (pb.JobStatus, jobs.JobStatus),
        (pb.InfraredSource, ["raw", "palette", "grey"]),
    ],
)  # fmt: skip
def test_the_contract_names_what_the_service_has(kind: Any, names: Iterable[str]) -> None:
    prefix = kind.Name(0).removesuffix("UNSPECIFIED")
    assert {name.removeprefix(prefix).lower() for name in kind.keys()} == {"unspecified", *names}  # noqa: SIM118


async def test_ranges_say_what_becomes_black_and_white(face: Face) -> None:
    deep = file_of(picture().astype(np.uint16) * 16)
    ranges: dict[str, Any] = {"vis_range": pb.VisRange(low=400, high=3600), "ir_range": pb.IrRange(low=30, high=90)}
    answer = await face.stub.Fuse(request(deep, output="OUTPUT_ALL", format="IMAGE_FORMAT_RAW", **ranges))
    _, vis, ir = (pixels_of(shown.image) for shown in answer.fusion.pictures)
    np.testing.assert_array_equal(vis, np.rint(np.clip((picture() * 16.0 - 400) / 3200, 0, 1) * 255))
    np.testing.assert_array_equal(ir, np.rint(np.clip((picture(channels=1, seed=1) - 30.0) / 60, 0, 1) * 255))


async def test_the_answer_says_what_was_read_of_the_infrared_file(
    facing: Facing, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, odd = (file_of(picture(channels=1, seed=seed)) for seed in (7, 8))
    warnings = ("ir: 暖かい, in colour", "a second one")
    TellingCodec.serve(monkeypatch, {raw: ("raw", ()), odd: ("palette", warnings)})
    expected = {
        IR: (pb.INFRARED_SOURCE_GREY, ()),
        raw: (pb.INFRARED_SOURCE_RAW, ()),
        odd: (pb.INFRARED_SOURCE_PALETTE, warnings),
    }
    async with facing() as face:

        def told(fusion: pb.Fusion) -> Any:
            return fusion.infrared_source, tuple(fusion.warnings)

        for ir, wanted in expected.items():
            assert told((await face.stub.Fuse(request(ir=ir))).fusion) == wanted
            job = await face.stub.SubmitFuse(request(ir=ir))
            async with asyncio.timeout(20):
                while (await face.stub.GetJob(pb.JobRequest(job_id=job.id))).status < pb.JOB_STATUS_SUCCEEDED:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert told((await face.stub.GetJobResult(pb.JobRequest(job_id=job.id))).fusion) == wanted
        frames = [frame(number, ir=ir) for number, ir in enumerate(expected)]
        answers = [answer async for answer in face.stub.FuseStream(one_by_one(frames))]
    assert [told(answer.fusion) for answer in answers] == list(expected.values())


@pytest.mark.parametrize("source", ["", "a word of a newer worker"])
def test_a_source_that_is_not_known_is_unspecified(source: str) -> None:
    result = jobs.FusionResult(job_id="j", ir_source=source)
    fusion = grpc_api.fusion_of(result, is_raw=False, started_s=0.0)
    assert fusion.infrared_source == pb.INFRARED_SOURCE_UNSPECIFIED


async def test_idempotency_keys(face: Face) -> None:
    once = (("idempotency-key", "k1"),)
    answers = await asyncio.gather(*(face.stub.Fuse(request(seed=3), metadata=once) for _ in range(4)))
    assert len({answer.fusion.job_id for answer in answers}) == 1
    assert face.engine.batches == [[3]]
    await detail_of(face.stub.Fuse(request(seed=4), metadata=once), ErrorCode.CONFLICT)
    await detail_of(face.stub.Fuse(request(), metadata=(("idempotency-key", "a b"),)), ErrorCode.INVALID_INPUT)


# jobs: the same ones as over HTTP


async def test_a_job_is_submitted_watched_and_fetched(face: Face) -> None:
    face.engine.gate.clear()
    once = (("idempotency-key", "k2"),)
    wanted = request(seed=5, output="OUTPUT_IR", format="IMAGE_FORMAT_RAW", priority="PRIORITY_HIGH", timeout_ms=30_000)
    job = await face.stub.SubmitFuse(wanted, metadata=once)
    assert (await face.stub.SubmitFuse(wanted, metadata=once)).id == job.id
    assert job.status in (pb.JOB_STATUS_QUEUED, pb.JOB_STATUS_RUNNING)
    assert job.priority == pb.PRIORITY_HIGH
    assert job.deadline_s - job.created_s == pytest.approx(30, abs=1e-3)
    named = pb.JobRequest(job_id=job.id)
    await detail_of(face.stub.GetJobResult(named), ErrorCode.NOT_FINISHED)
    face.engine.gate.set()
    while not (seen := await face.stub.GetJob(named)).HasField("finished_s"):  # noqa: ASYNC110 - the server's, not ours
        await asyncio.sleep(0.01)
    assert (seen.status, seen.attempts, seen.HasField("error")) == (pb.JOB_STATUS_SUCCEEDED, 1, False)
    document = (await face.server.client.get(f"/v1/jobs/{job.id}")).json()
    assert (document["id"], document["status"]) == (job.id, "succeeded")
    answer = await face.stub.GetJobResult(named)
    assert answer.fusion.job_id == job.id
    (shown,) = answer.fusion.pictures
    assert (shown.part, shown.media_type) == (pb.PART_IR, "application/x-npy")
    over_http = await face.server.client.get(f"/v1/jobs/{job.id}/result")
    assert over_http.content == shown.image.encoded
    assert over_http.headers["x-picture"] == "ir"


async def test_a_job_that_is_cancelled_or_fails_says_so(face: Face) -> None:
    face.engine.gate.clear()
    await face.stub.SubmitFuse(request())
    waiting = pb.JobRequest(job_id=(await face.stub.SubmitFuse(request(steps=2))).id)
    assert (await face.stub.CancelJob(waiting)).status == pb.JOB_STATUS_CANCELLED
    assert (await face.stub.CancelJob(waiting)).error.code == ErrorCode.CANCELLED
    face.engine.gate.set()
    await detail_of(face.stub.GetJobResult(waiting), ErrorCode.CANCELLED)
    await detail_of(face.stub.GetJob(pb.JobRequest(job_id="0" * 36)), ErrorCode.JOB_NOT_FOUND)
    for odd in ("", "a b", "x" * 65):
        await detail_of(face.stub.CancelJob(pb.JobRequest(job_id=odd)), ErrorCode.INVALID_INPUT)


async def test_models_are_listed_as_over_http(face: Face) -> None:
    (model,) = (await face.stub.ListModels(pb.ListModelsRequest())).models
    (document,) = (await face.server.client.get("/v1/models")).json()["models"]
    assert document == {
        "name": model.name, "version": model.version, "default_steps": model.default_steps,
        "default_sampler": model.default_sampler, "devices": list(model.devices), "num_workers": model.num_workers,
    }  # fmt: skip


# errors: the same ones as over HTTP


async def test_the_same_mistake_is_the_same_error_in_both_faces(face: Face) -> None:
    for name, case in ERROR_CASES.items():
        answer = await face.server.client.post("/v1/fuse", files=case.files(), data=case.form)
        assert (name, answer.json()["code"]) == (name, case.code)
        assert answer.status_code == STATUS[case.code][0]
        detail = await detail_of(face.stub.Fuse(case.message()), case.code)
        if case.vis is not None and case.ir is not None and not case.form:  # words about images are shared too
            assert detail.message == answer.json()["detail"]
    assert face.engine.batches == []
    await face.stub.Fuse(request())


async def test_the_same_mistake_in_a_stream_is_the_same_error(face: Face) -> None:
    cases: list[ErrorCase] = [case for case in ERROR_CASES.values() if not case.form]
    answers = face.stub.FuseStream(
        one_by_one(
            pb.FuseStreamRequest(frame=pb.Frame(sequence=number, vis=case.message().vis, ir=case.message().ir))
            for number, case in enumerate(cases)
        )
    )
    async for answer in answers:
        code = cases[answer.sequence].code
        assert (answer.error.code, answer.error.status) == (code, grpc.StatusCode[STATUS[code][1]].value[0])
        assert answer.stats.failed == answer.sequence + 1
    assert answer.stats.failed == len(cases)


async def test_a_full_queue_refuses_and_says_when_to_come_back(facing: Facing) -> None:
    async with facing(queue={"max_jobs": 1, "retry_after_s": 3.0}) as face:
        face.engine.gate.clear()
        held = asyncio.ensure_future(face.stub.Fuse(request()))
        await asyncio.to_thread(face.engine.started.wait, 5)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await face.stub.Fuse(request())
        assert checked(refused.value, ErrorCode.OVERLOADED).retry_after_s == 3.0
        assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "3000"
        face.engine.gate.set()
        await held


async def test_an_unforeseen_failure_has_no_detail(facing: Facing) -> None:
    async with facing(FakeEngine(poison_seeds=frozenset({13}))) as face:
        detail = await detail_of(face.stub.Fuse(request(seed=13)), ErrorCode.INTERNAL)
        assert "poison" not in detail.message
        await face.stub.Fuse(request())


async def test_unknown_methods(face: Face) -> None:
    for path in ("/recofuse.v1.FusionService/Nothing", "/other.Service/Fuse"):
        await detail_of(face.raw_call(path)(b"x"), ErrorCode.ROUTE_NOT_FOUND)


async def test_bytes_that_are_no_message(face: Face) -> None:
    await detail_of(face.raw_call(FUSE)(b"\xff\xff"), ErrorCode.MALFORMED_REQUEST)
    stream: Any = face.channel.stream_stream(STREAM, response_deserializer=pb.FuseStreamResponse.FromString)
    call = stream()
    await call.write(frame(1).SerializeToString())
    await call.write(b"\xff\xff")
    assert (await call.read()).sequence == 1  # what came before is answered
    await detail_of(call.read(), ErrorCode.MALFORMED_REQUEST)


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60), min_size=10, max_size=10), st.data())
async def test_fuzzed_messages_are_answered_or_refused(
    facing: Facing, garbage: list[bytes], data: st.DataObject
) -> None:
    whole = request().SerializeToString()
    for _ in range(10):
        damaged = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 6))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        garbage.append(bytes(damaged))
    async with facing() as face:
        call = face.raw_call(FUSE)
        accepted = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED}  # it may damage a timeout
        for raw in garbage:
            try:
                await call(raw, timeout=10)
            except grpc.aio.AioRpcError as error:
                assert error.code() in accepted, error  # noqa: PT017
        assert isinstance(await face.stub.Fuse(request()), pb.FuseResponse)


async def test_messages_that_are_too_large(facing: Facing) -> None:
    async with facing(limits={"max_image_bytes": 20_000}) as face:
        await detail_of(face.stub.Fuse(request(vis=bytes(30_000))), ErrorCode.PAYLOAD_TOO_LARGE)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await face.stub.Fuse(request(vis=bytes(200_000)))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await face.stub.Fuse(request())


async def test_messages_are_not_unpacked(face: Face) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await face.stub.Fuse(request(vis=bytes(20_000_000)), compression=grpc.Compression.Gzip)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await face.stub.Fuse(request())


# time


async def test_deadlines_end_the_job_too(face: Face) -> None:
    face.engine.gate.clear()
    first = asyncio.ensure_future(face.stub.Fuse(request()))
    await asyncio.to_thread(face.engine.started.wait, 5)
    started = time.perf_counter()
    with pytest.raises(grpc.aio.AioRpcError) as late:  # by the call's deadline; either side may notice it first
        await face.stub.Fuse(request(seed=1), timeout=0.3)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await detail_of(face.stub.Fuse(request(seed=2, timeout_ms=300)), ErrorCode.TIMED_OUT)
    await detail_of(face.stub.Fuse(request(seed=3, timeout_ms=300), timeout=60), ErrorCode.TIMED_OUT)
    assert time.perf_counter() - started < 3
    face.engine.gate.set()
    await first
    await face.stub.Fuse(request(seed=50), timeout=10_000)  # longer than the longest deadline: cut, not refused
    assert face.engine.batches == [[0], [50]]


async def test_who_hangs_up_cancels(face: Face) -> None:
    face.engine.gate.clear()
    first = asyncio.ensure_future(face.stub.Fuse(request()))
    await asyncio.to_thread(face.engine.started.wait, 5)
    calls = [face.stub.Fuse(request(seed=seed)) for seed in range(1, 9)]
    stream = face.stub.FuseStream(
        one_by_one(
            [
                pb.FuseStreamRequest(options=pb.StreamOptions(fuse=pb.FuseOptions(seed=9))),
                *(frame(number) for number in range(20)),
            ]
        )
    )
    assert await eventually(face, "recofuse_queue_leased 17.0")
    for call in (*calls, stream):
        assert call.cancel()
    assert await eventually(face, "recofuse_queue_leased 1.0")
    face.engine.gate.set()
    await first
    await face.stub.Fuse(request(seed=50))
    assert face.engine.batches == [[0], [50]]
    assert await eventually(face, 'protocol="grpc",route="/recofuse.v1.FusionService/Fuse",status="CANCELLED"} 8.0')


async def eventually(face: Face, line: str, timeout_s: float = 5.0) -> bool:
    """Whether the metrics come to say this."""
    end = time.monotonic() + timeout_s
    while line not in (text := (await face.server.client.get("/metrics")).text):
        if time.monotonic() > end:
            raise AssertionError(f"{line} is not in\n{text}")
        await asyncio.sleep(0.02)
    return True


# streams


def counts(stats: pb.StreamStats) -> dict[str, int]:
    """The counts that are not 0; rates and ages depend on the day."""
    return {field.name: value for field, value in stats.ListFields() if isinstance(value, int)}


async def test_a_stream_keeps_its_order(face: Face) -> None:
    sizes = [(64, 48), (48, 64), (96, 64), (33, 47)]
    files = [pair(*size, seed=index) for index, size in enumerate(sizes)]
    bad = {7: (b"nonsense", IR), 20: (VIS, file_of(picture(64, 64, channels=1)))}
    sent = [frame(10 + 3 * number, *bad.get(number, files[number % 4]), timestamp_ns=-number) for number in range(60)]
    face.engine.gate.clear()  # the first pass waits, so that frames gather behind it
    asyncio.get_running_loop().call_later(0.5, face.engine.gate.set)
    answers = [answer async for answer in face.stub.FuseStream(one_by_one(sent))]
    assert [answer.sequence for answer in answers] == [10 + 3 * number for number in range(60)]
    assert [answer.timestamp_ns for answer in answers] == [-number for number in range(60)]
    for number, answer in enumerate(answers):
        if number in bad:
            assert answer.error.code in (ErrorCode.UNSUPPORTED_MEDIA, ErrorCode.INVALID_INPUT)
            continue
        encoded = answer.fusion.pictures[0].image.encoded
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(decoded, picture(*sizes[number % 4], seed=number % 4))
    assert counts(answers[-1].stats) == {"received": 60, "fused": 58, "failed": 2, "missing": 118}
    assert [answer.previous_sequence for answer in answers[1:]] == [answer.sequence for answer in answers[:-1]]
    assert not answers[0].HasField("previous_sequence")
    assert all(0 < answer.age_s < 60 for answer in answers)
    assert answers[-1].stats.fused_per_s > 0
    assert 0 < answers[-1].stats.age_p50_s <= answers[-1].stats.age_p99_s <= max(answer.age_s for answer in answers)
    assert max(map(len, face.engine.batches)) > 1  # frames of one stream share passes


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([frame(2), frame(2)], "ascending"),
        ([frame(2), frame(1)], "ascending"),
        ([frame(0), pb.FuseStreamRequest(options=pb.StreamOptions())], "first message"),
        ([frame(0), pb.FuseStreamRequest()], "neither"),
        ([frame(0), frame(1), frame(0)], "ascending"),
    ],
)
async def test_a_stream_that_breaks_its_rules_ends_after_its_answers(
    face: Face, messages: list[pb.FuseStreamRequest], words: str
) -> None:
    call = face.stub.FuseStream(one_by_one(messages))
    for message in messages[:-1]:
        answer = await call.read()
        assert isinstance(answer, pb.FuseStreamResponse)
        assert (answer.sequence, answer.WhichOneof("outcome")) == (message.frame.sequence, "fusion")
    assert words in (await detail_of(call.read(), ErrorCode.INVALID_INPUT)).message


@pytest.mark.parametrize(
    "options",
    [
        pb.StreamOptions(max_in_flight=9),
        pb.StreamOptions(flow_control=99),  # type: ignore[arg-type]
        pb.StreamOptions(fuse=pb.FuseOptions(steps=0)),
    ],
)
async def test_a_stream_of_bad_options_ends(face: Face, options: pb.StreamOptions) -> None:
    call = face.stub.FuseStream(one_by_one([pb.FuseStreamRequest(options=options), frame(0)]))
    await detail_of(call.read(), ErrorCode.INVALID_INPUT)


async def test_an_empty_stream_ends_well(face: Face) -> None:
    call = face.stub.FuseStream(one_by_one([]))
    assert [answer async for answer in call] == []
    assert await call.code() is grpc.StatusCode.OK


def grey(width: int, height: int, value: int = 0) -> pb.RawImage:
    data = np.full((height, width), value, np.uint8).tobytes()
    return pb.RawImage(pixel_format=pb.PIXEL_FORMAT_MONO8, width=width, height=height, data=data)


async def test_mode_all_slows_the_sender_and_loses_nothing(face: Face) -> None:
    face.engine.gate.clear()
    total, num_sent = 80, 0

    async def sending() -> AsyncIterator[pb.FuseStreamRequest]:
        nonlocal num_sent
        plane = grey(1280, 960)  # 2.4 MB a pair: the kernel's buffers alone may take tens of megabytes
        yield pb.FuseStreamRequest(options=pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW)))
        for number in range(total):
            yield raw_frame(number, plane, plane)
            num_sent += 1

    answers = face.stub.FuseStream(sending())
    while True:  # until the sender stands still
        before = num_sent
        await asyncio.sleep(0.4)
        if num_sent and num_sent == before:
            break
    assert num_sent < total / 2
    face.engine.gate.set()
    assert [answer.sequence async for answer in answers] == list(range(total))


async def test_a_client_that_does_not_read_is_not_read_from(face: Face) -> None:
    num_sent = 0

    async def sending() -> AsyncIterator[pb.FuseStreamRequest]:
        nonlocal num_sent
        plane = grey(1280, 960)
        options = pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW))
        yield pb.FuseStreamRequest(options=options)
        for number in range(120):
            yield raw_frame(number, plane, plane)
            num_sent += 1

    call = face.stub.FuseStream(sending())
    await call.read()
    while True:
        before = num_sent
        await asyncio.sleep(0.4)
        if num_sent and num_sent == before:
            break
    assert num_sent < 80
    assert sum(map(len, face.engine.batches)) < 80
    call.cancel()


async def test_mode_latest_skips_what_is_stale_and_says_so(face: Face) -> None:
    face.engine.gate.clear()
    call = face.stub.FuseStream()
    options = pb.StreamOptions(flow_control=pb.FLOW_CONTROL_LATEST)
    await call.write(pb.FuseStreamRequest(options=options))
    for number in range(40):
        await call.write(frame(number))
    await call.done_writing()
    assert await eventually(face, 'recofuse_stream_frames_total{mode="latest",outcome="dropped"} 37.0')
    face.engine.gate.set()
    answers = [answer async for answer in call]
    first, second, last = (answer.sequence for answer in answers)  # the second began once the first was in the queue
    assert (first, last) == (0, 39)
    assert [answer.previous_sequence for answer in answers[1:]] == [first, second]
    assert counts(answers[-1].stats) == {"received": 40, "fused": 3, "dropped": 37}
    assert await eventually(face, 'recofuse_stream_frames_total{mode="latest",outcome="fused"} 3.0')


@pytest.mark.parametrize("mode", [pb.FLOW_CONTROL_ALL, pb.FLOW_CONTROL_LATEST])
async def test_a_full_queue_does_not_fail_a_stream(facing: Facing, mode: pb.FlowControl.ValueType) -> None:
    async with facing(queue={"max_jobs": 1}) as face:

        async def sending() -> AsyncIterator[pb.FuseStreamRequest]:
            yield pb.FuseStreamRequest(options=pb.StreamOptions(flow_control=mode, max_in_flight=4))
            for number in range(12):
                yield frame(number)

        answers = [answer async for answer in face.stub.FuseStream(sending())]
        assert {answer.WhichOneof("outcome") for answer in answers} == {"fusion"}
        sequences = [answer.sequence for answer in answers]
        assert sequences == sorted(sequences)
        stats = answers[-1].stats
        assert stats.fused == len(answers)
        if mode == pb.FLOW_CONTROL_ALL:
            assert sequences == list(range(12))
        else:
            assert sequences[-1] == 11
            assert stats.dropped == 12 - len(answers)


async def test_mode_latest_does_not_queue_up_for_a_full_queue(facing: Facing) -> None:
    async with facing(queue={"max_jobs": 1}) as face:
        face.engine.gate.clear()
        held = asyncio.ensure_future(face.stub.Fuse(request()))
        await asyncio.to_thread(face.engine.started.wait, 5)
        call = face.stub.FuseStream()
        options = pb.StreamOptions(flow_control=pb.FLOW_CONTROL_LATEST, max_in_flight=1)
        await call.write(pb.FuseStreamRequest(options=options))
        for number in range(3):  # each finds its predecessor still without a place in the queue
            await call.write(frame(number))
            dropped = f'recofuse_stream_frames_total{{mode="latest",outcome="dropped"}} {number}.0'
            assert await eventually(face, dropped)
        await call.done_writing()
        face.engine.gate.set()
        await held
        (answer,) = [answer async for answer in call]
        assert (answer.sequence, counts(answer.stats)) == (2, {"received": 3, "fused": 1, "dropped": 2})


class Turnstile(threading.Event):
    """A gate that lets one pass through each time it is set."""

    def wait(self, timeout: float | None = None) -> bool:
        is_open = super().wait(timeout)
        self.clear()
        return is_open


@pytest.mark.parametrize("mode", [pb.FLOW_CONTROL_ALL, pb.FLOW_CONTROL_LATEST])
async def test_a_full_queue_serves_streams_in_turn(
    facing: Facing, monkeypatch: pytest.MonkeyPatch, mode: pb.FlowControl.ValueType
) -> None:
    """One place in the queue, three streams that always have something newer: nobody is left behind."""
    num_lined_up, num_turns = 0, 12
    stand_in_line = grpc_api._Stream._stand_in_line

    async def counted(stream: grpc_api._Stream, arrived: grpc_api._Arrived) -> None:
        nonlocal num_lined_up
        num_lined_up += 1
        await stand_in_line(stream, arrived)

    monkeypatch.setattr(grpc_api._Stream, "_stand_in_line", counted)
    async with facing(FakeEngine(gate=Turnstile()), queue={"max_jobs": 1}) as face:
        face.engine.gate.clear()

        async def stream(index: int) -> None:
            call = face.stub.FuseStream()
            fuse = pb.FuseOptions(seed=index)
            options = pb.StreamOptions(fuse=fuse, flow_control=mode, max_in_flight=1)
            await call.write(pb.FuseStreamRequest(options=options))
            for number in range(num_turns):
                await call.write(frame(number))
                assert isinstance(await call.read(), pb.FuseStreamResponse)

        streams = [asyncio.create_task(stream(index)) for index in range(3)]
        end = time.monotonic() + 60
        for turn in range(num_turns):
            # One frame is in the pass, the other streams' stand in line; so who is next is decided.
            while len(face.engine.batches) <= turn or num_lined_up < turn + 2:
                assert time.monotonic() < end
                await asyncio.sleep(0.005)
            face.engine.gate.set()
        turnstile, face.engine.gate = face.engine.gate, threading.Event()
        face.engine.gate.set()  # for whatever is still under way
        turnstile.set()
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    served = [seeds[0] for seeds in face.engine.batches[:num_turns]]
    assert set(served[:3]) == {0, 1, 2}
    assert served[3:] == served[:-3]


async def test_a_frame_that_is_too_large_for_now_holds_up_no_smaller_one(facing: Facing) -> None:
    """The queue has room for bytes of small frames: the large one waits without standing in their way."""
    large, small = grey(64, 48), grey(32, 32)
    async with facing(queue={"max_bytes": 9000}) as face:
        face.engine.gate.clear()
        held = face.stub.FuseStream(one_by_one([raw_frame(0, large, large)]))
        await asyncio.to_thread(face.engine.started.wait, 5)
        waiting = face.stub.FuseStream(one_by_one([raw_frame(0, large, large)]))
        reading = asyncio.ensure_future(waiting.read())
        await asyncio.sleep(0.2)  # until it has been refused, or else this shows nothing
        passing = face.stub.FuseStream(one_by_one([raw_frame(0, small, small)]))
        assert await eventually(face, 'recofuse_jobs_accepted_total{priority="normal"} 2.0', 20)
        face.engine.gate.set()
        for answer in (await held.read(), await reading, await passing.read()):
            assert isinstance(answer, pb.FuseStreamResponse)
            assert answer.WhichOneof("outcome") == "fusion"


async def test_a_frame_that_can_never_fit_is_refused_at_once(facing: Facing) -> None:
    large = grey(64, 48)
    async with facing(queue={"max_bytes": 6000}) as face:
        (answer,) = [answer async for answer in face.stub.FuseStream(one_by_one([raw_frame(0, large, large)]))]
        assert answer.error.code == ErrorCode.PAYLOAD_TOO_LARGE


async def test_a_deadline_passes_in_the_line_too(facing: Facing) -> None:
    async with facing(queue={"max_jobs": 1}) as face:
        face.engine.gate.clear()
        held = asyncio.ensure_future(face.stub.Fuse(request()))
        await asyncio.to_thread(face.engine.started.wait, 5)
        options = pb.FuseStreamRequest(options=pb.StreamOptions(fuse=pb.FuseOptions(timeout_ms=300)))
        # The second stands behind the first; neither holds up who comes after them.
        late = [
            answer
            async for answer in face.stub.FuseStream(one_by_one([options, *(frame(number) for number in range(3))]))
        ]
        assert [answer.error.code for answer in late] == [ErrorCode.TIMED_OUT] * 3
        face.engine.gate.set()
        await held
        (answer,) = [answer async for answer in face.stub.FuseStream(one_by_one([frame(0)]))]
        assert answer.WhichOneof("outcome") == "fusion"


async def test_frames_have_deadlines_of_their_own(facing: Facing) -> None:
    async with facing(queue={"max_jobs": 1}) as face:
        face.engine.gate.clear()
        options = pb.StreamOptions(fuse=pb.FuseOptions(timeout_ms=60_000))
        sent = [frame(0), frame(1, timeout_ms=200), frame(2, timeout_ms=0), frame(3, timeout_ms=2**32 - 1), frame(4)]
        call = face.stub.FuseStream(one_by_one([pb.FuseStreamRequest(options=options), *sent]))
        await asyncio.to_thread(face.engine.started.wait, 5)
        await asyncio.sleep(0.4)
        face.engine.gate.set()
        codes = [answer.error.code async for answer in call]
        assert codes == ["", ErrorCode.TIMED_OUT, ErrorCode.INVALID_INPUT, ErrorCode.INVALID_INPUT, ""]


async def test_stopping_answers_a_streams_frames_and_ends_it(face: Face) -> None:
    face.engine.gate.clear()
    call = face.stub.FuseStream()
    for number in range(4):
        await call.write(frame(number))
    assert await eventually(face, "recofuse_queue_leased 4.0")
    face.server.stop.set()
    await asyncio.sleep(0.1)
    await detail_of(face.stub.Fuse(request()), ErrorCode.UNAVAILABLE)
    face.engine.gate.set()
    for number in range(4):
        answer = await call.read()
        assert isinstance(answer, pb.FuseStreamResponse)
        assert (answer.sequence, answer.WhichOneof("outcome")) == (number, "fusion")
    await detail_of(call.read(), ErrorCode.UNAVAILABLE)
    await asyncio.wait_for(face.server.running, 8)


async def test_a_stream_resumes_where_its_answers_ended(face: Face) -> None:
    first = face.stub.FuseStream()
    for number in range(6):
        await first.write(frame(number))
    for number in range(3):
        answer = await first.read()
        assert isinstance(answer, pb.FuseStreamResponse)
        assert answer.sequence == number
    first.cancel()  # 3 to 5 were fused or not: their sender cannot know
    resumed = pb.FuseStreamRequest(options=pb.StreamOptions(resume_after=2))
    sent = [resumed, *(frame(number) for number in (1, 2, 3, 4, 8))]
    answers = [answer async for answer in face.stub.FuseStream(one_by_one(sent))]
    assert [(answer.previous_sequence, answer.sequence) for answer in answers] == [(2, 3), (3, 4), (4, 8)]
    assert counts(answers[-1].stats) == {"received": 3, "fused": 3, "missing": 3, "skipped": 2}
    assert await eventually(face, 'recofuse_stream_frames_total{mode="all",outcome="skipped"} 2.0')


async def test_a_resumed_stream_says_what_it_never_got(face: Face) -> None:
    for resume_after, first, missing in ((0, 1, 0), (0, 4, 3), (2**64 - 3, 2**64 - 1, 1)):
        options = pb.FuseStreamRequest(options=pb.StreamOptions(resume_after=resume_after))
        (answer,) = [answer async for answer in face.stub.FuseStream(one_by_one([options, frame(first)]))]
        assert (answer.previous_sequence, answer.stats.missing) == (resume_after, missing)


# silence


async def test_a_stream_without_frames_is_ended(facing: Facing) -> None:
    async with facing(grpc={"stream_idle_s": 0.5}) as face:
        face.engine.gate.clear()
        call = face.stub.FuseStream()
        await call.write(frame(1))
        await asyncio.sleep(1.0)  # a frame that is being fused is no silence
        face.engine.gate.set()
        answer = await call.read()
        assert isinstance(answer, pb.FuseStreamResponse)
        assert answer.WhichOneof("outcome") == "fusion"
        assert "no frame came" in (await detail_of(call.read(), ErrorCode.TIMED_OUT)).message
        empty = face.stub.FuseStream()
        await detail_of(empty.read(), ErrorCode.TIMED_OUT)


async def test_silence_may_be_allowed(facing: Facing) -> None:
    async with facing(grpc={"stream_idle_s": 0.0}) as face:
        call = face.stub.FuseStream()
        await asyncio.sleep(0.3)
        await call.write(frame(1))
        assert isinstance(await call.read(), pb.FuseStreamResponse)
        call.cancel()


async def test_a_client_that_takes_no_answers_is_given_up(facing: Facing) -> None:
    async with facing(grpc={"stream_idle_s": 0.5}) as face:
        plane = grey(1280, 960)
        options = pb.StreamOptions(fuse=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW))
        messages = [pb.FuseStreamRequest(options=options), *(raw_frame(number, plane, plane) for number in range(60))]
        call = face.stub.FuseStream(one_by_one(messages))
        assert isinstance(await call.read(), pb.FuseStreamResponse)
        assert await eventually(face, "recofuse_queue_leased 0.0")
        assert await eventually(face, 'recofuse_errors_total{code="timed_out"} 1.0')  # its frames are let go of
        num_fused = sum(map(len, face.engine.batches))
        assert num_fused < 60
        await asyncio.sleep(0.3)
        assert sum(map(len, face.engine.batches)) == num_fused
        call.cancel()


async def test_a_peer_that_falls_silent_is_given_up(facing: Facing) -> None:
    async with facing(grpc={"keep_alive_s": 1.0, "keep_alive_timeout_s": 1.0}) as face:
        async with cut_cable(face.server.grpc_address) as (address, cut), grpc.aio.insecure_channel(address) as channel:
            call = fusion_pb2_grpc.FusionServiceStub(channel).FuseStream()
            face.engine.gate.clear()
            for number in range(8):
                await call.write(frame(number))
            assert await eventually(face, "recofuse_queue_leased 8.0")
            cut.set()  # no FIN, no RST: only unanswered pings can tell
            cancelled = (
                f'recofuse_requests_total{{method="stream",protocol="grpc",route="{STREAM}",status="CANCELLED"}}'
            )
            assert await eventually(face, f"{cancelled} 1.0", timeout_s=20)
            face.engine.gate.set()
            assert await eventually(face, "recofuse_queue_leased 0.0")
            call.cancel()
        assert isinstance(await face.stub.Fuse(request()), pb.FuseResponse)


@asynccontextmanager
async def cut_cable(target: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A TCP relay to `target` that carries nothing more, and closes nothing, once its event is set."""
    cut, tasks, ends = asyncio.Event(), set[asyncio.Task[None]](), set[asyncio.StreamWriter]()
    host, _, port = target.rpartition(":")

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while chunk := await source.read(65536):
            if cut.is_set():
                continue
            sink.write(chunk)
            await sink.drain()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        for source, sink in ((reader, back), (there, writer)):
            ends.add(sink)
            tasks.add(asyncio.create_task(carry(source, sink)))

    relay = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{relay.sockets[0].getsockname()[1]}", cut
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            end.transport.abort()
        await asyncio.gather(*(end.wait_closed() for end in ends), return_exceptions=True)
        relay.close()
        await relay.wait_closed()


# raw frames


@dataclass(frozen=True)
class RawCase:
    """A raw pair, drawn."""

    width: int
    height: int
    vis_format: jobs.PixelFormat
    ir_format: jobs.PixelFormat
    padding: int  # bytes after each row, -1: stride is left out
    is_last_padded: bool
    seed: int


RAW_CASES = st.builds(
    RawCase,
    width=st.integers(16, 30).map(lambda half: 2 * half),
    height=st.integers(16, 24).map(lambda half: 2 * half),
    vis_format=st.sampled_from(jobs.PixelFormat),
    ir_format=st.sampled_from([jobs.PixelFormat.MONO8, jobs.PixelFormat.MONO16, jobs.PixelFormat.NV12]),
    padding=st.integers(-1, 9),
    is_last_padded=st.booleans(),
    seed=st.integers(0, 1000),
)


def raw_image(case: RawCase, pixel_format: jobs.PixelFormat, seed: int) -> tuple[pb.RawImage, NDArray[Any]]:
    """A frame of random bytes, and its rows without padding, as the bytes of each."""
    rng = np.random.default_rng(seed)
    row_bytes = case.width * pixel_format.bytes_per_pixel
    num_rows = case.height * 3 // 2 if pixel_format is jobs.PixelFormat.NV12 else case.height
    rows = rng.integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)
    padding = max(case.padding, 0)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    data = padded.tobytes() if case.is_last_padded else padded.tobytes()[: padded.size - padding]
    image = pb.RawImage(
        pixel_format=pb.PixelFormat.Value(f"PIXEL_FORMAT_{pixel_format.name}"),
        width=case.width,
        height=case.height,
        stride=0 if case.padding == -1 else row_bytes + padding,
        data=data,
    )
    return image, rows


def expected_vis(rows: NDArray[Any], case: RawCase) -> NDArray[Any]:
    match case.vis_format:
        case jobs.PixelFormat.MONO8:
            return np.stack([rows] * 3, axis=2)
        case jobs.PixelFormat.MONO16:  # little endian: the second byte of each pixel is the upper one
            counts = rows[:, ::2] + 256.0 * rows[:, 1::2]
            return np.stack([np.rint(counts / 257).astype(np.uint8)] * 3, axis=2)
        case jobs.PixelFormat.RGB8:
            return np.stack([rows[:, channel::3] for channel in (0, 1, 2)], axis=2)
        case jobs.PixelFormat.BGR8:
            return np.stack([rows[:, channel::3] for channel in (2, 1, 0)], axis=2)
        case jobs.PixelFormat.NV12:
            return np.asarray(cv2.cvtColor(rows, cv2.COLOR_YUV2RGB_NV12))


def expected_ir(rows: NDArray[Any], case: RawCase, low: float, high: float) -> NDArray[Any]:
    values = rows[: case.height].astype(np.float64)
    if case.ir_format is jobs.PixelFormat.MONO16:
        values = values[:, ::2] + 256 * values[:, 1::2]
    elif case.ir_format is jobs.PixelFormat.NV12:  # luma of video range, expanded
        values = np.rint(np.clip((values - 16) * 255 / 219, 0, 255))
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases=st.lists(RAW_CASES, min_size=1, max_size=12),
    ir_range=st.tuples(st.integers(-50, 100), st.integers(120, 60_000)),
)
async def test_raw_frames_arrive_as_numpy_reads_them(
    facing: Facing, cases: list[RawCase], ir_range: tuple[int, int]
) -> None:
    async with facing() as face:
        fuse = pb.FuseOptions(
            output=pb.OUTPUT_ALL,
            format=pb.IMAGE_FORMAT_RAW,
            ir_range=pb.IrRange(low=ir_range[0], high=ir_range[1]),
        )
        pairs = [
            (raw_image(case, case.vis_format, case.seed), raw_image(case, case.ir_format, ~case.seed & 0xFFFF))
            for case in cases
        ]
        messages = [raw_frame(number, vis[0], ir[0]) for number, (vis, ir) in enumerate(pairs)]
        call = face.stub.FuseStream(one_by_one([pb.FuseStreamRequest(options=pb.StreamOptions(fuse=fuse)), *messages]))
        answers = [answer async for answer in call]
    assert [answer.sequence for answer in answers] == list(range(len(cases)))
    for case, (vis, ir), answer in zip(cases, pairs, answers, strict=True):
        fused, clean_vis, clean_ir = answer.fusion.pictures
        assert [fused.part, clean_vis.part, clean_ir.part] == [pb.PART_FUSED, pb.PART_VIS, pb.PART_IR]
        np.testing.assert_array_equal(pixels_of(clean_vis.image), expected_vis(vis[1], case))
        np.testing.assert_array_equal(pixels_of(clean_ir.image), expected_ir(ir[1], case, *ir_range))


async def test_nv12_shows_the_colours_that_it_was_made_from(face: Face) -> None:
    colours = cv2.resize(picture(8, 6), (64, 48), interpolation=cv2.INTER_LINEAR)
    planar = cv2.cvtColor(colours, cv2.COLOR_RGB2YUV_I420)
    chroma = planar[48:].reshape(2, 24, 32)
    nv12 = np.concatenate([planar[:48], np.stack([chroma[0], chroma[1]], axis=2).reshape(24, 64)])
    vis = pb.RawImage(pixel_format=pb.PIXEL_FORMAT_NV12, width=64, height=48, data=nv12.tobytes())
    answer = await face.stub.Fuse(
        pb.FuseRequest(
            vis=pb.Image(raw=vis), ir=pb.Image(encoded=IR), options=pb.FuseOptions(format=pb.IMAGE_FORMAT_RAW)
        )
    )
    (fused,) = answer.fusion.pictures
    assert np.abs(pixels_of(fused.image).astype(int) - colours).mean() < 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pixel_format": 0}, "pixel_format is missing"),
        ({"pixel_format": 99}, "no value 99"),
        ({"width": 0}, "width"),
        ({"height": 2_000_000}, "height"),
        ({"stride": 20}, "stride"),
        ({"stride": 1 << 31}, "stride"),
        ({"data": b"short"}, "bytes"),
        ({"width": 16, "height": 16, "data": bytes(256)}, "at least 32"),
        ({"pixel_format": pb.PIXEL_FORMAT_NV12, "width": 63}, "even"),
    ],
)
async def test_raw_frames_that_cannot_be_are_refused(face: Face, change: dict[str, Any], words: str) -> None:
    raw = grey(64, 48)
    for name, value in change.items():
        setattr(raw, name, value)
    message = pb.FuseRequest(vis=pb.Image(encoded=VIS), ir=pb.Image(raw=raw))
    detail = await detail_of(face.stub.Fuse(message), ErrorCode.INVALID_INPUT)
    assert words in detail.message


# health, reflection, metrics


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


async def test_reflection_lists_and_describes_the_services(face: Face) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(face.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="recofuse.v1.FusionService"),
    ]
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    assert {service.name for service in listed.list_services_response.service} == {
        "recofuse.v1.FusionService",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    (raw,) = described.file_descriptor_response.file_descriptor_proto
    file = FileDescriptorProto.FromString(raw)
    assert file.name == "recofuse/v1/fusion.proto"
    assert {method.name for method in file.service[0].method} == {
            "Fuse", "FuseStream", "SubmitFuse", "GetJob", "GetJobResult", "CancelJob", "ListModels",
        }  # fmt: skip


async def test_metrics_tell_what_happened(face: Face) -> None:
    await face.stub.Fuse(request())
    await detail_of(face.stub.Fuse(pb.FuseRequest()), ErrorCode.INVALID_INPUT)
    await detail_of(face.raw_call("/some/path-of-mine")(b""), ErrorCode.ROUTE_NOT_FOUND)
    assert len([answer async for answer in face.stub.FuseStream(one_by_one([frame(0), frame(1, vis=b"x")]))]) == 2
    text = (await face.server.client.get("/metrics")).text
    for line in (
        f'recofuse_requests_total{{method="unary",protocol="grpc",route="{FUSE}",status="OK"}} 1.0',
        f'recofuse_requests_total{{method="unary",protocol="grpc",route="{FUSE}",status="INVALID_ARGUMENT"}} 1.0',
        f'recofuse_requests_total{{method="stream",protocol="grpc",route="{STREAM}",status="OK"}} 1.0',
        'recofuse_requests_total{method="other",protocol="grpc",route="unmatched",status="UNIMPLEMENTED"} 1.0',
        f'recofuse_request_seconds_count{{protocol="grpc",route="{FUSE}"}} 2.0',
        'recofuse_in_flight{protocol="grpc"} 0.0',
        'recofuse_errors_total{code="invalid_input"} 1.0',
        'recofuse_errors_total{code="unsupported_media"} 1.0',
        'recofuse_stream_frames_total{mode="all",outcome="fused"} 1.0',
        'recofuse_stream_frames_total{mode="all",outcome="failed"} 1.0',
    ):
        assert line in text, line
    assert "path-of-mine" not in text


# TLS and listening


@dataclass(frozen=True)
class Certificates:
    """PEM files of a server, and credentials of clients with and without a certificate of their own."""

    cert: str
    key: str
    authority: str
    anonymous: grpc.ChannelCredentials
    known: grpc.ChannelCredentials


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    server, client = authority.issue_cert("localhost", "127.0.0.1"), authority.issue_cert("client.example")
    server.private_key_pem.write_to_path(str(folder / "key.pem"))
    for blob in server.cert_chain_pems:
        blob.write_to_path(str(folder / "cert.pem"), append=True)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    root = authority.cert_pem.bytes()
    return Certificates(
        cert=str(folder / "cert.pem"),
        key=str(folder / "key.pem"),
        authority=str(folder / "ca.pem"),
        anonymous=grpc.ssl_channel_credentials(root),
        known=grpc.ssl_channel_credentials(
            root, client.private_key_pem.bytes(), b"".join(blob.bytes() for blob in client.cert_chain_pems)
        ),
    )


async def is_served(server: Server, credentials: grpc.ChannelCredentials | None) -> bool:
    """Whether a client with these credentials (None: no TLS) gets an answer."""
    address = server.grpc_address
    channel = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
    async with channel:
        try:
            answer = await fusion_pb2_grpc.FusionServiceStub(channel).Fuse(request(), timeout=5)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017
            return False
        return bool(answer.fusion.pictures)


async def test_tls(serving: Serving, certificates: Certificates) -> None:
    async with serving(grpc={"port": 0, "tls_cert": certificates.cert, "tls_key": certificates.key}) as server:
        assert await is_served(server, certificates.anonymous)
        assert not await is_served(server, None)
        assert not await is_served(server, grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes()))


async def test_mutual_tls(serving: Serving, certificates: Certificates) -> None:
    files = {"tls_cert": certificates.cert, "tls_key": certificates.key, "tls_client_ca": certificates.authority}
    async with serving(grpc={"port": 0, **files}) as server:
        assert await is_served(server, certificates.known)
        assert not await is_served(server, certificates.anonymous)


async def test_what_cannot_be_listened_with_stops_the_start(serving: Serving, certificates: Certificates) -> None:
    async with serving(grpc={"port": 0}) as first:
        taken = int(first.grpc_address.rpartition(":")[2])
        for wrong in (
            {"port": taken},
            {"tls_cert": "/nowhere/cert.pem", "tls_key": certificates.key},
            {"tls_cert": certificates.cert, "tls_key": certificates.cert},
        ):
            with pytest.raises(OSError, match=r"listen|nowhere"):
                async with serving(grpc={"port": 0, **wrong}):
                    pass
        assert await is_served(first, None)


@pytest.mark.parametrize("wrong", [{"tls_cert": "a"}, {"tls_key": "b"}, {"tls_client_ca": "c"}, {"port": -2}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Settings.from_values({"grpc": wrong})


# generated code


@pytest.mark.parametrize(
    ("ours", "generated"),
    [
        (grpc_api._Fusion, fusion_pb2_grpc.FusionServiceServicer),
        (InferenceServicer, inference_pb2_grpc.GRPCInferenceServiceServicer),
    ],
)
def test_no_method_is_left_to_the_generated_refusal(ours: type, generated: type) -> None:
    methods = {name for name in vars(generated) if not name.startswith("_")}
    assert "Fuse" in methods or "ModelInfer" in methods
    assert methods <= set(vars(ours))


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "proto" / "generate.py"), str(tmp_path)], check=True)
    fresh = {path.relative_to(tmp_path): path.read_text("utf-8") for path in tmp_path.rglob("*.py*")}
    folder = ROOT / "service" / "pb"
    kept = {path.relative_to(folder) for path in folder.rglob("*.py*") if "__pycache__" not in path.parts}
    assert set(fresh) == kept
    for path, text in fresh.items():
        assert (folder / path).read_text("utf-8") == text, f"{path} differs; run make proto"
