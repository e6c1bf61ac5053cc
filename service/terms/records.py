"""Records that cross the queue, byte by byte: a magic word, the length of a JSON header, the header, the payloads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from service.terms.errors import MalformedRequestError

Header = TypeVar("Header", bound=BaseModel)


def joined(magic: bytes, header: bytes, payloads: Sequence[bytes]) -> bytes:
    """The record of these parts."""
    return b"".join((magic, len(header).to_bytes(4, "little"), header, *payloads))


def cut_apart(magic: bytes, raw: bytes) -> tuple[bytes, memoryview]:
    """The header and all payloads together. Raises MalformedRequestError."""
    view = memoryview(raw)
    end = 8 + int.from_bytes(view[4:8], "little")
    if bytes(view[:4]) != magic or len(view) < end:
        raise MalformedRequestError(f"not a {magic.decode()} record, or cut short at {len(raw)} bytes")
    return bytes(view[8:end]), view[end:]


def pieces_of(body: memoryview, sizes: Sequence[int], what: str) -> list[bytes]:
    """Payloads that lie one after the other. Raises MalformedRequestError if they are not of these sizes."""
    if len(body) != sum(sizes):
        raise MalformedRequestError(f"{what.format(sum(sizes))} came with {len(body)}")
    ends = itertools.accumulate(sizes)
    return [bytes(body[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def announced(payloads: Sequence[bytes], sizes: Sequence[int]) -> Sequence[bytes]:
    """Payloads that lie apart. Raises MalformedRequestError if they are not of these sizes."""
    if (found := tuple(map(len, payloads))) != tuple(sizes):
        raise MalformedRequestError(f"payloads of {found} bytes where {sizes} were announced")
    return payloads


def parsed_header(kind: type[Header], header: bytes) -> Header:
    """Raises MalformedRequestError."""
    try:
        return kind.model_validate_json(header)
    except ValidationError as error:
        raise MalformedRequestError(f"a record's header is not valid: {problems_of(error)}") from error


def problems_of(error: ValidationError) -> str:
    """A validation error in one line: field and reason, without the offending content."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(step) for step in problem["loc"])
        reason = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {reason}" if where else reason)
    return "; ".join(lines)
