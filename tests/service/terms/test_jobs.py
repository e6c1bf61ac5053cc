"""Jobs and results come back from their bytes as they were; other bytes are refused."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recofuse_rigs.rig import Distortion, Rig
from service.terms.errors import ErrorCode, MalformedRequestError, TimedOutError
from service.terms.jobs import (
    MAX_WARNING_CHARS,
    MAX_WARNINGS,
    OVERLAYS,
    RESULT_MAGIC,
    Exposure,
    FusionJob,
    FusionOptions,
    FusionResult,
    ImageFormat,
    JobStatus,
    Output,
    Part,
    PixelFormat,
    Priority,
    RawLayout,
    Stage,
    WorkerInfo,
    new_job_id,
    printable,
)
from service.terms.measures import Alarm, Region
from service.terms.records import joined

TIMES = st.floats(0, 4e9)
OPTIONS = st.builds(
    FusionOptions,
    output=st.sampled_from(Output),
    format=st.sampled_from([kind for kind in ImageFormat if kind is not ImageFormat.NPY]),
    metadata=st.sampled_from(["drop", "keep"]),
    steps=st.none() | st.integers(1, 1000),
    sampler=st.none() | st.sampled_from(["euler", "posterior", "ode1", "ode2"]),
    seed=st.integers(0, 2**63 - 1),
    vis_range=st.none() | st.tuples(st.floats(-1e6, 0, exclude_max=True), st.floats(0, 1e6)),
    ir_range=st.none() | st.tuples(st.floats(-1e6, 0, exclude_max=True), st.floats(0, 1e6)),
    exposure=st.none() | st.sampled_from(get_args(Exposure)),
    colour=st.sampled_from(OVERLAYS),
    colour_range=st.none() | st.tuples(st.floats(-1e6, 0, exclude_max=True), st.floats(0, 1e6)),
    values=st.none() | st.sampled_from(["npy", "tiff"]),
    degrees=st.none() | st.tuples(st.floats(0.01, 9), st.floats(-1e6, 1e6)),
    alarm=st.sampled_from(["60C", "-7.5", "8200"]),
    outline=st.booleans(),
)
LAYOUTS = st.none() | st.builds(
    RawLayout,
    pixel_format=st.sampled_from(PixelFormat),
    width=st.integers(1, 99),
    height=st.integers(1, 99),
    stride=st.integers(1, 999),
)
RIGS = st.none() | st.builds(
    lambda x, y, name, lens: Rig((640, 480), (320, 256), (2.0, 0.1, x, -0.1, 1.9, y, 1e-5, 0.0, 1.0), name, lens),
    st.floats(-100, 100),
    st.floats(-100, 100),
    st.sampled_from(["", "roof"]),
    st.none() | st.just(Distortion((400.0, 410.0), (160.0, 128.0), (-0.1, 0.01, 0.0, 0.001, 0.0))),
)
JOBS = st.builds(
    FusionJob,
    id=st.builds(new_job_id),
    vis=st.binary(max_size=50),
    ir=st.binary(max_size=50),
    width=st.integers(1, 9999),
    height=st.integers(1, 9999),
    created_s=TIMES,
    deadline_s=st.none() | TIMES,
    options=OPTIONS,
    priority=st.sampled_from(Priority),
    request_id=st.text(max_size=20),
    traceparent=st.none() | st.text(max_size=20),
    keep_result=st.booleans(),
    vis_layout=LAYOUTS,
    ir_layout=LAYOUTS,
    rig=RIGS,
    track=st.sampled_from(["", "AQ=="]),
    means=st.none() | st.binary(max_size=50),
    history=st.none() | st.binary(max_size=50),
)
VALUES = st.floats(-1e6, 1e6)
REGIONS = st.builds(Region, box=st.just((1, 2, 3, 4)), hottest=VALUES, centroid=st.just((1.5, 2.5)))
ALARMS = st.builds(
    Alarm, threshold=VALUES, hottest=st.none() | VALUES, regions=st.lists(REGIONS, max_size=2).map(tuple)
)
RESULTS = st.builds(
    FusionResult,
    job_id=st.builds(new_job_id),
    images=st.dictionaries(st.sampled_from(Part), st.binary(max_size=50)),
    media_type=st.sampled_from([kind.media_type for kind in ImageFormat]),
    timings_s=st.dictionaries(st.sampled_from(Stage), st.floats(0, 100)),
    model_name=st.text(max_size=10),
    batch_size=st.integers(0, 99),
    width=st.integers(0, 9999),
    error_code=st.none() | st.sampled_from(ErrorCode),
    error_message=st.text(max_size=50),
    ir_source=st.sampled_from(["", "raw", "palette", "grey", "not known yet"]),
    warnings=st.lists(st.text(max_size=20), max_size=3).map(tuple),
    values=st.binary(max_size=50),
    values_type=st.sampled_from(["", "image/tiff"]),
    values_unit=st.sampled_from([None, "counts", "celsius"]),
    alarm=st.none() | ALARMS,
    seen=st.binary(max_size=50),
    history=st.binary(max_size=50),
)


@settings(deadline=None, max_examples=80)
@given(JOBS)
def test_a_job_survives_its_bytes(job: FusionJob) -> None:
    assert FusionJob.from_bytes(job.to_bytes()) == job
    assert FusionJob.from_parts(job.header_bytes(), *job.payloads) == job


@settings(deadline=None, max_examples=80)
@given(RESULTS)
def test_a_result_survives_its_bytes(result: FusionResult) -> None:
    back = FusionResult.from_bytes(result.to_bytes())
    assert back == result
    assert list(back.images) == list(result.images)


@settings(deadline=None, max_examples=80)
@given(JOBS, st.data())
def test_cut_or_foreign_bytes_are_refused(job: FusionJob, data: st.DataObject) -> None:
    raw = job.to_bytes()
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(MalformedRequestError):
        FusionJob.from_bytes(raw[:cut])
    with pytest.raises(MalformedRequestError):
        FusionJob.from_bytes(raw + b"!")
    with pytest.raises(MalformedRequestError):
        FusionResult.from_bytes(raw)


@settings(deadline=None, max_examples=80)
@given(st.binary(max_size=80))
def test_garbage_is_refused(raw: bytes) -> None:
    for magic in (b"", b"RFJ1", b"RFJ1\x04\0\0\0"):
        with pytest.raises(MalformedRequestError):
            FusionJob.from_bytes(magic + raw)


@settings(deadline=None, max_examples=40)
@given(JOBS, JOBS)
def test_a_fingerprint_is_of_the_request_alone(one: FusionJob, other: FusionJob) -> None:
    same = FusionJob(
        id=new_job_id(), vis=one.vis, ir=one.ir, options=one.options, width=1, height=1, created_s=0.0,
        vis_layout=one.vis_layout, ir_layout=one.ir_layout, rig=one.rig,
    )  # fmt: skip
    assert same.fingerprint() == one.fingerprint()
    asked = [(job.vis, job.ir, job.options, job.vis_layout, job.ir_layout, job.rig) for job in (one, other)]
    assert (one.fingerprint() == other.fingerprint()) == (asked[0] == asked[1])


def test_a_result_knows_its_status_and_error() -> None:
    late = FusionResult.failed("j", TimedOutError("too late"))
    assert late.status is JobStatus.EXPIRED
    with pytest.raises(TimedOutError, match="too late"):
        late.raise_for_error()
    fine = FusionResult(job_id="j", images={Part.VIS: b"1234"})
    fine.raise_for_error()
    assert (fine.status, fine.size_bytes) == (JobStatus.SUCCEEDED, 4)


def test_all_asks_for_every_part_in_order() -> None:
    assert Output.ALL.parts == (Part.FUSED, Part.VIS, Part.IR)
    assert [output.parts for output in (Output.FUSED, Output.VIS, Output.IR)] == [(part,) for part in Part]


def test_fresh_ids_can_be_typed_into_a_command_line() -> None:
    ids = {new_job_id() for _ in range(500)}
    assert len(ids) == 500
    assert not any(each.startswith("-") for each in ids)


def test_a_worker_of_a_newer_release_is_understood() -> None:
    """During a rolling update it meets front ends of the older one, whose readiness must not fail with it."""
    known = WorkerInfo(
        id="w1", model_name="m", model_version="1", device="cpu", default_steps=4, default_sampler="ode1",
        batch_sizes=(1, 2), is_warm=True, started_s=1.0,
    )  # fmt: skip
    told = known.model_dump_json()[:-1] + ',"memory_bytes":7}'
    assert WorkerInfo.model_validate_json(told) == known
    assert WorkerInfo.model_config["frozen"]


def with_another_field(raw: bytes) -> bytes:
    """A record as a newer release might write it."""
    end = 8 + int.from_bytes(raw[4:8], "little")
    header = raw[8 : end - 1] + b',"colour_space":"srgb"}'
    return raw[:4] + len(header).to_bytes(4, "little") + header + raw[end:]


@settings(deadline=None, max_examples=10)
@given(RESULTS, JOBS)
def test_newer_results_are_understood_and_newer_jobs_are_not_guessed(result: FusionResult, job: FusionJob) -> None:
    assert FusionResult.from_bytes(with_another_field(result.to_bytes())) == result
    with pytest.raises(MalformedRequestError):  # whatever the field asks for, it would not be done
        FusionJob.from_bytes(with_another_field(job.to_bytes()))


def without_fields(raw: bytes, *names: str) -> bytes:
    """A record as an older release wrote it."""
    end = 8 + int.from_bytes(raw[4:8], "little")
    fields = json.loads(raw[8:end])
    for name in names:
        del fields[name]
    header = json.dumps(fields).encode()
    return raw[:4] + len(header).to_bytes(4, "little") + header + raw[end:]


def test_results_of_workers_that_say_nothing_of_the_infrared_file_are_understood() -> None:
    told = FusionResult(job_id="j", images={Part.IR: b"1234"}, width=9, ir_source="raw", warnings=("a",))
    older = FusionResult.from_bytes(without_fields(told.to_bytes(), "ir_source", "warnings"))
    assert older == FusionResult(job_id="j", images={Part.IR: b"1234"}, width=9)
    assert (older.ir_source, older.warnings) == ("", ())


def test_an_older_worker_takes_the_jobs_that_ask_for_nothing_new() -> None:
    """It refuses options that it does not know, and knows those below."""
    options = json.loads(FusionOptions(ir_range=(1, 2)).model_dump_json())
    assert set(options) == {"output", "format", "steps", "sampler", "seed", "ir_range"}
    assert json.loads(FusionOptions(vis_range=(1, 2)).model_dump_json())["vis_range"] == [1, 2]
    for named in get_args(Exposure):  # it is said: what names none may come to mean another one
        assert json.loads(FusionOptions(exposure=named).model_dump_json())["exposure"] == named


def test_a_job_that_names_no_exposure_has_the_bytes_of_the_older_format() -> None:
    older = (
        b'{"id":"j","options":{"output":"fused","format":"png","steps":null,"sampler":null,"seed":5,"ir_range":null},'
        b'"priority":"normal","width":3,"height":2,"created_s":1.5,"deadline_s":null,"request_id":"","traceparent":null,'
        b'"keep_result":false,"vis_layout":null,"ir_layout":null,"sizes":[1,2]}'
    )
    job = FusionJob(id="j", vis=b"v", ir=b"ir", width=3, height=2, created_s=1.5, options=FusionOptions(seed=5))
    assert job.header_bytes() == older
    assert FusionJob.from_parts(older, b"v", b"ir") == job
    assert FusionJob.from_parts(older, b"v", b"ir").options.exposure is None


def test_a_record_whose_rig_is_none_is_refused() -> None:
    rig = Rig((640, 480), (320, 256), (2.0, 0.0, 0.5, 0.0, 1.9, 0.4, 0.0, 0.0, 1.0))
    job = FusionJob(id="j", vis=b"v", ir=b"ir", width=3, height=2, created_s=1.5, rig=rig)
    header = json.loads(job.header_bytes())
    assert FusionJob.from_parts(json.dumps(header).encode(), b"v", b"ir") == job
    for wrong in (header["rig"].replace("2.0", "0.0", 1), "{}", "roof"):
        with pytest.raises(MalformedRequestError, match="rig"):
            FusionJob.from_parts(json.dumps({**header, "rig": wrong}).encode(), b"v", b"ir")


def test_an_idempotency_key_tells_colours_apart() -> None:
    def asking(options: FusionOptions) -> str:
        return FusionJob(id="j", vis=b"v", ir=b"i", width=3, height=2, created_s=1.5, options=options).fingerprint()

    asked = (FusionOptions(), FusionOptions(colour="iron"), FusionOptions(colour="iron", colour_range=(1, 2)))
    assert len({asking(options) for options in asked}) == 3


def test_an_idempotency_key_tells_rigs_apart() -> None:
    def asking(x: float | None) -> str:
        rig = None if x is None else Rig((64, 48), (64, 48), (1.0, 0.0, x, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
        return FusionJob(id="j", vis=b"v", ir=b"i", width=3, height=2, created_s=1.5, rig=rig).fingerprint()

    assert len({asking(x) for x in (None, 0.0, 1.0)}) == 3


def test_an_idempotency_key_tells_exposures_apart() -> None:
    def asking(named: Exposure | None) -> str:
        options = FusionOptions(exposure=named)
        return FusionJob(id="j", vis=b"v", ir=b"i", width=3, height=2, created_s=1.5, options=options).fingerprint()

    assert len({asking(named) for named in (None, "as_shot", "lit")}) == 3


def test_a_worker_of_an_older_release_offers_pictures_as_shot() -> None:
    told = (
        '{"id":"w1","model_name":"m","model_version":"1","device":"cpu","default_steps":4,"default_sampler":"ode1",'
        '"batch_sizes":[1,2],"is_warm":true,"started_s":1.0}'
    )
    older = WorkerInfo.model_validate_json(told)
    assert (older.default_exposure, older.exposures) == ("as_shot", ("as_shot",))


@pytest.mark.parametrize("name", ["vis_range", "ir_range"])
@pytest.mark.parametrize("wrong", [(9, 1), (1, 1), (1,), (1, 2, 3), ("a", "b"), (float("nan"), 1), (0, float("inf"))])
def test_a_range_is_two_ascending_finite_numbers(name: str, wrong: Any) -> None:
    assert getattr(FusionOptions.model_validate({name: ("-1", "2.5")}), name) == (-1, 2.5)
    with pytest.raises(ValueError, match=name):
        FusionOptions.model_validate({name: wrong})


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=400), max_size=8))
def test_warnings_are_few_short_printable_lines(warnings: list[str]) -> None:
    told = printable(warnings)
    assert len(told) <= MAX_WARNINGS
    for line in told:
        assert line
        assert line.isprintable()
        assert len(line) <= MAX_WARNING_CHARS
        assert line.encode()


def test_a_decent_warning_stays_as_it_is() -> None:
    decent = ("ir: 640x480 in colour, and no palette fits: is it a photograph?", "ir: 暖かい")
    assert printable(decent) == decent
    assert printable(["", " \n ", "a\x1b[31m\nb"]) == ("a?[31m b",)


def test_a_history_that_was_cut_short_is_refused() -> None:
    job = FusionJob(id="j", vis=b"v", ir=b"ir", width=3, height=2, created_s=1.5, history=b"abc")
    for payloads in ((b"v", b"ir"), (b"v", b"ir", b"ab"), (b"v", b"ir", b"abc", b"")):
        with pytest.raises(MalformedRequestError, match="announced"):
            FusionJob.from_parts(job.header_bytes(), *payloads)
    with pytest.raises(MalformedRequestError, match="6 payload bytes"):
        FusionJob.from_bytes(job.to_bytes()[:-1])


def test_an_answer_of_an_older_worker_has_no_history() -> None:
    result = FusionResult(job_id="j", images={Part.IR: b"i"}, values=b"v")
    header = json.loads(result.header_bytes())
    del header["history_bytes"]
    assert FusionResult.from_bytes(joined(RESULT_MAGIC, json.dumps(header).encode(), (b"i", b"v"))) == result
