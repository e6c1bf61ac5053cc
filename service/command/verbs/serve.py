"""`recofuse serve`, `api` and `worker`: the service in one process, or as front ends and workers around one Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from recofuse_host.memory import give_back_large_blocks, keep_freed_blocks
from service.command.complaints import line_of
from service.command.environment import WEIGHTS_VARIABLE, read_settings
from service.command.shared_queue import QueueUrl, shared_queue
from service.command.terminal import err
from service.terms.settings import Settings

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

# Unset, they leave what the settings say.
Host = Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")]
GrpcPort = Annotated[
    int | None, typer.Option(min=-1, max=65535, help="Port for gRPC; 0 picks a free one, -1 turns it off.")
]
EngineKind = Annotated[
    str | None, typer.Option(metavar="core|null|fixed", help="The model, or a stand-in that measures the service.")
]
CodecKind = Annotated[
    str | None,
    typer.Option(metavar="files|ready", help="ready: answer the uploaded file unread (stand-in engines only)."),
]
ModelWeights = Annotated[
    str | None,
    typer.Option(envvar=WEIGHTS_VARIABLE, metavar="NAME_OR_PATH", help="A shipped model's name or a checkpoint."),
]
ModelDevice = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ModelThreads = Annotated[int | None, typer.Option(min=0, help="CPU threads of the model; 0: as many as may be used.")]


def serve(
    host: Host = None,
    port: Port = None,
    grpc_port: GrpcPort = None,
    engine: EngineKind = None,
    codec: CodecKind = None,
    weights: ModelWeights = None,
    device: ModelDevice = None,
    threads: ModelThreads = None,
) -> None:
    """Serve POST /v1/fuse and the same over gRPC: front end, queue and worker in one process.

    Every setting can be given as RECOFUSE_GROUP__NAME in the environment; an option here wins over it.
    """
    asked: dict[str, dict[str, Any]] = {
        "http": {"host": host, "port": port},
        "grpc": {"host": host, "port": grpc_port},
        "codec": {"kind": codec},
        "engine": {"kind": engine, "model": weights, "device": device, "num_threads": threads},
    }
    raise typer.Exit(_serve_all_in_one(read_settings(asked)))


def _serve_all_in_one(settings: Settings) -> int:
    """Serve until told to stop; returns the exit status. Raises what the caller can mend, such as a missing file."""
    from service.command.processes import serve_all_in_one
    from service.work.engines import build_engine

    return _run(lambda stop: serve_all_in_one(settings, build_engine(settings), stop, _announce), settings)


def _announce(address: str) -> None:
    err.print(f"serving on {address} - open it in a browser; Ctrl-C stops", markup=False, soft_wrap=True)


def _run(serve: Callable[[asyncio.Event], Awaitable[None]], settings: Settings) -> int:
    """Run one of the `processes` as this one; what the caller can mend is raised, not logged as a fault of ours."""
    from service.command.processes import run

    mendable: list[BaseException] = []

    async def main(stop: asyncio.Event) -> None:
        try:
            await serve(stop)
        except Exception as error:
            if line_of(error) is None:
                raise
            mendable.append(error)

    status = run(main, settings)
    if mendable:
        raise mendable[0]
    return status


def api(
    queue: QueueUrl = None,
    host: Host = None,
    port: Port = None,
    grpc_port: GrpcPort = None,
) -> None:
    """Run a front end alone, HTTP and gRPC; workers take the jobs from the shared queue."""
    from service.command.processes import serve_front_end

    give_back_large_blocks()
    asked: dict[str, dict[str, Any]]
    asked = {"queue": {"url": queue}, "http": {"host": host, "port": port}, "grpc": {"host": host, "port": grpc_port}}
    settings = read_settings(asked)
    shared = shared_queue(settings)

    raise typer.Exit(_run(lambda stop: serve_front_end(settings, shared, stop, _announce), settings))


def worker(
    queue: QueueUrl = None,
    engine: EngineKind = None,
    weights: ModelWeights = None,
    device: ModelDevice = None,
    threads: ModelThreads = None,
    codec: CodecKind = None,
    metrics_host: Annotated[str | None, typer.Option(help="Address of its own /metrics and /health.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=-1, max=65535, help="Port of them; 0 picks a free one, -1 turns them off.")
    ] = None,
) -> None:
    """Run a worker alone; it serves /metrics, /health/live and /health/ready on a port of its own."""
    from service.command.processes import serve_worker
    from service.work.engines import build_engine

    keep_freed_blocks()
    asked: dict[str, dict[str, Any]] = {
        "queue": {"url": queue},
        "codec": {"kind": codec},
        "engine": {"kind": engine, "model": weights, "device": device, "num_threads": threads},
        "worker": {"metrics_host": metrics_host, "metrics_port": metrics_port},
    }
    settings = read_settings(asked)
    shared = shared_queue(settings)

    def announce(address: str) -> None:
        watched = f"; metrics and health on {address}" if address else ""
        err.print(f"working{watched}; Ctrl-C stops", markup=False, soft_wrap=True)

    raise typer.Exit(
        _run(lambda stop: serve_worker(settings, shared, build_engine(settings), stop, announce), settings)
    )
