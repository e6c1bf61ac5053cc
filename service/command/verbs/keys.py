"""`recofuse keys`: API keys are made, shown and revoked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from service.command.environment import read_settings
from service.command.shared_queue import QueueUrl
from service.command.terminal import err, out
from service.terms.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service.access.keys import KeyStore

keys = typer.Typer(no_args_is_help=True, help="API keys, kept where RECOFUSE_AUTH__KEYS says (docs/security.md).")

Store = Annotated[
    str | None, typer.Option("--store", metavar="file:PATH|redis", help="Where keys are; else RECOFUSE_AUTH__KEYS.")
]


def _with_keys(store: str | None, url: str | None, use: Callable[[KeyStore], Awaitable[None]]) -> None:
    """Open the store of API keys, use it, close it."""
    import asyncio

    from service.access.choice import build_keys

    keys = build_keys(read_settings({"auth": {"keys": store}, "queue": {"url": url}}))

    async def main() -> None:
        try:
            await use(keys)
        finally:
            await keys.close()

    asyncio.run(main())


@keys.command(name="create")
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


@keys.command(name="list")
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


@keys.command(name="revoke")
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
