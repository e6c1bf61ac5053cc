"""Every Prometheus metric of the service, on a registry that is passed in.

Labels come from enums and route templates, never from ids or paths, so their number is bounded. A process makes one
`Metrics`; in an all-in-one process the front end and the worker share it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from service.queue.contract import QueueStats
from service.terms.activity import EngineActivity
from service.terms.errors import ErrorCode
from service.terms.jobs import JobStatus, Priority, Stage, WorkerInfo
from service.terms.measures import Alignment
from service.watch.gpu import GAUGES, LABELS

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BYTES = tuple(float(4**power << 10) for power in range(8))  # 1 KiB to 16 MiB
PIXELS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


class DropReason(StrEnum):
    """Why a worker dropped a job before computing it."""

    EXPIRED = "expired"
    CANCELLED = "cancelled"
    LOST = "lost"


class FlowMode(StrEnum):
    """What a stream does when frames come faster than they are fused: block their sender, or skip stale ones."""

    ALL = "all"
    LATEST = "latest"


class FrameOutcome(StrEnum):
    """What became of one frame of a stream."""

    FUSED = "fused"
    FAILED = "failed"
    DROPPED = "dropped"
    SKIPPED = "skipped"  # came again after a resumption


class WorkerState(StrEnum):
    """Whether a worker that is there can serve at full speed."""

    WARM = "warm"
    WARMING = "warming"


class RunForm(StrEnum):
    """How a pass ran: as a recording that was replayed, or operation by operation."""

    RECORDED = "recorded"
    EAGER = "eager"


class RecordingOutcome(StrEnum):
    """What became of an attempt to record a kind of pass."""

    MADE = "made"
    FAILED = "failed"


class MemoryUse(StrEnum):
    """Bytes of the device: in use by tensors now, taken from it by this process, or held by recordings."""

    ALLOCATED = "allocated"
    RESERVED = "reserved"
    PROGRAMS = "programs"


class Metrics:
    """The metrics, as attributes. Names start with recofuse_ and end in their base unit, counts in _total."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "recofuse_requests", "Answered requests.", ["protocol", "route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "recofuse_request_seconds", "From the request's head to its answer's end.", ["protocol", "route"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("recofuse_in_flight", "Requests being answered.", ["protocol"], registry=registry)
        self.errors = Counter("recofuse_errors", "Errors told to callers.", ["code"], registry=registry)
        self.stream_frames = Counter(
            "recofuse_stream_frames",
            "Frames of streams by what became of them.",
            ["mode", "outcome"],
            registry=registry,
        )
        self.jobs_accepted = Counter(
            "recofuse_jobs_accepted", "Jobs put in the queue.", ["priority"], registry=registry
        )
        self.jobs_finished = Counter(
            "recofuse_jobs_finished", "Jobs that a worker ended.", ["status"], registry=registry
        )
        self.jobs_dropped = Counter("recofuse_jobs_dropped", "Jobs dropped uncomputed.", ["reason"], registry=registry)
        self.payload_bytes = Histogram(
            "recofuse_payload_bytes", "Bytes of one job's images.", buckets=BYTES, registry=registry
        )
        self.stage_seconds = Histogram(
            "recofuse_stage_seconds", "Time of one job in one stage.", ["stage"], buckets=SECONDS, registry=registry
        )
        self.rig_residual_pixels = Histogram(
            "recofuse_rig_residual_pixels",
            "How far off infrared still seemed in a frame with align=refine, in pixels of a width of 640.",
            ["rig"],
            buckets=PIXELS,
            registry=registry,
        )
        self.rig_moved_pixels = Histogram(
            "recofuse_rig_moved_pixels",
            "How far infrared was moved beyond its rig in a frame with align=refine, in pixels of a width of 640.",
            ["rig"],
            buckets=PIXELS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "recofuse_batch_size", "Jobs in one forward pass.", buckets=SIZES, registry=registry
        )
        self.padded_items = Counter(
            "recofuse_padded_items", "Places of batches that were filled up.", registry=registry
        )
        self.batches_split = Counter("recofuse_batches_split", "Batches halved after a failure.", registry=registry)
        self.jobs_held = Gauge("recofuse_jobs_held", "Jobs in any stage of this worker.", registry=registry)
        self.engine_busy_seconds = Counter(
            "recofuse_engine_busy_seconds", "Time that the engine computed.", registry=registry
        )
        self.engine_runs = Counter(
            "recofuse_engine_runs", "Passes by how they ran (recorded on a GPU).", ["form"], registry=registry
        )
        self.engine_recordings = Counter(
            "recofuse_engine_recordings", "Attempts to record a kind of pass.", ["outcome"], registry=registry
        )
        self.engine_recording_seconds = Counter(
            "recofuse_engine_recording_seconds", "Time spent on recording.", registry=registry
        )
        self.engine_programs = Gauge("recofuse_engine_programs", "Recordings that are held.", registry=registry)
        self.engine_evictions = Counter(
            "recofuse_engine_evictions", "Recordings given up for others.", registry=registry
        )
        self.engine_memory_bytes = Gauge(
            "recofuse_engine_memory_bytes", "Memory of the engine's GPU, by use.", ["use"], registry=registry
        )
        self.queue_depth = Gauge("recofuse_queue_depth", "Waiting jobs.", ["priority"], registry=registry)
        self.queue_leased = Gauge("recofuse_queue_leased", "Jobs at workers.", registry=registry)
        self.queue_bytes = Gauge("recofuse_queue_bytes", "Bytes that count for the queue's bound.", registry=registry)
        self.queue_folder_bytes = Gauge(
            "recofuse_queue_folder_bytes", "Bytes of files in the queue's shared folder.", registry=registry
        )
        self.queue_age_seconds = Gauge(
            "recofuse_queue_age_seconds", "Wait of the oldest waiting job so far.", registry=registry
        )
        self.workers = Gauge(
            "recofuse_workers", "Workers that the queue knows to be there.", ["state"], registry=registry
        )
        self.dead_letters = Gauge("recofuse_dead_letters", "Jobs put aside after failing.", registry=registry)
        self.model = Info("recofuse_model", "The model that this process runs.", registry=registry)
        self.build = Info("recofuse_build", "The software that this process runs.", registry=registry)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        # Series that exist from the start can be told apart from ones that are missing.
        for code in ErrorCode:
            self.errors.labels(code)
        for priority in Priority:
            self.jobs_accepted.labels(priority)
            self.queue_depth.labels(priority)
        for status in JobStatus:
            if status.is_final:
                self.jobs_finished.labels(status)
        for reason in DropReason:
            self.jobs_dropped.labels(reason)
        self._engine_seen = EngineActivity()
        self.observe_engine(self._engine_seen)
        for stage in Stage:
            self.stage_seconds.labels(stage)
        for mode in FlowMode:
            for outcome in FrameOutcome:
                self.stream_frames.labels(mode, outcome)

    @contextmanager
    def request(self, protocol: str) -> Iterator[RequestTimer]:
        """Counts and times one request; the caller fills in route, method and status before the end."""
        timer = RequestTimer()
        gauge = self.in_flight.labels(protocol)
        gauge.inc()
        started = time.perf_counter()
        try:
            yield timer
        finally:
            gauge.dec()
            self.request_seconds.labels(protocol, timer.route).observe(time.perf_counter() - started)
            self.requests.labels(protocol, timer.route, timer.method, timer.status).inc()

    def observe_stages(self, timings_s: Mapping[Stage, float]) -> None:
        """Add one finished job's stage times."""
        for stage, seconds in timings_s.items():
            self.stage_seconds.labels(stage).observe(seconds)

    def observe_alignment(self, rig: str, alignment: Alignment, width: int) -> None:
        """Add one frame of a named rig of the operator's folder, which bounds the labels."""
        self.rig_moved_pixels.labels(rig).observe(alignment.moved_px * 640 / width)
        if alignment.residual_px is not None:
            self.rig_residual_pixels.labels(rig).observe(alignment.residual_px * 640 / width)

    def observe_engine(self, activity: EngineActivity) -> None:
        """Show what the engine of this process has done since it was asked last, and holds."""
        seen, self._engine_seen = self._engine_seen, activity
        self.engine_runs.labels(RunForm.RECORDED).inc(activity.recorded_runs - seen.recorded_runs)
        self.engine_runs.labels(RunForm.EAGER).inc(activity.eager_runs - seen.eager_runs)
        self.engine_recordings.labels(RecordingOutcome.MADE).inc(activity.recordings - seen.recordings)
        failed = activity.failed_recordings - seen.failed_recordings
        self.engine_recordings.labels(RecordingOutcome.FAILED).inc(failed)
        self.engine_recording_seconds.inc(activity.recording_s - seen.recording_s)
        self.engine_evictions.inc(activity.evictions - seen.evictions)
        self.engine_programs.set(activity.programs)
        self.engine_memory_bytes.labels(MemoryUse.ALLOCATED).set(activity.allocated_bytes)
        self.engine_memory_bytes.labels(MemoryUse.RESERVED).set(activity.reserved_bytes)
        self.engine_memory_bytes.labels(MemoryUse.PROGRAMS).set(activity.program_bytes)

    def set_queue(self, stats: QueueStats) -> None:
        """Show a snapshot of the queue."""
        for priority, depth in stats.depth.items():
            self.queue_depth.labels(priority).set(depth)
        self.queue_leased.set(stats.num_leased)
        self.queue_bytes.set(stats.size_bytes)
        self.queue_folder_bytes.set(stats.folder_bytes)
        self.queue_age_seconds.set(stats.oldest_age_s)
        self.dead_letters.set(stats.num_dead_letters)

    def set_workers(self, workers: Iterable[WorkerInfo]) -> None:
        """Show which workers the queue knows to be there."""
        counts = Counts(WorkerState.WARM if worker.is_warm else WorkerState.WARMING for worker in workers)
        for state in WorkerState:
            self.workers.labels(state).set(counts[state])

    def set_model(self, worker: WorkerInfo) -> None:
        """Show which model runs here."""
        self.model.info({"name": worker.model_name, "version": worker.model_version, "device": worker.device})

    @classmethod
    def table(cls) -> str:
        """A Markdown table of all metrics under their exposed names: type, labels, meaning."""
        rows = ["| Metric | Type | Labels | Meaning |", "|---|---|---|---|"]
        for metric in vars(cls(CollectorRegistry())).values():
            if isinstance(metric, MetricWrapperBase):
                (family,) = metric.describe()
                name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
                labels = ", ".join(f"`{label}`" for label in metric._labelnames)
                rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
        labels = ", ".join(f"`{label}`" for label in LABELS)
        rows += [f"| `{name}` | gauge | {labels} | {meaning} |" for name, meaning in GAUGES.items()]
        return "\n".join(rows)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type, in the form that an Accept header asks for."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """`render` on a thread: the driver of a GPU, which is asked then, may take tens of milliseconds."""
        return await asyncio.to_thread(self.render, accept)


class RequestTimer:
    """What `Metrics.request` will count. route: a route template, never a path."""

    __slots__ = ("method", "route", "status")

    def __init__(self) -> None:
        self.route = "unmatched"
        self.method = "other"
        self.status = "0"
