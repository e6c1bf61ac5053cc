"""Frames to send, for the tests of streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import recofuse_client as rc
from tests.fakes import picture

VIS, IR = picture(), picture(channels=1, seed=1)


def frames(number: int, **fields: Any) -> Iterator[rc.Frame]:
    """Frames that can be told apart by their top left pixel."""
    for sequence in range(number):
        vis = VIS.copy()
        vis[0, 0] = sequence % 256
        yield rc.Frame(vis, IR, timestamp_ns=1000 + sequence, **fields)
