"""The Open Inference Protocol: its bytes by property, its calls over real sockets, and NVIDIA's client unchanged.

`tritonclient` meets a server process of its own with the shipped model; the rest runs on the fake engine.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import BaseModel
from tritonclient.utils import InferenceServerException

from benchmarks.processes import Stack, all_in_one, free_port
from recofuse_protos.inference.v2 import inference_pb2 as pb
from recofuse_protos.inference.v2 import inference_pb2_grpc
from service.access.keys import FileKeys, Scope, new_key
from service.faces.oip import tensors as oip
from service.faces.oip.grpc import request_of
from service.terms.errors import STATUS, ErrorCode, InvalidInputError, PayloadTooLargeError, ServiceError
from service.terms.jobs import FusionResult, Part, Priority
from service.terms.settings import LimitSettings
from tests.fakes import FakeEngine, TellingCodec, file_of, pair, picture
from tests.service.conftest import Server, Serving

ROOT = Path(__file__).parents[4]
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
    data = oip.join_elements(contents)
    entry = {"name": name, "datatype": "BYTES", "shape": [len(contents)]}
    return {**entry, "parameters": {"binary_data_size": len(data)}}, data


def message(*inputs: tuple[Entry, bytes], **document: Any) -> tuple[bytes, dict[str, str]]:
    """A request's body and headers."""
    document = {"inputs": [entry for entry, _ in inputs], **document}
    body, num_json = oip.join_body(document, [data for _, data in inputs])
    return body, {LENGTH: str(num_json)}


PIXELS = (tensor("vis", VIS), tensor("ir", IR[..., None]))
FILES = (files("vis", VIS_FILE), files("ir", IR_FILE))
ALL_BINARY = {"parameters": {"binary_data_output": True}}


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
            raw = oip.join_elements(map(base64.b64decode, data)) if is_bytes else bytes(data)
        else:
            raw, at = answer.content[at : at + size], at + size
        if entry["datatype"] == "BYTES":
            found[entry["name"]] = oip.split_elements(raw, int(np.prod(entry["shape"])), "output")
        else:
            found[entry["name"]] = np.frombuffer(raw, np.uint8).reshape(entry["shape"])
    assert at == len(answer.content)
    return found


def refusal(answer: httpx.Response, code: ErrorCode) -> str:
    """The message of an answer that must be this error, in both of its places."""
    document = answer.json()
    assert document["code"] == code, document
    assert answer.status_code == STATUS[code][0]
    assert document["error"] == document["detail"]
    return str(document["error"])


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[Server]:
    async with serving() as running:
        yield running


# bytes

ENTRIES = st.lists(
    st.tuples(
        st.text(max_size=8),
        st.sampled_from(["UINT8", "UINT16", "BYTES", "FP32"]),
        st.lists(st.integers(0, 9), max_size=4),
        st.binary(max_size=40),
    ),
    max_size=4,
)


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
    request = oip.split_body(body, headers[LENGTH], LIMITS)
    assert request.id == id_
    found = [(one.name, one.datatype, list(one.shape), bytes(one.data)) for one in request.inputs]
    assert found == entries


@given(elements=st.lists(st.binary(max_size=30), max_size=6), count=st.integers(0, 8), cut=st.integers(0, 40))
def test_elements_are_taken_apart_as_they_were_joined(elements: list[bytes], count: int, cut: int) -> None:
    data = oip.join_elements(elements)
    assert oip.split_elements(data, len(elements), "vis") == elements
    if count != len(elements):
        with pytest.raises(InvalidInputError):
            oip.split_elements(data, count, "vis")
    if 0 < cut <= len(data):
        with pytest.raises(InvalidInputError):
            oip.split_elements(data[:-cut], len(elements), "vis")


def read(body: bytes, header_length: str | None) -> None:
    """Everything between a body and the gateway."""
    oip.plan_of(oip.split_body(body, header_length, LIMITS), LIMITS)


def refusal_of(call: Callable[[], Any]) -> ServiceError | None:
    """The refusal that a call ends with, if it does; anything else that it raises fails the test."""
    try:
        call()
    except ServiceError as error:
        return error
    return None


@given(body=st.binary(max_size=200), header_length=st.none() | st.text(max_size=8) | st.integers(-5, 300).map(str))
def test_no_bytes_are_worse_than_refused(body: bytes, header_length: str | None) -> None:
    with pytest.raises(ServiceError):
        read(body, header_length)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(
    field=st.sampled_from(["id", "inputs", "outputs", "parameters", "name", "datatype", "shape", "data"]),
    value=JSON,
    parameter=st.sampled_from([*oip.PARAMETERS, "binary_data_output", "binary_data_size", "else"]),
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
    assert refused is None or (refused.http_status < 500 and len(refused.message) < 2 * oip.MAX_MESSAGE_CHARS)


@given(data=st.data())
def test_a_message_with_wrong_fields_is_read_or_refused(data: st.DataObject) -> None:
    """The same for gRPC: whatever parses as the message, however little sense it makes."""
    number, text = st.integers(-(2**63), 2**63 - 1), st.sampled_from(["vis", "ir", "fused", "UINT8", "BYTES", "x"])
    sent = pb.ModelInferRequest(raw_input_contents=data.draw(st.lists(st.binary(max_size=20), max_size=3)))
    for _ in range(data.draw(st.integers(0, 3))):
        one = sent.inputs.add(name=data.draw(text), datatype=data.draw(text))
        one.shape.extend(data.draw(st.lists(number | st.integers(0, 3), max_size=5)))
        if data.draw(st.booleans()):
            one.contents.uint_contents.extend(data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=4)))
            one.contents.bytes_contents.extend(data.draw(st.lists(st.binary(max_size=5), max_size=2)))
    for name in data.draw(st.lists(st.sampled_from([*oip.PARAMETERS, "else"]), max_size=3)):
        kind = data.draw(st.sampled_from(["bool_param", "int64_param", "string_param", "double_param", "none"]))
        value: Any = {
            "bool_param": st.booleans(), "int64_param": number, "string_param": text, "double_param": st.floats(),
        }.get(kind)  # fmt: skip
        if value is None:
            sent.parameters[name].SetInParent()
        else:
            setattr(sent.parameters[name], kind, data.draw(value))
    for name in data.draw(st.lists(text, max_size=2)):
        sent.outputs.add(name=name)
    parsed = pb.ModelInferRequest.FromString(sent.SerializeToString())
    refused = refusal_of(lambda: oip.plan_of(request_of(parsed), LIMITS))
    assert refused is None or refused.http_status < 500


def _documents(model: type[BaseModel], document: Entry) -> Iterator[tuple[type[BaseModel], Entry]]:
    """Every object in a request's JSON, with the model that reads it."""
    yield model, document
    for name, inner in (("inputs", oip._InputDocument), ("outputs", oip._OutputDocument)):
        for one in document.get(name) or [] if model is oip._RequestDocument else []:
            yield from _documents(inner, one)


def test_a_member_that_is_null_is_an_absent_one() -> None:
    """Every optional one, at every level, and every parameter; some clients write all members that there are."""
    inputs = [{"name": name, "datatype": "UINT8", "shape": [1, 2], "data": [3, 4]} for name in ("vis", "ir")]
    full: dict[str, Any] = {"inputs": inputs, "outputs": [{"name": "fused"}, {"name": "ir_restored"}]}
    expected = oip.split_body(json.dumps(full).encode(), None, LIMITS)
    num_members = 0
    nulled = copy.deepcopy(full)
    for model, document in _documents(oip._RequestDocument, nulled):
        for name, described in model.model_fields.items():
            if name not in document and not described.is_required():
                document[name] = None
                num_members += 1
    assert num_members == 2 + 2 + 2  # id and parameters; the parameters of two inputs and of two outputs
    assert oip.split_body(json.dumps(nulled).encode(), None, LIMITS) == expected
    known = (*oip.PARAMETERS, "binary_data_output")
    nulled["parameters"] = dict.fromkeys(known)
    for one in nulled["inputs"]:
        one["parameters"] = dict.fromkeys(("binary_data_size", "shared_memory_region", "other"))
    for one in nulled["outputs"]:
        one["parameters"] = dict.fromkeys(("binary_data", "classification", "shared_memory_region"))
    assert oip.split_body(json.dumps(nulled).encode(), None, LIMITS) == expected
    nulled["parameters"]["binary_data_output"] = True  # `binary_data: null` says nothing against it
    assert oip.split_body(json.dumps(nulled).encode(), None, LIMITS).outputs == {"fused": True, "ir_restored": True}
    everything = oip.split_body(json.dumps({**full, "outputs": None}).encode(), None, LIMITS)
    assert everything == dataclasses.replace(expected, outputs={})


def test_binary_data_may_come_with_data_that_are_null() -> None:
    body, headers = message(*[({**entry, "data": None}, data) for entry, data in PIXELS], id=None, outputs=None)
    assert oip.split_body(body, headers[LENGTH], LIMITS) == oip.split_body(
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
        oip.split_body(json.dumps(document).encode(), None, LIMITS)


def test_a_message_s_parameter_without_a_value_is_an_absent_one() -> None:
    sent = grpc_message(*PIXELS)
    sent.parameters["seed"].SetInParent()
    sent.parameters["steps"].int64_param = 4
    assert request_of(sent).parameters == {"steps": 4}


def test_a_long_list_of_pairs_is_refused_by_its_shape_alone() -> None:
    claimed = oip.Tensor("vis", "BYTES", (2**31 - 1,) * 8, b"")
    with pytest.raises(PayloadTooLargeError, match="at most 16"):
        oip.plan_of(oip.InferRequest((claimed, oip.Tensor("ir", "BYTES", (1,), b""))), LIMITS)


@pytest.mark.parametrize(
    ("field", "value"), [("shape", [2**62] * 300), ("name", "a" * 65), ("id", "a" * 257)], ids=["shape", "name", "id"]
)
def test_messages_are_bounded_as_the_json_is(field: str, value: Any) -> None:
    """The product of some hundred large dimensions is a number that Python takes long for, and refuses to print."""
    sent = pb.ModelInferRequest(raw_input_contents=[b"", b""], id=value if field == "id" else "")
    vis, _ = (sent.inputs.add(name=name, datatype="BYTES", shape=[1]) for name in ("vis", "ir"))
    if field == "shape":
        vis.shape[:] = value
    elif field == "name":
        vis.name = value
    with pytest.raises(InvalidInputError, match="at most") as refused:
        oip.plan_of(request_of(sent), LIMITS)
    assert len(refused.value.message) < 200


def test_json_is_bounded_and_deep_nesting_is_not_followed() -> None:
    with pytest.raises(PayloadTooLargeError, match="binary data"):
        read(b" " * (LIMITS.max_json_bytes + 1), None)
    for text in (b"[" * 1_000_000, b'{"inputs":' + b"[" * 1_000_000, b'{"inputs": [{"data": ' + b"[" * 100_000):
        with pytest.raises(ServiceError):
            read(text, None)


# what comes back


@pytest.mark.parametrize("inputs", [PIXELS, FILES], ids=["pixels", "files"])
async def test_a_pair_comes_back_as_tensors(server: Server, inputs: tuple[tuple[Entry, bytes], ...]) -> None:
    answer = await post(server.client, *inputs, id="mine", **ALL_BINARY)
    found = outputs_of(answer)
    batch = (1,) if inputs is FILES else ()
    assert {name: array.shape for name, array in found.items()} == {
        "fused": (*batch, 48, 64, 3), "vis_restored": (*batch, 48, 64, 3), "ir_restored": (*batch, 48, 64, 1),
    }  # fmt: skip
    np.testing.assert_array_equal(found["fused"].reshape(VIS.shape), VIS)
    np.testing.assert_array_equal(found["ir_restored"].reshape(IR.shape), IR)
    document = json.loads(answer.content[: int(answer.headers[LENGTH])])
    assert (document["model_name"], document["model_version"], document["id"]) == ("fake", "7", "mine")
    assert answer.headers["content-type"] == "application/octet-stream"


async def test_json_alone_does_as_well(server: Server) -> None:
    inputs: list[Entry] = [
        {"name": "vis", "datatype": "UINT8", "shape": [1, *VIS.shape], "data": VIS.tolist()},
        {"name": "ir", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(IR_FILE).decode()]},
    ]
    wanted = [{"name": "ir_restored"}, {"name": "fused", "parameters": {"binary_data": False}}]
    answer = await server.client.post(INFER, json={"inputs": inputs, "outputs": wanted})
    assert LENGTH not in answer.headers
    assert [entry["name"] for entry in answer.json()["outputs"]] == ["ir_restored", "fused"]
    found = outputs_of(answer)
    np.testing.assert_array_equal(found["fused"], VIS[None])
    np.testing.assert_array_equal(found["ir_restored"][0, ..., 0], IR)


async def test_only_what_is_wanted_is_made(server: Server) -> None:
    for wanted, parts in {"fused": (Part.FUSED,), "vis_restored": (Part.VIS,), "ir_restored": (Part.IR,)}.items():
        found = outputs_of(await post(server.client, *PIXELS, outputs=[{"name": wanted}]))
        assert list(found) == [wanted]
        assert tuple(server.engine.options[-1].parts) == parts


async def test_mixed_answers_and_files(server: Server) -> None:
    wanted = [{"name": "fused", "parameters": {"binary_data": True}}, {"name": "ir_restored"}]
    found = outputs_of(await post(server.client, *FILES, outputs=wanted, parameters={"format": "png"}))
    fused, ir = (
        np.asarray(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED))
        for (content,) in found.values()
    )
    np.testing.assert_array_equal(fused[..., ::-1], VIS)
    np.testing.assert_array_equal(ir, IR)


async def test_parameters_reach_the_engine(server: Server) -> None:
    given = {"seed": 99, "steps": "17", "sampler": "euler", "ir_range": "30,90", "timeout": 5_000_000, "priority": 1}
    given |= {"vis_range": "20,180.5", "binary_data_output": True}
    found = outputs_of(await post(server.client, *PIXELS, parameters=given))
    np.testing.assert_array_equal(found["vis_restored"], np.rint(np.clip((VIS - 20.0) / 160.5, 0, 1) * 255))
    np.testing.assert_array_equal(found["ir_restored"][..., 0], np.rint(np.clip((IR - 30.0) / 60, 0, 1) * 255))
    assert server.engine.batches[-1] == [99]
    assert (server.engine.options[-1].steps, server.engine.options[-1].sampler) == (17, "euler")


@pytest.mark.parametrize(
    ("given", "priority"),
    [(None, "normal"), (0, "normal"), (1, "high"), (2, "normal"), (3, "low"), ("low", "low"), ("high", "high")],
)
def test_priorities_are_tritons_numbers_or_our_names(given: Any, priority: str) -> None:
    inputs = tuple(oip.Tensor(entry["name"], "UINT8", tuple(entry["shape"]), data) for entry, data in PIXELS)
    request = oip.InferRequest(inputs, parameters={} if given is None else {"priority": given})
    assert oip.plan_of(request, LIMITS).requests[0].priority is Priority(priority)


async def test_each_pair_of_a_batch_is_a_job(server: Server) -> None:
    """They come back in their order, each as it would alone, with rows of different pairs never mixed."""
    views = [picture(seed=seed) for seed in range(5)]
    thermal = np.stack([picture(channels=1, seed=seed) for seed in range(5)])[..., None]
    for inputs in (
        (tensor("vis", np.stack(views)), tensor("ir", thermal)),
        (files("vis", *map(file_of, views)), files("ir", *(file_of(one[..., 0]) for one in thermal))),
        (files("vis", *map(file_of, views)), tensor("ir", thermal)),
    ):
        server.engine.batches.clear()
        found = outputs_of(await post(server.client, *inputs, parameters={"binary_data_output": True, "seed": 4}))
        np.testing.assert_array_equal(found["fused"], np.stack(views))
        np.testing.assert_array_equal(found["ir_restored"], thermal)
        assert [seed for batch in server.engine.batches for seed in batch] == [4] * 5


async def test_a_batch_shares_a_forward_pass(serving: Serving) -> None:
    engine = FakeEngine(batch_sizes=(1, 2, 4))
    engine.gate.clear()
    async with serving(engine, batch={"max_batch": 4, "max_wait_s": 10}) as server:
        first = asyncio.create_task(server.client.post("/v1/fuse", files={"vis": VIS_FILE, "ir": IR_FILE}))
        assert await asyncio.to_thread(engine.started.wait, 10)
        vis, ir = np.stack([VIS] * 4), np.stack([IR] * 4)[..., None]
        batch = asyncio.create_task(post(server.client, tensor("vis", vis), tensor("ir", ir), **ALL_BINARY))
        async with asyncio.timeout(20):
            while True:  # what is held is known to be coming, and the batch waits for it
                if "recofuse_jobs_held 5.0" in (await server.client.get("/metrics")).text:
                    break
                await asyncio.sleep(0.01)
        engine.gate.set()
        assert (await first).status_code == 200
        assert outputs_of(await batch)["fused"].shape == (4, 48, 64, 3)
        assert list(map(len, engine.batches)) == [1, 4]


async def test_sixteen_bit_infrared_is_stretched_as_a_file_is(server: Server) -> None:
    deep = (picture(channels=1, seed=5).astype(np.uint16) * 20 + 7000).astype(np.uint16)
    found = outputs_of(await post(server.client, tensor("vis", VIS), tensor("ir", deep), **ALL_BINARY))
    form = {"vis": VIS_FILE, "ir": file_of(deep)}
    answer = await server.client.post("/v1/fuse", files=form, data={"output": "ir", "format": "npy"})
    np.testing.assert_array_equal(found["ir_restored"][..., 0], np.load(io.BytesIO(answer.content)))


async def test_both_faces_say_what_was_read_of_the_infrared_files(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, odd = (file_of(picture(channels=1, seed=seed)) for seed in (7, 8))
    TellingCodec.serve(monkeypatch, {raw: ("raw", ()), odd: ("palette", ("ir: 暖かい", "second"))})
    expected: list[tuple[tuple[bytes, ...], dict[str, str]]] = [
        ((IR_FILE,), {"infrared_source": "grey"}),
        ((odd,), {"infrared_source": "palette", "warnings": "ir: 暖かい\nsecond"}),
        (
            (raw, IR_FILE, odd),
            {"infrared_source": "raw,grey,palette", "warnings": "pair 2: ir: 暖かい\npair 2: second"},
        ),
    ]
    async with (
        serving(grpc={"port": 0}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for ir, told in expected:
            inputs = (files("vis", *[VIS_FILE] * len(ir)), files("ir", *ir))
            answer = await post(server.client, *inputs, **ALL_BINARY)
            assert json.loads(answer.content[: int(answer.headers[LENGTH])])["parameters"] == told
            message = await stub.ModelInfer(grpc_message(*inputs))
            assert {name: value.string_param for name, value in message.parameters.items()} == told


def test_workers_that_say_nothing_leave_no_parameters() -> None:
    silent, known = FusionResult(job_id="a"), FusionResult(job_id="b", ir_source="raw")
    assert oip._told_of([silent, silent]) == {}
    assert oip._told_of([silent, known]) == {"infrared_source": ",raw"}


# refusals

SMALL = np.zeros((8, 8, 3), np.uint8)
OTHER_ASPECT = np.zeros((64, 64, 1), np.uint8)
REFUSED: dict[str, tuple[tuple[tuple[Entry, bytes], ...], dict[str, Any], ErrorCode, str]] = {
    "no ir": ((PIXELS[0],), {}, ErrorCode.INVALID_INPUT, "ir is missing"),
    "vis twice": ((PIXELS[0], *PIXELS), {}, ErrorCode.INVALID_INPUT, "more than once"),
    "unknown input": ((*PIXELS, tensor("depth", VIS)), {}, ErrorCode.INVALID_INPUT, "no input 'depth'"),
    "floats": ((tensor("vis", VIS.astype(np.float32)), PIXELS[1]), {}, ErrorCode.INVALID_INPUT, "FLOAT32"),
    "deep vis": ((tensor("vis", VIS.astype(np.uint16)), PIXELS[1]), {}, ErrorCode.INVALID_INPUT, "UINT16"),
    "channels first": ((tensor("vis", VIS.transpose(2, 0, 1)), PIXELS[1]), {}, ErrorCode.INVALID_INPUT, "[3, 48, 64]"),
    "colour ir": ((PIXELS[0], tensor("ir", VIS)), {}, ErrorCode.INVALID_INPUT, "[height, width, 1]"),
    "no pairs": ((tensor("vis", VIS[None][:0]), PIXELS[1]), {}, ErrorCode.INVALID_INPUT, "empty"),
    "unequal": ((tensor("vis", np.stack([VIS, VIS])), PIXELS[1]), {}, ErrorCode.INVALID_INPUT, "2 images and ir 1"),
    "too small": ((tensor("vis", SMALL), tensor("ir", SMALL[..., :1])), {}, ErrorCode.INVALID_INPUT, "8x8"),
    "other aspect": ((PIXELS[0], tensor("ir", OTHER_ASPECT)), {}, ErrorCode.INVALID_INPUT, "aspect"),
    "too many": (
        (files("vis", *[b""] * 17), files("ir", *[b""] * 17)), {}, ErrorCode.PAYLOAD_TOO_LARGE, "at most 16",
    ),
    "no image": ((files("vis", b"text"), FILES[1]), {}, ErrorCode.UNSUPPORTED_MEDIA, "vis"),
    "one bad of two": (
        (files("vis", VIS_FILE, b"text"), files("ir", IR_FILE, IR_FILE)),
        ALL_BINARY,
        ErrorCode.UNSUPPORTED_MEDIA,
        "pair 1: vis",
    ),
    "sizes differ": (
        (files("vis", VIS_FILE, pair(96, 72)[0]), files("ir", IR_FILE, IR_FILE)),
        ALL_BINARY,
        ErrorCode.INVALID_INPUT,
        "64x48 and 96x72",
    ),
    "unknown output": (PIXELS, {"outputs": [{"name": "depth"}]}, ErrorCode.INVALID_INPUT, "vis_restored"),
    "output twice": (PIXELS, {"outputs": [{"name": "fused"}] * 2}, ErrorCode.INVALID_INPUT, "more than once"),
    "classification": (
        PIXELS,
        {"outputs": [{"name": "fused", "parameters": {"classification": 3}}]},
        ErrorCode.INVALID_INPUT,
        "classification",
    ),
    "unknown parameter": (PIXELS, {"parameters": {"stepz": 3}}, ErrorCode.INVALID_INPUT, "stepz"),
    "no steps": (PIXELS, {"parameters": {"steps": 0}}, ErrorCode.INVALID_INPUT, "steps"),
    "unknown sampler": (PIXELS, {"parameters": {"sampler": "magic"}}, ErrorCode.INVALID_INPUT, "sampler"),
    "unknown format": (PIXELS, {"parameters": {"format": "bmp"}}, ErrorCode.INVALID_INPUT, "format"),
    "bad vis range": (PIXELS, {"parameters": {"vis_range": "9,1"}}, ErrorCode.INVALID_INPUT, "vis_range"),
    "bad range": (PIXELS, {"parameters": {"ir_range": "9,1"}}, ErrorCode.INVALID_INPUT, "ir_range"),
    "unknown priority": (PIXELS, {"parameters": {"priority": 4}}, ErrorCode.INVALID_INPUT, "priority"),
    "no time": (PIXELS, {"parameters": {"timeout": 0}}, ErrorCode.INVALID_INPUT, "timeout"),
    "too much time": (PIXELS, {"parameters": {"timeout_ms": 10**9}}, ErrorCode.INVALID_INPUT, "timeout"),
}  # fmt: skip


async def test_what_cannot_be_fused_is_refused_by_both_faces(serving: Serving) -> None:
    async with (
        serving(grpc={"port": 0}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name, (inputs, document, code, told) in REFUSED.items():
            if "binary_data_output" not in document.get("parameters", {}):
                document = {**document, "parameters": {**document.get("parameters", {}), "binary_data_output": True}}
            assert told in refusal(await post(server.client, *inputs, **document), code), name
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ModelInfer(grpc_message(*inputs, **document))
            assert refused.value.code().name == STATUS[code][1], name
            assert told in str(refused.value.details()), name
        assert server.engine.batches == []
        outputs_of(await post(server.client, *PIXELS))


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


async def test_limits_hold_before_anything_is_decoded(serving: Serving) -> None:
    limits = {"max_image_bytes": 20_000, "max_side": 64, "max_pairs": 2, "max_json_bytes": 20_000}
    async with serving(limits=limits) as server:
        large = ErrorCode.PAYLOAD_TOO_LARGE
        outputs_of(await post(server.client, *PIXELS, **ALL_BINARY))
        wide = np.zeros((32, 65, 3), np.uint8)
        refusal(await post(server.client, tensor("vis", wide), tensor("ir", wide[..., :1]), **ALL_BINARY), large)
        thrice = np.zeros((3, 32, 32, 3), np.uint8)
        assert "at most 2" in refusal(
            await post(server.client, tensor("vis", thrice), tensor("ir", thrice[..., :1]), **ALL_BINARY), large
        )
        refusal(await server.client.post(INFER, content=b" " * 20_001), large)
        refusal(await server.client.post(INFER, content=b" " * 200_000), large)
        assert "binary_data" in refusal(await post(server.client, *PIXELS), large)  # 9216 values would be 36 kB of JSON
        refusal(await post(server.client, *FILES), large)
        outputs_of(await post(server.client, *FILES, outputs=[{"name": "ir_restored"}]))


# models, time, keys, numbers


async def test_models_go_by_two_names_and_their_version(server: Server) -> None:
    body, headers = message(*PIXELS, **ALL_BINARY)
    for name in ("recofuse", "fake", "recofuse/versions/7", "fake/versions/7"):
        assert (await server.client.get(f"/v2/models/{name}/ready")).json() == {"ready": True}
        metadata = (await server.client.get(f"/v2/models/{name}")).json()
        assert (metadata["name"], metadata["versions"]) == (name.partition("/")[0], ["7"])
        config = (await server.client.get(f"/v2/models/{name}/config")).json()
        assert config["parameters"]["default_steps"] == {"string_value": "3"}
        outputs_of(await server.client.post(f"/v2/models/{name}/infer", content=body, headers=headers))
    for name in ("other", "recofuse/versions/8", "fake/versions/1", "other/versions/7"):
        for suffix in ("", "/ready", "/config", "/stats"):
            answer = await server.client.get(f"/v2/models/{name}{suffix}")
            assert "there" in refusal(answer, ErrorCode.MODEL_NOT_FOUND)
        answer = await server.client.post(f"/v2/models/{name}/infer", content=body, headers=headers)
        refusal(answer, ErrorCode.MODEL_NOT_FOUND)


async def test_a_model_that_is_not_there_is_not_ready(serving: Serving) -> None:
    """No error over gRPC, where the answer has a place for it; over HTTP the status is the answer."""
    known = [("recofuse", ""), ("fake", ""), ("fake", "7")]
    unknown = [("other", ""), ("", ""), ("fake", "8"), ("recofuse", "x"), ("other", "7"), ("x" * 5000, "")]
    async with serving(grpc={"port": 0}) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name, version in known + unknown:
            answer = await stub.ModelReady(pb.ModelReadyRequest(name=name, version=version))
            assert answer.ready == ((name, version) in known)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelMetadata(pb.ModelMetadataRequest(name="other"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_time_that_is_up_is_told(serving: Serving) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    async with serving(engine, grpc={"port": 0}) as server:
        refusal(await post(server.client, *PIXELS, parameters={"timeout": 100_000}), ErrorCode.TIMED_OUT)
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await stub.ModelInfer(grpc_message(*PIXELS), timeout=0.2)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        engine.gate.set()


async def test_keys_open_what_their_scope_says_and_pay_by_pair(serving: Serving, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    store = FileKeys(path)
    reader, reading = new_key("reader", scopes=(Scope.READ,))
    maker, making = new_key("maker", scopes=(Scope.FUSE,), rate_per_s=0.001, burst=3)
    await store.put(reader)
    await store.put(maker)
    async with (
        serving(auth={"keys": f"file:{path}"}, grpc={"port": 0}) as server,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        client, stub = server.client, inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        body, headers = message(*PIXELS)
        for public in ("/v2", "/v2/health/live", "/v2/health/ready"):
            assert (await client.get(public)).status_code == 200
        refusal(await client.get("/v2/models/recofuse"), ErrorCode.UNAUTHENTICATED)
        refusal(await client.post(INFER, content=body, headers=headers), ErrorCode.UNAUTHENTICATED)
        as_reader, as_maker = {"Authorization": f"Bearer {reading}"}, {"Authorization": f"Bearer {making}"}
        assert (await client.get("/v2/models/recofuse/config", headers=as_reader)).status_code == 200
        forbidden = await client.post(INFER, content=body, headers=headers | as_reader)
        refusal(forbidden, ErrorCode.PERMISSION_DENIED)

        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
        assert (await stub.ServerMetadata(pb.ServerMetadataRequest())).name == "recofuse"
        asked = pb.ModelMetadataRequest(name="recofuse")
        with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
            await stub.ModelMetadata(asked)
        with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
            await stub.ModelInfer(grpc_message(*PIXELS), metadata=(("authorization", f"Bearer {reading}"),))
        metadata = await stub.ModelMetadata(asked, metadata=(("authorization", f"Bearer {reading}"),))
        assert list(metadata.versions) == ["7"]

        two = message(tensor("vis", np.stack([VIS, VIS])), tensor("ir", np.stack([IR, IR])[..., None]), **ALL_BINARY)
        assert (await client.post(INFER, content=two[0], headers=two[1] | as_maker)).status_code == 200
        refusal(await client.post(INFER, content=two[0], headers=two[1] | as_maker), ErrorCode.RATE_LIMITED)
        assert server.engine.batches.count([0]) + 2 * server.engine.batches.count([0, 0]) == 2


async def test_metrics_and_statistics_count(serving: Serving) -> None:
    async with serving(grpc={"port": 0}) as server:
        two = (tensor("vis", np.stack([VIS, VIS])), tensor("ir", np.stack([IR, IR])[..., None]))
        body, headers = message(*two, **ALL_BINARY)
        answer = await server.client.post(INFER, content=body, headers=headers | {"X-Request-ID": "a.b"})
        assert answer.headers["x-request-id"] == "a.b"
        outputs_of(answer)
        refusal(await post(server.client, PIXELS[0]), ErrorCode.INVALID_INPUT)
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            sent = grpc_message(*PIXELS, id="mine", outputs=[{"name": "fused"}])
            found = await stub.ModelInfer(sent)
            assert (found.id, found.model_name, len(found.raw_output_contents)) == ("mine", "fake", 1)
            assert found.raw_output_contents[0] == VIS.tobytes()
            told = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="recofuse"))
        (over_http,) = (await server.client.get("/v2/models/stats")).json()["model_stats"]
        statistics = over_http["inference_stats"]
        counts = [statistics[name]["count"] for name in ("success", "fail", "queue", "compute_infer", "cache_hit")]
        assert counts == [2, 1, 2, 2, 0]
        assert over_http["inference_count"] == told.model_stats[0].inference_count == 3
        assert 2 <= over_http["execution_count"] <= 3
        assert statistics["success"]["ns"] > statistics["compute_infer"]["ns"] > 0
        assert told.model_stats[0].inference_stats.success.ns == statistics["success"]["ns"]
        text = (await server.client.get("/metrics")).text
        route = "/v2/models/{model_name}/infer"
        for line in (
            f'recofuse_requests_total{{method="POST",protocol="http",route="{route}",status="200"}} 1.0',
            f'recofuse_requests_total{{method="POST",protocol="http",route="{route}",status="422"}} 1.0',
            'recofuse_requests_total{method="unary",protocol="grpc",'
            'route="/inference.GRPCInferenceService/ModelInfer",status="OK"} 1.0',
            'recofuse_errors_total{code="invalid_input"} 1.0',
        ):
            assert line in text, line


async def test_tensors_may_come_element_by_element(serving: Serving) -> None:
    """As some gRPC clients send them: contents in place of raw_input_contents."""
    async with serving(grpc={"port": 0}) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        sent = pb.ModelInferRequest(model_name="fake")
        sent.outputs.add(name="fused")
        one = sent.inputs.add(name="vis", datatype="UINT8", shape=VIS.shape)
        one.contents.uint_contents.extend(VIS.ravel().tolist())
        two = sent.inputs.add(name="ir", datatype="BYTES", shape=[])
        two.contents.bytes_contents.append(IR_FILE)
        answer = await stub.ModelInfer(sent)
        assert answer.raw_output_contents[0] == VIS.tobytes()
        assert list(answer.outputs[0].shape) == [48, 64, 3]
        one.contents.uint_contents[0] = 256
        sent.raw_input_contents.extend([b"", b""])
        for told in ("not both", "UINT8 cannot"):
            with pytest.raises(grpc.aio.AioRpcError, match=told):
                await stub.ModelInfer(sent)
            sent.ClearField("raw_input_contents")


async def test_reflection_describes_the_protocol(serving: Serving) -> None:
    async with serving(grpc={"port": 0}) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        names = ("inference.GRPCInferenceService", "inference.ModelInferRequest", "recofuse.v1.FusionService")
        asked = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names]
        described = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    found = [
        FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0]).name
        for answer in described
    ]
    assert found == ["inference/v2/inference.proto"] * 2 + ["recofuse/v1/fusion.proto"]


# NVIDIA's client


@pytest.mark.parametrize("first", ["recofuse_protos.inference.v2.inference_pb2", "tritonclient.grpc.service_pb2"])
def test_one_process_holds_our_messages_and_theirs(first: str) -> None:
    """Both define the package `inference`; protobuf's default pool would refuse the second."""
    code = f"""
import {first}
import service.faces.grpc.server
from recofuse_protos.inference.v2 import inference_pb2 as ours
from tritonclient.grpc import service_pb2 as theirs
for name, message in ours.DESCRIPTOR.message_types_by_name.items():
    theirs_too = theirs.DESCRIPTOR.pool.FindMessageTypeByName(f"inference.{{name}}")
    for field in message.fields:
        other = theirs_too.fields_by_name[field.name]
        shown, wanted = ((one.number, one.type, one.is_repeated) for one in (field, other))
        assert shown == wanted, field.name
sent = ours.ModelInferRequest(model_name="a", raw_input_contents=[b"b"])
assert theirs.ModelInferRequest.FromString(sent.SerializeToString()).raw_input_contents == [b"b"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def stack(grpc_port: int) -> Iterator[Stack]:
    """A server process with the shipped model."""
    engine = {"kind": "core", "device": "cpu", "num_threads": 1, "warm_up_sizes": "64x48"}
    with all_in_one({"engine": engine, "grpc": {"port": grpc_port}, "log": {"level": "ERROR"}}) as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, stack: Stack, grpc_port: int) -> Iterator[tuple[Any, Any]]:
    """The client's module and a client."""
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    address = f"127.0.0.1:{grpc_port}" if request.param == "grpc" else f"127.0.0.1:{stack.address[1]}"
    with module.InferenceServerClient(address) as client:
        yield module, client


def triton_inputs(module: Any, vis: NDArray[Any], ir: NDArray[Any]) -> list[Any]:
    inputs = []
    for name, array in (("vis", vis), ("ir", ir)):
        datatype = "BYTES" if array.dtype == np.object_ else array.dtype.name.upper()
        inputs.append(module.InferInput(name, list(array.shape), datatype))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def fused_by_v1(stack: Stack, vis: bytes, ir: bytes, **options: str) -> dict[str, bytes]:
    """The three files of /v1/fuse."""
    url = f"http://127.0.0.1:{stack.address[1]}/v1/fuse"
    answer = httpx.post(url, files={"vis": vis, "ir": ir}, data={"output": "all", **options}, timeout=60)
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        return {name.partition(".")[0]: archive.read(name) for name in archive.namelist()}


def test_tritonclient_finds_its_way(triton: tuple[Any, Any]) -> None:
    module, client = triton
    more = {"as_json": True} if module is tritonclient.grpc else {}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("recofuse")
    assert client.is_model_ready("compact")
    assert client.get_server_metadata(**more)["name"] == "recofuse"
    metadata = client.get_model_metadata("compact", **more)
    assert [one["name"] for one in metadata["inputs"]] == ["vis", "ir"]
    assert [one["name"] for one in metadata["outputs"]] == ["fused", "vis_restored", "ir_restored"]
    assert [int(size) for size in metadata["inputs"][0]["shape"]] == [-1, -1, -1, 3]
    (version,) = metadata["versions"]
    assert client.is_model_ready("compact", version)
    assert client.is_model_ready("other") is False
    assert client.is_model_ready("compact", "0.0.1") is False
    config = client.get_model_config("recofuse", version, **more)
    config = config.get("config", config)
    assert config["max_batch_size"] == 16
    assert [one["data_type"] for one in config["input"]] == ["TYPE_UINT8", "TYPE_UINT8"]
    (statistics,) = client.get_inference_statistics("recofuse", **more)["model_stats"]
    assert statistics["version"] == version
    with pytest.raises(InferenceServerException, match="there is no model 'other'"):
        client.get_model_metadata("other")


@pytest.mark.parametrize("kind", ["pixels", "files"])
def test_tritonclient_gets_the_pixels_of_v1(triton: tuple[Any, Any], stack: Stack, kind: str) -> None:
    module, client = triton
    expected = {
        name: np.load(io.BytesIO(content))
        for name, content in fused_by_v1(stack, VIS_FILE, IR_FILE, format="npy", seed="5").items()
        if name != "result"
    }
    if kind == "pixels":
        inputs = triton_inputs(module, VIS, IR[..., None])
    else:
        inputs = triton_inputs(module, *(np.array([content], np.object_) for content in (VIS_FILE, IR_FILE)))
    answer = client.infer("recofuse", inputs, request_id="7", priority=1, timeout=60_000_000, parameters={"seed": 5})
    fused = answer.as_numpy("fused").reshape(VIS.shape)
    assert fused.std() > 0
    np.testing.assert_array_equal(fused, expected["fused"])
    np.testing.assert_array_equal(answer.as_numpy("vis_restored").reshape(VIS.shape), expected["vis"])
    np.testing.assert_array_equal(answer.as_numpy("ir_restored").reshape(IR.shape), expected["ir"])


def test_tritonclient_gets_the_files_of_v1(triton: tuple[Any, Any], stack: Stack) -> None:
    module, client = triton
    expected = fused_by_v1(stack, VIS_FILE, IR_FILE, format="png", seed="5")
    inputs = triton_inputs(module, *(np.array([content], np.object_) for content in (VIS_FILE, IR_FILE)))
    wanted = [module.InferRequestedOutput("fused")]
    answer = client.infer("compact", inputs, outputs=wanted, parameters={"seed": 5, "format": "png"})
    assert list(answer.as_numpy("fused")) == [expected["fused"]]
    assert answer.as_numpy("ir_restored") is None


def test_tritonclient_hears_what_was_wrong(triton: tuple[Any, Any]) -> None:
    module, client = triton
    with pytest.raises(InferenceServerException, match="accepted are") as refused:
        client.infer("recofuse", triton_inputs(module, VIS, VIS))
    expected = {tritonclient.http: "422", tritonclient.grpc: "StatusCode.INVALID_ARGUMENT"}[module]
    assert refused.value.status() == expected
