"""One stream of frames, from its first message to its last answer.

What a newcomer would get wrong: a stream never holds more than `max_in_flight` frames beside the one that waits, and
none for which the process has no room (`access/held.py`): then it does not read. Mode `all` reads the next message only
when there is room, and HTTP/2's windows carry that to the sender; mode `latest` goes on reading and replaces the frame
that waits. Before a full queue the frames of all streams stand in one line, where a frame of mode `latest` can still be
replaced, so that chance does not decide who gets more. A peer that is there and does nothing is noticed by
`stream_idle_s`; one that is gone, by the connection's pings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from recofuse_images.steady import Memory, Seen
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from service.access.guard import charge
from service.access.held import Holding
from service.faces.gateway import FusionRequest, Gateway
from service.faces.grpc.arriving import Messages
from service.faces.grpc.ledger import StreamLedger
from service.faces.grpc.messages import CheckedOptions, error_detail, fusion_of, name_of
from service.terms.errors import (
    INTERNAL_MESSAGE,
    InternalError,
    InvalidInputError,
    NoRoomError,
    OverloadedError,
    PayloadTooLargeError,
    ServiceError,
    TimedOutError,
    UnauthenticatedError,
    UnavailableError,
)
from service.terms.jobs import FusionResult
from service.terms.settings import Settings
from service.watch import logs
from service.watch.metrics import FlowMode, FrameOutcome, Metrics

logger = logging.getLogger(__name__)

IN_FLIGHT_LATEST = 2  # one in the model and one on its way there; more would only be older
HISTORY_SHARE = 8  # a history beyond this part of what the queue holds would keep all others out, or its own frame
RETRY_S = (0.01, 0.25)  # first and longest pause of the first frame in the line before a full queue


@dataclass(slots=True)
class _Arrived:
    """A frame, and when it came (monotonic seconds). In mode `latest` a newer one may take its place.

    holding: what it takes in memory. pair: its request, once it was made; then its images are in there alone. history:
    what it is averaged with, None for nothing whatever the stream knows. seen: what its result told of it, for those
    after it.
    """

    frame: pb.Frame
    arrived_s: float
    holding: Holding
    pair: FusionRequest | None = None
    history: bytes | None = b""
    seen: bytes = b""

    def let_go_of_images(self) -> None:
        """Keep what the answer says about the frame."""
        self.frame, self.pair = _without_images(self.frame), None


@dataclass(frozen=True, slots=True)
class _End:
    """After the last frame: what ends the stream, None for its client's own end."""

    error: Exception | None


class Stream:
    """One FuseStream call. Three parts run at once: one reads, one starts frames as slots get free, one answers.

    A slot is held from a frame's start until its answer has been taken by the client, so that a client that does not
    read its answers is not read from either.
    """

    def __init__(
        self,
        gateway: Gateway,
        settings: Settings,
        metrics: Metrics,
        messages: Messages,
        traceparent: str | None,
        line: asyncio.Lock,
    ) -> None:
        self._gateway = gateway
        self._line = line
        self._settings = settings
        self._metrics = metrics
        self._messages = messages
        self._traceparent = traceparent
        self._moved_s = time.monotonic()  # when last a message came or an answer was taken
        self._kept: set[Holding] = set()  # of all frames that are here
        self._waiting: _Arrived | None = None  # read, and not started yet
        self._filled = asyncio.Event()  # a frame waits, or no more will come
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._end: _End | None = None
        self._is_barred = asyncio.Event()  # its key is not valid any more
        self._ordered: asyncio.Queue[tuple[_Arrived, asyncio.Task[pb.FuseStreamResponse]] | _End] = asyncio.Queue()
        self._num_started = 0
        self._history = (-1, b"")  # of calm frames: the newest that is known, after its frame's place in the stream
        self._history_room = messages.spare(_weakly(self._forget_history))
        self._track = (-1, "")  # of refined frames: the newest that is known, after its frame's place in the stream
        self._fusing: set[asyncio.Task[pb.FuseStreamResponse]] = set()
        self._configure(pb.StreamOptions())

    async def answers(self) -> AsyncGenerator[pb.FuseStreamResponse, None]:
        """The answers, in the order of the frames. Raises what ended the stream once all before it is answered."""
        parts = [asyncio.create_task(part) for part in (self._read_until_told(), self._start_frames())]
        try:
            while not isinstance(entry := await self._ordered.get(), _End):
                arrived, task = entry
                answer = await task
                self._remember(arrived)
                self._stamp(answer, arrived.arrived_s)
                yield answer
                self._moved_s = time.monotonic()
                self._slots.release()
            if entry.error is not None:
                raise entry.error
        finally:
            unfinished: list[asyncio.Task[Any]] = [*parts, *self._fusing]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            for holding in tuple(self._kept):
                self._let_go(holding)
            self._forget_history()
            # An error's frames refer to this stream, which would keep it with all frames of both kinds in turn.
            self._ordered, self._end, self._waiting = asyncio.Queue(), None, None

    # reading

    async def _read_until_told(self) -> None:
        """Read until the sender ends, this server stops, nothing moves any more, or the sender's key has ended."""
        reading = asyncio.create_task(self._read())
        draining = asyncio.create_task(self._gateway.drain_started())
        resting = asyncio.create_task(self._idle())
        barred = asyncio.create_task(self._is_barred.wait())
        told = {draining, resting, barred}
        try:
            await asyncio.wait({reading, *told}, return_when=asyncio.FIRST_COMPLETED)
            if barred.done():
                self._finish(UnauthenticatedError("the API key of this stream is not valid any more"))
            elif not reading.done():
                stopping = UnavailableError("this server is stopping; open the stream again", retry_after_s=1.0)
                idle_s = self._settings.grpc.stream_idle_s
                idle = TimedOutError(f"no frame came for {idle_s:g} s; open the stream again when there are some")
                self._finish(stopping if draining.done() else idle)
        finally:
            for task in (reading, *told):
                task.cancel()
            await asyncio.gather(reading, *told, return_exceptions=True)

    async def _idle(self) -> None:
        """Returns once no frame is open and nothing has moved for `stream_idle_s`; never if that is 0."""
        idle_s = self._settings.grpc.stream_idle_s
        if not idle_s:
            await asyncio.Event().wait()
        while (rest_s := self._moved_s + idle_s - time.monotonic()) > 0 or self._ledger.num_open:  # noqa: ASYNC110
            await asyncio.sleep(max(rest_s, idle_s / 10))  # seldom; an event for each message would cost more

    async def _read(self) -> None:
        is_first = True
        try:
            async for message in self._messages:
                self._moved_s = time.monotonic()
                match message.WhichOneof("message"):
                    case "frame":
                        await self._accept(message.frame)
                    case "options" if is_first:
                        self._configure(message.options)
                    case "options":
                        raise InvalidInputError("options are accepted in a stream's first message only")
                    case _:
                        raise InvalidInputError("a message holds neither options nor a frame")
                is_first = False
                del message  # or it would stay until the next one comes
        except Exception as error:  # noqa: BLE001 - whatever it is ends the stream, after what came before it
            self._finish(error)
        else:
            self._finish(None)

    def _configure(self, options: pb.StreamOptions) -> None:
        self._options = CheckedOptions.of(options.fuse)
        mode = name_of(pb.FlowControl, options.flow_control, "flow_control")
        self._mode = FlowMode.ALL if mode is None else FlowMode(mode)
        most = self._settings.grpc.max_in_flight
        if options.max_in_flight > most:
            raise InvalidInputError(f"max_in_flight: accepted are at most {most}, not {options.max_in_flight}")
        default = most if self._mode is FlowMode.ALL else min(most, IN_FLIGHT_LATEST)
        self._is_calm = options.calm
        if self._is_calm:
            default = 1  # frames that are at work together know nothing of each other
        self._slots = asyncio.Semaphore(options.max_in_flight or default)
        self._memory = Memory() if options.steady or not options.HasField("steady") else None
        self._means = b""
        self._ledger = StreamLedger(options.resume_after if options.HasField("resume_after") else None)

    async def _accept(self, frame: pb.Frame) -> None:
        arrived = _Arrived(frame, time.monotonic(), self._messages.keep())
        self._kept.add(arrived.holding)
        if not self._ledger.arrive(frame.sequence, arrived.arrived_s):
            self._count(FrameOutcome.SKIPPED)
            self._let_go(arrived.holding)
            return
        if self._mode is FlowMode.ALL:
            await self._emptied.wait()
        elif self._waiting is not None:
            self._let_go(self._waiting.holding)
            self._drop()
        self._waiting = arrived
        self._emptied.clear()
        self._filled.set()

    def _finish(self, error: Exception | None) -> None:
        if self._end is None:
            self._end = _End(error)
            self._filled.set()

    # fusing

    async def _start_frames(self) -> None:
        while True:
            await self._filled.wait()
            if self._waiting is None:
                break
            await self._slots.acquire()
            arrived, accepted = self._take_waiting(), asyncio.Event()
            task = asyncio.create_task(self._answer(arrived, accepted, self._num_started))
            self._num_started += 1
            self._fusing.add(task)
            task.add_done_callback(self._fusing.discard)
            self._ordered.put_nowait((arrived, task))
            if self._mode is FlowMode.LATEST:
                await accepted.wait()  # one frame of a stream at a time stands in line: its newest takes that place
        self._ordered.put_nowait(self._end or _End(None))

    def _take_waiting(self) -> _Arrived:
        """The frame that waits, which there must be, and room for the next."""
        assert self._waiting is not None
        arrived, self._waiting = self._waiting, None
        self._emptied.set()
        if self._end is None:
            self._filled.clear()
        return arrived

    async def _answer(self, arrived: _Arrived, accepted: asyncio.Event, place: int) -> pb.FuseStreamResponse:
        """One frame's answer. accepted: set once the frame has a place in the queue, or will not get one.

        place: how many frames were started before.
        """
        answer, history = pb.FuseStreamResponse(), b""
        try:
            await charge()
            result = await self._fuse(arrived, accepted)
            if result.track:
                self._track = max(self._track, (place, result.track))
            arrived.seen, history = result.seen, result.history
            fusion = fusion_of(result, is_raw=self._options.is_raw, started_s=arrived.arrived_s)
            answer.fusion.CopyFrom(fusion)
        except ServiceError as error:
            if isinstance(error, UnavailableError) and self._gateway.is_draining:
                raise  # never accepted, so it ends the stream: whoever opens it again sends the frame again
            self._metrics.errors.labels(error.code).inc()
            answer.error.CopyFrom(error_detail(error))
            if isinstance(error, UnauthenticatedError):
                self._is_barred.set()
        except Exception:  # the process boundary of one frame
            logger.exception("frame failed", extra={"sequence": arrived.frame.sequence})
            failure = InternalError(INTERNAL_MESSAGE)
            self._metrics.errors.labels(failure.code).inc()
            answer.error.CopyFrom(error_detail(failure))
        finally:
            accepted.set()
            arrived.let_go_of_images()  # the answer may wait long for those before it, and for its client
            self._let_go(arrived.holding)
        if history or arrived.history:
            self._keep_history(place, history)  # once the frame itself is let go of; none after one that failed with it
        answer.sequence, answer.timestamp_ns = arrived.frame.sequence, arrived.frame.timestamp_ns
        return answer

    async def _fuse(self, arrived: _Arrived, accepted: asyncio.Event) -> FusionResult:
        """The frame's result. Before a full queue it stands in line with those of all streams. Raises ServiceError."""
        pause_s, longest_s = RETRY_S
        is_refused = is_first = False

        def step_out() -> None:
            nonlocal is_first
            if is_first:
                is_first = False
                self._line.release()

        def leave() -> None:
            accepted.set()
            step_out()

        try:
            while True:
                if not is_first and (is_refused or self._line.locked()) and self._is_possible(arrived.frame):
                    await self._stand_in_line(arrived)
                    is_first = True
                if self._mode is FlowMode.LATEST and self._waiting is not None and is_first:
                    newest = self._take_waiting()
                    self._let_go(arrived.holding)
                    arrived.frame, arrived.arrived_s, arrived.holding = newest.frame, newest.arrived_s, newest.holding
                    arrived.pair, arrived.history = None, b""
                    self._drop()
                try:
                    return await self._gateway.fuse(self._request(arrived), leave)
                except (OverloadedError, PayloadTooLargeError) as error:
                    is_large = isinstance(error, NoRoomError | PayloadTooLargeError)
                    if is_large and arrived.history:
                        self._do_without_history(arrived)
                        continue
                    if isinstance(error, PayloadTooLargeError):
                        raise
                    is_refused = True
                if is_large:
                    step_out()  # and to the end of the line: smaller frames behind this one may fit
                if is_first or is_large:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, longest_s)
        finally:
            leave()

    async def _stand_in_line(self, arrived: _Arrived) -> None:
        """Returns as the first in the line. Raises TimedOutError at the frame's deadline."""
        timeout_s = self._timeout_s(arrived.frame)
        remaining_s = arrived.arrived_s + timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, remaining_s)):
                await self._line.acquire()
        except TimeoutError as error:
            raise TimedOutError("the frame's deadline passed before it could be queued") from error

    def _is_possible(self, frame: pb.Frame) -> bool:
        """Whether the gateway will accept the frame's timeout; it is to refuse it, not the line."""
        return 0 < self._timeout_s(frame) <= self._settings.jobs.max_timeout_s

    def _timeout_s(self, frame: pb.Frame) -> float:
        asked_s = frame.timeout_ms / 1000 if frame.HasField("timeout_ms") else self._options.timeout_s
        return self._settings.jobs.default_timeout_s if asked_s is None else asked_s

    def _request(self, arrived: _Arrived) -> FusionRequest:
        """The gateway's request for a frame. Raises TimedOutError, InvalidInputError."""
        frame, timeout_s = arrived.frame, self._timeout_s(arrived.frame)
        passed_s = time.monotonic() - arrived.arrived_s
        if 0 < timeout_s <= passed_s:
            raise TimedOutError("the frame's deadline passed before it could be queued")
        if arrived.pair is None:
            arrived.pair = self._options.request(
                frame.vis,
                frame.ir,
                timeout_s=None,
                may_repeat=True,  # a frame has one result, however often it is computed
                request_id=f"{logs.request_id.get()}.{frame.sequence}",
                traceparent=self._traceparent,
            )
            arrived.frame = _without_images(frame)
        # What the gateway will refuse, it must see as it was asked for.
        left_s = timeout_s if timeout_s > self._settings.jobs.max_timeout_s else timeout_s - passed_s
        means = None if self._memory is None else self._means
        history = self._bring_history(arrived) if self._is_calm else None
        return replace(arrived.pair, timeout_s=left_s, track=self._track[1], means=means, history=history)

    def _remember(self, arrived: _Arrived) -> None:
        """What the frames after this one are held to, frames in their order."""
        if self._memory is not None and arrived.seen:
            self._memory.add(Seen.from_bytes(arrived.seen))
            self._means = b"" if self._memory.means is None else self._memory.means.to_bytes()

    def _bring_history(self, arrived: _Arrived) -> bytes:
        """What a frame is averaged with, counted with the frame; what it brought before if there is no room for it."""
        history = self._history[1]
        if arrived.history is not None and history is not arrived.history:
            with contextlib.suppress(OverloadedError):
                arrived.holding.add(len(history) - len(arrived.history))
                arrived.history = history
        return arrived.history or b""

    def _do_without_history(self, arrived: _Arrived) -> None:
        """The queue takes no job so large; perhaps it takes the frame alone."""
        arrived.holding.add(-len(arrived.history or b""))
        arrived.history = None
        self._forget_history()

    def _keep_history(self, place: int, history: bytes) -> None:
        """What the next frame is averaged with, if room is left over for it: it begins anew if not."""
        if not self._is_calm or place < self._history[0]:
            return
        is_small = HISTORY_SHARE * len(history) <= self._settings.queue.max_bytes
        self._history = place, history if is_small and self._history_room.keep(len(history)) else b""

    def _forget_history(self) -> None:
        self._history_room.release()
        self._history = self._history[0], b""

    def _let_go(self, holding: Holding) -> None:
        holding.release()
        self._kept.discard(holding)

    # counting

    def _stamp(self, answer: pb.FuseStreamResponse, arrived_s: float) -> None:
        """Count an answer, and write into it what is only known when it is its turn."""
        now_s = time.monotonic()
        answer.age_s = now_s - arrived_s
        if (previous := self._ledger.previous_sequence) is not None:
            answer.previous_sequence = previous
        is_fused = answer.WhichOneof("outcome") == "fusion"
        self._ledger.answer(answer.sequence, is_fused=is_fused, age_s=answer.age_s, now_s=now_s)
        answer.stats.CopyFrom(pb.StreamStats(**asdict(self._ledger.snapshot(now_s))))
        self._count(FrameOutcome.FUSED if is_fused else FrameOutcome.FAILED)

    def _drop(self) -> None:
        self._ledger.drop()
        self._count(FrameOutcome.DROPPED)

    def _count(self, outcome: FrameOutcome) -> None:
        self._metrics.stream_frames.labels(self._mode, outcome).inc()


def _without_images(frame: pb.Frame) -> pb.Frame:
    bare = pb.Frame(sequence=frame.sequence, timestamp_ns=frame.timestamp_ns)
    if frame.HasField("timeout_ms"):
        bare.timeout_ms = frame.timeout_ms
    return bare


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """A bound method that does not keep its object: what a stream holds must not hold the stream."""
    weak = weakref.WeakMethod(method)

    def call() -> None:
        if (still := weak()) is not None:
            still()

    return call
