"""What the HTTP face says of jobs, models and its health: the JSON documents of its answers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel

from recofuse_rigs.rig import Rig
from service.faces.gateway import Gateway
from service.terms.errors import ErrorCode
from service.terms.jobs import JobStatus, JobView, Priority


class JobError(BaseModel):
    """Why a job failed."""

    code: ErrorCode
    message: str


class JobDocument(BaseModel):
    """Where a job stands. num_queued: while it waits in the queue, how many jobs of all callers do, it included."""

    id: str
    status: JobStatus
    priority: Priority
    attempts: int
    num_queued: int | None
    created_at: datetime
    deadline_at: datetime | None
    finished_at: datetime | None
    error: JobError | None
    result: str | None


class ModelDocument(BaseModel):
    """A model that is being served, with the options that it takes."""

    name: str
    version: str
    default_steps: int
    default_sampler: str
    default_exposure: str
    exposures: list[str]
    devices: list[str]
    num_workers: int


class ModelList(BaseModel):
    """All models that are being served."""

    models: list[ModelDocument]


class RigDocument(BaseModel):
    """A rig that requests may name. overlap: share of the visible frame that infrared covers. Pixels: visible ones."""

    name: str
    vis_size: tuple[int, int]
    ir_size: tuple[int, int]
    overlap: float
    is_sure: bool
    spread_px: float
    residual_px: float
    num_pairs: int
    method: str
    date: str
    matrix: tuple[float, ...]
    has_distortion: bool
    parallax_px: float | None

    @classmethod
    def of(cls, rig: Rig) -> RigDocument:
        """What is told of a rig."""
        return cls(
            **{name: getattr(rig, name) for name in cls.model_fields if name not in ("overlap", "has_distortion")},
            overlap=round(rig.overlap, 3),
            has_distortion=rig.distortion is not None,
        )


class RigList(BaseModel):
    """All rigs that requests may name."""

    rigs: list[RigDocument]


class Health(BaseModel):
    """A health check's answer."""

    status: Literal["live", "ready", "unavailable"]
    reason: str


async def document_of(gateway: Gateway, view: JobView) -> dict[str, Any]:
    """A `JobDocument` as JSON."""

    def time_of(seconds: float | None) -> datetime | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)

    document = JobDocument(
        id=view.id,
        status=view.status,
        priority=view.priority,
        attempts=view.attempts,
        num_queued=await gateway.num_queued() if view.status is JobStatus.QUEUED else None,
        created_at=datetime.fromtimestamp(view.created_s, UTC),
        deadline_at=time_of(view.deadline_s),
        finished_at=time_of(view.finished_s),
        error=None if view.error_code is None else JobError(code=view.error_code, message=view.error_message),
        result=f"/v1/jobs/{view.id}/result" if view.status is JobStatus.SUCCEEDED else None,
    )
    return document.model_dump(mode="json")
