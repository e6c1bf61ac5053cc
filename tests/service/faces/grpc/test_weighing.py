"""What parsing multiplies is refused before it is parsed; all else passes."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from recofuse_protos.inference.v2.inference_pb2 import InferTensorContents, ModelInferRequest
from recofuse_protos.recofuse.v1.fusion_pb2 import FuseStreamRequest
from service.faces.grpc.weighing import MAX_FIELDS, admit
from service.terms.errors import ErrorCode, InvalidInputError, PayloadTooLargeError
from tests.service.faces.grpc.face import Face, detail_of, request

INFER = "/inference.GRPCInferenceService/ModelInfer"
KINDS = [ModelInferRequest, FuseStreamRequest]


def tensor(contents: InferTensorContents) -> bytes:
    sent = ModelInferRequest()
    sent.inputs.add(name="vis", contents=contents)
    return sent.SerializeToString()


def described(kind: type[Message]) -> Descriptor:
    found = kind.DESCRIPTOR
    assert isinstance(found, Descriptor)
    return found


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"\x2a\x00" * (MAX_FIELDS + 1), ModelInferRequest),  # inputs, each empty
        (b"\x3a\x00" * (MAX_FIELDS + 1), ModelInferRequest),  # raw_input_contents
        (b"\x22\x00" * (MAX_FIELDS + 1), ModelInferRequest),  # parameters
        (b"\x2a\x80\x41" + b"\x18\x00" * 4160, ModelInferRequest),  # one input with a shape that is not packed
        (b"\x0a\x00\x12\x00" * (MAX_FIELDS // 2 + 1), FuseStreamRequest),  # one of, again and again
        (b"\x9b\x06\x9c\x06" * (MAX_FIELDS // 2 + 1), FuseStreamRequest),  # groups that nobody knows
    ],
)
def test_many_small_fields_are_refused(raw: bytes, kind: type[Message]) -> None:
    with pytest.raises(InvalidInputError, match="fields"):
        admit(raw, described(kind), 1 << 30)


@pytest.mark.parametrize(
    "contents", [InferTensorContents(uint_contents=[1] * 1000), InferTensorContents(int_contents=[1] * 1000)]
)
def test_packed_numbers_weigh_what_they_take(contents: InferTensorContents) -> None:
    raw = tensor(contents)
    admit(raw, described(ModelInferRequest), 2010)
    with pytest.raises(PayloadTooLargeError, match="raw contents"):
        admit(raw, described(ModelInferRequest), 1990)


def test_bytes_weigh_what_they_are() -> None:
    raw = ModelInferRequest(raw_input_contents=[bytes(1000)] * 4).SerializeToString()
    admit(raw, described(ModelInferRequest), 2000)
    with pytest.raises(PayloadTooLargeError):
        admit(raw, described(ModelInferRequest), 1999)


@given(raw=st.binary(max_size=200), kind=st.sampled_from(KINDS))
def test_any_bytes_pass_or_are_refused_in_words(raw: bytes, kind: type[Message]) -> None:
    """So few bytes are too few to be refused, whatever they mean: nothing weighs more than eight times itself."""
    admit(raw, described(kind), 4 * len(raw))


async def test_a_call_that_would_grow_is_refused(face: Face) -> None:
    flood = b"\x2a\x00" * 100_000
    await detail_of(face.raw_call(INFER)(flood), ErrorCode.INVALID_INPUT)
    await face.stub.Fuse(request())
