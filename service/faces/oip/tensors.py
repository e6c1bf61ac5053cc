"""The Open Inference Protocol v2 (KServe, Triton) apart from HTTP and gRPC: its tensors, requests and answers.

`http.py` with `bodies.py`, and `grpc.py`, read and write the messages. docs/oip.md tells users which tensors and
parameters there are.

What a newcomer would get wrong: a tensor's shape, sizes and lengths are claims of a stranger. Nothing is sliced or
allocated by them before they have been checked against the bytes that are really there.
"""

from __future__ import annotations

import array
import math
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.terms.errors import InvalidInputError
from service.terms.jobs import Part

INPUTS: dict[str, tuple[str, ...]] = {"vis": ("UINT8", "BYTES"), "ir": ("UINT8", "UINT16", "BYTES")}  # and datatypes
OUTPUTS: dict[str, Part] = {"fused": Part.FUSED, "vis_restored": Part.VIS, "ir_restored": Part.IR}
VALUES = "values"  # the output that is no picture, and the parameter that says how it comes
PARAMETERS = (
    "seed", "steps", "sampler", "exposure", "rig", "align", "colour", "colour_range", "degrees", "alarm", "outline",
    VALUES, "metadata", "vis_range", "ir_range", "format", "priority", "timeout", "timeout_ms"
)  # fmt: skip
MAX_MESSAGE_CHARS = 1000
MAX_NAME_CHARS = 64
MAX_ID_CHARS = 256
MAX_DIMENSIONS = 8

_CODES = {"UINT8": "B", "UINT16": "H"}  # of `array`

Parameter = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Tensor:
    """data: the elements as they lie in binary data: little endian, those of BYTES each after its length (4 bytes)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class InferRequest:
    """outputs: the wanted ones and whether each is wanted as binary data; empty asks for all pictures."""

    inputs: tuple[Tensor, ...]
    outputs: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    id: str = ""
    is_binary: bool = True  # what `outputs` does not mention


@dataclass(frozen=True, slots=True)
class InferAnswer:
    """model_name, model_version: of the model that made the first pair's pictures.

    parameters: infrared_source, warnings, values_unit, alarms and alignments, as docs/oip.md has them, where there is
    something to tell.
    """

    model_name: str
    model_version: str
    id: str
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)


def split_elements(data: bytes | memoryview, count: int, name: str) -> list[bytes]:
    """The elements of a BYTES tensor. Raises InvalidInputError if there are not exactly so many."""
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) < count:
        start = at + 4
        length = struct.unpack_from("<I", data, at)[0] if start <= len(data) else len(data)
        if length > len(data) - start:
            raise InvalidInputError(f"{name}: element {len(elements)} is cut short; each comes after its length")
        at = start + length
        elements.append(bytes(data[start:at]))
    if len(elements) != count or at != len(data):
        raise InvalidInputError(f"{name}: the shape says {count} elements, and the data hold another number of them")
    return elements


def join_elements(elements: Iterable[bytes]) -> bytes:
    """The data of a BYTES tensor; what `split_elements` takes apart."""
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


def join_numbers(values: Sequence[Any], datatype: str, name: str) -> bytes:
    """The data of a tensor of numbers. Raises InvalidInputError for other values and other datatypes."""
    if datatype not in _CODES:
        raise InvalidInputError(f"{name}: datatype {datatype[:16]!r}; accepted are {', '.join(_CODES)} and BYTES")
    try:
        packed = array.array(_CODES[datatype], values)
    except (TypeError, OverflowError, ValueError) as error:
        raise InvalidInputError(f"{name}: the data hold a value that {datatype} cannot") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def parameters_of(given: Mapping[str, Any]) -> dict[str, Parameter]:
    """A request's parameters. Raises InvalidInputError for unknown ones and for values that are no scalars."""
    known = (*PARAMETERS, "binary_data_output")
    for name, value in given.items():
        if name not in known:
            accepted = ", ".join(PARAMETERS)
            raise InvalidInputError(f"there is no parameter {name[:40]!r}; accepted are {accepted}")
        if not isinstance(value, Parameter) or (isinstance(value, float) and not math.isfinite(value)):
            raise InvalidInputError(f"the parameter {name} must be a finite number, a string or a boolean")
    return dict(given)


def add_output(outputs: dict[str, bool], name: str, parameters: Mapping[str, Any], is_binary: bool) -> None:
    """Note a wanted output. Raises InvalidInputError."""
    if name not in OUTPUTS and name != VALUES:
        raise InvalidInputError(f"there is no output {name[:40]!r}; accepted are {', '.join((*OUTPUTS, VALUES))}")
    if name in outputs:
        raise InvalidInputError(f"the output {name} is asked for more than once")
    if "classification" in parameters:
        raise InvalidInputError(f"{name}: pictures have no classification")
    refuse_shared_memory(name, parameters)
    outputs[name] = is_binary


def refuse_shared_memory(name: str, parameters: Mapping[str, Any]) -> None:
    """Raises InvalidInputError if a tensor is said to lie in memory of this host."""
    if any(key.startswith("shared_memory") for key in parameters):
        raise InvalidInputError(f"{name}: shared memory is not offered; send and receive tensors in the messages")
