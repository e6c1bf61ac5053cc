"""Kill: 500 asynchronous jobs through two front ends, three workers and a durable Redis, all of which are killed.

A random worker gets kill -9 every second and is started again; once, so do a front end and Redis (append-only file,
synchronised before anything is acknowledged). Clients do what clients should: they repeat a submission that was not
answered, under the same Idempotency-Key, at the other front end.

Passes if every accepted job ends with exactly one result or one reported failure. Checked for each job: it is known
until the end; its final state and its picture are the same at the first look and at the last one, at either front end;
the picture is its own (each job's images carry its number); no two keys share a job. Checked in Redis: there are as
many jobs as were accepted, so that no repetition became a second one, and nothing waits or is held at the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import redis
from numpy.typing import NDArray

from benchmarks.drills import Report, Say
from benchmarks.load import Answer, ask, fuse_request, get_request, picture_pair, scrape
from benchmarks.processes import Process, Stack, can_split, split, wait_ready

NUM_JOBS = 500
SUBMIT_S = 16.0  # the submissions are spread over this time, so that every kill meets some
KILL_EVERY_S = 1.0
LIMIT_S = 180.0
SIZES = ((640, 480), (640, 480), (640, 480), (1280, 720), (320, 240))  # of job i: SIZES[i % 5]

SETTINGS: dict[str, dict[str, Any]] = {
    # Three workers with batches of 8 could fuse 27 pairs a second, so that most of them are always at work.
    "engine": {"kind": "fixed", "fixed_batch_s": 0.8, "fixed_item_s": 0.01},
    "grpc": {"port": -1},
    "log": {"level": "ERROR"},
    # A worker lives three seconds here, so a job may need more attempts than on a good day.
    "queue": {"lease_s": 2, "max_attempts": 10},
    "worker": {"heartbeat_s": 0.5, "announce_ttl_s": 3},
}


def run(*, is_quick: bool, say: Say) -> Report:
    """A stack of its own; skipped, and thereby failed, where there is no Redis."""
    if why_not := can_split():
        return Report(False, f"cannot run: {why_not}")
    num_jobs = 80 if is_quick else NUM_JOBS
    with split(SETTINGS, num_apis=2, num_workers=3, is_durable=True) as stack:
        drill = _Drill(stack, num_jobs, SUBMIT_S * num_jobs / NUM_JOBS, say)
        asyncio.run(drill.run())
        drill.look_into_redis()
    return drill.report()


@dataclass(slots=True)
class _Seen:
    """A job as a client saw it. state: status and time of its end, once it has ended; picture: digest of its answer."""

    id: str
    accepted_s: float
    state: tuple[str, str] | None = None
    picture: str | None = None


@dataclass(slots=True)
class _Drill:
    """One run of the drill."""

    stack: Stack
    num_jobs: int
    submit_s: float
    say: Say
    jobs: dict[int, _Seen] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    kills: dict[str, int] = field(default_factory=lambda: {"worker": 0, "api": 0, "redis": 0})
    num_repeats: int = 0
    num_refused: int = 0
    num_lost: int = 0
    num_doubled: int = 0
    num_strange: int = 0
    slowest_s: float = 0.0
    seconds: float = 0.0
    bases: list[tuple[NDArray[np.uint8], bytes]] = field(default_factory=list)

    async def run(self) -> None:
        """Submit, kill and watch at once; then look at everything again."""
        for size in SIZES:
            vis, ir = picture_pair(*size)
            self.bases.append((_pixels(vis), ir))
        started = time.perf_counter()
        breaking = asyncio.create_task(self._break())
        try:
            async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._submit_all())
                tasks.create_task(self._watch())
        except TimeoutError:
            self.problems.append(f"not all had ended after {LIMIT_S:g} s")
        finally:
            breaking.cancel()
            await asyncio.gather(breaking, return_exceptions=True)
        self.seconds = time.perf_counter() - started
        await self._look_again()

    # what clients do

    async def _submit_all(self) -> None:
        room, started = asyncio.Semaphore(16), time.perf_counter()

        async def submit(number: int) -> None:
            async with room:
                await self._submit(number)

        async with asyncio.TaskGroup() as tasks:
            for number in range(self.num_jobs):
                ahead_s = started + self.submit_s * number / self.num_jobs - time.perf_counter()
                await asyncio.sleep(max(0.0, ahead_s))
                tasks.create_task(submit(number))

    async def _submit(self, number: int) -> None:
        vis, ir = await asyncio.to_thread(self._pair, number)
        headers = f"Prefer: respond-async\r\nIdempotency-Key: drill-{number}\r\n"
        request = fuse_request(vis, ir, headers=headers)
        for turn in range(number, number + 1000):
            try:
                answer = await ask(self._front_end(turn), request)
            except (ConnectionError, TimeoutError):
                self.num_repeats += 1
            else:
                if answer.status == 202:
                    self.jobs[number] = _Seen(json.loads(answer.body)["id"], time.perf_counter())
                    return
                self.num_refused += 1
                if answer.status not in (429, 503):
                    self.problems.append(f"a submission was answered {answer.status}")
                    return
            await asyncio.sleep(0.1)

    async def _watch(self) -> None:
        """Ask for each job until it has ended, and fetch its picture at once."""
        while True:
            await asyncio.sleep(0.5)
            is_complete = len(self.jobs) == self.num_jobs
            pending = [number for number, job in self.jobs.items() if job.state is None]
            await self._for_each(pending, self._ask_for)
            num_ended = sum(job.state is not None for job in self.jobs.values())
            self.say(f"{len(self.jobs)} accepted, {num_ended} ended, {sum(self.kills.values())} kills")
            if is_complete and num_ended == self.num_jobs:
                return

    async def _ask_for(self, number: int) -> None:
        job = self.jobs[number]
        try:
            state, picture = await self._look(job, number)
        except (ConnectionError, TimeoutError):
            return  # the next round asks again, the other front end perhaps
        if state is not None:
            job.state, job.picture = state, picture
            self.slowest_s = max(self.slowest_s, time.perf_counter() - job.accepted_s)
            if picture is not None and picture != self._expected(number):
                self.num_strange += 1

    async def _look(self, job: _Seen, turn: int) -> tuple[tuple[str, str] | None, str | None]:
        """The job's final state and its picture's digest; (None, None) if it has not ended."""
        address = self._front_end(turn + len(self.jobs))
        view = await ask(address, get_request(f"/v1/jobs/{job.id}"))
        if view.status == 404:
            return ("lost", ""), None
        if view.status != 200:
            raise ConnectionError(f"answered {view.status}")
        document = json.loads(view.body)
        if document["status"] in ("queued", "running"):
            return None, None
        state = (document["status"], document["finished_at"])
        if document["status"] != "succeeded":
            return state, None
        answer = await ask(address, get_request(f"/v1/jobs/{job.id}/result"))
        if answer.status == 503:
            raise ConnectionError("answered 503")
        return state, await asyncio.to_thread(_digest_of, answer)

    async def _look_again(self) -> None:
        """Everything must be as it was at the first look."""

        async def look(number: int) -> None:
            job = self.jobs[number]
            for _ in range(20):
                try:
                    state, picture = await self._look(job, number + 1)
                    break
                except (ConnectionError, TimeoutError):
                    await asyncio.sleep(0.5)
            else:
                state, picture = None, None
            if state is None or state[0] == "lost" or job.state is None:
                self.num_lost += 1
            elif (state, picture) != (job.state, job.picture):
                self.num_doubled += 1

        await self._for_each(list(self.jobs), look)
        self.num_doubled += len(self.jobs) - len({job.id for job in self.jobs.values()})
        figures = await scrape(self.stack.address)
        left = sum(value for name, value in figures.items() if name.startswith("recofuse_queue_depth"))
        left += figures["recofuse_queue_leased"]
        if left:
            self.problems.append(f"{left:.0f} jobs are still in the queue")

    async def _for_each(self, numbers: list[int], look: Any) -> None:
        room = asyncio.Semaphore(8)

        async def one(number: int) -> None:
            async with room:
                await look(number)

        await asyncio.gather(*map(one, numbers))

    def _front_end(self, turn: int) -> tuple[str, int]:
        return self.stack.addresses[turn % len(self.stack.addresses)]

    # pictures that tell whose they are

    def _stamped(self, number: int) -> NDArray[np.uint8]:
        vis = self.bases[number % len(SIZES)][0].copy()
        bits = np.unpackbits(np.array([number], ">u4").view(np.uint8))
        vis[0, : len(bits)] = bits[:, None] * 255
        return vis

    def _pair(self, number: int) -> tuple[bytes, bytes]:
        is_done, vis = cv2.imencode(".png", self._stamped(number), [cv2.IMWRITE_PNG_COMPRESSION, 1])
        if not is_done:
            raise RuntimeError("OpenCV cannot write PNG")
        return vis.tobytes(), self.bases[number % len(SIZES)][1]

    def _expected(self, number: int) -> str:
        return _digest(self._stamped(number))

    # what befalls the service

    async def _break(self) -> None:
        """Kill for as long as the drill runs."""
        chance = random.Random(0)
        while True:
            await asyncio.sleep(KILL_EVERY_S)
            await self._kill("worker", chance.choice(self.stack.named("worker")))
            if not self.kills["api"] and len(self.jobs) >= self.num_jobs / 3:
                await self._kill("api", self.stack.named("api")[0], away_s=0.5)
            if not self.kills["redis"] and len(self.jobs) >= self.num_jobs * 2 / 3:
                await self._kill("redis", self.stack.named("redis")[0], away_s=0.5)

    async def _kill(self, kind: str, process: Process, away_s: float = 0.0) -> None:
        if not process.is_alive:
            self.problems.append(f"{process.name} ended by itself")
        await asyncio.to_thread(process.kill)
        self.kills[kind] += 1
        await asyncio.sleep(away_s)
        process.start()

    # afterwards

    def look_into_redis(self) -> None:
        """No accepted submission may have become two jobs."""
        url = self.stack.redis_url or ""
        for process, (_, port) in zip(self.stack.named("api"), self.stack.addresses, strict=True):
            wait_ready(process, port)
        with redis.Redis.from_url(url) as store:
            num_known = sum(1 for _ in store.scan_iter("{recofuse}:job:*", count=1000))
        if num_known != len(self.jobs):
            self.problems.append(f"Redis knows {num_known} jobs where {len(self.jobs)} were accepted")
            self.num_doubled += max(0, num_known - len(self.jobs))

    def report(self) -> Report:
        """The figures."""
        ends = [job.state[0] if job.state else "open" for job in self.jobs.values()]
        num_succeeded, num_failed = ends.count("succeeded"), ends.count("failed")
        if self.num_lost or len(self.jobs) < self.num_jobs:
            self.problems.append(f"{self.num_lost} lost, {self.num_jobs - len(self.jobs)} never accepted")
        if self.num_doubled:
            self.problems.append("a job has more than one result")
        if self.num_strange:
            self.problems.append("an answer belongs to another job")
        if num_succeeded + num_failed != len(self.jobs):
            self.problems.append(f"ends: {sorted(set(ends))}")
        if not all(self.kills.values()):
            self.problems.append(f"not everything was killed: {self.kills}")
        figures = {
            "num_accepted": len(self.jobs),
            "num_succeeded": num_succeeded,
            "num_reported_failed": num_failed,
            "num_lost": self.num_lost,
            "num_duplicated": self.num_doubled,
            "num_of_another_job": self.num_strange,
            "kills": self.kills,
            "num_submissions_repeated": self.num_repeats,
            "num_submissions_refused": self.num_refused,
            "slowest_job_s": round(self.slowest_s, 2),
            "seconds": round(self.seconds, 1),
            "problems": self.problems,
        }
        kills = self.kills
        line = (
            f"{len(self.jobs)} jobs accepted: {num_succeeded} succeeded, {num_failed} reported failed, {self.num_lost} "
            f"lost, {self.num_doubled} duplicated, {self.num_strange} swapped; kill -9 of workers {kills['worker']} "
            f"times, of a front end {kills['api']} and of Redis {kills['redis']}; {self.num_repeats} submissions "
            f"repeated by clients; all ended within {self.seconds:.0f} s, the slowest job took {self.slowest_s:.1f} s"
        )
        if self.problems:
            line += f" [{'; '.join(self.problems[:5])}]"
        return Report(not self.problems, line, figures)


def _pixels(png: bytes) -> NDArray[np.uint8]:
    decoded = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise ValueError("this is no picture")
    return decoded.astype(np.uint8, copy=False)


def _digest(pixels: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()


def _digest_of(answer: Answer) -> str:
    return _digest(_pixels(answer.body)) if answer.status == 200 else f"status {answer.status}"
