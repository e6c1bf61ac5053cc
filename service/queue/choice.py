"""Which queue a process gets."""

from __future__ import annotations

from service.queue.contract import JobQueue
from service.queue.memory import MemoryQueue
from service.terms.settings import QueueSettings


def build_queue(settings: QueueSettings) -> JobQueue:
    """The queue that the URL asks for. Raises SettingsError for a URL that cannot be."""
    if settings.url == "memory://":
        return MemoryQueue(settings)
    from service.queue.redis.queue import RedisQueue  # processes without Redis do not pay for it

    return RedisQueue(settings)
