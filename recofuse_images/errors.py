"""Why an image is not read.

ImageError
├── BadImageError            empty, damaged, cut short, or of values or sizes that cannot be fused
├── UnsupportedImageError    sound, perhaps, but not one of the accepted kinds (`formats`): the message names its kind
└── ImageTooLargeError       more bytes, pixels, parts or pictures than the limits allow
"""


class ImageError(Exception):
    """An image that is not read. The message says what is wrong and what is accepted, and carries no content of it."""


class BadImageError(ImageError):
    """Empty, damaged, cut short, or of values or sizes that cannot be fused."""


class UnsupportedImageError(ImageError):
    """Not one of the accepted kinds of files."""


class ImageTooLargeError(ImageError):
    """More bytes, pixels, parts or pictures than the limits allow."""
