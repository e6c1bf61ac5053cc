"""What a request leaves behind once it is answered: nothing that has to wait for the cyclic collector.

The collector counts objects, not bytes. A few objects in a cycle that hold an upload are small to it, so hundreds of
megabytes may lie there before it looks; and an allocator does not give all of that back.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import service
from service.jobs import FusionJob
from tests.fakes import job
from tests.service.conftest import Serving
from tests.service.error_cases import ERROR_CASES, IR, VIS

SOURCES = str(Path(service.__file__).parent)
FILES = {"vis": VIS, "ir": IR}

Left = Callable[[], Counter[str]]


@contextlib.contextmanager
def without_collector() -> Iterator[Left]:
    """Yields what tells, once, which objects and frames of the service lie in cycles that nobody reaches any more."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def left() -> Counter[str]:
        gc.collect()
        return Counter(filter(None, map(_kind, gc.garbage)))

    try:
        yield left
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _kind(found: object) -> str:
    if isinstance(found, FrameType):
        return found.f_code.co_qualname if found.f_code.co_filename.startswith(SOURCES) else ""
    return type(found).__qualname__ if type(found).__module__.startswith("service.") else ""


class _Ring:
    def __init__(self, payload: FusionJob) -> None:
        self.payload = payload
        self.ring = self


def test_what_lies_in_a_cycle_is_found() -> None:
    with without_collector() as left:
        _Ring(job())
        assert left() == {"FusionJob": 1, "FusionOptions": 1}


async def test_http_requests_leave_nothing(serving: Serving) -> None:
    async with serving() as server:
        bad = [(case.files(), case.form, 0) for case in ERROR_CASES.values()]
        with without_collector() as left:
            for files, form, status in [(FILES, {}, 200), *bad, (FILES, {"no": "1"}, 422), (FILES, {}, 200)]:
                answer = await server.client.post("/v1/fuse", files=files, data=form)
                assert answer.status_code == status or (not status and 400 <= answer.status_code < 500)
            for headers in ({"Prefer": "respond-async"}, {"Idempotency-Key": "k"}):
                assert (await server.client.post("/v1/fuse", files=FILES, headers=headers)).is_success
            for content in (b"", b"--x\r\nrubbish", b"--x\r\n\r\n" + bytes(9)):
                content_type = {"Content-Type": "multipart/form-data; boundary=x"}
                assert (await server.client.post("/v1/fuse", content=content, headers=content_type)).is_client_error
            assert not left()
