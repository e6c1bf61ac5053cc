"""Answers with pictures: formats, the zip, and what their headers tell."""

from __future__ import annotations

import io
import json
import re
import zipfile
from typing import Any
from urllib.parse import unquote

import cv2
import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from service.faces.gateway import Gateway
from service.faces.http.app import build_app
from service.queue.memory import MemoryQueue
from service.terms.jobs import MAX_WARNINGS, FusionResult, Part
from service.terms.settings import Settings
from service.watch.metrics import Metrics
from tests.fakes import TellingCodec, file_of, picture
from tests.service.conftest import Server, Serving
from tests.service.faces.http.asking import FILES, VIS, finished


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
