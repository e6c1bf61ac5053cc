"""The error table is complete, and errors survive the queue."""

from __future__ import annotations

import pytest

from service.terms.errors import FAULTS, STATUS, TITLE, ErrorCode, ServiceError, error_of

GRPC_NAMES = {
    "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED",
}  # fmt: skip


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_has_statuses_a_title_and_one_class(code: ErrorCode) -> None:
    http, grpc = STATUS[code]
    assert 400 <= http <= 599
    assert grpc in GRPC_NAMES
    assert TITLE[code]
    classes = [kind for kind in ServiceError.__subclasses__() if kind.code is code]
    assert len(classes) == 1
    error = error_of(code, "what was wrong")
    assert (type(error), error.code, error.message, str(error)) == (
        classes[0],
        code,
        "what was wrong",
        "what was wrong",
    )
    assert (error.http_status, error.grpc_status) == (http, grpc)


def test_the_table_lists_nothing_else() -> None:
    assert set(STATUS) == set(TITLE) == set(ErrorCode)


def test_only_our_own_failures_are_server_errors_that_are_put_aside() -> None:
    assert all(STATUS[code][0] >= 500 for code in FAULTS)
    assert {code for code in ErrorCode if STATUS[code][0] == 500} <= FAULTS
