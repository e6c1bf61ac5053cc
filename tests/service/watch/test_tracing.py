"""Traces across real processes, received by a real OTLP/HTTP endpoint; and that nothing is traced without one."""

from __future__ import annotations

import asyncio
import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from benchmarks.load import ask, fuse_request, get_request, png
from benchmarks.processes import Stack, all_in_one, can_split, clean_environ, free_port, split
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.command.environment import read_settings
from service.terms.jobs import Stage
from service.terms.settings import LogSettings, SettingsError, TraceSettings
from service.watch import logs, tracing
from service.watch.metrics import RequestTimer
from tests.fakes import pair
from tests.service.watch.otlp import Receiver, Span, receiving

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")

VIS, IR = pair()
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CALLER}-01"
STAGES = [stage.value for stage in Stage]
SETTINGS: dict[str, dict[str, object]] = {"engine": {"kind": "null"}, "log": {"level": "WARNING"}}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture(autouse=True)
def _empty(receiver: Receiver) -> None:
    with receiver.arrived:
        receiver.spans.clear()


def traced(receiver: Receiver, **trace: object) -> dict[str, dict[str, object]]:
    return {**SETTINGS, "trace": {"endpoint": receiver.url, "delay_s": 0.05, **trace}}


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def stack(receiver: Receiver, grpc_port: int) -> Iterator[Stack]:
    with all_in_one({**traced(receiver), "grpc": {"port": grpc_port}}) as running:
        yield running


def one(spans: list[Span], name: str) -> Span:
    (found,) = (span for span in spans if span.name == name)
    return found


def expect_one_tree(spans: list[Span], request_name: str) -> tuple[Span, Span]:
    """The request's span, the job's below it and the stages' below that; returns the first two."""
    assert {span.trace_id for span in spans} == {TRACE}
    request, job = one(spans, request_name), one(spans, "job")
    assert request.parent_id == CALLER
    assert job.parent_id == request.span_id
    assert [one(spans, stage).parent_id for stage in STAGES] == [job.span_id] * len(STAGES)
    assert all(span.start_ns <= span.end_ns for span in spans)
    assert one(spans, "queue").start_ns == job.start_ns
    assert one(spans, "model").attributes["recofuse.batch_size"] == "1"
    assert one(spans, "model").end_ns <= one(spans, "encode").end_ns <= job.end_ns
    assert job.attributes["recofuse.outcome"] == "succeeded"
    assert (job.attributes["recofuse.attempt"], job.attributes["recofuse.width"]) == ("1", "64")
    return request, job


async def test_a_request_over_http_is_one_trace(stack: Stack, receiver: Receiver) -> None:
    headers = f"traceparent: {PARENT}\r\nX-Request-ID: mine\r\n"
    assert (await ask(stack.address, get_request("/metrics"))).status == 200  # probes leave none
    assert (await ask(stack.address, fuse_request(VIS, IR, headers=headers))).status == 200
    spans = await asyncio.to_thread(receiver.wait_for, 7)
    assert len(spans) == 7
    request, job = expect_one_tree(spans, "POST /v1/fuse")
    assert request.attributes["recofuse.status"] == "200"
    assert request.attributes["recofuse.request_id"] == job.attributes["recofuse.request_id"] == "mine"
    assert receiver.paths == {"/v1/traces"}


async def test_a_call_over_grpc_is_one_trace(stack: Stack, receiver: Receiver, grpc_port: int) -> None:
    vis, ir = (pb.Image(encoded=data) for data in (VIS, IR))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        await stub.Fuse(pb.FuseRequest(vis=vis, ir=ir), timeout=20, metadata=(("traceparent", PARENT),))
    spans = await asyncio.to_thread(receiver.wait_for, 7)
    request, _ = expect_one_tree(spans, "/recofuse.v1.FusionService/Fuse")
    assert request.attributes["recofuse.status"] == "OK"


async def test_frames_of_a_stream_belong_to_its_trace(stack: Stack, receiver: Receiver, grpc_port: int) -> None:
    vis, ir = (pb.Image(encoded=data) for data in (VIS, IR))
    frames = [pb.FuseStreamRequest(frame=pb.Frame(sequence=number, vis=vis, ir=ir)) for number in range(3)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        answers = [answer async for answer in stub.FuseStream(iter(frames), metadata=(("traceparent", PARENT),))]
    assert [answer.sequence for answer in answers] == [0, 1, 2]
    spans = await asyncio.to_thread(receiver.wait_for, 3 * 6 + 1)
    stream = one(spans, "/recofuse.v1.FusionService/FuseStream")
    assert stream.parent_id == CALLER
    jobs = [span for span in spans if span.name == "job"]
    assert [job.parent_id for job in jobs] == [stream.span_id] * 3
    assert len({job.attributes["recofuse.request_id"] for job in jobs}) == 3


async def test_a_request_without_a_parent_starts_a_trace_of_its_own(stack: Stack, receiver: Receiver) -> None:
    for given in ("", "traceparent: 00-zz\r\n"):
        assert (await ask(stack.address, fuse_request(VIS, IR, headers=given))).status == 200
    spans = await asyncio.to_thread(receiver.wait_for, 14)
    requests = [span for span in spans if span.name == "POST /v1/fuse"]
    assert [span.parent_id for span in requests] == ["", ""]
    assert len({span.trace_id for span in spans}) == 2


async def test_a_caller_who_does_not_sample_is_not_traced(stack: Stack, receiver: Receiver) -> None:
    for flags in ("00", "01"):
        headers = f"traceparent: 00-{TRACE}-{CALLER}-{flags}\r\n"
        assert (await ask(stack.address, fuse_request(VIS, IR, headers=headers))).status == 200
    assert len(await asyncio.to_thread(receiver.wait_for, 7)) == 7  # only the second; they are sent in order


async def test_refused_requests_are_traced_too(stack: Stack, receiver: Receiver) -> None:
    damaged = png(64, 48, b"\xff" * 500)  # only the decoder finds out
    headers = f"traceparent: {PARENT}\r\n"
    assert (await ask(stack.address, fuse_request(damaged, IR, headers=headers))).status == 422
    spans = await asyncio.to_thread(receiver.wait_for, 3)
    assert {span.name for span in spans} == {"POST /v1/fuse", "job", "queue"}
    assert one(spans, "job").attributes["recofuse.outcome"] == "invalid_input"
    assert not any(span.is_error for span in spans)  # the fault is the caller's


@pytest.mark.redis
async def test_a_trace_crosses_the_queue_into_another_process(receiver: Receiver) -> None:
    if why_not := can_split():
        pytest.skip(why_not)
    headers = f"traceparent: {PARENT}\r\n"
    with split({**traced(receiver, service_name="fusion"), "grpc": {"port": -1}}) as stack:
        assert (await ask(stack.address, fuse_request(VIS, IR, headers=headers))).status == 200
    spans = await asyncio.to_thread(receiver.wait_for, 7)  # the last of them were sent when the processes ended
    request, job = expect_one_tree(spans, "POST /v1/fuse")
    assert (request.role, job.role) == ("front-end", "worker")
    assert {span.role for span in spans if span.name in STAGES} == {"worker"}


def test_a_collector_that_is_away_holds_nothing_up() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with all_in_one({**SETTINGS, "grpc": {"port": -1}, "trace": {"endpoint": endpoint}}) as stack:
        assert asyncio.run(ask(stack.address, fuse_request(VIS, IR))).status == 200
        assert stack.processes["serve"].stop() == 0


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = (
        "import asyncio, sys\nfrom service.watch import tracing\nfrom service.terms.settings import TraceSettings\n"
        "async def main():\n    async with tracing.opened(TraceSettings(), 'worker', '0') as tracer:\n"
        "        assert tracer is tracing.NO_TRACES\nasyncio.run(main())\n"
        "sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=clean_environ({})).returncode == 0


def test_the_standard_variable_is_taken_unless_ours_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://theirs:4318")
    assert read_settings().trace.endpoint == "http://theirs:4318"
    monkeypatch.setenv("RECOFUSE_TRACE__ENDPOINT", "http://ours:4318")
    assert read_settings().trace.endpoint == "http://ours:4318"


async def test_an_endpoint_without_the_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"recofuse\[otel\]"):
        async with tracing.opened(TraceSettings(endpoint="http://localhost:4318"), "worker", "0"):
            pass


@pytest.mark.parametrize(
    "given",
    ["", "00", PARENT + "-more", PARENT.upper(), PARENT.replace(TRACE, "0" * 32), PARENT.replace(CALLER, "0" * 16),
     "ff" + PARENT[2:], PARENT + "\n"],
)  # fmt: skip
def test_a_traceparent_that_is_none_goes_no_further(given: str) -> None:
    assert tracing.accepted_traceparent(given) == ""
    with tracing.NO_TRACES.request("/v1/fuse", RequestTimer(), given):
        assert logs.traceparent.get() == ""


def test_a_trace_is_passed_on_without_tracing_and_stands_in_the_logs() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    handler.addFilter(logs.RequestIdFilter())
    logger = logging.getLogger("tests.tracing")
    logger.addHandler(handler)
    try:
        with tracing.NO_TRACES.request("/v1/fuse", RequestTimer(), PARENT):
            assert logs.traceparent.get() == PARENT
            logger.warning("within")
    finally:
        logger.removeHandler(handler)
        logs.traceparent.set("")
    assert f'"trace_id": "{TRACE}"' in stream.getvalue()
    assert LogSettings().format == "json"
