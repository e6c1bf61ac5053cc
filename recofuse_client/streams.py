"""Streams of frames over gRPC that outlive their connections.

`Ledger` keeps the books, and knows neither threads nor gRPC: which frame is to be sent, which ones wait for an answer,
what an answer or a broken connection means. `FrameStream` and `AsyncFrameStream` are the same loop around it, one with
a thread that reads the frames, one with a task.

Two modes. `all`: every frame gets a result; no more than `window` are without one, which slows the source down; when
a connection breaks, what has no answer is sent again, and `resume_after` makes sure that nothing is answered twice.
`latest`: the newest frame counts; one that waits to be sent is replaced by a newer one, here as at the server, and what
was on its way when a connection broke is not sent again, because by then it is old.

What a newcomer would get wrong: a refused frame (the server is stopping, the key's rate is used up) of mode `all` is
no result. The stream is opened anew behind the last answer, after a pause, and the frame goes out again.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from recofuse_client.errors import (
    ConnectionFailedError,
    ConnectionLostError,
    RecofuseError,
    RefusedError,
    TimedOutError,
)
from recofuse_client.pictures import ImageLike
from recofuse_client.retries import Retry
from recofuse_client.rpc import SERVICE, error_of_call, error_of_detail, fusion_of, image_message, options_message
from recofuse_client.values import Frame, FrameResult, Mode, Options, StreamStats
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb

METHOD = f"/{SERVICE}/FuseStream"
Frames = Iterable[Frame | tuple[ImageLike, ImageLike]]
AsyncFrames = AsyncIterable[Frame | tuple[ImageLike, ImageLike]]

# grpc.aio replaces the status of a stream that is refused while a frame is being written by an internal error. So after
# an unclear end the next connection sends its first frame late, when a refusal would have come.
HOLD_S = 0.5
CLOSE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """What holds for a whole stream.

    window: frames of mode `all` that may be without an answer; more hides the way to a distant server. max_in_flight:
    frames that the server works on at once, 0 for its own choice. frame_timeout_s: each frame's deadline, counted from
    its arrival; None for the server's own. reconnect_s: how long to go on trying when there is no answer any more;
    0: not at all. The time in which the source has nothing to send does not count.
    """

    options: Options = field(default_factory=Options)
    mode: Mode = "all"
    bgr: bool = False
    window: int = 16
    max_in_flight: int = 0
    frame_timeout_s: float | None = None
    reconnect_s: float = 60.0
    retry: Retry = field(default_factory=Retry)

    def __post_init__(self) -> None:
        if self.mode not in ("all", "latest"):
            raise ValueError(f"mode: accepted are all and latest, not {self.mode!r}")
        if self.window < 1 or self.max_in_flight < 0 or self.reconnect_s < 0:
            raise ValueError("window must be at least 1, max_in_flight and reconnect_s at least 0")


@dataclass(slots=True)
class _Sent:
    """A frame without an answer. sent_s: when it was last handed to gRPC (monotonic)."""

    message: pb.Frame
    sent_s: float


class Ledger:
    """The books of one stream, over all its connections."""

    def __init__(self, options: StreamOptions) -> None:
        self.options = options
        self._waiting: pb.Frame | None = None
        self._again: deque[pb.Frame] = deque()  # to be sent again, before anything that waits
        self._unanswered: OrderedDict[int, _Sent] = OrderedDict()
        # Frames without a result that no result has told of, by the last frame on its way before each (-1: none was).
        # An answer tells of those behind what was sent before it; so there are never more entries than frames sent.
        self._missed: Counter[int] = Counter()
        self._last_offered = -1
        self._last_answered: int | None = None
        self._failing_since_s: float | None = None
        self._num_failures = 0
        self._has_answered = False  # any connection
        self._is_fresh = False  # the present one has not answered
        self._stats = StreamStats()
        self.is_ended = False  # the source has no more frames

    # from the source

    @property
    def can_offer(self) -> bool:
        """Whether another frame may be offered now."""
        return self.options.mode == "latest" or (self._waiting is None and self._num_open < self.options.window)

    def offer(self, item: Frame | tuple[ImageLike, ImageLike]) -> None:
        """Take a frame of the source. Raises ValueError for sequence numbers that do not ascend; see Frame."""
        frame = item if isinstance(item, Frame) else Frame(*item, bgr=self.options.bgr)
        sequence = self._last_offered + 1 if frame.sequence is None else frame.sequence
        if sequence <= self._last_offered:
            raise ValueError(f"sequence: {sequence} came after {self._last_offered}; accepted are ascending numbers")
        message = pb.Frame(
            sequence=sequence,
            timestamp_ns=frame.timestamp_ns,
            vis=image_message(frame.vis, "vis", bgr=frame.bgr),
            ir=image_message(frame.ir, "ir", bgr=frame.bgr),
            timeout_ms=None if frame.timeout_s is None else max(1, round(frame.timeout_s * 1000)),
        )
        self._last_offered = sequence
        if self._waiting is not None:
            self._miss(next(reversed(self._unanswered), -1), dropped=1)
        self._waiting = message
        self._stats = replace(self._stats, offered=self._stats.offered + 1)

    # to the server

    @property
    def has_next(self) -> bool:
        """Whether a frame is to be sent."""
        return bool(self._again) or self._waiting is not None

    @property
    def is_done(self) -> bool:
        """Whether the source has ended and nothing is left to send or to be answered."""
        return self.is_ended and not self.has_next and not self._unanswered

    def take(self) -> pb.FuseStreamRequest:
        """The next message. has_next must hold."""
        if self._again:
            frame = self._again.popleft()
        else:
            assert self._waiting is not None
            frame, self._waiting = self._waiting, None
        self._unanswered[frame.sequence] = _Sent(frame, time.monotonic())
        return pb.FuseStreamRequest(frame=frame)

    def opening(self) -> pb.FuseStreamRequest:
        """A connection's first message."""
        self._is_fresh = True
        flow = pb.FLOW_CONTROL_LATEST if self.options.mode == "latest" else pb.FLOW_CONTROL_ALL
        options = pb.StreamOptions(
            fuse=options_message(self.options.options, self.options.frame_timeout_s),
            flow_control=flow,
            max_in_flight=self.options.max_in_flight,
            resume_after=self._last_answered,
        )
        return pb.FuseStreamRequest(options=options)

    # from the server

    def answer(self, response: pb.FuseStreamResponse) -> FrameResult | float:
        """A frame's result; or, if the frame is to go out again, the seconds after which to open the stream anew."""
        if self._is_fresh:  # only now it is known that this was a connection, and no vain attempt
            self._stats = replace(self._stats, reconnects=self._stats.reconnects + self._has_answered)
            self._is_fresh, self._has_answered = False, True
        error = error_of_detail(response.error) if response.WhichOneof("outcome") == "error" else None
        if isinstance(error, RefusedError) and self.options.mode == "all":
            pause_s = self._pause_s(error)
            if pause_s is not None:
                return pause_s
        fusion = fusion_of(response.fusion, "") if error is None else None
        sent = self._unanswered.pop(response.sequence, None)
        while self._unanswered and next(iter(self._unanswered)) < response.sequence:  # answers come in order
            self._unanswered.popitem(last=False)
            self._miss(dropped=1)
        num_missed = sum(self._missed.pop(behind) for behind in list(self._missed) if behind < response.sequence)
        self._last_answered = response.sequence
        self._failing_since_s, self._num_failures = None, 0
        told = response.stats
        self._stats = replace(
            self._stats,
            fused=self._stats.fused + (error is None),
            failed=self._stats.failed + (error is not None),
            received_per_s=told.received_per_s,
            fused_per_s=told.fused_per_s,
            age_p50_s=told.age_p50_s,
            age_p99_s=told.age_p99_s,
        )
        return FrameResult(
            sequence=response.sequence,
            timestamp_ns=response.timestamp_ns,
            fusion=fusion,
            error=error,
            num_missed=num_missed,
            age_s=response.age_s,
            latency_s=0.0 if sent is None else time.monotonic() - sent.sent_s,
            stats=self._stats,
        )

    def break_off(self, error: RecofuseError | None) -> float:
        """A connection has ended: by itself (None), or with this error. The seconds to wait before the next one.

        Raises the error if there is to be no next one.
        """
        if error is None and (self.options.mode == "latest" or not self._unanswered):
            while self._unanswered:  # an orderly end leaves unanswered only what was replaced
                self._unanswered.popitem(last=False)
                self._miss(dropped=1)
            return 0.0
        if error is None:
            error = ConnectionLostError("the server ended the stream before all frames were answered")
        if isinstance(error, TimedOutError) and not self._unanswered:
            return 0.0  # nothing came for long, and the server keeps no idle streams
        is_passing = isinstance(error, (ConnectionFailedError, ConnectionLostError, RefusedError, TimedOutError))
        pause_s = self._pause_s(error) if is_passing else None
        if pause_s is None:
            raise error
        return pause_s

    def rest(self, rest_s: float) -> None:
        """There was nothing to send for so long, which tries nobody's patience."""
        if self._failing_since_s is not None:
            self._failing_since_s += rest_s

    def reopen(self) -> None:
        """Sort out what the last connection left, before the next one."""
        if self.options.mode == "all":
            self._again.extendleft(reversed([sent.message for sent in self._unanswered.values()]))
            self._unanswered.clear()
        while self._unanswered:
            self._unanswered.popitem(last=False)
            self._miss(lost=1)
        if self._missed:  # nothing is on its way: the next result will tell of all of them
            self._missed = Counter({-1: self._missed.total()})

    @property
    def stats(self) -> StreamStats:
        """The counts so far."""
        return self._stats

    @property
    def _num_open(self) -> int:
        return len(self._unanswered) + len(self._again)

    def _miss(self, behind: int = -1, *, dropped: int = 0, lost: int = 0) -> None:
        self._missed[behind] += 1
        stats = self._stats
        self._stats = replace(stats, dropped=stats.dropped + dropped, lost=stats.lost + lost)

    def _pause_s(self, error: RecofuseError) -> float | None:
        """The pause before another try; None if trying has lasted too long."""
        now_s = time.monotonic()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        self._num_failures += 1
        pause_s = self.options.retry.pause_s(self._num_failures, error.retry_after_s)
        left_s = self._failing_since_s + self.options.reconnect_s - now_s
        return None if pause_s > left_s else pause_s


class FrameStream(Iterator[FrameResult]):
    """The results of a stream, in the order of its frames. Iterate over it, in a `with` block or to its end.

    The source is read in a thread of its own. What the source raises comes out here, after the results of the frames
    before. Raises RecofuseError when the stream cannot go on.
    """

    def __init__(
        self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...], frames: Frames, options: StreamOptions
    ) -> None:
        self._open: Callable[..., Any] = channel.stream_stream(
            METHOD, pb.FuseStreamRequest.SerializeToString, pb.FuseStreamResponse.FromString
        )
        self._metadata = metadata
        self._frames = frames
        self._ledger = Ledger(options)
        self._changed = threading.Condition()
        self._call: Any = None
        self._num_opened = 0
        self._is_closed = False
        self._source_error: BaseException | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> StreamStats:
        """The counts so far, which go on while nothing comes back."""
        with self._changed:
            return self._ledger.stats

    def close(self) -> None:
        """End the stream now, whatever is on its way. The source is closed once it gives way; waits 2 s for that."""
        with self._changed:
            self._is_closed = True
            call, self._call = self._call, None
            self._changed.notify_all()
        if call is not None:
            call.cancel()
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(CLOSE_S)

    def __next__(self) -> FrameResult:
        if self._reader is None and not self._is_closed:
            self._reader = threading.Thread(target=self._read, name="recofuse-frames", daemon=True)
            self._reader.start()
        try:
            while True:
                if self._is_closed or (self._call is None and not self._connect()):
                    break
                result = self._receive()
                if result is not None:
                    return result
        except BaseException:
            self.close()
            raise
        self.close()
        if (error := self._source_error) is not None:
            self._source_error = None
            raise error
        raise StopIteration

    def _connect(self) -> bool:
        """Open a connection once there is something to send; False if there will be nothing any more."""
        with self._changed:
            began_s = time.monotonic()
            self._changed.wait_for(lambda: self._is_closed or self._ledger.has_next or self._ledger.is_ended)
            self._ledger.rest(time.monotonic() - began_s)
            if self._is_closed or self._ledger.is_done:
                return False
            self._num_opened += 1
            self._call = self._open(self._requests(self._num_opened), metadata=self._metadata)
            return True

    def _receive(self) -> FrameResult | None:
        """The next result; None if the connection ended and another one is needed."""
        call = self._call
        try:
            response = next(call, None) if call is not None else None
        except grpc.RpcError as error:
            with self._changed:
                if self._is_closed:
                    return None
                pause_s = self._ledger.break_off(error_of_call(error))
        else:
            with self._changed:
                if self._is_closed:
                    return None
                outcome = self._ledger.break_off(None) if response is None else self._ledger.answer(response)
                self._changed.notify_all()
            if isinstance(outcome, FrameResult):
                return outcome
            pause_s = outcome
        with self._changed:
            self._call = None
            self._num_opened += 1  # tells the old connection's requests to end
            self._ledger.reopen()
            self._changed.notify_all()
        if call is not None:
            call.cancel()
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, timeout=pause_s)
        return None

    def _requests(self, number: int) -> Iterator[pb.FuseStreamRequest]:
        """One connection's messages; gRPC asks for the next when it can send it."""
        with self._changed:
            opening = self._ledger.opening()
        yield opening
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_current(number) or self._ledger.has_next or self._is_over())
                if not self._is_current(number) or not self._ledger.has_next:
                    return
                message = self._ledger.take()
                self._changed.notify_all()
            yield message

    def _is_current(self, number: int) -> bool:
        return not self._is_closed and self._num_opened == number

    def _is_over(self) -> bool:
        return self._ledger.is_ended and not self._ledger.has_next

    def _read(self) -> None:
        source = None
        try:
            source = iter(self._frames)
            for item in source:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed or self._ledger.can_offer)
                    if self._is_closed:
                        return
                    self._ledger.offer(item)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - the source is the caller's, and so is what it raises
            self._source_error = error
        finally:
            with self._changed:
                self._ledger.is_ended = True
                self._changed.notify_all()
            if (close := getattr(source, "close", None)) is not None:
                close()


class AsyncFrameStream(AsyncIterator[FrameResult]):
    """The results of a stream, in the order of its frames. Iterate over it, in an `async with` block or to its end.

    The source is read by a task; a source that is not asynchronous in a thread, so that a camera may block. What the
    source raises comes out here, after the results of the frames before. Raises RecofuseError when the stream cannot
    go on.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        metadata: tuple[tuple[str, str], ...],
        frames: Frames | AsyncFrames,
        options: StreamOptions,
    ) -> None:
        self._open: Callable[..., Any] = channel.stream_stream(
            METHOD, pb.FuseStreamRequest.SerializeToString, pb.FuseStreamResponse.FromString
        )
        self._metadata = metadata
        self._frames = frames
        self._ledger = Ledger(options)
        self._changed = asyncio.Condition()
        self._call: Any = None
        self._answers: Any = None
        self._num_opened = 0
        self._is_closed = False
        self._hold_s = 0.0  # before the next connection's first frame
        self._source_error: BaseException | None = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AsyncFrameStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def stats(self) -> StreamStats:
        """The counts so far, which go on while nothing comes back."""
        return self._ledger.stats

    async def close(self) -> None:
        """End the stream now, whatever is on its way, and close the source: see FrameStream.close."""
        self._is_closed = True
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        async with self._changed:
            self._changed.notify_all()

    async def __anext__(self) -> FrameResult:
        if self._reader is None and not self._is_closed:
            self._reader = asyncio.create_task(self._read())
        try:
            while True:
                if self._is_closed or (self._call is None and not await self._connect()):
                    break
                result = await self._receive()
                if result is not None:
                    return result
        except BaseException:
            await self.close()
            raise
        await self.close()
        if (error := self._source_error) is not None:
            self._source_error = None
            raise error
        raise StopAsyncIteration

    async def _connect(self) -> bool:
        async with self._changed:
            began_s = time.monotonic()
            await self._changed.wait_for(lambda: self._is_closed or self._ledger.has_next or self._ledger.is_ended)
            self._ledger.rest(time.monotonic() - began_s)
            if self._is_closed or self._ledger.is_done:
                return False
            self._num_opened += 1
            self._call = self._open(self._requests(self._num_opened), metadata=self._metadata)
            self._answers = self._call.__aiter__()
            return True

    async def _receive(self) -> FrameResult | None:
        call = self._call
        try:
            response = await anext(self._answers, None)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_closed and task is not None and not task.cancelling():
                return None  # `close`, called elsewhere, has cancelled the call, and not who reads it
            raise
        except grpc.RpcError as error:
            if self._is_closed:
                return None
            failure = error_of_call(error)
            self._hold_s = HOLD_S if isinstance(failure, ConnectionLostError) else 0.0
            pause_s = self._ledger.break_off(failure)
        else:
            async with self._changed:
                outcome = self._ledger.break_off(None) if response is None else self._ledger.answer(response)
                self._changed.notify_all()
            if isinstance(outcome, FrameResult):
                return outcome
            pause_s = outcome
        call.cancel()
        async with self._changed:
            self._call = None
            self._num_opened += 1
            self._ledger.reopen()
            self._changed.notify_all()
        await asyncio.sleep(pause_s)
        return None

    async def _requests(self, number: int) -> AsyncIterator[pb.FuseStreamRequest]:
        yield self._ledger.opening()
        await asyncio.sleep(self._hold_s)
        while True:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: not self._is_current(number) or self._ledger.has_next or self._is_over()
                )
                if not self._is_current(number) or not self._ledger.has_next:
                    return
                message = self._ledger.take()
                self._changed.notify_all()
            yield message

    def _is_current(self, number: int) -> bool:
        return not self._is_closed and self._num_opened == number

    def _is_over(self) -> bool:
        return self._ledger.is_ended and not self._ledger.has_next

    async def _read(self) -> None:
        source = None
        try:
            source = _asynchronous(self._frames)
            async for item in source:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._ledger.can_offer)
                    self._ledger.offer(item)
                    self._changed.notify_all()
        except Exception as error:  # noqa: BLE001 - the source is the caller's, and so is what it raises
            self._source_error = error
        finally:
            self._ledger.is_ended = True
            if (aclose := getattr(source, "aclose", None)) is not None:
                with contextlib.suppress(RuntimeError):  # a generator that goes on when it is closed
                    await aclose()
            async with self._changed:
                self._changed.notify_all()


class _InThread(AsyncIterator[Frame | tuple[ImageLike, ImageLike]]):
    """The items of a source that may block, read in a thread, one whenever one is asked for.

    The thread is a daemon: a camera that never gives way keeps no program from ending.
    """

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._loop = asyncio.get_running_loop()
        self._asked: queue.SimpleQueue[asyncio.Future[Any] | None] = queue.SimpleQueue()
        self._is_left = asyncio.Event()
        threading.Thread(target=self._read, name="recofuse-frames", daemon=True).start()

    async def __anext__(self) -> Frame | tuple[ImageLike, ImageLike]:
        asked = self._loop.create_future()
        self._asked.put(asked)
        item: Frame | tuple[ImageLike, ImageLike] = await asked
        return item

    async def aclose(self) -> None:
        """Close the source once it gives way; waits 2 s for that."""
        self._asked.put(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._is_left.wait()

    def _read(self) -> None:
        source: Any = None
        while (asked := self._asked.get()) is not None:
            item: Any = None
            failure: BaseException | None = None
            try:
                source = iter(self._frames) if source is None else source
                item = next(source)
            except StopIteration:
                failure = StopAsyncIteration()
            except BaseException as error:  # noqa: BLE001 - the source is the caller's, and so is what it raises
                failure = error
            self._tell(_settle, asked, item, failure)
        if (close := getattr(source, "close", None)) is not None:
            close()
        self._tell(self._is_left.set)

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(what, *arguments)


def _settle(asked: asyncio.Future[Any], item: Any, failure: BaseException | None) -> None:
    if asked.done():  # nobody waits for it any more
        return
    if failure is None:
        asked.set_result(item)
    else:
        asked.set_exception(failure)


def _asynchronous(frames: Frames | AsyncFrames) -> AsyncIterator[Frame | tuple[ImageLike, ImageLike]]:
    return frames.__aiter__() if isinstance(frames, AsyncIterable) else _InThread(frames)
