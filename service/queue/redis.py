"""The queue on Redis Streams: any number of front ends and workers, on any number of hosts, around one Redis.

Every transition is one call of `redis.lua` and therefore atomic; payloads and results travel in the same MULTI,
beside the script, so that they are never copied through Lua. Keys, all with the prefix `{recofuse}`:

    jobs:high|normal|low    streams, one group `workers`; an entry carries id, deadline, header, and lives until the end
    payload:ID              hash of vis and ir; TTL past the deadline; gone at the end
    job:ID                  hash: where the entry is, bytes, times, and at the end what became of it; no TTL, but swept
    result:ID               the result's bytes; TTL
    pending-result:TOKEN    a result on its way: renamed to result:ID, or dropped as a duplicate, in the same MULTI
    deadlines, finished     sorted sets of ids: when to give up, when to forget
    idem:HASH               idempotency key: first job's id and the request's fingerprint; TTL
    bytes                   what counts for max_bytes
    dead                    stream of dead letters, oldest first; dead-index: id to entry; dead-payload:ID
    workers, workers-until  what workers said about themselves, and until when that holds
    workers-gone            set of ids that are still to be forgotten as consumers
    wake                    stream that wakes blocked takers when a job is handed back
    inbox:TOKEN, worker:ID  pub/sub channels: ids of jobs that ended, to those who wait and those who work

What a newcomer would get wrong: *a job is in its stream exactly as long as it is unfinished*, so nothing is ever
trimmed, and the streams' lengths are the number of unfinished jobs. A lease is the group's pending entry: its idle time
is the silence of its worker (`renew` resets it with XCLAIM JUSTID), its delivery count the attempts. A message that is
lost with a connection costs nothing: after every (re)connection all waiters look again.

The hash tag puts all keys into one slot. With Redis Cluster that means: one shard does all the work, and the URL has to
name that shard's primary. Redis should run with AOF and without eviction; opening logs a warning where it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis import exceptions
from redis.asyncio import Redis, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.queue.contract import (
    Admission,
    Clock,
    DeadLetter,
    JobQueue,
    Lease,
    MemoryQueue,
    QueueStats,
    Renewal,
    check_size,
)
from service.terms.errors import (
    FAULTS,
    INTERNAL_MESSAGE,
    ConflictError,
    ErrorCode,
    InternalError,
    JobNotFoundError,
    MalformedRequestError,
    NoRoomError,
    OverloadedError,
    UnavailableError,
)
from service.terms.jobs import FusionJob, FusionResult, JobStatus, JobView, Priority, WorkerInfo, new_job_id
from service.terms.settings import QueueSettings, SettingsError

logger = logging.getLogger(__name__)

PREFIX = "{recofuse}"
GROUP = "workers"
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
MIN_VERSION = (6, 2)

CALL_TIMEOUT_S = 5.0  # for one answer
CONNECT_TIMEOUT_S = 2.0
READ_BYTES = 1 << 20  # in one go: images are larger than the usual 64 KiB
MAX_CALLS = 64  # at once, and thereby connections of one process, besides those that wait for jobs or messages
BLOCK_S = 1.0  # longest wait in one XREADGROUP, and so the delay with which a lost lease is noticed
LOOK_AGAIN_S = 15.0  # safety net under the pushed messages
FORGET_AFTER_S = 0.1  # results that were handed out are forgotten together, this much later
MAX_EXPECTED = 10_000  # submitted jobs whose caller has not come to wait yet
QUIET_S = 5.0  # silence on the message connection after which it is probed
MARGIN_S = 3600.0  # images outlive their job's deadline by this much
NO_DEADLINE_S = 30 * 86400.0  # images of a job without a deadline stay for this long
PENDING_RESULT_S = 60.0
BACK_OFF_S = (0.05, 2.0)  # first and longest pause of the message connection between two tries; halved at random

SCRIPT = resources.files("service.queue").joinpath("redis.lua").read_text(encoding="utf-8")
SCRIPT_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()

# Redis is away, starting, failing over, or was emptied: come back later.
_AWAY = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.ExecAbortError,
    exceptions.OutOfMemoryError,
    OSError,
)
_AWAY_WORDS = ("NOGROUP", "UNBLOCKED", "LOADING", "MASTERDOWN", "NOREPLICAS", "MISCONF", "BUSY")


def build_queue(settings: QueueSettings) -> JobQueue:
    """The queue that the URL asks for. Raises SettingsError for a URL that cannot be."""
    return MemoryQueue(settings) if settings.url == "memory://" else RedisQueue(settings)


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A parsed URL: where Redis is, or who knows it.

    options: arguments of redis-py's connection, without host and port if there are sentinels. sentinels: host and port
    of each. service: the name that they know the primary by. sentinel_options: arguments of the connections to them.
    """

    options: dict[str, Any]
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str = ""
    sentinel_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """From a URL of one of these forms; TLS details follow as a query, such as `?ssl_ca_certs=/etc/ca.pem`.

            redis://[USER:PASSWORD@]HOST[:PORT][/DB]            rediss:// the same over TLS
            unix://[USER:PASSWORD@]/PATH/OF/SOCKET[?db=DB]
            redis+sentinel://[USER:PASSWORD@]HOST[:PORT],HOST[:PORT]/SERVICE[/DB]
                [?sentinel_username=...&sentinel_password=...]  rediss+sentinel:// the same over TLS

        Raises SettingsError, without the password.
        """
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise SettingsError(f"queue.url: {parts.scheme or 'no scheme'} is not one of memory, {', '.join(SCHEMES)}")
        try:
            if not parts.scheme.endswith("+sentinel"):
                options = _options(url)
                if parts.scheme != "unix" and not options.get("host"):
                    raise ValueError("the host is missing")
                return cls(options)
            login, _, hosts = parts.netloc.rpartition("@")
            sentinels = tuple(_host_and_port(host) for host in hosts.split(",") if host)
            service, _, db = parts.path.strip("/").partition("/")
            if not sentinels or not service:
                raise ValueError("the sentinels' hosts or the service's name are missing")
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            own = {name: query.pop(f"sentinel_{name}", None) for name in ("username", "password")}
            scheme = parts.scheme.removesuffix("+sentinel")
            options = _options(f"{scheme}://{login}{'@' if login else ''}host/{db}?{urlencode(query)}")
        except (ValueError, TypeError) as error:
            raise SettingsError(f"queue.url: {error}") from error
        del options["host"]
        tls = {name: value for name, value in options.items() if name.startswith("ssl")}
        known = {name: value for name, value in own.items() if value is not None}
        return cls(options, sentinels, unquote(service), {**tls, **known})

    def connect(self) -> Redis:
        """A client; nothing is sent yet."""
        # Nothing is repeated behind our back: callers back off by themselves, with the whole transition in view.
        common: dict[str, Any] = {
            "socket_timeout": CALL_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_read_size": READ_BYTES,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        if self.sentinels:
            known = {**common, **self.sentinel_options}
            sentinel = Sentinel(self.sentinels, sentinel_kwargs=known)  # type: ignore[no-untyped-call]  # theirs
            master: Redis = sentinel.master_for(self.service, **{**common, **self.options})
            return master
        options = dict(self.options)
        if "path" in options:
            options["unix_socket_path"] = options.pop("path")
        return Redis(**{**common, **options})


def _options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(parse_url(url))
    kind = options.pop("connection_class", None)
    if kind is not None and "SSL" in kind.__name__:
        options["ssl"] = True
    return options


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text} is not a host and port")
    return parts.hostname, parts.port or 26379


@dataclass(frozen=True, slots=True)
class _Expected:
    """A job of this process whose caller is about to wait: what its end will wake, and when that is at the latest."""

    waiter: asyncio.Future[None]
    deadline_s: float | None


@dataclass(slots=True)
class _Holding:
    """A job in the hands of a worker of this process. seen_s: monotonic time of its take or latest renewal."""

    worker_id: str
    token: str
    deadline_s: float | None
    seen_s: float
    is_gone: bool = False


class RedisQueue:
    """The contract of `service.queue.contract` on Redis. One object may serve as front end, worker, or both.

    One `take` at a time for a worker id, and a worker id belongs to one process at a time: a process that starts under
    the id of a dead one receives at once what that one held.
    """

    def __init__(self, settings: QueueSettings, *, prefix: str = PREFIX, clock: Clock = time.time) -> None:
        self._settings = settings
        self._prefix = prefix
        self._clock = clock
        # redis-py types an answer as all that any protocol and version might give; what is true here, the tests show.
        self._client: Any = RedisAddress.parse(settings.url).connect()
        self._calls = asyncio.Semaphore(MAX_CALLS)
        lease_ms = _ms(settings.lease_s)
        self._common = (lease_ms, settings.max_attempts, settings.max_dead_letters)
        self._block_s = min(BLOCK_S, settings.lease_s / 4)
        self._streams = {self._key("jobs", priority): priority for priority in Priority}
        self._inbox = self._key("inbox", secrets.token_urlsafe(9))
        self._channels = {self._inbox}
        self._pubsub: PubSub | None = None
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._expected: OrderedDict[str, _Expected] = OrderedDict()
        self._holdings: dict[str, _Holding] = {}
        # By worker id: 0 before its first take, 1 if an answer to one may have been lost, None if there is no doubt.
        self._doubts: dict[str, int | None] = {}
        self._to_forget: list[str] = []
        self._listening: asyncio.Task[None] | None = None
        self._forgetting: asyncio.Task[None] | None = None
        self._is_open = False

    async def open(self) -> None:
        """See JobQueue. Succeeds while Redis is away: then calls fail until it is there.

        Raises SettingsError if Redis is there but too old, or refuses the credentials.
        """
        try:
            await self._check_server()
        except UnavailableError as error:
            logger.warning("queue cannot be reached yet", extra={"error": str(error.__cause__)})
        self._is_open = True
        self._listening = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """See JobQueue."""
        self._is_open = False
        while self._listening is not None and not self._listening.done():
            self._listening.cancel()  # again, if redis-py mistook it for a lost connection
            await asyncio.wait({self._listening}, timeout=0.2)
        if self._forgetting is not None:
            await self._forgetting
        sentinel = getattr(self._client.connection_pool, "sentinel_manager", None)
        for client in (self._client, *(sentinel.sentinels if sentinel is not None else ())):
            await client.aclose()

    # front end

    async def submit(self, job: FusionJob, *, idempotency_key: str | None = None) -> Admission:
        """See JobQueue."""
        limits, now = self._settings, self._clock()
        check_size(job, limits)
        idem, fingerprint, ttl_s = "", "", limits.result_ttl_s
        if idempotency_key is not None:
            idem = hashlib.blake2b(idempotency_key.encode(), digest_size=16).hexdigest()
            fingerprint = await asyncio.to_thread(job.fingerprint)
            ttl_s = limits.idempotency_ttl_s
        payload_ttl_ms = _ms(NO_DEADLINE_S if job.deadline_s is None else max(job.deadline_s - now, 0) + MARGIN_S)
        payload = self._key("payload", job.id)
        is_awaited = not job.keep_result  # its caller waits on this very object
        if is_awaited:
            self._expect(job)
        is_accepted = False
        try:
            outcome, detail = await self._transact(
                [("HSET", payload, "vis", job.vis, "ir", job.ir), ("PEXPIRE", payload, payload_ttl_ms)],
                "submit",
                job.id,
                job.priority.value,
                job.header_bytes(),
                repr(job.created_s),
                "" if job.deadline_s is None else _ms(job.deadline_s),
                job.size_bytes,
                _ms(ttl_s),
                payload_ttl_ms,
                int(job.keep_result),
                idem,
                fingerprint,
                limits.max_jobs,
                limits.max_bytes,
                self._inbox if is_awaited else "",
            )
            is_accepted = outcome == b"accepted"
        except UnavailableError as error:
            if not isinstance(error.__cause__, exceptions.OutOfMemoryError):
                raise
            raise OverloadedError(
                "the queue's memory is full; try again later", retry_after_s=limits.retry_after_s
            ) from error
        finally:
            if is_awaited and not is_accepted:
                self._stop_expecting(job.id)
        if outcome == b"full":
            kind = NoRoomError if detail.endswith(b" bytes") else OverloadedError
            raise kind(f"the queue is full ({detail.decode()}); try again later", retry_after_s=limits.retry_after_s)
        if outcome == b"conflict":
            raise ConflictError("this idempotency key was used for another request; use a fresh key for each request")
        return Admission(detail.decode(), is_new=is_accepted)

    async def wait_result(self, job_id: str, *, timeout_s: float) -> FusionResult | None:
        """See JobQueue."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while True:
            expected = self._expected.pop(job_id, None)
            # There before the look (or before the submit), so that no message falls between the two.
            waiter = loop.create_future() if expected is None else expected.waiter
            self._waiters.setdefault(job_id, set()).add(waiter)
            try:
                remaining_s = end - loop.time()
                if expected is not None and remaining_s > 0:
                    deadline_s = expected.deadline_s  # `submit` has asked for the message: nothing to look for yet
                else:
                    state, raw = await self._look(job_id, self._inbox if remaining_s > 0 else "")
                    if state[0] == b"ended":
                        return self._result_of(job_id, state, raw)
                    if state[0] == b"unknown":
                        raise _no_such_job()
                    if remaining_s <= 0:
                        return None
                    deadline_s = int(state[1]) / 1000 if state[1] else None
                wait_s = min(remaining_s, LOOK_AGAIN_S)
                if deadline_s is not None:  # nobody else may be there to notice that it has passed
                    wait_s = min(wait_s, max(deadline_s - self._clock(), 0) + 0.01)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await waiter
            finally:
                self._drop_waiter(job_id, waiter)

    async def cancel(self, job_id: str) -> JobView:
        """See JobQueue."""
        return _view_of(job_id, await self._call("cancel", job_id, "the job was cancelled by its caller"))

    async def view(self, job_id: str) -> JobView:
        """See JobQueue."""
        return _view_of(job_id, await self._call("view", job_id))

    async def stats(self) -> QueueStats:
        """See JobQueue."""
        high, normal, low, num_leased, size_bytes, age_ms, num_dead = await self._call("stats")
        return QueueStats(
            depth=dict(zip(Priority, (high, normal, low), strict=True)),
            num_leased=num_leased,
            size_bytes=size_bytes,
            oldest_age_s=age_ms / 1000,
            num_dead_letters=num_dead,
        )

    async def workers(self) -> list[WorkerInfo]:
        """See JobQueue."""
        infos = [WorkerInfo.model_validate_json(raw) for raw in await self._call("workers")]
        return sorted(infos, key=lambda info: info.id)

    # worker

    async def announce(self, worker: WorkerInfo, *, ttl_s: float) -> None:
        """See JobQueue."""
        await self._call("announce", worker.id, worker.model_dump_json(), _ms(ttl_s))

    async def take(self, worker_id: str, *, max_jobs: int, wait_s: float) -> list[Lease]:
        """See JobQueue."""
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        await self._listen_to(self._key("worker", worker_id))
        if (doubt := self._doubts.get(worker_id, 0)) is not None:
            self._doubts[worker_id] = 1
            tokens = [held.token for held in self._holdings.values() if held.worker_id == worker_id]
            rows = _rows(await self._call("recover", worker_id, doubt, *tokens))
            if leases := await self._leases(worker_id, rows, max_jobs):
                return leases
        while True:
            self._doubts[worker_id] = 1  # until the answer is here
            rows = _rows(await self._call("take", worker_id, max_jobs, _ms(self._settings.starvation_s)))
            remaining_s = end - loop.time()
            is_last = remaining_s <= 0 or not self._is_open
            if not rows and not is_last:
                rows = await self._block(worker_id, min(remaining_s, self._block_s))
            leases = await self._leases(worker_id, rows, max_jobs)
            self._doubts[worker_id] = None
            if leases or is_last:
                return leases

    async def renew(self, leases: Sequence[Lease]) -> Renewal:
        """See JobQueue."""
        states: dict[str, bytes] = {}
        for worker_id in {lease.worker_id for lease in leases}:
            own = [lease for lease in leases if lease.worker_id == worker_id]
            arguments = [part for lease in own for part in (*lease.token.split("/"), lease.attempt, lease.job.id)]
            answer = await self._call("renew", worker_id, *arguments)
            states.update(zip((lease.job.id for lease in own), answer, strict=True))
        now = time.monotonic()
        for job_id, state in states.items():
            if (held := self._holdings.get(job_id)) is None:
                continue
            if state == b"kept":
                held.seen_s = now
            elif state == b"ended":
                held.is_gone = True
            else:
                del self._holdings[job_id]
        self._drop_stale(now)
        return Renewal(
            lost=frozenset(job_id for job_id, state in states.items() if state == b"lost"),
            cancelled=frozenset(job_id for job_id, state in states.items() if state == b"ended"),
        )

    def cancelled(self, job_ids: Iterable[str]) -> frozenset[str]:
        """See JobQueue."""
        now = self._clock()
        known = ((job_id, self._holdings.get(job_id)) for job_id in job_ids)
        return frozenset(
            job_id
            for job_id, held in known
            if held is not None and (held.is_gone or (held.deadline_s is not None and held.deadline_s <= now))
        )

    async def finish(self, lease: Lease, result: FusionResult) -> bool:
        """See JobQueue."""
        is_visible = await self._finish(lease.job.id, lease.worker_id, result, buries=result.error_code in FAULTS)
        self._holdings.pop(lease.job.id, None)
        return is_visible

    async def release(self, leases: Sequence[Lease]) -> None:
        """See JobQueue."""
        for worker_id in {lease.worker_id for lease in leases}:
            own = [lease for lease in leases if lease.worker_id == worker_id]
            arguments = [part for lease in own for part in (*lease.token.split("/"), lease.attempt)]
            await self._call("release", worker_id, *arguments)
            for lease in own:
                self._holdings.pop(lease.job.id, None)

    # operator

    async def dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        """See JobQueue."""
        with _reaching():
            entries = await self._client.xrange(self._key("dead"), count=limit)
        return [letter for _, fields in entries if (letter := await self._letter_of(fields)) is not None]

    async def retry_dead_letter(self, job_id: str) -> Admission:
        """See JobQueue."""
        entries = await self._call("dead_letter", job_id)
        letter = await self._letter_of(_pairs(entries[0][1])) if entries else None
        if letter is None:
            raise JobNotFoundError("no such dead letter")
        again = replace(letter.job, id=new_job_id(), created_s=self._clock(), deadline_s=None, keep_result=True)
        admission = await self.submit(again)
        with contextlib.suppress(JobNotFoundError):  # admission may have pushed it out to make room
            await self.drop_dead_letter(job_id)
        return admission

    async def drop_dead_letter(self, job_id: str) -> None:
        """See JobQueue."""
        if not await self._call("drop_dead_letter", job_id):
            raise JobNotFoundError("no such dead letter")

    # reaching Redis

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    async def _call(self, command: str, *arguments: Any) -> Any:
        """One transition of redis.lua. Raises UnavailableError."""
        head = (1, self._prefix, command, *self._common)
        async with self._calls:
            with _reaching():
                try:
                    return await self._client.execute_command("EVALSHA", SCRIPT_SHA, *head, *arguments)
                except exceptions.NoScriptError:  # a fresh server; it keeps what it has run once
                    return await self._client.execute_command("EVAL", SCRIPT, *head, *arguments)

    async def _transact(self, writes: Sequence[tuple[Any, ...]], command: str, *arguments: Any) -> Any:
        """The writes and then a transition, all in one MULTI. Raises UnavailableError."""
        head = (1, self._prefix, command, *self._common)
        async with self._calls:
            with _reaching():
                for verb, script in (("EVALSHA", SCRIPT_SHA), ("EVAL", SCRIPT)):
                    async with self._client.pipeline(transaction=True) as transaction:
                        for write in writes:
                            transaction.execute_command(*write)
                        transaction.execute_command(verb, script, *head, *arguments)
                        answers = await transaction.execute(raise_on_error=False)
                    if isinstance(answers[-1], exceptions.NoScriptError):
                        continue
                    for answer in answers:
                        if isinstance(answer, Exception):
                            raise answer
                    break
                return answers[-1]

    async def _check_server(self) -> None:
        try:
            with _reaching():
                info = await self._client.info()
        except UnavailableError as error:
            if isinstance(error.__cause__, exceptions.AuthenticationError | exceptions.AuthorizationError):
                raise SettingsError("queue.url: Redis refuses the credentials") from error
            raise
        except (exceptions.NoPermissionError, exceptions.AuthenticationWrongNumberOfArgsError) as error:
            raise SettingsError("queue.url: Redis refuses the credentials") from error
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
            raise SettingsError(f"queue.url: Redis {version} is too old; 6.2 or newer is needed, 7 recommended")
        if not info.get("aof_enabled", 0):
            logger.warning("Redis keeps no append-only file: accepted jobs do not survive its restart")
        if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
            logger.warning("Redis may evict accepted jobs", extra={"maxmemory_policy": policy})

    # taking

    async def _block(self, worker_id: str, wait_s: float) -> list[_Row]:
        """Wait for a fresh entry; while workers wait, one entry wakes one of them."""
        wake = self._key("wake")
        streams: dict[Any, Any] = dict.fromkeys((*self._streams, wake), ">")
        with _reaching():
            found = await self._client.xreadgroup(GROUP, worker_id, streams, count=1, block=max(1, _ms(wait_s)))
            rows = []
            for stream, entries in found or ():
                if stream.decode() != wake:
                    priority = self._streams[stream.decode()]
                    rows += [_row(priority.value, entry.decode(), 1, fields) for entry, fields in entries]
                    continue
                async with self._client.pipeline(transaction=True) as transaction:  # it has done its work
                    ids = [entry for entry, _ in entries]
                    transaction.xack(wake, GROUP, *ids)
                    transaction.xdel(wake, *ids)
                    await transaction.execute()
        return rows

    async def _leases(self, worker_id: str, rows: Sequence[_Row], max_jobs: int) -> list[Lease]:
        """The jobs of these entries with their images; what is too much goes back."""
        if not rows:
            return []
        now = time.monotonic()
        # Known before their images are here, so that a cancellation that comes meanwhile is not missed.
        self._holdings |= {row.job_id: _Holding(worker_id, row.token, None, now) for row in rows}
        try:
            leases = await self._with_images(worker_id, rows)
            if len(leases) > max_jobs:  # several classes had an entry at the same moment
                await self.release(leases[max_jobs:])
        except BaseException:
            for row in rows:
                self._holdings.pop(row.job_id, None)  # else `recover` would pass them over
            raise
        return leases[:max_jobs]

    async def _with_images(self, worker_id: str, rows: Sequence[_Row]) -> list[Lease]:
        async with self._calls:
            with _reaching():
                async with self._client.pipeline(transaction=False) as pipeline:
                    for row in rows:
                        pipeline.hmget(self._key("payload", row.job_id), "vis", "ir")
                    payloads = await pipeline.execute()
        leases = []
        for row, (vis, ir) in zip(rows, payloads, strict=True):
            try:
                job = FusionJob.from_parts(row.header, vis or b"", ir or b"")
            except MalformedRequestError as error:
                # Usually it was cancelled a moment ago, and then this changes nothing.
                logger.warning("job cannot be read", extra={"job_id": row.job_id, "error": str(error)})
                broken = FusionResult.failed(row.job_id, InternalError(INTERNAL_MESSAGE))
                await self._finish(row.job_id, worker_id, broken, buries=False)
                self._holdings.pop(row.job_id, None)
                continue
            leases.append(Lease(job=job, worker_id=worker_id, attempt=row.attempt, token=row.token))
            if (held := self._holdings.get(job.id)) is not None:
                held.deadline_s = job.deadline_s
        return leases

    async def _finish(self, job_id: str, worker_id: str, result: FusionResult, *, buries: bool) -> bool:
        token = secrets.token_urlsafe(9)
        is_visible = await self._transact(
            [("SET", self._key("pending-result", token), result.to_bytes(), "PX", _ms(PENDING_RESULT_S))],
            "finish",
            job_id,
            worker_id,
            result.error_code.value if result.error_code else "",
            result.error_message,
            result.size_bytes,
            int(buries),
            token,
        )
        return bool(is_visible)

    def _drop_stale(self, now: float) -> None:
        """Forget holdings that were neither finished nor renewed: dropped by their worker after a cancellation."""
        oldest_s = now - 2 * self._settings.lease_s
        for job_id in [job_id for job_id, held in self._holdings.items() if held.seen_s < oldest_s]:
            del self._holdings[job_id]

    # results and messages

    async def _look(self, job_id: str, inbox: str) -> tuple[list[bytes], bytes | None]:
        """Where a job stands, and its result if it has one; asks for a message to the inbox when it ends."""
        head = (1, self._prefix, "look", *self._common, job_id, inbox)
        async with self._calls:
            with _reaching():
                for verb, script in (("EVALSHA", SCRIPT_SHA), ("EVAL", SCRIPT)):
                    async with self._client.pipeline(transaction=False) as pipeline:
                        pipeline.execute_command(verb, script, *head)
                        pipeline.get(self._key("result", job_id))
                        state, raw = await pipeline.execute(raise_on_error=False)
                    if isinstance(state, exceptions.NoScriptError):
                        continue
                    for answer in (state, raw):
                        if isinstance(answer, Exception):
                            raise answer
                    break
                return state, raw

    def _result_of(self, job_id: str, state: list[bytes], raw: bytes | None) -> FusionResult:
        _, code, message, keep = state
        if raw is not None:
            result = FusionResult.from_bytes(raw)
        elif code:
            result = FusionResult(job_id=job_id, error_code=ErrorCode(code.decode()), error_message=message.decode())
        else:
            raise _no_such_job()
        if keep == b"0":
            # Only now that it is here: an answer that is lost on its way can be fetched again.
            self._to_forget.append(job_id)
            if self._forgetting is None or self._forgetting.done():
                self._forgetting = asyncio.create_task(self._forget())
        return result

    def _expect(self, job: FusionJob) -> None:
        """Listen for the job's end from now on, for a `wait_result` that comes soon."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(job.id, set()).add(waiter)
        self._expected[job.id] = _Expected(waiter, job.deadline_s)
        if len(self._expected) > MAX_EXPECTED:
            self._stop_expecting(next(iter(self._expected)))

    def _stop_expecting(self, job_id: str) -> None:
        if (expected := self._expected.pop(job_id, None)) is not None:
            self._drop_waiter(job_id, expected.waiter)

    def _drop_waiter(self, job_id: str, waiter: asyncio.Future[None]) -> None:
        waiters = self._waiters.get(job_id, set())
        waiters.discard(waiter)
        if not waiters:
            self._waiters.pop(job_id, None)

    async def _forget(self) -> None:
        await asyncio.sleep(FORGET_AFTER_S)
        while self._to_forget:
            batch, self._to_forget = self._to_forget, []
            try:
                await self._call("forget", *batch)
            except UnavailableError:
                return  # they are forgotten when their time has come

    async def _listen_to(self, channel: str) -> None:
        if channel not in self._channels:
            self._channels.add(channel)
            if self._pubsub is not None:
                with _reaching():
                    await self._pubsub.subscribe(channel)

    async def _listen(self) -> None:
        """Receive the ids of ended jobs, over as many connections as it takes."""
        pause_s, longest_s = BACK_OFF_S
        while self._is_open:
            started_s = time.monotonic()
            try:
                with _reaching():
                    async with self._client.pubsub() as pubsub:
                        await pubsub.subscribe(*self._channels)
                        self._pubsub = pubsub
                        await self._hear(pubsub)
            except UnavailableError as error:
                logger.warning("messages are interrupted", extra={"error": str(error.__cause__)})
            except Exception:  # whatever it is, who waits must not wait in vain
                logger.exception("messages are interrupted")
            finally:
                self._pubsub = None
            has_lasted = time.monotonic() - started_s > longest_s
            pause_s = BACK_OFF_S[0] if has_lasted else min(2 * pause_s, longest_s)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    async def _hear(self, pubsub: PubSub) -> None:
        is_probed = False
        while True:
            message = await pubsub.get_message(timeout=QUIET_S)
            if message is None:
                if is_probed:
                    raise exceptions.ConnectionError("Redis does not answer")
                is_probed = True
                await pubsub.ping()
                continue
            is_probed = False
            if message["type"] == "subscribe":  # what was said before went by unheard
                for waiters in self._waiters.values():
                    _wake(waiters)
            elif message["type"] == "message":
                job_id = message["data"].decode()
                _wake(self._waiters.get(job_id, ()))
                if (held := self._holdings.get(job_id)) is not None and message["channel"].decode() != self._inbox:
                    held.is_gone = True

    async def _letter_of(self, fields: dict[bytes, bytes]) -> DeadLetter | None:
        with _reaching():
            vis, ir = await self._client.hmget(self._key("dead-payload", fields[b"id"].decode()), "vis", "ir")
        if vis is None or ir is None:
            return None  # dropped a moment ago
        return DeadLetter(
            job=FusionJob.from_parts(fields[b"header"], vis, ir),
            error_code=ErrorCode(fields[b"code"].decode()),
            error_message=fields[b"message"].decode(),
            attempts=int(fields[b"attempts"]),
            failed_s=int(fields[b"failed"]) / 1000,
        )


@dataclass(frozen=True, slots=True)
class _Row:
    """One delivery, before its images are there. token: class and entry id, which stay the same until the end."""

    token: str
    attempt: int
    job_id: str
    header: bytes


def _row(priority: str, entry: str, attempt: int, fields: dict[bytes, bytes]) -> _Row:
    return _Row(f"{priority}/{entry}", attempt, fields[b"id"].decode(), fields[b"header"])


def _rows(answer: Iterable[Any]) -> list[_Row]:
    return [
        _row(priority.decode(), entry.decode(), attempt, _pairs(fields)) for priority, entry, attempt, fields in answer
    ]


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _view_of(job_id: str, answer: Sequence[bytes]) -> JobView:
    if not answer:
        raise _no_such_job()
    state, priority, code, message, attempts, created, deadline, finished = (part.decode() for part in answer)
    error = ErrorCode(code) if code else None
    ended = FusionResult(job_id=job_id, error_code=error).status
    return JobView(
        id=job_id,
        status=ended if state == "ended" else JobStatus(state),
        created_s=float(created),
        priority=Priority(priority),
        attempts=int(attempts),
        deadline_s=int(deadline) / 1000 if deadline else None,
        finished_s=int(finished) / 1000 if finished else None,
        error_code=error,
        error_message=message,
    )


def _no_such_job() -> JobNotFoundError:
    return JobNotFoundError("no such job; results are kept for a limited time after a job has ended")


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _wake(waiters: Iterable[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Turns what says that Redis is away for now into UnavailableError; anything else passes."""
    try:
        yield
    except _AWAY as error:
        raise UnavailableError("the queue cannot be reached", retry_after_s=1.0) from error
    except exceptions.ResponseError as error:
        if str(error).startswith(_AWAY_WORDS):
            raise UnavailableError("the queue cannot be reached", retry_after_s=1.0) from error
        raise
