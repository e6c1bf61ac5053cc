"""Every knob of the service, with its unit and default.

`RECOFUSE_BATCH__MAX_WAIT_S=0.02` is `settings.batch.max_wait_s`, and `RECOFUSE_QUEUE__URL_FILE=/run/secrets/url` reads
a value from a file. Nothing here reads the environment: `service/command/environment.py` hands it over as a mapping
(`Settings.from_environment(os.environ)`), and a misspelt name or value stops start-up with a message that lists what
there is. Every object receives its own group.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from service.terms.records import problems_of

PREFIX = "RECOFUSE_"
FILE_SUFFIX = "_FILE"

Seconds = Annotated[float, Field(gt=0, le=86400 * 30)]
Count = Annotated[int, Field(ge=1)]
NumBytes = Annotated[int, Field(ge=1)]
FrameSize = Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*$")]


# What Kubernetes and Docker put into a container for each service called recofuse-...: RECOFUSE_API_SERVICE_HOST, and
# RECOFUSE_API_PORT=tcp://10.0.0.1:80, which is no misspelt setting only if its value says so.
_SERVICE_LINK = re.compile(
    r"RECOFUSE(_[A-Z0-9]+)*_("
    r"SERVICE_HOST=.+|SERVICE_PORT(_[A-Z0-9_]+)?=\d+|PORT=(tcp|udp|sctp)://.+"
    r"|PORT_\d+_(TCP|UDP|SCTP)(=.+|_(PROTO=\w+|PORT=\d+|ADDR=.+)))"
)


class SettingsError(ValueError):
    """A setting is unknown or its value is not acceptable. The message is meant for whoever starts the service."""


def _split_sizes(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class Group(BaseModel):
    """Base of all groups: immutable, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FaceSettings(Group):
    """What both faces have: TLS."""

    tls_cert: str = Field(default="", description="PEM file of the certificate chain; empty: no TLS")
    tls_key: str = Field(default="", description="PEM file of the certificate's private key")
    tls_client_ca: str = Field(
        default="", description="PEM file of the authorities whose client certificates are required; empty: none are"
    )

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key belong together")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca asks for tls_cert and tls_key as well")
        return self


class HttpSettings(FaceSettings):
    """The HTTP front end."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    keep_alive_s: Seconds = Field(default=30.0, description="an idle connection is closed after this many seconds")
    head_timeout_s: Seconds = Field(default=10.0, description="a request's head must arrive within this many seconds")
    max_head_bytes: NumBytes = Field(default=64 << 10, description="bytes of a request's head: address and headers")
    body_timeout_s: Seconds = Field(
        default=30.0,
        description="a request body of which no byte comes for this many seconds is given up; over gRPC, a message "
        "that is not there whole by then",
    )
    min_body_bytes_per_s: NumBytes = Field(
        default=4096,
        description="bytes a second, on average, that a request body must come with once body_timeout_s have passed",
    )
    answer_timeout_s: Seconds = Field(
        default=60.0,
        description="a client that takes less than 64 KiB of a waiting answer in this many seconds is cut off",
    )
    max_connections: Count = Field(default=1024, description="open connections; beyond it the answer is 503")
    require_worker: bool = Field(default=True, description="/health/ready asks for at least one warm worker")
    trusted_proxies: str = Field(
        default="127.0.0.1",
        description="addresses or networks, comma separated, whose X-Forwarded-For is believed; * for all",
    )


class GrpcSettings(FaceSettings):
    """The gRPC front end."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(
        default=8001, ge=-1, le=65535, description="port to listen on; 0 picks a free one, -1 turns gRPC off"
    )
    max_calls: Count = Field(
        default=1024,
        description="calls and streams at once, an eighth of it for watching health; beyond it they are refused",
    )
    max_in_flight: Count = Field(
        default=8, description="frames of one stream being fused or sent back, at most; also its default for mode all"
    )
    keep_alive_s: Seconds = Field(default=30.0, description="a silent connection is probed after this many seconds")
    keep_alive_timeout_s: Seconds = Field(
        default=10.0, description="a peer that does not answer a probe for this long is gone"
    )
    min_ping_interval_s: Seconds = Field(
        default=10.0, description="clients that probe more often than this are disconnected"
    )
    stream_idle_s: float = Field(
        default=60.0,
        ge=0,
        le=86400,
        description="a stream on which no frame comes, or no answer is taken, for this many seconds is ended; 0: never",
    )
    max_connection_age_s: float = Field(
        default=0.0,
        ge=0,
        description="clients are asked to reconnect after this many seconds, to spread over replicas; 0: never",
    )


class AuthSettings(Group):
    """API keys. Without them everybody who can connect may call, which is meant for loopback addresses."""

    keys: str = Field(
        default="",
        pattern=r"^(|redis|file:.+)$",
        description="where API keys are: file:PATH, or redis for the queue's Redis; empty: no key is asked for",
    )
    rate_per_s: float = Field(
        default=0.0, ge=0, description="pictures a second of a key that has no rate of its own; 0: unlimited"
    )
    burst: Count = Field(default=16, description="pictures at once that rate_per_s allows")
    cache_s: float = Field(
        default=5.0, ge=0, le=3600, description="a verified key is trusted this long; how late a revocation is noticed"
    )
    audit: bool = Field(default=True, description="log who was admitted or refused, one line a request")


class LimitSettings(Group):
    """What an input may be. Checked before anything is decoded."""

    max_image_bytes: NumBytes = Field(default=32 << 20, description="bytes of one image file")
    max_pixels: Count = Field(default=16_000_000, description="pixels (width times height) of one image")
    max_side: Count = Field(default=8192, description="pixels along the longer side")
    min_side: Count = Field(default=32, description="pixels along the shorter side; the network needs 32")
    aspect_tolerance: float = Field(
        default=0.02, ge=0, le=0.5, description="relative difference of the two aspect ratios that is still resampled"
    )
    max_pairs: int = Field(default=16, ge=1, le=256, description="pairs in one request of the Open Inference Protocol")
    max_json_bytes: NumBytes = Field(
        default=8 << 20, description="bytes of such a request's JSON, and of its answer's pixels as JSON"
    )
    max_held_bytes: int = Field(
        default=0,
        ge=0,
        description="bytes of all requests that a front end holds, by any protocol, until they are answered; beyond it "
        "they are refused (429); 0: two fifths of the memory that the process may use",
    )


class CodecSettings(Group):
    """How images are read and answers are encoded."""

    kind: Literal["files", "ready"] = Field(
        default="files",
        description="files: decode and encode; ready: answer the uploaded file unread, to measure the service without "
        "its codec (stand-in engines only)",
    )
    png_compression: int = Field(default=1, ge=0, le=9, description="level of PNG answers; 0 stores, 9 is smallest")
    jpeg_quality: int = Field(default=92, ge=1, le=100, description="JPEG quality, percent")
    webp_quality: int = Field(default=90, ge=1, le=101, description="WebP quality, percent; 101 is lossless")


class RigSettings(Group):
    """Rigs that requests may name."""

    directory: str = Field(
        default="",
        description="folder of rig files, NAME.json as `recofuse calibrate` writes them, for front ends; a request's "
        "rig=NAME means one of them; empty: there are none",
    )


class JobSettings(Group):
    """Admission and waiting, at the front end."""

    default_timeout_s: Seconds = Field(default=60.0, description="deadline of a synchronous request that names none")
    max_timeout_s: Seconds = Field(default=600.0, description="longest deadline that a synchronous request may ask for")
    async_timeout_s: Seconds = Field(
        default=3600.0, description="deadline of an asynchronous job that names none; also its most"
    )
    drain_timeout_s: Seconds = Field(default=60.0, description="longest wait for accepted work when stopping")


class QueueSettings(Group):
    """The queue between front ends and workers."""

    url: str = Field(
        default="memory://",
        description="memory:// within one process; or redis://, rediss:// (TLS), unix://, redis+sentinel://, "
        "rediss+sentinel:// (docs/redis.md)",
    )
    shared_folder: str = Field(
        default="",
        description="folder that all front ends and workers of this queue share, on one host, best in memory: images "
        "and results lie there, and Redis carries their names alone (docs/redis.md); empty: all goes through Redis",
    )
    max_jobs: Count = Field(default=512, description="jobs waiting or running; beyond it requests are refused (429)")
    max_bytes: NumBytes = Field(
        default=1 << 30,
        description="bytes of waiting jobs and of kept results, each with 2 KiB for its record; beyond it: 429",
    )
    retry_after_s: Seconds = Field(default=1.0, description="what a refused request is told to wait, in seconds")
    lease_s: Seconds = Field(
        default=15.0, description="a job whose worker is silent for this long goes to another worker"
    )
    max_attempts: Count = Field(default=3, description="deliveries after which a job is reported failed and put aside")
    starvation_s: Seconds = Field(default=5.0, description="a job of a lower class that waited this long is taken next")
    result_ttl_s: Seconds = Field(default=600.0, description="how long a kept result and its status stay readable")
    idempotency_ttl_s: Seconds = Field(
        default=600.0, description="how long an idempotency key is remembered; at least result_ttl_s"
    )
    max_dead_letters: Count = Field(default=1000, description="dead letters kept; the oldest go first")

    @model_validator(mode="after")
    def _key_outlives_result(self) -> Self:
        if self.idempotency_ttl_s < self.result_ttl_s:
            raise ValueError("idempotency_ttl_s must be at least result_ttl_s")
        return self


class BatchSettings(Group):
    """Which jobs share a forward pass."""

    max_batch: Count = Field(default=8, le=256, description="jobs in one forward pass at most")
    max_wait_s: float = Field(
        default=0.005,
        ge=0,
        le=10,
        description="longest wait for companions that are known to be coming, in seconds; 0: never wait",
    )
    sizes: Annotated[tuple[Count, ...], BeforeValidator(_split_sizes)] = Field(
        default=(), description="batch sizes to pad to, such as 1,2,4,8; empty: the engine's own, or no padding"
    )
    starvation_s: Seconds = Field(default=5.0, description="after each such wait a job counts as one class more urgent")


class EngineSettings(Group):
    """The model and the device it runs on."""

    kind: Literal["core", "null", "fixed"] = Field(
        default="core", description="core: the model; null: answers the vis image; fixed: a stand-in of constant cost"
    )
    model: str = Field(default="compact", description="a shipped model's name or the path of a checkpoint file")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N; auto takes the first GPU, else the CPU")
    runtime: Literal["auto", "torch", "onnx"] = Field(
        default="auto",
        description="what runs the networks: torch, or ONNX Runtime on a CPU; auto: ONNX Runtime on a CPU where it is "
        "installed and the weights have graphs beside them, as the shipped ones do, and torch elsewhere",
    )
    num_threads: int = Field(default=0, ge=0, description="CPU threads of the model; 0: as many as the process may use")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of the networks; auto: half precision where the device computes in it natively, on a GPU float16 "
        "or bfloat16, whichever proves closer to float32 at the start",
    )
    kernels: Literal["auto", "eager", "triton"] = Field(
        default="auto",
        description="what blocks, fusion module and a run's two ends run on; auto: on a GPU the kernels written for "
        "them in Triton where a trial at the start, of seconds, shows that they agree with torch's and are faster; "
        "eager: torch's; triton: ours, untried",
    )
    graphs: Literal["auto", "on", "off"] = Field(
        default="auto", description="record whole runs and replay them (CUDA graphs); auto: on a GPU"
    )
    max_graphs: Count = Field(default=64, description="recorded runs held; beyond it the one used least goes")
    max_graph_bytes: int = Field(
        default=0, ge=0, description="bytes that recorded runs may hold; 0: half of what the GPU has free at the start"
    )
    batch_sizes: Annotated[tuple[Count, ...], BeforeValidator(_split_sizes)] = Field(
        default=(1, 2, 4, 8),
        description="batch sizes to record, up to batch.max_batch, which is added; batches are filled up to the next",
    )
    warm_up_sizes: Annotated[tuple[FrameSize, ...], BeforeValidator(_split_sizes)] = Field(
        default=("640x480",),
        description="width x height, such as 640x480,1280x1024, run before the service is ready, or recorded: for the "
        "fused picture then, for all pictures when it is idle",
    )
    fixed_batch_s: float = Field(default=0.020, ge=0, description="kind=fixed: seconds per forward pass")
    fixed_item_s: float = Field(default=0.002, ge=0, description="kind=fixed: seconds per job in the pass")


class WorkerSettings(Group):
    """One worker process."""

    id: str = Field(
        default="", pattern=r"^[0-9A-Za-z_.:-]{0,64}$", description="name in logs and the queue; empty: host and pid"
    )
    codec_threads: int = Field(
        default=0, ge=0, le=256, description="threads that decode and encode; 0: as many as the process may use"
    )
    per_host: Count = Field(
        default=1,
        description="worker processes that divide what each of them may use of this host's processors; leave 1 where "
        "each has a limit of its own, as containers can",
    )
    max_held: int = Field(default=0, ge=0, description="jobs held at once, in any stage; 0: three batches")
    take_wait_s: Seconds = Field(default=1.0, description="longest wait of one take; bounds how late a stop is noticed")
    heartbeat_s: Seconds = Field(default=2.0, description="time between two renewals of what the worker holds")
    announce_ttl_s: Seconds = Field(
        default=10.0, description="a worker that was silent for this long is not counted as there"
    )
    drain_timeout_s: Seconds = Field(
        default=30.0, description="time to finish what is held when stopping; the rest is handed back"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of the worker's own /metrics and /health")
    metrics_port: int = Field(
        default=0, ge=-1, le=65535, description="port of them; 0 picks a free one, -1 turns them off"
    )


class LogSettings(Group):
    """Structured logs on standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="least severe level that is written"
    )
    format: Literal["json", "text"] = Field(
        default="json", description="json: one object a line; text: for reading at a terminal"
    )


class TraceSettings(Group):
    """OpenTelemetry traces; they need the extra `otel`."""

    endpoint: str = Field(
        default="",
        pattern=r"^(https?://\S+)?$",
        description="OTLP/HTTP collector, such as http://localhost:4318; empty: no traces. OTEL_EXPORTER_OTLP_ENDPOINT "
        "is taken if this is not set",
    )
    sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="share of requests to trace whose caller has not decided it"
    )
    service_name: str = Field(default="recofuse", min_length=1, description="service.name of the spans")
    delay_s: Seconds = Field(default=1.0, description="longest time that a span waits to be sent with others")


class Settings(Group):
    """All groups."""

    http: HttpSettings = HttpSettings()
    grpc: GrpcSettings = GrpcSettings()
    auth: AuthSettings = AuthSettings()
    limits: LimitSettings = LimitSettings()
    codec: CodecSettings = CodecSettings()
    rigs: RigSettings = RigSettings()
    jobs: JobSettings = JobSettings()
    queue: QueueSettings = QueueSettings()
    batch: BatchSettings = BatchSettings()
    engine: EngineSettings = EngineSettings()
    worker: WorkerSettings = WorkerSettings()
    log: LogSettings = LogSettings()
    trace: TraceSettings = TraceSettings()

    @model_validator(mode="after")
    def _model_needs_pictures(self) -> Self:
        if self.codec.kind == "ready" and self.engine.kind == "core":
            raise ValueError("codec.kind=ready works with engine.kind=null or fixed only; a model needs real pictures")
        return self

    @model_validator(mode="after")
    def _keys_are_reachable(self) -> Self:
        if self.auth.keys == "redis" and self.queue.url == "memory://":
            raise ValueError("auth.keys=redis keeps keys in the queue's Redis, but queue.url names none; use file:PATH")
        return self

    @model_validator(mode="after")
    def _heartbeat_beats_lease(self) -> Self:
        if self.worker.heartbeat_s * 2 > self.queue.lease_s:
            raise ValueError(
                "worker.heartbeat_s must be at most half of queue.lease_s, or live workers lose their jobs"
            )
        return self

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The sizes that an engine with recorded runs makes ready and batches are filled up to: one list for both."""
        largest = self.batch.max_batch
        return (*sorted({size for size in self.batch.sizes or self.engine.batch_sizes if size < largest}), largest)

    @classmethod
    def from_environment(
        cls,
        environ: Mapping[str, str],
        *,
        ignore: frozenset[str] = frozenset(),
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Self:
        """Settings from `RECOFUSE_GROUP__NAME` entries; other names are not looked at.

        options: nested values that win over the environment's, before all are judged together.

        `RECOFUSE_GROUP__NAME_FILE` names a file that holds the value, for secrets. ignore: full names with the prefix
        that belong to someone else, such as a model path for the command line; so do the links to services that
        Kubernetes sets in a namespace. Raises SettingsError that names every unknown variable with the nearest known
        one, and every bad value.
        """
        known = {name: path for path in cls.names() for name in (variable_of(*path),)}
        values: dict[str, dict[str, Any]] = {}
        unknown = []
        for name, value in environ.items():
            if not name.upper().startswith(PREFIX) or name in ignore:
                continue
            if (path := known.get(name.upper())) is not None:
                values.setdefault(path[0], {})[path[1]] = value
            elif (path := known.get(name.upper().removesuffix(FILE_SUFFIX))) is not None:
                if variable_of(*path) in map(str.upper, environ):
                    raise SettingsError(f"{variable_of(*path)} and {name} are both set; keep one")
                try:
                    values.setdefault(path[0], {})[path[1]] = Path(value).read_text("utf-8").strip()
                except (OSError, UnicodeDecodeError) as error:
                    raise SettingsError(f"{name}: {value} cannot be read: {error}") from error
            elif not _SERVICE_LINK.fullmatch(f"{name}={value}"):
                near = difflib.get_close_matches(name.upper(), known, n=1)
                unknown.append(f"{name}{f' (did you mean {near[0]}?)' if near else ''}")
        if unknown:
            raise SettingsError(f"unknown settings in the environment: {', '.join(sorted(unknown))}")
        for group, chosen in (options or {}).items():
            values.setdefault(group, {}).update(chosen)
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: Mapping[str, Mapping[str, Any]]) -> Self:
        """Settings from nested values, such as `{"http": {"port": 0}}`. Raises SettingsError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError(f"settings are not valid: {problems_of(error)}") from error

    def replace(self, **groups: Mapping[str, Any]) -> Self:
        """A copy with some values changed: `settings.replace(http={"port": 0})`. Raises SettingsError."""
        values = self.model_dump()
        for group, changes in groups.items():
            values[group] = {**values[group], **changes}
        return self.from_values(values)

    @classmethod
    def names(cls) -> list[tuple[str, str]]:
        """Every setting as (group, name), in the order of this file."""
        return [
            (group, name)
            for group, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, Group)
            for name in field.annotation.model_fields
        ]

    @classmethod
    def as_environment(cls) -> str:
        """Every setting with its default as a commented line of an environment file, its meaning above it."""
        lines: list[str] = []
        defaults = cls()
        for group, name in cls.names():
            owner = getattr(defaults, group)
            lines += [f"# {type(owner).model_fields[name].description}", f"# {variable_of(group, name)}="]
            value = getattr(owner, name)
            lines[-1] += ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return "\n".join(lines)

    @classmethod
    def table(cls) -> str:
        """A Markdown table of all settings: environment name, default, meaning."""
        rows = ["| Environment variable | Default | Meaning |", "|---|---|---|"]
        defaults = cls()
        for group, name in cls.names():
            owner = getattr(defaults, group)
            value = getattr(owner, name)
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            meaning = type(owner).model_fields[name].description
            rows.append(f"| `{variable_of(group, name)}` | `{shown}` | {meaning} |")
        return "\n".join(rows)


def variable_of(group: str, name: str) -> str:
    """The environment name of a setting."""
    return f"{PREFIX}{group}__{name}".upper()
