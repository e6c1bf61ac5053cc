"""What a message takes once it is parsed, told from its bytes beforehand.

Parsing can multiply a message: a packed number of one byte takes four or eight, an empty entry of a list two on the
wire and a hundred in memory. What stays within the largest message could so be more than the process may use.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from service.terms.errors import InvalidInputError, PayloadTooLargeError

MAX_FIELDS = 4096  # of a message and all within it; none of ours has more than some dozens
GROWTH = 2  # how many times the largest message one may take when it is parsed

_NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32: 4,
    FieldDescriptor.CPPTYPE_UINT32: 4,
    FieldDescriptor.CPPTYPE_ENUM: 4,
    FieldDescriptor.CPPTYPE_INT64: 8,
    FieldDescriptor.CPPTYPE_UINT64: 8,
}  # bytes in memory, for one on the wire at least
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5


def admit(raw: bytes, kind: Descriptor, most: int) -> None:
    """Pass a message that parses to at most `GROWTH` times the largest one. Passes what cannot be parsed, too.

    raw: its bytes. kind: what it is. most: bytes of the largest message. Raises InvalidInputError for more fields
    than any message of ours has, and PayloadTooLargeError.
    """
    num_fields = num_bytes = 0
    left = [(memoryview(raw), kind)]
    try:
        while left:
            view, kind = left.pop()
            at = 0
            while at < len(view):
                num_fields += 1
                if num_fields > MAX_FIELDS:
                    raise InvalidInputError(f"accepted are messages of at most {MAX_FIELDS} fields, packed ones as one")
                tag, at = _varint(view, at)
                wire_type = tag & 7
                if wire_type == _VARINT:
                    _, at = _varint(view, at)
                elif wire_type == _FIXED_64:
                    at += 8
                elif wire_type == _FIXED_32:
                    at += 4
                elif wire_type == _BYTES:
                    size, at = _varint(view, at)
                    part, at = view[at : at + size], at + size
                    field = kind.fields_by_number.get(tag >> 3)
                    if field is not None and field.message_type is not None:
                        left.append((part, field.message_type))
                    else:
                        num_bytes += len(part) * (1 if field is None else _NUMBERS.get(field.cpp_type, 1))
    except IndexError:  # it ends within a number, which whoever parses it says
        return
    if num_bytes > GROWTH * most:
        raise PayloadTooLargeError(
            f"parsed, the message would take {num_bytes} bytes; at most {GROWTH * most} are accepted, and numbers take "
            "least as raw contents"
        )


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the low ones first, and where it ends. Raises IndexError if it does not."""
    value = shift = 0
    while view[at] > 127:
        value |= (view[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if shift > 63:
            raise IndexError("a number of more than ten bytes")
    return value | view[at] << shift, at + 1
