"""What a file may be at most. Checked before a library makes objects or pixels of it.

A header may be as large as the file, and libraries make objects of every tag and segment, many times their size; a JPEG
decoder goes through the whole picture once for each scan, however empty. So the parts of a file are counted first.
"""

from __future__ import annotations

from dataclasses import dataclass

from recofuse_images.errors import BadImageError, ImageTooLargeError

# More of them than any honest file has.
MAX_CHUNKS = 1 << 16  # of a PNG or WebP file
MAX_SEGMENTS = 4096  # of a JPEG file, before its first scan
MAX_SCANS = 100  # of a progressive JPEG file; encoders make some 10
MAX_TAGS = 4096  # of a TIFF file
MAX_TAG_VALUES = 1 << 18  # numbers in one of them; a palette of 16 bits has three quarters of that
MAX_PAGES = 32  # directories of a TIFF file: the picture, its thumbnail, its overviews
MAX_EXIF_BYTES = 1 << 20
MAX_BYTES_PER_PIXEL = 8  # of a decoded picture of the most pixels; smaller ones may be deeper


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one image file, in bytes and pixels. aspect_tolerance: relative difference in a pair."""

    max_image_bytes: int = 32 << 20
    max_pixels: int = 16_000_000
    max_side: int = 8192
    min_side: int = 32
    aspect_tolerance: float = 0.02

    def check_bytes(self, data: bytes) -> None:
        """Raises BadImageError for an empty file and ImageTooLargeError for one of too many bytes."""
        if not data:
            raise BadImageError("the file is empty")
        if len(data) > self.max_image_bytes:
            raise ImageTooLargeError(f"the file has {len(data)} bytes; at most {self.max_image_bytes} are accepted")

    def check_size(self, width: int, height: int, bytes_per_pixel: int = 1) -> None:
        """Raises ImageTooLargeError and, for less than min_side, BadImageError. bytes_per_pixel: once decoded."""
        if max(width, height) > self.max_side or width * height > self.max_pixels:
            raise ImageTooLargeError(
                f"the image is {width}x{height}; accepted are at most {self.max_side} pixels a side "
                f"and {self.max_pixels} in all"
            )
        if min(width, height) < self.min_side:
            raise BadImageError(f"the image is {width}x{height}; accepted are at least {self.min_side} pixels a side")
        if width * height * bytes_per_pixel > self.max_pixels * MAX_BYTES_PER_PIXEL:
            raise ImageTooLargeError(
                f"the image is {width}x{height} of {bytes_per_pixel} bytes a pixel; accepted are at most "
                f"{self.max_pixels * MAX_BYTES_PER_PIXEL} bytes of pixels"
            )


# For files that their reader's owner chose, such as training data: as large as they come.
OWN_FILES = Limits(max_image_bytes=1 << 31, max_pixels=1 << 28, max_side=1 << 16, min_side=1)


def check_exif(num_bytes: int) -> None:
    """Raises ImageTooLargeError for more EXIF data than is read."""
    if num_bytes > MAX_EXIF_BYTES:
        raise ImageTooLargeError(f"the file has more than the accepted {MAX_EXIF_BYTES} bytes of EXIF data")


def too_many(kind: str, most: int, what: str) -> ImageTooLargeError:
    """The error of a file with too many parts of some kind."""
    return ImageTooLargeError(f"the {kind} file has more than the accepted {most} {what}")


def cut_short(kind: str) -> BadImageError:
    """The error of a file that is damaged or not there in full."""
    return BadImageError(f"the {kind} file is damaged or cut short; accepted are complete files")
