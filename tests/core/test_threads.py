"""torch computes with its own number of threads or with what the process may use, whichever is less."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recofuse_core import threads
from recofuse_core.threads import decide, use_threads
from recofuse_host.processors import Processors, Threads

QUOTA_OF_TWO = Processors(64, 2.0)


def test_a_container_of_two_of_sixty_four_gets_two() -> None:
    assert decide(0, 64, QUOTA_OF_TWO) == Threads(2, "torch's 64, 64 allowed, cgroup quota 2")
    assert decide(0, 64, Processors(64), 4) == Threads(16, "torch's 64, 64 allowed, no cgroup quota, 4 share them")


def test_who_asks_gets_what_was_asked() -> None:
    assert decide(5, 64, QUOTA_OF_TWO, 3) == Threads(5, "as asked")


@given(st.integers(1, 256), st.integers(1, 256), st.none() | st.floats(0.01, 300), st.integers(1, 16))
def test_never_more_than_torchs_own_or_the_share(
    torchs_own: int, allowed: int, quota: float | None, num_sharing: int
) -> None:
    count = decide(0, torchs_own, Processors(allowed, quota), num_sharing).count
    assert 1 <= count <= torchs_own
    assert count == 1 or count * num_sharing <= allowed
    assert count == 1 or quota is None or count * num_sharing <= quota


def test_torch_is_told_in_this_thread_and_in_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_threads(3).count == torch.get_num_threads() == 3
    monkeypatch.setattr(threads, "_TORCHS_OWN", 64)
    monkeypatch.setattr(threads, "read_processors", lambda: QUOTA_OF_TWO)
    assert use_threads().count == torch.get_num_threads() == 2
    assert use_threads(num_sharing=2).count == torch.get_num_threads() == 1
    use_threads(2)
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]
