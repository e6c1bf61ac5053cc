"""Pairs of videos as streams of frames, and streams of pictures as a video or in a browser. Through OpenCV.

A source is the number of a device (0 is /dev/video0), the path of a file, or an address (rtsp://, http://, udp://).
Files are read frame by frame. Of devices and addresses the newest frame counts: each is read by a thread of its own, so
that a slow reader sees fresh frames rather than a growing backlog.

OpenCV gives 8 bits a channel. Cameras that deliver deeper infrared are better read with their maker's library, whose
arrays go into `Client.stream` as they are.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_client.pairing import MAX_OFFSET_S, Motion, Offset, OffsetError, Pairer, Stamped, offset_of
from recofuse_client.values import Frame
from recofuse_images.codecs import cv2
from recofuse_images.writer import jpeg_bytes

DEFAULT_FPS = 25.0
OPEN_TIMEOUT_MS = 10_000
READ_TIMEOUT_MS = 10_000
OFFSET_SECONDS = 15.0  # of both cameras, from which their offset is found
TOLERANCE_S = 0.1  # of live pairs with an offset
CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}  # what OpenCV's own FFmpeg can write
JPEG_QUALITY = 85  # of the view in a browser, percent
_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?", re.IGNORECASE)  # of the view in a browser

Pixels = NDArray[np.uint8]


class VideoError(OSError):
    """A video cannot be opened or written."""


def is_live(source: str) -> bool:
    """Whether a source goes on whether or not it is read: a device or an address."""
    return source.isdecimal() or "://" in source


def is_live_pair(vis: str, ir: str) -> bool:
    """Whether the newest frames of this pair count."""
    return is_live(vis) or is_live(ir)


@dataclass(slots=True)
class _Video:
    """An open source. fps: as it says itself, else DEFAULT_FPS."""

    name: str
    capture: cv2.VideoCapture
    fps: float

    @classmethod
    def open(cls, source: str, role: str) -> _Video:
        """Raises VideoError."""
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT_MS]
        if source.isdecimal():
            capture = cv2.VideoCapture(int(source))
        else:
            if not is_live(source) and not Path(source).is_file():
                raise VideoError(f"{role}: there is no file {source}")
            capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, timeouts)
        if not capture.isOpened():
            what = f"device {source}" if source.isdecimal() else source
            raise VideoError(f"{role}: {what} cannot be opened as a video")
        fps = capture.get(cv2.CAP_PROP_FPS)
        return cls(f"{role} {source}", capture, fps if 0 < fps <= 1000 else DEFAULT_FPS)

    def read(self) -> Pixels | None:
        """The next frame, (H, W, 3) with blue first; None at the end."""
        is_there, frame = self.capture.read()
        return np.asarray(frame, np.uint8) if is_there else None


class _Newest:
    """Reads a source in a thread and keeps its newest frame. pace_fps: of a file that plays as if it were live."""

    def __init__(self, video: _Video, pace_fps: float | None) -> None:
        self._video = video
        self._pace_fps = pace_fps
        self._changed = threading.Condition()
        self._frame: tuple[Pixels, int] | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name=f"recofuse-{video.name}", daemon=True)
        self._thread.start()

    def take(self) -> tuple[Pixels, int] | None:
        """A frame that was not taken yet, and when it came (Unix time, ns); None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._is_over)
            frame, self._frame = self._frame, None
            return frame

    def close(self) -> None:
        """Stop reading, and release the source once it gives way."""
        with self._changed:
            self._is_over = True
        self._thread.join(READ_TIMEOUT_MS / 1000)

    def _run(self) -> None:
        for frame in _arrivals(self._video, self._pace_fps):
            with self._changed:
                if self._is_over:
                    break
                self._frame = frame.image, frame.ns
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._video.capture.release()


def _arrivals(video: _Video, pace_fps: float | None) -> Iterator[Stamped]:
    """The frames of a source as they come, with the time of that (Unix time, ns)."""
    start_s = time.monotonic()
    for number in itertools.count():
        if pace_fps is not None:
            time.sleep(max(0.0, start_s + number / pace_fps - time.monotonic()))
        if (frame := video.read()) is None:
            return
        yield Stamped(frame, time.time_ns())


class _Both:
    """Reads two live sources in threads and hands out the newest pair, by time."""

    def __init__(self, videos: list[_Video], paces: list[float | None], pairer: Pairer) -> None:
        self._pairer = pairer
        self._changed = threading.Condition()
        self._num_running = len(videos)
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(video, pace, add), name=f"recofuse-{video.name}", daemon=True)
            for video, pace, add in zip(videos, paces, (pairer.add_vis, pairer.add_ir), strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def take(self) -> tuple[Stamped, Stamped] | None:
        """A pair that was not taken yet; None once a source has ended."""
        with self._changed:
            while True:
                is_over = self._num_running < len(self._threads)
                if (pair := self._pairer.newest(is_over=is_over)) is not None or is_over:
                    return pair
                self._changed.wait()

    def close(self) -> None:
        """Stop reading, and release the sources once they give way."""
        with self._changed:
            self._is_closed = True
        for thread in self._threads:
            thread.join(READ_TIMEOUT_MS / 1000)

    def _run(self, video: _Video, pace: float | None, add: Callable[[Stamped], None]) -> None:
        try:
            for frame in _arrivals(video, pace):
                with self._changed:
                    if self._is_closed:
                        break
                    add(frame)
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()
            video.capture.release()


def find_offset(vis: str, ir: str, *, seconds: float = OFFSET_SECONDS) -> Offset:
    """What infrared is late by, from what moves in the first seconds of two sources, which are opened for it.

    Of live sources the arrival of frames counts, of files the time since their beginning. Raises VideoError for a
    source that cannot be opened, and OffsetError if motion does not tell.
    """
    if is_live(vis) != is_live(ir):
        raise OffsetError("a file and a camera have no clock in common")
    videos = _opened(vis, ir)
    until_s = time.monotonic() + seconds

    def watched(video: _Video) -> Motion:
        motion = Motion()
        try:
            for number in itertools.count():
                frame = video.read()
                at_s = time.monotonic() if is_live(vis) else number / video.fps
                if frame is None or at_s > (until_s if is_live(vis) else seconds):
                    break
                motion.add(frame, at_s)
        finally:
            video.capture.release()
        return motion

    with ThreadPoolExecutor(len(videos)) as threads:
        motions = list(threads.map(watched, videos))
    return offset_of(motions[0], motions[1])


def _opened(vis: str, ir: str) -> list[_Video]:
    videos = [_Video.open(vis, "vis")]
    try:
        videos.append(_Video.open(ir, "ir"))
    except VideoError:
        videos[0].capture.release()
        raise
    return videos


class Pairs(Iterator[Frame]):
    """The frames of two sources, one after the other."""

    def __init__(self, frames: Generator[Frame, None, None], count_unpaired: Callable[[], int] = lambda: 0) -> None:
        self._frames = frames
        self._count_unpaired = count_unpaired

    @property
    def num_unpaired(self) -> int:
        """Visible frames left out until now, because no infrared one was near them in time."""
        return self._count_unpaired()

    def __next__(self) -> Frame:
        return next(self._frames)

    def close(self) -> None:
        """Release the sources."""
        self._frames.close()


def read_pairs(
    vis: str, ir: str, *, realtime: bool = False, offset_s: float = 0.0, tolerance_s: float | None = None
) -> tuple[Pairs, float]:
    """The frames of two sources, and how many a second they are. realtime: files play as if they were cameras.

    offset_s: what infrared is late by (`find_offset`). tolerance_s: how far a pair may be apart in time once that is
    taken off; visible frames without such a partner are left out. Unset: of files one infrared frame, of live sources
    with an offset TOLERANCE_S; of live sources with neither, the newest frames go together whatever their time.

    Files are read to the end of the shorter one; where their rates differ, each frame of vis goes with the frame of ir
    that is nearest in time. Timestamps are the time since a file's beginning, of live sources the time of the
    vis frame's arrival (Unix time, ns). Raises VideoError for a source that cannot be opened.
    """
    if not abs(offset_s) <= MAX_OFFSET_S or (tolerance_s is not None and not 0 <= tolerance_s <= MAX_OFFSET_S):
        raise ValueError(f"accepted are offsets from -{MAX_OFFSET_S:g} to {MAX_OFFSET_S:g} s, and tolerances from 0 on")
    videos = _opened(vis, ir)
    if realtime or is_live_pair(vis, ir):
        paces = [None if is_live(source) else video.fps for source, video in zip((vis, ir), videos, strict=True)]
        if offset_s or tolerance_s is not None:
            pairer = Pairer(offset_s, TOLERANCE_S if tolerance_s is None else tolerance_s)
            return Pairs(_timed_pairs(videos, paces, pairer), lambda: pairer.num_unpaired), videos[0].fps
        return Pairs(_live_pairs(videos, paces)), videos[0].fps
    left_out: list[int] = []
    frames = _file_pairs(videos[0], videos[1], offset_s, tolerance_s, left_out)
    return Pairs(frames, lambda: len(left_out)), videos[0].fps


def _grey(frame: Pixels) -> Pixels:
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) if frame.ndim == 3 else frame, np.uint8)


def _live_pairs(videos: list[_Video], paces: list[float | None]) -> Generator[Frame, None, None]:
    newest = [_Newest(video, pace) for video, pace in zip(videos, paces, strict=True)]
    try:
        while (vis := newest[0].take()) is not None and (ir := newest[1].take()) is not None:
            yield Frame(vis[0], _grey(ir[0]), timestamp_ns=vis[1], bgr=True)
    finally:
        for reader in newest:
            reader.close()


def _timed_pairs(videos: list[_Video], paces: list[float | None], pairer: Pairer) -> Generator[Frame, None, None]:
    both = _Both(videos, paces, pairer)
    try:
        while (pair := both.take()) is not None:
            vis, ir = pair
            yield Frame(vis.image, _grey(ir.image), timestamp_ns=vis.ns, bgr=True)
    finally:
        both.close()


def _file_pairs(
    vis: _Video, ir: _Video, offset_s: float, tolerance_s: float | None, left_out: list[int]
) -> Generator[Frame, None, None]:
    """left_out: is told the numbers of the visible frames that have no partner."""
    tolerance_s = 1 / ir.fps if tolerance_s is None else tolerance_s
    try:
        ir_frame, num_ir = ir.read(), 1
        for number in itertools.count():
            vis_frame = vis.read()
            # The nearest ir frame; containers round their rates, so the last one shown would fall behind by one.
            while ir_frame is not None and (num_ir - 0.5) / ir.fps <= number / vis.fps + offset_s:
                ir_frame, num_ir = ir.read(), num_ir + 1
            if vis_frame is None or ir_frame is None:
                return
            if abs((num_ir - 1) / ir.fps - number / vis.fps - offset_s) > tolerance_s + 1e-9:
                left_out.append(number)
                continue
            timestamp_ns = round(number / vis.fps * 1e9)
            yield Frame(vis_frame, _grey(ir_frame), timestamp_ns=timestamp_ns, bgr=True)
    finally:
        vis.capture.release()
        ir.capture.release()


class Recorder:
    """Writes pictures to a video file of a constant rate; a picture stays until the time of the next one has come.

    So a stream that dropped frames plays at its true speed. Raises VideoError for a name or a folder that cannot be
    written, and for a picture of another size than the first.
    """

    def __init__(self, path: Path, fps: float) -> None:
        if path.suffix.lower() not in CODECS:
            raise VideoError(f"{path}: accepted are names that end with {', '.join(CODECS)}")
        if not path.parent.is_dir():
            raise VideoError(f"{path}: there is no folder {path.parent}")
        self._path = path
        self._fps = fps
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._start_ns = 0
        self._shown: Any = None  # the picture before
        self.num_frames = 0

    def write(self, picture: Pixels, timestamp_ns: int) -> None:
        """Add a picture, (H, W, 3) RGB or (H, W), of this time in ns."""
        frame = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR if picture.ndim == 2 else cv2.COLOR_RGB2BGR)
        size = (frame.shape[1], frame.shape[0])
        if self._writer is None:
            self._writer = cv2.VideoWriter(
                str(self._path), cv2.VideoWriter.fourcc(*CODECS[self._path.suffix.lower()]), self._fps, size
            )
            if not self._writer.isOpened():
                raise VideoError(f"{self._path} cannot be written")
            self._size, self._start_ns = size, timestamp_ns
        if size != self._size:
            raise VideoError(f"{self._path}: a picture of {size} came after pictures of {self._size}")
        number = round((timestamp_ns - self._start_ns) / 1e9 * self._fps)
        if self._shown is not None:
            for _ in range(min(number - self.num_frames, round(60 * self._fps))):  # a clock that leaps fills no disk
                self._writer.write(self._shown)
        if number >= self.num_frames:
            self._writer.write(frame)
            self.num_frames = number + 1
        self._shown = frame

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()


class Viewer:
    """Shows pictures in any browser on this machine: a page that the pictures are pushed to, as they come.

    OpenCV's headless build can open no window, and a page also reaches a machine without a screen, through `ssh -L`.
    url: of the page. It listens on the loopback interface only, asks for nothing, and answers under that interface's
    names only, whatever the port (which `ssh -L` may change): a page of the web whose name is made to lead here gets
    no picture.
    """

    def __init__(self, port: int = 0) -> None:
        viewer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                viewer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._changed = threading.Condition()
        self._jpeg, self._number, self._is_closed = b"", 0, False
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, name="recofuse-viewer", daemon=True).start()

    def write(self, picture: Pixels, timestamp_ns: int) -> None:
        """Show a picture, (H, W, 3) RGB or (H, W)."""
        jpeg = jpeg_bytes(picture, JPEG_QUALITY)
        with self._changed:
            self._jpeg, self._number = jpeg, self._number + 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stop serving; pages that are open keep the last picture."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        if not _OWN_HOST.fullmatch(handler.headers.get("Host", "")):
            _respond(handler, 421, "text/plain", b"the page is at 127.0.0.1\n")
        elif handler.path == "/":
            _respond(handler, 200, "text/html; charset=utf-8", _PAGE.encode())
        elif handler.path == "/pictures":
            handler.send_response(200)
            handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=picture")
            handler.send_header("Cache-Control", "no-store")
            handler.end_headers()
            with contextlib.suppress(ConnectionError):
                for jpeg in self._pictures():
                    handler.wfile.write(
                        b"--picture\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
                    )
                    handler.wfile.write(jpeg + b"\r\n")
        else:
            _respond(handler, 404, "text/plain", b"the page is at /\n")

    def _pictures(self) -> Iterator[bytes]:
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._number > seen)  # noqa: B023 - called at once
                if self._is_closed:
                    return
                jpeg, seen = self._jpeg, self._number
            yield jpeg


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>recofuse</title>
<style>html,body{margin:0;height:100%;background:#111}img{width:100%;height:100%;object-fit:contain}</style>
<img src="/pictures" alt="the fused video"></html>
"""


def _respond(handler: BaseHTTPRequestHandler, status: int, kind: str, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
