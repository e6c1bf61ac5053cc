"""What a worker serves on its own port."""

from __future__ import annotations

import httpx
from prometheus_client import CollectorRegistry

from service.faces.http.monitor import build_monitor_app
from service.watch.metrics import Metrics


async def test_a_workers_monitor_answers_head_too() -> None:
    app = build_monitor_app(lambda: False, Metrics(CollectorRegistry()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client:
        statuses = [(await client.head(path)).status_code for path in ("/health/live", "/health/ready", "/metrics")]
    assert statuses == [200, 503, 200]
