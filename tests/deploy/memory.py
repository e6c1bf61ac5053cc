"""What a front end may take at most, beside what its container allows."""

from __future__ import annotations

from service.access.held import SHARE
from service.faces.grpc.arriving import LOOKAHEAD_BYTES, max_message_bytes
from service.terms.settings import Settings

BASE_BYTES = 110 << 20  # resident memory of `recofuse api` at rest: 98 MiB measured
MARGIN = 0.05  # of the limit


def needed_bytes(limit: int) -> int:
    """Of a front end with this limit: itself, what it holds, one message thrice while it is read, all calls unread."""
    settings = Settings()
    unread = settings.grpc.max_calls * LOOKAHEAD_BYTES
    return int(BASE_BYTES + (SHARE + MARGIN) * limit) + 3 * max_message_bytes(settings) + unread


def num_messages(limit: int) -> int:
    """How many of the largest messages it holds."""
    return int(SHARE * limit) // max_message_bytes(Settings())
