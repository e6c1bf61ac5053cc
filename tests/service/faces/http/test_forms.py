"""Forms and the options in the query string: what they may say, and what becomes of it."""

from __future__ import annotations

import io
import tracemalloc
from typing import Any, Literal

import numpy as np
import pytest
from starlette.requests import Request

from benchmarks.load import BOUNDARY, fuse_request
from service.access.held import Held
from service.faces.http.forms import OPTION_FIELDS, read_form
from service.terms.errors import ErrorCode
from service.terms.settings import Settings
from tests.fakes import file_of, picture
from tests.images.files import BAD_FILES
from tests.service.conftest import Server
from tests.service.faces.http.asking import FILES, IR, VIS, finished, problem


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
    for exposure, expected in (("as_shot", "as_shot"), ("lit", "lit"), ("", server.engine.info.default_exposure)):
        asked = {place: {"exposure": exposure}}
        assert (await server.client.post("/v1/fuse", files=FILES, **asked)).status_code == 200
        assert server.engine.options[-1].exposure == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output", "everything"), ("format", "bmp"), ("steps", "0"), ("steps", "many"), ("steps", "1001"),
        ("sampler", "magic"), ("exposure", "bright"), ("exposure", "LIT"),
        ("seed", "-1"), ("seed", str(2**63)), ("priority", "urgent"), ("timeout_ms", "0"),
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


# options in the query string


async def test_options_may_come_in_form_and_query_together(server: Server) -> None:
    answer = await server.client.post("/v1/fuse?output=ir&seed=5", files=FILES, data={"format": "jpeg", "steps": "4"})
    assert (answer.headers["x-picture"], answer.headers["content-type"]) == ("ir", "image/jpeg")
    assert server.engine.batches[-1] == [5]
    assert server.engine.options[-1].steps == 4
    submitted = await server.client.post("/v1/fuse?output=all", files=FILES, headers={"Prefer": "respond-async"})
    assert (await finished(server.client, submitted.headers["location"]))["status"] == "succeeded"
    result = await server.client.get(submitted.headers["location"] + "/result")
    assert result.headers["content-type"] == "application/zip"


@pytest.mark.parametrize(
    ("query", "form", "told"),
    [
        ("stepz=3&seed=1&flavour=2", {}, "no query parameter 'stepz', 'flavour'; accepted are output, "),
        ("vis=1", {}, "'vis'"),
        ("Seed=1", {}, "'Seed'"),
        ("=1", {}, "''"),
        ("%FF%00=1", {}, "accepted are"),
        ("stepz=", {}, "'stepz'"),
        ("seed=1&seed=1", {}, "seed is there more than once"),
        ("seed=1&seed=2", {}, "seed is there more than once"),
        ("seed=1", {"seed": "1"}, "seed is in the query string as well"),
        ("steps=many", {}, "steps"),
        ("seed=%E2%98%83", {}, "seed is not plain text"),
    ],
)
async def test_what_the_query_may_not_say_is_refused(
    server: Server, query: str, form: dict[str, str], told: str
) -> None:
    answer = await server.client.post(f"/v1/fuse?{query}", files=FILES, data=form)
    assert told in problem(answer, ErrorCode.INVALID_INPUT)["detail"]
    assert server.engine.batches == []


async def test_a_value_in_the_query_is_as_long_as_one_in_the_form(server: Server) -> None:
    long = "1" * 1025
    for answer in (
        await server.client.post(f"/v1/fuse?seed={long}", files=FILES),
        await server.client.post("/v1/fuse", files=FILES, data={"seed": long}),
    ):
        assert "seed has more than the accepted 1024 bytes" in problem(answer, ErrorCode.PAYLOAD_TOO_LARGE)["detail"]


async def test_the_description_names_the_options_in_the_query(server: Server) -> None:
    operation = (await server.client.get("/openapi.json")).json()["paths"]["/v1/fuse"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    described = {entry["name"]: entry["schema"] for entry in operation["parameters"] if entry["in"] == "query"}
    assert described == {name: form[name] for name in OPTION_FIELDS}
    assert len(described) == sum(entry["in"] == "query" for entry in operation["parameters"])
    headers = {entry["name"] for entry in operation["parameters"] if entry["in"] == "header"}
    assert headers == {"prefer", "idempotency-key"}


async def test_an_empty_option_is_an_absent_one(server: Server) -> None:
    empty = dict.fromkeys(OPTION_FIELDS, "")
    query = "&".join(f"{name}=" for name in OPTION_FIELDS)
    plain = await server.client.post("/v1/fuse", files=FILES)
    for answer in (
        await server.client.post("/v1/fuse", files=FILES, data=empty),
        await server.client.post(f"/v1/fuse?{query}", files=FILES),
        await server.client.post(f"/v1/fuse?{query}", files=FILES, data={**empty, "output": "fused"}),
        await server.client.post("/v1/fuse?output=fused", files=FILES, data=empty),
    ):
        assert answer.status_code == 200, answer.text
        assert answer.content == plain.content
    filled = await server.client.post("/v1/fuse?output=ir&seed=", files=FILES, data={**empty, "seed": "8"})
    assert (filled.headers["x-picture"], server.engine.batches[-1]) == ("ir", [8])


async def test_no_more_than_one_copy_of_an_upload_is_held_while_it_is_read() -> None:
    body = fuse_request(bytes(8 << 20), bytes(2 << 20)).partition(b"\r\n\r\n")[2]
    content_type = b"multipart/form-data; boundary=" + BOUNDARY
    scope = {"type": "http", "method": "POST", "query_string": b"", "headers": [(b"content-type", content_type)]}
    pieces = iter(range(0, len(body), 1 << 16))

    async def receive() -> dict[str, Any]:
        at = next(pieces)
        piece = bytes(memoryview(body)[at : at + (1 << 16)])  # fresh memory, as from a socket
        return {"type": "http.request", "body": piece, "more_body": at + len(piece) < len(body)}

    with Held(1 << 30, retry_after_s=1.0).holding() as holding:
        tracemalloc.start()
        try:
            form = await read_form(Request(scope, receive), Settings(), holding)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert {name: len(value) for name, value in form.items()} == {"vis": 8 << 20, "ir": 2 << 20}
    assert peak_bytes < 1.3 * len(body)
