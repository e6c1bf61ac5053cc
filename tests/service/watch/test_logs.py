"""Log lines are single JSON objects that carry their request's id."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from service.terms.settings import LogSettings
from service.watch import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = before
    root.setLevel(level)


def test_json_lines(stream: io.StringIO) -> None:
    logs.configure(LogSettings(), stream)
    token = logs.request_id.set("r-1")
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        logging.getLogger("service.test").exception("something failed", extra={"size": 3})
    logs.request_id.reset(token)
    logging.getLogger("service.test").debug("not shown")
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert (entry["message"], entry["level"], entry["request_id"], entry["size"]) == (
        "something failed",
        "ERROR",
        "r-1",
        3,
    )
    assert "line two" in entry["traceback"]


def test_text_lines(stream: io.StringIO) -> None:
    logs.configure(LogSettings(format="text", level="WARNING"), stream)
    logging.getLogger("service.test").info("not shown")
    logging.getLogger("service.test").warning("careful", extra={"size": 3})
    assert stream.getvalue().strip().endswith("warning careful size=3")
