r"""Two GStreamer pipelines in, one out, with the fusion in between. Needs Debian's python3-gst-1.0 or the like.

    python examples/gstreamer_bridge.py \
        --vis "v4l2src device=/dev/video1" --ir "v4l2src device=/dev/video0" --output "autovideosink"

Without arguments it fuses two test pictures. Each pipeline ends in an appsink that keeps the newest frame only, so that
what waits for the model is never old.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import gi
import numpy as np
from numpy.typing import NDArray

from recofuse_client import Client, Frame

gi.require_version("Gst", "1.0")
gi.require_version("GstVideo", "1.0")
from gi.repository import Gst, GstVideo  # noqa: E402 - only after the versions are chosen

WAIT_NS = 10 * 1_000_000_000
SINK = "videoconvert ! video/x-raw,format={} ! appsink name=sink max-buffers=1 drop=true sync=false"


class Camera:
    """A pipeline whose newest frame can be taken. pixel_format: RGB, GRAY8 or GRAY16_LE."""

    def __init__(self, description: str, pixel_format: str) -> None:
        self._pipeline = Gst.parse_launch(f"{description} ! {SINK.format(pixel_format)}")
        self._sink = self._pipeline.get_by_name("sink")
        self._pipeline.set_state(Gst.State.PLAYING)

    def take(self) -> NDArray[Any] | None:
        """The next frame, (H, W, 3) or (H, W); None at the end of the stream, or if none comes for 10 s."""
        sample = self._sink.emit("try-pull-sample", WAIT_NS)
        if sample is None:
            return None
        info = GstVideo.VideoInfo.new_from_caps(sample.get_caps())
        is_mapped, view = sample.get_buffer().map(Gst.MapFlags.READ)
        if not is_mapped:
            return None
        try:
            # Rows are padded, to multiples of 4 bytes.
            rows = np.frombuffer(view.data, np.uint8)[: info.stride[0] * info.height].reshape(info.height, -1)
            pixel_bytes = info.finfo.pixel_stride[0]
            rows = rows[:, : info.width * pixel_bytes].copy()  # the buffer goes back to its pool
        finally:
            sample.get_buffer().unmap(view)
        if pixel_bytes == 2:
            return rows.view("<u2").astype(np.uint16)
        return rows.reshape(info.height, info.width, 3) if pixel_bytes == 3 else rows

    def close(self) -> None:
        """Stop the pipeline."""
        self._pipeline.set_state(Gst.State.NULL)


class Screen:
    """A pipeline that is fed with RGB pictures."""

    def __init__(self, description: str) -> None:
        text = "appsrc name=source is-live=true do-timestamp=true format=time ! videoconvert ! "
        self._pipeline = Gst.parse_launch(text + description)
        self._source = self._pipeline.get_by_name("source")
        self._pipeline.set_state(Gst.State.PLAYING)

    def show(self, picture: NDArray[np.uint8]) -> None:
        """Push a picture, (H, W, 3) RGB."""
        height, width = picture.shape[:2]
        caps = f"video/x-raw,format=RGB,width={width},height={height},framerate=0/1"
        self._source.set_property("caps", Gst.Caps.from_string(caps))
        padded = np.pad(picture.reshape(height, -1), ((0, 0), (0, -width * 3 % 4)))
        self._source.emit("push-buffer", Gst.Buffer.new_wrapped(padded.tobytes()))

    def close(self) -> None:
        """Let what was pushed be shown, then stop."""
        self._source.emit("end-of-stream")
        self._pipeline.get_bus().timed_pop_filtered(WAIT_NS, Gst.MessageType.EOS | Gst.MessageType.ERROR)
        self._pipeline.set_state(Gst.State.NULL)


def frames(vis: Camera, ir: Camera, num_frames: int) -> Iterator[Frame]:
    """Pairs of newest frames. num_frames: 0 for as long as they come."""
    for number in itertools.count(1):
        vis_frame, ir_frame = vis.take(), ir.take()
        if vis_frame is None or ir_frame is None:
            return
        yield Frame(vis_frame, ir_frame, timestamp_ns=time.time_ns())
        if number == num_frames:
            return


def main() -> None:
    """Read the arguments and run until the cameras end or Ctrl-C is pressed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vis", default="videotestsrc is-live=true ! video/x-raw,width=322,height=240,framerate=25/1")
    parser.add_argument("--ir", default="videotestsrc is-live=true pattern=ball ! video/x-raw,width=322,height=240")
    parser.add_argument("--ir-format", choices=["GRAY8", "GRAY16_LE"], default="GRAY8")
    parser.add_argument("--output", default="fakesink", help="where the fused pictures go, such as autovideosink")
    parser.add_argument("--frames", type=int, default=0)
    parser.add_argument("--mode", choices=["latest", "all"], default="latest")
    parser.add_argument("--url", default="grpc://127.0.0.1:8001")
    arguments = parser.parse_args()

    Gst.init(None)
    vis, ir = Camera(arguments.vis, "RGB"), Camera(arguments.ir, arguments.ir_format)
    screen = Screen(arguments.output)
    try:
        with (
            Client(arguments.url) as client,
            client.stream(frames(vis, ir, arguments.frames), mode=arguments.mode) as results,
        ):
            for result in results:
                if result.fusion is not None:
                    screen.show(result.fusion.fused)
            stats = results.stats
        print(f"{stats.fused} frames fused, {stats.dropped} dropped, {stats.failed} failed")
    finally:
        for part in (vis, ir, screen):
            part.close()


if __name__ == "__main__":
    main()
