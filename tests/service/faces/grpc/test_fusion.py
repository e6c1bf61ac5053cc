"""FusionService over a real socket with a real client: pairs, jobs, models, deadlines; the same errors as over HTTP."""

from __future__ import annotations

import asyncio
import io
import time
from typing import Any

import cv2
import grpc
import numpy as np
import pytest

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from service.terms import jobs
from service.terms.errors import STATUS, ErrorCode
from tests.fakes import TellingCodec, file_of, picture
from tests.service.error_cases import ERROR_CASES, IR, ErrorCase
from tests.service.faces.grpc.face import Face, Facing, detail_of, eventually, frame, one_by_one, pixels_of, request

# pairs


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
    for name, expected in (
        ("AS_SHOT", "as_shot"), ("LIT", "lit"), ("UNSPECIFIED", face.engine.info.default_exposure)
    ):  # fmt: skip
        await face.stub.Fuse(request(exposure=f"EXPOSURE_{name}"))
        assert face.engine.options[-1].exposure == expected


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
        "default_exposure": model.default_exposure, "exposures": list(model.exposures),
    }  # fmt: skip
    assert list(model.exposures) == ["as_shot", "lit"]
    assert model.default_exposure == face.engine.info.default_exposure


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
