"""The raw picture inside a thermal camera's JPEG: temperatures or sensor counts instead of the coloured preview.

What such a file shows is a palette with text, logo and scale bar burnt in; what was measured lies beside it, in APP
segments. FLIR/Teledyne cameras write an FFF file into APP1 segments; DJI cameras write bare samples into APP3.

A newcomer would get wrong:
- The raw picture is returned as stored. It may be smaller than the JPEG, may show a wider or narrower view, and has no
  regard to the EXIF orientation, which is the caller's to apply.
- Bytes are hostile. Every size is read and bounded before anything is decoded, and whatever cannot be trusted becomes
  a `RawMissing` with a reason to show; nothing is raised, and no array holds a sample that the file did not.
- FLIR's PNG carries its samples in the wrong byte order, in most models. The smoother reading is the right one.

Layouts: ExifTool's tag tables (https://exiftool.org/TagNames/FLIR.html, FFF, RawData and CameraInfo;
https://exiftool.org/TagNames/DJI.html, ThermalParams). Temperatures: the measurement formula printed in FLIR's user
manuals ("Thermographic measurement techniques"), with the constants B, F, O, R1 and R2 of its Planck curve.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2

Camera: TypeAlias = Literal["flir", "dji"]
Unit: TypeAlias = Literal["celsius", "counts"]

MAX_FILE_BYTES = 32 * 2**20

_MAX_SEGMENTS = 1024  # FLIR's index is a byte and DJI's largest sensor fills 41; the rest is EXIF, XMP, ICC and tables
_MAX_RECORDS = 1024
_KELVIN = 273.15
_MAX_CELSIUS = 6000.0  # above any camera's range: the constants are not those of this picture

_Counts: TypeAlias = NDArray[np.uint16]
_Floats: TypeAlias = NDArray[np.floating[Any]]
_Order: TypeAlias = Literal["<", ">"]


@dataclass(frozen=True)
class Radiometric:
    """The raw picture as stored: values (H, W), float32 in degrees Celsius or uint16 sensor counts."""

    values: NDArray[np.float32] | NDArray[np.uint16]
    unit: Unit
    camera: Camera


@dataclass(frozen=True)
class RawMissing:
    """A radiometric file whose raw picture cannot be used; `reason` is a clause to show after the file's name."""

    reason: str
    camera: Camera


class _Unusable(Exception):  # noqa: N818 - never leaves this module
    """Why the embedded raw picture cannot be used."""


def radiometric_of(jpeg: bytes, *, max_pixels: int, max_side: int) -> Radiometric | RawMissing | None:
    """The raw picture that a thermal camera put into its JPEG, or why it cannot be used; None for any other file.

    Temperatures where the camera's constants make sense of every sample, counts otherwise. Never raises for what the
    bytes are. `max_pixels` and `max_side` bound the raw picture, which is looked at before it is decoded.
    """
    segments = list(_segments(jpeg))
    flir = [body for marker, body in segments if marker == 0xE1 and body.startswith(b"FLIR\0")]
    if flir:
        try:
            return _flir(flir, len(jpeg), max_pixels, max_side)
        except _Unusable as error:
            return RawMissing(f"the FLIR file's thermal block {error}; its palette picture is what is left", "flir")
    if _is_dji(segments):
        try:
            return _dji(segments, len(jpeg), max_pixels, max_side)
        except _Unusable as error:
            return RawMissing(f"the DJI file's thermal block {error}; its palette picture is what is left", "dji")
    return None


def celsius_of_counts(counts: NDArray[Any], constants: "FlirConstants") -> NDArray[np.float64]:
    """Object temperatures of raw counts, by FLIR's measurement formula; non-finite where it has no solution.

    The sensor sees, through window and air, S = t_w (t_a (e U(T) + (1 - e) U(T_refl)) + (1 - t_a) U(T_air))
    + (1 - t_w) U(T_w), with U the camera's Planck curve, e the emissivity, t_a and t_w the transmissions of air and
    window. A term without weight does not ask for its temperature.
    """
    c = constants
    air = _air_transmission(c)
    with np.errstate(all="ignore"):
        signal = np.asarray(counts, np.float64)
        signal = (signal - _weighted(1 - c.window_transmission, c.window_kelvin, c)) / c.window_transmission
        signal = (signal - _weighted(1 - air, c.air_kelvin, c)) / air
        signal = (signal - _weighted(1 - c.emissivity, c.reflected_kelvin, c)) / c.emissivity
        kelvin = c.planck_b / np.log(c.planck_r1 / (c.planck_r2 * (signal + c.planck_o)) + c.planck_f)
    return np.asarray(kelvin - _KELVIN, np.float64)


@dataclass(frozen=True)
class FlirConstants:
    """What FLIR's CameraInfo record says of the measurement: kelvin, metres, humidity and shares in [0, 1]."""

    emissivity: float
    distance_m: float
    reflected_kelvin: float
    air_kelvin: float
    window_kelvin: float
    window_transmission: float
    humidity: float
    planck_r1: float
    planck_b: float
    planck_f: float
    planck_o: float
    planck_r2: float
    alpha1: float
    alpha2: float
    beta1: float
    beta2: float
    x: float


def _planck(kelvin: float, c: FlirConstants) -> float:
    """Counts of a black body: U(T) = R1 / (R2 (exp(B / T) - F)) - O; nan where T cannot be a temperature."""
    if not 0 < kelvin < math.inf or c.planck_b / kelvin > 700:
        return math.nan
    scale = c.planck_r2 * (math.exp(c.planck_b / kelvin) - c.planck_f)
    return c.planck_r1 / scale - c.planck_o if scale > 0 else math.nan


def _weighted(share: float, kelvin: float, c: FlirConstants) -> float:
    return share * _planck(kelvin, c) if share else 0.0


def _air_transmission(c: FlirConstants) -> float:
    """Share that the air lets through; nan where the constants cannot be air's."""
    if c.distance_m == 0 or not (c.alpha1 or c.alpha2 or c.beta1 or c.beta2):
        return 1.0
    air = c.air_kelvin - _KELVIN
    if not -100 < air < 200 or not 0 <= c.humidity <= 1 or not 0 < c.distance_m < 1e6:
        return math.nan
    # Water in the air from its temperature and relative humidity, by the polynomial of FLIR's manuals.
    water = c.humidity * math.exp(1.5587 + 6.939e-2 * air - 2.7816e-4 * air**2 + 6.8455e-7 * air**3)
    path, root = math.sqrt(c.distance_m), math.sqrt(water)
    exponents = (-path * (c.alpha1 + c.beta1 * root), -path * (c.alpha2 + c.beta2 * root))
    if not all(abs(exponent) < 100 for exponent in exponents):  # also false for nan
        return math.nan
    share = c.x * math.exp(exponents[0]) + (1 - c.x) * math.exp(exponents[1])
    return share if 0 < share <= 1.5 else math.nan  # a little above one where the camera's fit overshoots


# --- JPEG segments ----------------------------------------------------------------------------------------------------


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and body of each segment before the picture data; the last one may be cut short with the file."""
    if jpeg[:2] != b"\xff\xd8":
        return
    at = 2
    for _ in range(_MAX_SEGMENTS):
        while jpeg[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if len(jpeg) < at + 4 or jpeg[at] != 0xFF:
            return
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker == 0xDA or marker in range(0xD0, 0xDA) or marker < 0xC0 or length < 2:
            return
        yield marker, jpeg[at + 4 : at + 2 + length]
        at += 2 + length


def _require_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise _Unusable(f"is not read from a file of more than {MAX_FILE_BYTES // 2**20} MiB")


def _require_shape(width: int, height: int, max_pixels: int, max_side: int) -> None:
    if not width or not height:
        raise _Unusable(f"says that it is {width}x{height} pixels")
    if max(width, height) > max_side or width * height > max_pixels:
        raise _Unusable(
            f"says that it is {width}x{height} pixels, more than the {max_pixels} pixels and {max_side} a side allowed"
        )


def _read(data: bytes, order: _Order, kind: str, at: int) -> Any:
    """One number at an offset; raises _Unusable past the end."""
    if at + struct.calcsize(order + kind) > len(data):
        raise _Unusable("is cut short")
    return struct.unpack_from(order + kind, data, at)[0]


# --- FLIR -------------------------------------------------------------------------------------------------------------


def _flir(parts: list[bytes], size: int, max_pixels: int, max_side: int) -> Radiometric:
    _require_size(size)
    fff = _joined(parts)
    records = _records(fff)
    if 0x01 not in records:
        raise _Unusable("holds no raw picture")
    counts = _flir_counts(*records[0x01], max_pixels, max_side)
    constants = _constants(*records[0x20]) if 0x20 in records else None
    if constants is not None:
        celsius = celsius_of_counts(np.arange(2**16), constants)[counts]  # one formula a count instead of a pixel
        if np.isfinite(celsius).all() and celsius.min() > -_KELVIN and celsius.max() < _MAX_CELSIUS:
            return Radiometric(celsius.astype(np.float32), "celsius", "flir")
    return Radiometric(counts, "counts", "flir")


def _joined(parts: list[bytes]) -> bytes:
    """The FFF file of all APP1 parts: "FLIR", 0, 1, index of the part, index of the last part, bytes."""
    if any(len(part) < 8 for part in parts):
        raise _Unusable("is cut short")
    last = parts[0][7]
    by_index = {part[6]: part[8:] for part in parts}
    if any(part[7] != last or part[6] > last for part in parts):
        raise _Unusable("has parts that disagree about their number")
    if any(by_index[part[6]] != part[8:] for part in parts):
        raise _Unusable("holds two different parts of the same number")
    absent = [index for index in range(last + 1) if index not in by_index]
    if absent:
        raise _Unusable(f"lacks part {absent[0] + 1} of {last + 1}")
    return b"".join(by_index[index] for index in range(last + 1))


def _records(fff: bytes) -> dict[int, tuple[bytes, _Order]]:
    """First record of each type, with the byte order that its own first word tells.

    A record that does not fit the file is left out: only the one that is asked for matters.
    """
    if fff[:4] not in {b"FFF\0", b"AFF\0"}:
        raise _Unusable("is not an FFF file")
    order = next((o for o in _ORDERS if 100 <= _read(fff, o, "I", 0x14) < 200), None)
    if order is None:
        raise _Unusable("has an unknown version")
    directory, num_records = _read(fff, order, "I", 0x18), _read(fff, order, "I", 0x1C)
    if num_records > _MAX_RECORDS or directory + 32 * num_records > len(fff):
        raise _Unusable("has a directory that does not fit")
    records: dict[int, tuple[bytes, _Order]] = {}
    for entry in range(directory, directory + 32 * num_records, 32):
        kind = _read(fff, order, "H", entry)
        at, length = _read(fff, order, "I", entry + 12), _read(fff, order, "I", entry + 16)
        if kind not in {0x01, 0x20} or kind in records:
            continue
        if at + length > len(fff) or length < 32:
            if kind == 0x01:
                raise _Unusable("is cut short")
            continue
        body = fff[at : at + length]
        small = [o for o in (order, *_ORDERS) if _read(body, o, "H", 0) < 0x100]  # 2, in the record's own order
        records[kind] = body, small[0] if small else order
    return records


_ORDERS: tuple[_Order, _Order] = (">", "<")


def _flir_counts(record: bytes, order: _Order, max_pixels: int, max_side: int) -> _Counts:
    """Counts of a RawData record: width and height in its head, at byte 32 a PNG or plain 16-bit samples."""
    width, height = _read(record, order, "H", 2), _read(record, order, "H", 4)
    _require_shape(width, height, max_pixels, max_side)
    payload = record[32:]
    if payload.startswith(_PNG):
        stored = _png16(payload, width, height)
        swapped = stored.byteswap()
        return swapped if _variation(swapped) <= _variation(stored) else stored
    if len(payload) == 2 * width * height:
        stated = np.frombuffer(payload, f"{order}u2").reshape(height, width).astype(np.uint16)
        other = stated.byteswap()
        # The record's word is taken, unless its picture were noise and the other reading one.
        return other if 4 * _variation(other) < _variation(stated) else stated
    if payload.startswith(b"\xff\xd8\xff"):
        raise _Unusable(f"is {'JPEG-LS' if payload[3:4] == bytes([0xF7]) else 'JPEG'} data, which is not read")
    if len(payload) < 2 * width * height:
        raise _Unusable("is cut short, or packed in a way that is not known")
    raise _Unusable("is packed in a way that is not known")


def _variation(picture: NDArray[Any]) -> float:
    """Total variation: the sum of all steps between neighbours."""
    wide = picture.astype(np.int32)
    return float(np.abs(np.diff(wide, axis=0)).sum() + np.abs(np.diff(wide, axis=1)).sum())


_PNG = b"\x89PNG\r\n\x1a\n"


def _png16(png: bytes, width: int, height: int) -> _Counts:
    """A 16-bit grey PNG of the given size, checked to its last byte before a decoder sees it.

    Decoders fill what a damaged file leaves out with whatever the memory held, so checksums, filters and the exact
    length of the unpacked rows are verified here, and the decoder is given a file of nothing but these.
    """
    head, packed, at = b"", [], len(_PNG)
    while at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        kind, body, end = png[at + 4 : at + 8], png[at + 8 : at + 8 + length], at + 12 + length
        if end > len(png):
            break
        if kind in {b"IHDR", b"IDAT"}:
            if zlib.crc32(png[at + 4 : at + 8 + length]) != int.from_bytes(png[end - 4 : end], "big"):
                raise _Unusable("is a PNG with a wrong checksum")
            if kind == b"IHDR":
                head = head or body
            else:
                packed.append(body)
        if kind == b"IEND":
            break
        at = end
    # Depth 16, grey, deflate, the adaptive filters, not interlaced.
    if head != struct.pack(">II", width, height) + bytes([16, 0, 0, 0, 0]):
        raise _Unusable(f"is not a {width}x{height} grey PNG of 16 bits")
    stream, row = b"".join(packed), 1 + 2 * width
    unpacker = zlib.decompressobj()
    try:
        rows = unpacker.decompress(stream, row * height + 1)
    except zlib.error:
        raise _Unusable("is a damaged PNG") from None
    if len(rows) != row * height or not unpacker.eof or max(rows[::row]) > 4:
        raise _Unusable("is a damaged or truncated PNG")
    bare = _PNG + _chunk(b"IHDR", head) + _chunk(b"IDAT", stream) + _chunk(b"IEND", b"")
    try:
        picture = cv2.imdecode(np.frombuffer(bare, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        picture = None
    if picture is None or picture.shape != (height, width) or picture.dtype != np.uint16:
        raise _Unusable("is a PNG that cannot be decoded")
    return np.asarray(picture, np.uint16)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# Offsets of CameraInfo; a number that a camera leaves out is zero.
_FLOATS_AT = {
    "emissivity": 0x20,
    "distance_m": 0x24,
    "reflected_kelvin": 0x28,
    "air_kelvin": 0x2C,
    "window_kelvin": 0x30,
    "window_transmission": 0x34,
    "humidity": 0x3C,
    "planck_r1": 0x58,
    "planck_b": 0x5C,
    "planck_f": 0x60,
    "planck_r2": 0x30C,
    "alpha1": 0x70,
    "alpha2": 0x74,
    "beta1": 0x78,
    "beta2": 0x7C,
    "x": 0x80,
}
_PLANCK_O_AT = 0x308  # the one integer


def _constants(record: bytes, order: _Order) -> FlirConstants | None:
    """The measurement constants of a CameraInfo record; None where they are absent or absurd."""
    if len(record) < 0x310:
        return None
    values = {name: float(_read(record, order, "f", at)) for name, at in _FLOATS_AT.items()}
    values["planck_o"] = float(_read(record, order, "i", _PLANCK_O_AT))
    if not all(map(math.isfinite, values.values())):
        return None
    if values["humidity"] > 2:  # some files hold percent
        values["humidity"] /= 100
    if values["window_transmission"] == 0:  # not filled in: no window
        values["window_transmission"] = 1.0
    constants = FlirConstants(**values)
    shares = (constants.emissivity, constants.window_transmission)
    curve = (constants.planck_r1, constants.planck_b, constants.planck_r2)
    is_sane = all(0 < share <= 1 for share in shares) and all(0 < number < 1e12 for number in curve)
    return constants if is_sane and constants.distance_m >= 0 and abs(constants.planck_f) < 1e6 else None


# --- DJI --------------------------------------------------------------------------------------------------------------

# Sensors of DJI's cameras and of those sold under its name, width by height.
_SENSORS = (
    (80, 60),
    (160, 120),
    (256, 192),
    (320, 240),
    (320, 256),
    (336, 256),
    (384, 288),
    (640, 480),
    (640, 512),
    (1024, 768),
    (1280, 1024),
)
_MIN_DJI_BYTES = 2 * 80 * 60


def _is_dji(segments: list[tuple[int, bytes]]) -> bool:
    """Whether a file has DJI's thermal parameters, or DJI's name and a block that is large enough for a picture."""
    if any(marker in {0xE4, 0xE5} and _has_parameters(body) for marker, body in segments):
        return True
    size = sum(len(body) for marker, body in segments if marker == 0xE3)
    return size >= _MIN_DJI_BYTES and any(marker == 0xE1 and _make(body) == b"DJI" for marker, body in segments)


def _has_parameters(body: bytes) -> bool:
    """The magic numbers by which ExifTool knows DJI's three layouts of thermal parameters."""
    return (
        body.startswith(b"\xaa\x55\x12\x06")
        or body[32:36] in {b"\x2c\x01\x20\0", b"\xaa\x55\x38\0"}
        or body[64:68] == b"\x2c\x01\x20\0"
    )


def _make(body: bytes) -> bytes:
    """The camera maker of an EXIF segment; empty where there is none."""
    orders: dict[bytes, _Order] = {b"II*\0": "<", b"MM\0*": ">"}
    tiff = body[6:]
    order = orders.get(tiff[:4])
    if not body.startswith(b"Exif\0\0") or order is None:
        return b""
    try:
        directory = _read(tiff, order, "I", 4)
        for entry in range(directory + 2, directory + 2 + 12 * _read(tiff, order, "H", directory), 12):
            if _read(tiff, order, "H", entry) == 0x010F:
                length = _read(tiff, order, "I", entry + 4)
                at = entry + 8 if length <= 4 else _read(tiff, order, "I", entry + 8)
                return tiff[at : at + min(length, 64)].rstrip(b"\0 ").upper()
    except _Unusable:
        pass
    return b""


def _dji(segments: list[tuple[int, bytes]], size: int, max_pixels: int, max_side: int) -> Radiometric:
    _require_size(size)
    block = b"".join(body for marker, body in segments if marker == 0xE3)
    if not block:
        raise _Unusable("is absent")
    shapes = _dji_shapes(len(block), _jpeg_shape(segments))
    if not shapes:
        raise _Unusable(f"is {len(block)} bytes, which is no known sensor's picture")
    for height, width in shapes:
        _require_shape(width, height, max_pixels, max_side)
        counts = np.frombuffer(block, "<u2").reshape(height, width).astype(np.uint16)
        if _is_picture(counts):
            return Radiometric(counts, "counts", "dji")
    raise _Unusable("is no picture of plain samples")


def _jpeg_shape(segments: list[tuple[int, bytes]]) -> tuple[int, int]:
    """Height and width of the JPEG's frame header; zeros without one."""
    for marker, body in segments:
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC} and len(body) >= 5:
            return int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    return 0, 0


def _dji_shapes(size: int, jpeg_shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Shapes (H, W) that a block of this many bytes may have, the JPEG's own proportions first."""
    pixels, odd = divmod(size, 2)
    if odd:
        return []
    shapes = []
    jpeg_height, jpeg_width = jpeg_shape
    if jpeg_height and jpeg_width:
        width = round(math.sqrt(pixels * jpeg_width / jpeg_height))
        if width and pixels % width == 0 and abs(pixels // width * jpeg_width - width * jpeg_height) <= jpeg_width:
            shapes.append((pixels // width, width))
    shapes += [(height, width) for width, height in _SENSORS if width * height == pixels]
    return list(dict.fromkeys(shapes))


def _is_picture(counts: _Counts) -> bool:
    """Whether neighbours are more alike, along and across, than pixels taken at random; false for a constant block."""
    wide = counts.astype(np.int32)
    if min(wide.shape) < 2:
        return False
    shuffled = np.random.default_rng(0).permutation(wide.ravel())
    apart = float(np.abs(np.diff(shuffled)).mean())
    steps = [float(np.abs(np.diff(wide, axis=axis)).mean()) for axis in (0, 1)]
    return apart > 0 and max(steps) < 0.9 * apart
