"""Tensors to requests, and results to what is told of them."""

from __future__ import annotations

from typing import Any

import pytest

from service.faces.oip.plan import plan_of, told_of
from service.faces.oip.tensors import InferRequest, Tensor
from service.terms.errors import PayloadTooLargeError
from service.terms.jobs import FusionResult, Priority
from tests.service.faces.oip.messages import LIMITS, PIXELS


def test_a_long_list_of_pairs_is_refused_by_its_shape_alone() -> None:
    claimed = Tensor("vis", "BYTES", (2**31 - 1,) * 8, b"")
    with pytest.raises(PayloadTooLargeError, match="at most 16"):
        plan_of(InferRequest((claimed, Tensor("ir", "BYTES", (1,), b""))), LIMITS)


@pytest.mark.parametrize(
    ("given", "priority"),
    [(None, "normal"), (0, "normal"), (1, "high"), (2, "normal"), (3, "low"), ("low", "low"), ("high", "high")],
)
def test_priorities_are_tritons_numbers_or_our_names(given: Any, priority: str) -> None:
    inputs = tuple(Tensor(entry["name"], "UINT8", tuple(entry["shape"]), data) for entry, data in PIXELS)
    request = InferRequest(inputs, parameters={} if given is None else {"priority": given})
    assert plan_of(request, LIMITS).requests[0].priority is Priority(priority)


def test_workers_that_say_nothing_leave_no_parameters() -> None:
    silent, known = FusionResult(job_id="a"), FusionResult(job_id="b", ir_source="raw")
    assert told_of([silent, silent]) == {}
    assert told_of([silent, known]) == {"infrared_source": ",raw"}
