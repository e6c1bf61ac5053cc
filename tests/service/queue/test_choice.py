"""Which queue a URL asks for."""

from __future__ import annotations

from service.queue.choice import build_queue
from service.queue.memory import MemoryQueue
from service.queue.redis.queue import RedisQueue
from service.terms.settings import QueueSettings


def test_the_url_chooses_the_queue() -> None:
    assert isinstance(build_queue(QueueSettings()), MemoryQueue)
    assert isinstance(build_queue(QueueSettings(url="redis://localhost")), RedisQueue)
