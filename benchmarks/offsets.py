"""How often `--offset auto` is right, says that it is unsure, and is wrong: on generated clips whose truth is known.

Visible clips have 30 frames a second, infrared ones 22, an inverted scene, half the contrast and a gain that jumps;
12 s each. In a clip moves what its kind says. Each visible clip goes with its own infrared one, which lags by up to
1.5 s either way, and with those of all other clips of its kind, which have no offset: what is accepted of them is
wrong.

What a newcomer would get wrong: clips in a rhythm, without any motion and with one thing that passes once tell no
offset even if both show one scene, so of them nothing may be accepted, and the right answer is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import machine
from recofuse_client.pairing import Motion, OffsetError, offset_of

SECONDS = 12.0
MAX_WRONG = 0.02  # of pairs of clips that have nothing to do with each other, of each kind
MIN_FOUND = 0.9  # of the pairs of one scene, of the kinds that tell an offset
WRONG_S = 0.1
TELLING = ("walk", "six")  # two or three events are few, and may be refused
KINDS = ("walk", "six", "three", "two", "once", "slow", "rhythm", "still")

Courses = Callable[[NDArray[np.float64]], list[NDArray[np.float64]]]


@dataclass(frozen=True, slots=True)
class Rate:
    """Of one kind: clips of one scene and how many were accepted, and off by more than WRONG_S; and of two scenes."""

    kind: str
    same: int
    same_accepted: int
    same_wrong: int
    other: int
    other_accepted: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """All kinds, and whether the bars are met."""

    rates: list[Rate]
    line: str
    all_met: bool


def run(*, clips: int, json_path: Path | None = None, say: Callable[[str], None]) -> Outcome:
    """Measure so many clips of each kind, each beside each."""
    rates = []
    for kind in KINDS:
        rates.append(rate(kind, clips))
        say(
            f"{kind}: of {rates[-1].same} pairs of one scene {rates[-1].same_accepted} accepted, "
            f"{rates[-1].same_wrong} of them wrong; of {rates[-1].other} pairs of two {rates[-1].other_accepted}"
        )
    outcome = judge(rates)
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": machine(), **asdict(outcome)}, indent=2) + "\n", encoding="utf-8")
    say(outcome.line)
    return outcome


def judge(rates: Sequence[Rate]) -> Outcome:
    """Whether what tells an offset is found, and what tells none is not believed."""
    all_met = all(
        rate.other_accepted <= MAX_WRONG * rate.other
        and rate.same_wrong == 0
        and (rate.kind not in TELLING or rate.same_accepted >= MIN_FOUND * rate.same)
        for rate in rates
    )
    wrong, others = sum(rate.other_accepted for rate in rates), sum(rate.other for rate in rates)
    far = sum(rate.same_wrong for rate in rates)
    line = (
        f"bars {'met' if all_met else 'not met'}: {wrong} of {others} pairs of two scenes were taken for one "
        f"(of no kind more than {MAX_WRONG:.0%}), {far} offsets were off by more than "
        f"{WRONG_S:g} s (none may)"
    )
    return Outcome(list(rates), line, all_met)


def rate(kind: str, clips: int) -> Rate:
    """One kind of motion."""
    lags = np.random.default_rng(5).uniform(-1.5, 1.5, clips)
    visible = [filmed(kind, seed, 0.0, is_infrared=False) for seed in range(clips)]
    infrared = [filmed(kind, seed, float(lags[seed]), is_infrared=True) for seed in range(clips)]
    is_told = kind in (*TELLING, "three", "two")
    same = wrong = other = 0
    for one, vis in enumerate(visible):
        for two, ir in enumerate(infrared):
            try:
                found = offset_of(vis, ir).seconds
            except OffsetError:
                continue
            if one != two:
                other += 1
            else:
                same += 1
                wrong += not is_told or abs(found - lags[one]) > WRONG_S
    return Rate(kind, clips, same, wrong, clips * (clips - 1), other)


def filmed(kind: str, seed: int, lag_s: float, *, is_infrared: bool) -> Motion:
    """What one camera shows of a scene."""
    places_at = _courses(kind, np.random.default_rng(seed))
    rng = np.random.default_rng([seed, int(is_infrared)])
    (width, height), fps = ((80, 60), 22) if is_infrared else ((96, 72), 30)
    ground = 90 + 20 * np.asarray(cv2.resize(rng.normal(0, 1, (6, 8)), (width, height)), np.float64)
    times = np.arange(round(SECONDS * fps)) / fps
    courses = places_at(times - lag_s)
    motion = Motion()
    for number, time_s in enumerate(times):
        picture: NDArray[np.float64] = ground.copy()
        for index, course in enumerate(courses):
            left = round(float(course[number]) / 100 * width)
            top = (7 * index) % (2 * height // 3)
            picture[top : top + height // 3, max(0, left) : max(0, left + width // 6)] = 200 - 15 * index
        picture += rng.normal(0, 3, picture.shape)
        if is_infrared:
            picture = (255 - picture) / 2 + 10 * (number % 7 == 0)
        motion.add(np.clip(picture, 0, 255).astype(np.uint8), float(time_s))
    return motion


def _courses(kind: str, rng: np.random.Generator) -> Courses:
    """Where things are at given times, in hundredths of the width."""
    if kind == "walk":  # starts and stops as it likes, and goes round
        times = np.arange(-4, SECONDS + 4, 0.01)
        speed = np.repeat(rng.uniform(0, 40, len(times) // 40 + 1) * (rng.random(len(times) // 40 + 1) < 0.6), 40)
        smooth = np.asarray(cv2.GaussianBlur(speed[None, : len(times)], (0, 0), 5)).ravel()
        places = np.cumsum(smooth) * 0.01
        return lambda at: [np.interp(at, times, places) % 100]
    if kind == "rhythm":
        rate_hz, phase = rng.uniform(0.4, 1.5), rng.uniform(0, 6)
        return lambda at: [50 + 25 * np.sin(2 * np.pi * rate_hz * at + phase)]
    if kind == "still":
        return lambda at: []
    if kind == "slow":  # passes once, in seconds
        start_s, speed_s = rng.uniform(2, SECONDS - 4), rng.uniform(30, 60)
        return lambda at: [-20 + speed_s * (at - start_s)]
    starts_s = rng.uniform(1, SECONDS - 1.5, {"once": 1, "two": 2, "three": 3, "six": 6}[kind])  # shoots past, in 0.6 s
    return lambda at: [np.where((at > start) & (at < start + 0.6), -20 + 233 * (at - start), -50) for start in starts_s]
