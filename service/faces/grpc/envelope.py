"""What is around every call: its id, metrics, trace and caller, and the status of any failure.

Servicers neither catch nor map errors; `Envelope`, the one interceptor, turns every failure, also a message that
cannot be parsed or an unknown method, into the statuses of `service.terms.errors.STATUS`, with an `ErrorDetail` in the
standard `grpc-status-details-bin`. Only what gRPC refuses before a message reaches us keeps gRPC's own status: messages
beyond the size limit (RESOURCE_EXHAUSTED) and compressed ones (UNIMPLEMENTED).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.status_pb2 import Status

from service.access.guard import Guard
from service.access.keys import Scope
from service.faces.grpc.arriving import Arrivals, Messages, carries_pictures
from service.faces.grpc.messages import error_detail
from service.terms.errors import (
    INTERNAL_MESSAGE,
    InternalError,
    OverloadedError,
    RouteNotFoundError,
    ServiceError,
)
from service.watch import logs
from service.watch.metrics import Metrics
from service.watch.tracing import Tracer

logger = logging.getLogger(__name__)

# What needs no key: probes, and the description of what there is.
PUBLIC_METHODS = ("/grpc.health.", "/grpc.reflection.", "/inference.GRPCInferenceService/Server")

Context = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")


class Envelope(grpc.aio.ServerInterceptor):
    """Around every call: its id, metrics, trace and caller, parsing of its messages, the status of any failure."""

    def __init__(
        self, metrics: Metrics, guard: Guard | None, tracer: Tracer, arrivals: Arrivals, *, max_open: int
    ) -> None:
        """max_open: calls at once that need no key and have no end; one connection could take all places with them."""
        self._metrics = metrics
        self._guard = guard
        self._tracer = tracer
        self._arrivals = arrivals
        self._max_open = max_open
        self._num_open = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the method's handler, as one of streams, so that a call begins before its message is read.

        On the wire a single message is a stream of one.
        """
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(_lets_go(self._unknown))
        route, parse, serialise = handler_call_details.method, handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:

            @_lets_go
            async def unary(_: Any, context: Context) -> Any:
                async with self._call(context, route, "unary"):
                    with self._arrivals.held.holding() as holding:
                        return await handler.unary_unary(
                            await self._arrivals.only(context, parse, holding, route), context
                        )

            return grpc.stream_unary_rpc_method_handler(unary, response_serializer=serialise)

        # A coroutine that writes, rather than a generator, so that the inner generator is closed within the call.
        if handler.unary_stream is not None:

            @_lets_go
            async def server_stream(_: Any, context: Context) -> None:
                async with self._call(context, route, "stream"):
                    with self._arrivals.held.holding() as holding:
                        request = await self._arrivals.only(context, parse, holding, route)
                    await _send(handler.unary_stream(request, context), context)

            return grpc.stream_stream_rpc_method_handler(server_stream, response_serializer=serialise)

        @_lets_go
        async def both_stream(_: Any, context: Context) -> None:
            async with self._call(context, route, "stream"):
                with contextlib.closing(Messages(self._arrivals, context, parse, route)) as messages:
                    await _send(handler.stream_stream(messages, context), context)

        return grpc.stream_stream_rpc_method_handler(both_stream, response_serializer=serialise)

    async def _unknown(self, _: Any, context: Context) -> None:
        async with self._call(context, "unmatched", "other"):
            raise RouteNotFoundError("there is no such method; reflection lists what there is")

    @contextlib.asynccontextmanager
    async def _call(self, context: Context, route: str, kind: str) -> AsyncIterator[None]:
        metadata = text_metadata(context)
        current = logs.accepted_id(metadata.get("x-request-id", ""))
        logs.request_id.set(current)  # each call has a task of its own, so nothing needs to be put back
        with (
            self._metrics.request("grpc") as timer,
            self._tracer.request(route, timer, metadata.get("traceparent", "")),
        ):
            timer.route, timer.method = route, kind
            is_public = route.startswith(PUBLIC_METHODS)
            is_open = is_public and kind == "stream"
            self._num_open += is_open
            try:
                if self._num_open > self._max_open and is_open:
                    raise OverloadedError(
                        f"at most {self._max_open} calls may watch or reflect at once; try again later",
                        retry_after_s=5.0,
                    )
                if self._guard is not None and not is_public:
                    await self._admit(self._guard, context, route, kind)
                yield
                timer.status = "OK"
                context.set_trailing_metadata((("x-request-id", current),))
            except asyncio.CancelledError:
                timer.status = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
                raise
            except grpc.aio.AbortError:  # a status that only health checks know
                timer.status = "NOT_FOUND"
                raise
            except ServiceError as error:
                timer.status = error.grpc_status
                await self._refuse(context, error)
            except Exception:  # the process boundary of one call
                timer.status = "INTERNAL"
                logger.exception("call failed", extra={"method": route})
                await self._refuse(context, InternalError(INTERNAL_MESSAGE))
            finally:
                self._num_open -= is_open

    @staticmethod
    async def _admit(guard: Guard, context: Context, route: str, kind: str) -> None:
        method = route.rpartition("/")[2]
        is_work = carries_pictures(route)
        is_change = is_work or "Cancel" in method
        await guard.admit(
            text_metadata(context),
            Scope.FUSE if is_change else Scope.READ,
            is_charged=is_work and kind == "unary",  # streams are charged by frame
            face="grpc",
            action=route,
            peer=context.peer(),
        )

    async def _refuse(self, context: Context, error: ServiceError) -> None:
        self._metrics.errors.labels(error.code).inc()
        detail, packed = error_detail(error), AnyMessage()
        packed.Pack(detail)
        status = Status(code=detail.status, message=error.message, details=[packed])
        metadata: list[tuple[str, str | bytes]] = [
            ("x-request-id", detail.request_id),
            ("grpc-status-details-bin", status.SerializeToString()),
        ]
        if error.retry_after_s is not None:
            metadata.append(("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000))))
        await context.abort(grpc.StatusCode[error.grpc_status], error.message, tuple(metadata))


def _lets_go(call: Callable[[Any, Context], Awaitable[Answer]]) -> Callable[[Any, Context], Awaitable[Answer]]:
    """The call, of which an abort leaves nothing behind.

    gRPC keeps the exception of an abort in what the call's context refers to. Frames in its traceback, or in that of
    the error that it stands for, would keep the context and the request in turn, up to twice the size of an image,
    until a collection.
    """

    async def until_the_end(request: Any, context: Context) -> Answer:
        work = call(request, context)
        del request, context  # of all frames, this one alone stays in the traceback
        try:
            return await work
        except grpc.aio.AbortError as aborted:
            if aborted.__context__ is not None:
                aborted.__context__.__traceback__ = None
                aborted.__context__ = None
            raise aborted.with_traceback(None) from None

    return until_the_end


def text_metadata(context: Context) -> dict[str, str]:
    """The call's text metadata."""
    pairs: Any = context.invocation_metadata() or ()
    return {key: value for key, value in pairs if isinstance(value, str)}


async def _send(answers: Any, context: Context) -> None:
    if inspect.isawaitable(answers):  # a handler that writes by itself
        await answers
        return
    async with aclosing(answers):
        async for answer in answers:
            await context.write(answer)
