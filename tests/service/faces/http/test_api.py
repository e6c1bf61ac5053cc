"""The HTTP contract, over a real socket."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
import time
import zipfile
from collections.abc import AsyncIterator
from typing import Any, Literal
from urllib.parse import unquote

import cv2
import httpx
import numpy as np
import pytest
from fastapi import Response
from prometheus_client import CollectorRegistry

from service.faces.gateway import Gateway
from service.faces.http.app import IMAGE_FIELDS, OPTION_FIELDS, build_app
from service.queue.contract import MemoryQueue
from service.terms.errors import STATUS, ErrorCode
from service.terms.jobs import MAX_WARNINGS, FusionResult, Part, Stage
from service.terms.settings import Settings
from service.watch.metrics import Metrics
from tests.fakes import FakeEngine, TellingCodec, file_of, pair, picture
from tests.images.files import BAD_FILES, png_header
from tests.service.conftest import Server, Serving

VIS, IR = pair()
FILES = {"vis": ("v.png", VIS), "ir": ("i.png", IR)}


def problem(answer: httpx.Response, code: ErrorCode) -> dict[str, Any]:
    """The answer's problem document, checked for everything that all of them have."""
    document: dict[str, Any] = answer.json()
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert document["code"] == code
    assert answer.status_code == document["status"] == STATUS[code][0]
    assert document["request_id"] == answer.headers["x-request-id"]
    assert document["title"]
    assert document["type"] == f"urn:recofuse:problem:{code}"
    return document


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[Server]:
    async with serving() as running:
        yield running


async def finished(client: httpx.AsyncClient, location: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            document: dict[str, Any] = (await client.get(location)).json()
            if document["status"] not in ("queued", "running"):
                return document
            await asyncio.sleep(0.01)


async def test_a_pair_comes_back_fused(server: Server) -> None:
    answer = await server.client.post("/v1/fuse", files=FILES, headers={"X-Request-ID": "my-id.1"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-request-id"] == "my-id.1"
    assert (answer.headers["x-model-name"], answer.headers["x-model-version"]) == ("fake", "7")
    assert re.findall(r"(\w+);dur=[\d.]+", answer.headers["server-timing"]) == list(Stage)
    decoded = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(decoded, picture())


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "npy"])
@pytest.mark.parametrize("output", ["fused", "vis", "ir", "all"])
async def test_outputs_and_formats(server: Server, output: str, kind: str) -> None:
    answer = await server.client.post("/v1/fuse", files=FILES, data={"output": output, "format": kind})
    assert answer.status_code == 200
    if output == "all":
        assert answer.headers["content-type"] == "application/zip"
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            names = [f"{part}.{kind}" for part in ("fused", "vis", "ir")]
            assert archive.namelist() == [*names, "result.json"]
            described = json.loads(archive.read("result.json"))
            assert described["files"] == dict(zip(("fused", "vis", "ir"), names, strict=True))
    elif kind == "npy":
        array = np.load(io.BytesIO(answer.content), allow_pickle=False)
        assert array.shape == ((48, 64) if output == "ir" else (48, 64, 3))
    else:
        assert answer.headers["content-type"] == f"image/{kind}"
        decoded = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_UNCHANGED)
        assert decoded is not None
        assert decoded.shape[:2] == (48, 64)


@pytest.mark.parametrize("place", ["data", "params"])
async def test_options_reach_the_engine(server: Server, place: Literal["data", "params"]) -> None:
    """From the form and from the query string."""
    data = {
        "steps": "17",
        "sampler": "euler",
        "seed": "99",
        "priority": "high",
        "timeout_ms": "5000",
        "vis_range": "0,4095",
        "ir_range": "1,9.5",
    }
    asked: dict[str, Any] = {place: data}
    assert (await server.client.post("/v1/fuse", files=FILES, **asked)).status_code == 200
    assert server.engine.batches[-1] == [99]
    assert (server.engine.options[-1].steps, server.engine.options[-1].sampler) == (17, "euler")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output", "everything"), ("format", "bmp"), ("steps", "0"), ("steps", "many"), ("steps", "1001"),
        ("sampler", "magic"), ("seed", "-1"), ("seed", str(2**63)), ("priority", "urgent"), ("timeout_ms", "0"),
        ("timeout_ms", "-5"), ("timeout_ms", "soon"), ("timeout_ms", "999999999"), ("ir_range", "9,1"),
        ("ir_range", "1"), ("ir_range", "a,b"), ("ir_range", "nan,1"), ("ir_range", "0,inf"), ("seed", "\N{SNOWMAN}"),
        ("vis_range", "9,1"), ("vis_range", "1"), ("vis_range", "a,b"), ("vis_range", "nan,1"), ("vis_range", "0,inf"),
    ],
)  # fmt: skip
async def test_options_that_cannot_be_are_refused(server: Server, field: str, value: str) -> None:
    in_form = await server.client.post("/v1/fuse", files=FILES, data={field: value})
    in_query = await server.client.post("/v1/fuse", files=FILES, params={field: value})
    document = problem(in_form, ErrorCode.INVALID_INPUT)
    assert field.split("_")[0] in document["detail"]
    assert problem(in_query, ErrorCode.INVALID_INPUT)["detail"] == document["detail"]


async def test_ranges_say_what_becomes_black_and_white(server: Server) -> None:
    deep = {"vis": file_of(picture().astype(np.uint16) * 16), "ir": IR}
    for name, low, high, source in (("vis", 400, 3600, picture() * 16.0), ("ir", 30, 90, picture(channels=1, seed=1))):
        data = {"output": name, "format": "npy", f"{name}_range": f"{low},{high}"}
        answer = await server.client.post("/v1/fuse", files=deep, data=data)
        assert answer.status_code == 200, answer.text
        expected = np.rint(np.clip((source - float(low)) / (high - low), 0, 1) * 255)
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), expected)


async def test_the_answer_says_what_was_read_of_the_infrared_file(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: file_of(picture(channels=1, seed=seed)) for seed, name in enumerate(("raw", "palette", "odd"), 5)}
    odd = ("ir: in colour, a photograph?", "温度 100% \n", "é" * 500, *"abcdef")
    told: dict[bytes, Any] = {
        files["raw"]: ("raw", ()),
        files["palette"]: ("palette", ("ir: the legend of the palette is in the picture",)),
        files["odd"]: ("grey", odd),
    }
    TellingCodec.serve(monkeypatch, told)
    async with serving() as server:
        plain = await server.client.post("/v1/fuse", files=FILES)
        assert plain.headers["x-infrared-source"] == "grey"
        assert "x-warning" not in plain.headers
        for source in ("raw", "palette"):
            for more in ({}, {"output": "all"}):
                answer = await server.client.post("/v1/fuse", files={"vis": VIS, "ir": files[source]}, data=more)
                assert answer.headers["x-infrared-source"] == source
                assert answer.headers.get_list("x-warning") == list(told[files[source]][1])
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            described = json.loads(archive.read("result.json"))
        assert (described["infrared_source"], described["warnings"]) == ("palette", list(told[files["palette"]][1]))
        accepted = await server.client.post(
            "/v1/fuse", files={"vis": VIS, "ir": files["odd"]}, headers={"Prefer": "respond-async"}
        )
        await finished(server.client, accepted.headers["location"])
        answer = await server.client.get(f"{accepted.headers['location']}/result")
    lines = answer.headers.get_list("x-warning")
    assert answer.headers["x-infrared-source"] == "grey"
    assert len(lines) == MAX_WARNINGS
    assert all(line.isascii() and len(line) < 500 for line in lines)
    assert lines[0] == "ir: in colour%2C a photograph?"  # lines of one name may be joined with commas on their way
    joined = [unquote(line) for line in ", ".join(lines).split(", ")]
    assert joined[:2] == ["ir: in colour, a photograph?", "温度 100%"]
    assert re.fullmatch(r"é{20,}\.\.\.", joined[2])
    assert joined[3:] == ["a", "b"]


async def test_what_an_older_or_newer_worker_says_of_the_infrared_file_is_no_headers_trouble() -> None:
    """The front end repeats only words of its own contract, and bounds what others did not."""
    values = Settings()
    queue = MemoryQueue(values.queue)
    app = build_app(Gateway(queue, values, Metrics(CollectorRegistry())), values, Metrics(CollectorRegistry()))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for source, warnings in (("", ()), ("radar", ("\udce9\r\nX-Evil: 1",) * 50)):
            accepted = await client.post("/v1/fuse", files=FILES, headers={"Prefer": "respond-async"})
            (lease,) = await queue.take("w", max_jobs=1, wait_s=1)
            result = FusionResult(
                job_id=lease.job.id,
                images={Part.FUSED: VIS},
                media_type="image/png",
                ir_source=source,
                warnings=warnings,
            )
            await queue.finish(lease, result)
            answer = await client.get(f"{accepted.headers['location']}/result")
            assert answer.content == VIS
            assert "x-infrared-source" not in answer.headers
            assert answer.headers.get_list("x-warning") == ["?%0D%0AX-Evil: 1"] * min(len(warnings), MAX_WARNINGS)


async def test_bad_images_are_the_callers_fault_and_the_server_goes_on(server: Server) -> None:
    good = file_of(picture(64, 48, channels=1))
    cases = {
        **{f"vis {name}": {"vis": case[0], "ir": good} for name, case in BAD_FILES.items()},
        **{f"ir {name}": {"vis": VIS, "ir": case[0]} for name, case in BAD_FILES.items()},
        "other aspect": {"vis": VIS, "ir": file_of(picture(64, 64, channels=1))},
    }
    for name, (fields) in cases.items():
        answer = await server.client.post("/v1/fuse", files={key: (key, data) for key, data in fields.items()})
        assert answer.status_code in (413, 415, 422), name
        problem(answer, ErrorCode(answer.json()["code"]))
        assert name.split()[0] in answer.json()["detail"] or name == "other aspect"
    assert server.engine.batches == []
    assert (await server.client.post("/v1/fuse", files=FILES)).status_code == 200


async def test_bad_forms_are_refused(server: Server) -> None:
    client = server.client
    missing = problem(await client.post("/v1/fuse", files={"vis": FILES["vis"]}), ErrorCode.INVALID_INPUT)
    assert "ir is missing" in missing["detail"]
    problem(await client.post("/v1/fuse", files={**FILES, "extra": b"x"}), ErrorCode.INVALID_INPUT)
    problem(await client.post("/v1/fuse", files=[*FILES.items(), ("ir", IR)]), ErrorCode.INVALID_INPUT)
    problem(await client.post("/v1/fuse", files={**FILES, "ir": b""}), ErrorCode.INVALID_INPUT)
    problem(await client.post("/v1/fuse", json={"vis": 1}), ErrorCode.UNSUPPORTED_MEDIA)
    problem(await client.post("/v1/fuse"), ErrorCode.UNSUPPORTED_MEDIA)
    problem(
        await client.post("/v1/fuse", content=b"x", headers={"Content-Type": "multipart/form-data"}),
        ErrorCode.MALFORMED_REQUEST,
    )
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for body in (b"", b"--b\r\n", b"garbage", b'--b\r\nContent-Disposition: form-data; name="vis"\r\n\r\nabc'):
        problem(await client.post("/v1/fuse", content=body, headers=form), ErrorCode.MALFORMED_REQUEST)
    no_name = b"--b\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--b--\r\n"
    problem(await client.post("/v1/fuse", content=no_name, headers=form), ErrorCode.INVALID_INPUT)


async def test_all_uploads_together_are_bounded(serving: Serving) -> None:
    """A body costs memory from its first byte on, and the queue's bound begins with the last one."""
    goes_on = asyncio.Event()
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    head = b'--x\r\nContent-Disposition: form-data; name="vis"\r\n\r\n'

    async def slow() -> AsyncIterator[bytes]:
        yield head + bytes(80_000)
        await goes_on.wait()
        yield b"\r\n--x--\r\n"

    async with serving(http={"max_uploads_bytes": 100_000}) as server:

        async def other(path: str) -> httpx.Response:
            return await server.client.post(path, content=head + bytes(30_000), headers=kind)

        holding = asyncio.create_task(server.client.post("/v1/fuse", content=slow(), headers=kind))
        async with asyncio.timeout(20):
            while (refused := await other("/v1/fuse")).status_code != 429:  # until the first one's bytes are there
                problem(refused, ErrorCode.MALFORMED_REQUEST)
        problem(refused, ErrorCode.OVERLOADED)
        assert refused.headers["retry-after"] == "1"
        assert (await other("/v2/models/recofuse/infer")).status_code == 429
        goes_on.set()
        problem(await holding, ErrorCode.INVALID_INPUT)
        for _ in range(5):
            problem(await other("/v1/fuse"), ErrorCode.MALFORMED_REQUEST)


async def test_an_endless_body_is_cut_off_while_it_streams(serving: Serving) -> None:
    async with serving(limits={"max_image_bytes": 100_000}) as server:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            yield b'--b\r\nContent-Disposition: form-data; name="vis"\r\n\r\n'
            while sent < 400_000_000:
                sent += 500_000
                yield bytes(500_000)

        try:
            answer = await server.client.post(
                "/v1/fuse", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"}
            )
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            pass  # the connection was closed while more was being sent
        else:
            problem(answer, ErrorCode.PAYLOAD_TOO_LARGE)
        assert sent < 60_000_000
        announced = await server.client.post("/v1/fuse", files={**FILES, "vis": bytes(400_000)})
        problem(announced, ErrorCode.PAYLOAD_TOO_LARGE)
        assert (await server.client.post("/v1/fuse", files=FILES)).status_code == 200


async def test_a_body_that_does_not_end_is_given_up(serving: Serving) -> None:
    async with serving(http={"body_timeout_s": 0.2}) as server:

        async def stuck() -> AsyncIterator[bytes]:
            yield b"--b\r\n"
            await asyncio.sleep(1)

        answer = await server.client.post(
            "/v1/fuse", content=stuck(), headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        assert "pauses of up to 0.2 s" in problem(answer, ErrorCode.TIMED_OUT)["detail"]


async def test_unknown_addresses_and_methods(server: Server) -> None:
    problem(await server.client.get("/v1/nothing"), ErrorCode.ROUTE_NOT_FOUND)
    wrong = await server.client.get("/v1/fuse")
    problem(wrong, ErrorCode.METHOD_NOT_ALLOWED)
    assert wrong.headers["allow"] == "POST"
    problem(await server.client.get("/v1/jobs/unknown"), ErrorCode.JOB_NOT_FOUND)
    problem(await server.client.get("/v1/jobs/unknown/result"), ErrorCode.JOB_NOT_FOUND)
    problem(await server.client.delete("/v1/jobs/unknown"), ErrorCode.JOB_NOT_FOUND)
    problem(await server.client.get("/v1/jobs/no%20id"), ErrorCode.INVALID_INPUT)


async def test_asynchronous_jobs(server: Server) -> None:
    server.engine.gate.clear()
    accepted = await server.client.post("/v1/fuse", files=FILES, headers={"Prefer": "respond-async, wait=5"})
    assert (accepted.status_code, accepted.headers["preference-applied"]) == (202, "respond-async")
    location = accepted.headers["location"]
    assert location == f"/v1/jobs/{accepted.json()['id']}"
    early = await server.client.get(f"{location}/result")
    problem(early, ErrorCode.NOT_FINISHED)
    assert early.headers["retry-after"] == "1"
    server.engine.gate.set()
    document = await finished(server.client, location)
    assert document["status"] == "succeeded"
    for _ in range(2):  # it can be read again
        answer = await server.client.get(document["result"])
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert (await server.client.delete(location)).json()["status"] == "succeeded"


async def test_a_waiting_job_says_how_many_wait(serving: Serving) -> None:
    async with serving(batch={"max_batch": 1}, worker={"max_held": 1}) as server:
        server.engine.gate.clear()
        asking = {"Prefer": "respond-async"}
        first = await server.client.post("/v1/fuse", files=FILES, headers=asking)
        await asyncio.to_thread(server.engine.started.wait, 5)
        for num_queued in (1, 2):
            waiting = await server.client.post("/v1/fuse", files=FILES, headers=asking)
            assert (waiting.json()["status"], waiting.json()["num_queued"]) == ("queued", num_queued)
        document = (await server.client.get(first.headers["location"])).json()
        assert (document["status"], document["num_queued"]) == ("running", None)
        assert (await server.client.get(waiting.headers["location"])).json()["num_queued"] == 2
        assert (await server.client.delete(waiting.headers["location"])).json()["num_queued"] is None


async def test_cancelling_a_job(server: Server) -> None:
    server.engine.gate.clear()
    await server.client.post("/v1/fuse", files=FILES, headers={"Prefer": "respond-async"})
    await asyncio.to_thread(server.engine.started.wait, 5)
    waiting = await server.client.post("/v1/fuse", files=FILES, data={"seed": 7}, headers={"Prefer": "respond-async"})
    location = waiting.headers["location"]
    assert (await server.client.delete(location)).json()["status"] == "cancelled"
    server.engine.gate.set()
    problem(await server.client.get(f"{location}/result"), ErrorCode.CANCELLED)
    assert (await server.client.post("/v1/fuse", files=FILES)).status_code == 200
    assert [7] not in server.engine.batches


async def test_idempotency_keys(server: Server) -> None:
    once = {"Idempotency-Key": "k1"}
    answers = await asyncio.gather(
        *(server.client.post("/v1/fuse", files=FILES, data={"seed": 3}, headers=once) for _ in range(4))
    )
    assert len({answer.headers["x-job-id"] for answer in answers}) == 1
    assert {answer.status_code for answer in answers} == {200}
    assert server.engine.batches == [[3]]
    other = await server.client.post("/v1/fuse", files=FILES, data={"seed": 4}, headers=once)
    problem(other, ErrorCode.CONFLICT)
    spaced = await server.client.post("/v1/fuse", files=FILES, headers={"Idempotency-Key": "k" * 256})
    problem(spaced, ErrorCode.INVALID_INPUT)


async def test_a_full_queue_refuses_at_once(serving: Serving) -> None:
    async with serving(queue={"max_jobs": 2, "retry_after_s": 3.0}) as server:
        server.engine.gate.clear()
        held = [asyncio.create_task(server.client.post("/v1/fuse", files=FILES)) for _ in range(6)]
        first = asyncio.as_completed(held)
        for answer in [await next(first) for _ in range(4)]:  # the other two wait for the gate
            problem(answer, ErrorCode.OVERLOADED)
            assert answer.headers["retry-after"] == "3"
        server.engine.gate.set()
        assert sorted([(await task).status_code for task in held]) == [200, 200, 429, 429, 429, 429]


async def test_a_deadline_is_kept(server: Server) -> None:
    server.engine.gate.clear()
    started = time.perf_counter()
    late = await server.client.post("/v1/fuse", files=FILES, data={"timeout_ms": "200"})
    problem(late, ErrorCode.TIMED_OUT)
    assert time.perf_counter() - started < 2


async def test_who_hangs_up_cancels(server: Server) -> None:
    server.engine.gate.clear()
    first = asyncio.create_task(server.client.post("/v1/fuse", files=FILES))
    await asyncio.to_thread(server.engine.started.wait, 5)
    gone = [
        asyncio.create_task(server.client.post("/v1/fuse", files=FILES, data={"seed": seed})) for seed in range(1, 9)
    ]
    await asyncio.sleep(0.3)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    await asyncio.sleep(0.2)
    server.engine.gate.set()
    assert (await first).status_code == 200
    assert (await server.client.post("/v1/fuse", files=FILES, data={"seed": 50})).status_code == 200
    assert server.engine.batches == [[0], [50]]


async def test_an_unforeseen_failure_is_a_problem_without_detail(serving: Serving) -> None:
    async with serving(FakeEngine(poison_seeds=frozenset({13}))) as server:
        answer = await server.client.post("/v1/fuse", files=FILES, data={"seed": 13})
        assert "poison" not in problem(answer, ErrorCode.INTERNAL)["detail"]
        assert (await server.client.post("/v1/fuse", files=FILES)).status_code == 200


async def test_stopping_answers_what_was_accepted_and_refuses_the_rest(serving: Serving) -> None:
    async with serving() as server:
        server.engine.gate.clear()
        accepted = [asyncio.create_task(server.client.post("/v1/fuse", files=FILES)) for _ in range(5)]
        await asyncio.sleep(0.3)
        server.stop.set()
        await asyncio.sleep(0.1)
        problem(await server.client.post("/v1/fuse", files=FILES), ErrorCode.UNAVAILABLE)
        ready = await server.client.get("/health/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
        assert (await server.client.get("/health/live")).status_code == 200
        server.engine.gate.set()
        assert {(await task).status_code for task in accepted} == {200}
        await asyncio.wait_for(server.running, 10)
        with pytest.raises(httpx.ConnectError):
            await server.client.get("/health/live")


async def test_ready_means_warm(serving: Serving) -> None:
    async with serving() as server:
        assert (await server.client.get("/health/ready")).json() == {"status": "ready", "reason": "ready"}
        (model,) = (await server.client.get("/v1/models")).json()["models"]
        assert (model["name"], model["default_steps"], model["num_workers"]) == ("fake", 3, 1)


async def test_metrics_tell_what_happened(server: Server) -> None:
    await server.client.post("/v1/fuse", files=FILES)
    await server.client.post("/v1/fuse", files={"vis": FILES["vis"]})
    await server.client.get("/v1/jobs/some-id")
    await server.client.get("/random/path")
    text = (await server.client.get("/metrics")).text
    for line in (
        'recofuse_requests_total{method="POST",protocol="http",route="/v1/fuse",status="200"} 1.0',
        'recofuse_requests_total{method="POST",protocol="http",route="/v1/fuse",status="422"} 1.0',
        'recofuse_requests_total{method="GET",protocol="http",route="/v1/jobs/{job_id}",status="404"} 1.0',
        'recofuse_requests_total{method="GET",protocol="http",route="unmatched",status="404"} 1.0',
        'recofuse_errors_total{code="invalid_input"} 1.0',
        'recofuse_jobs_finished_total{status="succeeded"} 1.0',
        'recofuse_stage_seconds_count{stage="model"} 1.0',
        'recofuse_queue_depth{priority="normal"} 0.0',
        'recofuse_workers{state="warm"} 1.0',
        'recofuse_workers{state="warming"} 0.0',
        'recofuse_model_info{device="none",name="fake",version="7"} 1.0',
        "recofuse_batch_size_count 1.0",
    ):
        assert line in text, line
    assert "some-id" not in text


async def test_the_description_is_complete(server: Server) -> None:
    document = (await server.client.get("/openapi.json")).json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) == 22
    for operation in operations:
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and operation["summary"] not in ("Is new work welcome", "Prometheus metrics"):
                assert list(answer["content"]) == ["application/problem+json"], (operation["summary"], status)
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))
    assert set(references) <= set(document["components"]["schemas"])
    form = document["paths"]["/v1/fuse"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {*OPTION_FIELDS, *IMAGE_FIELDS}
    assert form["properties"]["vis_range"]["pattern"] == form["properties"]["ir_range"]["pattern"]
    for path, method in (("/v1/fuse", "post"), ("/v1/jobs/{job_id}/result", "get")):
        headers = document["paths"][path][method]["responses"]["200"]["headers"]
        assert headers["X-Infrared-Source"]["schema"]["enum"] == ["raw", "palette", "grey"]
        assert headers["X-Warning"]["schema"]["maxItems"] == MAX_WARNINGS
    page = (await server.client.get("/docs")).text
    assert "openapi.json" in page
    assert not re.findall(r"(?:src|href)=\"https?:", page)


async def test_an_id_that_could_forge_log_lines_is_replaced(server: Server) -> None:
    answer = await server.client.get("/health/live", headers={"X-Request-ID": "a b" + "c" * 200})
    assert re.fullmatch(r"[0-9a-f]{24}", answer.headers["x-request-id"])


async def test_bytes_that_are_not_http_do_not_hurt(server: Server) -> None:
    port = server.client.base_url.port
    assert port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, family=socket.AF_INET)
    writer.write(b"\x16\x03\x01" + png_header(3, 3))
    await writer.drain()
    await asyncio.wait_for(reader.read(), 5)
    writer.close()
    await writer.wait_closed()
    assert (await server.client.get("/health/live")).status_code == 200


async def test_a_large_answer_is_handed_over_as_it_is_taken() -> None:
    """What is handed over at once is complete for uvicorn, which over TLS leaves a slow client half of it."""
    values = Settings()
    handed: list[Any] = []
    metrics = Metrics(CollectorRegistry())
    app = build_app(Gateway(MemoryQueue(values.queue), values, metrics), values, metrics)
    noise = np.random.default_rng(0).bytes(3_000_000)

    @app.get("/large")
    async def large() -> Response:
        return Response(noise)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            handed.append(message)

    scope = {"type": "http", "method": "GET", "path": "/large", "headers": [], "query_string": b"", "root_path": ""}
    await app(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]
    assert b"".join(message["body"] for message in handed) == noise
    assert max(len(message["body"]) for message in handed) <= 1_000_000
    assert [message.get("more_body", False) for message in handed] == [True] * (len(handed) - 1) + [False]
