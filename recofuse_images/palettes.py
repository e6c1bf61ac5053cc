"""False-colour infrared back to intensity: which palette a picture was shown with, and each pixel's place in it.

A thermal camera's screenshot is a scalar field run through a palette, with text, a logo and a scale bar burnt in and
often JPEG's half-resolution colour. Its luma is not its temperature: in a rainbow the hottest object is dark.

How a palette is recognised: on a grid of flat places, where neither JPEG nor resizing mixes colours, the pixels of such
a picture lie on one curve through the RGB cube. The palette whose curve they leave least is taken, if they leave it by
a small part of how colourful it is there; a photograph scatters around every curve. A false alarm ruins a picture, a
miss only leaves it as it was, so whatever is in doubt is no palette picture.

A newcomer would get wrong:
- Palettes share pieces of their curves (autumn is the middle of hot, and of rainbow, and backwards of jet). Of those
  that fit alike, the one is taken whose pixels span most of it; then the commoner one.
- In hsv and the twilights both ends have one colour. There, the surroundings decide which end a pixel belongs to.
- White-hot and black-hot are grey: a picture without colour is left to its luma, and nobody can tell them apart.
- Text in a colour of the palette (white over iron) is a value of the palette; nobody can tell that apart either.
- Twilight and its shifted form are one ring: up in one half of the one is down in a half of the other. Unless the
  picture tells them apart, by having neighbours on either side of the one's seam, it is left alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2

_Bytes: TypeAlias = NDArray[np.uint8]
_Floats: TypeAlias = NDArray[np.floating[Any]]

# Thresholds, in levels of 8 bits. Measured on 1800 photographs (the best palette's misfit is at least 0.15 of its
# colourfulness, and 0.19 where it has some) and on infrared pictures in every palette, with JPEG of quality 80 to 97,
# noise, resizing and text (at most 0.15, of the faint palettes mostly 0.13).
_MIN_COLOUR = 12  # channels further apart than JPEG puts those of grey
_MIN_COLOURED_SHARE = 0.06
_MAX_MISFIT = 0.165  # of the palette's distance from grey
_MAX_FAINT_MISFIT = 0.135  # the same where that is below _FAINT: dim scenes in one tint come close
_FAINT = 45.0
_MAX_MISFIT_LEVELS = 16.0
_MIN_SPAN = 6  # places of the palette between the 5th and the 95th percentile
_MIN_STRETCHES = 16  # of eight places that are shown: a dozen flat colours may all lie on some palette
_MIN_PER_STRETCH = 3.0  # places that are shown, where stretches are fewer
_TRIM = 0.85  # the share of best samples that is judged: text, logo and bar take the rest
_COLOURED = 20.0  # chroma_of from which on a picture is called coloured

_GRID_POINTS = 6000
_MAX_SAMPLES = 900
_STRAY = 60  # further from a palette than the colours that JPEG mixes at most edges
_VIVID = 160  # nor white text and its rim, which lie on some palettes
_MIN_STRAYS = 0.001  # a difference in the share of strays that tells two palettes apart
_CLEARLY_MORE = 1.05  # times the jumps: on infrared pictures the right one of the twilights has less in 49 of 53 cases
_MIN_SIDE = 16
_MAX_LOCATED = 1 << 20  # pixels that are looked up at once
_LUMA_WEIGHT = 1.5
_OFF = 72  # sum over the channels, further from the palette than JPEG throws a pixel: text, logo, frame


@dataclass(frozen=True)
class FalseColour:
    """Intensity behind a palette: grey (H, W) uint8 is the place in the palette, its hot end 255."""

    grey: NDArray[np.uint8]
    palette: str
    filled_share: float  # of pixels that lay off the palette and were filled in from around them


def grey_of_false_colour(rgb: NDArray[np.uint8]) -> FalseColour | None:
    """The scalar field that an (H, W, 3) uint8 picture shows in a known palette; None for any other picture.

    None also where there is hardly any colour, where luma is the field: `is_coloured` tells the two apart.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or min(rgb.shape[:2]) < _MIN_SIDE:
        return None
    frame = _inside(rgb)
    palette = _palette_of(rgb[frame])
    return None if palette is None else _inverted(np.ascontiguousarray(rgb), palette, frame)


def chroma_of(rgb: NDArray[np.uint8]) -> float:
    """How colourful an (H, W, 3) uint8 picture is: the distance between a pixel's channels that one in twenty exceeds.

    Judged on flat places inside dark borders, so burnt-in text and the colour noise of JPEG do not count. Grey stored
    as RGB has some 0 to 8, a photograph 40 to 200.
    """
    if min(rgb.shape[:2]) < _MIN_SIDE:
        samples = rgb.reshape(-1, 3).astype(np.int16)
    else:
        samples = _flat_samples(rgb[_inside(rgb)])
    return float(np.percentile(_colour(samples), 95)) if len(samples) else 0.0


def is_coloured(rgb: NDArray[np.uint8]) -> bool:
    """Whether a picture has colour beyond a slight tint: in an infrared slot, a palette's or a photograph's."""
    return chroma_of(rgb) >= _COLOURED


# --- the palettes -----------------------------------------------------------------------------------------------------

# Camera palettes by a few key colours: place, red, green, blue. These are the corners of the curves that the open tCam
# firmware for FLIR's Lepton shows (github.com/danjulio/tCam); FLIR's and DJI's own look like them, and makers change
# them a little between models, which recognition allows for. White-hot, black-hot and "hot iron" need no entry: the
# first two are grey, and the last runs along the edges of the cube that OpenCV's hot runs along.
_CAMERA_PALETTES: dict[str, Sequence[tuple[int, int, int, int]]] = {
    "iron": (
        (0, 0, 0, 0),
        (32, 31, 0, 118),
        (64, 111, 1, 135),
        (96, 186, 7, 141),
        (128, 223, 55, 59),
        (160, 238, 109, 12),
        (192, 247, 171, 13),
        (224, 255, 224, 30),
        (255, 255, 255, 255),
    ),
    "fusion": (
        (0, 0, 2, 36),
        (32, 59, 14, 109),
        (62, 128, 34, 155),
        (80, 168, 51, 124),
        (104, 219, 79, 47),
        (124, 249, 107, 6),
        (160, 253, 174, 6),
        (192, 253, 227, 39),
        (208, 254, 242, 82),
        (224, 253, 250, 144),
        (255, 255, 255, 255),
    ),
    "rainbow (camera)": (
        (0, 0, 3, 74),
        (23, 0, 49, 133),
        (62, 0, 109, 223),
        (68, 1, 120, 219),
        (80, 8, 142, 172),
        (92, 40, 160, 94),
        (108, 128, 193, 14),
        (128, 212, 215, 3),
        (144, 239, 206, 8),
        (158, 252, 183, 17),
        (175, 255, 127, 32),
        (192, 251, 33, 59),
        (206, 247, 25, 79),
        (220, 250, 93, 108),
        (238, 255, 173, 152),
        (255, 255, 233, 208),
    ),
    "rainbow high contrast": (
        (0, 18, 15, 18),
        (16, 155, 42, 136),
        (35, 59, 103, 238),
        (54, 14, 152, 81),
        (67, 194, 193, 13),
        (90, 195, 124, 22),
        (107, 169, 45, 45),
        (120, 193, 146, 238),
        (126, 203, 168, 236),
        (147, 14, 172, 187),
        (172, 139, 196, 15),
        (194, 236, 234, 13),
        (215, 237, 125, 53),
        (228, 225, 48, 52),
        (244, 233, 170, 175),
        (255, 235, 232, 235),
    ),
    "arctic": (
        (0, 15, 16, 146),
        (24, 16, 18, 239),
        (68, 54, 227, 232),
        (78, 66, 220, 220),
        (95, 87, 175, 175),
        (120, 102, 102, 102),
        (172, 237, 101, 13),
        (206, 235, 202, 12),
        (239, 235, 230, 194),
        (255, 235, 235, 235),
    ),
    # By eye, after FLIR's own pictures of it: no table is public.
    "lava": (
        (0, 0, 0, 0),
        (40, 8, 60, 90),
        (80, 70, 30, 130),
        (120, 170, 15, 60),
        (160, 230, 50, 20),
        (200, 255, 150, 20),
        (230, 255, 225, 90),
        (255, 255, 255, 255),
    ),
}

# OpenCV's, the commoner first: of two that fit alike, the one that stands first is taken.
_OPENCV_PALETTES = {
    "jet": cv2.COLORMAP_JET,
    "inferno": cv2.COLORMAP_INFERNO,
    "hot": cv2.COLORMAP_HOT,
    "turbo": cv2.COLORMAP_TURBO,
    "viridis": cv2.COLORMAP_VIRIDIS,
    "plasma": cv2.COLORMAP_PLASMA,
    "magma": cv2.COLORMAP_MAGMA,
    "rainbow": cv2.COLORMAP_RAINBOW,
    "parula": cv2.COLORMAP_PARULA,
    "hsv": cv2.COLORMAP_HSV,
    "cividis": cv2.COLORMAP_CIVIDIS,
    "autumn": cv2.COLORMAP_AUTUMN,
    "bone": cv2.COLORMAP_BONE,
    "cool": cv2.COLORMAP_COOL,
    "winter": cv2.COLORMAP_WINTER,
    "summer": cv2.COLORMAP_SUMMER,
    "spring": cv2.COLORMAP_SPRING,
    "ocean": cv2.COLORMAP_OCEAN,
    "pink": cv2.COLORMAP_PINK,
    "deepgreen": cv2.COLORMAP_DEEPGREEN,
    "twilight": cv2.COLORMAP_TWILIGHT,
    "twilight shifted": cv2.COLORMAP_TWILIGHT_SHIFTED,
}

_CYCLIC = frozenset({"hsv", "twilight", "twilight shifted"})
_TWINS = frozenset({"twilight", "twilight shifted"})  # one ring of colours, begun at two places and run both ways
_SEAM_LEVELS = 28.0  # closer colours at the two ends of a cyclic palette are mixed up by JPEG

PALETTES = (*_CAMERA_PALETTES, *_OPENCV_PALETTES)


@cache
def palette_colours(name: str) -> NDArray[np.uint8]:
    """The 256 RGB colours (256, 3) of a palette in `PALETTES`, from cold to hot."""
    places = np.arange(256)
    if name in _CAMERA_PALETTES:
        keys = np.array(_CAMERA_PALETTES[name], np.float64)
        channels = [np.interp(places, keys[:, 0], keys[:, channel]) for channel in (1, 2, 3)]
        colours = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    else:
        ramp = places.astype(np.uint8)[:, None]
        colours = np.asarray(cv2.applyColorMap(ramp, _OPENCV_PALETTES[name])[:, 0, ::-1], np.uint8)
    colours.setflags(write=False)
    return colours


@cache
def _every_other_colour() -> _Floats:
    """(P * 128, 3): all palettes at every second place, for a first look."""
    return np.concatenate([palette_colours(name)[::2] for name in PALETTES]).astype(np.float32)


# --- recognition ------------------------------------------------------------------------------------------------------


def _inside(rgb: _Bytes) -> tuple[slice, slice]:
    """The picture less its letterbox: rows and columns at the rim that are black throughout."""
    height, width = rgb.shape[:2]
    step = max(1, min(height, width) // 64)
    rows = np.ascontiguousarray(rgb[:, ::step]).reshape(height, -1).max(axis=1) > 32
    columns = rgb[::step].max(axis=0).max(axis=1) > 32
    if not rows.any() or not columns.any():
        return slice(0, height), slice(0, width)
    top, left = int(rows.argmax()), int(columns.argmax())
    return slice(top, height - int(rows[::-1].argmax())), slice(left, width - int(columns[::-1].argmax()))


def _colour(samples: NDArray[Any]) -> NDArray[Any]:
    """Distance between the largest and the smallest channel, a sample."""
    return np.asarray(np.ptp(samples.astype(np.int16), axis=-1))


def _flat_samples(rgb: _Bytes) -> NDArray[np.int16]:
    """Pixels (N, 3) on a grid, the half of it that differs least from its four neighbours; none of a tiny picture."""
    height, width = rgb.shape[:2]
    if min(height, width) < 3:
        return np.empty((0, 3), np.int16)
    step = max(1, int((height * width / _GRID_POINTS) ** 0.5))
    grid = rgb[1:-1:step, 1:-1:step].astype(np.int16)
    rough = np.zeros(grid.shape[:2], np.int16)
    for top, left in ((0, 1), (2, 1), (1, 0), (1, 2)):
        neighbours = rgb[top : height - 2 + top : step, left : width - 2 + left : step]
        rough = np.maximum(rough, np.abs(grid - neighbours).max(axis=2))
    is_flat = rough <= np.median(rough)
    return np.asarray(grid[is_flat], np.int16)


@dataclass(frozen=True)
class _Fit:
    palette: str
    misfit: float  # rms distance from the palette, of the samples that count
    colourfulness: float  # mean distance of the palette from grey where the coloured samples lie
    span: float
    num_stretches: int  # of eight places that coloured samples show
    places_per_stretch: float  # that they show

    @property
    def is_good(self) -> bool:
        share = _MAX_FAINT_MISFIT if self.colourfulness < _FAINT else _MAX_MISFIT
        limit = min(share * self.colourfulness, _MAX_MISFIT_LEVELS)
        is_field = self.num_stretches >= _MIN_STRETCHES or self.places_per_stretch >= _MIN_PER_STRETCH
        return self.misfit <= limit and self.span >= _MIN_SPAN and is_field


def _palette_of(rgb: _Bytes) -> str | None:
    """The palette that a picture is shown with."""
    flat = _flat_samples(rgb)
    coloured = _colour(flat) > _MIN_COLOUR
    if not len(flat) or coloured.mean() < _MIN_COLOURED_SHARE:
        return None
    stride = -(-len(flat) // _MAX_SAMPLES)
    samples, coloured = flat[::stride].astype(np.float32), coloured[::stride]
    if coloured.sum() < 8:
        return None
    rough = _squared_distances(samples[::2], _every_other_colour()).reshape(-1, len(PALETTES), 128).min(axis=2)
    guesses = np.argsort([_misfit(rough[:, index], coloured[::2]) for index in range(len(PALETTES))])[:6]
    fits = [_fit(PALETTES[index], samples, coloured) for index in sorted(guesses)]
    fits = [fit for fit in fits if fit.is_good]
    if len(fits) < 2:
        return fits[0].palette if fits else None
    limit = 1.2 * min(fit.misfit for fit in fits) + 0.5
    return _likeliest(rgb, [fit for fit in fits if fit.misfit <= limit])


def _likeliest(rgb: _Bytes, fits: list[_Fit]) -> str | None:
    """Of palettes that fit the flat places alike: the one that few pixels of the whole picture are far from.

    None where the twilights cannot be told apart: the wrong one would turn the picture inside out.
    """
    height, width = rgb.shape[:2]
    step = max(1, int((height * width / _GRID_POINTS) ** 0.5))
    grid = rgb[::step, ::step].reshape(-1, 3).astype(np.float32)
    squared = {fit.palette: _squared_distances(grid, palette_colours(fit.palette).astype(np.float32)) for fit in fits}
    is_vivid = _colour(grid) > _VIVID
    strays = {name: float(((far.min(axis=1) > _STRAY**2) & is_vivid).mean()) for name, far in squared.items()}
    fewest = min(strays.values())
    fits = [fit for fit in fits if strays[fit.palette] <= fewest + _MIN_STRAYS]
    widest = max(fit.span for fit in fits)
    names = [fit.palette for fit in fits if fit.span >= 0.9 * widest]
    twins = [name for name in names if name in _TWINS]
    if names[0] in _TWINS and len(twins) == 2:
        jumps = {name: _jumps(rgb, name) for name in twins}
        is_clear = max(jumps.values()) > _CLEARLY_MORE * min(jumps.values())
        return min(twins, key=lambda name: jumps[name]) if is_clear else None
    return names[0]


def _squared_distances(samples: _Floats, colours: _Floats) -> _Floats:
    """(N, M) of float32 samples (N, 3) and colours (M, 3)."""
    ones = np.ones((len(samples), 1), np.float32)
    left = np.concatenate([samples, (samples**2).sum(axis=1, keepdims=True), ones], axis=1)
    right = np.concatenate([-2 * colours.T, np.ones((1, len(colours)), np.float32), (colours**2).sum(axis=1)[None]])
    return np.asarray(left @ right)


def _misfit(squared: _Floats, coloured: NDArray[np.bool_]) -> float:
    """Rms of the best part of the samples: of the coloured or of all, whichever is worse."""
    return max(_trimmed_rms(squared[coloured]), _trimmed_rms(squared))


def _trimmed_rms(squared: _Floats) -> float:
    kept = max(1, int(_TRIM * len(squared)))
    return float(np.maximum(np.partition(squared, kept - 1)[:kept].mean(), 0) ** 0.5)


def _fit(name: str, samples: _Floats, coloured: NDArray[np.bool_]) -> _Fit:
    colours = palette_colours(name).astype(np.float32)
    squared = _squared_distances(samples, colours)
    places = squared.argmin(axis=1)
    places = places[coloured]
    shown = colours[places]
    colourfulness = float(np.linalg.norm(shown - shown.mean(axis=1, keepdims=True), axis=1).mean())
    low, high = np.percentile(places, (5, 95))
    num_places, num_stretches = len(np.unique(places)), len(np.unique(places // 8))
    misfit = _misfit(squared.min(axis=1), coloured)
    return _Fit(name, misfit, colourfulness, float(high - low), num_stretches, num_places / num_stretches)


def _jumps(rgb: _Bytes, name: str) -> float:
    """Mean step between places six pixels apart; steps over the seam are short ones. Small for the right palette."""
    height, width = rgb.shape[:2]
    step = max(1, int((height * width / 2000) ** 0.5))
    apart = min(6, width - 1)
    pairs = [rgb[::step, left : width - apart + left : step].reshape(-1, 3) for left in (0, apart)]
    colours = palette_colours(name).astype(np.float32)
    here, there = (_squared_distances(pair.astype(np.float32), colours).argmin(axis=1) for pair in pairs)
    at_seam = _at_seam(name)
    steps = np.abs(here - there)
    steps = np.where(at_seam[here] | at_seam[there], np.minimum(steps, np.abs(255 - here - there)), steps)
    return float(steps.mean())


@cache
def _at_seam(name: str) -> NDArray[np.bool_]:
    """Places (256,) of a cyclic palette that look like their mirror images at the other end."""
    colours, places = palette_colours(name).astype(np.float32), np.arange(256)
    is_alike = np.linalg.norm(colours - colours[::-1], axis=1) < _SEAM_LEVELS
    return np.asarray(is_alike & ((places < 64) | (places > 191)))


# --- inversion --------------------------------------------------------------------------------------------------------


# Distances for the inversion: luma counts more than it does in RGB, as JPEG keeps colour at half the resolution.
_METRIC = np.diag([_LUMA_WEIGHT, 1.0, 1.0]) @ np.array(
    [[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]]
)


@cache
def _nearest_places(name: str) -> _Bytes:
    """The nearest place in a palette for every cell of a 32x32x32 RGB cube, flat, red outermost."""
    middles = np.arange(4, 256, 8, dtype=np.float32)
    cells = np.stack(np.meshgrid(middles, middles, middles, indexing="ij"), axis=-1).reshape(-1, 3)
    metric = _METRIC.T.astype(np.float32)
    cells, colours = cells @ metric, palette_colours(name).astype(np.float32) @ metric
    return np.concatenate(
        [_squared_distances(part, colours).argmin(axis=1).astype(np.uint8) for part in np.split(cells, 8)]
    )


@cache
def _projection(name: str) -> _Floats:
    """(256, 4): for each place the row (a, b) by which a . rgb + b is the nearest place on its tangent."""
    colours = palette_colours(name).astype(np.float64)
    ahead, behind = np.minimum(np.arange(256) + 2, 255), np.maximum(np.arange(256) - 2, 0)
    tangent = (colours[ahead] - colours[behind]) / (ahead - behind)[:, None]
    square = ((tangent @ _METRIC.T) ** 2).sum(axis=1, keepdims=True)
    slope = np.where(square > 0.01, tangent @ _METRIC.T @ _METRIC / np.maximum(square, 0.01), 0)
    offset = np.arange(256)[:, None] - (slope * colours).sum(axis=1, keepdims=True)
    return np.asfortranarray(np.concatenate([slope, offset], axis=1), np.float32)


def _inverted(rgb: _Bytes, name: str, frame: tuple[slice, slice]) -> FalseColour:
    """The place of every pixel; text and the like filled in from around, the letterbox cold."""
    places, off = np.zeros(rgb.shape[:2], np.uint8), np.zeros(rgb.shape[:2], np.uint8)
    num_rows = max(1, _MAX_LOCATED // rgb.shape[1])
    for top in range(0, len(rgb), num_rows):  # with whole pictures of wider numbers, a large one takes a gigabyte
        rows = slice(top, top + num_rows)
        places[rows], off[rows] = _located(rgb[rows], name)
    is_letterbox = off > _OFF
    is_letterbox[frame] = False
    # What surrounds text is a mixture with it.
    is_text = cv2.dilate((off > 2 * _OFF).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    is_unknown = ((off > _OFF) | is_text) & ~is_letterbox
    if name in _CYCLIC:
        places = _seam_resolved(places, _at_seam(name)[places], is_unknown | is_letterbox)
    grey = _filled(places, is_unknown, ~(is_unknown | is_letterbox))
    grey[is_letterbox] = 0
    return FalseColour(grey, name, float(is_unknown.mean()))


def _located(rgb: _Bytes, name: str) -> tuple[_Bytes, _Bytes]:
    """For each pixel its place in a palette and how far it is from it, summed over the channels, at most 255."""
    planes = [np.asarray(plane, np.uint8) for plane in cv2.split(rgb)]
    cells = np.zeros(rgb.shape[:2], np.intp)
    for plane in planes:
        cells = cells << 5 | plane >> 3
    places = _refined(np.take(_nearest_places(name), cells), planes, name)
    shown = cv2.LUT(cv2.merge([places] * 3), palette_colours(name)[None])
    gaps = cv2.split(cv2.absdiff(rgb, shown))
    return places, np.asarray(cv2.add(cv2.add(gaps[0], gaps[1]), gaps[2]), np.uint8)  # saturates at 255


def _refined(places: _Bytes, planes: Sequence[_Bytes], name: str) -> _Bytes:
    """Places projected twice on the palette's tangent, from the cell's place to the pixel's own."""
    rows = _projection(name)
    channels = [plane.astype(np.float32) for plane in planes]
    for _ in range(2):
        found = np.asarray(cv2.LUT(places, rows[:, 3]), np.float32)
        for channel, values in enumerate(channels):
            found += np.asarray(cv2.LUT(places, rows[:, channel]), np.float32) * values
        reach = places.astype(np.float32)
        found = np.minimum(np.maximum(found, reach - 4), reach + 4)
        places = np.clip(np.rint(found), 0, 255).astype(np.uint8)
    return places


def _around(values: _Bytes, is_known: NDArray[np.bool_], fallback: _Bytes) -> _Floats:
    """Mean of the known values around each pixel: of the smallest window that holds some."""
    known = is_known.astype(np.float32)
    weighted = known * values
    found = fallback.astype(np.float32)
    is_open = np.ones(values.shape, np.bool_)
    for side in (7, 21, 63):
        share = cv2.blur(known, (side, side), borderType=cv2.BORDER_REFLECT_101)
        mean = cv2.blur(weighted, (side, side), borderType=cv2.BORDER_REFLECT_101)
        ready = is_open & (share > 0.1)
        np.divide(mean, share, out=found, where=ready)
        is_open &= ~ready
        if not is_open.any():
            break
    return np.asarray(found)


def _filled(places: _Bytes, is_unknown: NDArray[np.bool_], is_known: NDArray[np.bool_]) -> _Bytes:
    """`places` with the unknown ones taken from around them, or left where nothing known is near."""
    if not is_unknown.any():
        return places.copy()
    around = np.rint(_around(places, is_known, places)).astype(np.uint8)
    return np.where(is_unknown, around, places)


def _seam_resolved(places: _Bytes, is_seam: NDArray[np.bool_], is_unknown: NDArray[np.bool_]) -> _Bytes:
    """Places of a cyclic palette, those at its ends put to the end that their surroundings are nearer to."""
    if not is_seam.any():
        return places
    around = _around(places, ~(is_seam | is_unknown), np.zeros_like(places))
    mirrored = 255 - places
    return np.where(is_seam & ((places < 128) != (around < 128)), mirrored, places)
