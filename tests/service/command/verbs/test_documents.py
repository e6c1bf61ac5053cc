"""The documents that the command writes are the ones that are committed."""

from __future__ import annotations

from service.terms.settings import Settings
from tests.service.command.calls import ROOT


def test_every_setting_is_in_the_documents() -> None:
    assert Settings.table() in (ROOT / "docs/settings.md").read_text("utf-8"), "run `make docs` and commit the result"
    assert "docs/settings.md" in (ROOT / "README.md").read_text("utf-8")
