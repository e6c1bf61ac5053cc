"""Requests of the protocol as HTTP bodies and as gRPC messages, and what their answers hold."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from recofuse_protos.inference.v2 import inference_pb2 as pb
from service.faces.oip.bodies import join_body
from service.faces.oip.tensors import join_elements, split_elements
from service.terms.errors import STATUS, ErrorCode, ServiceError
from service.terms.settings import LimitSettings
from tests.fakes import pair, picture

LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/recofuse/infer"
LIMITS = LimitSettings()
VIS, IR = picture(), picture(channels=1, seed=1)
VIS_FILE, IR_FILE = pair()

Entry = dict[str, Any]


def tensor(name: str, array: NDArray[Any]) -> tuple[Entry, bytes]:
    """An input of pixels, as binary data."""
    data = array.tobytes()
    datatype = array.dtype.name.upper()
    entry = {"name": name, "datatype": datatype, "shape": list(array.shape)}
    return {**entry, "parameters": {"binary_data_size": len(data)}}, data


def files(name: str, *contents: bytes) -> tuple[Entry, bytes]:
    """An input of image files, as binary data."""
    data = join_elements(contents)
    entry = {"name": name, "datatype": "BYTES", "shape": [len(contents)]}
    return {**entry, "parameters": {"binary_data_size": len(data)}}, data


def message(*inputs: tuple[Entry, bytes], **document: Any) -> tuple[bytes, dict[str, str]]:
    """A request's body and headers."""
    document = {"inputs": [entry for entry, _ in inputs], **document}
    body, num_json = join_body(document, [data for _, data in inputs])
    return body, {LENGTH: str(num_json)}


PIXELS = (tensor("vis", VIS), tensor("ir", IR[..., None]))
FILES = (files("vis", VIS_FILE), files("ir", IR_FILE))
ALL_BINARY = {"parameters": {"binary_data_output": True}}


def grpc_message(*inputs: tuple[Entry, bytes], **document: Any) -> pb.ModelInferRequest:
    """The same request for gRPC."""
    sent = pb.ModelInferRequest(model_name="recofuse", id=document.get("id", ""))
    for entry, data in inputs:
        sent.inputs.add(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
        sent.raw_input_contents.append(data)
    for wanted in document.get("outputs", []):
        one = sent.outputs.add(name=wanted["name"])
        for key, value in wanted.get("parameters", {}).items():
            one.parameters[key].int64_param = value
    for key, value in document.get("parameters", {}).items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(sent.parameters[key], kind, value)
    return sent


async def post(client: httpx.AsyncClient, *inputs: tuple[Entry, bytes], **document: Any) -> httpx.Response:
    body, headers = message(*inputs, **document)
    return await client.post(INFER, content=body, headers=headers)


def outputs_of(answer: httpx.Response) -> dict[str, Any]:
    """An answer's tensors: arrays of pixels, or lists of files."""
    assert answer.status_code == 200, answer.text
    num_json = int(answer.headers.get(LENGTH, len(answer.content)))
    document, at = json.loads(answer.content[:num_json]), num_json
    found: dict[str, Any] = {}
    for entry in document["outputs"]:
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is None:
            data = entry["data"]
            is_bytes = entry["datatype"] == "BYTES"
            is_float = entry["datatype"] == "FP32"
            numbers = np.array(data, np.float32).tobytes() if is_float else b"" if is_bytes else bytes(data)
            raw = join_elements(map(base64.b64decode, data)) if is_bytes else numbers
        else:
            raw, at = answer.content[at : at + size], at + size
        if entry["datatype"] == "BYTES":
            found[entry["name"]] = split_elements(raw, int(np.prod(entry["shape"])), "output")
        else:
            kind = "<f4" if entry["datatype"] == "FP32" else "u1"
            found[entry["name"]] = np.frombuffer(raw, kind).reshape(entry["shape"])
    assert at == len(answer.content)
    return found


def refusal(answer: httpx.Response, code: ErrorCode) -> str:
    """The message of an answer that must be this error, in both of its places."""
    document = answer.json()
    assert document["code"] == code, document
    assert answer.status_code == STATUS[code][0]
    assert document["error"] == document["detail"]
    return str(document["error"])


def refusal_of(call: Callable[[], Any]) -> ServiceError | None:
    """The refusal that a call ends with, if it does; anything else that it raises fails the test."""
    try:
        call()
    except ServiceError as error:
        return error
    return None
