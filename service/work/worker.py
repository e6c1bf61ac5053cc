"""A worker: take, decode, model, encode, finish; three stages that overlap, so that the model seldom waits.

Decoding and encoding run on a few threads, the model on one (an engine that can be given the next pass while one runs
is waited for on another), and everything else on the event loop, so no lock is needed. A job is held from take to
finish; `max_held` bounds how many, and with them the memory and what a crash delays.

What goes wrong with one job stays with it: undecodable images end at the decoder, a pass that fails is halved until the
culprit is alone, and one that runs out of memory is halved until it fits. A stopped worker takes nothing new, finishes
what it holds, and hands back the rest when time runs out. One whose engine is lost (a dead CUDA context) does the same,
but for what needs the engine: that goes back at once, for another worker, and `run` raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from recofuse_host.processors import read_processors
from recofuse_host.threads import Threads
from service.queue.contract import Clock, JobQueue
from service.terms import images
from service.terms.errors import (
    FAULTS,
    INTERNAL_MESSAGE,
    InternalError,
    InvalidInputError,
    OutOfMemoryError,
    ServiceError,
    TimedOutError,
    UnavailableError,
)
from service.terms.jobs import FusionJob, FusionResult, Part, Stage, WorkerInfo, printable
from service.terms.measures import MEDIA_TYPES
from service.terms.settings import Settings
from service.watch import logs
from service.watch.metrics import DropReason, Metrics
from service.watch.tracing import NO_TRACES, Tracer
from service.work import steadying
from service.work.batcher import Batcher, BatchPolicy, Waiting
from service.work.engine import Engine, EngineBrokenError, PassOptions, PipelinedEngine, TellingEngine
from service.work.held import Held, PassInput

if TYPE_CHECKING:
    from service.work.steadying import Frame, Told

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Pictures = dict[Part, images.Pixels]

CANCEL_AGAIN_S = 0.5
DOES_NOT_FIT_S = 600.0  # how long a batch that did not fit is not tried again: somebody else may have had the memory
MAX_UNDER_WAY = 2  # passes: one runs, the next is brought
BACK_OFF_S = (0.05, 2.0)  # first and longest pause between two tries to reach the queue


class Worker:
    """Serves a queue with an engine until told to stop. One `run` per object."""

    def __init__(
        self,
        queue: JobQueue,
        engine: Engine,
        settings: Settings,
        metrics: Metrics,
        *,
        clock: Clock = time.time,
        tracer: Tracer = NO_TRACES,
    ) -> None:
        self._queue = queue
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._tracer = tracer
        self.id = settings.worker.id or f"{socket.gethostname()}-{os.getpid()}"
        self._held: dict[str, Held] = {}
        self._num_decoding = 0
        self._batcher: Batcher[Held] = Batcher(self._policy(()))
        self.warm = asyncio.Event()  # the model is loaded and has run, and its device is not lost
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()  # something the model loop should look at
        self._room = asyncio.Event()  # a held job has ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._info: WorkerInfo | None = None
        self._codec = images.build_codec(settings.codec, settings.limits)
        self._processors = read_processors()
        self._num_codec_threads = settings.worker.codec_threads or self._processors.share(settings.worker.per_host)
        self._codecs = Threads(self._num_codec_threads, "codec")
        self._model = Threads(1, "model")
        self._results = Threads(1, "results")
        self._num_under_way = 0  # passes that the engine has begun, and whose pictures are waited for
        self._busy_until = 0.0
        self._lost: EngineBrokenError | None = None

    @property
    def is_warm(self) -> bool:
        """Whether the model is loaded, has run once and can run again."""
        return self.warm.is_set()

    @property
    def num_held(self) -> int:
        """Jobs in any stage."""
        return len(self._held)

    def stop(self) -> None:
        """Take nothing new; `run` returns when everything held is finished or handed back."""
        self._stopping.set()
        self._changed.set()
        self._room.set()

    async def run(self) -> None:
        """Load, warm up, serve until `stop`. Raises what loading raises, or EngineBrokenError; nothing else ends it."""
        started_s = self._clock()
        try:
            await self._model.run(self._engine.load)
            threads = {"threads": self._num_codec_threads, "processors": self._processors.told()}
            logger.info("threads that decode and encode", extra=threads)
            await self._model.run(self._engine.warm_up)
            engine = self._engine.info
            sizes = engine.batch_sizes or self._settings.batch.sizes
            self._batcher = Batcher(self._policy(sizes))
            self._info = WorkerInfo(
                id=self.id,
                model_name=engine.model_name,
                model_version=engine.model_version,
                device=engine.device,
                default_steps=engine.default_steps,
                default_sampler=engine.default_sampler,
                default_exposure=engine.default_exposure,
                exposures=engine.exposures,
                batch_sizes=sizes,
                is_warm=True,
                started_s=started_s,
            )
            self._metrics.set_model(self._info)
            self._observe_engine()
            # Known to the front ends before anyone is told that this worker is warm.
            await self._announce(self._info)
            self.warm.set()
            logger.info(
                "worker is ready", extra={"worker": self.id, "model": engine.model_name, "device": engine.device}
            )
            await self._serve(self._info)
        finally:
            self._codecs.shutdown()
            self._model.shutdown()
            self._results.shutdown()

    async def _serve(self, info: WorkerInfo) -> None:
        loops = [asyncio.create_task(loop()) for loop in (self._heartbeat_loop, self._model_loop)]
        taking = asyncio.create_task(self._take_loop())
        draining: asyncio.Task[None] | None = None
        try:
            stopped = asyncio.create_task(self._stopping.wait())
            await asyncio.wait([*loops, taking, stopped], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            self._raise_if_failed([*loops, taking])
            draining = asyncio.create_task(self._drain(taking))
            await asyncio.wait(
                [*loops, draining],
                timeout=self._settings.worker.drain_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            self._raise_if_failed([*loops, draining])
        except EngineBrokenError as error:
            logger.critical("the engine is lost, the worker ends", extra={"worker": self.id, "error": str(error)})
            with contextlib.suppress(UnavailableError, TimeoutError):
                async with asyncio.timeout(self._settings.worker.drain_timeout_s):
                    await self._give_up(info, taking)
            raise
        finally:
            await _end([*loops, taking, *([] if draining is None else [draining]), *self._tasks])
            with contextlib.suppress(UnavailableError, TimeoutError):
                async with asyncio.timeout(5.0):
                    await self._queue.release([held.lease for held in self._held.values()])
                    await self._queue.announce(info.model_copy(update={"is_warm": False}), ttl_s=0)
            logger.info("worker has stopped", extra={"worker": self.id, "handed_back": len(self._held)})
            for held in self._held.values():
                held.trace.end("handed_back")
            self._held.clear()
            self._metrics.jobs_held.set(0)

    async def _drain(self, taking: asyncio.Task[None]) -> None:
        await taking
        while self._held:
            self._room.clear()
            await self._room.wait()

    async def _give_up(self, info: WorkerInfo, taking: asyncio.Task[None]) -> None:
        """Hand back what needs the engine, so that it is served elsewhere at once, and finish what does not."""
        self.warm.clear()
        self._info = info.model_copy(update={"is_warm": False})
        self.stop()
        await self._hand_back()
        await self._announce(self._info)
        await asyncio.wait([taking])  # what a take is just bringing would else wait for its lease to end
        await self._hand_back()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _hand_back(self) -> None:
        # Those of the failed pass count as tried: a pair that takes down every worker it meets must come to an end.
        for was_tried in (False, True):
            while was_tried and self._num_under_way:  # the pass before may have its pictures yet
                self._changed.clear()
                await self._changed.wait()
            lost = [held for held in self._held.values() if not held.has_pictures and held.is_running is was_tried]
            await self._queue.release([held.lease for held in lost], was_tried=was_tried)
            for held in lost:
                held.trace.end("handed_back")
                self._let_go(held)

    @staticmethod
    def _raise_if_failed(tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    # stage 1: take and decode

    async def _take_loop(self) -> None:
        worker = self._settings.worker
        max_held = worker.max_held or 3 * self._settings.batch.max_batch
        while not self._stopping.is_set():
            if len(self._held) >= max_held:
                self._room.clear()
                await self._room.wait()
                continue
            num_free = max_held - len(self._held)
            leases = await self._patiently(
                lambda num_free=num_free: self._queue.take(self.id, max_jobs=num_free, wait_s=worker.take_wait_s)  # type: ignore[misc]
            )
            now = self._clock()
            for lease in leases:
                if (known := self._held.get(lease.job.id)) is not None:
                    known.lease = lease  # our own job came back after a stall; the work on it goes on
                    continue
                held = Held(lease=lease, trace=self._tracer.job(lease, now))
                held.timings_s[Stage.QUEUE] = max(0.0, now - lease.job.created_s)
                self._held[lease.job.id] = held
                self._num_decoding += 1
                self._spawn(self._decode(held))
            self._metrics.jobs_held.set(len(self._held))

    async def _decode(self, held: Held) -> None:
        job = held.lease.job
        try:
            if await self._is_unwanted(held):
                return
            started = time.perf_counter()
            try:
                self._pass_options(held)  # what cannot be given is refused before anything is read
                decoded, held.frame = await self._codecs.run(lambda: self._decoded(job))
            except ServiceError as error:
                await self._finish(held, FusionResult.failed(job.id, error, held.timings_s))
                return
            except Exception:  # the process boundary of one job
                logger.exception("decoding failed", extra={"job_id": job.id, "request_id": job.request_id})
                await self._finish(held, FusionResult.failed(job.id, InternalError(INTERNAL_MESSAGE), held.timings_s))
                return
            held.pair, held.warp = decoded.pair, decoded.warp
            held.ir_scale, held.measured = held.pair.ir_scale, held.pair.measured
            held.ir_source, held.warnings = held.pair.ir_source, printable(held.pair.warnings)
            held.alignment, held.track = decoded.alignment, decoded.track
            held.timings_s[Stage.DECODE] = time.perf_counter() - started
            held.trace.stage(Stage.DECODE, held.timings_s[Stage.DECODE])
            held.ready_s = self._clock()
            deadline_s = math.inf if job.deadline_s is None else job.deadline_s
            # Both sizes are equal, unless a codec stands in for the pictures.
            bucket = (job.width, job.height, held.pair.ir.shape, self._pass_options(held))
            frame = self._frame(held)
            self._batcher.add(Waiting(job.id, held, bucket, job.priority, held.ready_s, deadline_s, frame))
        finally:
            self._num_decoding -= 1
            self._changed.set()

    def _decoded(self, job: FusionJob) -> tuple[images.Decoded, Frame | None]:
        decoded = self._codec.decode(job)
        return decoded, steadying.Frame.of(job, decoded.pair)

    # stage 2: the model

    async def _model_loop(self) -> None:
        while True:
            self._changed.clear()
            now = self._clock()
            for held in self._batcher.remove_expired(now):
                self._spawn(self._drop_expired(held))
            if self._lost is not None:
                raise self._lost
            is_busy = self._num_under_way > 0
            batch = None
            if self._num_under_way < MAX_UNDER_WAY:
                batch = self._batcher.next_batch(now, num_coming=self._num_decoding, is_busy=is_busy)
            if batch is None:
                is_idle = not (is_busy or len(self._batcher) or self._num_decoding)
                timeout_s = self._engine.prepares_in_s if is_idle else None
                if timeout_s == 0:
                    await self._prepare()
                    continue
                due_s = None if is_busy else self._batcher.due_s(now)
                if due_s is not None:
                    timeout_s = max(0.0, due_s - now)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        await self._changed.wait()
                continue
            gone = self._queue.cancelled([held.lease.job.id for held in batch])
            for held in batch:
                if held.lease.job.id in gone:
                    self._drop(held, DropReason.CANCELLED)
            batch = [held for held in batch if held.lease.job.id in self._held]
            if batch:
                await self._run_batch(batch)

    async def _prepare(self) -> None:
        try:
            await self._model.run(self._engine.prepare)
        except EngineBrokenError:
            raise
        except Exception:  # passes work without
            logger.exception("the engine could not make something ready")
        self._observe_engine()

    def _observe_engine(self) -> None:
        if isinstance(self._engine, TellingEngine):
            self._metrics.observe_engine(self._engine.activity())

    async def _run_batch(self, batch: list[Held]) -> None:
        now = self._clock()
        for held in batch:
            held.is_running = True
            held.timings_s[Stage.BATCH] = max(0.0, now - held.ready_s)
            held.trace.stage(Stage.BATCH, held.timings_s[Stage.BATCH], batch_size=len(batch))
        options = self._pass_options(batch[0])
        started = time.perf_counter()
        try:
            parts = await self._model.run(lambda: self._forward(batch, options))
        except EngineBrokenError:
            raise  # ends the worker, not the jobs
        except Exception as error:  # noqa: BLE001 - one job's failure must not reach its neighbours, whatever it is
            if not self._is_to_be_split(batch, error):
                return
            parts = None
        if parts is None:
            # Out of the `except`, where nothing knows the error any more: its traceback holds all that the failed pass
            # had in memory, and the halves need the room.
            await self._split(batch)
        elif isinstance(parts, dict):
            self._hand_on(batch, parts, started)
        else:
            self._num_under_way += 1
            self._spawn(self._collect(batch, parts, started))

    async def _collect(self, batch: list[Held], wait: Callable[[], Pictures], started: float) -> None:
        """What becomes of a pass that runs while the next one is brought."""
        try:
            parts = await self._results.run(wait)
        except EngineBrokenError as error:
            self._lost = error
            return
        except Exception as error:  # noqa: BLE001 - as above
            if not self._is_to_be_split(batch, error):
                return
            parts = None
        finally:
            del wait  # it may hold what the failed pass had in memory
            self._num_under_way -= 1
            self._changed.set()
        if parts is not None:
            self._hand_on(batch, parts, started)
            return
        try:
            await self._split(batch)
        except EngineBrokenError as error:
            self._lost = error
            self._changed.set()

    def _is_to_be_split(self, batch: list[Held], error: Exception) -> bool:
        """What is to be done after a failure; a job that fails alone is told so here."""
        if len(batch) == 1:
            self._fail(batch[0], error)
            return False
        logger.warning("batch is split after a failure", extra={"size": len(batch), "error": type(error).__name__})
        if isinstance(error, OutOfMemoryError):
            size = self._batcher.policy.padded(len(batch))
            self._batcher.limit(self._frame(batch[0]), size // 2, self._clock() + DOES_NOT_FIT_S)
        return True

    def _hand_on(self, batch: list[Held], parts: Pictures, started: float) -> None:
        ended = time.perf_counter()
        self._metrics.engine_busy_seconds.inc(ended - max(started, self._busy_until))  # passes may overlap
        self._busy_until = ended
        self._observe_engine()
        self._metrics.batch_size.observe(len(batch))
        self._metrics.padded_items.inc(self._batcher.policy.padded(len(batch)) - len(batch))
        for index, held in enumerate(batch):
            held.timings_s[Stage.MODEL] = ended - started
            held.trace.stage(Stage.MODEL, ended - started, batch_size=len(batch))
            held.pair = None
            self._spawn(self._encode(held, {part: stack[index] for part, stack in parts.items()}, len(batch)))

    def _forward(self, batch: list[Held], options: PassOptions) -> Pictures | Callable[[], Pictures]:
        """On the model's thread: fill up to a size that the engine likes, stack, run. Or begin to, and what waits."""
        given = PassInput.of(batch, self._batcher.policy.padded(len(batch)), is_partial=options.is_partial)
        if isinstance(self._engine, PipelinedEngine):
            return self._engine.start(given.vis, given.ir, options, given.seeds, given.overlap)
        vis, ir, overlap = given.stacked()
        return self._engine.fuse(vis, ir, options, given.seeds, overlap)

    async def _split(self, batch: list[Held]) -> None:
        self._metrics.batches_split.inc()
        middle = len(batch) // 2
        await self._run_batch(batch[:middle])
        await self._run_batch(batch[middle:])

    def _fail(self, held: Held, error: Exception) -> None:
        if not isinstance(error, InvalidInputError | OutOfMemoryError):
            logger.error("the model failed", exc_info=error, extra={"request_ids": [held.lease.job.request_id]})
        reported = error if isinstance(error, ServiceError) else InternalError(INTERNAL_MESSAGE)
        self._spawn(self._finish(held, FusionResult.failed(held.lease.job.id, reported, held.timings_s)))

    # stage 3: encode and finish

    async def _encode(self, held: Held, pictures: dict[Part, images.Pixels], batch_size: int) -> None:
        job, info = held.lease.job, self._info
        started = time.perf_counter()
        try:
            finished, encoded, told = await self._codecs.run(lambda: self._encoded(held, pictures))
        except ServiceError as error:
            await self._finish(held, FusionResult.failed(job.id, error, held.timings_s))
            return
        except Exception:  # the process boundary of one job
            logger.exception("encoding failed", extra={"job_id": job.id, "request_id": job.request_id})
            await self._finish(held, FusionResult.failed(job.id, InternalError(INTERNAL_MESSAGE), held.timings_s))
            return
        held.timings_s[Stage.ENCODE] = time.perf_counter() - started
        held.trace.stage(Stage.ENCODE, held.timings_s[Stage.ENCODE])
        result = FusionResult(
            job_id=job.id,
            images=encoded,
            media_type=job.options.format.media_type,
            timings_s={stage: held.timings_s[stage] for stage in Stage if stage in held.timings_s},
            model_name=info.model_name if info else "",
            model_version=info.model_version if info else "",
            batch_size=batch_size,
            width=job.width,
            height=job.height,
            ir_source=held.ir_source,
            warnings=printable((*held.warnings, *finished.warnings)),
            values=finished.values_file,
            values_type=MEDIA_TYPES[job.options.values] if job.options.values and finished.values_file else "",
            values_unit=finished.unit,
            alarm=finished.alarm,
            alignment=held.alignment,
            track=held.track,
            seen=told.seen,
            history=told.history,
        )
        await self._finish(held, result)

    def _encoded(
        self, held: Held, pictures: dict[Part, images.Pixels]
    ) -> tuple[images.Finished, dict[Part, bytes], Told]:
        job, told = held.lease.job, steadying.Told()
        if held.frame is not None:
            pictures, told = steadying.steadied(pictures, held.frame, job)
        blends = self._engine.info.blends
        finished = images.finished(pictures, job.options, held.warp, held.ir_scale, held.measured, blends=blends)
        encoded = {part: self._codec.encode(job, part, pixels) for part, pixels in finished.pictures.items()}
        return finished, encoded, told

    async def _finish(self, held: Held, result: FusionResult) -> None:
        is_visible = await self._patiently(lambda: self._queue.finish(held.lease, result))
        if is_visible:
            self._metrics.jobs_finished.labels(result.status).inc()
            self._metrics.observe_stages(result.timings_s)
        held.trace.end(result.error_code or result.status, is_error=result.error_code in FAULTS)
        self._let_go(held)

    # dropping what nobody wants

    async def _is_unwanted(self, held: Held) -> bool:
        """Drop the job if it is past its deadline or cancelled."""
        if held.lease.job.is_expired(self._clock()):
            await self._drop_expired(held)
            return True
        if self._queue.cancelled([held.lease.job.id]):
            self._drop(held, DropReason.CANCELLED)
            return True
        return False

    async def _drop_expired(self, held: Held) -> None:
        self._metrics.jobs_dropped.labels(DropReason.EXPIRED).inc()
        late = TimedOutError("the job's deadline passed before the model reached it")
        await self._finish(held, FusionResult.failed(held.lease.job.id, late, held.timings_s))

    def _drop(self, held: Held, reason: DropReason) -> None:
        self._metrics.jobs_dropped.labels(reason).inc()
        self._batcher.remove(held.lease.job.id)
        held.trace.end(reason)
        self._let_go(held)

    def _let_go(self, held: Held) -> None:
        self._held.pop(held.lease.job.id, None)
        self._metrics.jobs_held.set(len(self._held))
        self._room.set()

    # life signs

    async def _announce(self, info: WorkerInfo) -> None:
        ttl_s = self._settings.worker.announce_ttl_s
        await self._patiently(lambda: self._queue.announce(info, ttl_s=ttl_s))

    async def _heartbeat_loop(self) -> None:
        worker = self._settings.worker
        while self._info is not None:
            info = self._info
            await self._announce(info)
            if held_now := list(self._held.values()):
                renewal = await self._patiently(
                    lambda held_now=held_now: self._queue.renew([held.lease for held in held_now])  # type: ignore[misc]
                )
                for held in held_now if renewal else ():
                    job_id = held.lease.job.id
                    if held.is_running or job_id not in self._held or renewal is None:
                        continue  # in the model already: its result may still be the first one
                    if job_id in renewal.cancelled and self._batcher.remove(job_id) is not None:
                        self._drop(held, DropReason.CANCELLED)
                    elif job_id in renewal.lost and self._batcher.remove(job_id) is not None:
                        self._drop(held, DropReason.LOST)
            await asyncio.sleep(worker.heartbeat_s)

    # the parts

    def _policy(self, sizes: tuple[int, ...]) -> BatchPolicy:
        batch = self._settings.batch
        return BatchPolicy(batch.max_batch, batch.max_wait_s, batch.starvation_s, sizes)

    def _pass_options(self, held: Held) -> PassOptions:
        asked, info = held.lease.job.options, self._engine.info
        parts = images.needed_parts(asked, held.warp, blends=info.blends)
        is_partial = info.blends and images.is_partial(asked, held.warp)
        return replace(PassOptions.of(asked, info), parts=parts, is_partial=is_partial)

    def _frame(self, held: Held) -> tuple[int, int, tuple[Part, ...]]:
        """What decides how much memory one job of a pass needs."""
        job = held.lease.job
        return job.width, job.height, images.needed_parts(job.options, held.warp, blends=self._engine.info.blends)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(_guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _patiently(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Repeat a call to the queue until it can be reached."""
        pause_s, longest_s = BACK_OFF_S
        while True:
            try:
                return await call()
            except UnavailableError as error:
                logger.warning("queue cannot be reached", extra={"error": str(error), "retry_in_s": pause_s})
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # not all at once when it is back
            pause_s = min(2 * pause_s, longest_s)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel until all have ended. One cancellation may be lost: `asyncio.wait_for` before Python 3.12 drops it if what
    it waits for ends at that moment, and redis-py sends through it.
    """
    running = set(tasks)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _guarded(work: Awaitable[None]) -> None:
    """A background task's boundary: what nobody awaits must at least be logged."""
    try:
        await work
    except Exception:
        logger.exception("a background task failed", extra={"request_id": logs.request_id.get()})
