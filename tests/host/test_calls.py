"""Blocking calls on threads of our own: answers, failures, cancellation, the end, and what is kept of a call."""

from __future__ import annotations

import asyncio
import threading
import weakref

import pytest

from recofuse_host.threads import Threads


async def test_answers_and_failures_come_back_from_other_threads() -> None:
    threads = Threads(2, "call")
    try:
        ids = await asyncio.gather(*(threads.run(threading.get_ident) for _ in range(8)))
        assert threading.get_ident() not in ids
        assert len(set(ids)) <= 2
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 / 0)
    finally:
        threads.shutdown()


async def test_a_call_that_has_not_begun_is_left_out_when_it_is_cancelled_or_all_is_over() -> None:
    threads, gate, ran = Threads(1, "call"), threading.Event(), list[str]()
    first = threads.run(gate.wait)
    second, third = threads.run(lambda: ran.append("second")), threads.run(lambda: ran.append("third"))
    second.cancel()
    fourth = threads.run(lambda: ran.append("fourth"))
    del third
    fourth.cancel()
    threads.shutdown()
    gate.set()
    assert await first
    with pytest.raises(asyncio.CancelledError):
        await second
    assert ran == []
    with pytest.raises(RuntimeError, match="call threads"):
        threads.run(gate.wait)


async def test_nothing_of_a_call_is_kept_after_it() -> None:
    class Thing:
        def fail(self) -> None:
            raise ValueError("no")

    threads = Threads(1, "call")
    try:
        things = [Thing(), Thing()]
        known = [weakref.ref(thing) for thing in things]
        assert await threads.run(things[0].__hash__)
        with pytest.raises(ValueError, match="no"):
            await threads.run(things[1].fail)
        things.clear()
        await threads.run(lambda: None)  # the thread is past both
        assert [reference() for reference in known] == [None, None]
    finally:
        threads.shutdown()
