"""`recofuse dead-letters`: jobs that failed through no fault of their request are shown, tried again or forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from service.command.environment import read_settings
from service.command.shared_queue import QueueUrl, shared_queue
from service.command.terminal import out
from service.terms.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service.queue.contract import JobQueue

dead_letters = typer.Typer(no_args_is_help=True, help="Jobs that failed through no fault of their request.")

LetterIds = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Job ids, as `list` shows them.")]
AllLetters = Annotated[bool, typer.Option("--all", help="Every dead letter.")]


def _with_queue(url: str | None, use: Callable[[JobQueue], Awaitable[None]]) -> None:
    """Open the shared queue, use it, close it."""
    import asyncio

    queue = shared_queue(read_settings({"queue": {"url": url}}))

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


@dead_letters.command(name="list")
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


@dead_letters.command(name="retry")
def retry_dead_letters(ids: LetterIds = None, queue: QueueUrl = None, is_all: AllLetters = False) -> None:
    """Submit these jobs again, as new ones without a deadline; prints old and new id."""

    async def retry(shared: JobQueue) -> None:
        for job_id in await _chosen(shared, ids, is_all):
            admission = await shared.retry_dead_letter(job_id)
            typer.echo(f"{job_id} {admission.job_id}")

    _with_queue(queue, retry)


@dead_letters.command(name="drop")
def drop_dead_letters(ids: LetterIds = None, queue: QueueUrl = None, is_all: AllLetters = False) -> None:
    """Forget these jobs and their images."""

    async def drop(shared: JobQueue) -> None:
        for job_id in await _chosen(shared, ids, is_all):
            await shared.drop_dead_letter(job_id)
            typer.echo(job_id)

    _with_queue(queue, drop)
