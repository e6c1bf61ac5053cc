"""Frames beside the queue: a folder that front ends and workers of one host share, best in memory (tmpfs).

What is large lies there as files, and Redis carries their names alone (docs/redis.md). What a newcomer would get wrong:

- *A name from Redis is not trusted.* It has a fixed alphabet and no separators, is opened relative to the folder, and
  neither links nor what is no plain file is followed.
- *A file is there whole or not at all.* It is written under a spare name and renamed.
- *Files are used again.* Fresh pages cost four times what overwriting costs, so what has been read becomes a spare of
  the process that let go of it. A slow reader may still have it open: each looks again after it has read, and what does
  not have its name any more counts as gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import threading
from collections import deque
from collections.abc import Iterator, Sequence

from service.terms.errors import UnavailableError
from service.terms.settings import SettingsError

MIN_BYTES = 16 << 10  # smaller ones go through Redis
MAX_SPARES = 32  # of one process, and their bytes together
MAX_SPARE_BYTES = 64 << 20

JOB, ANSWER, SPARE = "job-", "answer-", "spare-"
MARKER = "recofuse-folder"
_NAME = re.compile(r"(job|answer|spare)-[0-9A-Za-z_-]{1,100}")
_MARKER_ID = re.compile(r"[0-9a-f]{32}")
# What is wrong with one file, and no reason to wait: its disk cannot read it, or it is a socket or a device.
_BROKEN = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENXIO)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class FolderFullError(Exception):
    """There is no room for another file."""


class FrameGoneError(Exception):
    """There is no such file any more, or not one of this size."""


class FrameBrokenError(FrameGoneError):
    """There is one, and it cannot be read."""


def job_file(job_id: str) -> str:
    """The name of a job's images."""
    return f"{JOB}{job_id}"


def new_answer_file(job_id: str) -> str:
    """A name for one of a job's answers; several workers may come to one."""
    return f"{ANSWER}{job_id}-{secrets.token_hex(8)}"


def job_of(name: str) -> str:
    """The job that a file belongs to, by its name."""
    return name.removeprefix(JOB) if name.startswith(JOB) else name.removeprefix(ANSWER).rpartition("-")[0]


class SharedFolder:
    """Reads and writes files of one folder, from any thread; `open` comes first."""

    def __init__(self, path: str, *, min_bytes: int = MIN_BYTES) -> None:
        self.path = path
        self.min_bytes = min_bytes
        self._folder = -1
        self._mode = 0o600
        self._lock = threading.Lock()  # around the next two
        self._spares: deque[tuple[str, int]] = deque()
        self._spare_bytes = 0

    def open(self) -> str:
        """Begin; returns the id that the folder is known by.

        Raises SettingsError if it is missing, cannot be written, or is open to everybody.
        """
        try:
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            mode = os.fstat(self._folder).st_mode
            if mode & stat.S_IRWXO:  # names of files are ids of jobs, and who knows one may ask for its result
                raise SettingsError(f"queue.shared_folder: {self.path} is open to everybody; chmod o-rwx it")
            # Who shares it by a group says so by letting the group write.
            self._mode = 0o660 if mode & stat.S_IWGRP else 0o600
            return self._marker()
        except OSError as error:
            raise SettingsError(f"queue.shared_folder: {self.path} cannot be used: {error.strerror}") from error

    def close(self) -> None:
        """Delete the spares."""
        if self._folder >= 0:
            self._drop_spares(0)
            os.close(self._folder)
            self._folder = -1

    def write(self, name: str, parts: Sequence[bytes]) -> None:
        """Put these bytes, one after the other, under a name; a file of that name is replaced.

        Raises FolderFullError, or UnavailableError if the folder cannot be written for another reason.
        """
        checked(name)
        with reaching_folder():
            while True:
                try:
                    self._write(name, parts)
                    return
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    if not self._drop_spares(0):
                        raise FolderFullError(self.path) from error

    def read(self, name: str, sizes: Sequence[int]) -> list[bytes]:
        """The parts of a file. Raises FrameGoneError, or UnavailableError if the folder cannot be read."""
        checked(name)
        with reaching_folder(), reading(name):
            while True:  # a submission that is repeated puts the same images under the name of those that are read
                if (parts := self._read(name, sizes)) is not None:
                    return parts

    def recycle(self, name: str) -> None:
        """Nobody wants this file any more: keep it for the next `write`, if it is one of ours to overwrite."""
        spare = f"{SPARE}{secrets.token_hex(12)}"
        with contextlib.suppress(OSError):
            os.rename(checked(name), spare, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            size = os.stat(spare, dir_fd=self._folder, follow_symlinks=False).st_size
            with self._lock:
                self._spares.append((spare, size))
                self._spare_bytes += size
            self._drop_spares(MAX_SPARES)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(OSError):
            os.unlink(checked(name), dir_fd=self._folder)

    def touch(self, name: str) -> bool:
        """Let a file count as written now; whether it is there."""
        try:
            os.utime(checked(name), dir_fd=self._folder, follow_symlinks=False)
        except OSError:
            return False
        return True

    def listed(self) -> Iterator[tuple[str, int, float]]:
        """Each file's name, its bytes and when it was last written or renamed (Unix seconds)."""
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        found = entry.stat(follow_symlinks=False)
                        yield entry.name, found.st_size, max(found.st_mtime, found.st_ctime)

    # the parts

    def _marker(self) -> str:
        """The folder's id, which the first process gives it."""
        with contextlib.suppress(FileNotFoundError):  # a full folder has room for no other
            return self._known_marker()
        token = secrets.token_hex(16)
        draft = f".{MARKER}-{token}"
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, self._mode, dir_fd=self._folder)
        try:
            os.write(file, token.encode())
            os.fchmod(file, self._mode)
            with contextlib.suppress(FileExistsError):
                os.link(draft, MARKER, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        finally:
            os.close(file)
            os.unlink(draft, dir_fd=self._folder)
        return self._known_marker()

    def _known_marker(self) -> str:
        file = os.open(MARKER, os.O_RDONLY | _OPEN, dir_fd=self._folder)
        try:
            found = os.read(file, 64).decode("ascii", "replace")
        finally:
            os.close(file)
        if not _MARKER_ID.fullmatch(found):
            raise SettingsError(f"queue.shared_folder: {self.path}/{MARKER} is none of ours; delete it")
        return found

    def _read(self, name: str, sizes: Sequence[int]) -> list[bytes] | None:
        """The parts of the file that has the name now; None if another one has it since."""
        file = os.open(name, os.O_RDONLY | _OPEN, dir_fd=self._folder)
        try:
            before = os.fstat(file)
            if not stat.S_ISREG(before.st_mode) or before.st_size < sum(sizes):
                raise FrameGoneError(name)
            parts, start = [], 0
            for size in sizes:
                parts.append(_read(file, start, size))
                start += size
            return parts if self._has_name(before, name) else None
        finally:
            os.close(file)

    def _write(self, name: str, parts: Sequence[bytes]) -> None:
        spare, file = self._spare(sum(map(len, parts)))
        try:
            _write(file, parts)
            os.rename(spare, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except BaseException:
            self.remove(spare)
            raise
        finally:
            os.close(file)

    def _spare(self, size: int) -> tuple[str, int]:
        """A file to write so many bytes to: its name, and open."""
        while (found := self._pop_spare()) is not None:
            spare, had = found
            try:
                file = os.open(spare, os.O_WRONLY | _OPEN, dir_fd=self._folder)
            except OSError:  # swept, or another user's
                self.remove(spare)
                continue
            if had > 2 * size:  # what a large frame needed is not kept by small ones
                os.ftruncate(file, size)
            return spare, file
        spare = f"{SPARE}{secrets.token_hex(12)}"
        file = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, self._mode, dir_fd=self._folder)
        if self._mode != 0o600:
            os.fchmod(file, self._mode)  # whatever the umask says
        return spare, file

    def _pop_spare(self) -> tuple[str, int] | None:
        with self._lock:
            if not self._spares:
                return None
            spare, size = self._spares.popleft()
            self._spare_bytes -= size
            return spare, size

    def _drop_spares(self, most: int) -> int:
        """Delete the oldest, until there are no more than so many, of no more than MAX_SPARE_BYTES; how many went."""
        num_dropped = 0
        while len(self._spares) > most or self._spare_bytes > MAX_SPARE_BYTES:
            if (found := self._pop_spare()) is None:
                break
            self.remove(found[0])
            num_dropped += 1
        return num_dropped

    def _has_name(self, known: os.stat_result, name: str) -> bool:
        now = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        return (now.st_ino, now.st_dev) == (known.st_ino, known.st_dev)


def checked(name: str) -> str:
    """The name, if it is one of a file of ours. Raises FrameGoneError: no other can be there."""
    if not _NAME.fullmatch(name):
        raise FrameGoneError("not the name of a shared file")
    return name


@contextlib.contextmanager
def reaching_folder() -> Iterator[None]:
    """Turns errors of the file system into UnavailableError."""
    try:
        yield
    except OSError as error:
        raise UnavailableError("the queue's shared folder cannot be reached", retry_after_s=1.0) from error


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns errors that are of this file alone into FrameGoneError; any other passes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise FrameGoneError(name) from error
        if error.errno in _BROKEN:
            raise FrameBrokenError(f"{name}: {error.strerror}") from error
        raise


def _write(file: int, parts: Sequence[bytes]) -> None:
    left = [memoryview(part) for part in parts if part]
    start = 0
    while left:
        written = os.pwritev(file, left, start)
        start += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


def _read(file: int, start: int, size: int) -> bytes:
    whole = os.pread(file, size, start)
    if len(whole) == size:  # as files in memory answer
        return whole
    parts = [whole]
    while (missing := size - sum(map(len, parts))) > 0:
        parts.append(os.pread(file, missing, start + size - missing))
        if not parts[-1]:
            raise FrameGoneError("cut short")
    return b"".join(parts)
