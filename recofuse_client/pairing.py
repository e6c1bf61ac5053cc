"""Frames of two cameras that run free, paired by their stamps, and how late one is, found from what moves.

Two cameras see one thing move at one moment, however they show it. So how much changes from frame to frame rises and
falls in both alike, and the shift at which both series agree most is what infrared is late by. Motion that repeats
itself agrees at several shifts, and no motion at none: then nothing is found, rather than something wrong. Nor is what
agrees by luck: two series hold only so many independent moments, and one thing that happens once in each can always be
laid upon the other, however clearly both show it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recofuse_images.codecs import cv2

MAX_OFFSET_S = 2.0
MIN_LIKENESS = 0.5  # correlation of both series, at most 1
MIN_LEAD = 0.15  # of the correlation over that of the next best offset
MIN_CLEARNESS = 5.0  # standard errors of the correlation of as many independent moments, the best of all offsets
MIN_EVENTS = 3.0  # that both show; how many of equal weight would be as uneven
MIN_SECONDS = 4.0  # of both cameras
_SIDES = 64, 48  # at which frames are compared
_STEP_S = 0.005
_SMOOTH_S = 0.04  # sigma: frames come in steps; wider, and clips of different places begin to agree
_APART_S = 0.25  # from where on another offset is another one
_OUTLIER = 6.0  # standard deviations; one flash says no more than this
_EVENT_S = 0.5
_SLACK_NS = 1_000_000_000  # that frames are kept beyond what the offset asks for

Series = NDArray[np.float64]


class OffsetError(ValueError):
    """What moves does not tell the offset of two cameras. The message says why."""


@dataclass(frozen=True, slots=True)
class Offset:
    """seconds: what infrared is late by; negative if it is early. likeness: of what moves, at most 1. lead: over the
    next best offset.
    """

    seconds: float
    likeness: float
    lead: float


class Motion:
    """How much changes from frame to frame of one camera. A change of the whole picture's level counts for nothing."""

    def __init__(self) -> None:
        self._before: tuple[NDArray[np.float32], float] | None = None
        self._times: list[float] = []
        self._energies: list[float] = []

    def add(self, frame: NDArray[Any], seconds: float) -> None:
        """A frame, (H, W) or (H, W, 3), and its time, which grows."""
        small = np.asarray(cv2.resize(frame, _SIDES, interpolation=cv2.INTER_AREA), np.float32)
        small = small.mean(axis=2) if small.ndim == 3 else small
        if self._before is not None and seconds > self._before[1]:
            change = small - self._before[0]
            self._times.append((seconds + self._before[1]) / 2)
            self._energies.append(float(np.abs(change - np.median(change)).mean()) / (seconds - self._before[1]))
        self._before = small, seconds

    @property
    def series(self) -> tuple[Series, Series]:
        """Times in seconds, and energies."""
        return np.array(self._times), np.array(self._energies)


def offset_of(vis: Motion, ir: Motion, max_offset_s: float = MAX_OFFSET_S) -> Offset:
    """What infrared is late by. Raises OffsetError."""
    (vis_times, vis_energies), (ir_times, ir_energies) = vis.series, ir.series
    for name, times, energies in (("vis", vis_times, vis_energies), ("ir", ir_times, ir_energies)):
        if len(times) < 2 or times[-1] - times[0] < MIN_SECONDS:
            raise OffsetError(f"{name}: an offset is found from {MIN_SECONDS:.0f} s or more of both cameras")
        if energies.std() <= 1e-6:
            raise OffsetError(f"{name}: nothing moves")
    start, end = min(vis_times[0], ir_times[0]), max(vis_times[-1], ir_times[-1])
    grid = np.arange(start, end + _STEP_S, _STEP_S)
    first, first_known = _on(grid, vis_times, vis_energies)
    second, second_known = _on(grid, ir_times, ir_energies)
    num_least = round(0.75 * MIN_SECONDS / _STEP_S)
    reach = min(round(max_offset_s / _STEP_S), len(grid) - 1)
    scores = np.full(2 * reach + 1, -1.0)
    for index, lag in enumerate(range(-reach, reach + 1)):
        one, other = slice(max(0, -lag), len(grid) - max(0, lag)), slice(max(0, lag), len(grid) - max(0, -lag))
        both = first_known[one] & second_known[other]
        if both.sum() >= num_least:
            scores[index] = _correlation(first[one][both], second[other][both])
    best = int(scores.argmax())
    if best in (0, 2 * reach):
        raise OffsetError(f"the cameras agree most at the end of what is sought, {max_offset_s:g} s")
    apart = np.abs(np.arange(2 * reach + 1) - best) * _STEP_S > _APART_S
    lead = float(scores[best] - scores[apart].max(initial=-1.0))
    if scores[best] < MIN_LIKENESS:
        raise OffsetError(f"what moves is alike by {scores[best]:.2f} only (at least {MIN_LIKENESS})")
    if lead < MIN_LEAD:
        raise OffsetError(f"another offset is nearly as good (ahead by {lead:.2f}, at least {MIN_LEAD})")
    lag = best - reach
    one, other = slice(max(0, -lag), len(grid) - max(0, lag)), slice(max(0, lag), len(grid) - max(0, -lag))
    both = first_known[one] & second_known[other]
    _require_evidence(first[one][both], second[other][both])
    return Offset((best - reach) * _STEP_S, float(scores[best]), lead)


def _require_evidence(first: Series, second: Series) -> None:
    """Raises OffsetError where two series, laid on each other, may agree by luck."""
    clearness = float(np.arctanh(min(_correlation(first, second), 0.9999)) * np.sqrt(_num_moments(first, second) - 3))
    if clearness < MIN_CLEARNESS:
        raise OffsetError(f"what moves may agree by chance (clear by {clearness:.1f}, at least {MIN_CLEARNESS:g})")
    shared = (first - first.mean()) * (second - second.mean())
    parts = np.array([part.sum() for part in np.array_split(shared, max(1, round(len(shared) * _STEP_S / _EVENT_S)))])
    num_events = float(parts.sum() ** 2 / (parts @ parts))
    if num_events < MIN_EVENTS:
        raise OffsetError(f"too little happens ({num_events:.1f} events, at least {MIN_EVENTS:.1f}); film for longer")


def _num_moments(first: Series, second: Series) -> float:
    """How many independent values would vary as much in correlation (Bartlett 1935); at least 3."""
    num = len(first)
    lags = np.arange(1, num // 4)
    alike = _self_correlation(first)[lags] * _self_correlation(second)[lags]
    return max(3.0, num / max(1.0, 1 + 2 * float(alike @ (1 - lags / num))))


def _self_correlation(series: Series) -> Series:
    """By lag, 1 at none."""
    spectrum = np.fft.rfft(series - series.mean(), 2 * len(series))
    products = np.fft.irfft(spectrum * spectrum.conj())[: len(series)]
    return np.asarray(products / max(float(products[0]), 1e-12))


def _on(grid: Series, times: Series, energies: Series) -> tuple[Series, NDArray[np.bool_]]:
    bounded = np.minimum(energies, energies.mean() + _OUTLIER * energies.std())
    series = np.interp(grid, times, bounded)[None]
    smooth = cv2.GaussianBlur(series, (0, 0), _SMOOTH_S / _STEP_S, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(smooth[0], np.float64), (grid >= times[0]) & (grid <= times[-1])


def _correlation(first: Series, second: Series) -> float:
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / max(float(np.sqrt((first @ first) * (second @ second))), 1e-12))


@dataclass(frozen=True, slots=True)
class Stamped:
    """A frame and its time in ns."""

    image: NDArray[Any]
    ns: int


class Pairer:
    """Finds each visible frame the infrared one nearest in time. offset_s, tolerance_s: see `video.read_pairs`.

    Frames of one camera come in order of time. What is too old to be needed is let go. num_unpaired: visible frames let
    go because no infrared one was near them. Not safe for several threads.
    """

    def __init__(self, offset_s: float, tolerance_s: float) -> None:
        self._offset_ns, self._tolerance_ns = round(offset_s * 1e9), round(tolerance_s * 1e9)
        self._vis: deque[Stamped] = deque()
        self._ir: deque[Stamped] = deque()
        self._kept_ns = abs(self._offset_ns) + self._tolerance_ns + _SLACK_NS
        self.num_unpaired = 0

    def add_vis(self, frame: Stamped) -> None:
        """The next visible frame."""
        self.num_unpaired += self._add(self._vis, frame)

    def add_ir(self, frame: Stamped) -> None:
        """The next infrared frame."""
        self._add(self._ir, frame)

    def newest(self, *, is_over: bool = False) -> tuple[Stamped, Stamped] | None:
        """The newest pair that no frame to come could better; older visible frames are let go. None if there is none.

        is_over: no frame will come.
        """
        found = None
        while self._vis and self._ir:
            due = self._vis[0].ns + self._offset_ns
            if self._ir[-1].ns < due and not is_over:
                break
            vis = self._vis.popleft()
            ir = min(self._ir, key=lambda frame: abs(frame.ns - due))
            if abs(ir.ns - due) <= self._tolerance_ns:
                found = vis, ir
            else:
                self.num_unpaired += 1
        return found

    def _add(self, frames: deque[Stamped], frame: Stamped) -> int:
        """How many were let go for it."""
        frames.append(frame)
        num_gone = 0
        while frame.ns - frames[0].ns > self._kept_ns:
            frames.popleft()
            num_gone += 1
        return num_gone
