"""The protocol's calls, which HTTP and gRPC share: what is served, whether it is ready, and the fusion of pairs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from service.access.guard import charge
from service.access.held import Holding
from service.faces.gateway import FusionRequest, Gateway, Readiness
from service.faces.oip.plan import Plan, plan_of, tensors_of, told_of
from service.faces.oip.statistics import Statistics
from service.faces.oip.tensors import INPUTS, OUTPUTS, VALUES, InferAnswer, InferRequest
from service.terms import images
from service.terms.errors import (
    InvalidInputError,
    ModelNotFoundError,
    PayloadTooLargeError,
    ServiceError,
    error_of,
)
from service.terms.jobs import FusionResult, Part, WorkerInfo
from service.terms.settings import Settings

MODEL = "recofuse"  # whichever model is served; its own name is accepted as well
_LEVEL_CHARS, _FLOAT_CHARS = 4, 24  # of a number in JSON with its comma, at most
EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics")


class Inference:
    """The protocol's calls, for both faces. Documents are the protocol's JSON, and fit its gRPC messages."""

    def __init__(self, gateway: Gateway, settings: Settings, version: str) -> None:
        self._gateway = gateway
        self._settings = settings
        self._version = version
        self._statistics = Statistics()

    async def infer(self, name: str, version: str, request: InferRequest, *, remaining_s: float | None) -> InferAnswer:
        """Fuse every pair of a request, side by side. remaining_s: until the call's own deadline, None for none.

        If one pair fails, the others are cancelled and its error is raised. Raises ServiceError.
        """
        started_s = time.monotonic()
        try:
            if name != MODEL or version:
                await self._workers(name, version)
            plan = plan_of(request, self._settings.limits)
            request = replace(request, inputs=())  # of which the plan has copies
            timeout_s = self._gateway.timeout_within(plan.requests[0].timeout_s, remaining_s)
            await asyncio.to_thread(self._check_answer, request, plan)
            for _ in plan.requests[1:]:  # the first was charged when the request came
                await charge()
            requests = [replace(pair, timeout_s=timeout_s) for pair in plan.requests]
            results = await self._fuse_all(requests)
        except ServiceError:
            self._statistics.failed(time.monotonic() - started_s)
            raise
        outputs = await asyncio.to_thread(tensors_of, results, plan)
        self._statistics.succeeded(results, time.monotonic() - started_s)
        return InferAnswer(results[0].model_name, results[0].model_version, request.id, outputs, told_of(results))

    def holding(self) -> AbstractContextManager[Holding]:
        """Counts what a request holds while it comes, for the duration of the block."""
        return self._gateway.held.holding()

    async def readiness(self) -> Readiness:
        """Whether the server should be sent requests."""
        return await self._gateway.readiness()

    async def model_readiness(self, name: str, version: str) -> Readiness:
        """Whether the model should be sent requests. Raises ModelNotFoundError."""
        await self._workers(name, version)
        return await self._gateway.readiness()

    async def is_model_ready(self, name: str, version: str) -> bool:
        """The same as yes or no; a model that is not there is not ready."""
        try:
            return (await self.model_readiness(name, version)).is_ready
        except ModelNotFoundError:
            return False

    def server_metadata(self) -> dict[str, Any]:
        """Name, version and extensions."""
        return {"name": MODEL, "version": self._version, "extensions": list(EXTENSIONS)}

    async def model_metadata(self, name: str, version: str) -> dict[str, Any]:
        """The model's tensors; -1 stands for any size. Raises ModelNotFoundError."""
        workers = await self._workers(name, version)
        return {
            "name": name,
            "versions": sorted({worker.model_version for worker in workers}),
            "platform": MODEL,
            "inputs": [
                {"name": "vis", "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
                {"name": "ir", "datatype": "UINT8", "shape": [-1, -1, -1, 1]},
            ],
            "outputs": [
                *(
                    {"name": output, "datatype": "UINT8", "shape": [-1, -1, -1, 1 if part is Part.IR else 3]}
                    for output, part in OUTPUTS.items()
                ),
                {"name": VALUES, "datatype": "FP32", "shape": [-1, -1, -1, 1]},
            ],
        }

    async def model_config(self, name: str, version: str) -> dict[str, Any]:
        """The model's configuration as Triton describes it. Raises ModelNotFoundError."""
        workers = await self._workers(name, version)
        texts = {f"datatypes_{tensor}": ",".join(datatypes) for tensor, datatypes in INPUTS.items()}
        if workers:
            first = workers[0]
            texts |= {"default_steps": str(first.default_steps), "default_sampler": first.default_sampler}
            texts |= {"rigs": ",".join(rig.name for rig in await self._gateway.rigs())}
            texts |= {"default_exposure": first.default_exposure, "exposures": ",".join(first.exposures)}
        return {
            "name": name,
            "platform": MODEL,
            "backend": MODEL,
            "max_batch_size": self._settings.limits.max_pairs,
            "input": [
                {"name": "vis", "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": [-1, -1, 3]},
                {"name": "ir", "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": [-1, -1, 1]},
            ],
            "output": [
                *(
                    {"name": output, "data_type": "TYPE_UINT8", "dims": [-1, -1, 1 if part is Part.IR else 3]}
                    for output, part in OUTPUTS.items()
                ),
                {"name": VALUES, "data_type": "TYPE_FP32", "dims": [-1, -1, 1]},
            ],
            "parameters": {key: {"string_value": text} for key, text in texts.items()},
        }

    async def model_statistics(self, name: str, version: str) -> dict[str, Any]:
        """What this front end has answered by this protocol, under any name. Raises ModelNotFoundError."""
        workers = await self._workers(name or MODEL, version)
        versions = {worker.model_version for worker in workers}
        shown = version or (versions.pop() if len(versions) == 1 else "")
        return {"model_stats": [{"name": name or MODEL, "version": shown, **self._statistics.document()}]}

    async def _workers(self, name: str, version: str) -> list[WorkerInfo]:
        """The workers that serve a model. Raises ModelNotFoundError; `recofuse` is there without any worker."""
        there = await self._gateway.workers()
        named = [worker for worker in there if name in (MODEL, worker.model_name)]
        if not named and name != MODEL:
            names = ", ".join(dict.fromkeys((MODEL, *(worker.model_name for worker in there))))
            raise ModelNotFoundError(f"there is no model {name[:64]!r}; there are {names}")
        found = [worker for worker in named if version in ("", worker.model_version)]
        if version and not found:
            versions = ", ".join(sorted({worker.model_version for worker in named})) or "none"
            raise ModelNotFoundError(f"{name} is not there in version {version[:64]!r}; there is {versions}")
        return found

    def _check_answer(self, request: InferRequest, plan: Plan) -> None:
        """Whether the pictures will fit one tensor, and JSON where that is asked for; before any work is done."""
        as_json = [name for name in plan.outputs if not request.outputs.get(name, request.is_binary)]
        if plan.are_files or (len(plan.requests) == 1 and not as_json):
            return
        sizes = []
        for index, pair in enumerate(plan.requests):
            try:
                sizes.append(images.size_of(pair.vis, "vis", pair.vis_layout, self._settings.limits))
            except ServiceError as error:
                if len(plan.requests) == 1:
                    raise
                raise _numbered(error, index) from error
        if len(set(sizes)) > 1:
            shown = " and ".join(f"{width}x{height}" for width, height in sorted(set(sizes))[:2])
            raise InvalidInputError(
                f"vis holds images of {shown}, which are no tensor together; send them one by one, or name a format"
            )
        width, height = sizes[0]
        num_each = {name: 1 if OUTPUTS.get(name, Part.IR) is Part.IR else 3 for name in as_json}
        num_values = sum(num_each.values()) * width * height * len(sizes)
        num_chars = sum(count * (_FLOAT_CHARS if name == VALUES else _LEVEL_CHARS) for name, count in num_each.items())
        if num_chars * width * height * len(sizes) > self._settings.limits.max_json_bytes:
            raise PayloadTooLargeError(
                f"{num_values} values are too many for JSON; ask for binary_data, or for one output, or name a format"
            )

    async def _fuse_all(self, requests: Sequence[FusionRequest]) -> list[FusionResult]:
        tasks = [asyncio.create_task(self._gateway.fuse(request)) for request in requests]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for index, task in enumerate(tasks):
                if len(tasks) > 1 and task.done() and isinstance(error := task.exception(), ServiceError):
                    raise _numbered(error, index) from error
            return [await task for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _numbered(error: ServiceError, index: int) -> ServiceError:
    """The error of one pair, told apart from its neighbours'."""
    numbered = error_of(error.code, f"pair {index}: {error.message}")
    numbered.retry_after_s = error.retry_after_s
    return numbered
