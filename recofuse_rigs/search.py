"""Where infrared may lie, found from nothing: every scale and rotation tried, and every shift of each at once.

The pictures are small here (128 pixels wide), and all pairs of a rig vote together: the normalised correlation of
their edges and of their learned maps, by Fourier transforms for each scale and rotation, is summed over pairs. What
cannot be seen at this size (perspective, unequal scales) is left to `refinement`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_rigs.cues import Floats, Mask, cue_map, energy_of, inner_of, laid, resized
from recofuse_rigs.learned import INNER, MAPS, learned_maps
from recofuse_rigs.rig import Matrix, Size, corners_of, mapped, resizing


@dataclass(frozen=True, slots=True)
class GreyPair:
    """One scene: visible and infrared as grey values of any range, (H, W) float32."""

    vis: Floats
    ir: Floats


@dataclass(frozen=True, slots=True)
class Reach:
    """What is searched. scale: infrared's field of view over the visible one's, along a side. rotation: degrees, either
    way. shift: of the centre, in shares of the visible frame, either way.
    """

    scale: tuple[float, float] = (0.55, 1.75)
    rotation: float = 12.0
    shift: float = 0.25


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way in which infrared may lie. score: how alike the cues are, at most 1."""

    matrix: Matrix
    score: float


WIDTH = 128
SIGMA, SPREAD = 1.0, 1.5
SCALE_STEP, ROTATION_STEP = 1.07, 3.0
MAPS_SHARE = 0.6  # of the likeness, beside edges
EMPTY = 0.3  # share of a picture's cues that a score's denominator holds besides: small overlaps do not win by luck
_APART = 6  # pixels of the small picture between two peaks of one scale and rotation


def size_of(picture: NDArray[Any]) -> Size:
    """Width and height."""
    return picture.shape[1], picture.shape[0]


def candidates(pairs: Sequence[GreyPair], reach: Reach, count: int) -> list[Candidate]:
    """The best ways in which the infrared of all pairs together may lie, best first, each distinct from the others."""
    vis_size, ir_size = size_of(pairs[0].vis), size_of(pairs[0].ir)
    found = sorted(_peaks(pairs, reach), key=lambda candidate: -candidate.score)
    return distinct(found, ir_size, 0.04 * vis_size[0], count)


def distinct(found: Sequence[Candidate], ir_size: Size, distance: float, count: int) -> list[Candidate]:
    """The first `count` whose infrared corners lie further than `distance` from those of all before, on average."""
    kept: list[Candidate] = []
    places: list[Matrix] = []
    for candidate in found:
        place = mapped(candidate.matrix, corners_of(ir_size))
        if all(np.linalg.norm(place - other, axis=1).mean() > distance for other in places):
            kept.append(candidate)
            places.append(place)
            if len(kept) == count:
                break
    return kept


@dataclass(frozen=True, slots=True)
class _Template:
    """A visible picture's cues as transforms: its edges', its maps', and both energies', one real, one imaginary.

    totals: the sums of the energies.
    """

    edges: Floats
    maps: tuple[Floats, ...]
    energies: Floats
    totals: tuple[float, float]


def _peaks(pairs: Sequence[GreyPair], reach: Reach) -> Iterator[Candidate]:
    """Two for each scale and rotation."""
    vis_size, ir_size = size_of(pairs[0].vis), size_of(pairs[0].ir)
    width, height = WIDTH, max(16, round(WIDTH * vis_size[1] / vis_size[0]))
    margin_x, margin_y = round(reach.shift * width), round(reach.shift * height)
    canvas = cv2.getOptimalDFTSize(width + 2 * margin_x), cv2.getOptimalDFTSize(height + 2 * margin_y)
    window = (slice(margin_y, margin_y + height), slice(margin_x, margin_x + width))
    templates = [_template(resized(pair.vis, (width, height)), canvas, window) for pair in pairs]
    base = float(np.sqrt(width / ir_size[0] * height / ir_size[1]))
    share = min(1.0, 2.2 * base)
    small = max(8, round(ir_size[0] * share)), max(8, round(ir_size[1] * share))
    pictures = [resized(pair.ir, small) for pair in pairs]
    to_full = np.linalg.inv(resizing(vis_size, (width, height)))
    from_small = resizing(small, ir_size)
    down, across = np.arange(2 * margin_y + 1), np.arange(2 * margin_x + 1)
    centre = margin_x + (width - 1) / 2, margin_y + (height - 1) / 2
    for scale in _scales(reach):
        upright = _similarity(scale * base, 0.0, ir_size, centre)
        # Maps are made once for each scale, and turned: they were taught to bear that.
        maps = [learned_maps(laid(picture, upright @ from_small, canvas)[0], "ir") for picture in pictures]
        for angle in np.deg2rad(np.arange(-reach.rotation, reach.rotation + 1e-9, ROTATION_STEP)):
            placed = _similarity(scale * base, float(angle), ir_size, centre)
            turn = placed @ np.linalg.inv(upright)
            total = np.zeros((len(down), len(across)), np.float32)
            for template, picture, upright_maps in zip(templates, pictures, maps, strict=True):
                laid_out, seen = laid(picture, placed @ from_small, canvas)
                total += _likeness(
                    template, laid_out, seen, _turned(upright_maps, turn, seen), (width, height), (margin_x, margin_y)
                )
            for _ in range(2):
                y, x = np.unravel_index(int(total.argmax()), total.shape)
                score = float(total[y, x]) / len(pairs)
                moved = np.array([[1.0, 0, -float(x)], [0, 1, -float(y)], [0, 0, 1]])
                yield Candidate(to_full @ moved @ placed, score)
                total[max(0, y - _APART) : y + _APART + 1, max(0, x - _APART) : x + _APART + 1] = -1


def _scales(reach: Reach) -> NDArray[np.float64]:
    low, high = reach.scale
    count = max(1, int(np.ceil(np.log(high / low) / np.log(SCALE_STEP)))) + 1
    return np.geomspace(low, high, count)


def _similarity(scale: float, angle: float, ir_size: Size, centre: tuple[float, float]) -> Matrix:
    """Infrared pixels about their centre, put at `centre`."""
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cosine, -sine, centre[0]], [sine, cosine, centre[1]], [0, 0, 1]])
    back = np.array([[1, 0, -(ir_size[0] - 1) / 2], [0, 1, -(ir_size[1] - 1) / 2], [0, 0, 1]])
    return np.asarray(turn @ back, np.float64)


def _turned(maps: Floats, turn: Matrix, seen: Mask) -> Floats:
    """Maps about the middle of their canvas, and nothing where infrared is not."""
    size = size_of(seen)
    halves = [cv2.warpPerspective(maps[..., part : part + 4], turn, size) for part in range(0, MAPS, 4)]
    return np.asarray(np.concatenate(halves, axis=-1) * inner_of(seen, INNER)[..., None], np.float32)


def _template(vis: Floats, canvas: Size, window: tuple[slice, slice]) -> _Template:
    cues = np.zeros((canvas[1], canvas[0], 2 + MAPS), np.float32)
    cues[window] = np.concatenate([cue_map(vis, sigma=SIGMA, spread=SPREAD), learned_maps(vis, "vis")], axis=-1)
    energies = np.stack([energy_of(cues[..., :2]), energy_of(cues[..., 2:])], axis=-1)
    transforms = _transforms(cues)
    totals = energies.sum(axis=(0, 1))
    return _Template(
        transforms[0],
        tuple(transforms[1:]),
        np.asarray(cv2.dft(energies), np.float32),
        (float(totals[0]), float(totals[1])),
    )


def _transforms(cues: Floats) -> list[Floats]:
    """Of two channels each, as real and imaginary parts."""
    return [
        np.asarray(cv2.dft(np.ascontiguousarray(cues[..., part : part + 2])), np.float32)
        for part in range(0, cues.shape[-1], 2)
    ]


def _likeness(
    template: _Template, picture: Floats, seen: Mask, maps: Floats, size: Size, margin: tuple[int, int]
) -> Floats:
    """Normalised correlation of edges and of maps, averaged by MAPS_SHARE, for every shift of the visible window over
    the canvas: (2 margin + 1) of each side.
    """
    edges = cue_map(picture, seen, sigma=SIGMA, spread=SPREAD)
    alike = _product(_transforms(edges), [template.edges], margin)[..., 0]
    alike_maps = _product(_transforms(maps), template.maps, margin)[..., 0]
    reach = np.stack([np.asarray(seen, np.float32), np.zeros(seen.shape, np.float32)], axis=-1)
    own = _product(_transforms(reach), [template.energies], margin) * np.array([1, -1], np.float32)  # conjugated
    total = np.zeros_like(alike)
    for values, cues, index, share in ((alike, edges, 0, 1 - MAPS_SHARE), (alike_maps, maps, 1, MAPS_SHARE)):
        floor = EMPTY * template.totals[index]
        other = _sums(energy_of(cues), size, margin)
        total += share * values / np.sqrt((np.maximum(own[..., index], 0) + floor) * (other + floor) + 1e-12)
    return np.asarray(total, np.float32)


def _sums(energy: Floats, size: Size, margin: tuple[int, int]) -> Floats:
    """Over windows of `size`, by shift."""
    sums = cv2.integral(energy)
    width, height = size
    windows = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    return np.asarray(windows[: 2 * margin[1] + 1, : 2 * margin[0] + 1], np.float32)


def _product(moving: Sequence[Floats], fixed: Sequence[Floats], margin: tuple[int, int]) -> Floats:
    """A circular correlation, for shifts from -margin to margin: real and imaginary parts, (h, w, 2)."""
    spectrum = np.zeros_like(moving[0])
    for one, other in zip(moving, fixed, strict=True):
        spectrum += np.asarray(cv2.mulSpectrums(one, other, 0, conjB=True), np.float32)
    values = cv2.dft(spectrum, flags=cv2.DFT_INVERSE | cv2.DFT_SCALE)
    down, across = np.arange(-margin[1], margin[1] + 1), np.arange(-margin[0], margin[0] + 1)
    return np.asarray(values[np.ix_(down, across)], np.float32)
