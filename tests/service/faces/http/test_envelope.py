"""What every request goes through: ids, metrics, HEAD, and large answers in pieces."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import numpy as np
from fastapi import Response
from prometheus_client import CollectorRegistry

from service.faces.gateway import Gateway
from service.faces.http.app import build_app
from service.queue.memory import MemoryQueue
from service.terms.settings import Settings
from service.watch.metrics import Metrics
from tests.service.conftest import Server
from tests.service.faces.http.asking import FILES, finished


async def test_an_id_that_could_forge_log_lines_is_replaced(server: Server) -> None:
    answer = await server.client.get("/health/live", headers={"X-Request-ID": "a b" + "c" * 200})
    assert re.fullmatch(r"[0-9a-f]{24}", answer.headers["x-request-id"])


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


async def test_head_is_get_without_the_body(server: Server) -> None:
    accepted = await server.client.post("/v1/fuse", files=FILES, headers={"Prefer": "respond-async"})
    job = accepted.headers["location"]
    assert (await finished(server.client, job))["status"] == "succeeded"
    document = (await server.client.get("/openapi.json")).json()
    paths = {path for path, operations in document["paths"].items() if "get" in operations}
    assert len(paths) > 12
    values = {"{job_id}": job.rpartition("/")[2], "{model_name}": "recofuse", "{model_version}": "7"}
    for path in {
        *paths,
        "/",
        "/docs",
        "/openapi.json",
        "/playground/page.js",
        "/v1/jobs/other",
        "/nothing",
        "/v1/fuse",
    }:
        for name, value in values.items():
            path = path.replace(name, value)
        got, headed = await server.client.get(path), await server.client.head(path)
        assert headed.status_code == got.status_code, path
        assert headed.content == b""
        ignored = {"x-request-id", "date"} | (
            {"content-length"} if path == "/metrics" or got.status_code > 400 else set()
        )
        for answer in (got, headed):
            assert answer.status_code == 304 or int(answer.headers["content-length"]) > 0, path
            for name in ignored & set(answer.headers):
                del answer.headers[name]
        assert headed.headers == got.headers, path
    text = (await server.client.get("/metrics")).text
    assert re.search(r'_requests_total\{[^}]*method="HEAD"[^}]*route="/v1/jobs/\{job_id\}/result"', text), text
