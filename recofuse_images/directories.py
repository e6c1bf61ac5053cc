"""Directories of tags, of which TIFF files and EXIF data are made: numbers and short texts, read when asked for."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from recofuse_images.errors import ImageError
from recofuse_images.limits import MAX_PAGES, MAX_TAG_VALUES, MAX_TAGS, cut_short, too_many

_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}  # by type
_COUNTED = frozenset({3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 16, 17, 18})  # types whose values libraries make numbers of
_ORIENTATION, _PARTS = 274, 330


@dataclass(frozen=True, slots=True)
class Form:
    """How numbers stand in the file: struct's letters for byte order, offsets and counts of tags, sizes in bytes."""

    order: str
    offset: str
    count: str
    first_at: int
    entry_bytes: int
    value_at: int

    @classmethod
    def of(cls, data: bytes) -> Form:
        """As the first four bytes say."""
        order = "<" if data[:2] == b"II" else ">"
        return cls(order, "Q", "Q", 8, 20, 12) if b"+" in data[2:4] else cls(order, "I", "H", 4, 12, 8)


class Directory:
    """One directory: its tags' numbers, read when asked for."""

    def __init__(self, data: bytes, at: int, form: Form, max_values: int) -> None:
        self._data, self._form, self._max_values = data, form, max_values
        self._tags: dict[int, tuple[int, int, int]] = {}  # type, number of values, where they are
        self.entries: dict[int, bytes] = {}
        try:
            (num_tags,) = struct.unpack_from(form.order + form.count, data, at)
            if num_tags > MAX_TAGS:
                raise too_many("TIFF", MAX_TAGS, "tags")
            at += struct.calcsize(form.order + form.count)
            for _ in range(num_tags):
                code, kind, num_values = struct.unpack_from(f"{form.order}HH{form.offset}", data, at)
                if num_values > max_values and kind in _COUNTED:
                    raise too_many("TIFF", max_values, "numbers in one tag")
                self._tags.setdefault(code, (kind, num_values, at + form.value_at))
                self.entries.setdefault(code, data[at : at + form.entry_bytes])
                at += form.entry_bytes
            (self.following,) = struct.unpack_from(form.order + form.offset, data, at)
        except (struct.error, OverflowError) as error:  # BigTIFF names places that no machine has
            raise cut_short("TIFF") from error

    def __contains__(self, code: int) -> bool:
        return code in self._tags

    def numbers(self, code: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A tag's whole numbers; default where the tag is missing. Raises BadImageError and ImageTooLargeError."""
        if code not in self._tags:
            return default
        self._check_count(code)
        return self._first(code, self._tags[code][1])

    def number(self, code: int, default: int) -> int:
        """A tag's first whole number."""
        return self._first(code, min(self._tags[code][1], 1))[0] if code in self._tags else default

    def text(self, code: int) -> str:
        """A tag's text, "" where there is none."""
        if code not in self._tags or self._tags[code][0] != 2:
            return ""
        data, at = self._where(code)
        return data[at : at + min(self._tags[code][1], 64)].split(b"\0")[0].decode("ascii", "replace").strip()

    def require(self, code: int) -> None:
        """Raises BadImageError if a tag's values, of whatever type, do not lie within the file, or are too many."""
        self._check_count(code)
        data, at = self._where(code)
        kind, num_values, _ = self._tags[code]
        if at + num_values * struct.calcsize("=" + _NUMBERS.get(kind, "B")) > len(data):
            raise cut_short("TIFF")

    def _check_count(self, code: int) -> None:
        """Bytes are counted here, when they are to become numbers: tags that nobody asks for may hold many."""
        if self._tags[code][1] > self._max_values:
            raise too_many("TIFF", self._max_values, "numbers in one tag")

    def _first(self, code: int, num_values: int) -> tuple[int, ...]:
        kind = self._tags[code][0]
        if kind not in _NUMBERS or not num_values:
            raise cut_short("TIFF")
        try:
            return struct.unpack_from(f"{self._form.order}{num_values}{_NUMBERS[kind]}", *self._where(code))
        except (struct.error, OverflowError) as error:
            raise cut_short("TIFF") from error

    def _where(self, code: int) -> tuple[bytes, int]:
        kind, num_values, at = self._tags[code]
        size = num_values * struct.calcsize("=" + _NUMBERS.get(kind, "B"))
        if size > struct.calcsize("=" + self._form.offset):
            (at,) = struct.unpack_from(self._form.order + self._form.offset, self._data, at)
        return self._data, at


def directories(data: bytes, form: Form, max_values: int) -> list[Directory]:
    """The chain of directories of a TIFF file and those that they name as parts, each once. Raises ImageError."""
    found: list[Directory] = []
    seen: set[int] = set()
    try:
        waiting = list(struct.unpack_from(form.order + form.offset, data, form.first_at))
    except struct.error as error:
        raise cut_short("TIFF") from error
    while waiting:
        if (at := waiting.pop(0)) in seen or not at:
            continue
        if len(found) == MAX_PAGES:
            raise too_many("TIFF", MAX_PAGES, "directories")
        seen.add(at)
        found.append(Directory(data, at, form, max_values))
        waiting += [found[-1].following, *found[-1].numbers(_PARTS)[:MAX_PAGES]]
    if not found:
        raise cut_short("TIFF")
    return found


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in EXIF data (a TIFF file without pictures); 1 where they are missing or damaged."""
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    try:
        form = Form.of(exif)
        (at,) = struct.unpack_from(form.order + form.offset, exif, form.first_at)
        orientation = Directory(exif, at, form, MAX_TAG_VALUES).number(_ORIENTATION, 1)
    except (ImageError, struct.error):  # a broken note is no reason to refuse the picture
        return 1
    return orientation if orientation in range(1, 9) else 1
