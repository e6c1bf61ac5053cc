"""The measurement of `align=refine`: what it says of draws, and one draw from end to end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import parallax
from benchmarks.parallax import Draw, Recorded, drawn, judge, markdown
from recofuse_rigs.warp import Warps

GOOD = Draw(4.0, 1.5, 5.0, 1.5, 4.0, 1.2, 0.0, 0.3, 0.1, 0.1)


def test_the_bars() -> None:
    assert judge([GOOD], []).all_met
    alone = replace(GOOD, after_px=4.0, moved_px=0.0)
    outcome = judge([GOOD, alone], [Recorded(2.0, 0.5)])
    assert outcome.all_met
    assert "1 of 2 frames refined, residual to 38% of what it was, 100% at least halved" in outcome.line
    assert "0.50 px of a shift" in outcome.line
    for bad in (replace(GOOD, after_px=2.1), replace(GOOD, harm_px=0.21), replace(GOOD, cpu_s=0.3), alone):
        outcome = judge([bad], [])
        assert not outcome.all_met
        assert outcome.line.startswith("bars not met")
    assert "| 1 | 4.00 | 1.50 | 5.00 | 1.50 | 0.30 | 0.10 |" in markdown([GOOD, alone])


def test_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WIDTH", 320), ("HEIGHT", 240), ("NUM_FRAMES", 4)):
        monkeypatch.setattr(parallax, name, value)
    draw = drawn(np.random.default_rng(4), 3, Warps())
    assert draw.before_px > 0.5
    assert draw.after_px <= 0.5 * draw.before_px
    assert draw.harm_px <= 0.2
    assert draw.jitter_px < draw.own_jitter_px
