"""Putting the parts together: a front end, a worker, or both in one process; and stopping them in the right order.

Each `serve_*` runs until its `stop` event is set, and returns when nothing accepted is left undone. `run` wraps one of
them into a process: event loop, signals, exit code. Nothing here imports torch: the engine is handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from importlib import metadata
from typing import Any, cast

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from service.access.choice import build_keys
from service.access.guard import Guard
from service.access.limits import Limiter, LocalLimiter
from service.faces.gateway import Gateway
from service.faces.http.app import build_app
from service.faces.http.monitor import build_monitor_app
from service.faces.http.protocol import GuardedProtocol
from service.faces.oip.http import add_inference
from service.faces.oip.inference import Inference
from service.queue.contract import JobQueue
from service.queue.memory import MemoryQueue
from service.terms.errors import UnavailableError
from service.terms.settings import HttpSettings, Settings
from service.watch import logs, tracing
from service.watch.gpu import watch_gpus
from service.watch.metrics import Metrics
from service.watch.tracing import Tracer
from service.work.engine import Engine, EngineBrokenError
from service.work.worker import Worker

logger = logging.getLogger(__name__)

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

OnReady = Callable[[str], None]  # receives the address, such as http://127.0.0.1:8000 or, for gRPC, 127.0.0.1:8001


def version() -> str:
    """The installed version of recofuse, or 0 in a bare source tree."""
    try:
        return metadata.version("recofuse")
    except metadata.PackageNotFoundError:
        return "0"


def new_metrics() -> Metrics:
    """Metrics on a registry of their own."""
    metrics = Metrics(CollectorRegistry())
    metrics.build.info({"version": version(), "python": sys.version.split()[0]})
    return metrics


async def serve_all_in_one(
    settings: Settings, engine: Engine, stop: asyncio.Event, on_ready: OnReady, on_grpc: OnReady | None = None
) -> None:
    """Front end, in-process queue and one worker. Stopping answers everything that was accepted.

    on_ready is called once the model is warm, on_grpc as soon as gRPC listens. Raises what loading the model raises,
    OSError if it cannot listen, and EngineBrokenError once it has told all who wait that they may try again.
    """
    metrics = new_metrics()
    watch_gpus(metrics.registry)
    queue = MemoryQueue(settings.queue)
    gateway = Gateway(queue, settings, metrics)
    async with (
        tracing.opened(settings.trace, "all-in-one", version()) as tracer,
        _faces(gateway, settings, metrics, tracer, on_grpc) as address,
    ):
        worker = Worker(queue, engine, settings, metrics, tracer=tracer)
        working = asyncio.create_task(worker.run())
        try:
            await _until(stop, working, worker, lambda: on_ready(address))
            gateway.start_drain()
            logger.info("draining")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.jobs.drain_timeout_s):
                    while not working.done() and (await queue.stats()).num_unfinished:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)  # only while stopping
                    await gateway.drained()
            if working.done():
                working.result()
        except EngineBrokenError:
            gateway.start_drain()
            queue.give_up(UnavailableError("the server lost its device and starts again; try again", retry_after_s=1.0))
            raise
        finally:
            worker.stop()
            await queue.close()  # wakes the worker if it waits for jobs; what it holds can still be finished
            await working


async def serve_front_end(
    settings: Settings, queue: JobQueue, stop: asyncio.Event, on_ready: OnReady, on_grpc: OnReady | None = None
) -> None:
    """A front end alone; other processes work. Stopping answers the callers that wait, and leaves jobs in the queue."""
    metrics = new_metrics()
    gateway = Gateway(queue, settings, metrics)
    await queue.open()
    try:
        async with (
            tracing.opened(settings.trace, "front-end", version()) as tracer,
            _faces(gateway, settings, metrics, tracer, on_grpc) as address,
        ):
            on_ready(address)
            await stop.wait()
            gateway.start_drain()
            logger.info("draining")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.jobs.drain_timeout_s):
                    await gateway.drained()
    finally:
        await queue.close()


async def serve_worker(
    settings: Settings, queue: JobQueue, engine: Engine, stop: asyncio.Event, on_ready: OnReady
) -> None:
    """A worker alone, with its own /metrics and /health. Stopping finishes what is held, or hands it back."""
    metrics = new_metrics()
    watch_gpus(metrics.registry)
    has_monitor = settings.worker.metrics_port >= 0
    http = settings.http.model_copy(
        update={
            "host": settings.worker.metrics_host,
            "port": max(settings.worker.metrics_port, 0),
            **dict.fromkeys(("tls_cert", "tls_key", "tls_client_ca"), ""),  # probes and Prometheus come from within
        }
    )
    await queue.open()
    try:
        async with contextlib.AsyncExitStack() as stack:
            tracer = await stack.enter_async_context(tracing.opened(settings.trace, "worker", version()))
            worker = Worker(queue, engine, settings, metrics, tracer=tracer)
            monitor = build_monitor_app(lambda: worker.is_warm, metrics)
            address = await stack.enter_async_context(_listening(monitor, http)) if has_monitor else ""
            working = asyncio.create_task(worker.run())
            try:
                await _until(stop, working, worker, lambda: on_ready(address))
            finally:
                worker.stop()
                await working
    finally:
        await queue.close()


def run(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]], settings: Settings) -> int:
    """Run one of the above as this process until SIGTERM or SIGINT; returns the exit code."""
    logs.configure(settings.log)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serve(stop)

    # What start-up made stays for good; leaving it out of each collection saves pauses.
    gc.collect()
    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    except Exception:
        logger.exception("the process ends after an error")
        return 1
    return 0


@contextlib.asynccontextmanager
async def _faces(
    gateway: Gateway, settings: Settings, metrics: Metrics, tracer: Tracer, on_grpc: OnReady | None
) -> AsyncIterator[str]:
    """HTTP and gRPC on one gateway for the duration of the block; yields the HTTP address."""
    async with contextlib.AsyncExitStack() as stack:
        guard = _guard(settings)
        if guard is not None:
            stack.push_async_callback(guard.close)
        app = build_app(gateway, settings, metrics, guard=guard, version=version(), tracer=tracer)
        inference = Inference(gateway, settings, version())
        add_inference(app, inference, settings)
        address = await stack.enter_async_context(_listening(app, settings.http))
        if settings.grpc.port >= 0:
            # A worker, and a front end without gRPC, do not pay for it.
            from service.faces.grpc.server import listening
            from service.faces.oip.grpc import companion

            serving = listening(gateway, settings, metrics, guard, tracer, [companion(inference)])
            grpc_address = await stack.enter_async_context(serving)
            logger.info("listening for gRPC", extra={"address": grpc_address})
            if on_grpc is not None:
                on_grpc(grpc_address)
        yield address


def _guard(settings: Settings) -> Guard | None:
    """Who asks for keys, None if nobody does; what is reachable from elsewhere without them is warned of."""
    if not settings.auth.keys:
        if not {settings.http.host, settings.grpc.host} <= LOOPBACK:
            logger.warning("listening beyond loopback without API keys: whoever can connect may call")
        return None
    limiter: Limiter = LocalLimiter()
    if settings.queue.url != "memory://":
        from service.access.redis import RedisLimiter

        limiter = RedisLimiter(settings.queue)
    return Guard(build_keys(settings), limiter, settings.auth)


class _Server(uvicorn.Server):
    """uvicorn, but signals belong to `run`, which knows what to finish first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing."""
        yield


@contextlib.asynccontextmanager
async def _listening(app: ASGIApp, http: HttpSettings) -> AsyncIterator[str]:
    """Serve an application on a socket of ours for the duration of the block; yields its address."""
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((http.host, http.port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {http.host}:{http.port}: {error.strerror}") from error
    config = uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", functools.partial(GuardedProtocol, http=http)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(http.keep_alive_s),
        timeout_graceful_shutdown=10,
        limit_concurrency=http.max_connections,
        backlog=http.max_connections,
        forwarded_allow_ips=http.trusted_proxies,
        ssl_certfile=http.tls_cert or None,
        ssl_keyfile=http.tls_key or None,
        ssl_ca_certs=http.tls_client_ca or None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if http.tls_client_ca else ssl.CERT_NONE,
    )
    try:
        config.load()
    except OSError as error:
        listener.close()
        raise OSError(f"cannot serve HTTP with TLS: do the TLS files exist, and fit? ({error})") from error
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn offers no event
            await asyncio.sleep(0.005)
        host = f"[{http.host}]" if family == socket.AF_INET6 else http.host
        yield f"{'https' if http.tls_cert else 'http'}://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listener.close()


async def _until(stop: asyncio.Event, working: asyncio.Task[None], worker: Worker, on_warm: Callable[[], None]) -> None:
    """Wait for the stop, calling on_warm on the way; a worker that ends by itself ends the wait with its error."""
    stopped = asyncio.create_task(stop.wait())
    warm = asyncio.create_task(worker.warm.wait())
    try:
        await asyncio.wait({stopped, working, warm}, return_when=asyncio.FIRST_COMPLETED)
        if warm.done():
            on_warm()
            await asyncio.wait({stopped, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (stopped, warm):
            task.cancel()
