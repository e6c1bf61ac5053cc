"""The measurement of what a rig adds: what it says of figures. The ways run with `bench alignment --cost`."""

from __future__ import annotations

from benchmarks.rig_cost import judge

GOOD = {
    "registered": 2.0,
    "whole": 2.02,
    "partial": 2.1,
    "refined": 2.2,
    "partial refined": 2.3,
    "twice": 2.7,
    "overlay": 2.8,
    "overlay refined": 2.94,
}


def test_the_bars() -> None:
    outcome = judge(GOOD)
    assert outcome.all_met
    assert "a registered frame takes 2.00 s" in outcome.line
    assert (
        "partial +5.0%, refined +10.0%, partial refined +15.0%, twice +35.0%, overlay +40.0%, "
        "overlay refined +5.0% on overlay" in outcome.line
    )
    for name in ("whole", "partial", "refined", "partial refined"):
        outcome = judge(GOOD | {name: 2.31})
        assert not outcome.all_met
        assert outcome.line.startswith("bars not met")
