"""The `recofuse` command: thin verbs over the library and the service, and the only reader of the environment.

Each verb imports what it needs, because torch takes seconds to import and most verbs of a server's operator do without.
What the caller can mend is one line on standard error and exit status 2, never a traceback; a fault of ours keeps its
traceback, since that is what a report needs. Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from service.terms.errors import InvalidInputError, ServiceError
from service.terms.settings import Settings, SettingsError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from recofuse_images.pairs import FoundPair
    from service.access.keys import KeyStore
    from service.command.files import Cost, Fusion, Pixels
    from service.queue.contract import JobQueue
    from service.terms.jobs import FusionOptions, Stage

WEIGHTS_VARIABLE = "RECOFUSE_WEIGHTS"
API_KEY_VARIABLE = "RECOFUSE_API_KEY"  # of a client
DEFAULT_WEIGHTS = "compact"
SOURCES = {  # of infrared, in words
    "raw": "the camera's own values in the file",
    "palette": "a false-colour picture, turned back into intensity",
    "grey": "grey values",
}
MAX_SHEET_ROWS = 12  # of full-size pictures; more would be a file that no viewer opens

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def _mendable() -> tuple[type[BaseException], ...]:
    """The errors that are the caller's to mend. The library is asked only if a verb has loaded it already."""
    kinds: list[type[BaseException]] = [ServiceError, SettingsError, OSError]
    for module, name in (("recofuse_core.errors", "CoreError"), ("recofuse_client.errors", "RecofuseError")):
        if (errors := sys.modules.get(module)) is not None:
            kinds.append(getattr(errors, name))
    return tuple(kinds)


class OneLineErrors(TyperGroup):
    """Turns errors that the caller can mend into one line and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except _mendable() as error:
            complain(str(error))
            raise typer.Exit(2) from error


def complain(message: str) -> None:
    """One line on standard error."""
    err.print(f"recofuse: {' '.join(message.split())}", markup=False, soft_wrap=True, style="red")


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Restore and fuse infrared/visible image pairs.",
)

Weights = Annotated[
    str,
    typer.Option(
        envvar=WEIGHTS_VARIABLE, metavar="NAME_OR_PATH", help="A shipped model's name or the path of a checkpoint file."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes the first GPU, else the CPU.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of the model; 0: one per core.")]
VisRange = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Visible values that become black and white; by the depth if unset."),
]
IrRange = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Infrared values that become black and white; automatic if unset."),
]


def _settings() -> Settings:
    settings = Settings.from_environment(os.environ, ignore=frozenset({WEIGHTS_VARIABLE, API_KEY_VARIABLE}))
    standard = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    return settings.replace(trace={"endpoint": standard}) if standard and not settings.trace.endpoint else settings


def _show_version(is_asked: bool) -> None:
    if is_asked:
        out.print(f"recofuse {importlib.metadata.version('recofuse')}")
        raise typer.Exit


@app.callback()
def recofuse(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Restore and fuse infrared/visible image pairs."""


# fuse


@app.command()
def fuse(
    vis: Annotated[Path, typer.Option(help="Visible image, or a folder of them and of folders.")],
    ir: Annotated[
        Path,
        typer.Option(
            help="Infrared image, or a folder: files of the same names, or of names that differ by a word such as vis "
            "and ir, RGB and T. May be the folder of --vis, if such words tell the files apart."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Fused image to write, or a folder for them.")],
    all_: Annotated[
        bool, typer.Option("--all", help="Write the restored inputs too, as NAME_vis and NAME_ir.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps; the model's own if unset.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="euler, posterior, ode1 or ode2; the model's own if unset.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise; equal seeds give equal pictures.")] = 0,
    vis_range: VisRange = None,
    ir_range: IrRange = None,
    sheet: Annotated[Path | None, typer.Option(help="Also write inputs and results side by side.")] = None,
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Fuse one pair of files, or folders of pairs matched by file name (docs/training.md, How names pair)."""
    from recofuse_images.pairs import told
    from service.command.files import contact_sheet, fuse_files, match_pairs, paths_of_parts, write_picture
    from service.terms.jobs import Part, printable
    from service.work.engine import CoreEngine, PassOptions

    settings = _settings()
    pairs, passed_over = match_pairs(vis, ir, leave_out=output)
    parts = tuple(Part) if all_ else (Part.FUSED,)
    is_folder = vis.is_dir()
    if is_folder and output.exists() and not output.is_dir():
        raise InvalidInputError(f"output: {output} is a file, but two folders need a folder")
    targets = [paths_of_parts(output / f"{pair.name}.png" if is_folder else output, parts) for pair in pairs]
    if sheet is not None:
        paths_of_parts(sheet, (Part.FUSED,))  # an impossible suffix is told before the work, not after it
    given = [path for pair in pairs for path in (pair.vis, pair.ir)] + [item.path for item in passed_over]
    _refuse_to_overwrite(given, [path for paths in targets for path in paths.values()] + ([sheet] if sheet else []))
    asked = _valid_options(steps=steps, sampler=sampler, seed=seed, vis_range=vis_range, ir_range=ir_range)
    if passed_over:
        complain(told(passed_over))

    engine = CoreEngine(settings.engine.model_copy(update={"model": weights, "device": device, "num_threads": threads}))
    engine.load()
    options = PassOptions(
        steps=asked.steps or engine.info.default_steps,
        sampler=asked.sampler or engine.info.default_sampler,
        parts=parts,
    )
    costs: list[Mapping[Stage, Cost]] = []
    sources: Counter[str] = Counter()
    rows: list[list[tuple[str, Pixels]]] = []
    num_failed = 0
    with _progress() as progress:
        for pair, paths in progress.track(list(zip(pairs, targets, strict=True)), description="fusing"):
            try:
                fusion = fuse_files(
                    engine,
                    pair,
                    paths,
                    options,
                    seed,
                    settings.limits,
                    settings.codec,
                    asked.vis_range,
                    asked.ir_range,
                )
            except ServiceError as error:
                if not is_folder:
                    raise
                num_failed += 1
                complain(f"{pair.name}: {error}")
                continue
            costs.append(fusion.costs)
            sources[fusion.inputs.ir_source] += 1
            for warning in printable(fusion.inputs.warnings):
                complain(f"{pair.name}: {warning}")
            if sheet is not None and len(rows) < MAX_SHEET_ROWS:
                rows.append(_sheet_row(pair, fusion))
    if costs:
        out.print(_cost_table(costs, f"{engine.info.model_name}, {options.sampler}, {options.steps} steps"))
        if set(sources) != {"grey"}:
            found = "; ".join(f"{SOURCES[name]} ({sources[name]} of {len(costs)})" for name in SOURCES if sources[name])
            out.print(f"infrared read: {found}", markup=False, soft_wrap=True)
        out.print(f"wrote {output}", markup=False, soft_wrap=True)
    if sheet is not None and rows:
        write_picture(sheet, contact_sheet(rows), settings.codec)
        first = f" (the first {len(rows)} pairs)" if len(rows) < len(costs) else ""
        out.print(f"wrote {sheet}{first}", markup=False, soft_wrap=True)
    if num_failed:
        complain(f"{num_failed} of {len(pairs)} pairs could not be fused")
        raise typer.Exit(2)


def _valid_options(**values: object) -> FusionOptions:
    from pydantic import ValidationError

    from service.terms.jobs import FusionOptions, problems_of

    try:
        return FusionOptions.model_validate(values)
    except ValidationError as error:
        raise InvalidInputError(problems_of(error)) from error


def _refuse_to_overwrite(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    """Refuse targets that are inputs (those passed over too), and two pictures in one file."""
    known = {path.resolve() for path in sources}
    written: set[Path] = set()
    for target in targets:
        place = target.resolve()
        if place in known:
            raise InvalidInputError(f"output: writing {target} would destroy an input; choose another name or folder")
        if place in written:
            raise InvalidInputError(f"output: two pictures would be written to {target}; rename one of their inputs")
        written.add(place)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
    )


def _sheet_row(pair: FoundPair, fusion: Fusion) -> list[tuple[str, Pixels]]:
    from service.terms.jobs import Part

    row = [(f"{pair.name}: visible", fusion.inputs.vis), ("infrared", fusion.inputs.ir)]
    labels = {Part.VIS: "visible, restored", Part.IR: "infrared, restored", Part.FUSED: "fused"}
    row += [(label, fusion.pictures[part]) for part, label in labels.items() if part in fusion.pictures]
    return row


def _cost_table(costs: Sequence[Mapping[Stage, Cost]], title: str) -> Table:
    """Mean cost of a pair by stage."""
    table = Table(title=f"per pair ({len(costs)} fused; {title})", title_justify="left")
    table.add_column("stage")
    table.add_column("time, ms", justify="right")
    table.add_column("processor time, ms", justify="right")
    totals = [0.0, 0.0]
    for stage in costs[0]:
        wall_ms = 1e3 * sum(cost[stage].wall_s for cost in costs) / len(costs)
        cpu_ms = 1e3 * sum(cost[stage].cpu_s for cost in costs) / len(costs)
        totals = [totals[0] + wall_ms, totals[1] + cpu_ms]
        table.add_row(stage.value, f"{wall_ms:.1f}", f"{cpu_ms:.1f}")
    table.add_section()
    table.add_row("total", f"{totals[0]:.1f}", f"{totals[1]:.1f}")
    return table


# serve


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(min=-1, max=65535, help="Port for gRPC; 0 picks a free one, -1 turns it off.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="core|null|fixed", help="The model, or a stand-in that measures the service.")
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(metavar="files|ready", help="ready: answer the uploaded file unread (stand-in engines only)."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(envvar=WEIGHTS_VARIABLE, metavar="NAME_OR_PATH", help="A shipped model's name or a checkpoint."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="CPU threads of the model; 0: one per core.")] = None,
) -> None:
    """Serve POST /v1/fuse and the same over gRPC: front end, queue and worker in one process.

    Every setting can be given as RECOFUSE_GROUP__NAME in the environment; an option here wins over it.
    """
    asked: dict[str, dict[str, Any]] = {
        "http": {"host": host, "port": port},
        "grpc": {"host": host, "port": grpc_port},
        "codec": {"kind": codec},
        "engine": {"kind": engine, "model": weights, "device": device, "num_threads": threads},
    }
    raise typer.Exit(_serve_all_in_one(_changed(_settings(), asked)))


def _serve_all_in_one(settings: Settings) -> int:
    """Serve until told to stop; returns the exit status. Raises what the caller can mend, such as a missing file."""
    from service.command.processes import serve_all_in_one
    from service.work.engine import build_engine

    def announce(address: str) -> None:
        err.print(f"serving on {address} - open it in a browser; Ctrl-C stops", markup=False, soft_wrap=True)

    return _run(lambda stop: serve_all_in_one(settings, build_engine(settings.engine), stop, announce), settings)


def _run(serve: Callable[[asyncio.Event], Awaitable[None]], settings: Settings) -> int:
    """Run one of the `processes` as this one; what the caller can mend is raised, not logged as a fault of ours."""
    from service.command.processes import run

    mendable: list[BaseException] = []

    async def main(stop: asyncio.Event) -> None:
        try:
            await serve(stop)
        except _mendable() as error:
            mendable.append(error)

    status = run(main, settings)
    if mendable:
        raise mendable[0]
    return status


def _changed(settings: Settings, asked: dict[str, dict[str, Any]]) -> Settings:
    """Settings with the options that were given."""
    if sys.stderr.isatty() and not any(name.upper() == "RECOFUSE_LOG__FORMAT" for name in os.environ):
        asked["log"] = {"format": "text"}  # somebody is reading
    return settings.replace(
        **{group: {k: v for k, v in values.items() if v is not None} for group, values in asked.items()}
    )


# the split deployment: front ends and workers around one Redis

QueueUrl = Annotated[
    str | None,
    typer.Option("--queue", metavar="URL", help="The shared queue: redis://HOST, rediss://..., redis+sentinel://..."),
]


def _shared_queue(settings: Settings) -> JobQueue:
    from service.queue.choice import build_queue

    if settings.queue.url == "memory://":
        raise SettingsError(
            "this command shares its queue with other processes: give --queue redis://HOST "
            "or RECOFUSE_QUEUE__URL (or use `recofuse serve`, which needs none)"
        )
    return build_queue(settings.queue)


@app.command()
def api(
    queue: QueueUrl = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(min=-1, max=65535, help="Port for gRPC; 0 picks a free one, -1 turns it off.")
    ] = None,
) -> None:
    """Run a front end alone, HTTP and gRPC; workers take the jobs from the shared queue."""
    from service.command.processes import serve_front_end

    asked: dict[str, dict[str, Any]]
    asked = {"queue": {"url": queue}, "http": {"host": host, "port": port}, "grpc": {"host": host, "port": grpc_port}}
    settings = _changed(_settings(), asked)
    shared = _shared_queue(settings)

    def announce(address: str) -> None:
        err.print(f"serving on {address} - open it in a browser; Ctrl-C stops", markup=False, soft_wrap=True)

    raise typer.Exit(_run(lambda stop: serve_front_end(settings, shared, stop, announce), settings))


@app.command()
def worker(
    queue: QueueUrl = None,
    engine: Annotated[
        str | None, typer.Option(metavar="core|null|fixed", help="The model, or a stand-in that measures the service.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(envvar=WEIGHTS_VARIABLE, metavar="NAME_OR_PATH", help="A shipped model's name or a checkpoint."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="CPU threads of the model; 0: one per core.")] = None,
    codec: Annotated[
        str | None,
        typer.Option(metavar="files|ready", help="ready: answer the uploaded file unread (stand-in engines only)."),
    ] = None,
    metrics_host: Annotated[str | None, typer.Option(help="Address of its own /metrics and /health.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=-1, max=65535, help="Port of them; 0 picks a free one, -1 turns them off.")
    ] = None,
) -> None:
    """Run a worker alone; it serves /metrics, /health/live and /health/ready on a port of its own."""
    from service.command.processes import serve_worker
    from service.work.engine import build_engine

    asked: dict[str, dict[str, Any]] = {
        "queue": {"url": queue},
        "codec": {"kind": codec},
        "engine": {"kind": engine, "model": weights, "device": device, "num_threads": threads},
        "worker": {"metrics_host": metrics_host, "metrics_port": metrics_port},
    }
    settings = _changed(_settings(), asked)
    shared = _shared_queue(settings)

    def announce(address: str) -> None:
        watched = f"; metrics and health on {address}" if address else ""
        err.print(f"working{watched}; Ctrl-C stops", markup=False, soft_wrap=True)

    raise typer.Exit(
        _run(lambda stop: serve_worker(settings, shared, build_engine(settings.engine), stop, announce), settings)
    )


keys_app = typer.Typer(no_args_is_help=True, help="API keys, kept where RECOFUSE_AUTH__KEYS says (docs/security.md).")
app.add_typer(keys_app, name="keys")

Store = Annotated[
    str | None, typer.Option("--store", metavar="file:PATH|redis", help="Where keys are; else RECOFUSE_AUTH__KEYS.")
]


def _with_keys(store: str | None, url: str | None, use: Callable[[KeyStore], Awaitable[None]]) -> None:
    """Open the store of API keys, use it, close it."""
    import asyncio

    from service.command.processes import key_store

    keys = key_store(_changed(_settings(), {"auth": {"keys": store}, "queue": {"url": url}}))

    async def main() -> None:
        try:
            await use(keys)
        finally:
            await keys.close()

    asyncio.run(main())


@keys_app.command(name="create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; shown in lists and in the audit log.")],
    scope: Annotated[
        list[str] | None, typer.Option(metavar="fuse|read", help="What it may do; repeat it for both. Default: both.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0, help="Pictures a second; 0: the server's own limit.")] = 0.0,
    burst: Annotated[int, typer.Option(min=0, help="Pictures at once; 0: what two seconds allow.")] = 0,
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires; never if unset.")] = None,
    store: Store = None,
    queue: QueueUrl = None,
) -> None:
    """Make a key and print it, once: only a hash of it is kept."""
    import time

    from service.access.keys import Scope, new_key

    if wrong := sorted(set(scope or ()) - set(Scope)):
        raise InvalidInputError(f"scope: {', '.join(wrong)} is not one of {', '.join(Scope)}")
    if not name.isprintable() or not 1 <= len(name) <= 64:
        raise InvalidInputError("name: accepted are 1 to 64 printable characters")
    scopes = tuple(Scope(name) for name in dict.fromkeys(scope)) if scope else tuple(Scope)
    expires_s = None if days is None else time.time() + days * 86400
    record, key = new_key(name, scopes=scopes, rate_per_s=rate, burst=burst, expires_s=expires_s)
    _with_keys(store, queue, lambda keys: keys.put(record))
    typer.echo(key)
    err.print(f"key {record.id}: it is shown this once", markup=False, soft_wrap=True)


@keys_app.command(name="list")
def list_keys(
    store: Store = None,
    queue: QueueUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
) -> None:
    """Show the keys, oldest first; their secrets are known to nobody."""
    import json
    import time
    from datetime import UTC, datetime

    def when(seconds: float | None) -> str:
        return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

    async def show(keys: KeyStore) -> None:
        table = Table("id", "name", "scopes", "rate", "created", "expires", "state")
        for key in await keys.all():
            state = "valid" if key.is_valid(time.time()) else "expired" if key.revoked_s is None else "revoked"
            rate = f"{key.rate_per_s:g}/s, {key.burst} at once" if key.rate_per_s else ""
            cells = (key.id, key.name, ", ".join(key.scopes), rate, when(key.created_s), when(key.expires_s), state)
            if as_json:
                names = ("id", "name", "scopes", "rate", "created_at", "expires_at", "state")
                typer.echo(json.dumps(dict(zip(names, cells, strict=True))))
            else:
                table.add_row(*(Text(cell, overflow="fold") for cell in cells))
        if not as_json:
            out.print(table if table.row_count else "no keys")

    _with_keys(store, queue, show)


@keys_app.command(name="revoke")
def revoke_keys(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Key ids, as `list` shows them.")],
    store: Store = None,
    queue: QueueUrl = None,
) -> None:
    """Refuse these keys from now on; servers notice within RECOFUSE_AUTH__CACHE_S."""
    import time
    from dataclasses import replace

    async def revoke(keys: KeyStore) -> None:
        for key_id in ids:
            if (key := await keys.get(key_id)) is None:
                raise InvalidInputError(f"there is no key {key_id}; `recofuse keys list` shows what there is")
            if key.revoked_s is None:
                await keys.put(replace(key, revoked_s=time.time()))
            typer.echo(key_id)

    _with_keys(store, queue, revoke)


letters_app = typer.Typer(no_args_is_help=True, help="Jobs that failed through no fault of their request.")
app.add_typer(letters_app, name="dead-letters")

LetterIds = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Job ids, as `list` shows them.")]
AllLetters = Annotated[bool, typer.Option("--all", help="Every dead letter.")]


def _with_queue(url: str | None, use: Callable[[JobQueue], Awaitable[None]]) -> None:
    """Open the shared queue, use it, close it."""
    import asyncio

    queue = _shared_queue(_changed(_settings(), {"queue": {"url": url}}))

    async def main() -> None:
        await queue.open()
        try:
            await use(queue)
        finally:
            await queue.close()

    asyncio.run(main())


async def _chosen(queue: JobQueue, ids: Sequence[str] | None, is_all: bool) -> list[str]:
    if bool(ids) == is_all:
        raise InvalidInputError("give job ids, or --all")
    return list(ids) if ids else [letter.job.id for letter in await queue.dead_letters(limit=1 << 20)]


@letters_app.command(name="list")
def list_dead_letters(
    queue: QueueUrl = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, oldest first.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
) -> None:
    """Show the dead letters, oldest first."""
    import json
    from datetime import UTC, datetime

    async def show(shared: JobQueue) -> None:
        table = Table("job", "failed", "error", "attempts", "size", "request")
        for letter in await shared.dead_letters(limit=limit):
            failed = datetime.fromtimestamp(letter.failed_s, UTC).isoformat(timespec="seconds")
            job, error = letter.job, f"{letter.error_code}: {letter.error_message}"
            if as_json:
                typer.echo(
                    json.dumps(
                        {
                            "id": job.id,
                            "failed_at": failed,
                            "code": letter.error_code,
                            "message": letter.error_message,
                            "attempts": letter.attempts,
                            "width": job.width,
                            "height": job.height,
                            "size_bytes": job.size_bytes,
                            "request_id": job.request_id,
                        }
                    )
                )
            else:
                cells = (job.id, failed, error, letter.attempts, f"{job.width}x{job.height}", job.request_id)
                table.add_row(*(Text(str(cell), overflow="fold") for cell in cells))
        if not as_json:
            out.print(table if table.row_count else "no dead letters")

    _with_queue(queue, show)


@letters_app.command(name="retry")
def retry_dead_letters(ids: LetterIds = None, queue: QueueUrl = None, is_all: AllLetters = False) -> None:
    """Submit these jobs again, as new ones without a deadline; prints old and new id."""

    async def retry(shared: JobQueue) -> None:
        for job_id in await _chosen(shared, ids, is_all):
            admission = await shared.retry_dead_letter(job_id)
            typer.echo(f"{job_id} {admission.job_id}")

    _with_queue(queue, retry)


@letters_app.command(name="drop")
def drop_dead_letters(ids: LetterIds = None, queue: QueueUrl = None, is_all: AllLetters = False) -> None:
    """Forget these jobs and their images."""

    async def drop(shared: JobQueue) -> None:
        for job_id in await _chosen(shared, ids, is_all):
            await shared.drop_dead_letter(job_id)
            typer.echo(job_id)

    _with_queue(queue, drop)


@app.command(name="settings")
def show_settings(
    as_env: Annotated[bool, typer.Option("--env", help="As the lines of an environment file instead.")] = False,
) -> None:
    """Print every setting of the service with its default and meaning, as a Markdown document."""
    if as_env:
        typer.echo(Settings.as_environment())
        return
    typer.echo(
        "# Settings\n\nWritten by `make docs` from `service/terms/settings.py`. Settings are environment variables; "
        "a misspelt one stops\nstart-up with a message that names the nearest. With `_FILE` behind its name a variable "
        "names a file that holds\nthe value, for secrets. Options of the commands win over them. "
        f"`{WEIGHTS_VARIABLE}` names the weights for every\ncommand, and wins over `RECOFUSE_ENGINE__MODEL`.\n\n"
        f"{Settings.table()}"
    )


# weights


@app.command(name="metrics")
def show_metrics() -> None:
    """Print every metric of the service, as Markdown."""
    from service.watch.metrics import Metrics

    out.print("# Metrics\n\nWritten by `make docs`; docs/observability.md says how to read them.\n", markup=False)
    out.print(Metrics.table(), markup=False, soft_wrap=True)


@app.command()
def info(
    weights: Annotated[
        str,
        typer.Argument(
            envvar=WEIGHTS_VARIABLE, metavar="[NAME_OR_PATH]", help="A shipped model's name or a checkpoint."
        ),
    ] = DEFAULT_WEIGHTS,
    card: Annotated[bool, typer.Option("--card", help="Show a shipped model's card instead.")] = False,
) -> None:
    """Show what a model is: size, defaults, configuration, and where its weights come from."""
    if card:
        out.print(Markdown(_card_of(weights)))
        return
    from recofuse_core import load_pretrained

    model = load_pretrained(weights)
    facts = Table(show_header=False, title=f"{model.info.name} {model.info.version}", title_justify="left")
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("preset", model.info.preset)
    facts.add_row("parameters", f"{model.info.num_parameters:,}")
    facts.add_row("default", f"{model.info.default_sampler}, {model.info.default_steps} steps")
    for group, values in (("config", asdict(model.config)), ("provenance", model.info.provenance)):
        facts.add_section()
        for name, value in _flat(values):
            facts.add_row(Text(f"{group}.{name}"), Text(str(value)))
    out.print(facts)


def _card_of(name: str) -> str:
    path = resources.files("recofuse_core") / "weights" / f"{name}.md"
    if not path.is_file():
        raise InvalidInputError(f"there is no model card for {name}; cards ship with the packaged weights only")
    return path.read_text("utf-8")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@app.command()
def convert(
    fusion: Annotated[Path, typer.Option(help="The published fusion network, ReCoFuse_F.pth.")],
    autoencoder: Annotated[Path, typer.Option(help="The published autoencoder, latent-AE-XY.pth.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint to write, such as paper.safetensors.")],
    generator: Annotated[Path | None, typer.Option(help="The published branches, ReCoFuse_G.pth.")] = None,
    branches: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="VIS.pth IR.pth", help="Two single branches instead of --generator."),
    ] = None,
    name: Annotated[str, typer.Option(help="What the model is called in answers and logs.")] = "paper",
    half: Annotated[bool, typer.Option("--half", help="Store float16: half the size, slightly rounded.")] = False,
) -> None:
    """Turn the authors' published .pth files into one checkpoint; no code in them is run."""
    if (generator is None) == (branches is None):
        raise InvalidInputError("give either --generator or --branches")
    import torch

    from recofuse_core import convert_official

    header = convert_official(
        generator if generator is not None else branches,  # type: ignore[arg-type]  # one of them is there
        fusion,
        autoencoder,
        output,
        name=name,
        dtype=torch.float16 if half else torch.float32,
    )
    out.print(f"wrote {output}: {header.info.num_parameters:,} parameters, {header.checksum}", soft_wrap=True)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Training configuration (TOML), such as configs/compact.toml.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the run; a run found there is resumed.")
    ] = Path("runs/compact"),
    initial: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    first_stage: Annotated[
        str | None, typer.Option(metavar="tone|autoencoder|branches|coupled", help="Skip the stages before this one.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train a model in its stages, and write the checkpoint that every other verb reads.

    Under torchrun every process trains on a share of its own: torchrun --nproc-per-node 4 -m service train CONFIG.
    """
    if first_stage not in (None, *(stages := ("tone", "autoencoder", "branches", "coupled"))):
        raise InvalidInputError(f"first-stage: {first_stage!r} is not one of {', '.join(stages)}")
    if missing := [name for name in ("tensorboard", "tqdm") if importlib.util.find_spec(name) is None]:
        raise InvalidInputError(f"training needs {' and '.join(missing)}: pip install 'recofuse[train]'")
    import torch

    from recofuse_core.training.run import train_from_config

    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if is_group := "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        written = train_from_config(
            config, output, initial=initial, first_stage=cast("Any", first_stage), device=device
        )
    finally:
        if is_group:
            torch.distributed.destroy_process_group()
    out.print(f"wrote {written}", markup=False, soft_wrap=True)


@app.command()
def ablate(
    config: Annotated[Path, typer.Argument(help="Configuration (TOML), such as configs/ablations.toml.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the runs; what is finished there is not run again.")
    ] = Path("runs/ablations"),
    variants: Annotated[
        list[str] | None, typer.Option("--variant", metavar="NAME", help="Only these, such as late; all if unset.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the scores of every run as JSON.")] = None,
    device: Device = "auto",
) -> None:
    """Train and score the paper's ablations under one budget (docs/ablations.md)."""
    import json

    from recofuse_core.runtime import named_device
    from recofuse_core.training import ablations

    def say(line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)

    results = ablations.run_ablations(config, output, variants=variants, device=named_device(device), say=say)
    text = ablations.table(results)
    for path, content in (
        (markdown, text),
        (json_path, json.dumps([asdict(each) for each in results], indent=2) + "\n"),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    out.print(text, markup=False, soft_wrap=True)
    num_seeds = len({each.seed for each in results})
    num_variants = len({each.variant for each in results})
    out.print(f"{len(results)} runs of {num_variants} models with {num_seeds} seeds", soft_wrap=True)


@app.command()
def export(
    pairs: Annotated[Path, typer.Option(help="Root of a data set with labels below it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    task: Annotated[str, typer.Option(metavar="detection|segmentation", help="Which labels, in which layout.")],
    split: Annotated[str | None, typer.Option(help="Only this split: train, val or test.")] = None,
    strength: Annotated[
        str, typer.Option(help="given: the files as they are; light, medium or strong: degraded first.")
    ] = "given",
    seed: Annotated[int, typer.Option(min=0, help="Seed of degradations and noise.")] = 0,
    names: Annotated[str, typer.Option(metavar="NAME,...", help="Class names of YOLO labels, from class 0.")] = "",
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Fuse a labelled data set into one that a detector or a segmenter can be trained on (docs/training.md)."""
    import torch

    from recofuse_core import load_pretrained
    from recofuse_core.data import find_pairs
    from recofuse_core.evaluation.downstream import export_pairs, plan_export
    from recofuse_core.runtime import named_device

    if threads:
        torch.set_num_threads(threads)
    device = named_device(device)
    items = plan_export(pairs, find_pairs(pairs, split=split), cast("Any", task))
    model = load_pretrained(weights, device=device)
    written = export_pairs(
        model,
        items,
        output,
        cast("Any", task),
        root=pairs,
        strength=cast("Any", strength),
        seed=seed,
        names=tuple(filter(None, names.split(","))),
        device=device,
    )
    with _progress() as progress:
        done = list(progress.track(written, total=len(items), description="fusing"))
    num_labels = sum(item.label is not None for item in done)
    out.print(f"wrote {output}: {len(done)} images, {num_labels} with a label", markup=False, soft_wrap=True)


# evaluate


@app.command()
def evaluate(
    pairs: Annotated[Path, typer.Option(help="Folder of clean pairs: vis/ and ir/ below it, or a known data set.")],
    strength: Annotated[
        str, typer.Option(help="Degradations put in: light, medium, strong; clean; given: the files have them already.")
    ] = "medium",
    split: Annotated[str | None, typer.Option(help="Only this split of a data set: train, val or test.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the protocol.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps; the model's own if unset.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="euler, posterior, ode1 or ode2; the model's own if unset.")
    ] = None,
    vis_kinds: Annotated[
        str | None, typer.Option(metavar="KIND,...", help="Put exactly these into vis (docs/degradations.md).")
    ] = None,
    ir_kinds: Annotated[str | None, typer.Option(metavar="KIND,...", help="And these into ir.")] = None,
    coupling: Annotated[str, typer.Option(help="on, or off: each branch restores alone.")] = "on",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N pairs by name.")] = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also score fusion after OpenCV enhancement.")] = False,
    others: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Also score a folder of another method's fused images.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write one line a pair and method.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write bar plots of the means, as SVG.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a sheet of small pictures.")] = None,
    save: Annotated[Path | None, typer.Option(help="Folder for all pictures at full size.")] = None,
    weights: Annotated[
        str, typer.Option(envvar=WEIGHTS_VARIABLE, metavar="NAME_OR_PATH", help="As for fuse; none: run no model.")
    ] = DEFAULT_WEIGHTS,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Score a model, baselines and other methods by the protocol of docs/evaluation.md."""
    import json
    from typing import cast

    import torch

    from recofuse_core import load_pretrained
    from recofuse_core.data import find_pairs, write_image
    from recofuse_core.evaluation import protocol, sheets
    from recofuse_core.evaluation.plots import bar_plots, require_matplotlib, svg
    from recofuse_core.evaluation.report import Report
    from recofuse_core.runtime import named_device

    if coupling not in ("on", "off"):
        raise InvalidInputError(f"coupling must be on or off, not {coupling}")
    if plot is not None and plot.suffix.lower() != ".svg":
        raise InvalidInputError(f"plot: the plots are SVG, so the file must end in .svg, not {plot.name}")
    if plot is not None:
        require_matplotlib()
    folders = {}
    for item in others or ():
        name, separator, folder = item.partition("=")
        if not (name and separator and folder) or name in folders:
            raise InvalidInputError(f"others: expected NAME=DIR, each name once, got {item}")
        folders[name] = Path(folder)
    if threads:
        torch.set_num_threads(threads)
    device = named_device(device)
    files = find_pairs(pairs, split=split)[:limit]
    model = None if weights == "none" else load_pretrained(weights, device=device)
    settings = protocol.EvaluationSettings(
        strength=cast(protocol.EvaluationStrength, strength),
        seed=seed,
        steps=steps,
        sampler=cast(Any, sampler),
        coupled=coupling == "on",
        with_baselines=baselines,
        vis_kinds=None if vis_kinds is None else tuple(filter(None, vis_kinds.split(","))),
        ir_kinds=None if ir_kinds is None else tuple(filter(None, ir_kinds.split(","))),
    )
    scores, rows = [], []
    results = protocol.evaluate(model, files, settings, others=folders, device=device)
    with _progress() as progress:
        for pair_scores, images in progress.track(results, total=len(files), description="evaluating"):
            scores.append(pair_scores)
            if sheet is not None:
                rows.append(sheets.sheet_row(pair_scores.name, images))
            if save is not None:
                for part, image in images.by_part().items():
                    write_image(save / part / f"{pair_scores.name}.png", image)
    report = Report(
        tuple(scores),
        settings,
        weights=model.info.name if model else None,
        version=model.info.version if model else None,
        steps=(steps or model.info.default_steps) if model else None,
        sampler=(sampler or model.info.default_sampler) if model else None,
    )
    texts: dict[Path | None, Callable[[], str]] = {
        json_path: lambda: json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n",
        csv_path: report.csv,
        markdown: report.markdown,
        plot: lambda: svg(bar_plots(report)),
    }
    for path, text in texts.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(), encoding="utf-8")
    if sheet is not None:
        write_image(sheet, sheets.stack_rows(rows))
    out.print(report.markdown(), markup=False, soft_wrap=True)
    out.print(report.line(), markup=False, soft_wrap=True)


# bench

bench = typer.Typer(no_args_is_help=True, help="Measure; the tools are in the source tree's benchmarks folder.")
app.add_typer(bench, name="bench")


@bench.command(name="service")
def bench_service(
    quick: Annotated[bool, typer.Option("--quick", help="Windows of a second, for a first look.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """What the service costs without the model: real servers with stand-in engines under load from 1 to 32 clients."""
    _need_source_tree()
    from benchmarks import service as measured

    window_s, warm_up_s = (1.0, 0.5) if quick else (6.0, 1.5)
    outcome = measured.run(window_s=window_s, warm_up_s=warm_up_s, json_path=json_path, say=typer.echo)
    if outcome.num_failed:
        raise typer.Exit(1)


@bench.command(name="streams")
def bench_streams(
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes and short windows, for a first look.")] = False,
    model: Annotated[bool, typer.Option("--model/--no-model", help="Also measure one stream with the model.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """What a stream's frame costs at each resolution, without the model and with it."""
    _need_source_tree()
    from benchmarks import streams

    streams.run(is_quick=quick, with_model=model, json_path=json_path, say=typer.echo)


@bench.command(name="codec")
def bench_codec(
    repeats: Annotated[int, typer.Option(min=1, help="Times that each setting is tried.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """What reading a pair costs, and what PNG settings cost and bring: processor time and size of answers."""
    _need_source_tree()
    from benchmarks import codec

    codec.run(repeats=repeats, json_path=json_path, say=typer.echo)


@bench.command(name="engine")
def bench_engine(
    quick: Annotated[bool, typer.Option("--quick", help="640x480 alone, for a first look.")] = False,
    preset: Annotated[
        list[str] | None, typer.Option(help="paper (random weights), compact; may be repeated. Both if unset.")
    ] = None,
    device: Device = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the model.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write one line a measurement.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Write a chart (SVG).")] = None,
) -> None:
    """The model against the straightforward implementation, one improvement after the other."""
    _need_source_tree()
    from benchmarks import engine as measured
    from recofuse_core import PRESETS

    if unknown := set(preset or ()) - set(PRESETS):
        raise InvalidInputError(f"preset: {', '.join(sorted(unknown))} is none of {', '.join(PRESETS)}")
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
    _need_source_tree()
    import torch

    from benchmarks import steps as measured

    if threads:
        torch.set_num_threads(threads)
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


@bench.command(name="kept")
def bench_kept(
    images: Annotated[int, typer.Option(min=1, help="Pairs through each way.")] = 12,
    clients: Annotated[int, typer.Option(min=1, help="Requests in flight at once.")] = 4,
    device: Device = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the model.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """How much of the engine's throughput the service keeps with the real model."""
    _need_source_tree()
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
    _need_source_tree()
    import torch

    from benchmarks import warm_start

    if threads:
        torch.set_num_threads(threads)
    warm_start.run(weights=weights, is_quick=quick, json_path=json_path, say=typer.echo)


def _need_source_tree() -> None:
    if importlib.util.find_spec("benchmarks") is None:
        raise InvalidInputError("bench needs the source tree: run it from a checkout of recofuse")


# demo


@app.command()
def sample(
    output: Annotated[Path, typer.Argument(help="Folder for vis.png and ir.png.")],
    seed: Annotated[int, typer.Option(min=0, help="Which street.")] = 7,
    vis: Annotated[str, typer.Option(help="What is done to vis, comma-separated.")] = "low_light,gaussian_noise",
    ir: Annotated[str, typer.Option(help="What is done to ir.")] = "low_contrast,stripes,gaussian_noise",
    degradation_seed: Annotated[int, typer.Option(min=0, help="How exactly.")] = 3,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT.")] = "640x480",
) -> None:
    """Write a generated, degraded pair: something to try the other commands on."""
    from recofuse_core.degradations.recipes import IrKind, VisKind
    from service.command.demo import SampleRecipe, write_sample

    kinds = []
    for name, given, known in (("vis", vis, tuple(VisKind)), ("ir", ir, tuple(IrKind))):
        chosen = tuple(filter(None, given.split(",")))
        if unknown := set(chosen) - set(known):
            raise InvalidInputError(f"{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
        kinds.append(chosen)
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 64 and len(size) <= 9):
        raise InvalidInputError(f"size: expected WIDTHxHEIGHT with sides of 64 px and more, got {size}")
    recipe = SampleRecipe(seed, degradation_seed, kinds[0], kinds[1], int(width), int(height))
    output.mkdir(parents=True, exist_ok=True)
    vis_path, ir_path, _ = write_sample(output, recipe, _settings().codec)
    out.print(f"wrote {vis_path} and {ir_path}", soft_wrap=True)


@app.command(name="simulate-cameras")
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

    from service.command.cameras import CameraPlan, render_loop, simulate
    from service.command.demo import free_port, server_process
    from service.watch.metrics import FlowMode

    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 64 and len(size) <= 9):
        raise InvalidInputError(f"size: expected WIDTHxHEIGHT with sides of 64 px and more, got {size}")
    for name, value, known in (
        ("mode", mode, ("latest", "all")),
        ("encoding", encoding, ("jpeg", "raw")),
        ("format", answer, ("jpeg", "png", "webp", "raw")),
    ):
        if value not in known:
            raise InvalidInputError(f"{name}: {value} is none of {', '.join(known)}")
    plan = CameraPlan(
        num_streams=streams,
        fps=fps,
        seconds=seconds,
        mode=FlowMode(mode),
        size=(int(width), int(height)),
        encoding=cast("Any", encoding),
        answer=cast("Any", answer),
        steps=steps,
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


@app.command()
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
    from service.command.demo import free_port, server_process

    for name, value, known in (("mode", mode, ("all", "latest", None)), ("part", part, ("fused", "vis", "ir"))):
        if value not in known:
            raise InvalidInputError(f"{name}: {value} is none of {', '.join(filter(None, known))}")
    is_fresh = realtime or video.is_live_pair(vis, ir)
    chosen = cast("Any", mode or ("latest" if is_fresh else "all"))
    with contextlib.ExitStack() as stack:
        # Both end it in order; a shell that starts it in the background has turned SIGINT off.
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        pairs, source_fps = video.read_pairs(vis, ir, realtime=realtime)
        sinks: list[live.Sink] = []
        if output is not None:
            sinks.append(video.Recorder(output, fps or source_fps))
        if show:
            viewer = video.Viewer()
            sinks.append(viewer)
            err.print(f"showing on {viewer.url}", markup=False, soft_wrap=True)
        if target is None:
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
            options={
                "output": cast("Any", part),
                "steps": steps,
                "seed": seed,
                "vis_range": vis_range,
                "ir_range": ir_range,
            },
            say=lambda so_far: None if status is None else status.update(so_far.line),
            warn=complain,
            max_frames=frames,
        )
    if json_path is not None:
        json_path.write_text(json.dumps(report.figures, indent=2) + "\n", encoding="utf-8")
    if report.last_error:
        complain(f"the last frame that failed: {report.last_error}")
    written = f"; wrote {output}" if output is not None and report.stats.fused else ""
    if report.ir_source not in ("grey", ""):
        out.print(f"infrared read: {SOURCES[report.ir_source]}", markup=False, soft_wrap=True)
    out.print(f"{'stopped; ' if report.is_interrupted else ''}{report.line}{written}", markup=False, soft_wrap=True)
    if not report.stats.fused:
        raise typer.Exit(1)


@app.command()
def demo(
    vis: Annotated[Path | None, typer.Option(help="Your own visible image; a generated pair if unset.")] = None,
    ir: Annotated[Path | None, typer.Option(help="Your own infrared image of the same view.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the pictures.")] = Path("demo"),
    weights: Weights = DEFAULT_WEIGHTS,
) -> None:
    """Start a server on a free loopback port, fuse one pair through it, and stop it again."""
    from service.command.demo import run_demo

    if (vis is None) != (ir is None):
        raise InvalidInputError("give both --vis and --ir, or neither")
    result = run_demo(output, weights, _settings(), own_pair=None if vis is None or ir is None else (vis, ir))
    for warning in result.warnings:
        complain(warning)
    table = Table(show_header=False, box=None)
    for label, value in (
        ("fused picture", result.fused),
        ("side by side", result.sheet),
        ("server log", result.server_log),
        ("model", result.model),
        ("time", result.server_timing),
        ("infrared read", SOURCES.get(result.ir_source, "") if result.ir_source != "grey" else ""),
    ):
        if not value:
            continue
        table.add_row(label, Text(str(value), overflow="fold"))
    out.print(table)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="recofuse")
