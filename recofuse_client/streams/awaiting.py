"""The loop around a ledger that awaits, with a task that reads the frames."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

import grpc

from recofuse_client.errors import ConnectionLostError
from recofuse_client.pictures import ImageLike
from recofuse_client.rpc import error_of_call
from recofuse_client.streams.ledger import Ledger
from recofuse_client.streams.options import CLOSE_S, METHOD, AsyncFrames, Frames, StreamOptions
from recofuse_client.values import Frame, FrameResult, StreamStats
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb

# grpc.aio replaces the status of a stream that is refused while a frame is being written by an internal error. So after
# an unclear end the next connection sends its first frame late, when a refusal would have come.
HOLD_S = 0.5


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
