"""From pairs of pictures to where infrared lies, and whether that can be sworn to.

One pair or many: they are searched and refined together, so ten dull scenes make one good calibration. A pair that
contradicts the others (another camera, infrared swapped, a frame out of time) is left out and named. How far the result
can be trusted is asked of the data: the last step is repeated on parts of it drawn at random, and the corners' spread
is in pixels what another set of scenes might have said. A result is sure if the spread is small, if its likeness stands
out from chance, and if no other place is nearly as good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_rigs.cues import Floats
from recofuse_rigs.errors import BadRigError, NothingFoundError
from recofuse_rigs.refinement import COARSE, FINE, Fit, Vector, best_step, by_corners, likeness, refined
from recofuse_rigs.rig import Matrix, Rig, Size, corners_of, flat, mapped
from recofuse_rigs.search import Candidate, GreyPair, Reach, candidates, distinct, size_of

MAX_SEARCHED = 8  # pairs that the search from nothing looks at; refinement looks at all
_CANDIDATES, _FINALISTS = 5, 2
_CONTRADICTS = 0.35  # of the pairs' median likeness
_MIN_TO_DROP = 4  # pairs
_RESAMPLES = 16
_BY_PAIRS = 4  # from how many pairs on they, not blocks, are drawn


@dataclass(frozen=True, slots=True)
class Doubt:
    """Bounds beyond which a calibration is not sure. spread_px: visible pixels at a width of 640; likeness: at most 1;
    lead: by which factor the best place is more alike than the next.
    """

    spread_px: float = 1.0
    likeness: float = 0.12
    lead: float = 1.1


DOUBT_OF_ONE, DOUBT_OF_MANY = Doubt(spread_px=0.7), Doubt()


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found. matrix: infrared pixels to visible ones. spread_px, residual_px: visible pixels, as in a rig.

    likeness: of each pair, 0 by chance. lead: over the next place. left_out: indices of pairs that contradict the rest.
    doubts: why it is not sure, in words; empty if it is.
    """

    vis_size: Size
    ir_size: Size
    matrix: Matrix
    spread_px: float
    residual_px: float
    likeness: tuple[float, ...]
    lead: float
    left_out: tuple[int, ...]
    doubts: tuple[str, ...]

    @property
    def is_sure(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.doubts

    def as_rig(self, name: str = "", date: str = "") -> Rig:
        """Raises BadRigError for a matrix that no two cameras can have."""
        return Rig(
            self.vis_size,
            self.ir_size,
            flat(self.matrix),
            name=name,
            spread_px=round(self.spread_px, 3),
            residual_px=round(self.residual_px, 3),
            is_sure=self.is_sure,
            num_pairs=len(self.likeness) - len(self.left_out),
            method="scenes",
            date=date,
        )


def grey_pair(vis: NDArray[Any], ir: NDArray[Any]) -> GreyPair:
    """A visible picture, (H, W, 3) RGB or (H, W), and an infrared one, (H, W), for `calibrate`; any depth.

    What is not finite counts as the darkest value. Deep infrared is bounded by its 0.1th and 99.9th percentiles.
    """
    visible = vis.astype(np.float32)
    if visible.ndim == 3:
        visible = visible @ np.array([0.299, 0.587, 0.114], np.float32)
    return GreyPair(_finite(visible), _finite(ir.astype(np.float32)))


def calibrate(
    pairs: Sequence[GreyPair],
    reach: Reach | None = None,
    *,
    start: Matrix | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Find where the infrared of these pairs of one rig lies.

    start: where it lies about, which saves the search. Raises BadRigError if the pairs are of different sizes, and
    NothingFoundError where there is nothing to see.
    """
    if not pairs:
        raise NothingFoundError("calibrating needs at least one pair")
    vis_size, ir_size = size_of(pairs[0].vis), size_of(pairs[0].ir)
    for pair in pairs:
        if (size_of(pair.vis), size_of(pair.ir)) != (vis_size, ir_size):
            raise BadRigError("all pairs of a rig must have one visible and one infrared size; calibrate others apart")
    if not any(pair.vis.std() > 0 and pair.ir.std() > 0 for pair in pairs):
        raise NothingFoundError("the pictures are flat: there is nothing to calibrate by")
    return _calibrated(pairs, reach or Reach(), start, tell)


def _calibrated(
    pairs: Sequence[GreyPair], reach: Reach, start: Matrix | None, tell: Callable[[str], None]
) -> Calibration:
    vis_size, ir_size = size_of(pairs[0].vis), size_of(pairs[0].ir)
    if start is None:
        tell("searching")
        picked = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), MAX_SEARCHED)).round().astype(int))
        places = candidates([pairs[index] for index in picked], reach, _CANDIDATES)
    else:
        places = [Candidate(start, 1.0)]
    tell("refining")
    rough = sorted(
        (_judged(pairs, refined(pairs, place.matrix, [COARSE]).matrix) for place in places),
        key=lambda place: -place.score,
    )
    finalists = distinct(rough, ir_size, 0.02 * vis_size[0], _FINALISTS)
    fits = [refined(pairs, place.matrix, FINE) for place in finalists]
    scores = [likeness(pairs, fit.matrix) for fit in fits]
    best = int(np.argmax([score.mean() for score in scores]))
    fit, alike = fits[best], scores[best]
    left_out = _contradicting(alike)
    kept = [index for index in range(len(pairs)) if index not in left_out]
    if left_out:
        fit = refined([pairs[index] for index in kept], fit.matrix, FINE)
        alike = likeness(pairs, fit.matrix)
    rivals = [
        place.score
        for place in rough
        if np.linalg.norm(
            mapped(place.matrix, corners_of(ir_size)) - mapped(fit.matrix, corners_of(ir_size)), axis=1
        ).mean()
        > 0.08 * vis_size[0]
    ]
    own = _judged(pairs, fit.matrix).score
    lead = own / max(rivals, default=1e-9) if own > 0 else 0.0
    spread_px, residual_px = spread_of(fit), _residual(fit)
    doubts = _doubts(spread_px * 640 / fit.size[0], float(alike[kept].mean()), lead, len(kept), fit, vis_size, ir_size)
    per_pixel = vis_size[0] / fit.size[0]
    return Calibration(
        vis_size,
        ir_size,
        fit.matrix,
        spread_px * per_pixel,
        residual_px * per_pixel,
        tuple(float(value) for value in alike),
        min(lead, 1e3),
        tuple(left_out),
        doubts,
    )


def _judged(pairs: Sequence[GreyPair], matrix: Matrix) -> Candidate:
    return Candidate(matrix, float(likeness(pairs, matrix, COARSE).mean()))


def _contradicting(alike: Vector) -> list[int]:
    """The pairs that are unlike where the others are alike; at most a third."""
    if len(alike) < _MIN_TO_DROP:
        return []
    bad = [index for index in np.argsort(alike) if alike[index] < _CONTRADICTS * np.median(alike)]
    return sorted(int(index) for index in bad[: len(alike) // 3])


def spread_of(fit: Fit) -> float:
    """RMS distance of the corners between the fit and fits to parts of its data, drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    num_pairs, num_blocks = fit.surfaces.shape[:2]
    covered = np.flatnonzero(np.abs(fit.surfaces).max(axis=(0, 2, 3)) > 0)
    if len(covered) < 4:
        return float(fit.size[0])
    earlier = fit.drift - fit.step * 640 / fit.size[0]
    moved = []
    for _ in range(_RESAMPLES):
        if num_pairs >= _BY_PAIRS:
            surfaces = fit.surfaces[rng.integers(0, num_pairs, num_pairs)].mean(axis=0)
        else:
            counts = np.bincount(rng.choice(covered, len(covered)), minlength=num_blocks)
            surfaces = fit.surfaces.mean(axis=0) * counts[:, None, None].astype(np.float32)
        moved.append(best_step(surfaces, fit.centres, fit.size, earlier, num_pairs, fit.step) - fit.step)
    distances = np.linalg.norm(np.stack(moved).reshape(-1, 4, 2), axis=2)
    return float(np.sqrt((distances**2).mean()))


def _residual(fit: Fit) -> float:
    """How far from the fit each block alone would go, on average by what it has to say."""
    moves = mapped(by_corners(fit.step, fit.size), fit.centres) - fit.centres
    radius = fit.surfaces.shape[-1] // 2
    distances, weights = [], []
    for surface, (x, y) in zip(fit.surfaces.mean(axis=0), moves, strict=True):
        blurred = cv2.GaussianBlur(surface, (0, 0), 1.0, borderType=cv2.BORDER_REPLICATE)
        row, column = np.unravel_index(int(blurred.argmax()), blurred.shape)
        weights.append(max(float(blurred.max() - np.median(blurred)), 0.0))
        distances.append(float(np.hypot(column - radius - x, row - radius - y)))
    total = sum(weights)
    return sum(d * w for d, w in zip(distances, weights, strict=True)) / total if total > 0 else float(radius)


def _doubts(
    spread_px: float, alike: float, lead: float, num_pairs: int, fit: Fit, vis_size: Size, ir_size: Size
) -> tuple[str, ...]:
    """Why the fit is not sure, in words."""
    bounds = DOUBT_OF_MANY if num_pairs >= _BY_PAIRS else DOUBT_OF_ONE
    found = []
    if spread_px > bounds.spread_px:
        found.append(
            f"parts of the data differ by {spread_px:.1f} px at a width of 640 (at most {bounds.spread_px:.1f})"
        )
    if alike < bounds.likeness:
        found.append(f"both are alike by {alike:.2f} only (at least {bounds.likeness:.2f}; chance gives about 0)")
    if lead < bounds.lead:
        found.append(f"another place is nearly as good (ahead by {lead:.2f}, at least {bounds.lead:.2f})")
    try:
        Rig(vis_size, ir_size, flat(fit.matrix))
    except BadRigError as error:
        found.append(str(error))
    return tuple(found)


def _finite(values: Floats) -> Floats:
    is_finite = np.isfinite(values)
    if not is_finite.all():
        values = np.where(is_finite, values, values[is_finite].min() if is_finite.any() else 0)
    low, high = np.percentile(values[::4, ::4], (0.1, 99.9))
    return np.asarray(np.clip((values - low) * (255 / max(float(high - low), 1e-6)), 0, 255), np.float32)
