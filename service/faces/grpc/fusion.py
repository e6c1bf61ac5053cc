"""FusionService: the methods of proto/recofuse/v1, to the same gateway calls as HTTP."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import aclosing
from dataclasses import asdict

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.faces.gateway import FusionRequest, Gateway
from service.faces.grpc.arriving import Messages
from service.faces.grpc.envelope import Context, text_metadata
from service.faces.grpc.messages import CheckedOptions, fusion_of, job_id_of, job_message, rig_message
from service.faces.grpc.streams import Stream
from service.terms.errors import InvalidInputError, TimedOutError
from service.terms.settings import Settings
from service.watch import logs
from service.watch.metrics import Metrics

SERVICE = pb.DESCRIPTOR.services_by_name["FusionService"].full_name

_IDEMPOTENCY_KEY = re.compile(r"^[\x21-\x7e]{1,255}$")


class FusionServicer(fusion_pb2_grpc.FusionServiceServicer):
    """The public service."""

    def __init__(self, gateway: Gateway, settings: Settings, metrics: Metrics) -> None:
        self._gateway = gateway
        self._settings = settings
        self._metrics = metrics
        self._line = asyncio.Lock()  # served in order: frames of all streams that found the queue full

    async def Fuse(self, request: pb.FuseRequest, context: Context) -> pb.FuseResponse:  # noqa: N802
        """See fusion.proto."""
        started_s = time.monotonic()
        options = CheckedOptions.of(request.options)
        wanted = self._request(
            request, options, self._gateway.timeout_within(options.timeout_s, context.time_remaining()), context
        )
        del request  # its images are copies of those in `wanted`
        result = await self._gateway.fuse(wanted)
        fusion = fusion_of(result, is_raw=options.is_raw, started_s=started_s)
        return pb.FuseResponse(fusion=fusion, request_id=logs.request_id.get())

    async def FuseStream(  # type: ignore[override]  # noqa: N802 - it writes by itself, to see what is not taken
        self, request_iterator: Messages, context: Context
    ) -> None:
        """See fusion.proto."""
        traceparent = logs.traceparent.get() or None
        stream = Stream(self._gateway, self._settings, self._metrics, request_iterator, traceparent, self._line)
        idle_s = self._settings.grpc.stream_idle_s
        async with aclosing(stream.answers()) as answers:
            async for answer in answers:
                try:
                    async with asyncio.timeout(idle_s or None):
                        await context.write(answer)
                except TimeoutError as error:
                    raise TimedOutError(f"no answer was taken for {idle_s:g} s") from error

    async def SubmitFuse(self, request: pb.FuseRequest, context: Context) -> pb.Job:  # noqa: N802
        """See fusion.proto."""
        options = CheckedOptions.of(request.options)
        wanted = self._request(request, options, options.timeout_s, context)
        del request  # its images are copies of those in `wanted`
        return job_message(await self._gateway.submit(wanted))

    async def GetJob(self, request: pb.JobRequest, _: Context) -> pb.Job:  # noqa: N802
        """See fusion.proto."""
        return job_message(await self._gateway.view(job_id_of(request)))

    async def GetJobResult(self, request: pb.JobRequest, _: Context) -> pb.FuseResponse:  # noqa: N802
        """See fusion.proto."""
        result = await self._gateway.result(job_id_of(request))
        fusion = fusion_of(result, is_raw=False, started_s=0.0)
        fusion.timings.ClearField("total_s")  # when the job came, another process may have been there
        return pb.FuseResponse(fusion=fusion, request_id=logs.request_id.get())

    async def CancelJob(self, request: pb.JobRequest, _: Context) -> pb.Job:  # noqa: N802
        """See fusion.proto."""
        return job_message(await self._gateway.cancel(job_id_of(request)))

    async def ListModels(self, request: pb.ListModelsRequest, _: Context) -> pb.ListModelsResponse:  # noqa: N802
        """See fusion.proto."""
        models = [pb.ServedModel(**asdict(model)) for model in await self._gateway.models()]
        return pb.ListModelsResponse(models=models)

    async def ListRigs(self, request: pb.ListRigsRequest, _: Context) -> pb.ListRigsResponse:  # noqa: N802
        """See fusion.proto."""
        return pb.ListRigsResponse(rigs=[rig_message(rig) for rig in await self._gateway.rigs()])

    @staticmethod
    def _request(
        message: pb.FuseRequest, options: CheckedOptions, timeout_s: float | None, context: Context
    ) -> FusionRequest:
        """The gateway's request for a pair. Raises InvalidInputError."""
        key = text_metadata(context).get("idempotency-key")
        if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
            raise InvalidInputError("idempotency-key: accepted are 1 to 255 printable ASCII characters without spaces")
        return options.request(
            message.vis,
            message.ir,
            timeout_s=timeout_s,
            idempotency_key=key,
            request_id=logs.request_id.get(),
            traceparent=logs.traceparent.get() or None,
        )
