"""What this front end has answered by the protocol, as Triton's statistics extension reports it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from service.terms.jobs import FusionResult, Stage


class _Durations:
    """A count, and the sum of nanoseconds."""

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self.ns += round(seconds * 1e9)


class Statistics:
    """What Triton's statistics extension reports, of this front end's requests by this protocol."""

    STAGES: Mapping[str, tuple[Stage, ...]] = {
        "queue": (Stage.QUEUE, Stage.BATCH),
        "compute_input": (Stage.DECODE,),
        "compute_infer": (Stage.MODEL,),
        "compute_output": (Stage.ENCODE,),
    }

    def __init__(self) -> None:
        self._durations = {name: _Durations() for name in ("success", "fail", *self.STAGES)}
        self._last_s = 0.0
        self._num_pairs = 0
        self._num_passes = 0.0

    def succeeded(self, results: Sequence[FusionResult], seconds: float) -> None:
        """Count an answered request."""
        self._durations["success"].add(seconds)
        self._last_s = time.time()
        for result in results:
            self._num_pairs += 1
            self._num_passes += 1 / max(result.batch_size, 1)
        for name, stages in self.STAGES.items():  # of the slowest pair: they go side by side
            self._durations[name].add(
                max(sum(result.timings_s.get(stage, 0.0) for stage in stages) for result in results)
            )

    def failed(self, seconds: float) -> None:
        """Count a refused one."""
        self._durations["fail"].add(seconds)

    def document(self) -> dict[str, Any]:
        """As the extension has it."""
        durations = {name: {"count": value.count, "ns": value.ns} for name, value in self._durations.items()}
        nothing = {"count": 0, "ns": 0}
        return {
            "last_inference": round(self._last_s * 1000),
            "inference_count": self._num_pairs,
            "execution_count": round(self._num_passes),
            "inference_stats": {**durations, "cache_hit": nothing, "cache_miss": nothing},
        }
