"""ASGI middleware that asks who makes a request, if the service has keys; pages and probes need none."""

from __future__ import annotations

import re

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access import keys
from service.access.guard import Guard
from service.faces.http.bodies import Body
from service.faces.http.problems import problem
from service.terms.errors import ServiceError

# What needs no key: pages, probes, and metrics, which a reverse proxy keeps to itself (deploy/nginx).
PUBLIC_PATHS = frozenset({"/", "/docs", "/openapi.json", "/metrics", "/v2"})
PUBLIC_PREFIXES = ("/health/", "/v2/health/", "/playground/")


class Gate:
    """Asks who makes a request before its body is read; inside `Envelope`, which counts what is refused here."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        if path not in PUBLIC_PATHS and not path.startswith(PUBLIC_PREFIXES):
            request = Request(scope, receive)
            try:
                await self._admit(request, path)
            except ServiceError as error:
                await Body(request).discard_rest()
                await problem(error, path=path)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _admit(self, request: Request, path: str) -> None:
        is_post = request.method == "POST"
        # A job's id lets its reader fetch the pictures, so it stays out of the log.
        shown = re.sub(r"^(/v1/jobs/)[^/]+", r"\1{job_id}", path)[:80]
        await self._guard.admit(
            request.headers,
            keys.Scope.READ if request.method in ("GET", "HEAD", "OPTIONS") else keys.Scope.FUSE,
            is_charged=is_post,
            face="http",
            action=f"{request.method} {shown}",
            peer=request.client.host if request.client is not None else "",
        )
