"""Connections that ask for something: passwords, TLS, sentinels."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.queue.redis.queue import RedisQueue
from service.terms.errors import UnavailableError
from service.terms.settings import QueueSettings, SettingsError
from tests.service.queue.contract import success
from tests.service.queue.redis.queues import folder, fresh, opened, take_one
from tests.service.redis_server import RedisServer, free_port

pytestmark = pytest.mark.redis


async def test_wrong_credentials_stop_at_the_start() -> None:
    with folder() as path:
        server = RedisServer(path, port=free_port())
        server.start()
        server.command("CONFIG", "SET", "requirepass", "right")
        try:
            async with opened(f"redis://:right@127.0.0.1:{server.port}") as queue:
                await queue.stats()
            for url in (f"redis://:wrong@127.0.0.1:{server.port}", f"redis://127.0.0.1:{server.port}"):
                queue = RedisQueue(QueueSettings(url=url))
                with pytest.raises(SettingsError, match="credentials"):
                    await queue.open()
                await queue.close()
        finally:
            server.kill()


@contextlib.asynccontextmanager
async def tls_in_front(server: RedisServer, path: Path) -> AsyncIterator[tuple[int, Path]]:
    """A TLS port that leads to the server, and the certificate that it shows; the wheel's binary speaks no TLS."""
    key, certificate = path / "key.pem", path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    try:
        await asyncio.to_thread(lambda: subprocess.run(command, check=True, capture_output=True))
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while block := await reader.read(1 << 16):
                writer.write(block)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(server.path)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    proxy = await asyncio.start_server(connect, "127.0.0.1", 0, ssl=context)
    try:
        yield proxy.sockets[0].getsockname()[1], certificate
    finally:
        proxy.close()


async def test_tls_with_a_known_certificate(server: RedisServer) -> None:
    with folder() as path:
        async with tls_in_front(server, path) as (port, certificate):
            async with opened(f"rediss://localhost:{port}?ssl_ca_certs={certificate}") as queue:
                job = replace(fresh(), vis=bytes(300_000))
                await queue.submit(job)
                assert (await take_one(queue)).job == job
            queue = RedisQueue(QueueSettings(url=f"rediss://localhost:{port}"))
            with pytest.raises(UnavailableError):  # an unknown authority
                await queue.stats()
            await queue.close()


async def test_tls_with_a_password() -> None:
    with folder() as one, folder() as two:
        server = RedisServer(one)
        server.start()
        server.command("CONFIG", "SET", "requirepass", "r%g@t/")
        try:
            async with tls_in_front(server, two) as (port, certificate):
                query = f"?ssl_ca_certs={certificate}"
                async with opened(f"rediss://:r%25g%40t%2F@localhost:{port}{query}") as queue:
                    job = fresh()
                    await queue.submit(job)
                    lease = await take_one(queue)
                    waiting = asyncio.create_task(queue.wait_result(job.id, timeout_s=20))
                    await queue.finish(lease, success(job))
                    assert await waiting == success(job)  # pushed over a connection with TLS and password too
                queue = RedisQueue(QueueSettings(url=f"rediss://:wrong@localhost:{port}{query}"))
                with pytest.raises(SettingsError, match="credentials"):
                    await queue.open()
                await queue.close()
        finally:
            server.kill()


async def test_sentinels_and_servers_may_each_ask_for_a_password() -> None:
    with folder() as one, folder() as two:
        ports = free_port(), free_port()
        primary = RedisServer(one, port=ports[0])
        config = two / "sentinel.conf"
        config.write_text(f"sentinel monitor main 127.0.0.1 {ports[0]} 1\nsentinel auth-pass main inner\n")
        sentinel = RedisServer(two, port=ports[1], config=config)
        try:
            for server in (primary, sentinel):
                server.start()
            primary.command("CONFIG", "SET", "requirepass", "inner")
            assert sentinel.command("ACL", "SETUSER", "default", "resetpass", ">outer") == b"+OK\r\n"
            address = f"redis+sentinel://:inner@127.0.0.1:{ports[1]}/main"
            async with opened(f"{address}?sentinel_password=outer") as queue:
                job = fresh()
                await queue.submit(job)
                lease = await take_one(queue)
                await queue.finish(lease, success(job))
                assert await queue.wait_result(job.id, timeout_s=20) == success(job)
            for query in ("", "?sentinel_password=wrong"):
                queue = RedisQueue(QueueSettings(url=f"{address}{query}"))
                with pytest.raises((SettingsError, UnavailableError)):
                    await queue.stats()
                await queue.close()
        finally:
            for server in (primary, sentinel):
                server.kill()
