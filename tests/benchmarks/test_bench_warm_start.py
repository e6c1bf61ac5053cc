"""What the warm-start benchmark concludes from its rows, and that it measures what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.warm_start import Row, _figures, judge, markdown
from recofuse_core.picture import FusionOutput
from service.command.cameras import degraded_clip

DEFAULT = Row("cold, 3", 3, False, 26.0, 28.0, 25.0, 25.0, 6.0, 5.0, 7.0, 400.0)
WARM = replace(DEFAULT, name="warm from 50, 1", steps=1, is_warm=True)
LATE = replace(DEFAULT, name="late from 50, 1", steps=1)


@pytest.mark.parametrize(
    ("rows", "is_won"),
    [
        ([WARM], True),
        ([WARM, replace(LATE, steps=2)], True),
        ([WARM, LATE], False),  # as good without the frame before
        ([WARM, replace(LATE, vis_db=25.0)], True),
        ([replace(WARM, vis_db=25.8)], False),
        ([replace(WARM, moving_ir_db=24.0)], False),  # ghosts
        ([replace(WARM, flicker_fused=7.5)], False),
        ([replace(WARM, steps=3)], False),  # nothing saved
        ([], False),
    ],
)
def test_the_verdict(rows: list[Row], is_won: bool) -> None:
    outcome = judge([DEFAULT, *rows])
    assert outcome.is_won is is_won
    assert ("wins" in outcome.line) is is_won
    assert markdown(outcome.rows).count("\n") == len(rows) + 2


def test_a_perfect_result_does_not_flicker_and_a_frozen_one_is_wrong_where_things_move() -> None:
    clean, degraded = degraded_clip(1, 5, 64, 96)
    assert not degraded[0][0].equal(degraded[1][0])  # fresh noise in every frame
    perfect = [FusionOutput(scene.vis[None], scene.vis[None] + 1e-4, scene.ir[None] + 1e-4) for scene in clean]
    figures = _figures(clean, perfect)
    assert max(figures["flicker_fused"]) < 0.5
    assert min(figures["vis_db"] + figures["moving_ir_db"]) > 70
    frozen = _figures(clean, [perfect[0]] * 5)
    assert max(frozen["flicker_fused"]) == 0
    assert max(frozen["moving_vis_db"]) < 40
    noisy = [FusionOutput(vis[None], vis[None], ir[None]) for vis, ir in degraded]
    assert min(_figures(clean, noisy)["flicker_vis"]) > 1
