"""Streams of large frames at once, on a real front end and a real Redis, need no more memory than uploads may take.

All sizes are an eighth of what they are where a front end may use 1 GiB and frames are as large as they get.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from benchmarks.load import png
from benchmarks.processes import Process, free_port, split
from recofuse_protos.recofuse.v1 import fusion_pb2 as pb
from recofuse_protos.recofuse.v1 import fusion_pb2_grpc
from service.access.held import SHARE

pytestmark = pytest.mark.redis

SCALE = 8
LIMIT_BYTES = (1 << 30) // SCALE
IMAGE_BYTES = (32 << 20) // SCALE  # the largest that is accepted
PADDING_BYTES = 30_000_000 // SCALE
NUM_STREAMS = 15
NUM_FRAMES = 3  # of each
# A stream in words, or a single frame by an error of its own; a deadline or a slow Redis where the machine is busy.
REFUSED = {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "error"}


def padded(seed: int) -> bytes:
    """A small picture in a large file."""
    rows = np.random.default_rng(seed).integers(0, 256, (48, 1 + 3 * 64), np.uint8)
    rows[:, 0] = 0  # no filter
    return png(64, 48, zlib.compress(rows.tobytes()), [(b"reCo", bytes(PADDING_BYTES))])


@pytest.fixture
def front_end() -> Iterator[tuple[Process, str]]:
    """A front end that holds as much as its share of the limit, beside a worker without a model; its gRPC address."""
    port = free_port()
    limits = {"max_held_bytes": int(SHARE * LIMIT_BYTES), "max_image_bytes": IMAGE_BYTES}
    with split({"engine": {"kind": "null"}, "grpc": {"port": port}, "limits": limits}) as stack:
        (process,) = stack.named("api")
        yield process, f"127.0.0.1:{port}"


def test_streams_of_large_frames_stay_within_the_limit(front_end: tuple[Process, str]) -> None:
    process, address = front_end
    frame = pb.Frame(vis=pb.Image(encoded=padded(0)), ir=pb.Image(encoded=padded(1)))
    assert NUM_STREAMS * frame.ByteSize() > 0.8 * LIMIT_BYTES

    def frames() -> Iterator[pb.FuseStreamRequest]:
        for number in range(1, NUM_FRAMES + 1):
            request = pb.FuseStreamRequest(frame=frame)
            request.frame.sequence = number
            yield request

    def stream(_: int) -> Counter[str]:
        came: Counter[str] = Counter()
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(address, options) as channel:
            try:
                for answer in fusion_pb2_grpc.FusionServiceStub(channel).FuseStream(frames(), timeout=150):
                    came[answer.WhichOneof("outcome") or ""] += 1
            except grpc.RpcError as error:
                came[error.code().name] += 1
        return came

    start_bytes = process.rss_bytes()
    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        came = sum(threads.map(stream, range(NUM_STREAMS)), Counter[str]())
    assert process.is_alive, process.last_lines()
    assert came.keys() <= {"fusion", *REFUSED}, came
    assert came["fusion"] >= NUM_FRAMES, came
    taken_bytes = process.peak_rss_bytes() - start_bytes
    assert taken_bytes < LIMIT_BYTES
