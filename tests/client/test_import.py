"""What importing and using the client brings along, each time in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import recofuse_client

HTTP = frozenset({"httpx"})
GRPC = frozenset({"grpc", "google.protobuf", "recofuse_protos"})
CODECS = frozenset({"cv2", "imagecodecs", "tifffile", "PIL", "recofuse_images.reader"})
OTHERS = frozenset(
    {"torch", "recofuse_core", "fastapi", "starlette", "uvicorn", "redis", "prometheus_client", "pydantic"}
)
BUILD = "import numpy, recofuse_client as rc; rc.{kind}({url!r})"
USE = """
import asyncio, numpy, recofuse_client as rc
from recofuse_client.pictures import file_of
assert file_of(numpy.zeros((4, 4, 3), numpy.uint8), "vis").startswith(b"\\x89PNG")
with rc.Client({url!r}, retry=rc.Retry(max_attempts=1)) as client:
    try:
        client.fuse(numpy.zeros((4, 4, 3), numpy.uint16), numpy.zeros((4, 4), numpy.uint8))
    except rc.ConnectionFailedError:
        pass
"""


def brought_by(code: str) -> set[str]:
    """Those of the packages above that running `code` imports."""
    watched = sorted(HTTP | GRPC | CODECS | OTHERS)
    probe = f"{code}\nimport sys; print(*[name for name in {watched!r} if name in sys.modules])"
    cwd = Path(recofuse_client.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_probe_sees_what_is_imported() -> None:
    assert brought_by("import httpx, recofuse_images.reader") == HTTP | {"recofuse_images.reader"}


def test_the_import_brings_no_protocol_and_no_codec() -> None:
    assert brought_by("import recofuse_client") == set()
    assert brought_by("import recofuse_client.live") == set()


@pytest.mark.parametrize(
    ("url", "expected"), [("http://127.0.0.1:1", HTTP), ("grpc://127.0.0.1:1", GRPC)], ids=["http", "grpc"]
)
def test_a_client_brings_the_protocol_that_it_speaks(url: str, expected: frozenset[str]) -> None:
    assert brought_by(BUILD.format(kind="Client", url=url)) == expected
    assert brought_by(USE.format(url=url)) == expected


def test_a_stream_over_http_is_refused_without_grpc() -> None:
    code = (
        "import recofuse_client as rc\n"
        "try: rc.Client('http://127.0.0.1:1').stream([])\n"
        "except rc.RouteNotFoundError: pass\n"
        "else: raise SystemExit('was not refused')"
    )
    assert brought_by(code) == HTTP


def test_the_streams_classes_come_when_asked_for() -> None:
    assert brought_by("from recofuse_client import FrameStream, AsyncFrameStream") == GRPC
    assert brought_by("from recofuse_client import *; FrameStream, Client, TimedOutError") == GRPC
    assert recofuse_client.FrameStream.__module__.startswith("recofuse_client.streams")
    with pytest.raises(AttributeError, match="FrameStreams"):
        getattr(recofuse_client, "FrameStreams")  # noqa: B009 - mypy knows that it is not there


def test_every_public_name_is_there() -> None:
    for name in recofuse_client.__all__:
        assert getattr(recofuse_client, name).__name__ == name
