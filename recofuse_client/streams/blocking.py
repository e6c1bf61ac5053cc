"""The loop around a ledger that blocks, with a thread that reads the frames."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from recofuse_client.rpc import error_of_call
from recofuse_client.streams.ledger import Ledger
from recofuse_client.streams.options import CLOSE_S, METHOD, Frames, StreamOptions
from recofuse_client.values import FrameResult, StreamStats
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb


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
