"""One file or raw frame of either side, and the pair: from bytes to 8 bits on one grid.

`inspect` reads a file's header alone, so that a decompression bomb costs nothing, and finds files that were cut short;
front ends call it at admission. `read_pair` then reads the pixels. Messages begin with the side that they speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recofuse_images import avif, bmp, formats, jpeg, png, scale, tiff, webp
from recofuse_images.errors import BadImageError, ImageError, UnsupportedImageError
from recofuse_images.frames import Layout, check_frame, read_frame
from recofuse_images.limits import Limits
from recofuse_images.picture import Header, Picture, grey_of, upright

if TYPE_CHECKING:
    from recofuse_images.measures import Measured

Role = Literal["vis", "ir"]
IrSource = Literal["raw", "palette", "grey"]
Pixels = NDArray[np.uint8]

DEFAULT_LIMITS = Limits()

_PHOTOGRAPH = (
    "ir: the picture is in colour, and in no palette that is known; its brightness was taken. Send the infrared image "
    "as grey values or as a radiometric file, and make sure that vis and ir are not swapped"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A decoded pair on one grid: vis (H, W, 3) RGB and ir (H, W), both uint8.

    ir_source: what of the infrared file was read: the radiometric values within it, the intensity behind its false
    colours, or its grey values. warnings: sentences for people, about what may not be what was meant. ir_scale: the
    values of the infrared file that became black and white; equal ones for a frame without contrast. measured: the
    values themselves, if they were asked for.
    """

    vis: Pixels
    ir: Pixels
    ir_source: IrSource = "grey"
    warnings: tuple[str, ...] = ()
    ir_scale: scale.Range = scale.FULL_RANGE
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class Infrared:
    """One infrared image at its own depth: a grey picture, what was read of the file, and what people should know.

    is_celsius: the values are degrees, rather than counts or levels.
    """

    picture: Picture
    source: IrSource = "grey"
    warnings: tuple[str, ...] = ()
    is_celsius: bool = False

    def measured(
        self, size: tuple[int, int], ir_scale: scale.Range, coverage: NDArray[np.bool_] | None = None
    ) -> Measured:
        """Its values on a grid of (width, height); coverage: where they are measurements at all."""
        from recofuse_images import measures  # not above: front ends read headers alone, and go without OpenCV

        is_whole = self.picture.values.dtype in (np.uint8, np.uint16)
        return measures.Measured(measures.on_grid(self.picture, size, coverage), ir_scale, self.is_celsius, is_whole)


class _Container(NamedTuple):
    read_header: Callable[[bytes, Limits], Header]
    read_pixels: Callable[[bytes, Any], Picture]


def inspect(data: bytes, role: Role, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Check a file without decoding it.

    Raises UnsupportedImageError (not in `formats.TABLE`), ImageTooLargeError (bytes, pixels, sides, parts or pictures)
    and BadImageError (empty, too small, damaged).
    """
    with _speaking_of(role):
        limits.check_bytes(data)
        return _container_of(data).read_header(data, limits)


def inspect_frame(data: bytes, layout: Layout, role: Role, limits: Limits = DEFAULT_LIMITS) -> None:
    """Check a raw frame against its layout. Raises like `inspect`."""
    with _speaking_of(role):
        check_frame(data, layout, limits)


def check_sides(vis: bytes, ir: bytes) -> None:
    """The two files are two; MFNet's four-channel PNG may serve as both. Raises BadImageError."""
    if vis == ir and not png.is_rgba(vis):
        raise BadImageError("vis and ir are the same file; send the visible image as vis and the infrared one as ir")


def check_sizes(vis: tuple[int, int], ir: tuple[int, int], limits: Limits = DEFAULT_LIMITS) -> None:
    """Check that two sizes (width, height) can share a grid. Raises BadImageError."""
    ratio = (ir[0] * vis[1]) / (ir[1] * vis[0])
    if max(ratio, 1 / ratio) > 1 + limits.aspect_tolerance:
        raise BadImageError(
            f"vis is {vis[0]}x{vis[1]} and ir is {ir[0]}x{ir[1]}; accepted are registered pairs of equal aspect ratio "
            f"(within {limits.aspect_tolerance:.0%}), whose ir is then resampled to the vis size"
        )


def read_picture(data: bytes, role: Role, limits: Limits = DEFAULT_LIMITS) -> Picture:
    """A file's pixels at its own depth, upright. Raises like `inspect`; never returns a partly decoded image."""
    header = inspect(data, role, limits)
    with _speaking_of(role):
        picture = _container_of(data).read_pixels(data, header)
    alpha = None if picture.alpha is None else upright(picture.alpha, header.orientation)
    return replace(picture, values=upright(picture.values, header.orientation), alpha=alpha)


def read_infrared(data: bytes, limits: Limits = DEFAULT_LIMITS, layout: Layout | None = None) -> Infrared:
    """An infrared file, or a raw frame by its layout, at its own depth, upright. Raises like `inspect`.

    Of a radiometric JPEG the values that the camera measured, in degrees Celsius where the file tells how to compute
    them; of a false-colour picture its place in the palette, 0 to 255; of any other its grey values.
    """
    if layout is not None:
        with _speaking_of("ir"):
            return Infrared(read_frame(data, layout, limits, as_grey=True))
    warnings: tuple[str, ...] = ()
    if data.startswith(jpeg.MAGIC):
        from recofuse_images import radiometric  # not above: front ends read headers alone, and go without OpenCV

        header = inspect(data, "ir", limits)
        found = radiometric.radiometric_of(data, max_pixels=limits.max_pixels, max_side=limits.max_side)
        if isinstance(found, radiometric.Radiometric):
            values = upright(found.values, header.orientation)
            return Infrared(Picture(values), "raw", is_celsius=found.unit == "celsius")
        if found is not None:
            warnings = (f"ir: {found.reason}",)
    picture = read_picture(data, "ir", limits)
    if picture.values.ndim == 2:
        return Infrared(picture, warnings=warnings)
    return _grey_behind(picture, warnings)


def read_vis(
    data: bytes,
    limits: Limits = DEFAULT_LIMITS,
    vis_range: scale.Range | None = None,
    layout: Layout | None = None,
) -> Pixels:
    """A visible file, or a raw frame by its layout, as 8 bits: (H, W, 3) RGB. Raises like `inspect`."""
    return scale.vis_levels(_read_or_frame(data, "vis", layout, limits), vis_range)


def read_ir(data: bytes, limits: Limits = DEFAULT_LIMITS, ir_range: scale.Range | None = None) -> Pixels:
    """An infrared file as 8 bits: (H, W). Raises like `inspect`."""
    return scale.ir_levels(read_infrared(data, limits).picture, ir_range)


def read_pair(
    vis: bytes,
    ir: bytes,
    limits: Limits = DEFAULT_LIMITS,
    *,
    vis_range: scale.Range | None = None,
    ir_range: scale.Range | None = None,
    vis_layout: Layout | None = None,
    ir_layout: Layout | None = None,
    is_measured: bool = False,
) -> Pair:
    """Both images as 8 bits on the vis grid; a layout says how to read a raw frame. Raises like `inspect`.

    is_measured: whether the infrared values are wanted too.
    """
    if vis_layout is None and ir_layout is None and vis == ir:
        check_sides(vis, ir)
        colours, infrared = _packed(vis, limits)
    else:
        colours = _read_or_frame(vis, "vis", vis_layout, limits)
        infrared = read_infrared(ir, limits, ir_layout)
    visible = scale.vis_levels(colours, vis_range)
    height, width = visible.shape[:2]
    check_sizes((width, height), infrared.picture.values.shape[1::-1], limits)
    grey, ir_scale = scale.ir_scaled(infrared.picture, ir_range)
    if grey.shape != (height, width):
        grey = _resampled(grey, width, height)
    return Pair(
        np.ascontiguousarray(visible),
        np.ascontiguousarray(grey),
        infrared.source,
        infrared.warnings,
        ir_scale,
        infrared.measured((width, height), ir_scale) if is_measured else None,
    )


def _container_of(data: bytes) -> _Container:
    if data.startswith(png.MAGIC):
        return _Container(png.read_header, png.read_pixels)
    if data.startswith(jpeg.MAGIC):
        return _Container(jpeg.read_header, jpeg.read_pixels)
    if data[:4] in tiff.MAGICS:
        return _Container(tiff.read_header, tiff.read_pixels)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _Container(webp.read_header, webp.read_pixels)
    if data.startswith(bmp.MAGIC):
        return _Container(bmp.read_header, bmp.read_pixels)
    if data[4:12] == avif.BRAND:
        return _Container(avif.read_header, avif.read_pixels)
    raise UnsupportedImageError(f"{formats.name_of_other(data)} is not accepted; accepted are {formats.ACCEPTED}")


def _read_or_frame(data: bytes, role: Role, layout: Layout | None, limits: Limits) -> Picture:
    if layout is None:
        return read_picture(data, role, limits)
    with _speaking_of(role):
        return read_frame(data, layout, limits)


def _packed(data: bytes, limits: Limits) -> tuple[Picture, Infrared]:
    """MFNet's layout: the infrared image is where other files have alpha."""
    both = read_picture(data, "vis", limits)
    if both.alpha is None or both.alpha.min() == both.alpha.max():
        raise BadImageError("vis and ir are the same file, and its fourth channel holds no infrared image")
    return both, Infrared(Picture(both.alpha, both.bits))


def _grey_behind(picture: Picture, warnings: tuple[str, ...]) -> Infrared:
    """An infrared picture in colour: the field that a palette shows, else its luma, with a word about its colours."""
    from recofuse_images import palettes  # not above: front ends read headers alone, and go without OpenCV

    colours = picture.values
    if colours.dtype == np.uint8 and not np.array_equal(colours[..., 0], colours[..., 1]):
        if (shown := palettes.grey_of_false_colour(colours)) is not None:
            return Infrared(Picture(shown.grey, bits=8), "palette", warnings)
        if palettes.is_coloured(colours):
            warnings = (*warnings, _PHOTOGRAPH)
    return Infrared(replace(picture, values=grey_of(colours)), warnings=warnings)


def _resampled(grey: Pixels, width: int, height: int) -> Pixels:
    from recofuse_images.codecs import cv2

    method = cv2.INTER_AREA if grey.shape[0] > height else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(grey, (width, height), interpolation=method), np.uint8)


@contextmanager
def _speaking_of(role: Role) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise type(error)(f"{role}: {error}") from error
