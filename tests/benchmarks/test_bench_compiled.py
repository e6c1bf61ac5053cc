"""Our kernels compile for cards that are not here, and once for all batches and frames.

In processes of their own, since the interpreter is chosen when Triton is imported.
"""

import os
import re
import subprocess
import sys

import pytest

from tests.extras import ROOT

pytest.importorskip("triton", reason="Triton is not installed: there is no wheel of it for this platform")

CODE = """
from benchmarks.compiled import SHARED_BYTES, compiled, told
from benchmarks.simulated_capture import small
card = {card}
shapes = [(1, 480, 640), (8, 480, 640), (3, 480, 640), (1, 336, 816), (5, 256, 320)]
found = compiled(small({preset!r}), card, shapes=shapes, wishes=[("fused",)])
print(*(f"{{each.name}} {{shapes.index(each.shape)}}" for each in found), sep="\\n")
print(*told(card, found))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("preset", "card"), [("compact", (7, 5)), ("compact", (9, 0))], ids=str)
def test_every_kernel_compiles_for_a_card_and_once(preset: str, card: tuple[int, int]) -> None:
    done = python("-c", CODE.format(preset=preset, card=card))
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    names, first_asked = zip(*(line.split() for line in lines), strict=True)
    assert {"_norm_product", "_depthwise_gate", "_attend", "_finish", "_spatial_gate", "_weigh", "_paint"} <= set(names)
    assert 30 < len(names) < 50
    # A batch or a frame of another size has no client wait for a compiler, but for what is read several at once.
    later = [name for name, index in zip(names, first_asked, strict=True) if index != "0"]
    assert set(later) <= {"_beside", "_project", "_weigh", "_paint", "_luma_cells"}, later
    assert re.fullmatch(r"True compute capability \d\.\d: \d+ compilations, .*", last), last


def test_what_has_no_room_on_a_card_is_named() -> None:
    code = (
        "from benchmarks.compiled import Compiled, told\n"
        "found = [Compiled('_finish', (1, 2, 3), 1.0, bytes) for bytes in (1 << 10, 70 << 10)]\n"
        "print(*told((7, 5), found)); print(*told((9, 0), found))"
    )
    said = python("-c", code).stdout.splitlines()
    assert said[0].startswith("False ")
    assert said[0].endswith("shared memory at most 71680 of 65536 bytes; WITHOUT ROOM: _finish (71680)")
    assert said[1].startswith("True ")


@pytest.mark.parametrize("word", ["8.7", "compakt", "9"])
def test_a_word_that_is_neither_a_preset_nor_a_known_card_is_refused(word: str) -> None:
    done = python("-m", "benchmarks.compiled", "compact", word)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr == (
        f"{word}: neither a preset (paper, compact) nor a compute capability (7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0)\n"
    )
