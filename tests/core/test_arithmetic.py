"""One precision of float32 around every run, and what a program chose for itself afterwards."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from recofuse_core.arithmetic import full_float32
from recofuse_core.recording import EagerRecorder
from recofuse_core.runtime import Runtime
from tests.core.tiny import pairs, tiny_model

BACKENDS: Any = torch.backends


def setting() -> tuple[str, str, str, bool]:
    return (
        BACKENDS.cudnn.conv.fp32_precision,
        BACKENDS.cudnn.rnn.fp32_precision,
        BACKENDS.cuda.matmul.fp32_precision,
        BACKENDS.cudnn.benchmark,
    )


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = setting()
    legacy = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(legacy)
    BACKENDS.fp32_precision = "none"
    BACKENDS.cudnn.benchmark = before[3]
    BACKENDS.cudnn.conv.fp32_precision, BACKENDS.cudnn.rnn.fp32_precision = before[:2]
    BACKENDS.cuda.matmul.fp32_precision = before[2]
    assert setting() == before


def by_older_names() -> None:
    torch.set_float32_matmul_precision("high")


def by_newer_names() -> None:
    BACKENDS.cudnn.conv.fp32_precision, BACKENDS.cuda.matmul.fp32_precision = "ieee", "tf32"


def for_everything() -> None:
    BACKENDS.fp32_precision = "tf32"


def by_trial() -> None:
    BACKENDS.cudnn.benchmark = True


@pytest.mark.parametrize("choose", [lambda: None, by_older_names, by_newer_names, for_everything, by_trial])
def test_what_a_program_chose_is_as_before_afterwards(choose: Callable[[], None]) -> None:
    choose()
    before = setting()
    with full_float32():
        assert "tf32" not in setting()
        assert setting()[3] is before[3]
        with full_float32(by_trial=True):
            assert "tf32" not in setting()
            assert setting()[3]
        assert setting()[3] is before[3]
    assert setting() == before
    with pytest.raises(ValueError, match="within"), full_float32():
        raise ValueError("within")
    assert setting() == before


def test_eager_and_recorded_runs_compute_in_one_precision() -> None:
    for_everything()
    model = tiny_model()
    vis, ir = pairs(1, 32, 32)
    seen: list[tuple[str, str, str, bool]] = []

    def note(*arguments: object) -> None:
        seen.append(setting())

    model.fusion.intro.register_forward_pre_hook(note)
    model.fuse(vis, ir)
    assert seen
    expected = seen[0]
    assert "tf32" not in expected
    eager = Runtime(model, precision="float32", graphs=False)
    recorded = Runtime(model, precision="float32", graphs=True, recorder=EagerRecorder(), defers_recording=True)
    for runtime in (eager, recorded):
        for _ in range(3):
            runtime.fuse(vis, ir)
    assert recorded.record_due()
    recorded.fuse(vis, ir)
    recorded.record([(1, 32, 48)])
    assert set(seen) == {expected}
    assert len(seen) > 20
