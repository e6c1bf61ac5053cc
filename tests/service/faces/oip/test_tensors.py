"""The data of tensors, by property."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.faces.oip.tensors import join_elements, split_elements
from service.terms.errors import InvalidInputError


@settings(deadline=None)
@given(elements=st.lists(st.binary(max_size=30), max_size=6), count=st.integers(0, 8), cut=st.integers(0, 40))
def test_elements_are_taken_apart_as_they_were_joined(elements: list[bytes], count: int, cut: int) -> None:
    data = join_elements(elements)
    assert split_elements(data, len(elements), "vis") == elements
    if count != len(elements):
        with pytest.raises(InvalidInputError):
            split_elements(data, count, "vis")
    if 0 < cut <= len(data):
        with pytest.raises(InvalidInputError):
            split_elements(data[:-cut], len(elements), "vis")
