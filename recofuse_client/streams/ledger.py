"""The books of a stream, over all its connections: which frame is to be sent, which ones wait for an answer.

Neither threads nor gRPC are known here, only what an answer or a broken connection means.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, replace

from recofuse_client.errors import (
    ConnectionFailedError,
    ConnectionLostError,
    RecofuseError,
    RefusedError,
    TimedOutError,
)
from recofuse_client.pictures import ImageLike
from recofuse_client.rpc import error_of_detail, fusion_of, image_message, options_message
from recofuse_client.streams.options import StreamOptions
from recofuse_client.values import Frame, FrameResult, StreamStats
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb


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
            steady=self.options.steady,
            calm=self.options.calm,
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
