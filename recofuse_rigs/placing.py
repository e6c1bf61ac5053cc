"""Pairs that pass for registered, brought to where they lie: what a network is to learn from must be exact.

Files of one data set are off alike, mostly, by two to eight pixels of 640, and by a little of their own beside, since a
homography holds for one distance. So each set is calibrated as one rig first, twice, on pairs that are not the same;
where both agree, that is where its pairs begin. From there each goes its own way, in the finer pictures alone, and is
followed only as far as can be trusted. Edges alone judge, which need nothing learnt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2
from recofuse_images.errors import ImageError
from recofuse_images.names import PairingError
from recofuse_images.pairs import pair_paths
from recofuse_images.picture import grey_of
from recofuse_images.reader import read_pair
from recofuse_rigs.calibration import DOUBT_OF_ONE, grey_pair, spread_of
from recofuse_rigs.errors import BadPairsError
from recofuse_rigs.refinement import FINE, JUDGED, likeness, refined
from recofuse_rigs.rig import Matrix, Size, corners_of, mapped
from recofuse_rigs.search import GreyPair, size_of

Grey = NDArray[np.uint8]
Kind = Literal["own", "set", "unsure"]

SIZE = 640, 480  # that pictures are cut and brought to

DOZEN = 12
AGREE_PX = 3.0  # of the corners, at a width of 640, between two dozens of a set
OWN_PX = 8.0  # farther from its set than that no pair is followed
SPREAD_PX = 1.0  # of a pair that is followed
LIKENESS = DOUBT_OF_ONE.likeness
LEVELS = tuple(replace(level, maps=0.0) for level in FINE)
EDGES = replace(JUDGED, maps=0.0)


@dataclass(frozen=True, slots=True)
class Place:
    """Where infrared of a pair lies, as a matrix between pictures of one size. kind: by itself, by its set, or unsure.

    moved_px: how far that is from the files' registration, at the corners, at a width of 640.
    """

    matrix: Matrix
    kind: Kind
    moved_px: float


def sets_of(folder: Path) -> dict[str, list[tuple[Grey, Grey]]]:
    """The pairs of a folder's vis and ir, in grey, their middles brought to SIZE, by data set: what their names begin
    with, up to a dash or an underscore. Raises BadPairsError for a folder without pairs and for what is no picture.
    """
    found: dict[str, list[tuple[Grey, Grey]]] = {}
    try:
        pairs, _ = pair_paths(folder / "vis", folder / "ir")
    except PairingError as error:
        raise BadPairsError(str(error)) from error
    for pair in pairs:
        try:
            both = read_pair(pair.vis.read_bytes(), pair.ir.read_bytes())
        except ImageError as error:
            raise BadPairsError(f"{pair.vis} and {pair.ir}: {error}") from error
        name = re.split("[-_]", pair.vis.stem)[0]
        found.setdefault(name, []).append((_middle(np.asarray(grey_of(both.vis), np.uint8)), _middle(both.ir)))
    return found


def placed_sets(
    folders: Sequence[Path], leave_out: Sequence[str], tell: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[Grey, Grey]]:
    """Pairs of folders whose place is sure, (480, 640), infrared laid on the visible grid. leave_out: names of sets.

    Raises BadPairsError, once it is begun, as `sets_of` does and for a set to be left out that is in no folder.
    """
    sets: dict[str, list[tuple[Grey, Grey]]] = {}
    for folder in folders:
        for name, pictures in sets_of(folder).items():
            sets.setdefault(name, []).extend(pictures)
    for name in leave_out:
        if name not in sets:
            raise BadPairsError(f"no pair is of the set {name}, which is to be left out; there are {', '.join(sets)}")
    for name, pictures in sets.items():
        if name in leave_out:
            continue
        tell(f"{name}: {len(pictures)} pairs")
        places = placed([grey_pair(*both) for both in pictures], tell)
        for (vis, ir), place in zip(pictures, places, strict=True):
            if place.kind != "unsure":
                method, border = cv2.INTER_CUBIC, cv2.BORDER_REFLECT_101
                warped = cv2.warpPerspective(ir, place.matrix, SIZE, flags=method, borderMode=border)
                yield vis, np.asarray(warped, np.uint8)
        kinds = [place.kind for place in places]
        tell(f"{name}: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("own", "set", "unsure")))


def placed(pairs: Sequence[GreyPair], tell: Callable[[str], None] = lambda _: None) -> list[Place]:
    """Bring the pairs of one data set to where they lie. Both pictures of all are of one size."""
    size = size_of(pairs[0].vis)
    start, agreed = _of_set(pairs, size)
    tell(f"the set lies {_apart(start, np.eye(3), size):.1f} px off, {'agreed' if agreed else 'not agreed'}")
    found = []
    for pair in pairs:
        fit = refined([pair], start, LEVELS)
        alike, before = (float(likeness([pair], matrix, EDGES)[0]) for matrix in (fit.matrix, start))
        is_followed = (
            spread_of(fit) * 640 / fit.size[0] <= SPREAD_PX
            and alike >= max(LIKENESS, before)
            and _apart(fit.matrix, start, size) <= OWN_PX
        )
        matrix = start
        kind: Kind = "unsure"
        if is_followed:
            matrix, kind = fit.matrix, "own"
        elif agreed and before >= LIKENESS:
            kind = "set"
        found.append(Place(matrix, kind, _apart(matrix, np.eye(3), size)))
    return found


def _of_set(pairs: Sequence[GreyPair], size: Size) -> tuple[Matrix, bool]:
    """Where a set lies, and whether two parts of it agree on that."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(pairs))[: 4 * DOZEN]
    if len(order) < DOZEN:
        return np.eye(3), False
    halves = [refined([pairs[index] for index in half], np.eye(3), LEVELS).matrix for half in (order[::2], order[1::2])]
    if _apart(halves[0], halves[1], size) > AGREE_PX:
        return np.eye(3), False
    return refined([pairs[index] for index in order], halves[0], LEVELS).matrix, True


def _apart(one: Matrix, other: Matrix, size: Size) -> float:
    corners = corners_of(size)
    distances = np.linalg.norm(mapped(one, corners) - mapped(other, corners), axis=1)
    return float(distances.mean()) * 640 / size[0]


def _middle(picture: Grey) -> Grey:
    height, width = picture.shape
    unit = min(width / 4, height / 3)
    wide, high = int(unit * 4), int(unit * 3)
    left, top = (width - wide) // 2, (height - high) // 2
    method = cv2.INTER_AREA if wide > SIZE[0] else cv2.INTER_CUBIC
    cut = picture[top : top + high, left : left + wide]
    return np.asarray(cv2.resize(cut, SIZE, interpolation=method), np.uint8)
