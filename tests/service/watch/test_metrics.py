"""Metrics: documented, correct when several processes share a host, and quiet where there is no GPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pynvml
import pytest
from prometheus_client import CollectorRegistry

from benchmarks.load import ask, fuse_request, scrape
from benchmarks.processes import Stack, can_split, split
from service.terms.activity import EngineActivity
from service.watch.gpu import GAUGES, GpuCollector, watch_gpus
from service.watch.metrics import Metrics
from tests.fakes import pair

ROOT = Path(__file__).parents[3]
VIS, IR = pair()
SERVED = 'recofuse_requests_total{method="POST",protocol="http",route="/v1/fuse",status="200"}'
SUCCEEDED = 'recofuse_jobs_finished_total{status="succeeded"}'


def has_gpu() -> bool:
    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return False


def test_every_metric_is_documented() -> None:
    assert Metrics.table() in (ROOT / "docs/metrics.md").read_text("utf-8"), "run `make docs` and commit the result"


def test_the_table_has_the_names_that_are_exposed() -> None:
    text = Metrics(CollectorRegistry()).render()[0].decode()
    # Each counter and histogram also tells when its series began.
    names = (line.split()[2] for line in text.splitlines() if line.startswith("# TYPE recofuse_"))
    exposed = {name for name in names if not name.endswith("_created")}
    listed = {line.split("`")[1] for line in Metrics.table().splitlines() if line.startswith("| `")}
    assert exposed <= listed
    assert listed - exposed <= set(GAUGES) | {"recofuse_model_info", "recofuse_build_info"}


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_without_a_gpu_its_metrics_are_absent_and_nothing_fails() -> None:
    registry = CollectorRegistry()
    assert watch_gpus(registry) == 0
    assert list(registry.collect()) == []


def test_the_driver_is_asked_once_a_second_and_names_cards_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def handle(index: int) -> int:
        asked.append(index)
        return index

    def refused(_: int) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)  # as a slice of a card does

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda _: "card")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda index: f"GPU-{index}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda index: 1000 * (index + 1))
    for name in ("MemoryInfo", "UtilizationRates"):
        monkeypatch.setattr(pynvml, f"nvmlDeviceGet{name}", refused)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", lambda index, _: refused(index))
    now_s = 5.0
    registry = CollectorRegistry()
    registry.register(GpuCollector(2, clock=lambda: now_s))
    asked.clear()
    for moment, expected in ((6.5, 2), (7.4, 2), (7.6, 4)):
        now_s = moment
        labels = {"gpu": "1", "model": "card", "uuid": "GPU-1"}
        assert registry.get_sample_value("recofuse_gpu_power_watts", labels) == 2
        assert registry.get_sample_value("recofuse_gpu_memory_used_bytes", labels) is None
        assert len(asked) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="there is no GPU here")
def test_a_gpu_tells_its_memory() -> None:
    registry = CollectorRegistry()
    assert watch_gpus(registry) > 0
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    labels = {"gpu": "0", "model": str(pynvml.nvmlDeviceGetName(handle)), "uuid": str(pynvml.nvmlDeviceGetUUID(handle))}
    used, total = (registry.get_sample_value(f"recofuse_gpu_memory_{kind}_bytes", labels) for kind in ("used", "total"))
    try:
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:  # to a slice of a card (MIG) the driver does not tell
        assert (used, total) == (None, None)
        return
    assert used is not None
    assert total is not None
    assert 0 < used < total


def test_what_an_engine_does_is_counted_from_what_it_tells_in_all() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.observe_engine(EngineActivity(recorded_runs=3, eager_runs=1, recordings=2, recording_s=1.5, programs=2))
    later = EngineActivity(
        recorded_runs=10, eager_runs=1, recordings=2, failed_recordings=1, evictions=1, recording_s=2.0, programs=1,
        program_bytes=5, allocated_bytes=6, reserved_bytes=7,
    )  # fmt: skip
    metrics.observe_engine(later)
    metrics.observe_engine(later)
    expected = {
        'runs_total{form="recorded"}': 10.0,
        'runs_total{form="eager"}': 1.0,
        'recordings_total{outcome="made"}': 2.0,
        'recordings_total{outcome="failed"}': 1.0,
        "evictions_total": 1.0,
        "recording_seconds_total": 2.0,
        "programs": 1.0,
        'memory_bytes{use="programs"}': 5.0,
        'memory_bytes{use="allocated"}': 6.0,
        'memory_bytes{use="reserved"}': 7.0,
    }
    lines = metrics.render()[0].decode().splitlines()
    for name, value in expected.items():
        assert f"recofuse_engine_{name} {value}" in lines


async def finished(stack: Stack, num_jobs: int) -> list[dict[str, float]]:
    """The workers' metrics once they have counted so many jobs: an answer may be heard before it is counted."""
    for _ in range(200):
        workers = [await scrape(address) for address in stack.monitors]
        if sum(worker[SUCCEEDED] for worker in workers) >= num_jobs:
            break
        await asyncio.sleep(0.05)
    return workers


@pytest.mark.redis
async def test_several_processes_on_one_host_count_their_own_work_and_no_more() -> None:
    """Two front ends, two workers: each request is counted at its front end, each job at exactly one worker."""
    if why_not := can_split():
        pytest.skip(why_not)
    values: dict[str, dict[str, object]] = {
        "engine": {"kind": "null"},
        "grpc": {"port": -1},
        "log": {"level": "WARNING"},
    }
    request = fuse_request(VIS, IR)
    with split(values, num_apis=2, num_workers=2) as stack:
        shares = (5, 13)
        for address, share in zip(stack.addresses, shares, strict=True):
            answers = await asyncio.gather(*(ask(address, request) for _ in range(share)))
            assert {answer.status for answer in answers} == {200}
        fronts = [await scrape(address) for address in stack.addresses]
        workers = await finished(stack, sum(shares))
    assert tuple(front[SERVED] for front in fronts) == shares
    assert [sum(v for k, v in front.items() if k.startswith("recofuse_jobs_accepted_total")) for front in fronts] == [
        *shares
    ]
    assert sum(worker[SUCCEEDED] for worker in workers) == sum(shares)
    assert sum(worker["recofuse_batch_size_sum"] for worker in workers) == sum(shares)
    assert sum(worker['recofuse_stage_seconds_count{stage="model"}'] for worker in workers) == sum(shares)
    assert all(front[SUCCEEDED] == 0 for front in fronts)  # what workers do, workers count
    assert all(SERVED not in worker for worker in workers)
    # The queue is one: every front end tells the same of it.
    assert [front["recofuse_queue_leased"] for front in fronts] == [0.0, 0.0]


@pytest.mark.redis
async def test_every_front_end_tells_the_same_of_the_queue() -> None:
    if why_not := can_split():
        pytest.skip(why_not)
    values: dict[str, dict[str, object]] = {
        "http": {"require_worker": False},
        "grpc": {"port": -1},
        "log": {"level": "WARNING"},
    }
    request = fuse_request(VIS, IR, headers="Prefer: respond-async\r\n")
    with split(values, num_apis=2, num_workers=0) as stack:
        for _ in range(3):
            assert (await ask(stack.address, request)).status == 202
        fronts = [await scrape(address) for address in stack.addresses]
    assert [front['recofuse_queue_depth{priority="normal"}'] for front in fronts] == [3.0, 3.0]
    assert [front["recofuse_queue_bytes"] for front in fronts] == [3.0 * (len(VIS) + len(IR))] * 2
