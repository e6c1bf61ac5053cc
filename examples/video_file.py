"""Fuse two video files into a third: python examples/video_file.py street.mp4 street_thermal.mp4 fused.mp4"""

from __future__ import annotations

import argparse
from pathlib import Path

from recofuse_client import Client
from recofuse_client.video import Recorder, read_pairs


def main() -> None:
    """Read pairs, stream them, and record what comes back. `recofuse stream` does the same, and more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vis", help="a file; or a device's number or an address, as of a camera")
    parser.add_argument("ir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--url", default="grpc://127.0.0.1:8001")
    arguments = parser.parse_args()

    pairs, fps = read_pairs(arguments.vis, arguments.ir)
    recorder = Recorder(arguments.output, fps)
    with Client(arguments.url) as client, client.stream(pairs) as results:
        for result in results:
            if result.error is not None:
                print(f"frame {result.sequence}: {result.error}")
                continue
            recorder.write(result.unwrap().fused, result.timestamp_ns)
        print(f"{results.stats.fused} frames fused at {results.stats.fused_per_s:.1f} a second")
    recorder.close()
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
