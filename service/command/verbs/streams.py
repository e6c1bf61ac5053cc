"""`recofuse stream` and `simulate-cameras`: video over gRPC, of real cameras or of made ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from service.command.environment import API_KEY_VARIABLE
from service.command.options import (
    DEFAULT_WEIGHTS,
    AlarmAt,
    Align,
    Calm,
    Colour,
    ColourRange,
    Degrees,
    Exposure,
    IrRange,
    Outline,
    Steady,
    VisRange,
    Weights,
    sides_of,
)
from service.command.terminal import SOURCES, complain, err, out
from service.terms.errors import InvalidInputError


def simulate_cameras(
    streams: Annotated[int, typer.Option(min=1, max=1000, help="Cameras.")] = 16,
    fps: Annotated[float, typer.Option(min=0.1, max=1000, help="Frames a second of each.")] = 25.0,
    seconds: Annotated[float, typer.Option(min=0.5, help="How long they send.")] = 10.0,
    mode: Annotated[
        str, typer.Option(help="latest: skip what is stale; all: slow the camera, lose nothing.")
    ] = "latest",
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="gRPC address, repeatable; a server of its own is started if unset."),
    ] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT.")] = "640x480",
    encoding: Annotated[str, typer.Option(help="How frames are sent: jpeg or raw.")] = "jpeg",
    answer: Annotated[str, typer.Option("--format", help="How answers come: jpeg, png, webp or raw.")] = "jpeg",
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps; the model's own if unset.")
    ] = None,
    exposure: Exposure = None,
    steady: Steady = True,
    calm: Calm = False,
    rig: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A rig file: infrared is sent as that rig's camera sees it, and the server is told."
        ),
    ] = None,
    max_in_flight: Annotated[int, typer.Option(min=0, help="Frames of a stream at work; 0: the server's default.")] = 0,
    engine: Annotated[
        str | None, typer.Option(metavar="core|null|fixed", help="Of the own server; fixed has a constant cost.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which streets.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """Stream moving, degraded, generated scenes from many cameras: frames a second, latency, drops.

    The scenes are rendered once and looped. Other settings of the own server come from the environment.
    """
    import asyncio
    import json
    import tempfile

    from recofuse_rigs.rig import from_file
    from service.command.cameras import CameraPlan, render_loop, simulate
    from service.command.demo import free_port, server_process
    from service.watch.metrics import FlowMode

    sides = sides_of(size)
    for name, value, known in (
        ("mode", mode, ("latest", "all")),
        ("encoding", encoding, ("jpeg", "raw")),
        ("format", answer, ("jpeg", "png", "webp", "raw")),
        ("exposure", exposure, ("lit", "as_shot", None)),
    ):
        if value not in known:
            raise InvalidInputError(f"{name}: {value} is none of {', '.join(filter(None, known))}")
    plan = CameraPlan(
        num_streams=streams,
        fps=fps,
        seconds=seconds,
        mode=FlowMode(mode),
        size=sides,
        encoding=cast("Any", encoding),
        answer=cast("Any", answer),
        steps=steps,
        exposure=cast("Any", exposure),
        steady=steady,
        calm=calm,
        rig=None if rig is None else from_file(rig),
        max_in_flight=max_in_flight,
        seed=seed,
    )
    err.print(f"rendering {plan.num_scenes} scenes of {plan.num_frames} frames")
    loops = render_loop(plan)
    if target:
        report = asyncio.run(simulate(target, plan, loops, say=err.print))
    else:
        with tempfile.TemporaryDirectory(prefix="recofuse-cameras-") as folder:
            port = free_port()
            options = ["--grpc-port", str(port), *(["--engine", engine] if engine else [])]
            with server_process(options, Path(folder) / "server.log"):
                report = asyncio.run(simulate([f"127.0.0.1:{port}"], plan, loops, say=err.print))
    if json_path is not None:
        json_path.write_text(json.dumps(report.figures, indent=2) + "\n", encoding="utf-8")
    for error in report.figures["errors"][:5]:
        complain(error)
    out.print(report.line, markup=False, soft_wrap=True)


def stream(
    vis: Annotated[str, typer.Option(help="Visible video: a device's number, a file, or an address (rtsp://...).")],
    ir: Annotated[str, typer.Option(help="Infrared video of the same view, likewise.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Record to this .mp4, .mov, .mkv or .avi.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show the pictures on a page for browsers on this machine.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="gRPC address, grpcs://HOST:PORT for TLS; a server is started if unset."
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(metavar="all|latest", help="all: every frame; latest: the newest. Default: all for files."),
    ] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Play files at their own speed, as cameras would.")
    ] = False,
    part: Annotated[str, typer.Option(metavar="fused|vis|ir", help="Which picture.")] = "fused",
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps; the model's own if unset.")
    ] = None,
    exposure: Exposure = None,
    steady: Steady = True,
    calm: Calm = False,
    rig: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Of cameras that are not registered: one of the server's rigs, or a rig file."
        ),
    ] = None,
    offset: Annotated[
        str,
        typer.Option(metavar="auto|SECONDS", help="What infrared is late by; auto finds it from what moves in both."),
    ] = "0",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, max=2, help="Seconds that a pair may be apart; frames without such a partner are left out."
        ),
    ] = None,
    align: Align = "rig",
    colour: Colour = "natural",
    colour_range: ColourRange = None,
    degrees: Degrees = None,
    alarm: AlarmAt = None,
    outline: Outline = False,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal pictures.")] = 0,
    vis_range: VisRange = None,
    ir_range: IrRange = None,
    frames: Annotated[int, typer.Option(min=0, help="Stop after this many pictures; 0: when the video ends.")] = 0,
    fps: Annotated[float, typer.Option(min=0, help="Rate of the recording; 0: that of vis.")] = 0.0,
    api_key: Annotated[
        str, typer.Option(envvar=API_KEY_VARIABLE, help="API key; better in the environment, where `ps` shows none.")
    ] = "",
    ca: Annotated[str, typer.Option(help="PEM file of the authority that signed the server's certificate.")] = "",
    weights: Weights = DEFAULT_WEIGHTS,
    engine: Annotated[
        str | None, typer.Option(metavar="core|null|fixed", help="Of the own server: the model, or a stand-in.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """Fuse the videos of two cameras as they come: record them, show them in a browser, or only measure.

    Ctrl-C ends it in order; what was recorded until then is whole.
    """
    import contextlib
    import json
    import signal
    import tempfile

    from recofuse_client import Client, live, video
    from recofuse_client.values import Align as Aligns
    from recofuse_client.values import Colour as Colours

    for name, value, known in (
        ("mode", mode, ("all", "latest", None)),
        ("part", part, ("fused", "vis", "ir")),
        ("exposure", exposure, ("lit", "as_shot", None)),
        ("align", align, get_args(Aligns)),
        ("colour", colour, get_args(Colours)),
    ):
        if value not in known:
            raise InvalidInputError(f"{name}: {value} is none of {', '.join(filter(None, known))}")
    chosen_rig = _rig_of(rig)
    is_fresh = realtime or video.is_live_pair(vis, ir)
    chosen = cast("Any", mode or ("latest" if is_fresh else "all"))
    with contextlib.ExitStack() as stack:
        # Both end it in order; a shell that starts it in the background has turned SIGINT off.
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        offset_s = _offset_of(offset, vis, ir)
        pairs, source_fps = video.read_pairs(vis, ir, realtime=realtime, offset_s=offset_s, tolerance_s=tolerance)
        sinks: list[live.Sink] = []
        if output is not None:
            sinks.append(video.Recorder(output, fps or source_fps))
        if show:
            viewer = video.Viewer()
            sinks.append(viewer)
            err.print(f"showing on {viewer.url}", markup=False, soft_wrap=True)
        if target is None:
            from service.command.demo import free_port, server_process

            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="recofuse-stream-"))
            port = free_port()
            options = ["--grpc-port", str(port), "--weights", weights, *(["--engine", engine] if engine else [])]
            err.print("starting a server")
            stack.enter_context(server_process(options, Path(folder) / "server.log"))
            target = f"127.0.0.1:{port}"
        url = target if "://" in target else f"grpc://{target}"
        client = stack.enter_context(Client(url, api_key=api_key, ca=ca))
        status = stack.enter_context(err.status("waiting for the first picture")) if err.is_terminal else None
        report = live.run(
            client,
            pairs,
            sinks,
            mode=chosen,
            steady=steady,
            calm=calm,
            options={
                "output": cast("Any", part),
                "steps": steps,
                "exposure": cast("Any", exposure),
                "rig": chosen_rig,
                "align": cast("Any", align),
                "colour": cast("Any", colour),
                "colour_range": colour_range,
                "degrees": degrees,
                "alarm": alarm,
                "outline": outline,
                "seed": seed,
                "vis_range": vis_range,
                "ir_range": ir_range,
            },
            say=lambda so_far: None if status is None else status.update(so_far.line),
            warn=complain,
            max_frames=frames,
        )
        report.num_unpaired = pairs.num_unpaired
    if json_path is not None:
        json_path.write_text(json.dumps(report.figures | {"offset_s": offset_s}, indent=2) + "\n", encoding="utf-8")
    if report.last_error:
        complain(f"the last frame that failed: {report.last_error}")
    written = f"; wrote {output}" if output is not None and report.stats.fused else ""
    if report.ir_source not in ("grey", ""):
        out.print(f"infrared read: {SOURCES[report.ir_source]}", markup=False, soft_wrap=True)
    out.print(f"{'stopped; ' if report.is_interrupted else ''}{report.line}{written}", markup=False, soft_wrap=True)
    if not report.stats.fused:
        raise typer.Exit(1)


def _offset_of(given: str, vis: str, ir: str) -> float:
    """Seconds. Raises InvalidInputError for what is no offset, and where motion tells none."""
    from recofuse_client.pairing import MAX_OFFSET_S, OffsetError
    from recofuse_client.video import find_offset

    if given != "auto":
        try:
            seconds = float(given)
        except ValueError:
            seconds = float("nan")
        if not abs(seconds) <= MAX_OFFSET_S:
            raise InvalidInputError(f"offset: accepted are auto and seconds from -{MAX_OFFSET_S:g} to {MAX_OFFSET_S:g}")
        return seconds
    err.print("looking for the offset of both cameras")
    try:
        found = find_offset(vis, ir)
    except OffsetError as error:
        raise InvalidInputError(f"offset: {error}; give it in seconds") from error
    what = "late" if found.seconds >= 0 else "early"
    err.print(f"infrared is {abs(found.seconds):.3f} s {what} (alike by {found.likeness:.2f})", markup=False)
    return found.seconds


def _rig_of(given: str | None) -> str | Path | None:
    """A name as it is, a file as a path. Raises BadRigError and OSError for a file that is no rig."""
    if given is None or not (given.endswith(".json") or "/" in given):
        return given
    from recofuse_rigs.rig import from_file

    from_file(Path(given))  # what is none is told before a server and cameras are opened
    return Path(given)
