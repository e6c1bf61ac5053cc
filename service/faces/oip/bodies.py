"""The protocol's HTTP bodies: JSON, and after it the tensors that are sent as binary data."""

from __future__ import annotations

import base64
import binascii
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUseDefault, to_json

from service.faces.oip.tensors import (
    MAX_DIMENSIONS,
    MAX_ID_CHARS,
    MAX_MESSAGE_CHARS,
    MAX_NAME_CHARS,
    InferAnswer,
    InferRequest,
    Tensor,
    add_output,
    join_elements,
    join_numbers,
    parameters_of,
    refuse_shared_memory,
    split_elements,
)
from service.terms.errors import InvalidInputError, MalformedRequestError, PayloadTooLargeError
from service.terms.records import problems_of
from service.terms.settings import LimitSettings

_HEADER_LENGTH = re.compile(r"[0-9]{1,12}")


def split_body(body: bytes, header_length: str | None, limits: LimitSettings) -> InferRequest:
    """The request in an HTTP body: JSON, and after it the tensors that are sent as binary data.

    header_length: the header Inference-Header-Content-Length; None: all of the body is JSON. Raises
    MalformedRequestError, InvalidInputError and PayloadTooLargeError (the JSON).
    """
    num_json = len(body)
    if header_length is not None:
        if not _HEADER_LENGTH.fullmatch(header_length) or int(header_length) > len(body):
            raise MalformedRequestError(
                f"Inference-Header-Content-Length must be the number of bytes of the JSON, at most {len(body)} here"
            )
        num_json = int(header_length)
    if num_json > limits.max_json_bytes:
        raise PayloadTooLargeError(
            f"the JSON has {num_json} bytes; at most {limits.max_json_bytes} are accepted: send tensors as binary data"
        )
    document = _read_document(body[:num_json])
    rest, at, inputs = memoryview(body)[num_json:], 0, []
    for entry in document.inputs:
        size = entry.parameters.get("binary_data_size")
        refuse_shared_memory(entry.name, entry.parameters)
        if size is None:
            data: bytes | memoryview = _packed(entry)
        else:
            if entry.data is not None:
                raise InvalidInputError(f"{entry.name}: accepted is either data or binary_data_size, not both")
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest) - at:
                raise InvalidInputError(
                    f"{entry.name}: binary_data_size must be the tensor's number of bytes; {len(rest) - at} are there"
                )
            data, at = rest[at : at + size], at + size
        inputs.append(Tensor(entry.name, entry.datatype, tuple(entry.shape), data))
    if at != len(rest):
        raise InvalidInputError(f"{len(rest) - at} bytes after the JSON belong to no tensor")
    parameters = parameters_of(document.parameters)
    is_binary = parameters.pop("binary_data_output", False) is True
    outputs: dict[str, bool] = {}
    for wanted in document.outputs:
        add_output(outputs, wanted.name, wanted.parameters, wanted.parameters.get("binary_data", is_binary) is True)
    return InferRequest(tuple(inputs), outputs, parameters, document.id, is_binary)


def join_body(document: Mapping[str, Any], blobs: Iterable[bytes | memoryview]) -> tuple[bytes, int]:
    """A document and the tensors after it, as `split_body` reads them; also the number of bytes of the JSON."""
    header = to_json(document)
    return b"".join((header, *blobs)), len(header)


def answer_body(answer: InferAnswer, request: InferRequest) -> tuple[bytes, int | None]:
    """An answer as HTTP body; also the number of bytes of its JSON, None if there is nothing else."""
    entries, blobs = [], []
    for tensor in answer.outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if request.outputs.get(tensor.name, request.is_binary):
            entry["parameters"] = {"binary_data_size": len(tensor.data)}
            blobs.append(tensor.data)
        elif tensor.datatype == "BYTES":
            files = split_elements(tensor.data, math.prod(tensor.shape), tensor.name)
            entry["data"] = [base64.b64encode(content).decode() for content in files]
        elif tensor.datatype == "FP32":
            values = np.frombuffer(tensor.data, "<f4").tolist()
            entry["data"] = [value if math.isfinite(value) else None for value in values]
        else:
            entry["data"] = np.frombuffer(tensor.data, np.uint8).tolist()
        entries.append(entry)
    document: dict[str, Any] = {"model_name": answer.model_name, "model_version": answer.model_version}
    if answer.id:
        document["id"] = answer.id
    if answer.parameters:
        document["parameters"] = dict(answer.parameters)
    body, num_json = join_body({**document, "outputs": entries}, blobs)
    return body, num_json if blobs else None


def _unless_null(value: object) -> object:
    if value is None:
        raise PydanticUseDefault
    return value


def _without_nulls(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


_Optional = BeforeValidator(_unless_null)  # a member that is null is absent, as many writers of JSON have it
_Parameters = Annotated[dict[str, Any], _Optional, AfterValidator(_without_nulls)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _InputDocument(_Document):
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)]
    datatype: Annotated[str, Field(max_length=16)]
    shape: Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]], Field(max_length=MAX_DIMENSIONS)]
    parameters: _Parameters = {}
    data: list[Any] | None = None


class _OutputDocument(_Document):
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)]
    parameters: _Parameters = {}


class _RequestDocument(_Document):
    id: Annotated[str, _Optional, Field(max_length=MAX_ID_CHARS)] = ""
    parameters: _Parameters = {}
    inputs: Annotated[list[_InputDocument], Field(max_length=8)]
    outputs: Annotated[list[_OutputDocument], _Optional, Field(max_length=8)] = []


def _read_document(text: bytes) -> _RequestDocument:
    try:
        return _RequestDocument.model_validate_json(text)
    except ValidationError as error:
        if any(problem["type"] == "json_invalid" for problem in error.errors(include_input=False)):
            raise MalformedRequestError("the request's JSON cannot be read") from error
        raise InvalidInputError(problems_of(error)[:MAX_MESSAGE_CHARS]) from error


def _packed(entry: _InputDocument) -> bytes:
    """The data of a tensor that is written in JSON, nested or flat. Files, which are not text, come as base64."""
    if entry.data is None:
        raise InvalidInputError(f"{entry.name}: the tensor has neither data nor binary_data_size")
    flat: list[Any] = entry.data
    while flat and isinstance(flat[0], list):
        if not all(isinstance(row, list) for row in flat):
            raise InvalidInputError(f"{entry.name}: the data are nested unevenly")
        flat = list(itertools.chain.from_iterable(flat))
    if entry.datatype != "BYTES":
        return join_numbers(flat, entry.datatype, entry.name)
    if not all(isinstance(element, str) for element in flat):
        raise InvalidInputError(f"{entry.name}: the elements of BYTES are strings, files in base64")
    try:
        return join_elements(base64.b64decode(element, validate=True) for element in flat)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(f"{entry.name}: an element is not base64; send files so, or as binary data") from error
