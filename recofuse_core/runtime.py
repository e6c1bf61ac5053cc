"""A model made ready to be run many times: half precision, schedules made once, whole runs captured.

`Runtime(model).fuse(...)` computes what `model.fuse(...)` does, through the same `ReCoFuse.run` and the same samplers.
It may prepare what it does because its weights no longer change. What it adds:

- networks in bfloat16 where the device has it natively. States, mu, noise and all SDE arithmetic stay float32, and so
  do norm statistics, time embeddings, the published autoencoder's first and last convolution, which see pixels, and on
  a CPU the fusion module, which is no faster in bfloat16 there.
- the conditioning of every time step, made once.
- on a GPU, both branches in one pass (`StackedDenoiser`), and the whole run of a shape recorded once as a CUDA graph
  with static buffers. A `Recorder` hides the device: `CudaRecorder` captures, `EagerRecorder` runs the same
  logic again and so tests it anywhere.

A runtime is used from one thread at a time, and so is a device's default stream meanwhile.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recofuse_core.errors import ConfigError
from recofuse_core.exposure import Exposure
from recofuse_core.layers import NORM_EPS, GatedConvBlock
from recofuse_core.model import (
    ALL_OUTPUTS,
    Conditioning,
    FusionOutput,
    FusionPlan,
    ModelInfo,
    OutputName,
    ReCoFuse,
    require_finite,
    require_pair,
    seed_list,
)
from recofuse_core.networks import Denoiser, DenoiserConfig, DualDenoiser, pad_to_multiple
from recofuse_core.sampler import NoiseSource, Pair, SamplerName, seeded_noise
from recofuse_core.tiling import TilingConfig

Precision = Literal["auto", "float32", "bfloat16"]

# Parts of a parameter's name. Time vectors are made once a schedule; tone curves, lighting and the two convolutions
# read and write pixels, and bfloat16 near 1 is as coarse as an 8-bit level.
KEPT_IN_FLOAT32 = frozenset({"tone", "exposure", "time", "time_projection", "init_conv", "final_conv"})

MAX_RECORDED_STEPS = 32  # a graph of 100 published steps would hold a quarter of a million nodes


def named_device(name: str) -> str:
    """A device's name as torch has it: for "auto" the first GPU if there is one, else the CPU."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def native_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the networks: for "auto" bfloat16 where the device computes in it natively, else float32.

    Raises ConfigError for an unknown precision.
    """
    if precision == "auto":
        if device.type == "cuda":
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities()
            has_bfloat16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision must be auto, float32 or bfloat16, got {precision!r}")
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def frozen_copy(model: ReCoFuse, dtype: torch.dtype, *, stacked: bool) -> ReCoFuse:
    """A model for inference alone, its networks in `dtype`, its branches stacked if asked; `model` stays as it is."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    kept = KEPT_IN_FLOAT32 if next(model.parameters()).is_cuda else KEPT_IN_FLOAT32 | {"fusion"}
    for name, parameter in frozen.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    if stacked:
        frozen.denoiser = StackedDenoiser(frozen.denoiser)  # type: ignore[assignment]  # the same two methods
    return frozen


# --- both branches in one pass ----------------------------------------------------------------------------------------

StackedModulations = tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]


class StackedDenoiser(nn.Module):
    """Both branches of a `DualDenoiser` at once, on tensors (2, B, h, w, C): pointwise layers as batched products.

    It takes `dual` over: what is stacked is released there, so the branches can no longer be run one by one. Half the
    kernels, twice the work in each: it wins where launching or reading weights binds (a GPU), not on a CPU.
    """

    def __init__(self, dual: DualDenoiser) -> None:
        super().__init__()
        self.config: DenoiserConfig = dual.config
        self.branches = dual
        pair = (dual.vis, dual.ir)
        self.multiple = dual.vis.multiple
        self.encoders = nn.ModuleList(map(_stack_blocks, dual.vis.encoders, dual.ir.encoders))
        self.middle = _stack_blocks(dual.vis.middle, dual.ir.middle)
        self.decoders = nn.ModuleList(map(_stack_blocks, dual.vis.decoders, dual.ir.decoders))
        self.num_levels = len(dual.vis.downs)
        for level in range(self.num_levels):
            # A 2x2 convolution of stride 2 is a product over the four positions' channels: (row, column, channel).
            downs = [_conv(branch.downs[level]) for branch in pair]
            weight = torch.stack([conv.weight.permute(2, 3, 1, 0).flatten(0, 2) for conv in downs])
            self.register_buffer(f"down_weight{level}", weight.contiguous())
            self.register_buffer(f"down_bias{level}", _stacked_bias(downs))
            ups = [_conv(branch.ups[level]) for branch in pair]
            self.register_buffer(f"up_weight{level}", _stacked_weight(ups))
        for branch in pair:
            _release(branch)

    def conditioning(self, timesteps: Tensor) -> StackedModulations:
        """What one step for the whole batch, (1,), makes of every block: (scale1, shift1, scale2, shift2) stacked."""
        if len(timesteps) != 1:
            raise ConfigError("stacked branches take one time step for the whole batch")
        stacked = []
        for vis, ir in zip(*self.branches.conditioning(timesteps), strict=True):
            parts = (torch.stack([v, i])[:, None, None, None] for v, i in zip(_flat(vis), _flat(ir), strict=True))
            stacked.append(tuple(parts))
        return tuple(stacked)  # type: ignore[arg-type]  # four entries each

    def denoise(
        self, vis: Tensor, vis_mu: Tensor, ir: Tensor, ir_mu: Tensor, conditioning: StackedModulations
    ) -> tuple[Tensor, Tensor]:
        """See DualDenoiser.denoise."""
        height, width = vis.shape[-2:]
        modulations = iter(conditioning)
        intros = []
        for branch, x, mu in ((self.branches.vis, vis, vis_mu), (self.branches.ir, ir, ir_mu)):
            both = torch.cat([x - mu, mu], dim=1).to(branch.intro.weight.dtype)
            intros.append(branch.intro(pad_to_multiple(both, self.multiple, "constant")).permute(0, 2, 3, 1))
        first = x = torch.stack(intros)  # (2, B, h, w, C)
        kept = []
        for level in range(self.num_levels):
            x = _through(self.encoders[level], x, modulations)
            kept.append(x)
            x = self._down(x, level)
        x = _through(self.middle, x, modulations)
        for level in range(self.num_levels):
            x = _through(self.decoders[level], kept.pop() + self._up(x, level), modulations)
        x = x + first
        endings = (
            branch.ending(part.permute(0, 3, 1, 2))[..., :height, :width].float()
            for branch, part in zip((self.branches.vis, self.branches.ir), x, strict=True)
        )
        vis_out, ir_out = endings
        return vis_out, ir_out

    def _down(self, x: Tensor, level: int) -> Tensor:
        _, batch, height, width, channels = x.shape
        quads = x.view(2, batch, height // 2, 2, width // 2, 2, channels).transpose(3, 4)
        rows = quads.reshape(2, -1, 4 * channels)
        weight, bias = self.get_buffer(f"down_weight{level}"), self.get_buffer(f"down_bias{level}")
        return torch.baddbmm(bias, rows, weight).view(2, batch, height // 2, width // 2, -1)

    def _up(self, x: Tensor, level: int) -> Tensor:
        """1x1 convolution and pixel shuffle: a channel is (output channel, row, column)."""
        _, batch, height, width, channels = x.shape
        rows = torch.bmm(x.reshape(2, -1, channels), self.get_buffer(f"up_weight{level}"))
        quads = rows.view(2, batch, height, width, -1, 2, 2).permute(0, 1, 2, 5, 3, 6, 4)
        return quads.reshape(2, batch, 2 * height, 2 * width, -1)


class StackedBlock(nn.Module):
    """`GatedConvBlock` of both branches; the residual gains are folded into the last products."""

    def __init__(self, vis: GatedConvBlock, ir: GatedConvBlock) -> None:
        super().__init__()
        pair = (vis, ir)
        self.channels = vis.expand1.in_channels
        for name in ("expand1", "attention", "expand2"):
            convs = [getattr(block, name) for block in pair]
            self.register_buffer(f"{name}_weight", _stacked_weight(convs))
            self.register_buffer(f"{name}_bias", _stacked_bias(convs))
        for name, gain in (("project1", "beta"), ("project2", "gamma")):
            convs = [getattr(block, name) for block in pair]
            gains = torch.stack([getattr(block, gain).flatten() for block in pair])[:, None]
            self.register_buffer(f"{name}_weight", _stacked_weight(convs) * gains)
            self.register_buffer(f"{name}_bias", _stacked_bias(convs) * gains)
        self.register_buffer("depthwise_weight", torch.cat([block.depthwise.weight for block in pair]))
        biases = [block.depthwise.bias for block in pair]
        self.register_buffer("depthwise_bias", torch.cat([bias for bias in biases if bias is not None]))

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """x: (2, B, h, w, C). modulation: scale1, shift1, scale2, shift2, each (2, 1, 1, 1, C)."""
        scale1, shift1, scale2, shift2 = modulation
        _, batch, height, width, channels = x.shape
        u = torch.addcmul(shift1, F.layer_norm(x, (channels,), eps=NORM_EPS), scale1)
        wide = self._product(u.view(2, -1, channels), "expand1").view(2, batch, height, width, 2 * channels)
        planes = wide.permute(1, 0, 4, 2, 3).reshape(batch, 4 * channels, height, width)
        weight, bias = self.get_buffer("depthwise_weight"), self.get_buffer("depthwise_bias")
        mixed = F.conv2d(planes, weight, bias, padding=1, groups=4 * channels)
        halves = mixed.view(batch, 2, 2, channels, height, width)
        gated = halves[:, :, 0] * halves[:, :, 1]  # (B, 2, C, h, w)
        pooled = gated.mean(dim=(3, 4)).transpose(0, 1)  # (2, B, C)
        attention = self._product(pooled, "attention")[:, :, None, None]
        rows = (gated.permute(1, 0, 3, 4, 2) * attention).reshape(2, -1, channels)
        y = x + self._product(rows, "project1").view_as(x)
        v = torch.addcmul(shift2, F.layer_norm(y, (channels,), eps=NORM_EPS), scale2)
        left, right = self._product(v.view(2, -1, channels), "expand2").chunk(2, dim=-1)
        return y + self._product(left * right, "project2").view_as(y)

    def _product(self, rows: Tensor, name: str) -> Tensor:
        return torch.baddbmm(self.get_buffer(f"{name}_bias"), rows, self.get_buffer(f"{name}_weight"))


def _through(blocks: nn.Module, x: Tensor, modulations: Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    for block in blocks.children():
        x = block(x, next(modulations))
    return x


def _stack_blocks(vis: nn.Module, ir: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(map(StackedBlock, vis.children(), ir.children()))  # type: ignore[arg-type]


def _release(branch: Denoiser) -> None:
    """Give back the memory of the weights that have been stacked."""
    for block in branch.blocks():
        for conv in (block.expand1, block.depthwise, block.attention, block.project1, block.expand2, block.project2):
            conv.to("meta")
    for conv in (*branch.downs, *branch.ups):
        conv.to("meta")


def _conv(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module


def _stacked_weight(convs: Sequence[nn.Conv2d]) -> Tensor:
    """(2, in, out) of 1x1 convolutions."""
    return torch.stack([conv.weight.flatten(1).T for conv in convs]).contiguous()


def _stacked_bias(convs: Sequence[nn.Conv2d]) -> Tensor:
    """(2, 1, out)."""
    return torch.stack([conv.bias for conv in convs if conv.bias is not None])[:, None]


def _flat(modulations: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    return (*modulations[0], *modulations[1])


# --- recorded runs ----------------------------------------------------------------------------------------------------

Results = tuple[Tensor, ...]


class Recorder(Protocol):
    """Turns a function over fixed buffers into one that can be run again and again, and moves data to and from them."""

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """What repeats `function` on the buffers that it read now, and the fixed tensors that its results appear in."""

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies from and to without help of the processor."""

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start to fill each first tensor, a static buffer, from the second; what is run next sees the new content."""

    def run(self, replay: Callable[[], None]) -> None:
        """Start a recorded function."""

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Fill each first tensor from the second, a result of what was run last, and wait until that is done."""


class EagerRecorder:
    """Runs the function again instead of replaying it. For devices without graphs, and for tests of what uses them."""

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """See Recorder."""
        fixed = tuple(result.clone() for result in function())

        def replay() -> None:
            for buffer, result in zip(fixed, function(), strict=True):
                buffer.copy_(result)

        return replay, fixed

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Recorder."""
        return torch.empty(tuple(shape), dtype=dtype)

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""
        for buffer, source in pairs:
            buffer.copy_(source)

    def run(self, replay: Callable[[], None]) -> None:
        """See Recorder."""
        replay()

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""
        self.upload(pairs)


class CudaRecorder:
    """CUDA graphs that share one memory pool, replayed on a stream of their own; copies go over a second one.

    Graphs of one pool may share memory for everything but what they keep (inputs lie outside the pool), so the results
    of one must be copied out before another is run; `download` waits for exactly that.
    """

    NUM_WARM_RUNS = 2  # the first picks algorithms and allocates workspaces, which a capture must not do

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """See Recorder."""
        self.compute.wait_stream(torch.cuda.current_stream(self.device))
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False),
            torch.cuda.stream(self.compute),
        ):
            for _ in range(self.NUM_WARM_RUNS):
                function()
            self.compute.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread of the process may use the device during the capture.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.compute, capture_error_mode="thread_local"):
                results = function()
        return graph.replay, results

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Recorder."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""
        self.copies.wait_stream(self.compute)  # the last run may still read the buffers
        self.copies.wait_stream(torch.cuda.current_stream(self.device))  # the sources may lie on the device
        with torch.cuda.stream(self.copies):
            for buffer, source in pairs:
                buffer.copy_(source, non_blocking=True)
        self.compute.wait_stream(self.copies)

    def run(self, replay: Callable[[], None]) -> None:
        """See Recorder."""
        with torch.cuda.stream(self.compute):
            replay()

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See Recorder."""
        self.copies.wait_stream(self.compute)
        with torch.cuda.stream(self.copies):
            for target, result in pairs:
                target.copy_(result, non_blocking=True)
        self.copies.synchronize()


@dataclass(frozen=True)
class ProgramKey:
    """What a recorded run is good for. The dtype and device are the runtime's."""

    plan: FusionPlan
    batch: int
    height: int
    width: int
    levels: bool


class Program:
    """One recorded run: static inputs, noise and outputs, and host buffers to reach them."""

    def __init__(
        self, model: ReCoFuse, key: ProgramKey, device: torch.device, recorder: Recorder, conditions: "ScheduleCache"
    ) -> None:
        self._recorder = recorder
        dtype = torch.uint8 if key.levels else torch.float32
        size = (key.height, key.width)
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((key.batch, c, *size), dtype) for c in (3, 1)]
        latent = model.latent_shape(key.batch, key.height, key.width)
        shapes.append(((key.plan.num_draws, 2, *latent), torch.float32))
        self._host = [recorder.host_buffer(shape, dtype) for shape, dtype in shapes]
        vis, ir, noise = self._static = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        self._names = [name for name in ALL_OUTPUTS if name in key.plan.outputs]
        for t in (*key.plan.timesteps, 0):
            conditions(t)  # made before the recording, which may not copy from the host

        def compute() -> Results:
            draws = iter(noise)
            output, is_finite = model.run(vis, ir, key.plan, lambda: Pair(*next(draws)), conditions)
            return *(getattr(output, name).contiguous() for name in self._names), is_finite

        self._replay, self._results = recorder.record(compute)
        self._host_results = [recorder.host_buffer(result.shape, result.dtype) for result in self._results]

    def __call__(self, vis: Tensor, ir: Tensor, seeds: Sequence[int]) -> FusionOutput:
        """Images of the program's shape, on the host or on the device; the result lies where they do."""
        host_vis, host_ir, host_noise = self._host
        draw: NoiseSource = seeded_noise(seeds, host_noise[0, 0])
        for slot in host_noise:
            slot[0], slot[1] = draw()
        sources = [vis, ir, host_noise]
        if vis.device.type == "cpu":
            host_vis.copy_(vis)
            host_ir.copy_(ir)
            sources = [host_vis, host_ir, host_noise]
        self._recorder.upload(list(zip(self._static, sources, strict=True)))
        self._recorder.run(self._replay)
        targets = [
            host if vis.device.type == "cpu" else torch.empty_like(result)
            for host, result in zip(self._host_results, self._results, strict=True)
        ]
        self._recorder.download(list(zip(targets, self._results, strict=True)))
        *pictures, is_finite = targets
        require_finite(is_finite)
        if vis.device.type == "cpu":
            pictures = [picture.clone() for picture in pictures]
        named = dict(zip(self._names, pictures, strict=True))
        return FusionOutput(named.get("fused"), named.get("vis"), named.get("ir"))


class ProgramCache:
    """The programs used last. A shape is recorded when asked for, or when it is met for the second time.

    So a shape that comes once costs one eager run, not a recording, and whoever is ready for it has recorded it before.
    """

    def __init__(self, max_programs: int, build: Callable[[ProgramKey], Program]) -> None:
        self._max_programs = max_programs
        self._build = build
        self._programs: OrderedDict[ProgramKey, Program] = OrderedDict()
        self._seen: OrderedDict[ProgramKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, key: ProgramKey) -> bool:
        return key in self._programs

    def get(self, key: ProgramKey, *, record: bool = False) -> Program | None:
        """The program for a key; None where it is neither recorded nor due."""
        if (program := self._programs.get(key)) is None:
            if not record and key not in self._seen:
                self._seen[key] = None
                if len(self._seen) > 8 * self._max_programs:
                    self._seen.popitem(last=False)
                return None
            while len(self._programs) >= self._max_programs:
                self._programs.popitem(last=False)  # before the recording, which takes over its memory
            program = self._programs[key] = self._build(key)
        self._programs.move_to_end(key)
        return program


class ScheduleCache:
    """The conditioning of every time step that was asked for: at most T + 1 entries, for weights that never change."""

    def __init__(self, model: ReCoFuse) -> None:
        self._model = model
        self._made: dict[int, Conditioning] = {}

    def __call__(self, t: int) -> Conditioning:
        """The conditioning of step t for the whole batch."""
        if t not in self._made:
            self._made[t] = self._model.condition(t)
        return self._made[t]


class Runtime:
    """A model whose weights are final, on the device where it lies, ready to be run many times.

    precision: of the networks. graphs: None records runs on a GPU and not elsewhere. batch_sizes: what batches of
    recorded runs are filled up to, ascending; larger ones run as they are. stacked: both branches in one pass, None for
    a GPU alone. recorder: for tests.
    """

    def __init__(
        self,
        model: ReCoFuse,
        *,
        precision: Precision = "auto",
        graphs: bool | None = None,
        max_graphs: int = 16,
        batch_sizes: Sequence[int] = (1, 2, 4, 8),
        stacked: bool | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        self.dtype = native_dtype(precision, self.device)
        self.model = frozen_copy(model, self.dtype, stacked=on_gpu if stacked is None else stacked)
        self.batch_sizes = tuple(sorted(batch_sizes))
        self._conditions = ScheduleCache(self.model)
        self._programs: ProgramCache | None = None
        if on_gpu if graphs is None else graphs:
            if max_graphs < 1:
                raise ConfigError(f"max_graphs must be at least 1, got {max_graphs}")
            used = recorder or (CudaRecorder(self.device) if on_gpu else EagerRecorder())
            self._programs = ProgramCache(
                max_graphs, lambda key: Program(self.model, key, self.device, used, self._conditions)
            )

    @property
    def info(self) -> ModelInfo:
        """What the model is."""
        return self.model.info

    @property
    def records(self) -> bool:
        """Whether runs are recorded at all."""
        return self._programs is not None

    @property
    def num_recorded(self) -> int:
        """Recorded runs that are held."""
        return 0 if self._programs is None else len(self._programs)

    @torch.inference_mode()
    def fuse(
        self,
        vis: Tensor,
        ir: Tensor,
        *,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        seeds: int | Sequence[int] = 0,
        outputs: Collection[OutputName] = ALL_OUTPUTS,
        coupled: bool = True,
        tiling: TilingConfig | None = None,
        exposure: Exposure = "as_shot",
    ) -> FusionOutput:
        """See `ReCoFuse.fuse`. The images may lie on the host or on the device; the result lies where they do."""
        plan = self.model.plan(
            steps=steps, sampler=sampler, outputs=outputs, coupled=coupled, tiling=tiling, exposure=exposure
        )
        return self._fuse(vis, ir, plan, seeds, record=False)

    @torch.inference_mode()
    def record(
        self,
        shapes: Sequence[tuple[int, int, int]],
        *,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        outputs: Collection[OutputName] = ALL_OUTPUTS,
        levels: bool = False,
        exposure: Exposure = "as_shot",
    ) -> None:
        """Make runs of shapes (B, H, W) ready, so that the first request is no slower than the others.

        levels: for uint8 images. Without graphs each shape is run once, which fills the allocator's caches.
        """
        plan = self.model.plan(steps=steps, sampler=sampler, outputs=outputs, exposure=exposure)
        dtype = torch.uint8 if levels else torch.float32
        for batch, height, width in shapes:
            vis = torch.zeros(batch, 3, height, width, dtype=dtype)
            self._fuse(vis, vis[:, :1], plan, 0, record=True)

    def _fuse(
        self, vis: Tensor, ir: Tensor, plan: FusionPlan, seeds: int | Sequence[int], *, record: bool
    ) -> FusionOutput:
        batch, height, width = require_pair(vis, ir)
        each_seed = seed_list(seeds, batch)
        is_recordable = len(plan.timesteps) <= MAX_RECORDED_STEPS and not plan.tiles(height, width)
        if self._programs is not None and is_recordable:
            size = next((size for size in self.batch_sizes if size >= batch), batch)
            key = ProgramKey(plan, size, height, width, vis.dtype == torch.uint8)
            if (program := self._programs.get(key, record=record)) is not None:
                fill = size - batch
                output = program(_filled(vis, fill), _filled(ir, fill), each_seed + each_seed[-1:] * fill)
                return _first(output, batch) if fill else output
        like = torch.empty(self.model.latent_shape(batch, height, width), device=self.device)
        draw = seeded_noise(each_seed, like)
        output, is_finite = self.model.run(vis.to(self.device), ir.to(self.device), plan, draw, self._conditions)
        require_finite(is_finite)
        return FusionOutput(*(_moved(image, vis.device) for image in (output.fused, output.vis, output.ir)))


def _filled(images: Tensor, count: int) -> Tensor:
    """Append the last image `count` times."""
    return torch.cat([images, images[-1:].expand(count, -1, -1, -1)]) if count else images


def _first(output: FusionOutput, count: int) -> FusionOutput:
    images = (output.fused, output.vis, output.ir)
    return FusionOutput(*(None if image is None else image[:count] for image in images))


def _moved(image: Tensor | None, device: torch.device) -> Tensor | None:
    return None if image is None else image.to(device)
