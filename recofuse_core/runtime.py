"""A model made ready to be run many times: half precision, schedules made once, whole runs captured.

`Runtime(model).fuse(...)` computes what `model.fuse(...)` does, through the same `ReCoFuse.run` and the same samplers.
It may prepare what it does because its weights no longer change. What it adds:

- networks in half precision where the device has it natively (precision.py). States, mu, noise and all SDE arithmetic
  stay float32, and so do norm statistics, time embeddings, the published autoencoder's first and last convolution,
  which see pixels, and on a CPU the fusion module, which is no faster in half precision there.
- the conditioning of every time step, made once.
- on a GPU, both branches in one pass (stacked.py), blocks on kernels of our own where these win (kernels/), and the
  whole run of a shape recorded once as a CUDA graph with static buffers (recording.py).

What is float32 is float32 on a GPU, too, recorded or not (arithmetic.py). Algorithms may differ all the same: a seed
gives the same bytes again on one device and one way (eager, or recorded at one batch size), and elsewhere the same
picture but for roundings, most of them of one level.

A runtime is used from one thread at a time, and so is a device's default stream meanwhile.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from recofuse_core.arithmetic import full_float32
from recofuse_core.errors import ConfigError
from recofuse_core.faults import Fault, fault_of, let_go
from recofuse_core.frames import Images, Levels, are_levels, filled, require_images, together
from recofuse_core.kernels.choice import KernelChoice, use_kernels
from recofuse_core.model import ReCoFuse, noise_like
from recofuse_core.overlap import Overlap, require_overlap
from recofuse_core.picture import (
    ALL_OUTPUTS,
    Exposure,
    FusionOutput,
    FusionPlan,
    ModelInfo,
    OutputName,
    require_finite,
    seed_list,
)
from recofuse_core.precision import Precision, choose_dtype, frozen_copy
from recofuse_core.program_cache import Activity, ProgramCache
from recofuse_core.programs import Pending, ProgramKey, build_program
from recofuse_core.recording import CudaRecorder, EagerRecorder, Recorder
from recofuse_core.sampler import SamplerName
from recofuse_core.supplies import Supplies
from recofuse_core.tiling import TilingConfig

logger = logging.getLogger(__name__)


class Runtime:
    """A model whose weights are final, on the device where it lies, ready to be run many times.

    precision: of the networks, see precision.py. graphs: None records runs on a GPU and not elsewhere. max_graphs,
    max_graph_bytes: how many recorded runs are held, and their bytes; 0 bytes: half of what the GPU has free now.
    defers_recording: a shape that comes again is recorded by `record_due`, not within `fuse`. batch_sizes: what batches
    of recorded runs are filled up to, ascending; larger ones run as they are. stacked: both branches in one pass, None
    for a GPU alone. kernels: "auto" tries ours against torch's on a GPU, in seconds, and takes what wins. recorder: for
    tests.
    """

    def __init__(
        self,
        model: ReCoFuse,
        *,
        precision: Precision = "auto",
        graphs: bool | None = None,
        max_graphs: int = 64,
        max_graph_bytes: int = 0,
        defers_recording: bool = False,
        batch_sizes: Sequence[int] = (1, 2, 4, 8),
        stacked: bool | None = None,
        kernels: KernelChoice = "auto",
        recorder: Recorder | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        is_stacked = on_gpu if stacked is None else stacked
        with full_float32():
            self.dtype, self.why_dtype = choose_dtype(model, precision, stacked=is_stacked)
            self.model = frozen_copy(model, self.dtype, stacked=is_stacked)
            self.kernels = use_kernels(self.model, kernels)  # what was chosen, in words
        self.batch_sizes = tuple(sorted(batch_sizes))
        self._supplies = supplies = Supplies(self.model, self.device)
        self._programs: ProgramCache | None = None
        self._num_recorded_runs = 0
        self._num_eager_runs = 0
        if on_gpu if graphs is None else graphs:
            if max_graphs < 1:
                raise ConfigError(f"max_graphs must be at least 1, got {max_graphs}")
            used = recorder or (CudaRecorder(self.device) if on_gpu else EagerRecorder())
            if not max_graph_bytes and on_gpu:
                max_graph_bytes = torch.cuda.mem_get_info(self.device)[0] // 2
            self._programs = ProgramCache(
                max_graphs,
                lambda key: build_program(self.model, key, self.device, used, supplies),
                max_bytes=max_graph_bytes,
                is_deferred=defers_recording,
            )

    @property
    def info(self) -> ModelInfo:
        """What the model is."""
        return self.model.info

    @property
    def can_light(self) -> bool:
        """Whether the weights offer the rendition "lit"."""
        return self.model.exposure is not None

    @property
    def records(self) -> bool:
        """Whether runs are recorded at all."""
        return self._programs is not None

    @property
    def num_recorded(self) -> int:
        """Recorded runs that are held."""
        return 0 if self._programs is None else len(self._programs)

    @property
    def activity(self) -> Activity:
        """What was done so far, and is held now. May be asked for from any thread."""
        made = Activity() if self._programs is None else self._programs.activity
        on_gpu = self.device.type == "cuda"
        return replace(
            made,
            recorded_runs=self._num_recorded_runs,
            eager_runs=self._num_eager_runs,
            allocated_bytes=torch.cuda.memory_allocated(self.device) if on_gpu else 0,
            reserved_bytes=torch.cuda.memory_reserved(self.device) if on_gpu else 0,
        )

    @property
    def due_in_s(self) -> float | None:
        """Seconds until `record_due` may record what is due; 0 for now, None if nothing is."""
        return None if self._programs is None else self._programs.due_in_s

    @torch.inference_mode()
    def record_due(self) -> bool:
        """Record one of the shapes that came again, the one used most; False if there is none. Takes up to seconds."""
        with full_float32():
            return self._programs is not None and self._programs.record_due()

    @torch.inference_mode()
    def fuse(
        self,
        vis: Images,
        ir: Images,
        *,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        seeds: int | Sequence[int] = 0,
        outputs: Collection[OutputName] = ALL_OUTPUTS,
        coupled: bool = True,
        tiling: TilingConfig | None = None,
        exposure: Exposure | None = None,
        overlap: Levels | Sequence[Levels] | None = None,
    ) -> FusionOutput:
        """See `ReCoFuse.fuse`. The images may lie on the host or on the device; the result lies where they do.

        vis, ir: levels also as frames of their own, see frames.py; what comes back is tensors all the same.
        overlap: (B, H, W, 2), where infrared was measured, as `Overlap` has it in 255 steps; None for everywhere.
        """
        options = {"steps": steps, "sampler": sampler, "outputs": outputs, "coupled": coupled, "tiling": tiling}
        return self.submit(vis, ir, seeds=seeds, exposure=exposure, overlap=overlap, **options).result()  # type: ignore[arg-type]

    @torch.inference_mode()
    def submit(
        self,
        vis: Images,
        ir: Images,
        *,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        seeds: int | Sequence[int] = 0,
        outputs: Collection[OutputName] = ALL_OUTPUTS,
        coupled: bool = True,
        tiling: TilingConfig | None = None,
        exposure: Exposure | None = None,
        overlap: Levels | Sequence[Levels] | None = None,
    ) -> Pending:
        """`fuse`, without waiting for the result where the run is recorded: the next batch can be submitted meanwhile.

        The result may be waited for on another thread. Two runs may be under way; a third waits for the first.
        """
        plan = self.model.plan(
            steps=steps, sampler=sampler, outputs=outputs, coupled=coupled, tiling=tiling, exposure=exposure
        )
        return self._submit(vis, ir, plan, seeds, record=False, overlap=overlap)

    @torch.inference_mode()
    def record(
        self,
        shapes: Sequence[tuple[int, int, int]],
        *,
        steps: int | None = None,
        sampler: SamplerName | None = None,
        outputs: Collection[OutputName] = ALL_OUTPUTS,
        levels: bool = False,
        exposure: Exposure | None = None,
        later: bool = False,
    ) -> None:
        """Make runs of shapes (B, H, W) ready, so that the first request is no slower than the others.

        levels: for uint8 images. later: by `record_due`. Without graphs each shape is run once, which fills the
        allocator's caches. So is a shape that cannot be recorded.
        """
        plan = self.model.plan(steps=steps, sampler=sampler, outputs=outputs, exposure=exposure)
        dtype = torch.uint8 if levels else torch.float32
        for batch, height, width in shapes:
            if later and self._programs is not None:
                self._programs.want(ProgramKey.of(plan, batch, height, width, levels=levels))
                continue
            vis = torch.zeros(batch, 3, height, width, dtype=dtype)
            self._submit(vis, vis[:, :1], plan, 0, record=True).result()

    def _submit(
        self,
        vis: Images,
        ir: Images,
        plan: FusionPlan,
        seeds: int | Sequence[int],
        *,
        record: bool,
        overlap: Levels | Sequence[Levels] | None = None,
    ) -> Pending:
        batch, height, width = require_images(vis, ir)
        each_seed = seed_list(seeds, batch)
        if overlap is not None:
            for shape in {levels.shape for levels in overlap} or {()}:
                require_overlap((len(overlap), *shape), batch, height, width)
        partial = overlap is not None
        with full_float32():
            if self._programs is not None:
                size = next((size for size in self.batch_sizes if size >= batch), batch)
                key = ProgramKey.of(plan, size, height, width, levels=are_levels(vis), partial=partial)
                if (program := self._programs.get(key, record=record)) is not None:
                    fill = size - batch
                    self._num_recorded_runs += 1
                    seeds_filled = each_seed + each_seed[-1:] * fill
                    images = [filled(each, fill) for each in (vis, ir, overlap) if each is not None]
                    pending = program.submit(images, seeds_filled, plan.timesteps)
                    return Pending(lambda: _first(pending.result(), batch)) if fill else pending
            self._num_eager_runs += 1
            output = self._eager_alone(together(vis), together(ir), plan, each_seed, overlap)
            return Pending(lambda: output)

    def _eager_alone(
        self,
        vis: Tensor,
        ir: Tensor,
        plan: FusionPlan,
        seeds: Sequence[int],
        overlap: Levels | Sequence[Levels] | None,
    ) -> FusionOutput:
        """`_eager`; a pair that does not fit beside recorded runs is worth more than these. A batch may be halved."""
        try:
            return self._eager(vis, ir, plan, seeds, overlap)
        except (RuntimeError, MemoryError) as error:
            if len(vis) > 1 or not self._makes_room(error):
                raise
        # Out here, where nothing knows the error any more, and with it what the failed run had in memory.
        return self._eager(vis, ir, plan, seeds, overlap)

    def _makes_room(self, error: Exception) -> bool:
        """Give up what is recorded, if that may help after an error."""
        if self._programs is None or not len(self._programs) or fault_of(error) is not Fault.MEMORY:
            return False
        let_go(error)
        logger.warning(
            "recorded runs are given up for a pair that does not fit beside them",
            extra={"programs": len(self._programs), "bytes": self._programs.size_bytes},
        )
        self._programs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _eager(
        self,
        vis: Tensor,
        ir: Tensor,
        plan: FusionPlan,
        seeds: Sequence[int],
        overlap: Levels | Sequence[Levels] | None = None,
    ) -> FusionOutput:
        like = torch.empty(self.model.latent_shape(len(vis), *vis.shape[-2:]), device=self.device)
        draw = noise_like(seeds, like)
        partial = None
        if overlap is not None:
            shares = together(overlap).to(self.device).float() / 255
            partial = Overlap(shares, lambda matrix: torch.from_numpy(matrix).to(self.device))
        on_device = vis.to(self.device), ir.to(self.device)
        output, is_finite = self.model.run(*on_device, plan, draw, self._supplies.conditions, overlap=partial)
        require_finite(is_finite)
        return FusionOutput(*(_moved(image, vis.device) for image in (output.fused, output.vis, output.ir)))


def _first(output: FusionOutput, count: int) -> FusionOutput:
    images = (output.fused, output.vis, output.ir)
    return FusionOutput(*(None if image is None else image[:count] for image in images))


def _moved(image: Tensor | None, device: torch.device) -> Tensor | None:
    return None if image is None else image.to(device)
