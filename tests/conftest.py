"""What every test leaves as it was."""

from __future__ import annotations

from recofuse_host.waiting import sleep_while_waiting

sleep_while_waiting()  # before any test imports torch; the processes that tests start inherit it

import importlib.util
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Verbs that are run within this process may set its threads, and with them the last bits of what comes later."""
    if importlib.util.find_spec("torch") is None:  # a light installation: tests/packaging
        yield
        return
    import torch

    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
