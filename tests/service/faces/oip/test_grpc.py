"""Messages of the protocol's gRPC service: whatever they hold is read or refused."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from recofuse_protos.inference.v2 import inference_pb2 as pb
from recofuse_protos.inference.v2 import inference_pb2_grpc
from service.faces.oip.grpc import request_of
from service.faces.oip.plan import plan_of
from service.faces.oip.tensors import PARAMETERS
from service.terms.errors import InvalidInputError
from tests.service.conftest import Serving
from tests.service.faces.oip.messages import IR_FILE, LIMITS, PIXELS, VIS, grpc_message, refusal_of


@settings(deadline=None)
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
    for name in data.draw(st.lists(st.sampled_from([*PARAMETERS, "else"]), max_size=3)):
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
    refused = refusal_of(lambda: plan_of(request_of(parsed), LIMITS))
    assert refused is None or refused.http_status < 500


def test_a_message_s_parameter_without_a_value_is_an_absent_one() -> None:
    sent = grpc_message(*PIXELS)
    sent.parameters["seed"].SetInParent()
    sent.parameters["steps"].int64_param = 4
    assert request_of(sent).parameters == {"steps": 4}


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
        plan_of(request_of(sent), LIMITS)
    assert len(refused.value.message) < 200


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
