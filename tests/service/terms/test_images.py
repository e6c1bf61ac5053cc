"""The bridge to `recofuse_images`: its errors are those of the one tree, and its bounds are the settings."""

from __future__ import annotations

import dataclasses

import pytest

from recofuse_images.errors import ImageError
from recofuse_images.limits import Limits
from service.terms.errors import ServiceError
from service.terms.images import check_request, decode_pair, size_of
from service.terms.settings import LimitSettings
from tests.images.files import BAD_FILES, IR_FILE, VIS_FILE
from tests.service.error_cases import CODES


@pytest.mark.parametrize("name", BAD_FILES)
def test_every_error_of_a_file_is_one_of_ours(name: str) -> None:
    data, kind, words = BAD_FILES[name]
    for vis, ir in ((data, IR_FILE), (VIS_FILE, data)):
        with pytest.raises(ServiceError, match=words) as refused:
            decode_pair(vis, ir, LimitSettings())
        assert refused.value.code is CODES[kind]


def test_no_kind_of_error_is_left_out() -> None:
    assert set(ImageError.__subclasses__()) == set(CODES)


def test_the_limits_have_a_setting_each_of_equal_default() -> None:
    for bound in dataclasses.fields(Limits):
        assert getattr(LimitSettings(), bound.name) == getattr(Limits(), bound.name)


@pytest.mark.parametrize("bound", [{"max_side": 50}, {"max_pixels": 900}, {"max_image_bytes": 99}])
def test_the_settings_bound_what_is_read(bound: dict[str, int]) -> None:
    with pytest.raises(ServiceError, match="at most"):
        size_of(VIS_FILE, "vis", None, LimitSettings(**bound))


def test_a_request_is_checked_as_a_whole() -> None:
    assert check_request(VIS_FILE, IR_FILE, None, None, LimitSettings()) == (64, 48)
    with pytest.raises(ServiceError, match="the same file"):
        check_request(VIS_FILE, VIS_FILE, None, None, LimitSettings())
