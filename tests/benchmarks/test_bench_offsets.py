"""What the measurement of offsets concludes, and that its clips are what their kinds say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.offsets import Rate, filmed, judge
from recofuse_client.pairing import OffsetError, offset_of

WALK = Rate("walk", same=10, same_accepted=10, same_wrong=0, other=90, other_accepted=1)


@pytest.mark.parametrize(
    ("rate", "all_met"),
    [
        (WALK, True),
        (replace(WALK, same_accepted=8), False),
        (replace(WALK, kind="two", same_accepted=3), True),  # two events are few
        (replace(WALK, same_wrong=1), False),
        (replace(WALK, other_accepted=2), False),
        (replace(WALK, kind="still", same_accepted=0), True),
    ],
)
def test_the_verdict(rate: Rate, all_met: bool) -> None:
    outcome = judge([rate])
    assert outcome.all_met is all_met
    assert outcome.line.startswith("bars met" if all_met else "bars not met")


def test_a_clip_is_what_its_kind_says() -> None:
    vis = filmed("six", 1, 0.0, is_infrared=False)
    assert offset_of(vis, filmed("six", 1, 0.7, is_infrared=True)).seconds == pytest.approx(0.7, abs=0.03)
    with pytest.raises(OffsetError):
        offset_of(vis, filmed("six", 2, 0.7, is_infrared=True))
