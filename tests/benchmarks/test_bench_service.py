"""The bare servers of `bench service` answer with the right file, and ratios are those of windows side by side."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.bare import MAX_BATCH, LocalBatcher
from benchmarks.service import comparisons, judge


async def test_the_bare_batcher_gives_each_caller_its_own_picture() -> None:
    batcher = LocalBatcher()
    running = asyncio.create_task(batcher.run())
    pairs = [(b"vis %d" % number, b"ir") for number in range(2 * MAX_BATCH + 3)]
    answers = await asyncio.wait_for(asyncio.gather(*(batcher.fuse(*pair) for pair in pairs)), 30)
    running.cancel()
    assert answers == [vis for vis, _ in pairs]


def test_a_ratio_is_the_median_of_the_rounds_own_and_is_judged() -> None:
    rounds = [
        {"bare": 2.0, "all-in-one": 2.4, "split": 8.0},
        {"bare": 4.0, "all-in-one": 6.0, "split": 16.0},  # a slow second for both
        {"bare": 2.0, "all-in-one": 2.0, "split": 8.0},
    ]
    alone, over_redis = comparisons(rounds)
    assert (alone.name, over_redis.name) == ("all-in-one to bare", "split to bare")
    assert [alone.ratio, over_redis.ratio] == pytest.approx([1.2, 4.0])
    checks = {check.name: check for check in judge([], 1.0, [alone, over_redis])}
    assert checks["all-in-one to bare"].ratio > 1
    assert checks["split to bare"].ratio < 1
    assert "all-in-one to bare 1.2 (<=1.3" in checks["all-in-one to bare"].text()
    assert comparisons([]) == []
