"""What every test leaves as it was, and which of them see a GPU."""

from __future__ import annotations

from recofuse_host.waiting import sleep_while_waiting

sleep_while_waiting()  # before any test imports torch; the processes that tests start inherit it

import importlib.util
import os
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, from child processes too, unless the tests that need one are asked for (`-m gpu`).

    Others compare bytes of runs that may go different ways on a GPU (eager, recorded, other batch sizes), which round
    differently there; and they may run beside somebody's work on it. Kernels in Triton are interpreted then.
    """
    if not asks_for_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


def asks_for_gpu(markers: str) -> bool:
    """Whether an expression of `-m` names the marker gpu, and does not only exclude it."""
    words = markers.replace("(", " ").replace(")", " ").split()
    return any(word == "gpu" and words[:index][-1:] != ["not"] for index, word in enumerate(words))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse names that differ from process to process; leave out the tests that need a GPU where it is hidden.

    Asked for, those fail where there is no GPU.
    """
    unordered = [
        item.nodeid
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and any(
            isinstance(value, (set, frozenset)) and str(value) in item.name for value in item.callspec.params.values()
        )
    ]
    if unordered:  # sets print in another order in every process, and pytest-xdist wants the same names in all of them
        raise pytest.UsageError(f"a set in a test's name, write a tuple instead: {', '.join(unordered)}")
    if asks_for_gpu(config.option.markexpr):
        return
    left_out = [item for item in items if item.get_closest_marker("gpu") is not None]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


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
