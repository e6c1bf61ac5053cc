"""HTTP: forms out, pictures, JSON and problem documents (RFC 9457) back."""

from __future__ import annotations

import asyncio
import io
import json
import re
import ssl
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar, cast
from urllib.parse import unquote

import httpx

from recofuse_client.errors import (
    BadAnswerError,
    ConnectionFailedError,
    ConnectionLostError,
    InternalError,
    MalformedRequestError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RecofuseError,
    RouteNotFoundError,
    TimedOutError,
    UnauthenticatedError,
    UnavailableError,
    error_of,
)
from recofuse_client.pictures import ImageLike, file_of, npy_pixels
from recofuse_client.protocols import CONNECT_TIMEOUT_S, Target
from recofuse_client.retries import Deadline, Operation, Send
from recofuse_client.values import (
    Alarm,
    Alignment,
    Fusion,
    Health,
    Job,
    JobStatus,
    Model,
    Options,
    Part,
    Picture,
    Region,
    Rig,
    Timings,
    Values,
    ir_source_of,
    unit_of,
)

Listed = TypeVar("Listed", Model, Rig)

CHUNK_BYTES = 256 * 1024  # of a body, between two looks at the clock
NPY = "application/x-npy"
# What an answer that is no problem document may mean, by its status: it comes from a proxy in between. What a proxy
# could not forward or waited for in vain (502, 504) may have been carried out.
_OF_PROXIES: dict[int, type[RecofuseError]] = {
    401: UnauthenticatedError,
    403: PermissionDeniedError,
    404: RouteNotFoundError,
    413: PayloadTooLargeError,
    429: OverloadedError,
    500: InternalError,
    502: ConnectionLostError,
    503: UnavailableError,
    504: ConnectionLostError,
}


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request without its server. files, fields: of a form; without them there is no body."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)


FilePair = tuple[bytes, bytes]


class HttpProtocol:
    """How each call is put, and what its answer means. See `recofuse_client.protocols.ApiProtocol`."""

    def prepare(self, vis: ImageLike, ir: ImageLike, *, bgr: bool) -> FilePair:
        """Both images as files."""
        return file_of(vis, "vis", bgr=bgr), file_of(ir, "ir", bgr=bgr)

    def fuse(
        self, pair: FilePair, options: Options, key: str | None, timeout_s: float
    ) -> Operation[HttpRequest, Fusion]:
        """POST /v1/fuse; the server, too, is told when nobody waits any more."""
        headers = {} if key is None else {"Idempotency-Key": key}
        answer = yield Send(_form(pair, options, headers, timeout_s), timeout_s)
        return _fusion(_checked(answer))

    def submit(
        self, pair: FilePair, options: Options, key: str, job_timeout_s: float | None, timeout_s: float
    ) -> Operation[HttpRequest, Job]:
        """POST /v1/fuse with Prefer: respond-async."""
        headers = {"Idempotency-Key": key, "Prefer": "respond-async"}
        answer = yield Send(_form(pair, options, headers, job_timeout_s), timeout_s)
        return _job(_checked(answer))

    def job(self, job_id: str, timeout_s: float) -> Operation[HttpRequest, Job]:
        """GET /v1/jobs/{id}."""
        return _job(_checked((yield Send(HttpRequest("GET", f"/v1/jobs/{_segment(job_id)}"), timeout_s))))

    def result(self, job_id: str, timeout_s: float) -> Operation[HttpRequest, Fusion]:
        """GET /v1/jobs/{id}/result."""
        answer = yield Send(HttpRequest("GET", f"/v1/jobs/{_segment(job_id)}/result"), timeout_s)
        return _fusion(_checked(answer))

    def cancel(self, job_id: str, timeout_s: float) -> Operation[HttpRequest, Job]:
        """DELETE /v1/jobs/{id}."""
        return _job(_checked((yield Send(HttpRequest("DELETE", f"/v1/jobs/{_segment(job_id)}"), timeout_s))))

    def models(self, timeout_s: float) -> Operation[HttpRequest, list[Model]]:
        """GET /v1/models."""
        document = _json(_checked((yield Send(HttpRequest("GET", "/v1/models"), timeout_s))))
        return _listed(document, "models", Model)

    def rigs(self, timeout_s: float) -> Operation[HttpRequest, list[Rig]]:
        """GET /v1/rigs."""
        document = _json(_checked((yield Send(HttpRequest("GET", "/v1/rigs"), timeout_s))))
        return _listed(document, "rigs", Rig)

    def health(self, timeout_s: float) -> Operation[HttpRequest, Health]:
        """GET /health/ready, whose 503 is an answer and no failure."""
        answer = yield Send(HttpRequest("GET", "/health/ready"), timeout_s)
        if answer.status_code == 503 and answer.headers.get("content-type", "").startswith("application/json"):
            return Health(False, str(_json(answer).get("reason", "")))
        document = _json(_checked(answer))
        return Health(document.get("status") == "ready", str(document.get("reason", "")))


def _listed(document: dict[str, Any], name: str, kind: type[Listed]) -> list[Listed]:
    """What a list of a document tells. Raises BadAnswerError."""
    known = [field.name for field in fields(kind)]  # a newer server may tell more, an older one less

    def entry_of(told: dict[str, Any]) -> Listed:
        known_values = ((name, told[name]) for name in known if name in told)
        values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in known_values}
        return kind(**values)

    try:
        return [entry_of(told) for told in document[name]]
    except (KeyError, TypeError) as error:
        raise BadAnswerError(f"the list of {name} cannot be understood") from error


def _segment(job_id: str) -> str:
    """A job's id as part of an address. Raises ValueError for what is none."""
    if not job_id or not all(letter.isalnum() or letter in "_-" for letter in job_id) or not job_id.isascii():
        raise ValueError(f"{job_id!r} is no id of a job")
    return job_id


def _form(pair: FilePair, options: Options, headers: dict[str, str], timeout_s: float | None) -> HttpRequest:
    values: dict[str, object] = {
        "output": options.output,
        "format": "npy" if options.format == "array" else options.format,
        "steps": options.steps,
        "sampler": options.sampler,
        "exposure": options.exposure,
        "rig": options.rig,
        "align": None if options.align == "rig" else options.align,
        "colour": None if options.colour == "natural" else options.colour,  # older servers know no colours
        "colour_range": _range_text(options.colour_range),
        "values": options.values,
        "degrees": _range_text(options.degrees),
        "alarm": options.alarm,
        "outline": "true" if options.outline else None,
        "metadata": None if options.metadata == "drop" else options.metadata,
        "seed": options.seed,
        "vis_range": _range_text(options.vis_range),
        "ir_range": _range_text(options.ir_range),
        "priority": options.priority,
        "timeout_ms": None if timeout_s is None else max(1, round(timeout_s * 1000)),
    }
    texts = {name: str(value) for name, value in values.items() if value is not None}
    return HttpRequest("POST", "/v1/fuse", headers, {"vis": pair[0], "ir": pair[1]}, texts)


def _range_text(given: tuple[float, float] | None) -> str | None:
    return None if given is None else "{:.17g},{:.17g}".format(*given)


def _checked(answer: httpx.Response) -> httpx.Response:
    """The answer, if it is one of success. Raises the error that it is otherwise."""
    if answer.is_success:
        return answer
    request_id, advice_s = answer.headers.get("x-request-id", ""), _retry_after_s(answer)
    if answer.headers.get("content-type", "").startswith("application/problem+json"):
        document = _json(answer)
        code, detail = str(document.get("code", "")), str(document.get("detail", ""))
        if answer.status_code == 502 and code == ConnectionLostError.code:  # as recofuse's own proxy says it
            raise ConnectionLostError(detail, request_id=request_id, retry_after_s=advice_s)
        raise error_of(code, detail, request_id=request_id, retry_after_s=advice_s)
    kind = _OF_PROXIES.get(answer.status_code, BadAnswerError)
    message = f"an answer with status {answer.status_code} that is not from recofuse, maybe from a proxy before it"
    raise kind(message, request_id=request_id, retry_after_s=advice_s)


def _retry_after_s(answer: httpx.Response) -> float | None:
    """Retry-After in seconds, from now; None if it is absent or cannot be read."""
    value = answer.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _json(answer: httpx.Response) -> dict[str, Any]:
    try:
        document = json.loads(answer.content)
    except ValueError as error:
        raise BadAnswerError("an answer that should be JSON cannot be read") from error
    if not isinstance(document, dict):
        raise BadAnswerError("an answer that should be a JSON object is none")
    return document


def _job(answer: httpx.Response) -> Job:
    document = _json(answer)

    def time_of(name: str) -> datetime | None:
        return None if document.get(name) is None else datetime.fromisoformat(document[name])

    try:
        error = document.get("error")
        created_at = datetime.fromisoformat(document["created_at"])
        return Job(
            id=document["id"],
            status=JobStatus(document["status"]),
            priority=document["priority"],
            attempts=document["attempts"],
            created_at=created_at,
            deadline_at=time_of("deadline_at"),
            finished_at=time_of("finished_at"),
            error=error and error_of(error["code"], error["message"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswerError("the description of a job cannot be understood") from error


def _fusion(answer: httpx.Response) -> Fusion:
    media_type, values, alarm = answer.headers.get("content-type", ""), None, None
    if media_type == "application/zip":
        pictures, values, alarm = _unzipped(answer.content)
    elif media_type == NPY or media_type.startswith("image/"):
        try:
            part = Part(answer.headers.get("x-picture", Part.FUSED))
        except ValueError as error:
            raise BadAnswerError("the answer is a picture of an unknown kind") from error
        pictures = {part: _picture(part, media_type, answer.content)}
    else:
        raise BadAnswerError(f"an answer of {media_type or 'no type'} is no picture")
    return Fusion(
        pictures=pictures,
        model_name=unquote(answer.headers.get("x-model-name", "")),
        model_version=unquote(answer.headers.get("x-model-version", "")),
        timings=_timings(answer.headers.get("server-timing", "")),
        job_id=answer.headers.get("x-job-id", ""),
        request_id=answer.headers.get("x-request-id", ""),
        ir_source=ir_source_of(answer.headers.get("x-infrared-source", "")),
        warnings=tuple(unquote(line) for line in answer.headers.get_list("x-warning", split_commas=True) if line),
        values=values,
        alarm=alarm,
        alignment=_alignment(answer.headers.get("x-alignment", "")),
    )


def _picture(part: Part, media_type: str, content: bytes) -> Picture:
    return Picture(part, "", npy_pixels(content)) if media_type == NPY else Picture(part, media_type, content)


def _unzipped(content: bytes) -> tuple[dict[Part, Picture], Values | None, Alarm | None]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            description = json.loads(archive.read("result.json"))
            files = {Part(part): archive.read(name) for part, name in description["files"].items()}
            values = None
            if (told := description.get("values")) is not None:
                values = Values(told["media_type"], unit_of(told["unit"]), archive.read(told["file"]))
        pictures = {part: _picture(part, description["media_type"], file) for part, file in files.items()}
        return pictures, values, None if description.get("alarm") is None else _alarm(description["alarm"])
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise BadAnswerError("the archive of pictures cannot be read") from error


def _alarm(told: dict[str, Any]) -> Alarm:
    """Raises KeyError, TypeError and ValueError for what is none."""
    regions = [
        Region(tuple(each["box"]), each["area"], each["hottest"], tuple(each["centroid"])) for each in told["regions"]
    ]
    return Alarm(
        told["threshold"], unit_of(told["unit"]), told["num_regions"], told["area"], told["hottest"], tuple(regions)
    )


def _alignment(header: str) -> Alignment | None:
    """X-Alignment, such as `residual 0.8 px, moved 3.1 px`; None for what is none."""
    found = re.fullmatch(r"residual (?:([0-9.]+) px|unknown), moved ([0-9.]+) px", header)
    try:
        return None if found is None else Alignment(None if found[1] is None else float(found[1]), float(found[2]))
    except ValueError:
        return None


def _timings(header: str) -> Timings:
    """Server-Timing, such as `decode;dur=1.25, model;dur=40.00`, in ms. What cannot be read is left out."""
    known, seconds = {stage.name for stage in fields(Timings)}, {}
    for entry in header.split(","):
        name, _, duration = entry.strip().partition(";dur=")
        try:
            if f"{name}_s" in known:
                seconds[f"{name}_s"] = float(duration) / 1000
        except ValueError:
            continue
    return Timings(**seconds)


# connections


def _client_options(target: Target) -> dict[str, Any]:
    verify: ssl.SSLContext | bool = True
    if target.has_tls:
        verify = ssl.create_default_context(cafile=target.ca or None)
        if target.cert:
            verify.load_cert_chain(target.cert, target.key)
    headers = {"User-Agent": "recofuse-client"}
    if target.api_key:
        headers["Authorization"] = f"Bearer {target.api_key}"
    return {
        "base_url": f"{'https' if target.has_tls else 'http'}://{target.address}",
        "headers": headers,
        "verify": verify,
        "trust_env": target.trust_env,
        # Waiting for a free connection would eat the deadlines; who sends much at once wants many.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=15.0),
    }


def _request_options(request: HttpRequest, timeout_s: float) -> dict[str, Any]:
    timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
    options: dict[str, Any] = {"headers": request.headers, "timeout": timeout}
    if request.files:
        options |= {"files": request.files, "data": request.fields}
    return options


def _translated(error: Exception) -> RecofuseError:
    """What the transport failed with, as an error of this package."""
    text = str(error) or type(error).__name__
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)):
        return ConnectionFailedError(f"no connection to the server: {text}")
    if isinstance(error, (httpx.ReadTimeout, TimeoutError)):
        return TimedOutError("there was no answer before the deadline")
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.DecodingError, httpx.TooManyRedirects)):
        return BadAnswerError(text)
    if isinstance(error, httpx.LocalProtocolError):  # its text quotes headers, secrets among them
        return MalformedRequestError("this request cannot be put into HTTP")
    return ConnectionLostError(f"the connection was lost while the server was at work: {text}")


class _InTime(httpx.SyncByteStream):
    """A request's body that is given up when its time is over."""

    def __init__(self, body: Iterable[bytes], deadline: Deadline) -> None:
        self._body = body
        self._deadline = deadline

    def __iter__(self) -> Iterator[bytes]:
        for part in self._body:
            for start in range(0, len(part), CHUNK_BYTES):
                self._deadline.remaining_s()
                yield part[start : start + CHUNK_BYTES]


class HttpConnection:
    """Sends requests, blocking. One may serve many threads.

    httpx's own timeouts hold for each read and write, so the time that is left is looked at before each part of a body.
    A server that falls silent in the middle of one is given up after at most twice the time.
    """

    def __init__(self, target: Target) -> None:
        self._client = httpx.Client(**_client_options(target))

    def send(self, request: HttpRequest, timeout_s: float) -> httpx.Response:
        """Its answer, whatever the status. Raises RecofuseError if there is none."""
        deadline = Deadline(timeout_s)
        message = self._client.build_request(request.method, request.path, **_request_options(request, timeout_s))
        if request.files:
            message.stream = _InTime(cast("Iterable[bytes]", message.stream), deadline)
        try:
            answer = self._client.send(message, stream=True)
            try:
                parts = []
                for part in answer.iter_raw():
                    parts.append(part)
                    deadline.remaining_s()
            finally:
                answer.close()
            return httpx.Response(answer.status_code, headers=answer.headers, content=b"".join(parts), request=message)
        except httpx.HTTPError as error:
            raise _translated(error) from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class AsyncHttpConnection:
    """Sends requests, awaiting. Belongs to one event loop."""

    def __init__(self, target: Target) -> None:
        self._client = httpx.AsyncClient(**_client_options(target))

    async def send(self, request: HttpRequest, timeout_s: float) -> httpx.Response:
        """Its answer, whatever the status. Raises RecofuseError if there is none."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.request(request.method, request.path, **_request_options(request, timeout_s))
        except (httpx.HTTPError, TimeoutError) as error:
            raise _translated(error) from error

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
