"""Thermal cameras' JPEGs: built here byte by byte, read back to the sample, never trusted beyond their bytes."""

import io
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from recofuse_images import radiometric
from recofuse_images.radiometric import FlirConstants, Radiometric, RawMissing, celsius_of_counts, radiometric_of

Order = Literal["<", ">"]
LIMITS = {"max_pixels": 4_000_000, "max_side": 4096}

# An E40's, as its files carry them.
CONSTANTS = FlirConstants(
    emissivity=0.95,
    distance_m=2.0,
    reflected_kelvin=293.15,
    air_kelvin=291.15,
    window_kelvin=293.15,
    window_transmission=1.0,
    humidity=0.5,
    planck_r1=14906.216,
    planck_b=1396.5,
    planck_f=1.0,
    planck_o=-7261.0,
    planck_r2=0.010956882,
    alpha1=0.006569,
    alpha2=0.012620,
    beta1=-0.002276,
    beta2=-0.006670,
    x=1.9,
)


def scene(height: int = 60, width: int = 80, seed: int = 0) -> NDArray[np.uint16]:
    """A smooth 16-bit picture around the counts of a room."""
    rng = np.random.default_rng(seed)
    field = cv2.resize(rng.random((5, 6)), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(13000 + 2500 * field + rng.normal(0, 3, field.shape), np.uint16)


@dataclass(frozen=True)
class Flir:
    """How a FLIR file is written; each default is what most cameras do."""

    order: Order = ">"  # of the FFF file
    record_order: Order = "<"
    payload: Literal["png", "plain"] = "png"
    is_png_swapped: bool = True
    constants: FlirConstants | None = None
    part_bytes: int = 65000

    def raw(self, counts: NDArray[np.uint16]) -> bytes:
        height, width = counts.shape
        head = struct.pack(f"{self.record_order}HHH", 2, width, height).ljust(32, b"\0")
        if self.payload == "plain":
            return head + counts.astype(f"{self.record_order}u2").tobytes()
        return head + cv2.imencode(".png", counts.byteswap() if self.is_png_swapped else counts)[1].tobytes()

    def fff(self, counts: NDArray[np.uint16]) -> bytes:
        records = [(0x20, camera_info(self.constants, self.record_order))] if self.constants else []
        return fff_of([(0x23, b"\0" * 40), *records, (0x01, self.raw(counts))], self.order)

    def parts(self, counts: NDArray[np.uint16]) -> list[bytes]:
        return parts_of(self.fff(counts), self.part_bytes)

    def jpeg(self, counts: NDArray[np.uint16]) -> bytes:
        return jpeg_of(self.parts(counts))


def camera_info(c: FlirConstants, order: Order) -> bytes:
    record = bytearray(0x400)
    struct.pack_into(f"{order}H", record, 0, 2)
    floats = (c.emissivity, c.distance_m, c.reflected_kelvin, c.air_kelvin, c.window_kelvin, c.window_transmission)
    struct.pack_into(f"{order}6f", record, 0x20, *floats)
    struct.pack_into(f"{order}f", record, 0x3C, c.humidity)
    struct.pack_into(f"{order}3f", record, 0x58, c.planck_r1, c.planck_b, c.planck_f)
    struct.pack_into(f"{order}5f", record, 0x70, c.alpha1, c.alpha2, c.beta1, c.beta2, c.x)
    struct.pack_into(f"{order}if", record, 0x308, int(c.planck_o), c.planck_r2)
    return bytes(record)


def fff_of(records: Sequence[tuple[int, bytes]], order: Order) -> bytes:
    head = b"FFF\0" + b"CAMCTRL".ljust(16, b"\0") + struct.pack(f"{order}III", 101, 64, len(records))
    directory, bodies, at = b"", b"", 64 + 32 * len(records)
    for kind, body in records:
        directory += struct.pack(f"{order}HHIIII", kind, 1, 100, 1, at, len(body)).ljust(32, b"\0")
        bodies, at = bodies + body, at + len(body)
    return head.ljust(64, b"\0") + directory + bodies


def parts_of(fff: bytes, part_bytes: int = 65000) -> list[bytes]:
    chunks = [fff[at : at + part_bytes] for at in range(0, len(fff), part_bytes)]
    return [b"FLIR\0\x01" + bytes([index, len(chunks) - 1]) + chunk for index, chunk in enumerate(chunks)]


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


PREVIEW = cv2.imencode(".jpg", cv2.applyColorMap(np.tile(np.arange(80, dtype=np.uint8) * 3, (60, 1)), 14))[1].tobytes()
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, 6) + b"\0\0\0\0"
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"


def jpeg_of(parts: Sequence[bytes], between: Sequence[bytes] = ()) -> bytes:
    """The preview with its APP1 segments: the parts, one of `between` after each as long as there are any."""
    body = b""
    for index, part in enumerate(parts):
        body += segment(0xE1, part) + (segment(0xE1, between[index]) if index < len(between) else b"")
    return PREVIEW[:2] + body + PREVIEW[2:]


def read(jpeg: bytes, **limits: int) -> Radiometric | RawMissing | None:
    return radiometric_of(jpeg, **{**LIMITS, **limits})


def counts_of(jpeg: bytes) -> NDArray[Any]:
    result = read(jpeg)
    assert isinstance(result, Radiometric), result
    assert result.unit == "counts"
    assert result.values.dtype == np.uint16
    return result.values


def reason_of(jpeg: bytes, **limits: int) -> str:
    result = read(jpeg, **limits)
    assert isinstance(result, RawMissing), result
    return result.reason


# --- FLIR: round trips ------------------------------------------------------------------------------------------------

FLIRS = st.builds(
    Flir,
    order=st.sampled_from(["<", ">"]),
    record_order=st.sampled_from(["<", ">"]),
    payload=st.sampled_from(["png", "plain"]),
    is_png_swapped=st.booleans(),
    part_bytes=st.integers(200, 65000),
)


@settings(deadline=None, max_examples=60)
@given(flir=FLIRS, height=st.integers(2, 70), width=st.integers(2, 70), seed=st.integers(0, 99), shuffle=st.randoms())
def test_every_layout_comes_back_to_the_sample(flir: Flir, height: int, width: int, seed: int, shuffle: Any) -> None:
    counts = scene(height, width, seed)
    parts = flir.parts(counts)
    shuffle.shuffle(parts)  # the index counts, not the place in the file
    jpeg = jpeg_of(parts, [EXIF, XMP])
    assert np.array_equal(counts_of(jpeg), counts)
    assert Image.open(io.BytesIO(jpeg)).size == (80, 60)  # still the JPEG that it was


def test_the_field_layout_is_read() -> None:
    """One record, head and directory in big-endian order, raw head in little-endian, the PNG swapped."""
    counts = scene(240, 320)
    raw = struct.pack("<HHH", 2, 320, 240) + b"\0" * 26 + cv2.imencode(".png", counts.byteswap())[1].tobytes()
    entry = struct.pack(">HHIIII", 1, 0, 100, 1, 96, len(raw)).ljust(32, b"\0")
    fff = (b"FFF\0" + b"FLIR".ljust(16, b"\0") + struct.pack(">III", 100, 64, 1)).ljust(64, b"\0") + entry + raw
    assert np.array_equal(counts_of(jpeg_of(parts_of(fff))), counts)


def test_the_raw_picture_may_be_of_another_size_and_is_not_turned() -> None:
    counts = scene(30, 24)  # the preview is 80x60, and its EXIF says that it lies on its side
    jpeg = PREVIEW[:2] + segment(0xE1, EXIF) + Flir().jpeg(counts)[2:]
    assert np.array_equal(counts_of(jpeg), counts)


def test_plain_samples_that_look_like_a_jpeg_are_samples() -> None:
    counts = scene()
    counts[0, :2] = 0xD8FF, 0x00FF  # little-endian: FF D8 FF 00
    assert np.array_equal(counts_of(Flir(payload="plain").jpeg(counts)), counts)


def test_a_plain_picture_against_its_own_word_is_read_as_the_picture_it_is() -> None:
    counts = scene()
    jpeg = Flir(payload="plain").jpeg(counts.byteswap())
    assert np.array_equal(counts_of(jpeg), counts)


def test_fill_bytes_before_a_marker_are_skipped() -> None:
    counts = scene()
    jpeg = Flir().jpeg(counts)
    assert np.array_equal(counts_of(jpeg[:2] + b"\xff\xff\xff" + jpeg[2:]), counts)


def test_the_same_part_twice_is_one_part() -> None:
    counts = scene()
    parts = Flir(part_bytes=3000).parts(counts)
    assert len(parts) > 1
    assert np.array_equal(counts_of(jpeg_of([*parts, parts[0]])), counts)


# --- FLIR: temperatures -----------------------------------------------------------------------------------------------


def counts_of_celsius(celsius: float, c: FlirConstants) -> float:
    """The measurement written forwards, from the object to the sensor: an independent writing of the formula."""

    def black_body(kelvin: float) -> float:
        return c.planck_r1 / (c.planck_r2 * (math.exp(c.planck_b / kelvin) - c.planck_f)) - c.planck_o

    air = c.air_kelvin - 273.15
    water = c.humidity * math.exp(1.5587 + 0.06939 * air - 0.00027816 * air * air + 0.00000068455 * air * air * air)
    first = math.exp(-math.sqrt(c.distance_m) * (c.alpha1 + c.beta1 * math.sqrt(water)))
    second = math.exp(-math.sqrt(c.distance_m) * (c.alpha2 + c.beta2 * math.sqrt(water)))
    through = c.x * first + (1 - c.x) * second
    leaving = c.emissivity * black_body(celsius + 273.15) + (1 - c.emissivity) * black_body(c.reflected_kelvin)
    arriving = through * leaving + (1 - through) * black_body(c.air_kelvin)
    return c.window_transmission * arriving + (1 - c.window_transmission) * black_body(c.window_kelvin)


KELVIN = st.floats(250, 320)
VALID = st.builds(
    FlirConstants,
    emissivity=st.floats(0.3, 1),
    distance_m=st.floats(0, 100),
    reflected_kelvin=KELVIN,
    air_kelvin=KELVIN,
    window_kelvin=KELVIN,
    window_transmission=st.floats(0.5, 1),
    humidity=st.floats(0, 1),
    planck_r1=st.floats(10000, 25000),
    planck_b=st.floats(1350, 1550),
    planck_f=st.floats(0.5, 2),
    planck_o=st.integers(-9000, 0).map(float),
    planck_r2=st.floats(0.008, 0.05),
    alpha1=st.just(0.006569),
    alpha2=st.just(0.012620),
    beta1=st.just(-0.002276),
    beta2=st.just(-0.006670),
    x=st.just(1.9),
)


@settings(deadline=None, max_examples=200)
@given(constants=VALID, celsius=st.floats(-30, 400))
def test_temperature_to_counts_and_back(constants: FlirConstants, celsius: float) -> None:
    counts = counts_of_celsius(celsius, constants)
    assert celsius_of_counts(np.array([counts]), constants)[0] == pytest.approx(celsius, abs=1e-6)


def test_a_black_body_at_no_distance_is_the_bare_planck_curve() -> None:
    bare = replace(CONSTANTS, emissivity=1.0, distance_m=0.0)
    counts = np.array([12000.0, 14000.0, 18000.0])
    kelvin = 1396.5 / np.log(14906.216 / (0.010956882 * (counts - 7261)) + 1)
    assert celsius_of_counts(counts, bare) == pytest.approx(kelvin - 273.15, abs=1e-9)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_file_with_constants_gives_degrees(order: Order) -> None:
    counts = np.asarray(np.linspace(16000, 26000, 4800).reshape(60, 80), np.uint16)
    result = read(Flir(constants=CONSTANTS, record_order=order).jpeg(counts))
    assert isinstance(result, Radiometric)
    assert (result.unit, result.camera) == ("celsius", "flir")
    assert result.values.dtype == np.float32
    back = [[counts_of_celsius(float(value), CONSTANTS) for value in row] for row in result.values]
    assert np.abs(np.array(back) - counts).max() < 0.05  # float32 constants and values
    assert 0 < result.values.min() < result.values.max() < 60


def test_humidity_in_percent_is_the_same_humidity() -> None:
    counts = scene() + np.uint16(5000)
    share, percent = (read(Flir(constants=replace(CONSTANTS, humidity=h)).jpeg(counts)) for h in (0.5, 50.0))
    assert isinstance(share, Radiometric)
    assert isinstance(percent, Radiometric)
    assert share.unit == percent.unit == "celsius"
    assert np.allclose(share.values, percent.values, atol=1e-4)


def test_what_carries_no_weight_is_not_asked_for() -> None:
    sparse = replace(
        CONSTANTS, emissivity=1.0, distance_m=0.0, reflected_kelvin=0.0, air_kelvin=0.0, window_kelvin=0.0, humidity=0.0
    )
    result = read(Flir(constants=replace(sparse, window_transmission=0.0)).jpeg(scene() + np.uint16(5000)))
    assert isinstance(result, Radiometric)
    assert result.unit == "celsius"


@pytest.mark.parametrize(
    "change",
    [
        {"emissivity": 0.0},
        {"emissivity": 1.5},
        {"emissivity": math.nan},
        {"reflected_kelvin": 0.0},
        {"reflected_kelvin": -5.0},
        {"air_kelvin": math.inf},
        {"air_kelvin": 1e30},
        {"window_transmission": 0.5, "window_kelvin": 0.0},
        {"window_transmission": -1.0},
        {"distance_m": -1.0},
        {"distance_m": 1e20},
        {"humidity": -0.5},
        {"alpha1": -1e30},
        {"x": 1e30},
        {"planck_r1": 0.0},
        {"planck_b": 0.0},
        {"planck_r2": -1.0},
        {"planck_r2": 1e-30},
        {"planck_o": -30000.0},  # the logarithm of a negative number, for this picture
        {"planck_f": -1e5},
    ],
)
def test_absurd_constants_leave_the_counts(change: dict[str, float]) -> None:
    counts = scene() + np.uint16(5000)
    assert np.array_equal(counts_of(Flir(constants=replace(CONSTANTS, **change)).jpeg(counts)), counts)


def test_absent_and_short_constants_leave_the_counts() -> None:
    counts = scene()
    for info in (b"\0" * 0x400, camera_info(CONSTANTS, "<")[:0x300]):
        fff = fff_of([(0x20, info), (0x01, Flir().raw(counts))], ">")
        assert np.array_equal(counts_of(jpeg_of(parts_of(fff))), counts)


# --- FLIR: what is not there, and what is not true --------------------------------------------------------------------


def test_other_files_are_not_radiometric() -> None:
    for data in (b"", b"\xff\xd8", PREVIEW, b"\x89PNG\r\n\x1a\n" + b"\0" * 64, jpeg_of([EXIF, XMP]), b"FFF\0" * 40):
        assert read(data) is None


def test_a_missing_part_is_named() -> None:
    parts = Flir(part_bytes=3000).parts(scene())
    assert "lacks part 2 of" in reason_of(jpeg_of([parts[0], *parts[2:]]))


def test_contradicting_parts_are_not_joined() -> None:
    parts = Flir(part_bytes=3000).parts(scene())
    changed = parts[1][:20] + bytes([parts[1][20] ^ 1]) + parts[1][21:]
    assert "same number" in reason_of(jpeg_of([*parts, changed]))
    assert "disagree" in reason_of(jpeg_of([*parts[:-1], parts[-1][:7] + b"\x09" + parts[-1][8:]]))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"\xff\xd8\xff\xf7" + b"\0" * 100, "JPEG-LS"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 100, "JPEG data"),
        (b"\x01" * 20000, "not known"),
        (b"\x01" * 2000, "cut short"),
        (cv2.imencode(".png", np.zeros((60, 80), np.uint8))[1].tobytes(), "grey PNG of 16 bits"),
        (cv2.imencode(".png", np.zeros((60, 80, 3), np.uint16))[1].tobytes(), "grey PNG of 16 bits"),
        (cv2.imencode(".png", np.zeros((80, 60), np.uint16))[1].tobytes(), "grey PNG of 16 bits"),
        (b"\x89PNG\r\n\x1a\n", "grey PNG of 16 bits"),
    ],
)
def test_a_payload_that_cannot_be_read_is_named(payload: bytes, words: str) -> None:
    raw = struct.pack("<HHH", 2, 80, 60).ljust(32, b"\0") + payload
    assert words in reason_of(jpeg_of(parts_of(fff_of([(0x01, raw)], ">"))))


def test_a_file_without_a_raw_record_says_so() -> None:
    assert "no raw picture" in reason_of(jpeg_of(parts_of(fff_of([(0x20, camera_info(CONSTANTS, "<"))], ">"))))


def png_of(width: int, height: int, rows: bytes, interlace: int = 0) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def flir_png(width: int, height: int, png: bytes) -> bytes:
    raw = struct.pack("<HHH", 2, width, height).ljust(32, b"\0") + png
    return jpeg_of(parts_of(fff_of([(0x01, raw)], ">")))


@pytest.mark.parametrize(
    "png",
    [
        png_of(8, 6, bytes(17 * 5)),  # a row is missing: decoders leave it unwritten
        png_of(8, 6, bytes(17 * 7)),
        png_of(8, 6, b"\x09" + bytes(17 * 6 - 1)),  # no such filter
        png_of(8, 6, bytes(17 * 6), interlace=1),
    ],
)
def test_a_png_that_does_not_fill_its_picture_is_refused(png: bytes) -> None:
    assert "PNG" in reason_of(flir_png(8, 6, png))
    assert counts_of(flir_png(8, 6, png_of(8, 6, bytes(17 * 6)))).max() == 0


def test_sizes_are_bounded_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = Flir().jpeg(scene(60, 80))
    assert "60" in reason_of(jpeg, max_side=79)
    assert "4799" in reason_of(jpeg, max_pixels=4799)
    assert isinstance(read(jpeg, max_side=80, max_pixels=4800), Radiometric)
    # A PNG of a few kilobytes that unpacks to gigabytes is met with the size it claims, and with no more.
    bomb = png_of(60000, 60000, bytes(2**24))
    assert "more than" in reason_of(flir_png(60000, 60000, bomb))
    assert "grey PNG of 16 bits" in reason_of(flir_png(80, 60, bomb))
    assert "truncated" in reason_of(flir_png(80, 60, png_of(80, 60, bytes(2**24))))
    monkeypatch.setattr(radiometric, "MAX_FILE_BYTES", len(jpeg) - 1)
    assert "MiB" in reason_of(jpeg)
    assert read(PREVIEW + b"\0" * len(jpeg)) is None  # size alone makes no file radiometric


@pytest.mark.parametrize("at", [0x14, 0x18, 0x1C])
def test_an_absurd_directory_is_refused(at: int) -> None:
    fff = bytearray(Flir().fff(scene()))
    fff[at : at + 4] = b"\xff" * 4
    assert "thermal block" in reason_of(jpeg_of(parts_of(bytes(fff))))


SMALL = np.asarray(np.arange(20 * 24).reshape(20, 24) * 5 + 13000, np.uint16)
WRITERS: dict[str, Callable[[], bytes]] = {
    "png": Flir(constants=CONSTANTS).jpeg(SMALL).__bytes__,
    "plain": Flir(payload="plain", order="<", part_bytes=700).jpeg(SMALL).__bytes__,
    "dji": lambda: dji_jpeg(SMALL),
}


@pytest.mark.parametrize("name", WRITERS)
@settings(deadline=None, max_examples=150)
@given(place=st.floats(0, 1), value=st.integers(0, 255), is_cut=st.booleans())
def test_any_byte_changed_or_any_cut_is_survived(name: str, place: float, value: int, is_cut: bool) -> None:
    whole = WRITERS[name]()
    at = min(int(place * len(whole)), len(whole) - 1)
    damaged = whole[:at] if is_cut else whole[:at] + bytes([value]) + whole[at + 1 :]
    first, second = read(damaged), read(damaged)
    assert type(first) is type(second)
    if isinstance(first, Radiometric):
        assert isinstance(second, Radiometric)
        assert first.values.size == SMALL.size
        assert np.array_equal(first.values, second.values)  # unwritten memory would differ
        assert np.isfinite(first.values).all()


@settings(deadline=None, max_examples=200)
@given(body=st.binary(max_size=400), head=st.sampled_from([b"FLIR\0\x01\0\0", b"FLIR\0\x01\0\0FFF\0", b"FLIR\0", b""]))
def test_any_block_is_survived(body: bytes, head: bytes) -> None:
    read(PREVIEW[:2] + segment(0xE1, head + body) + PREVIEW[2:])
    read(PREVIEW[:2] + segment(0xE4, b"\xaa\x55\x12\x06") + segment(0xE3, body) + PREVIEW[2:])


# --- DJI --------------------------------------------------------------------------------------------------------------


def dji_jpeg(
    counts: NDArray[np.uint16],
    *,
    has_make: bool = True,
    parameters: bytes = b"\xaa\x55\x12\x06",
    part_bytes: int = 65000,
) -> bytes:
    block = counts.astype("<u2").tobytes()
    make = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI", 0x010F, 2, 4) + b"DJI\0" + b"\0\0\0\0"
    body = segment(0xE1, make) if has_make else b""
    body += b"".join(segment(0xE3, block[at : at + part_bytes]) for at in range(0, len(block), part_bytes))
    if parameters:
        body += segment(0xE4, parameters)
    preview = cv2.imencode(".jpg", np.full((*counts.shape, 3), 90, np.uint8))[1].tobytes()
    return preview[:2] + body + preview[2:]


@pytest.mark.parametrize("shape", [(512, 640), (120, 160), (192, 256), (256, 336), (480, 640)])
@pytest.mark.parametrize("has_make", [True, False])
def test_dji_samples_come_back(shape: tuple[int, int], has_make: bool) -> None:
    counts = scene(*shape)
    result = read(dji_jpeg(counts, has_make=has_make))
    assert isinstance(result, Radiometric)
    assert (result.camera, result.unit) == ("dji", "counts")
    assert np.array_equal(result.values, counts)


def test_a_dji_picture_may_be_smaller_than_its_jpeg() -> None:
    counts = scene(512, 640)
    small = dji_jpeg(counts)
    large = cv2.imencode(".jpg", np.full((1024, 1280, 3), 90, np.uint8))[1].tobytes()
    segments = small[2 : small.index(b"\xff\xe0")]  # the thermal segments stand before the preview's own
    assert np.array_equal(counts_of(large[:2] + segments + large[2:]), counts)


def test_dji_is_known_by_maker_or_by_parameters() -> None:
    counts = scene(120, 160)
    assert np.array_equal(counts_of(dji_jpeg(counts, parameters=b"")), counts)
    for parameters in (b"\0" * 32 + b"\xaa\x55\x38\0", b"\0" * 32 + b"\x2c\x01\x20\0", b"\0" * 64 + b"\x2c\x01\x20\0"):
        assert np.array_equal(counts_of(dji_jpeg(counts, has_make=False, parameters=parameters)), counts)
    assert read(dji_jpeg(counts, has_make=False, parameters=b"")) is None


def test_a_dji_photograph_is_not_radiometric() -> None:
    assert read(dji_jpeg(np.zeros((4, 4), np.uint16), parameters=b"")) is None


def test_a_dji_block_that_is_no_picture_is_named() -> None:
    noise = np.random.default_rng(0).integers(0, 2**16, (120, 160), np.uint16)
    assert "no picture" in reason_of(dji_jpeg(noise))
    assert "no picture" in reason_of(dji_jpeg(np.full((120, 160), 900, np.uint16)))
    jpeg = dji_jpeg(scene(120, 160))
    extra = jpeg[:2] + segment(0xE3, b"\0\1\2") + jpeg[2:]
    assert "no known sensor" in reason_of(extra)
    assert "absent" in reason_of(PREVIEW[:2] + segment(0xE4, b"\xaa\x55\x12\x06") + PREVIEW[2:])
    assert "more than" in reason_of(jpeg, max_side=150)
