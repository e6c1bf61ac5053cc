"""Everything that only a GPU can show, in one command of under ten minutes: `make check-gpu`.

The tests marked `gpu`; which half precision is closer to float32; whether torch picks the fastest attention; the ways
to run the branches beside each other (stacked or apart, torch's kernels or ours), which must agree; drills of a GPU
that fails (benchmarks/gpu_drills.py); recorded runs under compute-sanitizer, where that is installed; the engine's
table at 640x480 with the targets of docs/performance.md; and what the service keeps of the engine's throughput. That
all of it has taken less than ten minutes is the last of the checks.
Without a GPU nothing is checked, and it says so with status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NO_GPU = 2
LONGEST_S = 600.0
PROCESS_TIMEOUT_S = 90.0
MAX_DIFFERENCE = 1.0  # levels, rms: the ways differ by rounding
ATTENTIONS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
ATTENDED = {"compact": 300, "paper": 4800}  # of 4,800 positions of a frame of 640x480, pooled or not
MAX_ATTENTION_RATIO = 1.25  # else the fastest is worth being asked for by name


@dataclass(frozen=True, slots=True)
class Part:
    """One of them, with the line that says how it went."""

    name: str
    passed: bool
    line: str
    seconds: float


def run_tests() -> tuple[bool, str]:
    """The tests that need a GPU; a run in which none was found, or one was skipped, has not passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/core", "tests/service"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:], sep="")
    lines = [line for line in done.stdout.splitlines() if " passed" in line or " failed" in line or "error" in line]
    summary = lines[-1].strip("= ") if lines else "no test ran"
    return done.returncode == 0 and "skipped" not in summary, summary


def run_precision() -> tuple[bool, str]:
    """How far the shipped weights are from float32 in each half precision, as the start of a model decides by it."""
    from recofuse_core.checkpoint import load_pretrained
    from recofuse_core.precision import choose_dtype

    dtype, why = choose_dtype(load_pretrained("compact", device="cuda"), "auto", stacked=True)
    return dtype.itemsize == 2, f"{str(dtype).removeprefix('torch.')} is taken: {why}"


def run_forms(device: str = "cuda", *, size: tuple[int, int] = (640, 480), repeats: int = 5) -> tuple[bool, str]:
    """The shipped weights with branches stacked or apart, on torch's kernels or those that win: pictures must agree."""
    import torch

    from recofuse_core.checkpoint import load_pretrained
    from recofuse_core.kernels.choice import KernelChoice
    from recofuse_core.picture import OutputName
    from recofuse_core.runtime import Runtime

    fused: tuple[OutputName, ...] = ("fused",)
    ways: list[tuple[str, bool, KernelChoice]] = [
        ("apart", False, "eager"),
        ("stacked", True, "eager"),
        ("apart, kernels that win", False, "auto"),
        ("stacked, kernels that win", True, "auto"),
    ]
    model = load_pretrained("compact", device=device)
    width, height = size
    generator = torch.Generator().manual_seed(0)
    told, worst = [], 0.0
    expected = None
    for name, stacked, kernels in ways:
        runtime = Runtime(model, stacked=stacked, kernels=kernels)
        times = []
        for batch in (1, 8):
            generator.manual_seed(batch)
            levels = torch.randint(0, 256, (batch, 4, height // 8, width // 8), generator=generator, dtype=torch.uint8)
            images = levels.repeat_interleave(8, 2).repeat_interleave(8, 3)
            runtime.record([(batch, height, width)], outputs=fused, levels=True)
            spent = []
            for _ in range(repeats):
                started = time.perf_counter()
                found = runtime.fuse(images[:, :3], images[:, 3:], outputs=fused).fused
                spent.append(time.perf_counter() - started)
            times.append(f"{1e3 * min(spent):.1f}")
        assert found is not None
        expected = found if expected is None else expected
        worst = max(worst, float((found.float() - expected.float()).square().mean().sqrt()))
        told.append(f"{name} {' and '.join(times)} ms ({runtime.kernels})")
    return worst < MAX_DIFFERENCE, f"batches of 1 and 8: {'; '.join(told)}; apart by at most {worst:.2f} levels (rms)"


def run_attention(
    time_ms: Callable[[Callable[[], Any]], float] | None = None,
    *,
    device: str = "cuda",
    names: Sequence[str] = ATTENTIONS,
    positions: int = 4800,
) -> tuple[bool, str]:
    """What torch picks for the attention of the fusion module, beside each of its kinds: it should be near the fastest.

    Heads have 16 channels, which some kinds fill up to 64. time_ms: for tests.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from recofuse_core.kernels.choice import graph_ms

    measured = time_ms or graph_ms
    told, all_near = [], True
    for preset, attended in ATTENDED.items():
        for batch in (1, 8):
            query = torch.randn(2 * batch, 1, positions, 16, device=device, dtype=torch.bfloat16)
            key, value = torch.randn(2, 2 * batch, 1, attended, 16, device=device, dtype=torch.bfloat16)

            def attend(query: Any = query, key: Any = key, value: Any = value) -> Any:
                return scaled_dot_product_attention(query, key, value)

            picked = measured(attend)
            times = {}
            for name in names:
                with contextlib.suppress(RuntimeError), sdpa_kernel(getattr(SDPBackend, name)):
                    times[name] = measured(attend)
            all_near &= picked <= MAX_ATTENTION_RATIO * min([picked, *times.values()])
            each = ", ".join(f"{name.lower()} {ms:.3f}" for name, ms in times.items())
            told.append(f"{preset} batch {batch}: {picked:.3f} ms ({each})")
    return all_near, f"torch's own choice, {'; '.join(told)}"


def run_drills() -> tuple[bool, str]:
    """Each in a process of its own: afterwards nothing works there, or memory is short."""
    lines, all_passed = [], True
    for name in ("memory", "lost"):
        passed, line = _in_process([sys.executable, "-m", "benchmarks.gpu_drills", name])
        all_passed &= passed
        lines.append(f"{name}: {line}")
    return all_passed, "; ".join(lines)


def run_sanitizer() -> tuple[bool, str]:
    """Recorded runs under compute-sanitizer, which comes with CUDA's toolkit and not with its driver."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return True, "compute-sanitizer is not installed: NOT RUN"
    watched = [sys.executable, "-m", "benchmarks.gpu_drills", "replays"]
    return _in_process([tool, "--tool", "memcheck", "--error-exitcode", "9", *watched])


def _in_process(command: list[str]) -> tuple[bool, str]:
    """Whether a command ended well, and its last line."""
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=PROCESS_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False, f"has not ended after {PROCESS_TIMEOUT_S:.0f} s"
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="")
    lines = (done.stdout if done.stdout.strip() else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"status {done.returncode}"


def run_engine() -> tuple[bool, str]:
    """`recofuse bench engine --quick` on the GPU."""
    from benchmarks import engine

    outcome = engine.run(is_quick=True, device="cuda")
    return outcome.all_met, outcome.line


def run_kept() -> tuple[bool, str]:
    """`recofuse bench kept` on the GPU."""
    from benchmarks import kept

    outcome = kept.run(device="cuda", num_images=400, num_clients=32)
    return outcome.kept >= kept.TARGET, outcome.line


def has_gpu() -> bool:
    """Whether torch sees one."""
    import torch

    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, whatever becomes of each; returns 0 if all passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, help="where all of it goes")
    path: Path | None = parser.parse_args(arguments).json
    if not has_gpu():
        print("gpu: NOT CHECKED: torch sees no GPU here")
        return NO_GPU
    parts: list[Part] = []
    checks = {
        "tests": run_tests,
        "precision": run_precision,
        "attention": run_attention,
        "forms": run_forms,
        "drills": run_drills,
        "sanitizer": run_sanitizer,
        "engine": run_engine,
        "kept": run_kept,
    }
    for name, check in checks.items():
        started = time.monotonic()
        try:
            passed, line = check()
        except Exception as error:  # noqa: BLE001 - the other parts are to run all the same
            passed, line = False, f"{type(error).__name__}: {error}"
        parts.append(Part(name, passed, line, time.monotonic() - started))
    spent_s = sum(part.seconds for part in parts)
    parts.append(Part("time", spent_s < LONGEST_S, f"{spent_s:.0f} s of {LONGEST_S:.0f}", 0.0))
    line = "gpu: " + " | ".join(f"{part.name} {'passed' if part.passed else 'FAILED'}: {part.line}" for part in parts)
    if path is not None:
        document: dict[str, Any] = {"parts": [asdict(part) for part in parts], "line": line}
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(line)
    return 0 if all(part.passed for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
