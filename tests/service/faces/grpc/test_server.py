"""What the port offers and bears: reflection, TLS, sizes of messages, peers that fall silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.terms.errors import ErrorCode
from service.terms.settings import Settings, SettingsError
from tests.service.conftest import Server, Serving
from tests.service.faces.grpc.face import STREAM, Face, Facing, detail_of, eventually, frame, request


async def test_reflection_lists_and_describes_the_services(face: Face) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(face.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="recofuse.v1.FusionService"),
    ]
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    assert {service.name for service in listed.list_services_response.service} == {
        "recofuse.v1.FusionService",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    (raw,) = described.file_descriptor_response.file_descriptor_proto
    file = FileDescriptorProto.FromString(raw)
    assert file.name == "recofuse/v1/fusion.proto"
    assert {method.name for method in file.service[0].method} == {
            "Fuse", "FuseStream", "SubmitFuse", "GetJob", "GetJobResult", "CancelJob", "ListModels",
            "ListRigs",
        }  # fmt: skip


# what gRPC refuses, and whom it gives up


async def test_messages_that_are_too_large(facing: Facing) -> None:
    async with facing(limits={"max_image_bytes": 20_000}) as face:
        await detail_of(face.stub.Fuse(request(vis=bytes(30_000))), ErrorCode.PAYLOAD_TOO_LARGE)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await face.stub.Fuse(request(vis=bytes(200_000)))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await face.stub.Fuse(request())


async def test_messages_are_not_unpacked(face: Face) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await face.stub.Fuse(request(vis=bytes(20_000_000)), compression=grpc.Compression.Gzip)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await face.stub.Fuse(request())


async def test_a_peer_that_falls_silent_is_given_up(facing: Facing) -> None:
    async with facing(grpc={"keep_alive_s": 1.0, "keep_alive_timeout_s": 1.0}) as face:
        async with cut_cable(face.server.grpc_address) as (address, cut), grpc.aio.insecure_channel(address) as channel:
            call = fusion_pb2_grpc.FusionServiceStub(channel).FuseStream()
            face.engine.gate.clear()
            for number in range(8):
                await call.write(frame(number))
            assert await eventually(face, "recofuse_queue_leased 8.0")
            cut.set()  # no FIN, no RST: only unanswered pings can tell
            cancelled = (
                f'recofuse_requests_total{{method="stream",protocol="grpc",route="{STREAM}",status="CANCELLED"}}'
            )
            assert await eventually(face, f"{cancelled} 1.0", timeout_s=20)
            face.engine.gate.set()
            assert await eventually(face, "recofuse_queue_leased 0.0")
            call.cancel()
        assert isinstance(await face.stub.Fuse(request()), pb.FuseResponse)


@asynccontextmanager
async def cut_cable(target: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A TCP relay to `target` that carries nothing more, and closes nothing, once its event is set."""
    cut, tasks, ends = asyncio.Event(), set[asyncio.Task[None]](), set[asyncio.StreamWriter]()
    host, _, port = target.rpartition(":")

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while chunk := await source.read(65536):
            if cut.is_set():
                continue
            sink.write(chunk)
            await sink.drain()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        for source, sink in ((reader, back), (there, writer)):
            ends.add(sink)
            tasks.add(asyncio.create_task(carry(source, sink)))

    relay = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{relay.sockets[0].getsockname()[1]}", cut
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            end.transport.abort()
        await asyncio.gather(*(end.wait_closed() for end in ends), return_exceptions=True)
        relay.close()
        await relay.wait_closed()


# TLS and listening


@dataclass(frozen=True)
class Certificates:
    """PEM files of a server, and credentials of clients with and without a certificate of their own."""

    cert: str
    key: str
    authority: str
    anonymous: grpc.ChannelCredentials
    known: grpc.ChannelCredentials


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    server, client = authority.issue_cert("localhost", "127.0.0.1"), authority.issue_cert("client.example")
    server.private_key_pem.write_to_path(str(folder / "key.pem"))
    for blob in server.cert_chain_pems:
        blob.write_to_path(str(folder / "cert.pem"), append=True)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    root = authority.cert_pem.bytes()
    return Certificates(
        cert=str(folder / "cert.pem"),
        key=str(folder / "key.pem"),
        authority=str(folder / "ca.pem"),
        anonymous=grpc.ssl_channel_credentials(root),
        known=grpc.ssl_channel_credentials(
            root, client.private_key_pem.bytes(), b"".join(blob.bytes() for blob in client.cert_chain_pems)
        ),
    )


async def is_served(server: Server, credentials: grpc.ChannelCredentials | None) -> bool:
    """Whether a client with these credentials (None: no TLS) gets an answer."""
    address = server.grpc_address
    channel = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
    async with channel:
        try:
            answer = await fusion_pb2_grpc.FusionServiceStub(channel).Fuse(request(), timeout=5)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017
            return False
        return bool(answer.fusion.pictures)


async def test_tls(serving: Serving, certificates: Certificates) -> None:
    async with serving(grpc={"port": 0, "tls_cert": certificates.cert, "tls_key": certificates.key}) as server:
        assert await is_served(server, certificates.anonymous)
        assert not await is_served(server, None)
        assert not await is_served(server, grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes()))


async def test_mutual_tls(serving: Serving, certificates: Certificates) -> None:
    files = {"tls_cert": certificates.cert, "tls_key": certificates.key, "tls_client_ca": certificates.authority}
    async with serving(grpc={"port": 0, **files}) as server:
        assert await is_served(server, certificates.known)
        assert not await is_served(server, certificates.anonymous)


async def test_what_cannot_be_listened_with_stops_the_start(serving: Serving, certificates: Certificates) -> None:
    async with serving(grpc={"port": 0}) as first:
        taken = int(first.grpc_address.rpartition(":")[2])
        for wrong in (
            {"port": taken},
            {"tls_cert": "/nowhere/cert.pem", "tls_key": certificates.key},
            {"tls_cert": certificates.cert, "tls_key": certificates.cert},
        ):
            with pytest.raises(OSError, match=r"listen|nowhere"):
                async with serving(grpc={"port": 0, **wrong}):
                    pass
        assert await is_served(first, None)


@pytest.mark.parametrize("wrong", [{"tls_cert": "a"}, {"tls_key": "b"}, {"tls_client_ca": "c"}, {"port": -2}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Settings.from_values({"grpc": wrong})
