"""What the environment says to the command. No other module reads it: everything else is handed its settings.

What it says to OpenMP is the library's business, too: recofuse_host/waiting.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from service.terms.settings import Settings

WEIGHTS_VARIABLE = "RECOFUSE_WEIGHTS"
API_KEY_VARIABLE = "RECOFUSE_API_KEY"  # of a client


def read_settings(options: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
    """The settings of the service. Raises SettingsError for a misspelt or impossible one.

    options: by group and name, of a verb that takes some; what is not None wins over the environment.
    """
    chosen: dict[str, dict[str, Any]] = {}
    if options is not None:
        chosen = {group: {k: v for k, v in values.items() if v is not None} for group, values in options.items()}
        if sys.stderr.isatty() and not any(name.upper() == "RECOFUSE_LOG__FORMAT" for name in os.environ):
            chosen.setdefault("log", {})["format"] = "text"  # somebody is reading
    ignored = frozenset({WEIGHTS_VARIABLE, API_KEY_VARIABLE})
    settings = Settings.from_environment(os.environ, ignore=ignored, options=chosen)
    standard = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    return settings.replace(trace={"endpoint": standard}) if standard and not settings.trace.endpoint else settings


def is_torchrun() -> bool:
    """Whether torchrun started this process, as one of a group."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> str:
    """Which of torchrun's processes on this machine this one is; 0 without torchrun."""
    return os.environ.get("LOCAL_RANK", "0")
