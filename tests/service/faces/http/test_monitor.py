"""What a worker serves on its own port."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import httpx
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.faces.http.monitor import build_monitor_app
from service.watch.metrics import Metrics


async def test_a_workers_monitor_answers_head_too() -> None:
    app = build_monitor_app(lambda: False, Metrics(CollectorRegistry()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client:
        statuses = [(await client.head(path)).status_code for path in ("/health/live", "/health/ready", "/metrics")]
    assert statuses == [200, 503, 200]


class Slow(Collector):
    """What takes its time to tell, as a GPU's driver may. asked_on: the thread that waited for it."""

    def __init__(self) -> None:
        self.asked_on: list[int] = []

    def collect(self) -> Iterable[Metric]:
        self.asked_on.append(threading.get_ident())
        return [GaugeMetricFamily("slow", "Slow.", value=1.0)]


async def test_requests_do_not_wait_for_what_is_slow_to_tell() -> None:
    registry, slow = CollectorRegistry(), Slow()
    app = build_monitor_app(lambda: True, Metrics(registry))
    registry.register(slow)
    slow.asked_on.clear()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client:
        told = (await client.get("/metrics")).text
    assert "slow 1.0" in told
    assert slow.asked_on
    assert threading.get_ident() not in slow.asked_on
