"""Frames beside Redis: whole, by safe names, once, bounded, in one folder that all agree on, and gone in the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.queue.contract import Admission
from service.queue.redis import beside
from service.queue.redis.address import PREFIX
from service.queue.redis.beside import RECORD_MAGIC
from service.queue.redis.folder import (
    MARKER,
    FolderFullError,
    FrameBrokenError,
    FrameGoneError,
    SharedFolder,
    job_file,
    reading,
)
from service.queue.redis.queue import RedisQueue
from service.terms.errors import (
    ErrorCode,
    InternalError,
    JobNotFoundError,
    NoRoomError,
    OverloadedError,
    UnavailableError,
)
from service.terms.jobs import FusionResult, JobStatus, Part
from service.terms.settings import QueueSettings, SettingsError
from tests.service.queue.contract import success
from tests.service.queue.redis.queues import folder as short_folder
from tests.service.queue.redis.queues import fresh, keys_of, opened, take_one, until
from tests.service.redis_server import RedisServer


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[SharedFolder]:
    folder = SharedFolder(str(tmp_path))
    folder.open()
    yield folder
    folder.close()


@pytest.fixture
async def queue(server: RedisServer, tmp_path: Path) -> AsyncIterator[RedisQueue]:
    async with opened(server, shared_folder=str(tmp_path), lease_s=60.0) as queue:
        yield queue


def all_in(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def files_in(path: Path) -> set[str]:
    """Frames alone."""
    return {name for name in all_in(path) if name.startswith(("job-", "answer-"))}


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses larger ones, as a full folder would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# the folder alone


def test_what_was_written_is_read_and_nobody_else_may(shared: SharedFolder, tmp_path: Path) -> None:
    shared.write("job-a", (b"vis", b"", b"infrared"))
    assert shared.read("job-a", (3, 0, 8)) == [b"vis", b"", b"infrared"]
    assert [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()] == [0o600, 0o600]
    with pytest.raises(FrameGoneError):
        shared.read("job-a", (3, 9))  # more than there is
    with pytest.raises(FrameGoneError):
        shared.read("job-b", (1,))


def test_a_group_shares_where_its_folder_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o2770)
    shared = SharedFolder(str(tmp_path))
    shared.open()
    shared.write("job-a", (b"vis",))
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o660}
    shared.close()


@pytest.mark.parametrize(
    "name", ["", "job-", "../job-a", "job-a/../../b", "job-/etc/passwd", "job-a\n", "job-a\0", "/etc/passwd", MARKER,
             "job-" + "a" * 200, "job-ä", "."],
)  # fmt: skip
def test_no_other_name_is_touched(shared: SharedFolder, name: str) -> None:
    with pytest.raises(FrameGoneError, match="not the name"):
        shared.read(name, (0,))
    for call in (shared.remove, shared.recycle, lambda name: shared.write(name, (b"",))):
        with pytest.raises(FrameGoneError, match="not the name"):
            call(name)


def test_neither_links_nor_pipes_are_followed(shared: SharedFolder, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (tmp_path / "job-link").symlink_to(secret)
    os.mkfifo(tmp_path / "job-pipe")  # opening one waits for its writer
    (tmp_path / "job-folder").mkdir()
    for name in ("job-link", "job-pipe", "job-folder"):
        with pytest.raises(FrameGoneError):
            shared.read(name, (0,))


def test_pages_are_used_again_without_what_was_on_them(shared: SharedFolder, tmp_path: Path) -> None:
    shared.write("job-a", (b"a" * 100_000,))
    inode = (tmp_path / "job-a").stat().st_ino
    shared.recycle("job-a")
    shared.write("answer-b", (b"b" * 90_000,))
    assert (tmp_path / "answer-b").stat().st_ino == inode
    assert shared.read("answer-b", (90_000,)) == [b"b" * 90_000]
    shared.recycle("answer-b")
    shared.write("job-c", (b"c",))  # a small frame does not keep what a large one needed
    assert ((tmp_path / "job-c").stat().st_ino, (tmp_path / "job-c").stat().st_size) == (inode, 1)
    shared.recycle("job-c")
    shared.close()
    assert all_in(tmp_path) == {MARKER}


def test_a_file_that_is_used_again_while_it_is_read_counts_as_gone(shared: SharedFolder) -> None:
    """Else its reader would have another caller's picture."""

    class Slow(tuple[int, ...]):
        looks = 0

        def __iter__(self) -> Iterator[int]:  # the size is checked first, then each part is read
            Slow.looks += 1
            if Slow.looks == 2:
                shared.recycle("job-mine")
                shared.write("job-other", (b"theirs",))
            return super().__iter__()

    shared.write("job-mine", (b"mine..",))
    with pytest.raises(FrameGoneError):
        shared.read("job-mine", Slow((6,)))
    assert Slow.looks == 2
    assert shared.read("job-other", (6,)) == [b"theirs"]


def test_images_that_were_put_again_while_they_are_read_are_read_again(shared: SharedFolder) -> None:
    """A front end that had no answer from Redis submits a job anew, which a worker has taken meanwhile."""

    class Slow(tuple[int, ...]):
        looks = 0

        def __iter__(self) -> Iterator[int]:
            Slow.looks += 1
            if Slow.looks == 2:
                shared.write("job-mine", (b"mine..",))
            return super().__iter__()

    shared.write("job-mine", (b"mine..",))
    assert shared.read("job-mine", Slow((6,))) == [b"mine.."]
    assert Slow.looks == 4


def test_a_full_folder_gives_up_its_spares_first(shared: SharedFolder, tmp_path: Path) -> None:
    shared.write("job-a", (bytes(10),))
    shared.recycle("job-a")
    with files_of_at_most(1000), pytest.raises(FolderFullError):
        shared.write("job-b", (bytes(2000),))
    assert all_in(tmp_path) == {MARKER}  # and no half file


def test_a_full_folder_lets_another_process_start(shared: SharedFolder, tmp_path: Path) -> None:
    other = SharedFolder(str(tmp_path))
    with files_of_at_most(0):
        assert other.open() == (tmp_path / MARKER).read_text()
    other.close()


# the start


def test_a_folder_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    open_to_all, file = tmp_path / "open", tmp_path / "file"
    open_to_all.mkdir()
    open_to_all.chmod(0o701)
    file.touch()
    for path, reason in ((tmp_path / "none", "No such file"), (file, "Not a directory"), (open_to_all, "everybody")):
        with pytest.raises(SettingsError, match=rf"queue\.shared_folder: .*{reason}"):
            SharedFolder(str(path)).open()


@pytest.mark.redis
async def test_a_folder_that_is_not_the_others_stops_the_start(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "PATIENCE_S", 0.0)
    monkeypatch.setattr(beside, "RETRY_S", 0.01)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir(0o700)
    theirs.mkdir(0o700)
    async with opened(server, shared_folder=str(ours)), opened(server, shared_folder=str(ours)):
        for folder, reason in ((str(theirs), "is not the folder"), ("", "was given none")):
            stranger = RedisQueue(QueueSettings(url=server.url, shared_folder=folder))
            with pytest.raises(SettingsError, match=reason):
                await stranger.open()
            await stranger.close()
    monkeypatch.setattr(beside, "PATIENCE_S", 60.0)
    stranger = RedisQueue(QueueSettings(url=server.url, shared_folder=str(theirs)))
    starting = asyncio.create_task(stranger.open())
    await asyncio.sleep(0.1)
    assert not starting.done()  # the mark may be of processes that a restart of the host has ended
    server.command("DEL", f"{PREFIX}:folder")  # as its time passes
    await asyncio.wait_for(starting, 10)
    await stranger.close()


@pytest.mark.redis
async def test_a_folder_that_turns_out_not_to_be_the_others_is_not_used(tmp_path: Path) -> None:
    """Redis was away when the process began."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir(0o700)
    theirs.mkdir(0o700)
    with short_folder() as path:
        server = RedisServer(path)
        async with opened(server, shared_folder=str(theirs)) as late:
            await asyncio.to_thread(server.start)
            try:
                async with opened(server, shared_folder=str(ours)) as queue:
                    with pytest.raises(UnavailableError, match="not that of the others"):
                        await late.submit(fresh())
                    with pytest.raises(UnavailableError, match="not that of the others"):
                        await late.take("w1", max_jobs=1, wait_s=0)
                    assert (await queue.stats()).num_unfinished == 0
            finally:
                server.kill()


# the queue


@pytest.mark.redis
async def test_nothing_large_passes_through_redis_and_nothing_is_left(queue: RedisQueue, tmp_path: Path) -> None:
    jobs = [replace(fresh(keep=False, ttl_s=30), vis=bytes(40_000)) for _ in range(5)]
    for job in jobs:
        await queue.submit(job)
    assert files_in(tmp_path) == {job_file(job.id) for job in jobs}
    size = len(jobs[0].vis) + len(jobs[0].ir)
    assert await queue._client.hgetall(f"{PREFIX}:payload:{jobs[0].id}") == {b"beside": b"%d" % size}
    for lease in await queue.take("w1", max_jobs=8, wait_s=1):
        assert lease.job in jobs
        await queue.finish(lease, success(lease.job, bytes(30_000)))
    for job in jobs:
        assert await queue._client.strlen(f"{PREFIX}:result:{job.id}") < 2000
        assert await queue.wait_result(job.id, timeout_s=1) == success(job, bytes(30_000))

    async def is_empty() -> bool:
        return not files_in(tmp_path)

    await until(is_empty)
    assert {key.split(":")[0] for key in await keys_of(queue)} <= {"jobs", "wake", "bytes", "folder"}
    await queue.close()
    assert all_in(tmp_path) == {MARKER}


@pytest.mark.redis
async def test_a_full_folder_is_told_as_a_full_queue_and_ends_no_job(queue: RedisQueue, tmp_path: Path) -> None:
    with files_of_at_most(50_000):
        with pytest.raises(NoRoomError, match="folder is full"):
            await queue.submit(replace(fresh(), vis=bytes(60_000)))
        await queue.submit(job := fresh())
        await queue.finish(await take_one(queue), success(job, bytes(60_000)))  # goes through Redis
    assert await queue.wait_result(job.id, timeout_s=1) == success(job, bytes(60_000))
    assert (await queue.stats()).num_unfinished == 0


@pytest.mark.redis
async def test_what_nobody_names_is_swept_and_nothing_else(queue: RedisQueue, tmp_path: Path) -> None:
    broken, kept, waiting, cancelled = (fresh() for _ in range(4))
    for job in (broken, kept):
        await queue.submit(job)
        lease = await take_one(queue)
        error = FusionResult.failed(job.id, InternalError("our fault"))
        await queue.finish(lease, error if job is broken else success(job))
    for job in (waiting, cancelled):
        await queue.submit(job)
    await queue.cancel(cancelled.id)
    mine = files_in(tmp_path)
    assert {name.removeprefix("answer-")[: len(kept.id)] for name in mine if name.startswith("answer")} == {kept.id}
    assert mine >= {job_file(broken.id), job_file(waiting.id)}
    assert job_file(cancelled.id) not in mine
    (tmp_path / "job-lost").write_bytes(b"written, and then its front end died")
    (tmp_path / f"answer-{waiting.id}-0").write_bytes(b"written, and then its worker died")
    (tmp_path / "spare-lost").write_bytes(b"half written")
    (tmp_path / "notes.txt").write_bytes(b"none of ours")
    await queue._beside.sweep()
    assert (tmp_path / "job-lost").exists()  # too young to tell
    assert (await queue.stats()).folder_bytes > 0
    await queue._beside.sweep(after_s=0)
    assert all_in(tmp_path) == mine | {MARKER, "notes.txt"}
    (letter,) = await queue.dead_letters()
    assert letter.job == broken
    again = await queue.retry_dead_letter(broken.id)
    leases = await queue.take("w1", max_jobs=2, wait_s=1)
    assert {lease.job.vis for lease in leases} == {waiting.vis, broken.vis}
    assert await queue.wait_result(kept.id, timeout_s=0) == success(kept)
    assert files_in(tmp_path) == mine - {job_file(broken.id)} | {job_file(again.job_id)}


@pytest.mark.redis
async def test_an_answer_that_is_told_again_is_written_once(queue: RedisQueue, tmp_path: Path) -> None:
    """While Redis is away, a worker tries to end its jobs without end."""
    await queue.submit(job := fresh())
    lease, result = await take_one(queue), success(job)
    first = await queue._beside.put_answer(result)
    assert await queue._beside.put_answer(result) == first
    answers = [file for file in files_in(tmp_path) if file.startswith("answer")]
    assert first is not None
    assert answers == [first[0]]
    (tmp_path / first[0]).unlink()  # as if it had been swept, since nobody named it
    await queue.finish(lease, result)
    assert await queue.wait_result(job.id, timeout_s=1) == result


@pytest.mark.redis
async def test_of_two_answers_to_a_job_the_one_that_redis_names_stays(queue: RedisQueue, tmp_path: Path) -> None:
    await queue.submit(job := fresh())
    lease = await take_one(queue)
    assert await queue._beside.put_answer(success(job, bytes(50_000)))  # its worker was killed before it told Redis
    await queue.finish(lease, success(job))
    await queue._beside.sweep(after_s=0)
    assert len([file for file in files_in(tmp_path) if file.startswith("answer")]) == 1
    assert await queue.wait_result(job.id, timeout_s=1) == success(job)


@pytest.mark.redis
async def test_a_dead_letter_without_images_is_dropped(queue: RedisQueue, tmp_path: Path) -> None:
    await queue.submit(job := fresh())
    await queue.finish(await take_one(queue), FusionResult.failed(job.id, InternalError("our fault")))
    assert [letter.job for letter in await queue.dead_letters()] == [job]
    (tmp_path / job_file(job.id)).unlink()  # as after the host's restart
    assert await queue.dead_letters() == []
    assert (await queue.stats()).num_dead_letters == 0


@pytest.mark.redis
async def test_who_has_no_folder_takes_no_job_of_those_who_do(server: RedisServer, tmp_path: Path) -> None:
    async with opened(server) as bare, opened(server, lease_s=60.0) as front:
        front._beside = beside.Beside(
            str(tmp_path), front._client, front._key, min_bytes=1
        )  # as a process that starts later
        front._beside.open()
        server.command("SET", f"{PREFIX}:folder", front._beside._id)
        await front.submit(job := fresh())
        with pytest.raises(UnavailableError, match="not that of the others"):
            await bare.take("w1", max_jobs=1, wait_s=1)
        assert (await front.view(job.id)).status is not JobStatus.FAILED


@pytest.mark.redis
async def test_frames_outlive_their_processes_and_a_lost_one_is_reported(server: RedisServer, tmp_path: Path) -> None:
    kept, lost = fresh(), fresh()
    async with opened(server, shared_folder=str(tmp_path)) as queue:
        await queue.submit(kept)
        await queue.submit(lost)
    (tmp_path / job_file(lost.id)).unlink()  # as after the host's restart
    async with opened(server, shared_folder=str(tmp_path)) as queue:
        (lease,) = await queue.take("w1", max_jobs=2, wait_s=1)
        assert lease.job == kept
        assert (await queue.view(lost.id)).status is JobStatus.FAILED


def put_in_place_of(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a socket":  # which cannot be opened, like a file on a broken disk
        with socket.socket(socket.AF_UNIX) as standing:
            standing.bind(str(path))


@pytest.mark.redis
@pytest.mark.parametrize("kind", ["nothing", "a folder", "a socket"])
async def test_a_file_that_cannot_be_read_fails_its_own_job_alone(server: RedisServer, kind: str) -> None:
    with short_folder() as path:
        path.chmod(0o700)
        async with opened(server, shared_folder=str(path), lease_s=60.0) as queue:
            lost, unread, fine = (fresh() for _ in range(3))
            for job in (lost, unread, fine):
                await queue.submit(job)
            put_in_place_of(path / job_file(lost.id), kind)
            unread_lease, fine_lease = await queue.take("w1", max_jobs=3, wait_s=0)
            assert (unread_lease.job, fine_lease.job) == (unread, fine)
            told = await queue.wait_result(lost.id, timeout_s=5)
            assert told is not None
            assert (told.error_code, told.error_message) == (
                ErrorCode.INTERNAL,
                "the images of this job were lost; send them again",
            )
            await queue.finish(unread_lease, success(unread))
            await queue.finish(fine_lease, success(fine))
            (answer,) = (file for file in files_in(path) if file.startswith(f"answer-{unread.id}"))
            put_in_place_of(path / answer, kind)
            with pytest.raises(JobNotFoundError):
                await queue.wait_result(unread.id, timeout_s=5)
            assert await queue.wait_result(fine.id, timeout_s=5) == success(fine)


def test_a_disk_that_cannot_read_a_file_breaks_this_file_alone() -> None:
    own_memory = os.open("/proc/self/mem", os.O_RDONLY)  # of which there is nothing at address 0: EIO
    try:
        with pytest.raises(FrameBrokenError, match="job-a: Input/output error"), reading("job-a"):
            os.pread(own_memory, 1, 0)
    finally:
        os.close(own_memory)
    with pytest.raises(IsADirectoryError), reading("job-a"):
        os.open("/proc", os.O_WRONLY)


@pytest.mark.redis
async def test_a_dead_letter_that_cannot_be_read_stays(server: RedisServer) -> None:
    with short_folder() as path:
        path.chmod(0o700)
        async with opened(server, shared_folder=str(path), lease_s=60.0) as queue:
            await queue.submit(job := fresh())
            await queue.finish(await take_one(queue), FusionResult.failed(job.id, InternalError("our fault")))
            put_in_place_of(path / job_file(job.id), "a socket")
            assert await queue.dead_letters() == []
            assert (await queue.stats()).num_dead_letters == 1
            await queue.drop_dead_letter(job.id)
            assert (await queue.stats()).num_dead_letters == 0


@pytest.mark.redis
@pytest.mark.parametrize("name", [b"../secret", b"secret", b"answer-link", b"\xff"])
async def test_a_name_from_redis_leads_nowhere_else(queue: RedisQueue, tmp_path: Path, name: bytes) -> None:
    secret = tmp_path.parent / "secret"
    for path in (secret, tmp_path / "secret"):
        path.write_bytes(b"secret")
    (tmp_path / "answer-link").symlink_to(secret)
    await queue.submit(job := fresh())
    await queue.finish(await take_one(queue), success(job, b"secret"))
    key = f"{PREFIX}:result:{job.id}"
    record = await queue._client.get(key)
    (answer,) = (file for file in files_in(tmp_path) if file.startswith(f"answer-{job.id}"))
    start = record.index(answer.encode())
    forged = record[: start - 1] + bytes([len(name)]) + name + record[start + len(answer) :]
    assert record.startswith(RECORD_MAGIC)
    await queue._client.set(key, forged)
    with pytest.raises(JobNotFoundError):
        await queue.wait_result(job.id, timeout_s=0)
    await queue._client.set(key, record)
    result = await queue.wait_result(job.id, timeout_s=0)
    assert result is not None
    assert result.images == {Part.FUSED: b"secret"}


@pytest.mark.redis
async def test_each_of_many_at_once_has_its_own_answer(server: RedisServer, tmp_path: Path) -> None:
    async with opened(server, shared_folder=str(tmp_path), max_jobs=100, lease_s=60.0) as queue:
        server.command("SCRIPT", "FLUSH")
        asked = [replace(fresh(keep=False, ttl_s=60), vis=b"%d" % number) for number in range(102)]
        answers = await asyncio.gather(*map(queue.submit, asked), return_exceptions=True)
        jobs = [job for job, answer in zip(asked, answers, strict=True) if answer == Admission(job.id, is_new=True)]
        refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
        assert (len(jobs), len(refused)) == (100, 2)
        waiting = asyncio.gather(*(queue.wait_result(job.id, timeout_s=20) for job in jobs))
        leases = await queue.take("w1", max_jobs=100, wait_s=1)
        ends = await asyncio.gather(*(queue.finish(lease, success(lease.job, lease.job.vis)) for lease in leases))
        assert ends == [True] * 100
        assert await waiting == [success(job, job.vis) for job in jobs]


@pytest.mark.redis
async def test_a_submission_that_was_given_up_before_it_was_sent_never_is(server: RedisServer, tmp_path: Path) -> None:
    async with opened(server, shared_folder=str(tmp_path)) as queue:
        await queue.submit(fresh())
        transitions = queue._transitions
        server.stall()
        try:
            first = asyncio.create_task(queue.submit(fresh()))
            await asyncio.sleep(0.1)  # it is on its way
            second, third = asyncio.create_task(queue.submit(fresh())), asyncio.create_task(queue.submit(fresh()))
            await asyncio.sleep(0.1)
            assert len(transitions._gathered) == 2
            third.cancel()
            await asyncio.sleep(0)
        finally:
            server.resume()
        await asyncio.gather(first, second)
        assert third.cancelled()
        assert (await queue.stats()).num_unfinished == 3


@pytest.mark.redis
async def test_many_at_once_all_hear_that_redis_is_away(tmp_path: Path) -> None:
    with short_folder() as path:
        server = RedisServer(path)
        server.start()
        async with opened(server, shared_folder=str(tmp_path), max_jobs=100) as queue:
            await queue.stats()
            server.kill()
            jobs = [fresh() for _ in range(50)]
            answers = await asyncio.gather(*map(queue.submit, jobs), return_exceptions=True)
            assert {type(answer) for answer in answers} == {UnavailableError}
            assert len(files_in(tmp_path)) == 50  # Redis may have taken them
            await asyncio.to_thread(server.start)
            await queue.submit(jobs[0])
            await queue._beside.sweep()
            assert files_in(tmp_path) == {job_file(jobs[0].id)}
            server.kill()
