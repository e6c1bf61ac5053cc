"""Which expressions of `-m` let the tests see a GPU."""

from __future__ import annotations

import os

import pytest

from tests.conftest import asks_for_gpu


@pytest.mark.parametrize(
    ("markers", "expected"),
    [
        ("", False),
        ("gpu", True),
        ("not gpu", False),
        ("not gpu and not stack and not package", False),
        ("redis or gpu", True),
        ("not (slow) and (gpu)", True),
        ("redis", False),
    ],
)
def test_a_gpu_is_seen_by_those_who_ask_for_it(markers: str, expected: bool) -> None:
    assert asks_for_gpu(markers) is expected


def test_this_run_sees_one_only_if_it_asked(request: pytest.FixtureRequest) -> None:
    if not asks_for_gpu(request.config.option.markexpr):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.gpu
def test_what_needs_a_gpu_is_left_out_unless_asked_for(request: pytest.FixtureRequest) -> None:
    assert asks_for_gpu(request.config.option.markexpr)
