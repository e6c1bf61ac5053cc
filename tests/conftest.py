"""What every test leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Verbs that are run within this process may set its threads, and with them the last bits of what comes later."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
