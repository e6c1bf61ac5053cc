"""A client of a running server's gRPC side, and the messages that the tests of that side send and read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status
from numpy.typing import NDArray

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.terms.errors import STATUS, ErrorCode
from tests.fakes import FakeEngine
from tests.service.conftest import Server
from tests.service.error_cases import IR, VIS

FUSE = "/recofuse.v1.FusionService/Fuse"
STREAM = "/recofuse.v1.FusionService/FuseStream"


@dataclass
class Face:
    """A running server and a client of its gRPC side."""

    server: Server
    channel: grpc.aio.Channel
    stub: fusion_pb2_grpc.FusionServiceAsyncStub

    @property
    def engine(self) -> FakeEngine:
        return self.server.engine

    def raw_call(self, path: str) -> Callable[..., Awaitable[Any]]:
        """A method that takes any bytes, for messages that no stub would send."""
        call: Callable[..., Awaitable[Any]] = self.channel.unary_unary(path)
        return call


Facing = Callable[..., AbstractAsyncContextManager[Face]]


def request(vis: bytes = VIS, ir: bytes = IR, **options: Any) -> pb.FuseRequest:
    return pb.FuseRequest(vis=pb.Image(encoded=vis), ir=pb.Image(encoded=ir), options=pb.FuseOptions(**options))


def frame(sequence: int, vis: bytes = VIS, ir: bytes = IR, **fields: Any) -> pb.FuseStreamRequest:
    return pb.FuseStreamRequest(
        frame=pb.Frame(sequence=sequence, vis=pb.Image(encoded=vis), ir=pb.Image(encoded=ir), **fields)
    )


def raw_frame(sequence: int, vis: pb.RawImage, ir: pb.RawImage) -> pb.FuseStreamRequest:
    return pb.FuseStreamRequest(frame=pb.Frame(sequence=sequence, vis=pb.Image(raw=vis), ir=pb.Image(raw=ir)))


def grey(width: int, height: int, value: int = 0) -> pb.RawImage:
    data = np.full((height, width), value, np.uint8).tobytes()
    return pb.RawImage(pixel_format=pb.PIXEL_FORMAT_MONO8, width=width, height=height, data=data)


async def one_by_one(messages: Iterable[pb.FuseStreamRequest]) -> AsyncIterator[pb.FuseStreamRequest]:
    for message in messages:
        yield message


async def detail_of(call: Awaitable[Any], code: ErrorCode) -> pb.ErrorDetail:
    """The detail of a call that must fail with this code, checked for everything that all of them have."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return checked(refused.value, code)


def checked(error: grpc.aio.AioRpcError, code: ErrorCode) -> pb.ErrorDetail:
    status = rpc_status.from_call(error)
    assert status is not None, error
    detail = pb.ErrorDetail()
    assert status.details[0].Unpack(detail)
    assert detail.code == code, detail
    assert error.code() is grpc.StatusCode[STATUS[code][1]]
    assert error.code().value[0] == status.code == detail.status
    assert error.details() == status.message == detail.message
    assert dict(error.trailing_metadata())["x-request-id"] == detail.request_id
    return detail


def pixels_of(image: pb.Image) -> NDArray[np.uint8]:
    """An answer's raw picture."""
    raw = image.raw
    channels = {pb.PIXEL_FORMAT_RGB8: 3, pb.PIXEL_FORMAT_MONO8: 1}[raw.pixel_format]
    assert raw.stride == raw.width * channels
    pixels = np.frombuffer(raw.data, np.uint8).reshape(raw.height, raw.width, channels)
    return pixels if channels == 3 else pixels[..., 0]


def counts(stats: pb.StreamStats) -> dict[str, int]:
    """The counts that are not 0; rates and ages depend on the day."""
    return {field.name: value for field, value in stats.ListFields() if isinstance(value, int)}


async def eventually(face: Face, line: str, timeout_s: float = 5.0) -> bool:
    """Whether the metrics come to say this."""
    end = time.monotonic() + timeout_s
    while line not in (text := (await face.server.client.get("/metrics")).text):
        if time.monotonic() > end:
            raise AssertionError(f"{line} is not in\n{text}")
        await asyncio.sleep(0.02)
    return True
