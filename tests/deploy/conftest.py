"""Tools that may be missing: their part is skipped and says which is missing, or fails with CHECK_DEPLOY_STRICT=1."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Needing = Callable[[str], str]


def missing(what: str) -> None:
    """Skip this test for the lack of a tool; fail it if everything is asked for."""
    if os.environ.get("CHECK_DEPLOY_STRICT", "") not in ("", "0"):
        pytest.fail(f"missing: {what}")
    pytest.skip(f"missing: {what}")


@pytest.fixture
def tool() -> Needing:
    """`tool("promtool")`: the path of a program, beside this Python or on the PATH."""

    def find(name: str) -> str:
        beside = Path(sys.executable).with_name(name)
        found = str(beside) if beside.is_file() else shutil.which(name)
        if found is None:
            missing(name)
        assert found is not None
        return found

    return find
