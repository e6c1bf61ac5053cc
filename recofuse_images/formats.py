"""The one table of accepted files, by container and by what its tags say; and the names of what is not accepted.

A reader asks the table before it decodes, README prints it, and a test reads every row of it back to the pixel. What is
not in it is refused by its name, because "damaged" would send people looking for a fault that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pixels = Literal["grey", "palette", "RGB", "CMYK", "YCbCr"]
SampleKind = Literal["unsigned", "signed", "floating point"]

ACCEPTED = "PNG, JPEG, WebP, AVIF, BMP and TIFF (README lists their kinds)"


@dataclass(frozen=True, slots=True)
class Row:
    """One accepted kind. bits: of one sample. storage: how the pixels may be packed; alpha: whether one may follow."""

    container: str
    pixels: tuple[Pixels, ...]
    kind: SampleKind
    bits: tuple[int, ...]
    storage: tuple[str, ...]
    alpha: bool = False
    remark: str = ""


_TIFF_STORAGE = ("none", "LZW", "Deflate", "PackBits")

TABLE: tuple[Row, ...] = (
    Row("PNG", ("grey",), "unsigned", (1, 2, 4, 8, 16), ("Deflate",), True, "`sBIT` says how many bits count"),
    Row("PNG", ("palette",), "unsigned", (1, 2, 4, 8), ("Deflate",), True),
    Row("PNG", ("RGB",), "unsigned", (8, 16), ("Deflate",), True, "four channels given as both sides: MFNet's layout"),
    Row(
        "JPEG",
        ("grey", "RGB", "YCbCr", "CMYK"),
        "unsigned",
        (8,),
        ("baseline", "progressive"),
        False,
        "previews, gain maps and films behind the picture are passed over; radiometric FLIR and DJI files",
    ),
    Row("WebP", ("RGB",), "unsigned", (8,), ("lossy", "lossless"), True, "one frame"),
    Row("AVIF", ("grey", "RGB"), "unsigned", (8, 10, 12), ("AV1",), True, "one frame; read at 8 bits"),
    Row("BMP", ("palette", "RGB"), "unsigned", (1, 4, 8), ("none",), False, "palettes of 1, 4 and 8 bits; 24 and 32"),
    Row("TIFF", ("grey",), "unsigned", (1, 2, 4, 8, 10, 12, 14, 16, 32), _TIFF_STORAGE, True, "0 may be white"),
    Row("TIFF", ("grey",), "signed", (8, 16, 32), _TIFF_STORAGE, True),
    Row("TIFF", ("grey",), "floating point", (16, 32, 64), _TIFF_STORAGE, True, "GDAL's nodata tag is read"),
    Row("TIFF", ("palette",), "unsigned", (1, 2, 4, 8), _TIFF_STORAGE),
    Row("TIFF", ("RGB",), "unsigned", (8, 10, 12, 14, 16, 32), _TIFF_STORAGE, True),
    Row("TIFF", ("RGB",), "signed", (8, 16, 32), _TIFF_STORAGE, True),
    Row("TIFF", ("RGB",), "floating point", (16, 32, 64), _TIFF_STORAGE, True),
    Row("TIFF", ("CMYK",), "unsigned", (8, 16), _TIFF_STORAGE),
    Row("TIFF", ("grey", "RGB", "YCbCr"), "unsigned", (8,), ("JPEG",)),
)


def row_of(container: str, pixels: str, kind: str, bits: int, storage: str) -> Row | None:
    """The row that accepts this, or None."""
    for row in TABLE:
        is_kind = (row.container, row.kind) == (container, kind) and pixels in row.pixels
        if is_kind and bits in row.bits and storage in row.storage:
            return row
    return None


def accepted_bits(container: str, pixels: str) -> str:
    """What is accepted of one kind of pixels, for messages: "unsigned 8, 16; floating point 32"."""
    kinds: dict[str, set[int]] = {}
    for row in TABLE:
        if row.container == container and pixels in row.pixels:
            kinds.setdefault(row.kind, set()).update(row.bits)
    return "; ".join(f"{kind} {', '.join(map(str, sorted(bits)))}" for kind, bits in kinds.items())


def markdown() -> str:
    """The table as README shows it."""
    lines = ["| File | Pixels | Bits of a sample | Compression | Remarks |", "|---|---|---|---|---|"]
    for row in TABLE:
        pixels = ", ".join(row.pixels) + (", with or without alpha" if row.alpha else "")
        bits = ", ".join(map(str, row.bits)) + ("" if row.kind == "unsigned" else f" {row.kind}")
        lines.append(f"| {row.container} | {pixels} | {bits} | {', '.join(row.storage)} | {row.remark} |")
    return "\n".join(lines) + "\n"


# What people send that is something else, by its first bytes: (offset, bytes, name).
_OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GIF8", "a GIF file"),
    (4, b"ftypheic", "a HEIC file"),
    (4, b"ftypheix", "a HEIC file"),
    (4, b"ftyphevc", "a HEIC file"),
    (4, b"ftypmif1", "a HEIF file"),
    (4, b"ftypmsf1", "a HEIF file"),
    (4, b"ftypavis", "an AVIF sequence"),
    (4, b"ftypcrx ", "a camera's raw file (CR3)"),
    (4, b"ftyp", "an MP4 or QuickTime file"),
    (0, b"\x00\x00\x00\x0cjP  \r\n", "a JPEG 2000 file"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 file"),
    (0, b"\xff\x0a", "a JPEG XL file"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL file"),
    (0, b"II\xbc\x01", "a JPEG XR file"),
    (0, b"v/1\x01", "an OpenEXR file"),
    (0, b"#?RADIANCE", "a Radiance HDR file"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"%PDF", "a PDF file"),
    (0, b"SIMPLE  =", "a FITS file"),
    (0, b"\x93NUMPY", "a NumPy file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"CDF", "a netCDF file"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"FFF\0", "a FLIR FFF or SEQ file without its JPEG"),
    (0, b"AFF\0", "a FLIR file without its JPEG"),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file (RAF)"),
    (0, b"IIRO", "a camera's raw file (ORF)"),
    (0, b"IIRS", "a camera's raw file (ORF)"),
    (0, b"IIU\0", "a camera's raw file (RW2)"),
    (0, b"MMOR", "a camera's raw file (ORF)"),
    (128, b"DICM", "a DICOM file"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
    (0, b"qoif", "a QOI file"),
    (0, b"DDS ", "a DDS file"),
    (0, b"<svg", "an SVG file"),
    (0, b"<?xml", "an XML file"),
    (0, b"<", "an HTML or XML file"),
    (0, b"{", "JSON"),
    (0, b"data:", "a data URL; send the bytes that it stands for"),
)


def name_of_other(data: bytes) -> str:
    """What a file of no accepted container is, as far as its first bytes tell: "a GIF file"."""
    for offset, magic, name in _OTHERS:
        if data[offset : offset + len(magic)] == magic:
            return name
    if data[:1] == b"P" and data[1:2] in b"1234567fF" and data[2:3].isspace():
        return "a PNM file (PBM, PGM, PPM, PAM or PFM)"
    return "not a readable image file"
