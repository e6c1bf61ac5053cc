"""Structured logs: one JSON object a line on standard error, with the id of the request that each line belongs to.

A line is a constant message; what varies goes into `extra=` and becomes fields of the object. No image content, no
secrets.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

from service.terms.settings import LogSettings

request_id: ContextVar[str] = ContextVar("request_id", default="")
traceparent: ContextVar[str] = ContextVar("traceparent", default="")  # W3C, of the current request; empty for none

_ACCEPTED_ID = re.compile(r"^[0-9A-Za-z_.:-]{1,128}$")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def accepted_id(given: str) -> str:
    """The id that a caller gave, or a fresh one in place of one that could forge lines or fields."""
    return given if _ACCEPTED_ID.fullmatch(given) else secrets.token_hex(12)


class RequestIdFilter(logging.Filter):
    """Adds the current request's id, and its trace's, to every record that does not bring one of its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Never drops anything."""
        if not hasattr(record, "request_id") and (current := request_id.get()):
            record.request_id = current
        if not hasattr(record, "trace_id") and (traced := traceparent.get()):
            record.trace_id = traced.split("-")[1]
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, trace_id, extra fields, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update(_extras(record))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """The same for eyes: time, level, message, and the extra fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with a traceback below it if there is one."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        fields = "".join(f" {name}={value}" for name, value in _extras(record).items())
        line = f"{time} {record.levelname.lower():7} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD and name[0] != "_"}


def configure(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Send the whole process's logs to a stream (standard error), in the chosen form. Replaces earlier handlers."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter())
    handler.addFilter(RequestIdFilter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.level)
    for chatty in ("asyncio", "uvicorn.error"):
        logging.getLogger(chatty).setLevel("WARNING")
