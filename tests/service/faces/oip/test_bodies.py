"""HTTP bodies of the protocol: JSON and binary data, by property and over real sockets."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from service.faces.oip import bodies
from service.faces.oip.bodies import split_body
from service.faces.oip.plan import plan_of
from service.faces.oip.tensors import MAX_MESSAGE_CHARS, PARAMETERS
from service.terms.errors import ErrorCode, InvalidInputError, PayloadTooLargeError, ServiceError
from tests.service.conftest import Server
from tests.service.faces.oip.messages import INFER, LENGTH, LIMITS, PIXELS, Entry, message, refusal, refusal_of

ENTRIES = st.lists(
    st.tuples(
        st.text(max_size=8),
        st.sampled_from(["UINT8", "UINT16", "BYTES", "FP32"]),
        st.lists(st.integers(0, 9), max_size=4),
        st.binary(max_size=40),
    ),
    max_size=4,
)


@settings(deadline=None)
@given(entries=ENTRIES, id_=st.text(max_size=20))
def test_splitting_undoes_joining(entries: list[tuple[str, str, list[int], bytes]], id_: str) -> None:
    inputs = [
        (
            {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(data)}},
            data,
        )
        for name, kind, shape, data in entries
    ]
    body, headers = message(*inputs, id=id_)
    request = split_body(body, headers[LENGTH], LIMITS)
    assert request.id == id_
    found = [(one.name, one.datatype, list(one.shape), bytes(one.data)) for one in request.inputs]
    assert found == entries


def read(body: bytes, header_length: str | None) -> None:
    """Everything between a body and the gateway."""
    plan_of(split_body(body, header_length, LIMITS), LIMITS)


@settings(deadline=None)
@given(body=st.binary(max_size=200), header_length=st.none() | st.text(max_size=8) | st.integers(-5, 300).map(str))
def test_no_bytes_are_worse_than_refused(body: bytes, header_length: str | None) -> None:
    with pytest.raises(ServiceError):
        read(body, header_length)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    field=st.sampled_from(["id", "inputs", "outputs", "parameters", "name", "datatype", "shape", "data"]),
    value=JSON,
    parameter=st.sampled_from([*PARAMETERS, "binary_data_output", "binary_data_size", "else"]),
    index=st.integers(0, 1),
)
def test_a_document_with_one_wrong_value_is_read_or_refused(field: str, value: Any, parameter: str, index: int) -> None:
    """Whatever stands where something else belongs: nothing but a ServiceError comes out."""
    inputs = [dict(entry) for entry, _ in PIXELS]
    document: dict[str, Any] = {"inputs": inputs}
    if field == "parameters":
        owner = inputs[index] if parameter == "binary_data_size" else document
        owner["parameters"] = {**owner.get("parameters", {}), parameter: value}
    else:
        owner = document if field in ("id", "inputs", "outputs") else inputs[index]
        owner[field] = value
    text = json.dumps(document).encode()
    refused = refusal_of(lambda: read(text + PIXELS[0][1] + PIXELS[1][1], str(len(text))))
    assert refused is None or (refused.http_status < 500 and len(refused.message) < 2 * MAX_MESSAGE_CHARS)


def _documents(model: type[BaseModel], document: Entry) -> Iterator[tuple[type[BaseModel], Entry]]:
    """Every object in a request's JSON, with the model that reads it."""
    yield model, document
    for name, inner in (("inputs", bodies._InputDocument), ("outputs", bodies._OutputDocument)):
        for one in document.get(name) or [] if model is bodies._RequestDocument else []:
            yield from _documents(inner, one)


def test_a_member_that_is_null_is_an_absent_one() -> None:
    """Every optional one, at every level, and every parameter; some clients write all members that there are."""
    inputs = [{"name": name, "datatype": "UINT8", "shape": [1, 2], "data": [3, 4]} for name in ("vis", "ir")]
    full: dict[str, Any] = {"inputs": inputs, "outputs": [{"name": "fused"}, {"name": "ir_restored"}]}
    expected = split_body(json.dumps(full).encode(), None, LIMITS)
    num_members = 0
    nulled = copy.deepcopy(full)
    for model, document in _documents(bodies._RequestDocument, nulled):
        for name, described in model.model_fields.items():
            if name not in document and not described.is_required():
                document[name] = None
                num_members += 1
    assert num_members == 2 + 2 + 2  # id and parameters; the parameters of two inputs and of two outputs
    assert split_body(json.dumps(nulled).encode(), None, LIMITS) == expected
    known = (*PARAMETERS, "binary_data_output")
    nulled["parameters"] = dict.fromkeys(known)
    for one in nulled["inputs"]:
        one["parameters"] = dict.fromkeys(("binary_data_size", "shared_memory_region", "other"))
    for one in nulled["outputs"]:
        one["parameters"] = dict.fromkeys(("binary_data", "classification", "shared_memory_region"))
    assert split_body(json.dumps(nulled).encode(), None, LIMITS) == expected
    nulled["parameters"]["binary_data_output"] = True  # `binary_data: null` says nothing against it
    assert split_body(json.dumps(nulled).encode(), None, LIMITS).outputs == {"fused": True, "ir_restored": True}
    everything = split_body(json.dumps({**full, "outputs": None}).encode(), None, LIMITS)
    assert everything == dataclasses.replace(expected, outputs={})


def test_binary_data_may_come_with_data_that_are_null() -> None:
    body, headers = message(*[({**entry, "data": None}, data) for entry, data in PIXELS], id=None, outputs=None)
    assert split_body(body, headers[LENGTH], LIMITS) == split_body(
        message(*PIXELS)[0], message(*PIXELS)[1][LENGTH], LIMITS
    )


@pytest.mark.parametrize("name", ["inputs", "inputs.name", "inputs.datatype", "inputs.shape", "outputs.name"])
def test_a_required_member_may_not_be_null(name: str) -> None:
    entry = {"name": "vis", "datatype": "UINT8", "shape": [1], "data": [1]}
    document: dict[str, Any] = {"inputs": [dict(entry)], "outputs": [{"name": "fused"}]}
    group, _, member = name.partition(".")
    if member:
        document[group][0][member] = None
    else:
        document[group] = None
    with pytest.raises(InvalidInputError, match=member or group):
        split_body(json.dumps(document).encode(), None, LIMITS)


def test_json_is_bounded_and_deep_nesting_is_not_followed() -> None:
    with pytest.raises(PayloadTooLargeError, match="binary data"):
        read(b" " * (LIMITS.max_json_bytes + 1), None)
    for text in (b"[" * 1_000_000, b'{"inputs":' + b"[" * 1_000_000, b'{"inputs": [{"data": ' + b"[" * 100_000):
        with pytest.raises(ServiceError):
            read(text, None)


async def test_bodies_that_cannot_be_read_are_refused(server: Server) -> None:
    client = server.client
    body, headers = message(*PIXELS)
    num_json = int(headers[LENGTH])
    malformed, invalid = ErrorCode.MALFORMED_REQUEST, ErrorCode.INVALID_INPUT

    async def told(content: bytes, length: str | None, code: ErrorCode, **more: str) -> str:
        sent = {**({} if length is None else {LENGTH: length}), **more}
        return refusal(await client.post(INFER, content=content, headers=sent), code)

    for length in ("-1", "1e3", "", str(len(body) + 1), "9" * 30, "0x10"):
        await told(body, length, malformed)
    await told(body, "0", malformed)
    await told(body, None, malformed)  # pixels after the JSON
    await told(b"", None, malformed)
    await told(b"[]", None, invalid)
    await told(b"{}", None, invalid)
    await told(body, str(num_json - 1), malformed)
    assert "7 bytes after" in await told(body + b"1234567", headers[LENGTH], invalid)
    await told(body[:-1], headers[LENGTH], invalid)
    for size in (-1, 2**63, 9215, 9217, True, "9216", 9216.0, [1]):
        entry = {**PIXELS[0][0], "parameters": {"binary_data_size": size}}
        text = json.dumps({"inputs": [entry, PIXELS[1][0]]}).encode()
        await told(text + PIXELS[0][1] + PIXELS[1][1], str(len(text)), invalid)
    for shape in ([48, 64], [48, 64, 2], [-1, 64, 3], [2**40, 64, 3], [48.0, 64, 3], ["48", 64, 3], [1] * 9, 48):
        entry = {**PIXELS[0][0], "shape": shape}
        text = json.dumps({"inputs": [entry, PIXELS[1][0]]}).encode()
        await told(text + PIXELS[0][1] + PIXELS[1][1], str(len(text)), invalid)
    for data in ([1, 2], [256] * 9216, [0.5] * 9216, ["a"] * 9216, [[1], 2], None, [None] * 9216):
        entry = {"name": "vis", "datatype": "UINT8", "shape": [48, 64, 3], "data": data}
        await told(json.dumps({"inputs": [entry, PIXELS[1][0]]}).encode(), None, invalid)
    shared = {**PIXELS[0][0], "parameters": {"shared_memory_region": "a", "shared_memory_byte_size": 9216}}
    assert "shared memory" in await told(json.dumps({"inputs": [shared]}).encode(), None, invalid)
    encoded = {"name": "vis", "datatype": "BYTES", "shape": [1], "data": ["no base64"]}
    assert "base64" in await told(json.dumps({"inputs": [encoded]}).encode(), None, invalid)
    compressed = {"Content-Encoding": "gzip"}
    await told(body, headers[LENGTH], ErrorCode.UNSUPPORTED_MEDIA, **compressed)
    assert server.engine.batches == []
