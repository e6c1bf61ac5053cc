"""API keys: their records, and where these are kept.

A key is `rf_ID_SECRET`. The id is public (logs show it); of the secret only a salted scrypt hash is kept, so whoever
reads the store cannot call.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from service.terms.errors import UnavailableError
from service.terms.settings import SettingsError

logger = logging.getLogger(__name__)

SCRYPT = {"n": 1 << 14, "r": 8, "p": 1, "dklen": 32}  # 16 MiB and some 50 ms for each guess
FILE_VERSION = 1

PRESENTED = re.compile(r"rf_(?P<id>[0-9a-f]{12})_(?P<secret>[0-9A-Za-z_-]{43})")  # as `new_key` makes them


class Scope(StrEnum):
    """What a key may do. fuse: submit and cancel work; read: see jobs, results and models."""

    FUSE = "fuse"
    READ = "read"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key. salt, digest: hexadecimal; rate_per_s: 0 for no limit; times: Unix seconds."""

    id: str
    name: str
    salt: str
    digest: str
    scopes: tuple[Scope, ...]
    rate_per_s: float
    burst: int
    created_s: float
    expires_s: float | None = None
    revoked_s: float | None = None

    def is_valid(self, now_s: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_s is None and (self.expires_s is None or now_s < self.expires_s)

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> ApiKey:
        """Raises ValueError."""
        try:
            values = json.loads(text)
            return cls(**{**values, "scopes": tuple(Scope(scope) for scope in values["scopes"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a key's record: {error}") from error


def new_key(
    name: str,
    *,
    scopes: tuple[Scope, ...] = tuple(Scope),
    rate_per_s: float = 0.0,
    burst: int = 0,
    expires_s: float | None = None,
    now_s: float | None = None,
) -> tuple[ApiKey, str]:
    """A fresh key's record, and the key itself, which is kept nowhere. burst: 0 for what two seconds allow."""
    key_id, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_bytes(16)
    record = ApiKey(
        id=key_id,
        name=name,
        salt=salt.hex(),
        digest=_digest(secret, salt).hex(),
        scopes=scopes,
        rate_per_s=rate_per_s,
        burst=burst or max(1, round(2 * rate_per_s)),
        created_s=time.time() if now_s is None else now_s,
        expires_s=expires_s,
    )
    return record, f"rf_{key_id}_{secret}"


def _digest(secret: str, salt: bytes) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=salt, **SCRYPT)


def is_secret_of(key: ApiKey, secret: str) -> bool:
    """Whether this is the key's secret: slow on purpose, and equally long for right and wrong."""
    return hmac.compare_digest(_digest(secret, bytes.fromhex(key.salt)), bytes.fromhex(key.digest))


# where keys are kept


class KeyStore(Protocol):
    """Records of keys by id. Every method raises UnavailableError while the store cannot be used."""

    async def get(self, key_id: str) -> ApiKey | None:
        """The record, None if there is none."""

    async def all(self) -> list[ApiKey]:
        """Every record, oldest first."""

    async def put(self, key: ApiKey) -> None:
        """Add a record, or replace the one of the same id."""

    async def close(self) -> None:
        """Let go of connections."""


class FileKeys:
    """Keys in a JSON file that only its owner may read. A missing file holds no keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, ApiKey] = {}

    async def get(self, key_id: str) -> ApiKey | None:
        """See KeyStore."""
        return (await asyncio.to_thread(self._load)).get(key_id)

    async def all(self) -> list[ApiKey]:
        """See KeyStore."""
        return sorted((await asyncio.to_thread(self._load)).values(), key=lambda key: key.created_s)

    async def put(self, key: ApiKey) -> None:
        """See KeyStore. Raises OSError if the file cannot be written."""
        await asyncio.to_thread(self._write, key)

    async def close(self) -> None:
        """See KeyStore."""

    def _load(self) -> dict[str, ApiKey]:
        try:
            status = self._path.stat()
            if (seen := (status.st_mtime_ns, status.st_ino, status.st_size)) != self._seen:
                document = json.loads(self._path.read_text("utf-8"))
                if document["version"] != FILE_VERSION:
                    raise ValueError(f"version {document['version']} is not {FILE_VERSION}")
                self._keys = {key.id: key for key in map(ApiKey.from_json, map(json.dumps, document["keys"]))}
                self._seen = seen
        except FileNotFoundError:
            self._keys, self._seen = {}, None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.error("the file of API keys cannot be read", extra={"path": str(self._path), "error": str(error)})
            raise UnavailableError("API keys cannot be checked at the moment", retry_after_s=5.0) from error
        return self._keys

    def _write(self, key: ApiKey) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_name(f"{self._path.name}.lock").open("w") as lock:  # two writers lose nothing
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = {**self._load(), key.id: key}
            document = {"version": FILE_VERSION, "keys": [asdict(kept) for kept in keys.values()]}
            fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
                json.dump(document, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            fresh.replace(self._path)


def file_of(where: str) -> Path | None:
    """The path of a `file:` store, None for any other. Raises SettingsError."""
    if not where.startswith("file:"):
        return None
    if not (path := where.removeprefix("file:")):
        raise SettingsError("auth.keys: file: needs a path, such as file:/etc/recofuse/keys.json")
    return Path(path)
