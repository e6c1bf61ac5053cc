"""What KEDA measures is what there is to do: on a real Redis a stream's length is what waits and runs."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml

from service.queue.contract import Lease
from service.queue.redis.queue import RedisQueue
from service.terms.errors import ErrorCode
from service.terms.jobs import FusionJob, FusionResult, Part, Priority
from service.terms.settings import QueueSettings
from tests.deploy.conftest import Needing
from tests.deploy.rendered import KUBERNETES
from tests.deploy.test_files import run
from tests.fakes import job as new_job
from tests.service.redis_server import RedisServer


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="rq-") as folder:  # short, as Unix sockets need it
        server = RedisServer(Path(folder))
        server.start()
        yield server
        server.kill()


@pytest.fixture
async def queue(server: RedisServer) -> AsyncIterator[RedisQueue]:
    queue = RedisQueue(QueueSettings(url=server.url, lease_s=60.0))
    await queue.open()
    yield queue
    await queue.close()


@pytest.fixture
async def impatient(server: RedisServer) -> AsyncIterator[RedisQueue]:
    """A queue that gives a job up with the first worker that is silent for half a second."""
    queue = RedisQueue(QueueSettings(url=server.url, lease_s=0.5, max_attempts=1))
    await queue.open()
    yield queue
    await queue.close()


def streams() -> dict[Priority, str]:
    """The streams that KEDA looks at, as the manifest names them."""
    text = (KUBERNETES / "components" / "keda" / "scaling.yaml").read_text("utf-8")
    (scaled,) = (each for each in yaml.safe_load_all(text) if each["kind"] == "ScaledObject")
    names = [trigger["metadata"]["stream"] for trigger in scaled["spec"]["triggers"]]
    return {priority: name for priority in Priority for name in names if name.endswith(f":{priority.value}")}


def lengths(server: RedisServer) -> dict[Priority, int]:
    """What KEDA would read."""
    return {
        priority: int(server.command("XLEN", name).removeprefix(b":").decode()) for priority, name in streams().items()
    }


async def submitted(queue: RedisQueue, priority: Priority, ttl_s: float | None = None) -> FusionJob:
    now = time.time()
    job = new_job(created_s=now, deadline_s=None if ttl_s is None else now + ttl_s, priority=priority, keep_result=True)
    await queue.submit(job)
    return job


async def taken(queue: RedisQueue, count: int) -> dict[str, Lease]:
    leases: dict[str, Lease] = {}
    async with asyncio.timeout(20):
        while len(leases) < count:
            found = await queue.take("w1", max_jobs=count - len(leases), wait_s=1.0)
            leases |= {lease.job.id: lease for lease in found}
    return leases


def success(job: FusionJob) -> FusionResult:
    return FusionResult(job_id=job.id, images={Part.FUSED: b"picture"}, media_type="image/png", batch_size=1)


@pytest.mark.redis
async def test_a_streams_length_is_what_waits_and_runs(queue: RedisQueue, server: RedisServer) -> None:
    assert lengths(server) == dict.fromkeys(Priority, 0)
    jobs = {priority: [await submitted(queue, priority) for _ in range(3)] for priority in Priority}
    assert lengths(server) == dict.fromkeys(Priority, 3)
    await queue.cancel(jobs[Priority.NORMAL][1].id)  # in the middle of what waits, where Redis loses count of a lag
    assert lengths(server)[Priority.NORMAL] == 2
    leases = await taken(queue, 8)
    assert lengths(server) == {Priority.HIGH: 3, Priority.NORMAL: 2, Priority.LOW: 3}  # they run
    for job in jobs[Priority.HIGH]:
        await queue.finish(leases[job.id], success(job))
    assert lengths(server)[Priority.HIGH] == 0
    await queue.cancel(jobs[Priority.NORMAL][0].id)
    await queue.release([leases[jobs[Priority.NORMAL][2].id]])
    assert lengths(server)[Priority.NORMAL] == 1  # handed back: it waits again
    (lease,) = (await taken(queue, 1)).values()
    await queue.finish(lease, success(lease.job))
    for job in jobs[Priority.LOW][:2]:
        await queue.finish(leases[job.id], success(job))
    assert lengths(server) == {Priority.HIGH: 0, Priority.NORMAL: 0, Priority.LOW: 1}
    stats = await queue.stats()
    assert sum(stats.depth.values()) + stats.num_leased == 1


@pytest.mark.redis
async def test_lost_and_late_jobs_leave_no_length(impatient: RedisQueue, server: RedisServer) -> None:
    lost = await submitted(impatient, Priority.NORMAL)
    await taken(impatient, 1)
    late = await submitted(impatient, Priority.LOW, ttl_s=0.2)
    assert lengths(server) == {Priority.HIGH: 0, Priority.NORMAL: 1, Priority.LOW: 1}
    await asyncio.sleep(0.7)  # the worker is silent, the other job's time is over
    async with asyncio.timeout(20):
        while lengths(server) != dict.fromkeys(Priority, 0):
            assert await impatient.take("w2", max_jobs=4, wait_s=0.1) == []
    assert (await impatient.view(lost.id)).error_code is ErrorCode.ATTEMPTS_EXHAUSTED
    assert (await impatient.view(late.id)).error_code is ErrorCode.TIMED_OUT


def test_the_query_of_the_latency_can_be_parsed(tool: Needing, tmp_path: Path) -> None:
    (operation,) = yaml.safe_load((KUBERNETES / "components" / "keda-latency" / "trigger.yaml").read_text("utf-8"))
    query = operation["value"]["metadata"]["query"]
    threshold = operation["value"]["metadata"]["threshold"]
    rules = tmp_path / "rules.yml"
    record = {"record": "wanted", "expr": f"ceil(({query}) / {threshold})"}  # as the autoscaler counts workers
    rules.write_text(yaml.safe_dump({"groups": [{"name": "query", "rules": [record]}]}), "utf-8")
    promtool = tool("promtool")
    assert "1 rules found" in run(promtool, "check", "rules", str(rules))

    def series(wait_s: str, workers: int) -> list[dict[str, str]]:
        """Jobs that all waited as long as this bucket says, and workers that are up."""
        buckets = {le: "0+10x20" if float(le) >= float(wait_s) else "0x20" for le in ("0.25", "0.5", "1", "2")}
        name = 'recofuse_stage_seconds_bucket{stage="queue",instance="w",le='
        found = [{"series": f'{name}"{le}"}}', "values": values} for le, values in buckets.items()]
        found.append({"series": f'{name}"+Inf"}}', "values": "0+10x20"})
        return found + [
            {"series": f'up{{job="recofuse-worker",instance="w{number}"}}', "values": "1x20"}
            for number in range(workers)
        ]

    def case(wanted: int, *given: dict[str, str]) -> dict[str, object]:
        expected = [{"labels": "wanted", "value": wanted}]
        tests = [{"expr": "wanted", "eval_time": "10m", "exp_samples": expected}]
        return {"interval": "1m", "input_series": list(given), "promql_expr_test": tests}

    cases = [
        case(0),  # nothing is there, nothing is asked for
        case(0, *series("0.25", 0)),
        case(2, *series("0.25", 4)),  # all wait less than 0.25 s: half of them would do
        case(8, *series("1", 4)),  # all wait some 0.975 s: twice as many
    ]
    suite = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": cases}
    path = tmp_path / "tests.yml"
    path.write_text(yaml.safe_dump(suite), "utf-8")
    run(promtool, "test", "rules", str(path))
