"""What lies beside Redis in the shared folder: what goes there, that all mean the same one, and who cleans up.

A job's images have a file, named after the job, and an answer one of another name each; both are known to Redis before
anybody looks for them, and are let go by who ended the job or took the answer. What was left behind by a crash, a
deadline or an answer that nobody fetched is swept: a file of some age that no key stands for.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from service.queue.redis.availability import reaching
from service.queue.redis.folder import (
    JOB,
    MIN_BYTES,
    SPARE,
    FolderFullError,
    FrameGoneError,
    SharedFolder,
    job_file,
    job_of,
    new_answer_file,
)
from service.terms.errors import MalformedRequestError, UnavailableError
from service.terms.jobs import FusionJob, FusionResult
from service.terms.settings import SettingsError

logger = logging.getLogger(__name__)

RECORD_MAGIC = b"RFF1"  # of an answer whose payloads lie in a file: their bytes, the name and its length, the header
AGREED_S = 60  # how long the folder's id stays known after the last process that uses it
KEEP_S = 20.0  # between two looks after it
DOUBTFUL_S = 1.0  # the same while Redis has not said whether it took a job
CANCEL_AGAIN_S = 0.2
PATIENCE_S = AGREED_S + 2.0  # of a start with a mark that is not ours
RETRY_S = 1.0  # between two looks whether a mark that is not ours still stands
SWEEP_AFTER_S = 90.0  # age of a file that nobody names; longer than anything is on its way between folder and Redis
SWEPT_AT_ONCE = 256
MAX_WRITTEN = 64  # answers that are known to be written; beyond it the oldest would be written again
INLINE_BYTES = 1 << 20  # up to here a file is read and written at once, beyond it on a thread

_LENGTHS = struct.Struct("<QB")
_NAME_WITHIN = 256  # bytes of a record
Answer = TypeVar("Answer")


class Beside:
    """The shared folder of a queue, if it has one. path: of the folder, or empty."""

    def __init__(self, path: str, client: Any, key: Callable[..., str], *, min_bytes: int = MIN_BYTES) -> None:
        self._folder = SharedFolder(path, min_bytes=min_bytes) if path else None
        self._client = client
        self._key = key
        self._id = ""
        self._is_agreed = False
        self._keeping: asyncio.Task[None] | None = None
        self._doubtful: set[str] = set()
        self._written: dict[str, tuple[FusionResult, str, bytes]] = {}  # by job: answers that Redis does not know yet
        self.size_bytes = 0  # of all files, at the last look

    def open(self) -> None:
        """Begin. Raises SettingsError if the folder cannot be used."""
        if self._folder is not None:
            self._id = self._folder.open()
        self._keeping = asyncio.create_task(self._keep())

    @property
    def is_shared(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None

    async def check(self) -> None:
        """Raises SettingsError if the folder is not that of the others, UnavailableError if that cannot be known.

        A mark in Redis may be of processes that are gone, with their folder if it was in memory: it is looked at again
        until it would have run out.
        """
        until_s = time.monotonic() + PATIENCE_S
        while problem := await self._disagreement():
            if time.monotonic() >= until_s:
                raise SettingsError(problem)
            logger.warning("%s; waiting whether these processes are gone", problem)
            await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Let go of it."""
        while self._keeping is not None and not self._keeping.done():
            self._keeping.cancel()  # again, if redis-py dropped it
            await asyncio.wait({self._keeping}, timeout=CANCEL_AGAIN_S)
        if self._folder is not None:
            self._folder.close()

    async def agree(self, *, anew: bool = False) -> None:
        """Returns once it is certain that all processes mean one folder. Raises UnavailableError if they do not."""
        if (anew or not self._is_agreed) and (problem := await self._disagreement()):
            logger.error(problem)
            raise UnavailableError("the queue's shared folder is not that of the others", retry_after_s=5.0)

    # jobs

    async def put_job(self, job: FusionJob) -> int:
        """Write a job's images; how many bytes, 0 if they are to go through Redis.

        Raises FolderFullError, UnavailableError.
        """
        size = sum(map(len, job.payloads))
        if self._folder is None or size < self._folder.min_bytes:
            return 0
        self._doubtful.discard(job_file(job.id))
        await _run(size, self._folder.write, job_file(job.id), job.payloads)
        return size

    def doubt_job(self, job: FusionJob) -> None:
        """Redis did not say whether it took this job: its file goes as soon as Redis is back and knows no such job."""
        if self._folder is not None and sum(map(len, job.payloads)) >= self._folder.min_bytes:
            self._doubtful.add(job_file(job.id))

    async def job(self, header: bytes, job_id: str, size: int) -> FusionJob:
        """The job of a header, with its images, so many bytes, from their file.

        Raises FrameGoneError, MalformedRequestError, UnavailableError.
        """
        folder = await self._reached()
        return await _run(size, FusionJob.from_header, header, lambda sizes: folder.read(job_file(job_id), sizes))

    def let_go_job(self, job: FusionJob) -> None:
        """It has ended, and no dead letter keeps it."""
        if self._folder is not None and sum(map(len, job.payloads)) >= self._folder.min_bytes:
            self._folder.recycle(job_file(job.id))

    def remove_job(self, job_id: str) -> None:
        """It was cancelled; whoever reads it now does so in vain."""
        if self._folder is not None:
            self._folder.remove(job_file(job_id))

    # answers

    async def put_answer(self, result: FusionResult) -> tuple[str, bytes] | None:
        """The name of its file, and what Redis is to keep; None if it is to go through Redis as it is."""
        size = sum(map(len, result.payloads))
        if self._folder is None or size < self._folder.min_bytes:
            return None
        if (written := self._written.get(result.job_id)) is not None:  # Redis was away when it was to be told
            if written[0] is result and self._folder.touch(written[1]):
                return written[1:]
            self._folder.remove(written[1])
        name = new_answer_file(result.job_id)
        try:
            await _run(size, self._folder.write, name, result.payloads)
        except (FolderFullError, FrameGoneError, UnavailableError) as error:  # the job must end nevertheless
            logger.warning("an answer goes through Redis", extra={"job_id": result.job_id, "error": str(error)})
            return None
        record = b"".join((RECORD_MAGIC, _LENGTHS.pack(size, len(name)), name.encode(), result.header_bytes()))
        self._written[result.job_id] = result, name, record
        while len(self._written) > MAX_WRITTEN:
            self._written.pop(next(iter(self._written)))
        return name, record

    def told_answer(self, job_id: str) -> None:
        """Redis knows of the job's end: nobody will put its answer again."""
        self._written.pop(job_id, None)

    async def answer(self, raw: bytes) -> tuple[FusionResult, str]:
        """The result of what Redis keeps, and its file's name, empty if it has none.

        Raises FrameGoneError, MalformedRequestError, UnavailableError.
        """
        if not raw.startswith(RECORD_MAGIC):
            return FusionResult.from_bytes(raw), ""
        folder = await self._reached()
        start = len(RECORD_MAGIC) + _LENGTHS.size
        if len(raw) < start:
            raise MalformedRequestError("a record that was cut short")
        size, length = _LENGTHS.unpack_from(raw, len(RECORD_MAGIC))
        name = raw[start : start + length].decode("ascii", "replace")
        header = raw[start + length :]
        return await _run(size, FusionResult.from_header, header, lambda sizes: folder.read(name, sizes)), name

    def let_go_answers(self, names: Iterable[str]) -> None:
        """They were handed out, or came too late."""
        for name in names:
            if self._folder is not None and name:
                self._folder.recycle(name)

    # the parts

    def _opened(self) -> SharedFolder:
        if self._folder is None:
            raise FrameGoneError("this process has no shared folder")
        return self._folder

    async def _reached(self) -> SharedFolder:
        """The folder. Raises UnavailableError where others have one: what lies there is for them."""
        if self._folder is None:
            await self.agree(anew=True)
        return self._opened()

    async def _disagreement(self) -> str:
        """What is wrong, or nothing. Raises UnavailableError."""
        known = self._key("folder")
        with reaching():
            async with self._client.pipeline(transaction=True) as pipeline:
                if self._id:
                    pipeline.set(known, self._id, nx=True, ex=AGREED_S)
                pipeline.get(known)
                *_, others = await pipeline.execute()
            others = (others or b"").decode()
            self._is_agreed = others == self._id
            if self._is_agreed and self._id:
                await self._client.expire(known, AGREED_S)
        if self._is_agreed:
            return ""
        if self._folder is None:
            return "queue.shared_folder: other processes of this queue share a folder, and this one was given none"
        return f"queue.shared_folder: {self._folder.path} is not the folder that the others of this queue share"

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(DOUBTFUL_S if self._doubtful else KEEP_S)
            try:
                await self.agree(anew=True)
                if self._folder is not None:
                    await self.sweep()
            except UnavailableError:
                pass  # until it is back, nothing can be said of any file
            except Exception:
                logger.exception("the shared folder was not swept")

    async def sweep(self, *, after_s: float = SWEEP_AFTER_S) -> None:
        """Delete files of some age that nobody names, and doubtful ones of any age. Raises UnavailableError."""
        folder = self._opened()
        await self._sweep_doubtful(folder)
        listed = await asyncio.to_thread(lambda: list(folder.listed()))
        self.size_bytes = sum(size for _, size, _ in listed)
        before_s = time.time() - after_s
        num_swept = 0
        old = [name for name, _, changed_s in listed if changed_s <= before_s]
        for start in range(0, len(old), SWEPT_AT_ONCE):
            names = old[start : start + SWEPT_AT_ONCE]
            for name, is_named in zip(names, await self._are_named(names), strict=True):
                if not is_named:
                    await asyncio.to_thread(folder.remove, name)  # large ones take a while
                    num_swept += not name.startswith(SPARE)
        if num_swept:
            logger.info("files that nobody named were deleted", extra={"num_files": num_swept})

    async def _sweep_doubtful(self, folder: SharedFolder) -> None:
        while names := list(self._doubtful)[:SWEPT_AT_ONCE]:
            for name, is_named in zip(names, await self._are_named(names), strict=True):
                if name in self._doubtful:  # else it was written anew meanwhile, and Redis hears of it in a moment
                    self._doubtful.discard(name)
                    if not is_named:
                        folder.remove(name)

    async def _are_named(self, names: Sequence[str]) -> list[bool]:
        with reaching():
            async with self._client.pipeline(transaction=False) as pipeline:
                for name in names:
                    if name.startswith(JOB):
                        pipeline.exists(*(self._key(kind, job_of(name)) for kind in ("payload", "dead-payload")))
                    else:  # of several answers to one job the record names one
                        pipeline.getrange(self._key("result", job_of(name)), 0, _NAME_WITHIN)
                answers = await pipeline.execute()
        return [
            name.encode() in answer if isinstance(answer, bytes) else bool(answer)
            for name, answer in zip(names, answers, strict=True)
        ]


async def _run(size: int, call: Callable[..., Answer], *arguments: Any) -> Answer:
    """A call that reads or writes so many bytes."""
    return call(*arguments) if size <= INLINE_BYTES else await asyncio.to_thread(call, *arguments)
