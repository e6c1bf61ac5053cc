"""Admit, enqueue, wait, answer: the use case behind all faces.

A face (HTTP, gRPC, Open Inference) turns its message into a `FusionRequest` and calls one of these methods; whatever
goes wrong comes out as a ServiceError. Cancelling the task that awaits `fuse` (a client hung up) cancels the job too,
unless an idempotency key says that the client may come back for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from recofuse_host.threads import Threads
from recofuse_rigs.rig import Rig
from service.access.guard import own_idempotency_key
from service.access.held import Held
from service.queue.contract import Clock, JobQueue
from service.terms import images
from service.terms.errors import (
    InternalError,
    InvalidInputError,
    JobNotFoundError,
    NotFinishedError,
    ServiceError,
    TimedOutError,
    UnavailableError,
)
from service.terms.jobs import (
    FusionJob,
    FusionOptions,
    FusionResult,
    JobView,
    Priority,
    RawLayout,
    WorkerInfo,
    new_job_id,
)
from service.terms.rigs import Rigs
from service.terms.settings import Settings
from service.watch.metrics import Metrics

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

CHECKING_THREADS = 4  # that read files' headers; one with many parts must not hold up the others
PATIENCE_S = 5.0  # how long a call goes on trying to reach a queue that does not answer
GRACE_S = 2.0  # after a deadline, for the queue's own verdict to arrive


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionRequest:
    """What a caller asks for. vis, ir: files, or raw frames with a layout. timeout_s: None asks for the default.

    may_repeat: the caller does not mind that this is computed twice, as for frames; with an idempotency key none does.
    rig: what was asked for, as `Rigs.asked` takes it; empty for a registered pair. track, means, history: of a
    stream's frame, see FusionJob.
    """

    vis: bytes
    ir: bytes
    options: FusionOptions = field(default_factory=FusionOptions)
    priority: Priority = Priority.NORMAL
    timeout_s: float | None = None
    idempotency_key: str | None = None
    may_repeat: bool = False
    request_id: str = ""
    traceparent: str | None = None
    vis_layout: RawLayout | None = None
    ir_layout: RawLayout | None = None
    rig: str = ""
    track: str = ""
    means: bytes | None = None
    history: bytes | None = None


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether new work is welcome, and if not, why."""

    is_ready: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that is being served, and what serves it."""

    name: str
    version: str
    default_steps: int
    default_sampler: str
    default_exposure: str
    exposures: tuple[str, ...]
    devices: tuple[str, ...]
    num_workers: int


class Gateway:
    """One per front end process. Receives its queue opened. Raises SettingsError for a folder of rigs that is none.

    held: in which faces count what their requests take, from the first byte until they are answered.
    """

    def __init__(self, queue: JobQueue, settings: Settings, metrics: Metrics, *, clock: Clock = time.time) -> None:
        self._queue = queue
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self.held = Held(settings.limits.max_held_bytes, retry_after_s=settings.queue.retry_after_s)
        self._rigs = Rigs(settings.rigs)
        self._checking = Threads(CHECKING_THREADS, "check", is_daemon=True)
        self._draining = asyncio.Event()
        self._num_waiting = 0
        self._idle = asyncio.Event()
        self._idle.set()

    # what faces call

    def timeout_within(self, asked_s: float | None, remaining_s: float | None) -> float | None:
        """The earlier of what a request asks for and its call's own deadline; None if there is neither.

        A generous deadline is common and harmless, so it is cut rather than refused. Raises TimedOutError if it has
        passed.
        """
        if remaining_s is None:
            return asked_s
        remaining_s = min(remaining_s, self._settings.jobs.max_timeout_s)
        if remaining_s <= 0:
            raise TimedOutError("the call's deadline had passed when it arrived")
        return remaining_s if asked_s is None else min(asked_s, remaining_s)

    async def fuse(self, request: FusionRequest, on_accepted: Callable[[], None] | None = None) -> FusionResult:
        """Fuse, and wait for the pictures. on_accepted: called once the job has a place in the queue.

        Raises ServiceError, also the one that the job ended with.
        """
        self._num_waiting += 1
        self._idle.clear()
        try:
            return await self._fuse(request, on_accepted)
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._idle.set()

    async def _fuse(self, request: FusionRequest, on_accepted: Callable[[], None] | None) -> FusionResult:
        jobs = self._settings.jobs
        timeout_s = jobs.default_timeout_s if request.timeout_s is None else request.timeout_s
        if not 0 < timeout_s <= jobs.max_timeout_s:
            raise InvalidInputError(
                f"a timeout of {timeout_s * 1000:.0f} ms is not possible; accepted are more than 0 "
                f"and at most {jobs.max_timeout_s * 1000:.0f} ms"
            )
        job = await self._job_of(request, timeout_s, keep_result=request.idempotency_key is not None)
        try:
            job_id = await self._submit(job, request)
            if on_accepted is not None:
                on_accepted()
            result = await self._result_by(job_id, job.deadline_s or 0.0, request)
        except asyncio.CancelledError:
            if request.idempotency_key is None:  # the queue may have the job, also if it has not said so yet
                await asyncio.shield(self._abandon(job.id))
            raise
        result.raise_for_error()
        if result.alignment is not None and (name := self._rigs.name_in(request.rig)):
            self._metrics.observe_alignment(name, result.alignment, result.width)
        return result

    async def submit(self, request: FusionRequest) -> JobView:
        """Accept a job without waiting for it. Raises ServiceError."""
        jobs = self._settings.jobs
        timeout_s = jobs.async_timeout_s if request.timeout_s is None else request.timeout_s
        if not 0 < timeout_s <= jobs.async_timeout_s:
            raise InvalidInputError(
                f"a timeout of {timeout_s * 1000:.0f} ms is not possible; accepted are more than 0 "
                f"and at most {jobs.async_timeout_s * 1000:.0f} ms"
            )
        job = await self._job_of(request, timeout_s, keep_result=True)
        job_id = await self._submit(job, request)
        return await self.view(job_id)

    async def view(self, job_id: str) -> JobView:
        """Where a job stands. Raises JobNotFoundError, UnavailableError."""
        return await self._patiently(lambda: self._queue.view(job_id))

    async def result(self, job_id: str) -> FusionResult:
        """A finished job's pictures. Raises NotFinishedError, JobNotFoundError and what the job ended with."""
        result = await self._patiently(lambda: self._queue.wait_result(job_id, timeout_s=0))
        if result is None:
            raise NotFinishedError("the job has no result yet; ask again later", retry_after_s=1.0)
        result.raise_for_error()
        return result

    async def cancel(self, job_id: str) -> JobView:
        """Cancel a job; one that has ended stays as it is. Raises JobNotFoundError, UnavailableError."""
        return await self._patiently(lambda: self._queue.cancel(job_id))

    async def num_queued(self) -> int | None:
        """Jobs that no worker has taken yet, of all callers; None while the queue cannot be reached."""
        with contextlib.suppress(UnavailableError):
            return sum((await self._queue.stats()).depth.values())
        return None

    async def workers(self) -> list[WorkerInfo]:
        """The workers that are there now."""
        return await self._patiently(self._queue.workers)

    async def models(self) -> list[ServedModel]:
        """The models that are being served now, each once, whatever the number of its workers."""
        by_model: dict[tuple[str, str], list[WorkerInfo]] = {}
        for worker in await self.workers():
            by_model.setdefault((worker.model_name, worker.model_version), []).append(worker)
        return [
            ServedModel(
                name=name,
                version=version,
                default_steps=workers[0].default_steps,
                default_sampler=workers[0].default_sampler,
                default_exposure=workers[0].default_exposure,
                exposures=tuple(  # any of them may take a job
                    exposure
                    for exposure in workers[0].exposures
                    if all(exposure in worker.exposures for worker in workers)
                ),
                devices=tuple(sorted({worker.device for worker in workers})),
                num_workers=len(workers),
            )
            for (name, version), workers in by_model.items()
        ]

    async def rigs(self) -> list[Rig]:
        """The rigs that requests may name."""
        return await asyncio.to_thread(self._rigs.listed)

    async def readiness(self) -> Readiness:
        """Whether this front end should be sent requests: not draining, queue there, a warm worker there."""
        if self.is_draining:
            return Readiness(False, "draining")
        try:
            workers = await self._queue.workers()
        except UnavailableError:
            return Readiness(False, "the queue cannot be reached")
        if self._settings.http.require_worker and not any(worker.is_warm for worker in workers):
            return Readiness(False, "no worker is warm yet")
        return Readiness(True, "ready")

    async def observe_queue(self) -> None:
        """Bring the queue's metrics and its workers' up to date; leaves them as they are while it cannot be reached."""
        with contextlib.suppress(UnavailableError):
            self._metrics.set_queue(await self._queue.stats())
            self._metrics.set_workers(await self._queue.workers())

    # stopping

    @property
    def is_draining(self) -> bool:
        """Whether new work is refused."""
        return self._draining.is_set()

    def start_drain(self) -> None:
        """Refuse new work from now on; what was accepted goes on."""
        self._draining.set()

    async def drain_started(self) -> None:
        """Returns once new work is refused; for a face whose calls have no end of their own."""
        await self._draining.wait()

    async def drained(self) -> None:
        """Returns once no caller waits any more."""
        await self._idle.wait()

    # the parts

    async def _job_of(self, request: FusionRequest, timeout_s: float, *, keep_result: bool) -> FusionJob:
        if self.is_draining:
            raise UnavailableError("this server is stopping; try again, another one may answer", retry_after_s=1.0)
        (width, height), rig = await self._checking.run(lambda: self._checked(request))
        now = self._clock()
        return FusionJob(
            id=new_job_id(),
            vis=request.vis,
            ir=request.ir,
            width=width,
            height=height,
            created_s=now,
            deadline_s=now + timeout_s,
            options=request.options,
            priority=request.priority,
            request_id=request.request_id,
            traceparent=request.traceparent,
            keep_result=keep_result,
            vis_layout=request.vis_layout,
            ir_layout=request.ir_layout,
            rig=rig,
            track=request.track,
            means=request.means,
            history=request.history,
        )

    def _checked(self, request: FusionRequest) -> tuple[tuple[int, int], Rig | None]:
        """The size of the answer, and the rig. Reads headers and, perhaps, a rig's file."""
        sides = request.vis, request.ir, request.vis_layout, request.ir_layout, self._settings.limits
        if not request.rig and request.options.align == "refine":
            return images.check_refined_request(*sides)
        if not request.rig:
            return images.check_request(*sides), None

        def find_rig(vis_size: tuple[int, int], ir_size: tuple[int, int], is_ir_sure: bool) -> Rig:
            return self._rigs.asked(request.rig, vis_size, ir_size, is_ir_sure=is_ir_sure)

        return images.check_rigged_request(*sides, find_rig)

    async def _submit(self, job: FusionJob, request: FusionRequest) -> str:
        own_key = own_idempotency_key(request.idempotency_key)
        admission = await self._patiently(lambda: self._queue.submit(job, idempotency_key=own_key))
        if admission.is_new:
            self._metrics.jobs_accepted.labels(job.priority).inc()
            self._metrics.payload_bytes.observe(job.size_bytes)
        return admission.job_id

    async def _result_by(self, job_id: str, deadline_s: float, request: FusionRequest) -> FusionResult:
        """The result; waiting survives a queue that is away for a while.

        Raises TimedOutError, and for a job that the queue lost InternalError: it may have been computed, and
        UnavailableError, which invites to try again, would say that nothing was done.
        """
        pause_s = 0.05
        while (remaining_s := deadline_s + GRACE_S - self._clock()) > 0:
            try:
                result = await self._queue.wait_result(job_id, timeout_s=remaining_s)
            except UnavailableError:
                await asyncio.sleep(min(pause_s * random.uniform(0.5, 1.0), remaining_s))
                pause_s = min(2 * pause_s, 2.0)
                continue
            except JobNotFoundError as error:
                if request.may_repeat or request.idempotency_key is not None:
                    raise UnavailableError("the queue lost this job; try again", retry_after_s=1.0) from error
                raise InternalError("the queue lost this job, which may have been computed") from error
            if result is not None:
                return result
        raise TimedOutError("there was no result before the deadline")

    async def _abandon(self, job_id: str) -> None:
        """Nobody waits for this job any more; failing to say so only costs the work."""
        with contextlib.suppress(ServiceError):
            await self._queue.cancel(job_id)
            # Fetch the verdict, so that a queue within this process need not keep it.
            await self._queue.wait_result(job_id, timeout_s=0)

    async def _patiently(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Repeat a call to the queue for a few seconds while it cannot be reached."""
        until_s, pause_s = time.monotonic() + PATIENCE_S, 0.05
        while True:
            try:
                return await call()
            except UnavailableError:
                if time.monotonic() + pause_s > until_s:
                    raise
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # not all at once when it is back
            pause_s *= 2
