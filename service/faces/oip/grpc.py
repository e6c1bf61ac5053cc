"""The Open Inference Protocol's gRPC methods. What they mean stands in `inference.py`; errors are the interceptor's.

Pictures always come back in raw_output_contents, as Triton sends them, whichever way the tensors came.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from recofuse_protos.inference.v2 import inference_pb2 as pb
from recofuse_protos.inference.v2 import inference_pb2_grpc
from service.faces.grpc.server import Companion
from service.faces.oip.inference import Inference
from service.faces.oip.tensors import (
    MAX_DIMENSIONS,
    MAX_ID_CHARS,
    MAX_NAME_CHARS,
    InferRequest,
    Parameter,
    Tensor,
    add_output,
    join_elements,
    join_numbers,
    parameters_of,
    refuse_shared_memory,
)
from service.terms.errors import InvalidInputError

FILE = pb.DESCRIPTOR
SERVICE = FILE.services_by_name["GRPCInferenceService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer", bound=Message)


def companion(inference: Inference) -> Companion:
    """The protocol's service, for the gRPC server."""
    add = inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
    return Companion(SERVICE, functools.partial(add, InferenceServicer(inference)), FILE.pool)


class InferenceServicer(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """The protocol's service."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def ServerLive(self, _: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:  # noqa: N802
        """Whether the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:  # noqa: N802
        """Whether new work is welcome."""
        return pb.ServerReadyResponse(ready=(await self._inference.readiness()).is_ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:  # noqa: N802
        """Whether a model is ready; one that is not there is not."""
        return pb.ModelReadyResponse(ready=await self._inference.is_model_ready(request.name, request.version))

    async def ServerMetadata(  # noqa: N802
        self, _: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Name, version and extensions."""
        return ParseDict(self._inference.server_metadata(), pb.ServerMetadataResponse())

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """A model's tensors."""
        document = await self._inference.model_metadata(request.name, request.version)
        return ParseDict(document, pb.ModelMetadataResponse())

    async def ModelConfig(  # noqa: N802
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """A model's configuration, as Triton describes it."""
        document = await self._inference.model_config(request.name, request.version)
        return ParseDict({"config": document}, pb.ModelConfigResponse())

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """What this front end has answered by this protocol."""
        document = await self._inference.model_statistics(request.name, request.version)
        return ParseDict(document, pb.ModelStatisticsResponse())

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:  # noqa: N802
        """Fuse the pairs of a request."""
        name, version = request.model_name, request.model_version
        inferring = self._inference.infer(name, version, request_of(request), remaining_s=context.time_remaining())
        del request  # its tensors are copies of those that are asked about
        answer = await inferring
        outputs = [
            pb.ModelInferResponse.InferOutputTensor(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            for tensor in answer.outputs
        ]
        return pb.ModelInferResponse(
            model_name=answer.model_name,
            model_version=answer.model_version,
            id=answer.id,
            parameters={name: pb.InferParameter(string_param=text) for name, text in answer.parameters.items()},
            outputs=outputs,
            raw_output_contents=[bytes(tensor.data) for tensor in answer.outputs],
        )


def request_of(message: pb.ModelInferRequest) -> InferRequest:
    """A message's request. Raises InvalidInputError."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidInputError(f"raw_input_contents holds {len(raw)} tensors for {len(message.inputs)} inputs")
    if len(message.id) > MAX_ID_CHARS:
        raise InvalidInputError(f"id: accepted are at most {MAX_ID_CHARS} characters")
    inputs = []
    for index, entry in enumerate(message.inputs):
        if len(entry.name) > MAX_NAME_CHARS or len(entry.shape) > MAX_DIMENSIONS:
            raise InvalidInputError(
                f"{entry.name[:MAX_NAME_CHARS]}: accepted are names of at most {MAX_NAME_CHARS} characters and shapes "
                f"of at most {MAX_DIMENSIONS} dimensions"
            )
        refuse_shared_memory(entry.name, entry.parameters)
        has_contents = entry.HasField("contents")
        if has_contents and raw:
            raise InvalidInputError(f"{entry.name}: accepted are either contents or raw_input_contents, not both")
        data = raw[index] if raw else _contents(entry)
        inputs.append(Tensor(entry.name, entry.datatype, tuple(entry.shape), data))
    outputs: dict[str, bool] = {}
    for wanted in message.outputs:
        add_output(outputs, wanted.name, wanted.parameters, is_binary=True)
    parameters = parameters_of(_values(message.parameters))
    parameters.pop("binary_data_output", None)  # of HTTP
    return InferRequest(tuple(inputs), outputs, parameters, message.id)


def _contents(entry: pb.ModelInferRequest.InferInputTensor) -> bytes:
    contents = entry.contents
    if entry.datatype == "BYTES":
        return join_elements(contents.bytes_contents)
    return join_numbers(contents.uint_contents, entry.datatype, entry.name)


def _values(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    """The parameters that have a value; without one they are as absent as null is in JSON."""
    values: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        if (kind := parameter.WhichOneof("parameter_choice")) is not None:
            values[name] = getattr(parameter, kind)
    return values
