"""Simulated cameras: streams of moving, degraded, generated scenes into a server, and what came of them.

Each camera is one `FuseStream` call of a real client. Frames are rendered and encoded once and then looped, so that the
load costs little beside what it loads. A camera that loses its stream opens a new one at the next target and resumes
after its last answer; in mode `all` it sends again what had no answer.

What a newcomer would get wrong: end-to-end latency counts from when the camera *had* the frame. In mode `all` a camera
is slowed by back-pressure and takes its next frame only when the one before has been accepted; in mode `latest` it
takes frames at its own pace.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import grpc
import numpy as np
from numpy.typing import NDArray

from recofuse_images.writer import jpeg_bytes
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from recofuse_rigs.camera import seen_by
from recofuse_rigs.rig import Rig, to_json
from service.faces.grpc.ledger import quantile
from service.terms.jobs import Exposure
from service.watch.metrics import FlowMode

if TYPE_CHECKING:
    from torch import Tensor

    from recofuse_core.scenes.scene import Scene

Encoding = Literal["raw", "jpeg"]
AnswerFormat = Literal["raw", "jpeg", "png", "webp"]

RETRY_S = 0.2  # between two tries to open a stream
ANSWERS_S = 60.0  # longest wait for the last answers when the time is over

# Dead servers are noticed by pings that are not answered; the second option is what decides in current gRPC.
CHANNEL = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each camera, as cameras have
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraPlan:
    """What the cameras do. size: (width, height), pixels. steps, exposure: None asks for the model's own.

    steady, calm: of every stream, as `recofuse_client.streams.options.StreamOptions` has them.
    rig: how infrared lies in the visible frame, and which the server is told; None for registered cameras.
    """

    num_streams: int = 16
    fps: float = 25.0
    seconds: float = 10.0
    mode: FlowMode = FlowMode.LATEST
    size: tuple[int, int] = (640, 480)
    encoding: Encoding = "jpeg"
    answer: AnswerFormat = "jpeg"
    steps: int | None = None
    exposure: Exposure | None = None
    steady: bool = True
    calm: bool = False
    rig: Rig | None = None
    max_in_flight: int = 0
    seed: int = 0
    num_frames: int = 25  # of the loop
    num_scenes: int = 2


@dataclass(slots=True)
class Tally:
    """What one camera saw. latencies_s, ages_s: of answers with pictures, from the camera and from the server's door.

    arrivals_s: when they came, seconds after the start.
    """

    num_sent: int = 0
    num_fused: int = 0
    num_failed: int = 0
    num_dropped: int = 0  # as the server's answers counted them
    num_missing: int = 0
    num_unanswered: int = 0  # mode all: sent, and neither answered nor reported as dropped at the end
    num_out_of_order: int = 0
    num_gaps_unreported: int = 0  # numbers without an answer that no answer had announced
    num_resumed: int = 0
    errors: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    ages_s: list[float] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CameraReport:
    """All cameras together; seconds: until the last answer."""

    plan: CameraPlan
    tallies: list[Tally]
    seconds: float

    def total(self, name: str) -> int:
        """The sum of one count over all cameras."""
        return sum(getattr(tally, name) for tally in self.tallies)

    @property
    def fused_per_s(self) -> float:
        """Delivered frames a second, all cameras together, while frames were sent."""
        within = sum(1 for tally in self.tallies for moment in tally.arrivals_s if moment <= self.plan.seconds)
        return within / self.plan.seconds

    @property
    def unfairness(self) -> float:
        """The largest relative distance of a camera's delivered frames from the mean; 0: all have the same."""
        counts = [tally.num_fused for tally in self.tallies]
        mean = sum(counts) / len(counts)
        return max(abs(count - mean) for count in counts) / mean if mean else 1.0

    def latency_s(self, share: float) -> float:
        """A quantile of the end-to-end latency."""
        return quantile(sorted(value for tally in self.tallies for value in tally.latencies_s), share)

    @property
    def max_age_s(self) -> float:
        """The oldest delivered frame, from its arrival at the server."""
        return max((value for tally in self.tallies for value in tally.ages_s), default=0.0)

    @property
    def figures(self) -> dict[str, Any]:
        """For programs."""
        plan = self.plan
        return {
            "num_streams": plan.num_streams,
            "fps": plan.fps,
            "seconds": round(self.seconds, 2),
            "mode": str(plan.mode),
            "size": f"{plan.size[0]}x{plan.size[1]}",
            "encoding": plan.encoding,
            "answer": plan.answer,
            "steps": plan.steps,
            "exposure": plan.exposure,
            "steady": plan.steady,
            "calm": plan.calm,
            "has_rig": plan.rig is not None,
            "num_sent": self.total("num_sent"),
            "num_fused": self.total("num_fused"),
            "num_failed": self.total("num_failed"),
            "num_dropped": self.total("num_dropped"),
            "num_missing": self.total("num_missing"),
            "num_unanswered": self.total("num_unanswered"),
            "num_out_of_order": self.total("num_out_of_order"),
            "num_gaps_unreported": self.total("num_gaps_unreported"),
            "num_resumed": self.total("num_resumed"),
            "fused_per_s": round(self.fused_per_s, 2),
            "fused_per_s_each": round(self.fused_per_s / plan.num_streams, 2),
            "fused_by_stream": [tally.num_fused for tally in self.tallies],
            "unfairness": round(self.unfairness, 4),
            "latency_ms": {f"p{share * 100:g}": round(1e3 * self.latency_s(share), 1) for share in (0.5, 0.95, 0.99)},
            "max_age_ms": round(1e3 * self.max_age_s, 1),
            "errors": sorted({error for tally in self.tallies for error in tally.errors}),
        }

    @property
    def line(self) -> str:
        """One readable line."""
        plan, figures = self.plan, self.figures
        latency = figures["latency_ms"]
        return (
            f"{plan.num_streams} cameras of {figures['size']} at {plan.fps:g} fps, mode {plan.mode}: "
            f"{self.fused_per_s:.1f} frames/s fused ({figures['fused_per_s_each']:.2f} each, within "
            f"{100 * self.unfairness:.1f} %), end-to-end p50 {latency['p50']:.0f}, p95 {latency['p95']:.0f}, "
            f"p99 {latency['p99']:.0f} ms; {figures['num_sent']} sent, {figures['num_dropped']} dropped, "
            f"{figures['num_failed']} failed, {figures['num_unanswered']} unanswered, {figures['num_resumed']} resumed"
        )


# --- what cameras see -------------------------------------------------------------------------------------------------


def degraded_clip(
    seed: int, num_frames: int, height: int, width: int
) -> tuple[list[Scene], list[tuple[Tensor, Tensor]]]:
    """A moving street's clean frames, and the same as (vis, ir) of a bad camera: fixed tones, fresh noise in each."""
    from torch import Generator

    from recofuse_core.degradations.recipes import bad_camera
    from recofuse_core.scenes.scene import moving_scene

    generator = Generator().manual_seed(seed)
    clean = list(moving_scene(seed, num_frames, height, width))
    return clean, [bad_camera(scene.vis, scene.ir, generator) for scene in clean]


def render_loop(plan: CameraPlan) -> list[list[tuple[pb.Image, pb.Image]]]:
    """The frames of every scene as messages (vis, ir). Raises BadRigError for a rig of another shape than the size."""
    width, height = plan.size
    rig = None if plan.rig is None else plan.rig.resized(plan.size, plan.rig.ir_size)
    loops = []
    for scene in range(plan.num_scenes):
        _, frames = degraded_clip(plan.seed + scene, plan.num_frames, height, width)
        levels = ((_levels(vis), _levels(ir)[..., 0]) for vis, ir in frames)
        seen = ((vis, ir if rig is None else seen_by(rig, ir)) for vis, ir in levels)
        loops.append([(message_of(vis, plan.encoding), message_of(ir, plan.encoding)) for vis, ir in seen])
    return loops


def _levels(picture: Tensor) -> NDArray[np.uint8]:
    return np.ascontiguousarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


def message_of(pixels: NDArray[np.uint8], encoding: Encoding) -> pb.Image:
    """Pixels (H, W, 3) RGB or (H, W) grey as an image of the contract."""
    if encoding == "raw":
        pixel_format = pb.PIXEL_FORMAT_MONO8 if pixels.ndim == 2 else pb.PIXEL_FORMAT_RGB8
        height, width = pixels.shape[:2]
        return pb.Image(raw=pb.RawImage(pixel_format=pixel_format, width=width, height=height, data=pixels.tobytes()))
    return pb.Image(encoded=jpeg_bytes(pixels, quality=90))


# --- what cameras do --------------------------------------------------------------------------------------------------


async def simulate(
    targets: Sequence[str],
    plan: CameraPlan,
    loops: Sequence[Sequence[tuple[pb.Image, pb.Image]]],
    *,
    metadata: Sequence[tuple[str, str]] = (),
    say: Callable[[str], None] | None = None,
) -> CameraReport:
    """Run all cameras for plan.seconds, and wait for the answers that are due.

    targets: gRPC addresses such as localhost:8001; camera i begins with the i-th, and goes on to the next one when its
    stream ends early. loops: from `render_loop`. say: shown a line every other second.
    """
    started_s = time.monotonic()
    cameras = [
        _Camera(targets, plan, loops[number % len(loops)], number, started_s, metadata)
        for number in range(plan.num_streams)
    ]
    watching = asyncio.create_task(_watch(cameras, say)) if say is not None else None
    try:
        async with asyncio.TaskGroup() as tasks:
            for camera in cameras:
                tasks.create_task(camera.run())
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    return CameraReport(plan, [camera.tally for camera in cameras], time.monotonic() - started_s)


async def _watch(cameras: Sequence[_Camera], say: Callable[[str], None]) -> None:
    num_before = 0
    while True:
        await asyncio.sleep(2.0)
        num_fused = sum(camera.tally.num_fused for camera in cameras)
        num_dropped = sum(camera.tally.num_dropped for camera in cameras)
        say(f"{(num_fused - num_before) / 2:.1f} frames/s fused, {num_dropped} dropped so far")
        num_before = num_fused


class _Camera:
    """One camera: one stream at a time."""

    def __init__(
        self,
        targets: Sequence[str],
        plan: CameraPlan,
        loop: Sequence[tuple[pb.Image, pb.Image]],
        number: int,
        started_s: float,
        metadata: Sequence[tuple[str, str]],
    ) -> None:
        self.tally = Tally()
        self._targets = targets
        self._plan = plan
        self._loop = loop
        self._number = number
        self._started_s = started_s
        self._metadata = tuple(metadata)
        self._next = 0  # sequence number of the next new frame
        self._last_answer: int | None = None
        self._unanswered: deque[tuple[int, int]] = deque()  # (sequence, timestamp_ns) of mode all
        # Cameras are not synchronised: each ticks at a time of its own.
        self._phase_s = number / plan.num_streams / plan.fps
        self._dropped_before = self._missing_before = 0  # of streams that have ended

    async def run(self) -> None:
        """Until the time is over and what is due has been answered, or cannot be any more."""
        turn = self._number
        end_s = self._started_s + self._plan.seconds
        while True:
            is_complete = False
            async with grpc.aio.insecure_channel(self._targets[turn % len(self._targets)], CHANNEL) as channel:
                try:
                    async with asyncio.timeout(max(0.0, end_s - time.monotonic()) + ANSWERS_S):
                        await self._stream(channel)
                    is_complete = True
                except TimeoutError:
                    self.tally.errors.append(f"the last answers did not come within {ANSWERS_S:g} s")
                    is_complete = True
                except grpc.aio.AioRpcError as error:
                    self.tally.errors.append(f"{error.code().name}: {error.details()}")
            is_over = time.monotonic() >= end_s + ANSWERS_S
            is_idle = time.monotonic() >= end_s and not self._unanswered
            if is_complete or is_over or is_idle:
                break
            turn += 1
            self.tally.num_resumed += 1
            await asyncio.sleep(RETRY_S)
        self.tally.num_unanswered = len(self._unanswered)

    async def _stream(self, channel: grpc.aio.Channel) -> None:
        stub: Any = fusion_pb2_grpc.FusionServiceStub(channel)
        call = stub.FuseStream(metadata=self._metadata)
        sending = asyncio.create_task(self._send(call))
        self._dropped_before, self._missing_before = self.tally.num_dropped, self.tally.num_missing
        try:
            async for answer in call:
                self._take(answer)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            call.cancel()

    async def _send(self, call: Any) -> None:
        # Whatever breaks a write ends the reading side too, which reports it.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(pb.FuseStreamRequest(options=self._options()))
            for sequence, timestamp_ns in list(self._unanswered):
                await call.write(self._frame(sequence, timestamp_ns))
            async for sequence in self._ticks():
                timestamp_ns = time.monotonic_ns()
                if self._plan.mode is FlowMode.ALL:
                    self._unanswered.append((sequence, timestamp_ns))
                self.tally.num_sent += 1
                await call.write(self._frame(sequence, timestamp_ns))
            await call.done_writing()

    async def _ticks(self) -> AsyncIterator[int]:
        """Sequence numbers at the camera's pace; a camera that was held up does not catch up."""
        period_s, end_s = 1 / self._plan.fps, self._started_s + self._plan.seconds
        due_s = max(self._started_s + self._phase_s + self._next * period_s, time.monotonic())
        while due_s < end_s:
            await asyncio.sleep(due_s - time.monotonic())
            sequence, self._next = self._next, self._next + 1
            yield sequence
            due_s = max(due_s + period_s, time.monotonic())

    def _options(self) -> pb.StreamOptions:
        plan = self._plan
        fuse = pb.FuseOptions(
            format=pb.ImageFormat.Value(f"IMAGE_FORMAT_{plan.answer.upper()}"),
            steps=plan.steps,
            exposure=pb.Exposure.Value(f"EXPOSURE_{(plan.exposure or 'unspecified').upper()}"),
            rig="" if plan.rig is None else to_json(plan.rig, indent=None),
        )
        return pb.StreamOptions(
            fuse=fuse,
            flow_control=pb.FlowControl.Value(f"FLOW_CONTROL_{plan.mode.name}"),
            max_in_flight=plan.max_in_flight,
            resume_after=self._last_answer,
            steady=plan.steady,
            calm=plan.calm,
        )

    def _frame(self, sequence: int, timestamp_ns: int) -> pb.FuseStreamRequest:
        vis, ir = self._loop[(sequence + 7 * self._number) % len(self._loop)]
        return pb.FuseStreamRequest(frame=pb.Frame(sequence=sequence, timestamp_ns=timestamp_ns, vis=vis, ir=ir))

    def _take(self, answer: pb.FuseStreamResponse) -> None:
        tally, now_s = self.tally, time.monotonic()
        if self._last_answer is not None:
            tally.num_out_of_order += answer.sequence <= self._last_answer
            is_announced = answer.HasField("previous_sequence") and answer.previous_sequence == self._last_answer
            tally.num_gaps_unreported += not is_announced
        self._last_answer = answer.sequence
        while self._unanswered and self._unanswered[0][0] < answer.sequence:
            self._unanswered.popleft()  # passed over: a gap in a mode that has none
            tally.num_gaps_unreported += 1
        if self._unanswered and self._unanswered[0][0] == answer.sequence:
            self._unanswered.popleft()
        tally.num_dropped = self._dropped_before + answer.stats.dropped
        tally.num_missing = self._missing_before + answer.stats.missing
        if answer.WhichOneof("outcome") != "fusion":
            tally.num_failed += 1
            tally.errors.append(f"{answer.error.code}: {answer.error.message}")
            return
        tally.num_fused += 1
        tally.ages_s.append(answer.age_s)
        tally.latencies_s.append(now_s - answer.timestamp_ns / 1e9)
        tally.arrivals_s.append(now_s - self._started_s)
