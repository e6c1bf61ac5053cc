"""The standard health service, which is the gateway's own readiness."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.faces.gateway import Gateway
from service.faces.grpc.envelope import Context
from service.faces.grpc.fusion import SERVICE

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
WATCH_S = 0.5  # how late a change of readiness reaches those who watch it


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc, unused-ignore]
    """The standard health service, for the server as a whole and for FusionService: the gateway's own readiness."""

    def __init__(self, gateway: Gateway, stopping: asyncio.Event) -> None:
        self._gateway = gateway
        self._stopping = stopping

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802 - the name is the protocol's
        """SERVING if new work is welcome now. Unknown services are NOT_FOUND, as the protocol has it."""
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"accepted are the empty name and {SERVICE}")
        return await self._answer(request.service)

    async def Watch(self, request: Any, _: Context) -> AsyncIterator[Any]:  # noqa: N802
        """Readiness now and after every change, until the server stops."""
        last = None
        while not self._stopping.is_set():
            answer = await self._answer(request.service)
            if answer != last:
                last = answer
                yield answer
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), WATCH_S)

    async def _answer(self, service: str) -> Any:
        response = health_pb2.HealthCheckResponse
        if service not in ("", SERVICE):
            return response(status=response.SERVICE_UNKNOWN)
        readiness = await self._gateway.readiness()
        return response(status=response.SERVING if readiness.is_ready else response.NOT_SERVING)
