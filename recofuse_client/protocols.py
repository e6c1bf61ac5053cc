"""What a way of talking to a server offers: operations (`recofuse_client.retries`) that send its kind of request.

`HttpProtocol` and `GrpcProtocol` say how a call is put and what its answer means; neither opens a connection. The
connections in the same files do that, one that blocks and one that awaits for each.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from recofuse_client.errors import NotFinishedError
from recofuse_client.pictures import ImageLike
from recofuse_client.retries import Deadline, Operation, Pause, Retry, poll_pauses_s, retried
from recofuse_client.values import Fusion, Health, Job, Model, Options, Rig

Request = TypeVar("Request")
Prepared = TypeVar("Prepared")

SCHEMES: dict[str, tuple[Literal["http", "grpc"], bool]] = {  # protocol, TLS
    "http": ("http", False),
    "https": ("http", True),
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
}
CONNECT_TIMEOUT_S = 5.0
_PRINTABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the server is and how to reach it. address: host:port, and for HTTP a path below which the API lies.

    ca: file of the authorities to trust in place of the system's; cert, key: this client's own (mutual TLS). All PEM.
    """

    kind: Literal["http", "grpc"]
    address: str
    has_tls: bool
    api_key: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""
    trust_env: bool = False

    @classmethod
    def of(cls, url: str, **options: Any) -> Target:
        """The target of a URL, such as https://fusion.example or grpc://localhost:8001. Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or not parts.netloc or parts.query or parts.fragment:
            accepted = ", ".join(f"{name}://HOST:PORT" for name in SCHEMES)
            raise ValueError(f"{url!r} is no address of a server; accepted are {accepted}")
        kind, has_tls = SCHEMES[parts.scheme]
        if kind == "grpc" and parts.path.strip("/"):
            raise ValueError(f"{url!r}: gRPC knows no path, only HOST:PORT")
        if bool(options.get("cert")) != bool(options.get("key")):
            raise ValueError("give both cert and key, or neither")
        if not has_tls and (options.get("ca") or options.get("cert")):
            raise ValueError(f"{url!r}: certificates need https:// or grpcs://")
        if (api_key := options.get("api_key")) and not _PRINTABLE.fullmatch(api_key):
            # Its value is a secret. Most often this is a file's last line end.
            raise ValueError("api_key: accepted are printable ASCII characters, without spaces and line ends")
        address = parts.netloc + (parts.path.rstrip("/") if kind == "http" else "")
        return cls(kind=kind, address=address, has_tls=has_tls, **options)

    def tls_files(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The contents of ca, key and cert, each None if it is not set. Raises OSError."""
        ca, key, cert = (Path(name).read_bytes() if name else None for name in (self.ca, self.key, self.cert))
        return ca, key, cert


class ApiProtocol(Protocol, Generic[Request, Prepared]):
    """One attempt of each call. timeout_s: what remains for it, seconds. All raise RecofuseError."""

    def prepare(self, vis: ImageLike, ir: ImageLike, *, bgr: bool) -> Prepared:
        """A pair as it will be sent. Reads files and encodes pixels, so that an awaiting client calls it in a thread.

        Raises OSError, TypeError and ValueError for what is no image.
        """

    def fuse(self, pair: Prepared, options: Options, key: str | None, timeout_s: float) -> Operation[Request, Fusion]:
        """Fuse and wait."""

    def submit(
        self, pair: Prepared, options: Options, key: str, job_timeout_s: float | None, timeout_s: float
    ) -> Operation[Request, Job]:
        """Accept a job."""

    def job(self, job_id: str, timeout_s: float) -> Operation[Request, Job]:
        """Where a job stands."""

    def result(self, job_id: str, timeout_s: float) -> Operation[Request, Fusion]:
        """A finished job's pictures."""

    def cancel(self, job_id: str, timeout_s: float) -> Operation[Request, Job]:
        """Cancel a job."""

    def models(self, timeout_s: float) -> Operation[Request, list[Model]]:
        """What is being served."""

    def rigs(self, timeout_s: float) -> Operation[Request, list[Rig]]:
        """The rigs that there are."""

    def health(self, timeout_s: float) -> Operation[Request, Health]:
        """Whether new work is welcome."""


def _check_key(idempotency_key: str | None) -> None:
    if idempotency_key and (len(idempotency_key) > 255 or not _PRINTABLE.fullmatch(idempotency_key)):
        raise ValueError("idempotency_key: accepted are 1 to 255 printable ASCII characters without spaces")


class Calls(Generic[Request, Prepared]):
    """The calls of a client as operations: a protocol's attempts, with retries and deadlines around them."""

    def __init__(self, protocol: ApiProtocol[Request, Prepared], retry: Retry, timeout_s: float) -> None:
        self._protocol = protocol
        self._retry = retry
        self._timeout_s = timeout_s

    def prepare(self, vis: ImageLike, ir: ImageLike, *, bgr: bool) -> Prepared:
        """See ApiProtocol."""
        return self._protocol.prepare(vis, ir, bgr=bgr)

    def fuse(
        self, pair: Prepared, options: Options, idempotency_key: str | None, timeout_s: float | None
    ) -> Operation[Request, Fusion]:
        """Fuse and wait; repeated after a lost connection only under an idempotency key."""
        _check_key(idempotency_key)
        return retried(
            lambda rest_s: self._protocol.fuse(pair, options, idempotency_key, rest_s),
            self._retry,
            self._deadline(timeout_s),
            is_idempotent=idempotency_key is not None,
        )

    def submit(
        self,
        pair: Prepared,
        options: Options,
        idempotency_key: str | None,
        job_timeout_s: float | None,
        timeout_s: float | None,
    ) -> Operation[Request, Job]:
        """Accept a job; always under a key, so that no lost answer makes two jobs of one."""
        _check_key(idempotency_key)
        key = idempotency_key or secrets.token_hex(16)
        return retried(
            lambda rest_s: self._protocol.submit(pair, options, key, job_timeout_s, rest_s),
            self._retry,
            self._deadline(timeout_s),
            is_idempotent=True,
        )

    def job(self, job_id: str, timeout_s: float | None) -> Operation[Request, Job]:
        """Where a job stands."""
        return self._read(lambda rest_s: self._protocol.job(job_id, rest_s), timeout_s)

    def result(self, job_id: str, timeout_s: float | None) -> Operation[Request, Fusion]:
        """A finished job's pictures."""
        return self._read(lambda rest_s: self._protocol.result(job_id, rest_s), timeout_s)

    def wait(self, job_id: str, timeout_s: float | None) -> Operation[Request, Fusion]:
        """A job's pictures, once it has finished."""
        deadline = self._deadline(timeout_s)
        for pause_s in poll_pauses_s():
            try:
                return (
                    yield from retried(
                        lambda rest_s: self._protocol.result(job_id, rest_s), self._retry, deadline, is_idempotent=True
                    )
                )
            except NotFinishedError:
                yield Pause(min(pause_s, deadline.remaining_s()))
        raise AssertionError("pauses never end")

    def cancel(self, job_id: str, timeout_s: float | None) -> Operation[Request, Job]:
        """Cancel a job; one that has ended stays as it is, so this may be repeated."""
        return self._read(lambda rest_s: self._protocol.cancel(job_id, rest_s), timeout_s)

    def models(self, timeout_s: float | None) -> Operation[Request, list[Model]]:
        """What is being served."""
        return self._read(self._protocol.models, timeout_s)

    def rigs(self, timeout_s: float | None) -> Operation[Request, list[Rig]]:
        """The rigs that there are."""
        return self._read(self._protocol.rigs, timeout_s)

    def health(self, timeout_s: float | None) -> Operation[Request, Health]:
        """Whether new work is welcome now; never tried again, because what it tells is the present."""
        return self._protocol.health(self._deadline(timeout_s).remaining_s())

    def _read(self, attempt: Any, timeout_s: float | None) -> Operation[Request, Any]:
        return retried(attempt, self._retry, self._deadline(timeout_s), is_idempotent=True)

    def _deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline(self._timeout_s if timeout_s is None else timeout_s)
