"""What a worker process serves on its own port: whether it is there, whether it is ready, and its metrics."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.faces.http.documents import Health
from service.faces.http.envelope import Envelope, Head
from service.faces.http.problems import on_http_exception
from service.watch.metrics import Metrics


def build_monitor_app(is_warm: Callable[[], bool], metrics: Metrics) -> FastAPI:
    """The application: /health/live, /health/ready, /metrics."""
    app = FastAPI(title="recofuse worker", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Head)
    app.add_middleware(Envelope, metrics=metrics)
    app.add_exception_handler(HTTPException, on_http_exception)

    @app.get("/health/live")
    async def live() -> Health:
        return Health(status="live", reason="")

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        if is_warm():
            return JSONResponse({"status": "ready", "reason": "ready"})
        return JSONResponse({"status": "unavailable", "reason": "the model is not warm yet"}, 503)

    @app.get("/metrics")
    async def exposition(request: Request) -> Response:
        body, content_type = await metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    return app
