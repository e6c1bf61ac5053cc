"""Maps of a small network, which are alike where both cameras show one thing: beside edges, for nights and noise.

Edges are lost in the dark before what they bound is. The networks were taught (`recofuse_core.likeness`) to give eight
maps a picture whose product, summed over pixels, is the greatest where infrared lies. They read grey values of any
range, and are run by OpenCV, so this floor needs no other runtime. A map is (H, W, 8), lengths from 0 to 1.
"""

from __future__ import annotations

import threading
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Literal

import numpy as np

from recofuse_images.codecs import cv2
from recofuse_rigs.cues import Floats, Mask, inner_of
from recofuse_rigs.errors import BadNetworkError

Side = Literal["vis", "ir"]

MAPS = 8
INNER = 2  # pixels from the border of what is seen that count for nothing
_UNIT = 4  # pixels that sides are made whole multiples of

_networks = threading.local()  # one run at a time each


def learned_maps(grey: Floats, side: Side, seen: Mask | None = None) -> Floats:
    """Maps of (H, W), any range: (H, W, 8). seen: (H, W), where there is a picture; what is close to its end is 0.

    Raises BadNetworkError where the package's own file cannot be used.
    """
    height, width = grey.shape
    padded = cv2.copyMakeBorder(grey, 0, -height % _UNIT, 0, -width % _UNIT, cv2.BORDER_REPLICATE)
    network = _network(side)
    network.setInput(np.asarray(padded, np.float32)[None, None])
    maps = network.forward()[0, :, :height, :width]
    if seen is not None and not seen.all():
        maps = maps * inner_of(seen, INNER)
    return np.ascontiguousarray(maps.transpose(1, 2, 0), np.float32)


def _network(side: Side) -> Any:
    found = getattr(_networks, side, None)
    if found is None:
        found = network_of(resources.files("recofuse_rigs").joinpath(f"cues_{side}.onnx"))
        setattr(_networks, side, found)
    return found


def network_of(file: Traversable) -> Any:
    """OpenCV's network of a graph. Raises BadNetworkError for a file that is missing, damaged, or another network."""
    try:
        network = cv2.dnn.readNetFromONNX(np.frombuffer(file.read_bytes(), np.uint8))
        network.setInput(np.zeros((1, 1, _UNIT, _UNIT), np.float32))
        shape = network.forward().shape
    except OSError as error:
        raise BadNetworkError(f"{file} cannot be read ({error.strerror}): install recofuse again") from error
    except cv2.error as error:
        raise BadNetworkError(
            f"{file} is damaged, or OpenCV {cv2.__version__} is too old for it: install recofuse again, and OpenCV 5 "
            "or newer"
        ) from error
    if shape != (1, MAPS, _UNIT, _UNIT):
        raise BadNetworkError(f"{file} is not a network of {MAPS} maps: install recofuse again")
    return network
