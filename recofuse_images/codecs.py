"""The packages that decode, encode and resample, which not everybody has: they are the extra `images`.

Functions import them from here when they need one, not modules above: front ends read headers alone, clients send files
as they are, and both go without. Who has none of them reads which extra brings it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import cv2 as cv2
    import imagecodecs as imagecodecs
    import tifffile as tifffile
    from PIL import Image as Image
    from PIL import ImageOps as ImageOps
else:
    from importlib import import_module

    _MODULES = {name: name for name in ("cv2", "imagecodecs", "tifffile")} | {
        name: f"PIL.{name}" for name in ("Image", "ImageOps")
    }

    def __getattr__(name: str) -> object:
        """The module. Raises ModuleNotFoundError with the extra's name."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return import_module(_MODULES[name])
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"pictures and videos need {error.name}: pip install 'recofuse[images]'", name=error.name
            ) from error
