"""Two cameras side by side, from two videos to a fused one: how late infrared is, how it lies, a recording.

    recofuse calibrate --vis pairs/vis --ir pairs/ir -o roof.json
    python examples/two_cameras.py street.mp4 thermal.mp4 fused.mp4 --rig roof.json

Files, device numbers and addresses (rtsp://...) are accepted alike. Ctrl-C ends the recording in order.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Literal

from recofuse_client import Client
from recofuse_client.pairing import OffsetError
from recofuse_client.video import Recorder, find_offset, is_live_pair, read_pairs


def main() -> None:
    """Find the offset, stream the pairs, record what comes back. `recofuse stream` does the same, and more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vis")
    parser.add_argument("ir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rig", type=Path, help="a rig file, of cameras that are not registered")
    parser.add_argument("--offset", type=float, help="seconds that infrared is late by; found from motion if unset")
    parser.add_argument("--tolerance", type=float, help="seconds that a pair may be apart")
    parser.add_argument("--url", default="grpc://127.0.0.1:8001")
    arguments = parser.parse_args()

    offset_s = arguments.offset
    if offset_s is None:
        try:
            found = find_offset(arguments.vis, arguments.ir)
        except OffsetError as error:
            parser.error(f"{error}; give --offset")
        offset_s = found.seconds
        print(f"infrared is late by {offset_s:.3f} s")
    pairs, fps = read_pairs(arguments.vis, arguments.ir, offset_s=offset_s, tolerance_s=arguments.tolerance)
    mode: Literal["all", "latest"] = "latest" if is_live_pair(arguments.vis, arguments.ir) else "all"
    recorder = Recorder(arguments.output, fps)
    with (
        contextlib.suppress(KeyboardInterrupt),
        Client(arguments.url) as client,
        client.stream(pairs, mode=mode, rig=arguments.rig) as results,
    ):
        for result in results:
            if result.error is not None:
                print(f"frame {result.sequence}: {result.error}")
                continue
            recorder.write(result.unwrap().fused, result.timestamp_ns)
    recorder.close()
    print(f"wrote {recorder.num_frames} frames to {arguments.output}")


if __name__ == "__main__":
    main()
