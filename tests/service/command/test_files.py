"""Picture sheets."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.command.files import contact_sheet


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans()), min_size=1), min_size=1))
def test_a_sheet_holds_every_picture_whole(shapes: list[list[tuple[int, int, bool]]]) -> None:
    shapes = [row[:4] for row in shapes[:4]]
    rows = [
        [
            ("", np.full((height, width) if is_grey else (height, width, 3), 255, np.uint8))
            for height, width, is_grey in row
        ]
        for row in shapes
    ]
    sheet = contact_sheet(rows)
    num_white = int((sheet == 255).all(axis=2).sum())
    assert num_white == sum(height * width for row in shapes for height, width, _ in row)
