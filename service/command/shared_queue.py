"""The queue that several processes share: how verbs are told which, and how they get it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from service.terms.settings import Settings, SettingsError

if TYPE_CHECKING:
    from service.queue.contract import JobQueue

QueueUrl = Annotated[
    str | None,
    typer.Option("--queue", metavar="URL", help="The shared queue: redis://HOST, rediss://..., redis+sentinel://..."),
]


def shared_queue(settings: Settings) -> JobQueue:
    """The queue that the settings name. Raises SettingsError if no other process could reach it."""
    from service.queue.choice import build_queue

    if settings.queue.url == "memory://":
        raise SettingsError(
            "this command shares its queue with other processes: give --queue redis://HOST "
            "or RECOFUSE_QUEUE__URL (or use `recofuse serve`, which needs none)"
        )
    return build_queue(settings.queue)
