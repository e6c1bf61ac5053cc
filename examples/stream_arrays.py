"""Fuse a stream of NumPy arrays over gRPC: python examples/stream_arrays.py --frames 50"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from recofuse_client import Client


def cameras(num_frames: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint16]]]:
    """Stands for two cameras: colour in 8 bits, and infrared in 14, with a warm spot that wanders."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:240, 0:320]
    for number in range(num_frames):
        spot = np.exp(-((rows - 120) ** 2 + (columns - 6 * number % 320) ** 2) / 400)
        vis = rng.integers(20, 60, (240, 320, 3), dtype=np.uint8)
        ir = (7500 + 2000 * spot + rng.normal(0, 20, spot.shape)).astype(np.uint16)
        yield vis, ir


def main() -> None:
    """Send the frames as fast as the server takes them, and lose none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--url", default="grpc://127.0.0.1:8001")
    arguments = parser.parse_args()

    # A fixed ir_range keeps the scale of one frame to the next; without it each frame is stretched to its own range.
    with (
        Client(arguments.url) as client,
        client.stream(cameras(arguments.frames), mode="all", ir_range=(7000, 10000)) as results,
    ):
        for result in results:
            fused = result.unwrap().fused  # (240, 320, 3) uint8, RGB
            print(f"frame {result.sequence}: brightness {fused.mean():.1f}, {result.latency_s * 1000:.0f} ms")
        stats = results.stats
    print(f"{stats.fused} of {stats.offered} frames fused, {stats.failed} failed")


if __name__ == "__main__":
    main()
