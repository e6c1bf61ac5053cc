"""Blocking calls of an event loop on a few threads of its own: `run_in_executor` at a fraction of its price.

For each call an executor of the standard library builds two futures, three locks and a chain of callbacks, and takes a
lock for each step; beside the short calls of a service that is most of their cost. Here a call goes into one queue, and
the thread that has run it wakes the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Threads:
    """Threads that start with the first calls.

    num: how many; name: of each, before its number. is_daemon: the end of the process does not wait for them, which is
    for calls of pure Python alone: a library's code may not survive it.
    """

    def __init__(self, num: int, name: str, *, is_daemon: bool = False) -> None:
        self.num = num
        self._name = name
        self._is_daemon = is_daemon
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._is_over = False

    def run(self, call: Callable[[], Answer]) -> asyncio.Future[Answer]:
        """Run a call on the next free thread. Cancelling the future leaves out a call that has not begun.

        Raises RuntimeError after `shutdown`.
        """
        if self._is_over:
            raise RuntimeError(f"the {self._name} threads take no calls any more")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls.put(_Call(call, future))
        if len(self._threads) < self.num:
            name = f"{self._name}_{len(self._threads)}"
            thread = threading.Thread(target=_serve, args=(self._calls,), name=name, daemon=self._is_daemon)
            self._threads.append(thread)
            thread.start()
        return future

    def shutdown(self) -> None:
        """Cancel the calls that have not begun; the threads end after those that have. Returns at once."""
        self._is_over = True
        with contextlib.suppress(queue.Empty):
            while (waiting := self._calls.get_nowait()) is not None:
                waiting.future.cancel()
        for _ in self._threads:
            self._calls.put(None)


class _Call:
    """What is to be run, and whom to tell."""

    __slots__ = ("call", "future")

    def __init__(self, call: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        self.call = call
        self.future = future

    def run(self) -> None:
        """On a thread."""
        if self.future.cancelled():
            return
        answer: Any = None
        failure: BaseException | None = None
        try:
            answer = self.call()
        except BaseException as error:  # noqa: BLE001 - it is the caller's, whatever it is
            failure = error
        try:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                self.future.get_loop().call_soon_threadsafe(_settle, self.future, answer, failure)
        finally:
            del self, failure  # the failure's traceback knows this frame, and would keep them


def _serve(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()
        del call  # not kept until there is another one


def _settle(future: asyncio.Future[Any], answer: Any, failure: BaseException | None) -> None:
    if future.done():  # cancelled meanwhile
        return
    if failure is None:
        future.set_result(answer)
    else:
        future.set_exception(failure)
