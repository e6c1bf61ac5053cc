"""The engine against the straightforward implementation, one improvement after the other: `recofuse bench engine`.

The baseline is `benchmarks/straightforward.py` under the published sampler: eager float32, NCHW, branches in turn,
attention matrices materialised, 100 Euler steps, all three pictures decoded. Each row adds one improvement to the row
above it. Same weights in every row; those of preset `paper` are random, which changes no time.

On a CPU a run of three steps is taken apart by its own calls (encode, step, decode), in processor time of one thread,
and longer runs are computed from the parts: `extrapolated` in the table. So a busy machine disturbs little, and 100
steps of the baseline need not be waited for. On a GPU runs are timed by the clock, transfers included, and only those
of 100 steps that are not recorded are computed from shorter ones.

On a CPU the runtimes of the shipped weights follow, alone and beside busy processes (benchmarks/runtimes.py), and the
last line says what they cost of torch's processor time.

Floor: the ceilings that this run measures (a large matrix product, a large copy), and for each network the time in
which it could do its multiplications, or read its weights and every convolution's input and output once, whichever is
longer. `roofline` is the floor's share of the time measured.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import runtimes
from benchmarks.processes import machine
from benchmarks.straightforward import straightforward
from recofuse_core.checkpoint import load_pretrained
from recofuse_core.devices import named_device
from recofuse_core.evaluation import plots
from recofuse_core.faults import let_go
from recofuse_core.kernels.choice import KernelChoice
from recofuse_core.model import PRESETS, Conditions, ReCoFuse, build_model, noise_like
from recofuse_core.picture import ALL_OUTPUTS, OutputName
from recofuse_core.runtime import Runtime
from recofuse_core.sampler import Pair, SamplerName
from recofuse_core.supplies import ScheduleCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE_STEPS = 100
SIZES = ((320, 256), (640, 480), (1280, 1024))  # width, height
BATCHES = (1, 4, 8, 16)
MAX_CPU_PIXELS = 640 * 480  # a batch of more is left out on a CPU, where nothing is gained by batching
NAMED_SIZE = (640, 480)
TIMED_STEPS = 3  # on a CPU
MAX_COLD_S = 5.0
MAX_TIMED_STEPS = 32  # on a GPU; longer runs are computed from short ones, unless they are recorded
REPEATS = 5  # on a GPU, of each run

# What the project asks of itself: docs/performance.md.
CPU_STEP_RATIO, CPU_RATIO, CPU_COMPACT_S = 1.5, 12.0, 2.0
# On a GPU, reckoned and not measured: benchmarks/simulated_gpu.py's times for an H200, a baseline taken as 1,600 eager
# operations of 7 us a step, and a guess at slow norms give 5.4, 27, 8 and 120; these leave a quarter to error.
GPU_STEP_RATIO, GPU_RATIO, GPU_FLOOR_FACTOR, GPU_PAIRS_S = 4.0, 20.0, 10.0, 90.0


@dataclass(frozen=True, slots=True)
class Variant:
    """One row's way to compute: what is switched on, and what is asked for. sampler and steps None: the defaults."""

    name: str
    attention: bool = False  # fused, not materialised
    layout: bool = False  # channels_last and fused norms
    cached: bool = False  # schedules made once
    half: bool = False
    stacked: bool = False
    kernels: KernelChoice = "eager"
    recorded: bool = False
    sampler: SamplerName | None = "euler"
    steps: int | None = BASELINE_STEPS
    outputs: tuple[OutputName, ...] = ALL_OUTPUTS


def ladder(on_gpu: bool) -> list[Variant]:
    """The baseline, then each improvement added to those before it."""
    steps: list[tuple[str, dict[str, Any]]] = [
        ("fused attention", {"attention": True}),
        ("channels last, fused norms", {"layout": True}),
        ("schedules made once", {"cached": True}),
        ("bfloat16", {"half": True}),
    ]
    if on_gpu:
        steps += [
            ("both branches in one pass", {"stacked": True}),
            ("kernels that win here", {"kernels": "auto"}),
            ("recorded", {"recorded": True}),
        ]
    steps += [("default steps", {"sampler": None, "steps": None}), ("only the fused picture", {"outputs": ("fused",)})]
    variants = [Variant("baseline")]
    for name, changes in steps:
        variants.append(replace(variants[-1], name=f"+ {name}", **changes))
    return variants


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement. Times in ms of one image; memory: the process's or the device's peak during it."""

    preset: str
    width: int
    height: int
    batch: int
    variant: str
    sampler: str
    steps: int
    step_ms: float
    image_ms: float
    images_s: float
    step_ratio: float
    ratio: float
    peak_mib: float
    roofline: float
    extrapolated: bool

    def text(self) -> str:
        """A line of the table."""
        return (
            f"{self.preset:8} {self.width:>4}x{self.height:<4} {self.batch:>3}  {self.variant:<28} "
            f"{self.sampler:>9} {self.steps:>3}  {self.step_ms:9.2f}  {self.step_ratio:6.2f}  {self.image_ms:10.1f}"
            f"  {self.images_s:8.2f}  {self.ratio:7.2f}  {self.peak_mib:8.0f}  {100 * self.roofline:6.1f} %"
            f"{'  extrapolated' if self.extrapolated else ''}"
        )


HEADING = (
    f"{'preset':8} {'size':<9} {'B':>3}  {'variant':<28} {'sampler':>9} {'N':>3}  {'step ms':>9}  {'ratio':>6}"
    f"  {'image ms':>10}  {'images/s':>8}  {'ratio':>7}  {'peak MiB':>8}  {'roofline':>8}"
)


@dataclass(frozen=True, slots=True)
class Check:
    """A figure beside its target; higher is better unless `at_most`."""

    name: str
    value: float
    target: float
    unit: str = "x"
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the target is reached."""
        return self.value <= self.target if self.at_most else self.value >= self.target

    def text(self) -> str:
        """For the last line."""
        sign = "<=" if self.at_most else ">="
        verdict = "" if self.is_met else ", MISSED"
        return f"{self.name} {self.value:.3g}{self.unit} ({sign}{self.target:g}{verdict})"


# --- ceilings and floors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device can do at most: floating-point operations and bytes moved a second."""

    flops_s: float
    bytes_s: float
    dtype: str


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A large matrix product in the networks' dtype, and a large copy; the best of a few of each."""
    side, size = (8192, 1 << 29) if device.type == "cuda" else (1024, 1 << 26)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s = min(_timed(lambda: a @ b, device) for _ in range(6))
    copy_s = min(_timed(lambda: target.copy_(source), device) for _ in range(6))
    return Ceilings(2 * side**3 / product_s, 2 * size / copy_s, str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class Work:
    """What one call of a network must do at least, for one image; `weight_bytes` once a batch."""

    flops: float
    weight_bytes: float
    activation_bytes: float

    def floor_s(self, batch: int, ceilings: Ceilings) -> float:
        """Multiplications or memory, whichever takes longer."""
        moved = self.weight_bytes + batch * self.activation_bytes
        return max(batch * self.flops / ceilings.flops_s, moved / ceilings.bytes_s)


@dataclass(frozen=True, slots=True)
class Costs:
    """The work of the parts of a run: encoding one of the two inputs, one step, decoding one picture."""

    encode: Work
    step: Work
    decode: Work

    def floor_s(self, batch: int, steps: int, num_outputs: int, ceilings: Ceilings) -> float:
        """Of a whole batch."""
        parts = (2, self.encode), (steps, self.step), (num_outputs, self.decode)
        return sum(count * work.floor_s(batch, ceilings) for count, work in parts)


def count_costs(model: ReCoFuse, height: int, width: int, item_bytes: int) -> Costs:
    """Counted on the meta device, where nothing is computed."""
    blank = straightforward(model).to("meta")
    image = torch.empty(1, 3, -(-height // 16) * 16, -(-width // 16) * 16, device="meta")
    with torch.inference_mode():
        encode, (latent, skips) = _counted(blank.autoencoder, lambda: blank.autoencoder.encode(image), item_bytes)
        state = Pair(latent, latent)
        conditioning = blank.condition(torch.ones(1, dtype=torch.long, device="meta"))
        networks = nn.ModuleList([blank.fusion, blank.denoiser])
        step, _ = _counted(networks, lambda: blank.predict(state, state, 1, conditioning=conditioning), item_bytes)
        decode, _ = _counted(
            blank.autoencoder, lambda: blank.autoencoder.decode(latent, skips, (height, width)), item_bytes
        )
    return Costs(encode, step, decode)


def _counted(networks: nn.Module, call: Callable[[], Any], item_bytes: int) -> tuple[Work, Any]:
    weights: set[nn.Module] = set()
    moved = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        weights.add(module)
        moved += inputs[0].numel() + output.numel()

    handles = [m.register_forward_hook(hook) for m in networks.modules() if isinstance(m, nn.Conv2d)]
    with FlopCounterMode(display=False) as counter:
        result = call()
    for handle in handles:
        handle.remove()
    numbers = sum(p.numel() for module in weights for p in module.parameters())
    return Work(counter.get_total_flops(), numbers * item_bytes, moved * item_bytes), result


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a batch: everything but the steps for the asked outputs, and one step."""

    fixed_s: float
    step_s: float
    whole_s: float | None = None  # measured, not put together

    def run_s(self, steps: int) -> float:
        """Of a whole run."""
        return self.fixed_s + steps * self.step_s if self.whole_s is None else self.whole_s


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def _timed(call: Callable[[], object], device: torch.device) -> float:
    started = _clock(device)
    call()
    return _clock(device) - started


class Candidate:
    """A variant of a model, ready to run."""

    def __init__(self, model: ReCoFuse, variant: Variant, device: torch.device) -> None:
        self.variant = variant
        self.device = device
        self.conditions: Conditions | None = None
        self.runtime: Runtime | None = None
        if variant.cached:
            precision: Literal["auto", "float32"] = "auto" if variant.half else "float32"
            self.runtime = Runtime(
                model, precision=precision, graphs=variant.recorded, stacked=variant.stacked, kernels=variant.kernels
            )
            self.model = self.runtime.model
            self.conditions = ScheduleCache(self.model)
        else:
            self.model = model if variant.layout else straightforward(model, fused_attention=variant.attention)

    def fuse(self, vis: Tensor, ir: Tensor, steps: int | None) -> None:
        """One whole run, images and results on the host, as the service has them."""
        fuse = self.runtime.fuse if self.runtime else self._fuse_plain
        wishes: dict[str, Any] = {"steps": steps, "sampler": self.variant.sampler, "outputs": self.variant.outputs}
        fuse(vis, ir, exposure="as_shot", **wishes)

    def _fuse_plain(self, vis: Tensor, ir: Tensor, **options: Any) -> None:
        output = self.model.fuse(vis.to(self.device), ir.to(self.device), **options)
        for image in (output.fused, output.vis, output.ir):
            if image is not None:
                image.cpu()

    @torch.inference_mode()
    def taken_apart(self, vis: Tensor, ir: Tensor) -> Timing:
        """A short run on the CPU, timed by its own calls."""
        plan = self.model.plan(steps=TIMED_STEPS, sampler="euler", outputs=self.variant.outputs, exposure="as_shot")
        like = torch.empty(self.model.latent_shape(len(vis), *vis.shape[-2:]))
        predict, decode = self.model.predict, self.model.autoencoder.decode
        steps: list[float] = []  # when each began
        decodes: list[float] = []

        def timed_predict(*args: Any, **options: Any) -> Any:
            steps.append(time.process_time())
            return predict(*args, **options)

        def timed_decode(*args: Any) -> Any:
            decodes.append(time.process_time())
            return decode(*args)

        def parts() -> tuple[Timing, float]:
            steps.clear()
            decodes.clear()
            started = time.process_time()
            self.model.run(vis, ir, plan, noise_like([0] * len(vis), like), self.conditions)
            ended = time.process_time()
            # The first step may be dearer than the others; the end of the last one is not seen, and is small.
            step_s = min(after - before for before, after in pairwise(steps))
            final_s = max(0.0, decodes[0] - steps[-1] - step_s)  # TIM once more, and what joins the skips
            return Timing(steps[0] - started + final_s + ended - decodes[0], step_s), ended - started

        with (
            _replaced(self.model, "predict", timed_predict),
            _replaced(self.model.autoencoder, "decode", timed_decode),
        ):
            timing, whole_s = parts()
            return parts()[0] if whole_s < MAX_COLD_S else timing  # short runs once more, warm

    def whole_runs(self, vis: Tensor, ir: Tensor) -> Timing:
        """Runs on a GPU by the clock: of the asked length unless it is long, and two others for what a step costs."""
        asked = self.model.plan(steps=self.variant.steps, sampler=self.variant.sampler).timesteps
        # A step costs the difference between two runs of one kind: recorded ones of a few steps are another.
        short, long = (12, 24) if self.variant.recorded else (4, 12) if self.runtime else (2, 6)

        def median_s(steps: int) -> float:
            for _ in range(3):  # the second records
                self.fuse(vis, ir, steps)
            return statistics.median(_timed(lambda: self.fuse(vis, ir, steps), self.device) for _ in range(REPEATS))

        short_s, long_s = median_s(short), median_s(long)
        step_s = (long_s - short_s) / (long - short)
        is_timed = self.variant.recorded or len(asked) <= MAX_TIMED_STEPS
        whole_s = median_s(len(asked)) if is_timed else None
        return Timing(short_s - short * step_s, step_s, whole_s)


@contextmanager
def _replaced(owner: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        object.__delattr__(owner, name)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not allowed everywhere; the peak is then that of the whole process so far
            Path("/proc/self/clear_refs").write_text("5")


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def preset_model(name: str, device: torch.device) -> ReCoFuse:
    """The packaged weights, or random ones with residual gains that let every block do something."""
    if name != "paper":
        return load_pretrained(name, device=device)
    torch.manual_seed(0)
    model = build_model(PRESETS[name], name=name).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("beta", "gamma")):
            parameter.data.fill_(0.1)
    return model.to(device)


def measure(
    model: ReCoFuse,
    preset: str,
    size: tuple[int, int],
    batch: int,
    device: torch.device,
    ceilings: Ceilings,
    say: Callable[[str], None] = print,
) -> Iterator[Row]:
    """All variants of one case, the baseline first; ratios are 0 where that does not fit the memory."""
    width, height = size
    generator = torch.Generator().manual_seed(1)
    vis = torch.rand(batch, 3, height, width, generator=generator)
    ir = torch.rand(batch, 1, height, width, generator=generator)
    costs = count_costs(model, height, width, torch.empty((), dtype=getattr(torch, ceilings.dtype)).element_size())
    base: Row | None = None
    for variant in ladder(device.type == "cuda"):
        candidate = Candidate(model, variant, device)
        plan = candidate.model.plan(steps=variant.steps, sampler=variant.sampler)
        steps = len(plan.timesteps)
        _reset_peak(device)
        on_gpu = device.type == "cuda"
        try:
            timing = candidate.whole_runs(vis, ir) if on_gpu else candidate.taken_apart(vis, ir)
        except torch.OutOfMemoryError as error:
            let_go(error)  # later variants need less
            say(f"{preset:8} {width:>4}x{height:<4} {batch:>3}  {variant.name:<28} does not fit the memory")
            continue
        run_s = timing.run_s(steps)
        alone = float(variant.name == "baseline")
        row = Row(
            preset=preset,
            width=width,
            height=height,
            batch=batch,
            variant=variant.name,
            sampler=plan.sampler,
            steps=steps,
            step_ms=1e3 * timing.step_s / batch,
            image_ms=1e3 * run_s / batch,
            images_s=batch / run_s,
            step_ratio=base.step_ms * batch / (1e3 * timing.step_s) if base else alone,
            ratio=base.image_ms * batch / (1e3 * run_s) if base else alone,
            peak_mib=_peak_mib(device),
            roofline=costs.floor_s(batch, steps, len(variant.outputs), ceilings) / run_s,
            extrapolated=timing.whole_s is None,
        )
        base = base or (row if variant.name == "baseline" else None)
        yield row


def judge(rows: Sequence[Row], on_gpu: bool, compact_s: float | None) -> list[Check]:
    """Every target for which there is a figure."""

    def found(preset: str, batch: int) -> Row | None:
        """The last, fastest row of a case."""
        cases = [r for r in rows if (r.preset, r.batch, r.width, r.height) == (preset, batch, *NAMED_SIZE)]
        return cases[-1] if cases else None

    checks = []
    if (single := found("paper", 1)) is not None:
        label = f"({single.sampler} {single.steps}, fused only)"
        checks.append(Check("paper 640x480 per step", single.step_ratio, GPU_STEP_RATIO if on_gpu else CPU_STEP_RATIO))
        checks.append(Check(f"end to end {label}", single.ratio, GPU_RATIO if on_gpu else CPU_RATIO))
    if on_gpu and (eight := found("paper", 8)) is not None:
        factor = 1 / eight.roofline
        checks.append(Check("batch 8 above the roofline floor", factor, GPU_FLOOR_FACTOR, "x", at_most=True))
        fastest = max(r.images_s for r in rows if (r.preset, r.width, r.height) == ("paper", *NAMED_SIZE))
        checks.append(Check("paper 640x480", fastest, GPU_PAIRS_S, " pairs/s"))
    if compact_s is not None:
        checks.append(Check("compact, files to file", compact_s, CPU_COMPACT_S, " s", at_most=True))
    return checks


def files_to_file_s(folder: Path, repeats: int = 3) -> float:
    """Processor seconds of one 640x480 pair through `recofuse fuse`'s own way, one thread, median."""
    from benchmarks.load import picture_pair
    from recofuse_images.pairs import FoundPair
    from service.command.files import fuse_files
    from service.terms.jobs import FusionOptions, Part
    from service.terms.settings import CodecSettings, EngineSettings, LimitSettings
    from service.work.engine import PassOptions
    from service.work.torch_engine import TorchEngine

    vis, ir = folder / "vis.png", folder / "ir.png"
    for path, content in zip((vis, ir), picture_pair(*NAMED_SIZE), strict=True):
        path.write_bytes(content)
    engine = TorchEngine(EngineSettings(device="cpu", num_threads=1))
    engine.load()
    asked, limits, codec = FusionOptions(), LimitSettings(), CodecSettings()
    options = PassOptions.of(asked, engine.info)
    pair = FoundPair("pair", vis, ir)
    spent = []
    for _ in range(repeats + 1):
        started = time.process_time()
        fuse_files(engine, pair, {Part.FUSED: folder / "fused.png"}, options, asked, limits, codec)
        spent.append(time.process_time() - started)
    return statistics.median(spent[1:])


@dataclass(frozen=True, slots=True)
class Outcome:
    """All figures. line: the last one said."""

    rows: list[Row]
    checks: list[Check]
    line: str
    compared: runtimes.Outcome | None = None

    @property
    def all_met(self) -> bool:
        """Whether every target that could be judged was reached."""
        return all(check.is_met for check in self.checks)


def cases(on_gpu: bool, is_quick: bool, presets: Sequence[str]) -> list[tuple[str, tuple[int, int], int]]:
    """(preset, size, batch): all on a GPU; on a CPU few batches; quick: 640x480, batches 1 (and 8)."""
    if is_quick:
        return [(preset, NAMED_SIZE, batch) for preset in presets for batch in ((1, 8) if on_gpu else (1,))]
    everything = [(preset, size, batch) for preset in presets for size in SIZES for batch in BATCHES]
    if on_gpu:
        return everything
    return [case for case in everything if case[2] == 1 or case[2] * math.prod(case[1]) <= MAX_CPU_PIXELS * 1.1]


def run(
    *,
    is_quick: bool = False,
    device: str = "auto",
    presets: Sequence[str] = ("paper", "compact"),
    num_threads: int = 1,
    json_path: Path | None = None,
    csv_path: Path | None = None,
    plot_path: Path | None = None,
    say: Callable[[str], None] = print,
    only: Sequence[tuple[str, tuple[int, int], int]] | None = None,
) -> Outcome:
    """Measure; say one row at a time, and a summary as the last line."""
    import tempfile

    if plot_path is not None:
        plots.require_matplotlib()
    where = machine()
    chosen = torch.device(named_device(device))
    on_gpu = chosen.type == "cuda"
    num_threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        dtype = Runtime(preset_model("compact", chosen)).dtype
        ceilings = measure_ceilings(chosen, dtype)
        name = torch.cuda.get_device_name(chosen) if on_gpu else f"{where['cpu']}, {num_threads} thread"
        say(
            f"{name}, load average {where['load_average']}; measured ceilings: {ceilings.flops_s / 1e9:.0f} GFLOP/s in "
            f"{ceilings.dtype}, {ceilings.bytes_s / 1e9:.1f} GB/s copied"
        )
        say(HEADING)
        rows: list[Row] = []
        models: dict[str, ReCoFuse] = {}
        for preset, size, batch in cases(on_gpu, is_quick, presets) if only is None else only:
            if preset not in models:
                models = {preset: preset_model(preset, chosen)}
            for row in measure(models[preset], preset, size, batch, chosen, ceilings, say):
                rows.append(row)
                say(row.text())
        compact_s, compared = None, None
        if not on_gpu and "compact" in presets:
            compared = runtimes.run(num_threads=num_threads, say=say)
            with tempfile.TemporaryDirectory(prefix="recofuse-bench-") as folder:
                compact_s = files_to_file_s(Path(folder))
    finally:
        torch.set_num_threads(num_threads_before)
    checks = judge(rows, on_gpu, compact_s)
    line = f"engine on {name}: " + ("; ".join(check.text() for check in checks) or "no target is for these cases")
    if compared is not None:
        line += f"; {compared.line}"
    if not on_gpu and where["load_average"] > 0.5:
        line += f"; the machine was busy (load average {where['load_average']})"
    document: dict[str, Any] = {
        "machine": where,
        "device": name,
        "torch": torch.__version__,
        "ceilings": asdict(ceilings),
        "rows": [asdict(row) for row in rows],
        "targets": [{**asdict(check), "is_met": check.is_met} for check in checks],
        "runtimes": None if compared is None else asdict(compared),
        "line": line,
    }
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if csv_path is not None:
        write_csv(csv_path, rows)
    if plot_path is not None:
        plot_path.write_text(plots.svg(chart(rows, name)), encoding="utf-8")
    say(line)
    return Outcome(rows, checks, line, compared)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a row."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(Row.__slots__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


@plots.look()
def chart(rows: Sequence[Row], name: str) -> Figure:
    """Seconds of an image by variant, for the first preset and the named size where there is one."""
    from matplotlib.figure import Figure

    first = next((r for r in rows if (r.width, r.height) == NAMED_SIZE), rows[0])
    chosen = [
        r
        for r in rows
        if (r.preset, r.width, r.height, r.batch) == (first.preset, first.width, first.height, first.batch)
    ]
    figure = Figure(figsize=(7.5, 0.5 + 0.25 * len(chosen)))
    axes = figure.subplots()
    axes.set_title(f"{first.preset}, {first.width}x{first.height}, one image ({name})")
    plots.bars(axes, {row.variant: row.image_ms / 1e3 for row in chosen}, lambda value: f"{value:.3g} s")
    return figure


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| Preset | Size | Batch | Variant | Steps | ms a step | Ratio | ms an image | Ratio | Peak MiB | Roofline |",
        "|---|---|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r.preset} | {r.width}x{r.height} | {r.batch} | {r.variant} | {r.sampler} {r.steps} | {r.step_ms:.1f} | "
        f"{r.step_ratio:.2f} | {r.image_ms:.0f} | {r.ratio:.1f} | {r.peak_mib:.0f} | {100 * r.roofline:.0f} % |"
        for r in rows
    ]
    return "\n".join(lines)
