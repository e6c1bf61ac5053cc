"""The HTTP contract, over a real socket: pairs, jobs, models, and an orderly end."""

from __future__ import annotations

import asyncio
import json
import re
import time

import cv2
import httpx
import numpy as np
import pytest

from service.faces.http.forms import IMAGE_FIELDS, OPTION_FIELDS
from service.terms.errors import ErrorCode
from service.terms.jobs import MAX_WARNINGS, Stage
from tests.fakes import picture
from tests.service.conftest import Server, Serving
from tests.service.faces.http.asking import FILES, finished, problem


async def test_a_pair_comes_back_fused(server: Server) -> None:
    answer = await server.client.post("/v1/fuse", files=FILES, headers={"X-Request-ID": "my-id.1"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-request-id"] == "my-id.1"
    assert (answer.headers["x-model-name"], answer.headers["x-model-version"]) == ("fake", "7")
    assert re.findall(r"(\w+);dur=[\d.]+", answer.headers["server-timing"]) == list(Stage)
    decoded = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(decoded, picture())


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
    async with asyncio.timeout(20):  # a client that is cancelled while it connects may leave its socket behind
        while 'recofuse_in_flight{protocol="http"} 10.0' not in (await server.client.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    await asyncio.sleep(0.2)
    server.engine.gate.set()
    assert (await first).status_code == 200
    assert (await server.client.post("/v1/fuse", files=FILES, data={"seed": 50})).status_code == 200
    assert server.engine.batches == [[0], [50]]


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


async def test_the_description_is_complete(server: Server) -> None:
    document = (await server.client.get("/openapi.json")).json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) == 23
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
