"""What the graphs compute, in ONNX Runtime, against torch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recofuse_core.checkpoint import load_pretrained, read_header, save_checkpoint
from recofuse_core.degradations.recipes import degrade_vis
from recofuse_core.errors import ConfigError
from recofuse_core.exposure import brightened
from recofuse_core.finishing import widen_range
from recofuse_core.graphs import export
from recofuse_core.graphs.runtime import ZEROS_PATH
from recofuse_core.model import ReCoFuse
from recofuse_core.networks import ToneConfig
from recofuse_core.sampler import Pair
from recofuse_core.scenes.scene import make_scene
from recofuse_core.veil import Fall, VeilConfig
from recofuse_core.weather import WeatherConfig
from tests.core.test_brightening import night_model
from tests.core.tiny import GATED, images_of, pairs, tiny_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

WEIGHTS = Path(export.__file__).parents[1] / "weights"
SIZES = [(256, 320), (480, 640), (608, 800)]


def session(graph: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    content = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def results(runner: Any, *values: Tensor) -> list[np.ndarray]:
    names = [item.name for item in runner.get_inputs()]
    return runner.run(None, {name: value.contiguous().numpy() for name, value in zip(names, values, strict=True)})  # type: ignore[no-any-return]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def complete() -> ReCoFuse:
    """All but the lighting, which is most of what there is to export."""
    tone = ToneConfig(grid=16, num_quantiles=8, width=16)
    weather = WeatherConfig(channels=(4, 4, 4), blocks=(0, 0, 0))
    fusion = replace(GATED.fusion, context_pool=4)  # wide frames have more squares than a context keeps
    model = tiny_model(replace(GATED, fusion=fusion, tone=tone, weather=weather, widening=0.4, steps=1))
    # A fresh random head would burn out every frame, and differences with it.
    for name, parameter in model.named_parameters():
        if name.startswith("tone.layers.4"):
            parameter.data *= 0.1
    return model


def assert_levels(actual: np.ndarray, expected: Tensor) -> None:
    """One level of 255 at most, in less than a thousandth of the values."""
    levels = np.abs((actual * 255).round() - (expected.numpy() * 255).round())
    assert actual.shape == tuple(expected.shape)
    assert levels.max() <= 1
    assert (levels > 0).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_picture_is_that_of_torch() -> None:
    model = complete()
    plan = model.plan()
    runner = session(export.to_graph(export.picture_of(model, plan), folded=True))
    for (height, width), batch in zip(SIZES, (3, 1, 1), strict=True):
        vis, ir = pairs(batch, height, width)
        shape = model.latent_shape(batch, height, width)
        draw = Pair(noise(*shape), noise(*shape, seed=1))
        with torch.inference_mode():
            expected, _ = model.run(vis, ir, plan, lambda draw=draw: draw)  # type: ignore[misc]
        actual = results(runner, vis, ir, *draw)
        for picture, image in zip(actual, images_of(expected), strict=True):
            assert_levels(picture, image)


def test_a_picture_of_a_night_undoes_what_brightened_infrared() -> None:
    """What is exported, run by torch: the lighting takes minutes to export."""
    model = night_model()
    plan = model.plan(exposure="lit", outputs=["fused", "ir"])
    vis, ir = pairs(2, 64, 48)
    dark = Pair(0.15 * vis, 0.1 * ir)
    _, brightened_by = model.levelled(dark, "lit")
    assert brightened_by is not None
    assert float(brightened_by.amount.min()) > 0.3
    shape = model.latent_shape(2, 64, 48)
    draw = Pair(noise(*shape), noise(*shape, seed=1))
    with torch.inference_mode():
        pictures = export.picture_of(model, plan).module(*dark, *draw)
        expected, _ = model.run(*dark, plan, lambda: draw)
    for picture, image in zip(pictures, images_of(expected), strict=True):
        assert_levels(picture.numpy(), image)


@pytest.mark.parametrize("knows_fall", [True, False])
def test_the_graph_that_finds_veils_is_given_what_fell_whatever_its_weights_make_of_it(knows_fall: bool) -> None:
    """One call serves weights of both kinds: runtimes feed its inputs in their order."""
    sizes = VeilConfig(cells=16, channels=(4, 6, 8), num_levels=3, knows_fall=knows_fall)
    model = tiny_model(replace(GATED, veil=sizes)).requires_grad_(False)
    assert model.veil is not None
    for parameter in model.veil.parameters():
        parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(parameter)))
    runner = session(export.to_graph(export.parts_of(model)["veil"]))
    assert [item.name for item in runner.get_inputs()] == ["vis", "ir", "seen", "before", "fell"]
    vis, ir = pairs(2, 71, 50)
    fall = Fall(torch.tensor([0.0, 0.7]), vis + 0.2)
    veil = model.veil(vis, ir, vis, fall)
    assert veil.darkened is not None
    expected = (veil.share, veil.darkened, veil.light, veil.left, veil.grid.entries)
    for actual, tensor in zip(results(runner, vis, ir, vis, fall.before, fall.share), expected, strict=True):
        np.testing.assert_allclose(actual, tensor.numpy(), atol=2e-5)


def test_a_sampler_that_draws_at_every_step_is_no_graph() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="draws noise at every step"):
        export.picture_of(model, model.plan(sampler="euler"))


BEFORE = ("weather", "clear", "tone", "light", "veil", "lift")
AFTER = ("detail_fused", "detail_vis", "detail_ir", "widen")
SHIPPED = (*BEFORE, "encode", "encode_ir", "predict", "fuse", "fuse_skips", "decode", *AFTER)


def metadata(path: Path) -> dict[str, str]:
    entries = onnx.load(path, load_external_data=False).metadata_props
    return {entry.key: entry.value for entry in entries}


@pytest.mark.parametrize("part", SHIPPED)
def test_shipped_graphs_belong_to_the_shipped_weights(part: str) -> None:
    header = read_header(WEIGHTS / "compact.safetensors")
    known = metadata(WEIGHTS / f"compact.{part}.onnx")
    assert known["recofuse.checksum"] == header.checksum
    assert known["recofuse.version"] == header.info.version
    assert known["recofuse.part"] == part


def test_the_graph_of_a_step_says_what_a_runtime_has_to_know() -> None:
    about = json.loads(metadata(WEIGHTS / "compact.predict.onnx")["recofuse.about"])
    model = load_pretrained("compact")
    assert (about["sampler"], about["steps"]) == (model.config.sampler, model.config.steps)
    assert about["can_light"] == (model.exposure is not None)
    assert about["clears"] == (model.weather is not None)
    assert about["lifts_veil"] == (model.veil is not None)
    assert about["details"] == (model.detail is not None)
    assert set(about["parts"]) == set(SHIPPED)


@pytest.mark.slow
def test_shipped_graphs_compute_what_torch_does() -> None:
    model = load_pretrained("compact").requires_grad_(False)
    runners = {part: session(WEIGHTS / f"compact.{part}.onnx") for part in SHIPPED}
    vis, ir = pairs(2, 91, 133)  # any size
    for actual, expected in zip(results(runners["tone"], vis, ir), model.normalise(Pair(vis, ir)), strict=True):
        np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)
    night = Pair(0.08 * vis, 0.1 * ir)
    images, by = brightened(model.normalise(model.light(night)), night.vis)
    assert float(by.amount.min()) > 0.3
    for actual, expected in zip(results(runners["light"], *night), (*images, *by), strict=True):
        np.testing.assert_allclose(actual, expected.numpy(), atol=2e-5)
    scene = make_scene(0, 160, 192)
    rainy = degrade_vis(scene.vis, torch.Generator().manual_seed(0), "strong", ["downpour"]).image
    weather = Pair(torch.stack([rainy, scene.vis]), scene.ir[:1].expand(2, 1, -1, -1))
    share, *seen = (torch.from_numpy(part) for part in results(runners["weather"], *weather))
    assert share[0] > 0 == share[1]
    (actual,) = results(runners["clear"], weather.vis, share, *seen)
    cleared = model.clear(weather).vis
    assert float((cleared[0] - rainy).abs().mean()) > 0.01
    np.testing.assert_allclose(actual, cleared.numpy(), atol=2e-5)
    foggy = degrade_vis(scene.vis, torch.Generator().manual_seed(0), "strong", ["fog"]).image
    fall = Fall(torch.tensor([0.0, 0.0, 1.0]), torch.stack([foggy, scene.vis, rainy]))
    veiled = Pair(torch.stack([foggy, scene.vis, cleared[0]]), scene.ir[:1].expand(3, 1, -1, -1))
    toned = model.normalise(veiled)
    found = results(runners["veil"], *toned, veiled.vis, fall.before, fall.share)
    share, *veil = (torch.from_numpy(part) for part in found)
    assert share[0] > 0 == share[1]
    assert share[2] > 0.9
    lifted = model.unveil(veiled, fall).vis
    assert float((lifted[0] - foggy).abs().mean()) > 0.01
    actual = results(runners["lift"], toned.vis, veiled.vis, share, *veil)[0]
    np.testing.assert_allclose(actual, lifted.numpy(), atol=2e-4)
    image, grey = pairs(2, 96, 64, seed=1)
    latent, skips = model.autoencoder.encode(image)
    other, other_skips = model.autoencoder.encode(image.flip(0))
    grey_latent, grey_skips = model.autoencoder.encode(grey.expand(-1, 3, -1, -1))
    prediction = model.predict(Pair(latent, other), Pair(other, latent), 38)
    step = torch.tensor([38])
    detail, treated = model.detail, torch.tensor([0.0, 0.7]).view(2, 1, 1, 1)
    assert detail is not None
    shown = Pair(image, grey)
    expectations = {
        "encode": ((image,), (latent, *skips)),
        "encode_ir": ((grey,), (grey_latent, *grey_skips)),
        "predict": ((latent, other, other, latent, step), tuple(prediction.output)),
        "fuse": ((latent, other), (model.final_fusion(Pair(latent, other)),)),
        "fuse_skips": ((*skips, *other_skips), model.autoencoder.fuse_skips(skips, other_skips)),
        "decode": ((latent, *skips), (model.autoencoder.decode(latent, skips, (96, 64)),)),
        "detail_fused": ((image.flip(0), treated, *shown), (detail("fused", image.flip(0), shown, treated),)),
        "detail_vis": ((image.flip(0), treated, image), (detail("vis", image.flip(0), shown, treated),)),
        "detail_ir": ((image, grey), (detail("ir", image, shown, treated),)),
        "widen": ((image,), (widen_range(image, model.config.widening),)),
    }
    for part, (values, outputs) in expectations.items():
        for actual, expected in zip(results(runners[part], *values), outputs, strict=True):
            np.testing.assert_allclose(actual, expected.numpy(), atol=2e-5, rtol=1e-5, err_msg=part)


@pytest.mark.slow
def test_a_graph_that_points_to_weights_reads_them_there(tmp_path: Path) -> None:
    model = tiny_model()
    checkpoint = tmp_path / "tiny.safetensors"
    save_checkpoint(checkpoint, model.state_dict(), model.config, name="tiny", version="1")
    stored = load_pretrained(checkpoint).requires_grad_(False)
    graph = export.point_to(export.to_graph(export.parts_of(stored)["fuse"]), checkpoint)
    path = tmp_path / "tiny.fuse.onnx"
    path.write_bytes(graph.SerializeToString(deterministic=True))
    vis, ir = noise(1, 4, 6, 8), noise(1, 4, 6, 8, seed=1)
    (actual,) = results(session(path), vis, ir)
    np.testing.assert_allclose(actual, stored.final_fusion(Pair(vis, ir)).numpy(), atol=1e-5)


def test_the_graph_of_zeros_is_as_it_is_written(tmp_path: Path) -> None:
    export.write_zeros(tmp_path / "zeros.onnx")
    assert (tmp_path / "zeros.onnx").read_bytes() == ZEROS_PATH.read_bytes()
    (zeros,) = session(ZEROS_PATH).run(None, {"shape": np.array([2, 3, 4])})
    np.testing.assert_array_equal(zeros, np.zeros((2, 3, 4), np.float32), strict=True)
