"""Problem documents: addresses and methods that are not there, and failures that nobody foresaw."""

from __future__ import annotations

from service.terms.errors import ErrorCode
from tests.fakes import FakeEngine
from tests.service.conftest import Server, Serving
from tests.service.faces.http.asking import FILES, problem


async def test_unknown_addresses_and_methods(server: Server) -> None:
    problem(await server.client.get("/v1/nothing"), ErrorCode.ROUTE_NOT_FOUND)
    wrong = await server.client.get("/v1/fuse")
    problem(wrong, ErrorCode.METHOD_NOT_ALLOWED)
    assert wrong.headers["allow"] == "POST"
    problem(await server.client.get("/v1/jobs/unknown"), ErrorCode.JOB_NOT_FOUND)
    problem(await server.client.get("/v1/jobs/unknown/result"), ErrorCode.JOB_NOT_FOUND)
    problem(await server.client.delete("/v1/jobs/unknown"), ErrorCode.JOB_NOT_FOUND)
    problem(await server.client.get("/v1/jobs/no%20id"), ErrorCode.INVALID_INPUT)


async def test_what_allows_get_allows_head(server: Server) -> None:
    refused = await server.client.post("/health/live")
    problem(refused, ErrorCode.METHOD_NOT_ALLOWED)
    assert refused.headers["allow"] == "GET, HEAD"


async def test_an_unforeseen_failure_is_a_problem_without_detail(serving: Serving) -> None:
    async with serving(FakeEngine(poison_seeds=frozenset({13}))) as server:
        answer = await server.client.post("/v1/fuse", files=FILES, data={"seed": 13})
        assert "poison" not in problem(answer, ErrorCode.INTERNAL)["detail"]
        assert (await server.client.post("/v1/fuse", files=FILES)).status_code == 200
