"""What a picture's file says of itself (camera, time, place, XMP), taken out of one file and put into another.

Nothing of it is in an answer unless somebody asks: where and when a picture was taken is its owner's to tell. What is
kept are descriptions; what says how the pixels lie in their file (size, orientation, thumbnails) is left behind, since
they no longer do, and makers' notes, whose places in the file would be wrong.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from recofuse_images import jpeg, png, tiff, webp
from recofuse_images.limits import MAX_CHUNKS, MAX_EXIF_BYTES, MAX_SEGMENTS, OWN_FILES

MAX_BYTES = 60_000  # of either part that is written: a segment of a JPEG file holds no more than 65533

_XMP_OF_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_OF_PNG = b"XML:com.adobe.xmp\0"
_XMP, _EXIF, _GPS = 700, 34665, 34853  # tags of a TIFF file: a packet, and where two more directories are
_MAX_TAGS = 512  # of a directory
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes of a value, by type
_BASE = frozenset({270, 271, 272, 305, 306, 315, 33432})  # description, maker, model, software, time, artist, copyright
_LEFT = frozenset({  # of the EXIF directory: the maker's note, sizes, and places in the old file
    37500, 40962, 40963, 40965,
})  # fmt: skip
_ORIENTATION = re.compile(rb"(tiff:Orientation(?:\s*=\s*[\"']|\s*>\s*))\d+")


class _Entry(NamedTuple):
    """A tag as it stands in its file: values of a kind, in the file's byte order."""

    tag: int
    kind: int
    num_values: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Metadata:
    """exif: a TIFF file without pictures; xmp: a packet of XML. Either may be empty."""

    exif: bytes = b""
    xmp: bytes = b""


def metadata_of(data: bytes) -> Metadata:
    """What a JPEG, PNG, WebP or TIFF file says of itself; nothing where that is damaged or longer than MAX_BYTES."""
    exif, xmp = b"", b""
    if data.startswith(jpeg.MAGIC):
        exif, xmp = _in_jpeg(data)
    elif data.startswith(png.MAGIC):
        exif, xmp = _in_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        exif, xmp = _in_webp(data)
    elif data[:4] in tiff.MAGICS:
        exif = data
    return _described(exif, xmp, is_tiff=exif is data)


def with_metadata(picture: bytes, metadata: Metadata) -> bytes:
    """A JPEG, PNG or WebP file, as `recofuse_images.writer` makes them, with this about itself; any other as it is."""
    if not metadata.exif and not metadata.xmp:
        return picture
    if picture.startswith(jpeg.MAGIC):
        return _into_jpeg(picture, metadata)
    if picture.startswith(png.MAGIC):
        return _into_png(picture, metadata)
    return _into_webp(picture, metadata) if picture.startswith(b"RIFF") else picture


def _described(exif: bytes, xmp: bytes, *, is_tiff: bool) -> Metadata:
    """Only what describes the picture."""
    if exif[:4] not in (b"II*\0", b"MM\0*") or (len(exif) > MAX_EXIF_BYTES and not is_tiff):
        return Metadata(b"", _sound_xmp(xmp))
    order = "<" if exif[:2] == b"II" else ">"
    first = _entries(exif, order, 4)
    if is_tiff:
        xmp = next((entry.value for entry in first if entry.tag == _XMP), b"")
    base = [entry for entry in first if entry.tag in _BASE]
    parts = {}
    for pointer in (_EXIF, _GPS):
        found = [entry for entry in first if entry.tag == pointer and len(entry.value) == 4]
        inner = _entries(exif, order, None, found[0].value) if found else []
        parts[pointer] = [entry for entry in inner if entry.tag not in _LEFT]
    written = _tiff_of(base, parts, order)
    return Metadata(written if len(written) <= MAX_BYTES else b"", _sound_xmp(xmp))


def _entries(exif: bytes, order: str, pointer_at: int | None, pointer: bytes = b"") -> list[_Entry]:
    """The tags of a directory that are sound, few and short; a pointer to it stands in the file, or is given.

    Places may overlap, so that a small file could stand for any number of bytes.
    """
    entries: list[_Entry] = []
    total = 0
    try:
        (at,) = struct.unpack_from(order + "I", exif if pointer_at is not None else pointer, pointer_at or 0)
        (num_entries,) = struct.unpack_from(order + "H", exif, at)
        for index in range(min(num_entries, _MAX_TAGS)):
            place = at + 2 + 12 * index
            tag, kind, count = struct.unpack_from(order + "HHI", exif, place)
            size = count * _SIZES.get(kind, 0)
            start = place + 8 if size <= 4 else struct.unpack_from(order + "I", exif, place + 8)[0]
            if 0 < size <= MAX_BYTES - total and start + size <= len(exif):
                entries.append(_Entry(tag, kind, count, exif[start : start + size]))
                total += size
    except struct.error:  # a broken note is no reason to refuse the picture
        pass
    return entries


def _tiff_of(base: list[_Entry], parts: dict[int, list[_Entry]], order: str) -> bytes:
    """A TIFF file without pictures; empty without tags."""
    filled = {pointer: entries for pointer, entries in parts.items() if entries}
    if not base and not filled:
        return b""
    pointers = [_Entry(pointer, 4, 1, bytes(4)) for pointer in filled]
    at = 8 + len(_directory([*base, *pointers], order, 8))
    written = []
    pointers = []
    for pointer, entries in filled.items():
        pointers.append(_Entry(pointer, 4, 1, struct.pack(order + "I", at)))
        written.append(_directory(entries, order, at))
        at += len(written[-1])
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return b"".join((head, _directory([*base, *pointers], order, 8), *written))


def _directory(entries: list[_Entry], order: str, at: int) -> bytes:
    """A directory that stands at a place of its file, its longer values behind it."""
    entries = sorted(entries)
    beyond = at + 2 + 12 * len(entries) + 4
    rows, values = [struct.pack(order + "H", len(entries))], []
    for entry in entries:
        row = struct.pack(order + "HHI", entry.tag, entry.kind, entry.num_values)
        if len(entry.value) <= 4:
            rows.append(row + entry.value.ljust(4, b"\0"))
            continue
        rows.append(row + struct.pack(order + "I", beyond))
        values.append(entry.value + bytes(len(entry.value) % 2))
        beyond += len(values[-1])
    return b"".join((*rows, bytes(4), *values))


def _sound_xmp(xmp: bytes) -> bytes:
    """The packet for upright pixels; nothing for what is no text, or too long."""
    try:
        text = xmp.strip(b"\0 \r\n\t").decode("utf-8")
    except UnicodeDecodeError:
        return b""
    if len(xmp) > MAX_BYTES or "\0" in text or not text.startswith("<"):
        return b""
    return _ORIENTATION.sub(rb"\g<1>1", text.encode())


# where it stands


def _in_jpeg(data: bytes) -> tuple[bytes, bytes]:
    at, exif, xmp = 2, b"", b""
    for _ in range(MAX_SEGMENTS):
        if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] == 0xDA:
            break
        if data[at + 1] == 0xFF:  # fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1:
            content = data[at + 4 : end]
            if content.startswith(b"Exif\0\0"):
                exif = exif or content[6:]
            elif content.startswith(_XMP_OF_JPEG):
                xmp = xmp or content[len(_XMP_OF_JPEG) :]
        at = end
    return exif, xmp


def _in_png(data: bytes) -> tuple[bytes, bytes]:
    at, exif, xmp = 8, b"", b""
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            exif = data[at + 8 : at + 8 + length]
        elif kind == b"iTXt" and data.startswith(_XMP_OF_PNG + b"\0", at + 8):  # not compressed
            # after the two bytes of compression, a language and a translated keyword, each with its end
            parts = data[at + 8 + len(_XMP_OF_PNG) + 2 : at + 8 + length].split(b"\0", 2)
            xmp = parts[2] if len(parts) == 3 else b""
        at += 12 + length
    return exif, xmp


def _in_webp(data: bytes) -> tuple[bytes, bytes]:
    at, found = 12, {b"EXIF": b"", b"XMP ": b""}
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind in found:
            found[kind] = data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return found[b"EXIF"].removeprefix(b"Exif\0\0"), found[b"XMP "]


# where it goes


def _into_jpeg(picture: bytes, metadata: Metadata) -> bytes:
    at = 2
    if picture[at : at + 2] == b"\xff\xe0":  # JFIF's own comes first
        at += 2 + int.from_bytes(picture[at + 2 : at + 4], "big")
    segments = []
    for head, content in ((b"Exif\0\0", metadata.exif), (_XMP_OF_JPEG, metadata.xmp)):
        if content:
            segments.append(b"\xff\xe1" + struct.pack(">H", 2 + len(head) + len(content)) + head + content)
    return b"".join((picture[:at], *segments, picture[at:]))


def _into_png(picture: bytes, metadata: Metadata) -> bytes:
    at = 8 + 25  # behind the header
    chunks = []
    for kind, content in (
        (b"eXIf", metadata.exif),
        (b"iTXt", metadata.xmp and _XMP_OF_PNG + bytes(4) + metadata.xmp),
    ):
        if content:
            body = kind + content
            chunks.append(struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body)))
    return b"".join((picture[:at], *chunks, picture[at:]))


def _into_webp(picture: bytes, metadata: Metadata) -> bytes:
    header = webp.read_header(picture, OWN_FILES)
    flags = (0x08 if metadata.exif else 0) | (0x04 if metadata.xmp else 0)
    size = struct.pack("<I", header.width - 1)[:3] + struct.pack("<I", header.height - 1)[:3]
    chunks = [_riff(b"VP8X", bytes([flags, 0, 0, 0]) + size), picture[12:]]
    if metadata.exif:
        chunks.append(_riff(b"EXIF", metadata.exif))
    if metadata.xmp:
        chunks.append(_riff(b"XMP ", metadata.xmp))
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _riff(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
