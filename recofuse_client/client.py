"""The two clients: one that blocks, one that awaits. Which protocol they speak is in the address.

    with Client("http://127.0.0.1:8000") as client:            # or https, grpc, grpcs
        fused = client.fuse("street.jpg", "street_thermal.png").fused

Both offer the same calls with the same arguments, results and errors. Every call has a deadline (`timeout_s`) that
holds for all its attempts together. A Client may be shared by threads; an AsyncClient belongs to one event loop.

A protocol is imported with the first client that speaks it: gRPC alone takes longer than the rest of the package.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar, Unpack

from recofuse_client.errors import RouteNotFoundError
from recofuse_client.pictures import ImageLike
from recofuse_client.protocols import Calls, Target
from recofuse_client.retries import Operation, Retry, run, run_async
from recofuse_client.values import (
    Align,
    Colour,
    Exposure,
    Format,
    Fusion,
    Health,
    Job,
    Metadata,
    Mode,
    Model,
    Options,
    Output,
    Priority,
    Rig,
    RigLike,
    Sampler,
    ValuesFormat,
)

if TYPE_CHECKING:
    from recofuse_client.streams.awaiting import AsyncFrameStream
    from recofuse_client.streams.blocking import FrameStream
    from recofuse_client.streams.options import AsyncFrames, Frames, StreamOptions

Answer = TypeVar("Answer")

TIMEOUT_S = 60.0


class ConnectionOptions(TypedDict, total=False):
    """How to reach a server: see `recofuse_client.protocols.Target`.

    api_key: sent with every call. ca, cert, key: PEM files, to trust and to show. trust_env: whether proxies that the
    environment names are used.
    """

    api_key: str
    ca: str
    cert: str
    key: str
    trust_env: bool


class FusionOptions(TypedDict, total=False):
    """What may be chosen about the computation and its answer: see `recofuse_client.Options`."""

    output: Output
    format: Format
    steps: int | None
    sampler: Sampler | None
    seed: int
    vis_range: tuple[float, float] | None
    ir_range: tuple[float, float] | None
    exposure: Exposure | None
    rig: RigLike | None
    colour: Colour
    colour_range: tuple[float, float] | None
    values: ValuesFormat | None
    degrees: tuple[float, float] | None
    alarm: str | float | None
    outline: bool
    metadata: Metadata
    align: Align
    priority: Priority


class _Base:
    """What both clients have in common: the target, the calls as operations, and a connection that carries them out."""

    _is_async: ClassVar[bool]

    def __init__(self, url: str, timeout_s: float, retry: Retry | None, options: ConnectionOptions) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: accepted is more than 0, not {timeout_s}")
        self._target = Target.of(url, **options)
        self._retry = retry or Retry()
        protocol, self._connection = _reached(self._target, is_async=self._is_async)
        self._calls: Calls[Any, Any] = Calls(protocol, self._retry, timeout_s)
        self._is_closed = False

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this client has been closed")

    def _stream_options(self, chosen: FusionOptions, values: dict[str, Any]) -> StreamOptions:
        self._check_open()
        if self._target.kind != "grpc":
            raise RouteNotFoundError("streams need gRPC: make the client with grpc://HOST:PORT or grpcs://HOST:PORT")
        from recofuse_client.streams.options import StreamOptions

        return StreamOptions(options=Options(**chosen), retry=self._retry, **values)


def _reached(target: Target, *, is_async: bool) -> tuple[Any, Any]:
    """The protocol of a target, and a connection to it."""
    if target.kind == "http":
        from recofuse_client.http import AsyncHttpConnection, HttpConnection, HttpProtocol

        return HttpProtocol(), (AsyncHttpConnection if is_async else HttpConnection)(target)
    from recofuse_client.rpc import AsyncGrpcConnection, GrpcConnection, GrpcProtocol

    return GrpcProtocol(), (AsyncGrpcConnection if is_async else GrpcConnection)(target)


class Client(_Base):
    """A client that blocks.

    url: http://HOST:PORT or https (a path is possible), grpc://HOST:PORT or grpcs. timeout_s: seconds of a call that
    names none. retry: see `Retry`. No connection is made before the first call. Raises ValueError for an address or
    an API key that is none, and OSError for certificate files that cannot be read.
    """

    _is_async = False

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        retry: Retry | None = None,
        **options: Unpack[ConnectionOptions],
    ) -> None:
        super().__init__(url, timeout_s, retry, options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._is_closed = True
        self._connection.close()

    def fuse(
        self,
        vis: ImageLike,
        ir: ImageLike,
        *,
        bgr: bool = False,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
        **options: Unpack[FusionOptions],
    ) -> Fusion:
        """Fuse one pair and wait for it.

        vis, ir: arrays, files' bytes or paths. bgr: colour arrays have blue first. idempotency_key: makes it safe to
        repeat the call after a lost connection: equal keys share one job; None never repeats what may have been done.
        Raises RecofuseError, and OSError, TypeError or ValueError for images and options that are none.
        """
        chosen = Options(**options)
        pair = self._calls.prepare(vis, ir, bgr=bgr)
        return self._run(self._calls.fuse(pair, chosen, idempotency_key, timeout_s))

    def submit(
        self,
        vis: ImageLike,
        ir: ImageLike,
        *,
        bgr: bool = False,
        idempotency_key: str | None = None,
        job_timeout_s: float | None = None,
        timeout_s: float | None = None,
        **options: Unpack[FusionOptions],
    ) -> Job:
        """Have a pair fused without waiting for it. job_timeout_s: nobody wants the result later; None: server's own.

        The call is repeated when its answer is lost, under a key of its own if none is given. Raises like `fuse`.
        """
        chosen = Options(**options)
        pair = self._calls.prepare(vis, ir, bgr=bgr)
        return self._run(self._calls.submit(pair, chosen, idempotency_key, job_timeout_s, timeout_s))

    def job(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Where a job stands. Raises JobNotFoundError and other RecofuseErrors."""
        return self._run(self._calls.job(job_id, timeout_s))

    def result(self, job_id: str, *, timeout_s: float | None = None) -> Fusion:
        """A finished job's pictures. Raises NotFinishedError, what the job ended with, and other RecofuseErrors."""
        return self._run(self._calls.result(job_id, timeout_s))

    def wait(self, job_id: str, *, timeout_s: float | None = None) -> Fusion:
        """A job's pictures, once it has finished. Raises what the job ended with, TimedOutError and others."""
        return self._run(self._calls.wait(job_id, timeout_s))

    def cancel(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """Cancel a job; one that has ended stays as it is. Raises JobNotFoundError and other RecofuseErrors."""
        return self._run(self._calls.cancel(job_id, timeout_s))

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """The models that are being served now; none while no worker is there. Raises RecofuseError."""
        return self._run(self._calls.models(timeout_s))

    def rigs(self, *, timeout_s: float | None = None) -> list[Rig]:
        """The rigs that the server keeps, and `rig` may name. Raises RecofuseError."""
        return self._run(self._calls.rigs(timeout_s))

    def health(self, *, timeout_s: float | None = None) -> Health:
        """Whether new work is welcome; needs no API key. Raises TransportError if nobody answers."""
        return self._run(self._calls.health(timeout_s))

    def stream(
        self,
        frames: Frames,
        *,
        mode: Mode = "all",
        bgr: bool = False,
        window: int = 16,
        max_in_flight: int = 0,
        frame_timeout_s: float | None = None,
        steady: bool = True,
        calm: bool = False,
        reconnect_s: float = 60.0,
        **options: Unpack[FusionOptions],
    ) -> FrameStream:
        """Fuse a stream of frames; iterate over what it returns. Needs a grpc:// or grpcs:// address.

        frames: pairs (vis, ir) or `Frame`s from any iterable, read in a thread of its own. mode: `all` gives every
        frame a result and slows the source down; `latest` drops what is stale. window, max_in_flight, frame_timeout_s,
        steady, calm, reconnect_s: see `recofuse_client.streams.options.StreamOptions`.

        Raises RouteNotFoundError, ValueError.
        """
        values = {
            "mode": mode,
            "bgr": bgr,
            "window": window,
            "max_in_flight": max_in_flight,
            "frame_timeout_s": frame_timeout_s,
            "steady": steady,
            "calm": calm,
            "reconnect_s": reconnect_s,
        }
        chosen = self._stream_options(options, values)
        from recofuse_client.rpc import call_metadata
        from recofuse_client.streams.blocking import FrameStream

        return FrameStream(self._connection.channel, call_metadata(self._target), frames, chosen)

    def _run(self, operation: Operation[Any, Answer]) -> Answer:
        self._check_open()
        return run(operation, self._connection.send)


class AsyncClient(_Base):
    """A client that awaits; see `Client` for the arguments. Make it in the event loop that will use it."""

    _is_async = True

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        retry: Retry | None = None,
        **options: Unpack[ConnectionOptions],
    ) -> None:
        super().__init__(url, timeout_s, retry, options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        self._is_closed = True
        await self._connection.close()

    async def fuse(
        self,
        vis: ImageLike,
        ir: ImageLike,
        *,
        bgr: bool = False,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
        **options: Unpack[FusionOptions],
    ) -> Fusion:
        """See `Client.fuse`. Cancelling the task cancels the job, too, unless it has an idempotency key."""
        chosen = Options(**options)
        pair = await asyncio.to_thread(self._calls.prepare, vis, ir, bgr=bgr)
        return await self._run(self._calls.fuse(pair, chosen, idempotency_key, timeout_s))

    async def submit(
        self,
        vis: ImageLike,
        ir: ImageLike,
        *,
        bgr: bool = False,
        idempotency_key: str | None = None,
        job_timeout_s: float | None = None,
        timeout_s: float | None = None,
        **options: Unpack[FusionOptions],
    ) -> Job:
        """See `Client.submit`."""
        chosen = Options(**options)
        pair = await asyncio.to_thread(self._calls.prepare, vis, ir, bgr=bgr)
        return await self._run(self._calls.submit(pair, chosen, idempotency_key, job_timeout_s, timeout_s))

    async def job(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """See `Client.job`."""
        return await self._run(self._calls.job(job_id, timeout_s))

    async def result(self, job_id: str, *, timeout_s: float | None = None) -> Fusion:
        """See `Client.result`."""
        return await self._run(self._calls.result(job_id, timeout_s))

    async def wait(self, job_id: str, *, timeout_s: float | None = None) -> Fusion:
        """See `Client.wait`."""
        return await self._run(self._calls.wait(job_id, timeout_s))

    async def cancel(self, job_id: str, *, timeout_s: float | None = None) -> Job:
        """See `Client.cancel`."""
        return await self._run(self._calls.cancel(job_id, timeout_s))

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """See `Client.models`."""
        return await self._run(self._calls.models(timeout_s))

    async def rigs(self, *, timeout_s: float | None = None) -> list[Rig]:
        """See `Client.rigs`."""
        return await self._run(self._calls.rigs(timeout_s))

    async def health(self, *, timeout_s: float | None = None) -> Health:
        """See `Client.health`."""
        return await self._run(self._calls.health(timeout_s))

    def stream(
        self,
        frames: Frames | AsyncFrames,
        *,
        mode: Mode = "all",
        bgr: bool = False,
        window: int = 16,
        max_in_flight: int = 0,
        frame_timeout_s: float | None = None,
        steady: bool = True,
        calm: bool = False,
        reconnect_s: float = 60.0,
        **options: Unpack[FusionOptions],
    ) -> AsyncFrameStream:
        """See `Client.stream`. frames: from an asynchronous iterable, or from one that may block."""
        values = {
            "mode": mode,
            "bgr": bgr,
            "window": window,
            "max_in_flight": max_in_flight,
            "frame_timeout_s": frame_timeout_s,
            "steady": steady,
            "calm": calm,
            "reconnect_s": reconnect_s,
        }
        chosen = self._stream_options(options, values)
        from recofuse_client.rpc import call_metadata
        from recofuse_client.streams.awaiting import AsyncFrameStream

        return AsyncFrameStream(self._connection.channel, call_metadata(self._target), frames, chosen)

    async def _run(self, operation: Operation[Any, Answer]) -> Answer:
        self._check_open()
        return await run_async(operation, self._connection.send)
