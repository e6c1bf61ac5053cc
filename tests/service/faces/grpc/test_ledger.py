"""What a stream keeps count of, against the plainest writing of the same."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.faces.grpc.ledger import MAX_AGES, MAX_EVENTS, WINDOW_S, Rate, StreamLedger, quantile
from service.terms.errors import InvalidInputError

NUMBERS = st.lists(st.integers(0, 300), unique=True, max_size=60).map(sorted)


@given(NUMBERS, st.none() | st.integers(0, 300), st.data())
def test_every_number_is_accounted_for(numbers: list[int], resume_after: int | None, data: st.DataObject) -> None:
    ledger = StreamLedger(resume_after)
    floor = -1 if resume_after is None else resume_after
    fresh = [number for number in numbers if number > floor]
    gaps, answered = 0, []
    for number in numbers:
        assert ledger.arrive(number, 0.0) is (number in fresh)
    for number in fresh:
        if data.draw(st.booleans(), label="is dropped"):
            ledger.drop()
            continue
        if ledger.previous_sequence is not None:
            gaps += number - ledger.previous_sequence - 1
        ledger.answer(number, is_fused=data.draw(st.booleans()), age_s=0.1, now_s=0.0)
        answered.append(number)
        assert ledger.previous_sequence == number
    said = ledger.snapshot(0.0)
    assert said.received == len(fresh) == said.fused + said.failed + said.dropped
    assert said.skipped == len(numbers) - len(fresh)
    assert ledger.num_open == 0
    begin = floor if resume_after is not None else (fresh[0] if fresh else 0)
    between = set(range(begin + 1, fresh[-1] + 1)) if fresh else set()
    assert said.missing == len(between - set(fresh))
    if answered and (resume_after is not None or answered[0] == fresh[0]):
        # What each answer says about the gap before it adds up to what was dropped or never came, up to that answer.
        dropped = sum(1 for number in fresh if number < answered[-1]) - (len(answered) - 1)
        missing = len([number for number in between - set(fresh) if number < answered[-1]])
        assert gaps == dropped + missing


@given(st.lists(st.integers(0, 20), min_size=2, max_size=20), st.none() | st.integers(0, 20))
def test_numbers_ascend_also_among_those_that_are_skipped(numbers: list[int], resume_after: int | None) -> None:
    ledger = StreamLedger(resume_after)
    for index, number in enumerate(numbers):
        if index and number <= numbers[index - 1]:
            with pytest.raises(InvalidInputError, match="ascending"):
                ledger.arrive(number, 0.0)
            return
        ledger.arrive(number, 0.0)


@given(st.lists(st.floats(0.001, 2.0), max_size=40))
def test_a_rate_is_that_of_the_window(pauses_s: list[float]) -> None:
    rate, times_s = Rate(), [0.0]
    rate.add(0.0)
    for pause_s in pauses_s:
        times_s.append(times_s[-1] + pause_s)
        rate.add(times_s[-1])
    seen = [moment for moment in times_s if moment >= times_s[-1] - WINDOW_S]
    expected = (len(seen) - 1) / (seen[-1] - seen[0]) if len(seen) > 1 else 0.0
    assert rate.per_s(times_s[-1]) == pytest.approx(expected)
    assert rate.per_s(times_s[-1] + WINDOW_S + 1) == 0.0


def test_what_is_kept_is_bounded() -> None:
    ledger = StreamLedger()
    for number in range(5000):
        ledger.arrive(number, number / 10_000)
        ledger.answer(number, is_fused=True, age_s=1.0 if number < 4000 else 2.0, now_s=number / 10_000)
    said = ledger.snapshot(0.5)
    assert said.received_per_s == pytest.approx(10_000)
    assert (said.age_p50_s, said.age_p99_s) == (2.0, 2.0)
    assert len(ledger._ages_s) == MAX_AGES
    assert len(ledger._arrivals._times_s) == MAX_EVENTS


@given(st.lists(st.floats(0, 100), max_size=50).map(sorted), st.floats(0, 1))
def test_quantiles(values: list[float], share: float) -> None:
    found = quantile(values, share)
    if not values:
        assert found == 0.0
        return
    needed = share * len(values)
    assert sum(value <= found for value in values) >= math.floor(needed)
    assert sum(value < found for value in values) <= math.ceil(needed)
    assert found in values
