"""The gRPC face's server: listening, TLS, reflection, and what connections may do.

A peer that is gone is noticed by HTTP/2 pings (`keep_alive_s`), one that is there and does nothing by `stream_idle_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor_pool import Default, DescriptorPool
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.access.guard import Guard
from service.faces.gateway import Gateway
from service.faces.grpc.arriving import LOOKAHEAD_BYTES, Arrivals, max_message_bytes
from service.faces.grpc.envelope import Envelope
from service.faces.grpc.fusion import SERVICE, FusionServicer
from service.faces.grpc.health import HEALTH, HealthServicer
from service.terms.settings import GrpcSettings, Settings
from service.watch.metrics import Metrics
from service.watch.tracing import NO_TRACES, Tracer

STOP_GRACE_S = 10.0  # for answers that are being sent when everything else has stopped


@dataclass(frozen=True, slots=True)
class Companion:
    """A service of another protocol. add: puts it onto a server. pool: where its messages are described."""

    name: str
    add: Callable[[grpc.aio.Server], None]
    pool: DescriptorPool


@contextlib.asynccontextmanager
async def listening(
    gateway: Gateway,
    settings: Settings,
    metrics: Metrics,
    guard: Guard | None = None,
    tracer: Tracer = NO_TRACES,
    companions: Sequence[Companion] = (),
) -> AsyncIterator[str]:
    """Serve gRPC for the duration of the block; yields the address, such as 127.0.0.1:8001. guard: None asks no keys.

    companions: services of other protocols on the same port.

    Raises OSError if the address or a TLS file cannot be used. Leaving the block waits for calls that still run.
    """
    options = settings.grpc
    stopping = asyncio.Event()
    server = grpc.aio.server(
        interceptors=[
            Envelope(metrics, guard, tracer, Arrivals(gateway.held, settings), max_open=max(1, options.max_calls // 8))
        ],
        options=_channel_options(settings),
        maximum_concurrent_rpcs=options.max_calls,
    )
    fusion_pb2_grpc.add_FusionServiceServicer_to_server(FusionServicer(gateway, settings, metrics), server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(gateway, stopping), server)
    services = [SERVICE, HEALTH, reflection.SERVICE_NAME]
    for companion in companions:
        companion.add(server)
        services.append(companion.name)
    reflection.enable_server_reflection(services, server, pool=_Pools(companions))
    address = f"[{options.host}]:{options.port}" if ":" in options.host else f"{options.host}:{options.port}"
    try:
        if (credentials := _credentials(options)) is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:  # all that gRPC tells about a busy port, an unknown host or a useless key
        raise OSError(f"cannot listen for gRPC on {address}: is it in use, and do the TLS files fit?") from error
    await server.start()
    try:
        yield f"{address.rpartition(':')[0]}:{port}"
    finally:
        stopping.set()
        await server.stop(STOP_GRACE_S)


def _channel_options(settings: Settings) -> list[tuple[str, int]]:
    options = settings.grpc
    age_ms = int(options.max_connection_age_s * 1000)
    return [
        ("grpc.so_reuseport", 0),  # a port that is in use must be an error, not a lottery
        ("grpc.max_receive_message_length", max_message_bytes(settings)),
        # Windows that grow with the connection's speed would take in megabytes of every call that nobody reads yet.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message must not unpack to gigabytes
        ("grpc.keepalive_time_ms", int(options.keep_alive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(options.keep_alive_timeout_s * 1000)),
        # keepalive_timeout_ms alone does nothing in the gRPC that is pinned: this is what ends the connection.
        ("grpc.http2.ping_timeout_ms", int(options.keep_alive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(options.min_ping_interval_s * 1000)),
        *([("grpc.max_connection_age_ms", age_ms)] if age_ms else []),
    ]


def _credentials(options: GrpcSettings) -> grpc.ServerCredentials | None:
    """TLS as configured, None for none. Raises OSError for files that cannot be read."""
    if not options.tls_cert:
        return None
    pair = (Path(options.tls_key).read_bytes(), Path(options.tls_cert).read_bytes())
    authorities = Path(options.tls_client_ca).read_bytes() if options.tls_client_ca else None
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authorities, require_client_auth=authorities is not None
    )


class _Pools:
    """What reflection looks messages up in: the companions' own pools, then protobuf's default one."""

    def __init__(self, companions: Sequence[Companion]) -> None:
        self._pools = [companion.pool for companion in companions]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def find(*args: Any) -> Any:
            for pool in self._pools:
                with contextlib.suppress(KeyError):
                    return getattr(pool, name)(*args)
            return getattr(Default(), name)(*args)

        return find
