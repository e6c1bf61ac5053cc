"""The verbs of `recofuse bench`: what can be measured, and with which options.

The command finds this module by name in a source tree (service/command/verbs/bench.py); a wheel has none of it. It is
imported with every call of the command, so each verb imports what it measures with when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from service.command.options import DEFAULT_WEIGHTS, Device, Threads, Weights
from service.terms.errors import InvalidInputError

bench = typer.Typer(no_args_is_help=True)


@bench.command(name="service")
def bench_service(
    quick: Annotated[bool, typer.Option("--quick", help="Windows of a second, for a first look.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """What the service costs without the model, under load from 1 to 32 clients, and beside a bare batching server."""
    from benchmarks import service as measured

    window_s, warm_up_s, num_rounds = (1.0, 0.5, 6) if quick else (6.0, 1.5, 20)
    outcome = measured.run(
        window_s=window_s, warm_up_s=warm_up_s, num_rounds=num_rounds, json_path=json_path, say=typer.echo
    )
    if outcome.num_failed:
        raise typer.Exit(1)


@bench.command(name="streams")
def bench_streams(
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes and short windows, for a first look.")] = False,
    model: Annotated[bool, typer.Option("--model/--no-model", help="Also measure one stream with the model.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """What a stream's frame costs at each resolution, without the model and with it."""
    from benchmarks import streams

    streams.run(is_quick=quick, with_model=model, json_path=json_path, say=typer.echo)


@bench.command(name="codec")
def bench_codec(
    repeats: Annotated[int, typer.Option(min=1, help="Times that each setting is tried.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """What reading a pair costs, and what PNG settings cost and bring: processor time and size of answers."""
    from benchmarks import codec

    codec.run(repeats=repeats, json_path=json_path, say=typer.echo)


@bench.command(name="engine")
def bench_engine(
    quick: Annotated[bool, typer.Option("--quick", help="640x480 alone, for a first look.")] = False,
    preset: Annotated[
        list[str] | None, typer.Option(help="paper (random weights), compact; may be repeated. Both if unset.")
    ] = None,
    runtimes: Annotated[
        bool, typer.Option("--runtimes", help="Only the runtimes of the shipped weights, alone and beside others.")
    ] = False,
    device: Device = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the model.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write one line a measurement.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Write a chart (SVG).")] = None,
    model_gpu: Annotated[
        str | None, typer.Option(help="Measure nothing; model a card that is not there: H200, H100, 4090 or T4.")
    ] = None,
) -> None:
    """The model against the straightforward implementation, one improvement after the other, and its runtimes."""
    from benchmarks import engine as measured
    from benchmarks import runtimes as by_runtime
    from recofuse_core import PRESETS

    if unknown := set(preset or ()) - set(PRESETS):
        raise InvalidInputError(f"preset: {', '.join(sorted(unknown))} is none of {', '.join(PRESETS)}")
    if model_gpu is not None:
        _model_gpu(model_gpu, presets=preset or ("compact", "paper"), quick=quick, json_path=json_path)
        return
    if runtimes:
        by_runtime.run(num_threads=threads, json_path=json_path, say=typer.echo, is_all=True)
        return
    outcome = measured.run(
        is_quick=quick,
        device=device,
        presets=preset or ("paper", "compact"),
        num_threads=threads,
        json_path=json_path,
        csv_path=csv_path,
        plot_path=plot_path,
        say=typer.echo,
    )
    if not outcome.all_met:
        raise typer.Exit(1)


def _model_gpu(card: str, *, presets: Sequence[str], quick: bool, json_path: Path | None) -> None:
    from benchmarks import simulated_gpu

    if card not in simulated_gpu.CARDS:
        raise InvalidInputError(f"model-gpu: {card} is none of {', '.join(simulated_gpu.CARDS)}")
    if simulated_gpu.run(card, presets=presets, is_quick=quick, json_path=json_path, say=typer.echo).flags:
        raise typer.Exit(1)


@bench.command(name="neighbours")
def bench_neighbours(
    repeats: Annotated[int, typer.Option(min=1, help="Pairs fused in each way, with and without neighbours.")] = 5,
    busy: Annotated[int, typer.Option(min=0, help="Busy processes; 0: one for each processor.")] = 0,
    spinning: Annotated[bool, typer.Option("--spinning", help="Also what threads that spin cost; slow.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """The model on a processor beside busy processes, and in a cgroup of one processor."""
    from benchmarks import neighbours

    outcome = neighbours.run(
        repeats=repeats, num_busy=busy, with_spinning=spinning, json_path=json_path, say=typer.echo
    )
    if not outcome.all_met:
        raise typer.Exit(1)


@bench.command(name="steps")
def bench_steps(
    pairs: Annotated[Path, typer.Option(help="Folder of clean pairs, as for evaluate.")],
    limit: Annotated[int, typer.Option(min=1, help="How many pairs, spread over the folder.")] = 8,
    side: Annotated[
        int, typer.Option(min=0, help="Side of the middle square that is used, px; 0: whole frames.")
    ] = 256,
    strength: Annotated[str, typer.Option(help="Degradations put in: light, medium or strong.")] = "medium",
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    threads: Threads = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write one line a setting.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Write the curve (SVG).")] = None,
) -> None:
    """Quality against sampling steps for every sampler, beside 100 Euler steps in float32."""
    from benchmarks import steps as measured
    from recofuse_core.threads import use_threads

    use_threads(threads)
    measured.run(
        pairs,
        weights=weights,
        limit=limit,
        side=side,
        strength=cast("Any", strength),
        device=device,
        json_path=json_path,
        csv_path=csv_path,
        plot_path=plot_path,
        say=typer.echo,
    )


@bench.command(name="weights")
def bench_weights(
    old: Annotated[str, typer.Argument(help="Name or path of the weights to compare with.")],
    new: Annotated[str, typer.Argument(help="Name or path of those that are asked about.")] = DEFAULT_WEIGHTS,
    exposure: Annotated[str, typer.Option(help="as_shot or lit.")] = "as_shot",
    windows: Annotated[int, typer.Option(min=1, help="Times that either is run at each size.")] = 5,
    runtime: Annotated[str, typer.Option(help="What runs the latter: torch, or onnx, their graphs.")] = "torch",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """What a pair costs with either of two sets of weights, from 320x256 to 4K, in alternating windows."""
    from benchmarks import weights

    weights.run(
        old,
        new,
        exposure=cast("Any", exposure),
        windows=windows,
        runtime=cast("Any", runtime),
        json_path=json_path,
        say=typer.echo,
    )


@bench.command(name="kept")
def bench_kept(
    images: Annotated[int, typer.Option(min=1, help="Pairs through each way.")] = 12,
    clients: Annotated[int, typer.Option(min=1, help="Requests in flight at once.")] = 4,
    device: Device = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the model.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """How much of the engine's throughput the service keeps with the real model."""
    from benchmarks import kept

    outcome = kept.run(
        num_images=images, num_clients=clients, device=device, num_threads=threads, json_path=json_path, say=typer.echo
    )
    if outcome.kept < kept.TARGET:
        raise typer.Exit(1)


@bench.command(name="warm-start")
def bench_warm_start(
    weights: Weights = DEFAULT_WEIGHTS,
    threads: Threads = 0,
    quick: Annotated[bool, typer.Option("--quick", help="One scene of five frames, for a first look.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """Whether starting a frame from the one before it saves steps: quality and flicker on moving scenes."""
    from benchmarks import warm_start
    from recofuse_core.threads import use_threads

    use_threads(threads)
    warm_start.run(weights=weights, is_quick=quick, json_path=json_path, say=typer.echo)


@bench.command(name="offset")
def bench_offset(
    clips: Annotated[int, typer.Option(min=2, help="Clips of each kind, each beside each.")] = 16,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """How often `stream --offset auto` is right, unsure and wrong, on clips that tell an offset and on others."""
    from benchmarks import offsets

    if not offsets.run(clips=clips, json_path=json_path, say=typer.echo).all_met:
        raise typer.Exit(1)


@bench.command(name="alignment")
def bench_alignment(
    pairs: Annotated[Path | None, typer.Option(help="Folder with registered pairs in vis and ir.")] = None,
    singles: Annotated[int, typer.Option(min=1, help="Draws of a single pair, of each kind of scenes.")] = 40,
    tens: Annotated[int, typer.Option(min=0, help="Draws of ten pairs.")] = 20,
    parallax: Annotated[
        int, typer.Option(min=0, help="Instead: what align=refine makes of so many streets with depth.")
    ] = 0,
    cost: Annotated[
        int, typer.Option(min=0, help="Instead: what a rig adds to a frame's time, in so many rounds.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """How well `calibrate` finds moved infrared, beside ECC and SIFT; on generated streets and on your pairs."""
    from benchmarks import alignment, rig_cost

    if cost:
        if not rig_cost.run(rounds=cost, json_path=json_path, say=typer.echo).all_met:
            raise typer.Exit(1)
        return
    if parallax:
        from benchmarks.parallax import run

        if not run(pairs, count=parallax, seed=seed, json_path=json_path, say=typer.echo).all_met:
            raise typer.Exit(1)
        return
    if not alignment.run(pairs, singles=singles, tens=tens, seed=seed, json_path=json_path, say=typer.echo).all_met:
        raise typer.Exit(1)
