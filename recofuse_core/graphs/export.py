"""The model as ONNX graphs: its parts, from which a runtime puts a picture together as `picture.run` does.

A graph holds no weights. They lie in the checkpoint beside it, where ONNX's external data points: a safetensors file
keeps every tensor as plain bytes at a known place. What is made of them (portable.py) is in the graph, computed once
when a runtime loads it.

Sizes are free: batch, height and width of every image and latent. Latents are an eighth of an image's sides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recofuse_core.bilateral import BilateralGrid
from recofuse_core.checkpoint import CheckpointHeader, load_pretrained, pretrained_header, read_header
from recofuse_core.detail import DetailGate
from recofuse_core.errors import CheckpointError, ConfigError
from recofuse_core.exposure import brightened
from recofuse_core.finishing import widen_range
from recofuse_core.graphs.portable import PortableAutoencoder, portable_copy
from recofuse_core.graphs.runtime import CHECKSUM_KEY, DETAIL_PARTS, FORMAT_VERSION, PREFIX, VERSION_KEY
from recofuse_core.model import ReCoFuse, TorchNetworks
from recofuse_core.picture import ALL_OUTPUTS, LATENT_FACTOR, MIN_SIDE, PADDING, FusionPlan, OutputName, run
from recofuse_core.sampler import Pair
from recofuse_core.tiling import TilingConfig
from recofuse_core.veil import Fall, Veil
from recofuse_core.weather import WeatherSeen, without

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
MAX_SIDE = 1 << 20  # of an image, in pixels; the exporter wants to know one
SAMPLE = (2, 96, 64)  # batch, height and width that a graph is traced with
OWN = "model."  # before the names of the checkpoint


@dataclass(frozen=True)
class Part:
    """A piece of the model. inputs: a sample of each; shapes: what is free in it; outputs: their names."""

    module: nn.Module
    inputs: dict[str, Tensor]
    shapes: dict[str, dict[int, Any]]
    outputs: tuple[str, ...]


class _Of(nn.Module):
    """A module around the model whose parameters keep their names behind "model."."""

    def __init__(self, model: ReCoFuse) -> None:
        super().__init__()
        self.model = model


class _Weather(_Of):
    def forward(self, vis: Tensor, ir: Tensor) -> tuple[Tensor, ...]:
        assert self.model.weather is not None
        seen = self.model.weather.look(vis, ir)
        return self.model.weather.share(seen.coarse), *seen


class _Clear(_Of):
    def forward(self, vis: Tensor, share: Tensor, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        assert self.model.weather is not None
        return without(vis, self.model.weather.added(WeatherSeen(fine, middle, coarse)), share)


class _Tone(_Of):
    def forward(self, vis: Tensor, ir: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.normalise(Pair(vis, ir))


class _Light(_Of):
    def forward(self, vis: Tensor, ir: Tensor) -> tuple[Tensor, ...]:
        images, by = brightened(self.model.normalise(self.model.light(Pair(vis, ir))), vis)
        return *images, *by


class _Veil(_Of):
    def forward(self, vis: Tensor, ir: Tensor, seen: Tensor, before: Tensor, fell: Tensor) -> tuple[Tensor, ...]:
        assert self.model.veil is not None
        veil = self.model.veil(vis, ir, seen, Fall(fell, before))
        assert veil.darkened is not None
        return veil.share, veil.darkened, veil.light, veil.left, veil.grid.entries


class _Lift(_Of):
    def forward(
        self, vis: Tensor, onto: Tensor, share: Tensor, darkened: Tensor, light: Tensor, left: Tensor, grid: Tensor
    ) -> Tensor:
        return Veil(share, light, left, BilateralGrid(grid), darkened).lifted(vis, onto)


class _Encode(_Of):
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        autoencoder = self.model.autoencoder
        if image.shape[1] == 1 and not isinstance(autoencoder, PortableAutoencoder):
            image = image.expand(-1, 3, -1, -1)
        latent, skips = autoencoder.encode(image)
        return latent, *skips


class _Predict(_Of):
    def forward(self, vis: Tensor, ir: Tensor, vis_mu: Tensor, ir_mu: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        prediction = self.model.predict(Pair(vis, ir), Pair(vis_mu, ir_mu), timestep)
        return (*prediction.output, prediction.start.vis) if _gives_start(self.model) else tuple(prediction.output)


class _Fuse(_Of):
    def forward(self, vis: Tensor, ir: Tensor) -> Tensor:
        return self.model.final_fusion(Pair(vis, ir))


class _FuseSkips(_Of):
    def forward(self, *skips: Tensor) -> tuple[Tensor, ...]:
        half = len(skips) // 2
        return self.model.autoencoder.fuse_skips(skips[:half], skips[half:])


class _Decode(_Of):
    def forward(self, latent: Tensor, *skips: Tensor) -> Tensor:
        size = (latent.shape[-2] * LATENT_FACTOR, latent.shape[-1] * LATENT_FACTOR)
        return self.model.autoencoder.decode(latent, skips, size)


class _Detail(_Of):
    def __init__(self, model: ReCoFuse, name: OutputName) -> None:
        super().__init__(model)
        self.name = name

    def forward(self, image: Tensor, *seen: Tensor) -> Tensor:
        assert self.model.detail is not None
        gate: DetailGate = self.model.detail.get_submodule(self.name)  # type: ignore[assignment]
        detailed: Tensor = gate(image, None, *seen) if self.name == "ir" else gate(image, *seen)
        return detailed


class _Widen(_Of):
    def forward(self, image: Tensor) -> Tensor:
        return widen_range(image, self.model.config.widening)


def _gives_start(model: ReCoFuse) -> bool:
    """Whether a step's result says where its branches started: what a noise is removed from."""
    return model.config.denoiser.prediction == "noise" and model.config.coupling == "every_step"


def parts_of(model: ReCoFuse) -> dict[str, Part]:
    """All parts of a model, by name.

    weather: vis (B, 3, H, W) and ir (B, 1, H, W) in [0, 1], sides multiples of 16, to how much weather is to be taken
    off, (B,), and what clear needs besides to give vis without it; there if the model has an estimator of it.
    tone, light: vis (B, 3, H, W) and ir (B, 1, H, W) in [0, 1] to the same under tone curves, of any size from 32 px;
    light makes the photograph of a well exposed scene first, and infrared brighter; it gives an amount besides, which
    `Brightening` undoes, and how far they are lit nights, (B, 1, 1, 1) both; it is there if the model has an estimator.
    veil: what tone gives, vis as tone got it, and before weather was taken off, and how much of that was, (B,), to how
    much of a veil is to be lifted, and how much of one tone took, (B,) both, and what lift needs besides to give vis
    without it, as far as there was one, and else another frame, `onto`; there if the model has an estimator of it.
    encode: an image (B, 3, H, W), sides multiples of 16, to its latent and skips; encode_ir: one (B, 1, H, W) that
    stands for three equal channels, which is cheaper. predict: states and degraded latents
    at a time step (1,) to what the model predicts of both, and where both branches started if it predicts noise.
    fuse: restored latents to the fused one. fuse_skips: all of vis, then all of ir. decode: a latent and skips to an
    image, not clamped. detail_fused, detail_vis, detail_ir: a decoded fused, visible or infrared image, how far the
    visible frame was treated (but for ir), (B, 1, 1, 1), and what it is of, vis, ir or both at its size, as they were
    encoded, to the image with their detail; there if the model has gates for it. widen: a fused image, clamped, to
    one of wider range.
    """
    stepwise = portable_copy(model, is_step_fixed=False)
    batch, height, width = SAMPLE
    any_batch = torch.export.Dim("batch", min=1, max=4096)
    sides = [torch.export.Dim(name, min=MIN_SIDE, max=MAX_SIDE) for name in ("height", "width")]
    rows, columns = (torch.export.Dim(name, min=2, max=MAX_SIDE // PADDING) for name in ("rows", "columns"))

    def frame(channels: int) -> Tensor:
        return torch.linspace(0, 1, batch * channels * (height + 1) * width).view(batch, channels, height + 1, width)

    def scaled(factor: int) -> dict[int, Any]:
        return {0: any_batch, 2: factor * rows, 3: factor * columns}

    latent = torch.zeros(model.latent_shape(batch, height, width))
    latent_sides = scaled(PADDING // LATENT_FACTOR)
    image = torch.zeros(batch, 3, height, width)
    grey = image[:, :1].contiguous()
    with torch.no_grad():
        skips = model.autoencoder.encode(image)[1]
    factors = [PADDING * skip.shape[-2] // height for skip in skips]
    numbered = [f"skip_{index}" for index in range(len(skips))]
    any_size = {0: any_batch, 2: sides[0], 3: sides[1]}
    pair = {"vis": frame(3), "ir": frame(1)}
    pair_shapes = {"vis": any_size, "ir": any_size}
    latents = dict.fromkeys(("vis", "ir", "vis_mu", "ir_mu"), latent)
    both = {f"{mode}_{name}": skip for mode in ("vis", "ir") for name, skip in zip(numbered, skips, strict=True)}
    both_shapes = [scaled(factor) for _ in range(2) for factor in factors]
    predicted = ("vis_output", "ir_output", "start") if _gives_start(model) else ("vis_output", "ir_output")

    parts = {}
    if model.weather is not None:
        frames = {"vis": image, "ir": grey}
        with torch.no_grad():
            seen = model.weather.look(**frames)
        found = {"share": torch.zeros(batch)} | seen._asdict()
        found_shapes = {"share": {0: any_batch}} | {
            name: scaled(PADDING * part.shape[-2] // height) for name, part in seen._asdict().items()
        }
        parts["weather"] = Part(_Weather(stepwise), frames, dict.fromkeys(frames, scaled(PADDING)), tuple(found))
        parts["clear"] = Part(
            _Clear(stepwise),
            {"vis": image} | found,
            {"vis": scaled(PADDING)} | found_shapes,
            ("cleared_vis",),
        )
    parts["tone"] = Part(_Tone(stepwise), pair, pair_shapes, ("toned_vis", "toned_ir"))
    if model.exposure is not None:
        parts["light"] = Part(_Light(stepwise), pair, pair_shapes, ("toned_vis", "toned_ir", "brightened_by", "lit"))
    if model.veil is not None:
        side = model.veil.config.cells // 4
        veil = {
            "share": torch.zeros(batch),
            "darkened": torch.zeros(batch),
            "light": torch.zeros(batch, 3, side, side),
            "left": torch.zeros(batch, 3, side, side),
            "grid": torch.zeros(batch, 1, model.veil.config.num_levels, side, side),
        }
        parts["veil"] = Part(
            _Veil(stepwise),
            pair | {"seen": frame(3), "before": frame(3), "fell": torch.zeros(batch)},
            pair_shapes | {"seen": any_size, "before": any_size, "fell": {0: any_batch}},
            tuple(veil),
        )
        parts["lift"] = Part(
            _Lift(stepwise),
            {"vis": frame(3), "onto": frame(3)} | veil,
            {"vis": any_size, "onto": any_size} | {name: {0: any_batch} for name in veil},
            ("lifted_vis",),
        )
    encoded = ("latent", *numbered)
    parts["encode"] = Part(_Encode(stepwise), {"image": image}, {"image": scaled(PADDING)}, encoded)
    parts["encode_ir"] = Part(_Encode(stepwise), {"image": grey}, {"image": scaled(PADDING)}, encoded)
    parts["predict"] = Part(
        _Predict(stepwise),
        latents | {"timestep": torch.ones(1, dtype=torch.int64)},
        dict.fromkeys(latents, latent_sides) | {"timestep": {}},
        predicted,
    )
    parts["fuse"] = Part(
        _Fuse(stepwise),
        dict.fromkeys(("vis", "ir"), latent),
        {"vis": latent_sides, "ir": latent_sides},
        ("latent",),
    )
    parts["fuse_skips"] = Part(_FuseSkips(stepwise), both, dict(zip(both, both_shapes, strict=True)), tuple(numbered))
    parts["decode"] = Part(
        _Decode(stepwise),
        {"latent": latent} | dict(zip(numbered, skips, strict=True)),
        {"latent": latent_sides} | {name: scaled(factor) for name, factor in zip(numbered, factors, strict=True)},
        ("image",),
    )
    if model.detail is not None:
        of_vis, of_ir = {"treated": torch.zeros(batch, 1, 1, 1), "vis": image}, {"ir": grey}
        sources_of: dict[OutputName, dict[str, Tensor]] = {"fused": of_vis | of_ir, "vis": of_vis, "ir": of_ir}
        for output, sources in sources_of.items():
            shown = {"image": image} | sources
            shapes = {name: {0: any_batch} if name == "treated" else scaled(PADDING) for name in shown}
            parts[DETAIL_PARTS[output]] = Part(_Detail(stepwise, output), shown, shapes, ("detailed",))
    parts["widen"] = Part(_Widen(stepwise), {"image": frame(3)}, {"image": any_size}, ("widened",))
    return parts


class _Picture(_Of):
    """A whole picture at fixed steps."""

    def __init__(self, model: ReCoFuse, plan: FusionPlan) -> None:
        super().__init__(model)
        self.plan = plan

    def forward(self, vis: Tensor, ir: Tensor, noise_vis: Tensor, noise_ir: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        images, brightened_by, treated = model.delivered(Pair(vis, ir), self.plan.exposure)
        prepared = Pair(images.vis, images.ir.expand(-1, 3, -1, -1))

        def finish(name: OutputName, decoded: Tensor) -> Tensor:
            image = decoded.clamp(0.0, 1.0)
            if name == "fused":
                return widen_range(image, model.config.widening)
            if name == "ir":
                image = image.mean(dim=1, keepdim=True)
                return image if brightened_by is None else brightened_by.undone(image)
            return image

        networks = TorchNetworks(model, model.condition)
        size: Any = tuple(vis.shape[-2:])
        noise = Pair(noise_vis, noise_ir)
        pictures, _ = run(networks, model.sde, self.plan, prepared, size, lambda: noise, finish, treated=treated)
        return tuple(pictures[name] for name in ALL_OUTPUTS if name in pictures)


def picture_of(model: ReCoFuse, plan: FusionPlan) -> Part:
    """All that makes a plan's pictures, for frames whose sides are multiples of 16.

    vis (B, 3, H, W) and ir (B, 1, H, W) in [0, 1], standard normal noise_vis and noise_ir like the latents, to the
    plan's outputs, fused before vis before ir, in [0, 1]. Raises ConfigError for a sampler that draws at every step.
    """
    if plan.num_draws > 1:
        raise ConfigError(f"the sampler {plan.sampler} draws noise at every step; a graph takes one draw")
    plan = dataclasses.replace(plan, tiling=TilingConfig(max_pixels=MAX_SIDE**2))
    batch, height, width = SAMPLE
    any_batch = torch.export.Dim("batch", min=1, max=4096)
    rows, columns = (torch.export.Dim(name, min=2, max=MAX_SIDE // PADDING) for name in ("rows", "columns"))
    sides = {0: any_batch, 2: PADDING * rows, 3: PADDING * columns}
    halves = {0: any_batch, 2: 2 * rows, 3: 2 * columns}
    noise = torch.zeros(model.latent_shape(batch, height, width))
    return Part(
        _Picture(portable_copy(model, is_step_fixed=True), plan),
        {
            "vis": torch.zeros(batch, 3, height, width),
            "ir": torch.zeros(batch, 1, height, width),
            "noise_vis": noise,
            "noise_ir": noise,
        },
        {"vis": sides, "ir": sides, "noise_vis": halves, "noise_ir": halves},
        tuple(name for name in ALL_OUTPUTS if name in plan.outputs),
    )


def to_graph(part: Part, *, folded: bool = False) -> ModelProto:
    """A part as a graph with its weights inside, in float32.

    They are named as in the checkpoint, and what is computed of them is in the graph; `folded` computes it here.
    """
    _require_onnx()
    from onnxscript.optimizer import fold_constants, optimize, remove_unused_nodes

    with torch.no_grad(), _quietly(), contextlib.redirect_stdout(io.StringIO()):
        exported = torch.export.export(
            part.module,
            tuple(tensor.clone() for tensor in part.inputs.values()),  # one tensor twice would be one input
            dynamic_shapes=_by_argument(part),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,  # what pooling asks of sizes holds for all of them
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
        )
        assert program is not None
        if folded:
            fold_constants(program.model, input_size_limit=1 << 30, output_size_limit=1 << 30)
            remove_unused_nodes(program.model)
        else:  # small things alone, such as the arithmetic of shapes: weights stay what the checkpoint holds
            optimize(program.model, input_size_limit=64, output_size_limit=1024)
    graph: ModelProto = program.model_proto
    return _cleaned(graph)


def point_to(graph: ModelProto, checkpoint: Path) -> ModelProto:
    """The graph with its weights in a checkpoint beside it, which it reads by the file's name."""
    onnx = _require_onnx()
    tensors, start = _layout(checkpoint)
    pointing = type(graph)()
    pointing.CopyFrom(graph)
    casts = []
    for tensor in pointing.graph.initializer:
        name = tensor.name.removeprefix(OWN)
        if name not in tensors:
            continue
        kind, shape, (begin, end) = (tensors[name][key] for key in ("dtype", "shape", "data_offsets"))
        if shape != list(tensor.dims):
            raise CheckpointError(f"{checkpoint} holds {name} as {shape}, the model as {list(tensor.dims)}")
        if kind == "F16":
            casts.append(onnx.helper.make_node("Cast", [name], [tensor.name], to=onnx.TensorProto.FLOAT))
            tensor.name = name
        tensor.data_type = onnx.TensorProto.FLOAT16 if kind == "F16" else onnx.TensorProto.FLOAT
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": checkpoint.name, "offset": start + begin, "length": end - begin}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
    nodes = [*casts, *pointing.graph.node]
    del pointing.graph.node[:]
    pointing.graph.node.extend(nodes)
    return pointing


def describe(graph: ModelProto, header: CheckpointHeader, **more: str) -> None:
    """Write into a graph's metadata whose it is; more: further entries."""
    entries = {
        VERSION_KEY: str(FORMAT_VERSION),
        PREFIX + "name": header.info.name,
        PREFIX + "version": header.info.version,
        CHECKSUM_KEY: header.checksum,
    } | {PREFIX + key: value for key, value in more.items()}
    del graph.metadata_props[:]
    for key, value in entries.items():
        graph.metadata_props.add(key=key, value=value)


def about(model: ReCoFuse, parts: Mapping[str, Part]) -> dict[str, object]:
    """What a runtime without torch has to know of a model beside its graphs; JSON."""
    config = model.config
    names = parts["encode"].outputs[1:]
    skips = [parts["decode"].inputs[name] for name in names]
    return {
        "preset": model.info.preset,
        "num_parameters": model.info.num_parameters,
        "parts": list(parts),
        "sampler": config.sampler,
        "steps": config.steps,
        "prediction": config.denoiser.prediction,
        "coupling": config.coupling,
        "sde": dataclasses.asdict(config.sde),
        "latent_channels": config.autoencoder.latent_channels,
        "latent_factor": LATENT_FACTOR,
        "padding": PADDING,
        "min_side": MIN_SIDE,
        "skips": [{"channels": skip.shape[1], "factor": SAMPLE[1] // skip.shape[-2]} for skip in skips],
        "widening": config.widening,
        "can_light": model.exposure is not None,
        "clears": model.weather is not None,
        "lifts_veil": model.veil is not None,
        "details": model.detail is not None,
    }


def write_parts(checkpoint: Path) -> list[Path]:
    """Write the graphs of a checkpoint's parts beside it, as NAME.PART.onnx. Returns their paths."""
    model, header = load_pretrained(checkpoint), read_header(checkpoint)
    parts = parts_of(model)
    paths = []
    for name, part in parts.items():
        graph = point_to(to_graph(part), checkpoint)
        more = {"about": json.dumps(about(model, parts), sort_keys=True)} if name == "predict" else {}
        describe(graph, header, part=name, **more)
        path = checkpoint.with_suffix(f".{name}.onnx")
        path.write_bytes(graph.SerializeToString(deterministic=True))
        paths.append(path)
    return paths


def write_picture(weights: str | Path, output: Path, **wishes: Any) -> ModelProto:
    """Write one graph that makes a whole picture, weights inside. wishes: as of `ReCoFuse.plan`.

    Raises CheckpointError for weights that do not load, ConfigError for wishes that cannot be had, or without onnx.
    """
    _require_onnx()
    model, header = load_pretrained(weights), pretrained_header(weights)
    plan = model.plan(**wishes)
    graph = to_graph(picture_of(model, plan), folded=True)
    describe(
        graph,
        header,
        part="picture",
        exposure=plan.exposure,
        sampler=plan.sampler,
        timesteps=json.dumps(plan.timesteps),
    )
    try:
        output.write_bytes(graph.SerializeToString(deterministic=True))
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}") from error
    return graph


def write_zeros(path: Path) -> None:
    """Write the graph of a shape (N,) to zeros of it, with which a runtime has arrays in the memory of its graphs."""
    onnx = _require_onnx()
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["zeros"])],
        "zeros",
        [helper.make_tensor_value_info("shape", kinds.INT64, ["rank"])],
        [helper.make_tensor_value_info("zeros", kinds.FLOAT, None)],
    )
    versions = [helper.make_opsetid("", OPSET)]
    ir_version = helper.find_min_ir_version_for(versions)
    model = helper.make_model(graph, opset_imports=versions, ir_version=ir_version, producer_name="recofuse")
    path.write_bytes(model.SerializeToString(deterministic=True))


def _cleaned(graph: ModelProto) -> ModelProto:
    """Without where in the sources everything came from, which is most of a graph's bytes.

    Shapes between the nodes stay: ONNX Runtime adds in blocks only what it knows to be of one shape.
    """
    graph.doc_string, graph.producer_name, graph.producer_version = "", "recofuse", ""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    graph.graph.doc_string = ""
    inner = graph.graph
    items: tuple[Any, ...] = (*inner.node, *inner.input, *inner.output, *inner.initializer, *inner.value_info)
    for item in items:
        item.doc_string = ""
        del item.metadata_props[:]
    return graph


def _layout(checkpoint: Path) -> tuple[dict[str, Any], int]:
    """Where the tensors of a safetensors file lie: its own table, by name, and where its first byte of data is."""
    with checkpoint.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table: dict[str, Any] = json.loads(file.read(length))
    table.pop("__metadata__", None)
    return table, 8 + length


def _by_argument(part: Part) -> tuple[Any, ...]:
    """The free sizes as `forward` takes its arguments: those of a starred one together."""
    shapes = tuple(part.shapes.values())
    kinds = [parameter.kind for parameter in inspect.signature(part.module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return shapes
    before = len(kinds) - 1
    return (*shapes[:before], shapes[before:])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's remarks on libraries that are not there and on its own code."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _require_onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ConfigError(
            f"writing ONNX needs {error.name}, which is not installed: pip install 'recofuse[export]'"
        ) from error
    return onnx
