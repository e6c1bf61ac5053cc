"""TLS of HTTP; that of gRPC is in faces/grpc/test_server.py."""

from __future__ import annotations

import ssl

import httpx
import pytest
import trustme

from tests.fakes import pair
from tests.service.conftest import Server, Serving

VIS, IR = pair()
FILES = {"vis": ("v.png", VIS), "ir": ("i.png", IR)}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, dict[str, str]]:
    """An authority, and the files of a server that it vouches for."""
    folder, ca = tmp_path_factory.mktemp("tls"), trustme.CA()
    server = ca.issue_cert("localhost", "127.0.0.1")
    server.private_key_pem.write_to_path(str(folder / "key.pem"))
    for blob in server.cert_chain_pems:
        blob.write_to_path(str(folder / "cert.pem"), append=True)
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    return ca, {name: str(folder / f"{name}.pem") for name in ("cert", "key", "ca")}


def client_of(server: Server, ca: trustme.CA, *, is_known: bool = False) -> httpx.AsyncClient:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    if is_known:
        ca.issue_cert("client.example").configure_cert(context)
    return httpx.AsyncClient(base_url=server.client.base_url, verify=context, trust_env=False)


async def test_http_over_tls(serving: Serving, authority: tuple[trustme.CA, dict[str, str]]) -> None:
    ca, files = authority
    async with serving(http={"tls_cert": files["cert"], "tls_key": files["key"]}) as server:
        assert server.client.base_url.scheme == "https"
        async with client_of(server, ca) as client:
            answer = await client.post("/v1/fuse", files=FILES)
        assert answer.status_code == 200
        assert "max-age" in answer.headers["strict-transport-security"]
        async with client_of(server, trustme.CA()) as doubtful:
            with pytest.raises(httpx.ConnectError):
                await doubtful.get("/health/live")


async def test_http_wants_the_clients_certificate(
    serving: Serving, authority: tuple[trustme.CA, dict[str, str]]
) -> None:
    ca, files = authority
    http = {"tls_cert": files["cert"], "tls_key": files["key"], "tls_client_ca": files["ca"]}
    async with serving(http=http) as server:
        async with client_of(server, ca, is_known=True) as known:
            assert (await known.get("/health/live")).status_code == 200
        async with client_of(server, ca) as anonymous:
            with pytest.raises(httpx.TransportError):
                await anonymous.get("/health/live")


async def test_tls_files_that_do_not_fit_stop_the_start(
    serving: Serving, authority: tuple[trustme.CA, dict[str, str]]
) -> None:
    _, files = authority
    for wrong in ({"tls_key": "/nowhere/key.pem"}, {"tls_key": files["ca"]}):
        with pytest.raises(OSError, match="TLS"):
            async with serving(http={"tls_cert": files["cert"], **wrong}):
                pass
