"""Forms: the fields and the options in the query string that ask for a fusion, and the request that they describe.

A form is parsed while it arrives, and stops at the first field that is not wanted or too large.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from recofuse_rigs.rig import MAX_FILE_BYTES
from service.access.held import Holding
from service.faces.gateway import FusionRequest
from service.faces.http.bodies import Body
from service.terms.errors import (
    InvalidInputError,
    MalformedRequestError,
    PayloadTooLargeError,
    ServiceError,
    UnsupportedMediaError,
)
from service.terms.jobs import Align, Colour, Exposure, FusionOptions, ImageFormat, Output, Priority
from service.terms.measures import ALARM, ValuesFormat
from service.terms.records import problems_of
from service.terms.settings import Settings
from service.watch.logs import request_id

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_OPTION_BYTES = 1024
MAX_BYTES = {"rig": MAX_FILE_BYTES}  # of options that may have more
OPTION_FIELDS = (
    "output", "format", "steps", "sampler", "exposure", "rig", "align", "colour", "colour_range", "values", "degrees",
    "alarm", "outline", "metadata", "seed", "vis_range", "ir_range", "priority", "timeout_ms"
)  # fmt: skip
IMAGE_FIELDS = ("vis", "ir")

_RANGE = r"^[+-]?\d+(\.\d+)?,[+-]?\d+(\.\d+)?$"
FORM: dict[str, Any] = {
    "type": "object",
    "required": ["vis", "ir"],
    "additionalProperties": False,
    "properties": {
        "vis": {
            "type": "string",
            "format": "binary",
            "description": "visible image: PNG, JPEG, WebP, AVIF, BMP or TIFF",
        },
        "ir": {
            "type": "string",
            "format": "binary",
            "description": "infrared image, registered to vis unless a rig is given; radiometric too",
        },
        "output": {"type": "string", "enum": list(Output), "default": "fused", "description": "all: a zip of three"},
        "format": {"type": "string", "enum": list(ImageFormat), "default": "png"},
        "steps": {"type": "integer", "minimum": 1, "maximum": 1000, "description": "default: the model's own"},
        "sampler": {"type": "string", "enum": ["euler", "posterior", "ode1", "ode2"]},
        "exposure": {
            "type": "string",
            "enum": list(get_args(Exposure)),
            "description": "lit: a dark scene as a well exposed photograph, lamps kept, dark infrared brighter in the "
            "fused picture; as_shot: as dark as it came; veils are lifted in both. Default: the model's own; GET "
            "/v1/models tells which a model offers",
        },
        "rig": {
            "type": "string",
            "maxLength": MAX_FILE_BYTES,
            "description": "how infrared lies in the visible frame, for cameras that are not registered: a name of GET "
            "/v1/rigs, the content of a rig file, or nine numbers with commas: the matrix, row by row, from infrared "
            "pixels to visible ones of these pictures",
        },
        "align": {
            "type": "string",
            "enum": list(get_args(Align)),
            "default": "rig",
            "description": "refine: what the rig leaves in this pair, or a pair without one has, is measured and put "
            "right if that is clear; X-Alignment tells what came of it",
        },
        "colour": {
            "type": "string",
            "enum": list(get_args(Colour)),
            "default": "natural",
            "description": "of the fused picture; white_hot, iron and rainbow lay the restored infrared in a palette "
            "over the restored visible picture in grey",
        },
        "colour_range": {
            "type": "string",
            "pattern": _RANGE,
            "description": "infrared values, as those of ir_range, between which white_hot, iron and rainbow go from "
            "nothing to full, such as 8200,9500; default: the upper half of the scale",
        },
        "values": {
            "type": "string",
            "enum": list(get_args(ValuesFormat)),
            "description": "also the restored infrared in the values of its source, in a zip with the pictures: npy is "
            "float32, tiff 16 bits or float32, png 16 bits",
        },
        "degrees": {
            "type": "string",
            "pattern": _RANGE,
            "description": "gain,offset: degrees Celsius are gain * value + offset of the infrared file's values, such "
            "as 0.04,-273.15",
        },
        "alarm": {
            "type": "string",
            "pattern": ALARM,
            "description": "60C, or 8200 in the infrared file's values: the regions that are at least so hot are "
            "listed in result.json, in a zip with the pictures",
        },
        "outline": {
            "type": "boolean",
            "default": False,
            "description": "whether the regions of an alarm are outlined in the fused picture",
        },
        "metadata": {
            "type": "string",
            "enum": ["drop", "keep"],
            "default": "drop",
            "description": "keep: what the files say of themselves (camera, time, place; EXIF and XMP) goes into the "
            "pictures of the answer",
        },
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "default": 0},
        "vis_range": {
            "type": "string",
            "pattern": _RANGE,
            "description": "source values that become black and white, such as 0,4095; default: by the depth",
        },
        "ir_range": {
            "type": "string",
            "pattern": _RANGE,
            "description": "source values that become black and white, such as 7000,9500; default: robust percentiles",
        },
        "priority": {"type": "string", "enum": list(Priority), "default": "normal"},
        "timeout_ms": {"type": "integer", "minimum": 1, "description": "nobody wants the answer after this time"},
    },
}

QUERY: list[dict[str, Any]] = [
    {
        "name": name,
        "in": "query",
        "description": FORM["properties"][name].get("description", "as the form field"),
        "schema": FORM["properties"][name],
    }
    for name in OPTION_FIELDS
]


async def read_form(request: Request, settings: Settings, holding: Holding) -> dict[str, bytes]:
    """The fields of a multipart body, read within the limits, and the options of the query string.

    Raises UnsupportedMediaError, PayloadTooLargeError, MalformedRequestError, InvalidInputError (unknown, missing or
    repeated fields) and TimedOutError (a body that stops, or comes too slowly).
    """
    body = Body(request)
    try:
        return await _form_of(body, request, settings, holding)
    except ServiceError as error:
        refused = error.with_traceback(None)  # whose frames hold what has come
    holding.release()
    await body.discard_rest()
    raise refused


async def _form_of(body: Body, request: Request, settings: Settings, holding: Holding) -> dict[str, bytes]:
    form = _Form(settings.limits.max_image_bytes, _options_in_query(request))
    # The form does not know the parser that calls it: the two would keep each upload until a collection.
    parser = MultipartParser(_boundary_of(request), form.callbacks())
    await body.pour(functools.partial(_parse, parser), settings, holding)
    return form.close()


def _options_in_query(request: Request) -> dict[str, bytes]:
    """The options in the query string, as form fields; empty ones are left out.

    Raises InvalidInputError (unknown or repeated ones) and PayloadTooLargeError.
    """
    if not request.scope["query_string"]:
        return {}
    given = parse_qsl(request.scope["query_string"].decode("utf-8", "replace"), keep_blank_values=True)
    if unknown := [repr(name[:40]) for name in dict.fromkeys(name for name, _ in given) if name not in OPTION_FIELDS]:
        accepted = ", ".join(OPTION_FIELDS)
        raise InvalidInputError(f"there is no query parameter {', '.join(unknown[:8])}; accepted are {accepted}")
    values: dict[str, bytes] = {}
    for name, text in given:
        if name in values:
            raise InvalidInputError(f"the query parameter {name} is there more than once")
        values[name] = text.encode()
        most = MAX_BYTES.get(name, MAX_OPTION_BYTES)
        if len(values[name]) > most:
            raise PayloadTooLargeError(f"the query parameter {name} has more than the accepted {most} bytes")
    return {name: value for name, value in values.items() if value}


def _boundary_of(request: Request) -> bytes:
    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise UnsupportedMediaError("the request body must be multipart/form-data with the files vis and ir")
    boundary = parameters.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise MalformedRequestError("the multipart boundary is missing or longer than 70 characters")
    return boundary


def _parse(parser: MultipartParser, chunk: bytes) -> None:
    """Parse the next piece of the body."""
    try:
        parser.write(chunk)
    except FormParserError as error:
        raise MalformedRequestError("the multipart body cannot be parsed") from error


class _Form:
    """Collects multipart fields and stops at the first that is not wanted or too large.

    query: the options that came outside the form. A field is written into a stream of its own, which hands over the
    bytes that it has become without copying them.
    """

    def __init__(self, max_image_bytes: int, query: Mapping[str, bytes]) -> None:
        self._max_image_bytes = max_image_bytes
        self._query = query
        self._fields: dict[str, io.BytesIO] = {}
        self._headers: dict[bytes, bytes] = {}
        self._name = b""
        self._value = b""
        self._field = ""
        self._is_closed = False

    def callbacks(self) -> MultipartCallbacks:
        """What a parser is to call."""
        return {
            "on_part_begin": self._headers.clear,
            "on_header_begin": self._on_header_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }

    def close(self) -> dict[str, bytes]:
        """The complete fields; an option that is empty is none."""
        if not self._is_closed:
            raise MalformedRequestError("the multipart body ends before its closing boundary")
        missing = [name for name in IMAGE_FIELDS if name not in self._fields]
        if missing:
            raise InvalidInputError(f"the field {' and '.join(missing)} is missing; vis and ir are required")
        filled = {name: value.getvalue() for name, value in self._fields.items()}
        return {**self._query, **{name: value for name, value in filled.items() if value or name in IMAGE_FIELDS}}

    def _on_header_begin(self) -> None:
        self._name = self._value = b""

    def _on_header_field(self, chunk: bytes, start: int, end: int) -> None:
        self._name += chunk[start:end]

    def _on_header_value(self, chunk: bytes, start: int, end: int) -> None:
        self._value += chunk[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value

    def _on_headers_finished(self) -> None:
        _, parameters = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = parameters.get(b"name", b"").decode("utf-8", "replace")
        if name not in IMAGE_FIELDS and name not in OPTION_FIELDS:
            accepted = ", ".join((*IMAGE_FIELDS, *OPTION_FIELDS))
            raise InvalidInputError(f"there is no field {name[:40]!r}; accepted are {accepted}")
        if name in self._fields:
            raise InvalidInputError(f"the field {name} is there more than once")
        self._field = name
        self._fields[name] = io.BytesIO()

    def _on_part_data(self, chunk: bytes, start: int, end: int) -> None:
        if start < end and self._field in self._query:
            raise InvalidInputError(f"the field {self._field} is in the query string as well; keep one")
        value = self._fields[self._field]
        own = MAX_BYTES.get(self._field, MAX_OPTION_BYTES)
        limit = self._max_image_bytes if self._field in IMAGE_FIELDS else own
        if value.tell() + end - start > limit:
            raise PayloadTooLargeError(f"the field {self._field} has more than the accepted {limit} bytes")
        value.write(memoryview(chunk)[start:end])

    def _on_end(self) -> None:
        self._is_closed = True


def request_of(form: Mapping[str, bytes], idempotency_key: str | None, parent: str) -> FusionRequest:
    """The request that these form fields describe. parent: its traceparent, or nothing. Raises InvalidInputError."""
    values: dict[str, Any] = {}
    for name, raw in form.items():
        if name in OPTION_FIELDS:
            try:
                values[name] = raw.decode("ascii")
            except UnicodeDecodeError as error:
                raise InvalidInputError(f"the field {name} is not plain text") from error
    for name in ("vis_range", "ir_range", "colour_range", "degrees"):
        if name in values:
            values[name] = tuple(values[name].split(","))
    priority = values.pop("priority", Priority.NORMAL)
    timeout_ms = values.pop("timeout_ms", None)
    rig = values.pop("rig", "")
    if priority not in list(Priority):
        raise InvalidInputError(f"priority: accepted are {', '.join(Priority)}")
    if timeout_ms is not None and not re.fullmatch(r"[0-9]{1,12}", timeout_ms):
        raise InvalidInputError("timeout_ms: accepted are whole numbers of milliseconds")
    try:
        options = FusionOptions.model_validate(values)
    except ValidationError as error:
        raise InvalidInputError(problems_of(error)) from error
    return FusionRequest(
        vis=form["vis"],
        ir=form["ir"],
        options=options,
        priority=Priority(priority),
        timeout_s=None if timeout_ms is None else int(timeout_ms) / 1000,
        idempotency_key=idempotency_key,
        request_id=request_id.get(),
        traceparent=parent or None,
        rig=rig,
    )
