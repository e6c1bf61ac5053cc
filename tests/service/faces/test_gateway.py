"""What the gateway makes of a queue that forgets, and of callers that leave."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from recofuse_client import errors as client_errors
from recofuse_client.retries import is_safe_to_repeat
from service.faces.gateway import FusionRequest, Gateway
from service.queue.contract import Admission
from service.queue.memory import MemoryQueue
from service.terms.errors import ErrorCode, ServiceError
from service.terms.jobs import FusionJob, FusionResult, WorkerInfo
from service.terms.settings import QueueSettings, Settings
from service.watch.metrics import Metrics
from tests.fakes import pair


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, ErrorCode.INTERNAL),
        ({"idempotency_key": "k"}, ErrorCode.UNAVAILABLE),
        ({"may_repeat": True}, ErrorCode.UNAVAILABLE),
    ],
)
async def test_a_lost_job_is_repeated_only_by_who_may(changes: dict[str, object], code: ErrorCode) -> None:
    """The job was computed, and then forgotten, before its caller was told."""
    settings = Settings.from_values({"queue": {"result_ttl_s": 1, "idempotency_ttl_s": 1}})
    now_s = 1000.0
    queue = MemoryQueue(settings.queue, clock=lambda: now_s)
    gateway = Gateway(queue, settings, Metrics(CollectorRegistry()), clock=lambda: now_s)
    vis, ir = pair()
    fusing = asyncio.create_task(gateway.fuse(FusionRequest(vis=vis, ir=ir, **changes)))  # type: ignore[arg-type]
    (lease,) = await queue.take("w", max_jobs=1, wait_s=10)
    # Finishing does not give way to the caller who waits, so that its look comes when the result's time is over.
    await queue.finish(lease, FusionResult(job_id=lease.job.id))
    now_s += 2.0
    with pytest.raises(ServiceError) as lost:
        await fusing
    assert (lost.value.code, "lost this job" in lost.value.message) == (code, True)
    error = client_errors.error_of(lost.value.code, lost.value.message)
    assert is_safe_to_repeat(error, is_idempotent=False) == (code is ErrorCode.UNAVAILABLE)


class SlowToAnswer(MemoryQueue):
    """Accepts a job, and is then on its way to say so."""

    def __init__(self, settings: QueueSettings) -> None:
        super().__init__(settings)
        self.has_accepted = asyncio.Event()

    async def submit(self, job: FusionJob, *, idempotency_key: str | None = None) -> Admission:
        admission = await super().submit(job, idempotency_key=idempotency_key)
        self.has_accepted.set()
        await asyncio.Event().wait()
        return admission


@pytest.mark.parametrize("key", [None, "k"])
async def test_who_hangs_up_while_the_queue_accepts_leaves_no_work(key: str | None) -> None:
    settings = Settings()
    queue = SlowToAnswer(settings.queue)
    gateway = Gateway(queue, settings, Metrics(CollectorRegistry()))
    vis, ir = pair()
    fusing = asyncio.create_task(gateway.fuse(FusionRequest(vis=vis, ir=ir, idempotency_key=key)))
    await queue.has_accepted.wait()
    fusing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fusing
    leases = await queue.take("w", max_jobs=1, wait_s=0)
    assert len(leases) == (await queue.stats()).num_unfinished == (key is not None)


async def test_warm_workers_are_told_from_those_that_still_load_and_from_none_that_is_known() -> None:
    """Before anybody has looked there is no number, rather than none: an alert fires at 0."""
    settings, metrics = Settings(), Metrics(CollectorRegistry())
    queue = MemoryQueue(settings.queue)
    gateway = Gateway(queue, settings, metrics)
    assert "recofuse_workers{" not in metrics.render()[0].decode()

    async def counted() -> tuple[float | None, ...]:
        await gateway.observe_queue()
        return tuple(
            metrics.registry.get_sample_value("recofuse_workers", {"state": state}) for state in ("warm", "warming")
        )

    assert await counted() == (0, 0)
    for name, is_warm in (("a", True), ("b", True), ("c", False)):
        worker = WorkerInfo(
            id=name,
            model_name="m",
            model_version="1",
            device="cpu",
            default_steps=5,
            default_sampler="ode2",
            batch_sizes=(),
            is_warm=is_warm,
            started_s=0.0,
        )
        await queue.announce(worker, ttl_s=60)
    assert await counted() == (2, 1)
