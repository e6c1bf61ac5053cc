"""What the environment says to the command. No other module reads it: everything else is handed its settings."""

from __future__ import annotations

import os
import sys
from typing import Any

from service.terms.settings import Settings

WEIGHTS_VARIABLE = "RECOFUSE_WEIGHTS"
API_KEY_VARIABLE = "RECOFUSE_API_KEY"  # of a client


def read_settings() -> Settings:
    """The settings of the service. Raises SettingsError for a misspelt or impossible one."""
    settings = Settings.from_environment(os.environ, ignore=frozenset({WEIGHTS_VARIABLE, API_KEY_VARIABLE}))
    standard = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    return settings.replace(trace={"endpoint": standard}) if standard and not settings.trace.endpoint else settings


def with_options(settings: Settings, asked: dict[str, dict[str, Any]]) -> Settings:
    """Settings with the options that were given: those that are not None, by group and name."""
    if sys.stderr.isatty() and not any(name.upper() == "RECOFUSE_LOG__FORMAT" for name in os.environ):
        asked["log"] = {"format": "text"}  # somebody is reading
    return settings.replace(
        **{group: {k: v for k, v in values.items() if v is not None} for group, values in asked.items()}
    )


def is_torchrun() -> bool:
    """Whether torchrun started this process, as one of a group."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> str:
    """Which of torchrun's processes on this machine this one is; 0 without torchrun."""
    return os.environ.get("LOCAL_RANK", "0")
