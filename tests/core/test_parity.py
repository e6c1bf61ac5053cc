"""Against tensors recorded from the published modules; they lie beside the repository, if they are there at all.

The small published networks come in through the converter, as any released file would, so names and shapes are checked
on the way. Tolerances are relative to the standard deviation of what was recorded.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from recofuse_core import model as model_module
from recofuse_core.checkpoint import load_checkpoint, load_pretrained
from recofuse_core.layers import GatedConvBlock, LinearAttention, channel_norm, sinusoid
from recofuse_core.losses import fusion_loss, matching_loss
from recofuse_core.model import ReCoFuse
from recofuse_core.networks import PaperAutoencoder, Skips
from recofuse_core.published import convert_official, export_official, official_names
from recofuse_core.sampler import NoiseSource, Pair, Prediction, euler
from recofuse_core.sde import MeanRevertingSDE, ScheduleName, SDEConfig
from recofuse_core.training.objectives import encode_pair, final_fusion_loss, restoration_loss
from recofuse_core.training.optimisation import Lion

PARITY = Path(__file__).parents[2].parent / "shared" / "parity"
pytestmark = pytest.mark.skipif(not PARITY.is_dir(), reason="the recorded tensors are not beside the repository")

MODULE, CHAIN = 1e-4, 1e-3  # of the standard deviation
LEARNING_RATE = 3e-5
OFFICIAL_PADDING = 50  # px that the published test appends right and below by replication

Tensors = dict[str, Tensor]


def recorded(name: str) -> Tensors:
    return load_file(PARITY / f"{name}.safetensors")


def assert_agrees(actual: Tensor, expected: Tensor, tolerance: float = MODULE) -> None:
    assert actual.shape == expected.shape
    expected = expected.float()
    scale = float(expected.std()) if expected.numel() > 1 else float(expected.abs())
    difference = float((actual.detach().float() - expected).abs().max())
    assert difference <= tolerance * scale, f"differs by {difference / scale:.2e} of the standard deviation"


def convert(directory: Path, num_steps: int) -> Path:
    weights = recorded("weights")
    paths = {letter: directory / f"{letter}.pth" for letter in "GFL"}
    for letter, path in paths.items():
        torch.save({name[2:]: value for name, value in weights.items() if name[0] == letter}, path)
    output = directory / f"T{num_steps}.safetensors"
    convert_official(paths["G"], paths["F"], paths["L"], output, sde=SDEConfig(num_steps=num_steps))
    return output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("published"), 100)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ReCoFuse:
    return load_pretrained(checkpoint).requires_grad_(False)


@pytest.fixture(scope="module")
def autoencoder(model: ReCoFuse) -> PaperAutoencoder:
    assert isinstance(model.autoencoder, PaperAutoencoder)
    return model.autoencoder


def test_every_published_tensor_survives_the_round_trip(checkpoint: Path) -> None:
    config, state, _ = load_checkpoint(checkpoint)
    exported = export_official(state, config)
    again = {
        f"{letter}.{name}": value for letter, file in zip("GFL", exported, strict=True) for name, value in file.items()
    }
    weights = recorded("weights")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["even", "odd", "tiny"])
def test_autoencoder(autoencoder: PaperAutoencoder, tag: str) -> None:
    tensors = {name.removeprefix(f"{tag}."): value for name, value in recorded("ae").items() if name.startswith(tag)}
    latent, skips = autoencoder.encode(tensors["x"])
    assert_agrees(latent, tensors["z"])
    assert len(skips) == 9
    for index, skip in enumerate(skips):
        if f"h.{index}" in tensors:
            assert_agrees(skip, tensors[f"h.{index}"])
        else:
            assert_agrees(skip.mean(dim=(2, 3)), tensors[f"h.{index}.mean"])
    size = (tensors["x"].shape[-2], tensors["x"].shape[-1])
    assert_agrees(autoencoder.decode(latent, skips, size), tensors["y"])
    mirrored: Skips = tuple(skip.flip(-1) for skip in skips)
    assert_agrees(autoencoder.decode(tensors["z2"], autoencoder.fuse_skips(skips, mirrored), size), tensors["y2"])


def test_linear_attention() -> None:
    tensors = recorded("ae")
    attention = LinearAttention(16)
    attention.load_state_dict(
        {
            "to_qkv.weight": tensors["attn.to_qkv.weight"],
            "to_out.weight": tensors["attn.to_out.0.weight"],
            "to_out.bias": tensors["attn.to_out.0.bias"],
            "out_norm.gain": tensors["attn.to_out.1.g"].flatten(),
        }
    )
    assert_agrees(attention(tensors["attn.x"]), tensors["attn.y"])


@pytest.mark.parametrize(
    ("dtype", "eps", "tolerance"),
    # Half results are recorded with half statistics and ours have float32 ones: they differ by roundings.
    [(torch.float32, 1e-5, MODULE), (torch.float16, 1e-3, 4e-3), (torch.bfloat16, 1e-3, 5e-2)],
)
def test_channel_norm(dtype: torch.dtype, eps: float, tolerance: float) -> None:
    tensors = recorded("nafblock")
    gain, x = tensors["ln.g"].flatten().to(dtype), tensors["ln.x"].to(dtype)
    result = channel_norm(x, gain, eps)
    assert result.dtype == dtype
    assert_agrees(result, tensors[f"ln.y.{str(dtype).removeprefix('torch.')}"], tolerance)


def test_gated_conv_block() -> None:
    tensors = {name.removeprefix("block."): value for name, value in recorded("nafblock").items() if "block." in name}
    published = {
        "time_projection": "mlp.1",
        "expand1": "conv1",
        "depthwise": "conv2",
        "attention": "sca.1",
        "project1": "conv3",
        "expand2": "conv4",
        "project2": "conv5",
    }
    state = {
        f"{ours}.{part}": tensors[f"{theirs}.{part}"]
        for ours, theirs in published.items()
        for part in ("weight", "bias")
    }
    state |= {f"norm{i}.gain": tensors[f"norm{i}.g"].flatten() for i in (1, 2)}
    state |= {"beta": tensors["beta"], "gamma": tensors["gamma"]}
    block = GatedConvBlock(16, 64)
    block.load_state_dict(state)
    x, time = tensors["x"], tensors["t"]
    assert_agrees(block(x, block.modulation(time)), tensors["y"])
    assert_agrees(block(x, block.modulation(time[:1])), tensors["y_one_t"])


def test_time_embedding(model: ReCoFuse) -> None:
    tensors = recorded("dim")
    assert_agrees(sinusoid(tensors["time_emb.t"], 8), tensors["time_emb.sin"])
    assert_agrees(model.denoiser.vis.time(tensors["time_emb.t"]), tensors["time_emb.vis"])


@pytest.mark.parametrize("tag", ["even", "odd"])
@pytest.mark.parametrize("step", [None, 42])
def test_denoiser(model: ReCoFuse, tag: str, step: int | None) -> None:
    tensors = {name.removeprefix(f"{tag}."): value for name, value in recorded("dim").items()}
    timesteps = tensors["t"] if step is None else torch.tensor([step])
    suffix = "" if step is None else f"_t{step}"
    states = (tensors[name] for name in ("vis", "vis_cond", "ir", "ir_cond"))
    vis, ir = model.denoiser(*states, timesteps)
    assert_agrees(vis, tensors[f"out_vis{suffix}"])
    assert_agrees(ir, tensors[f"out_ir{suffix}"])


@pytest.mark.parametrize("tag", ["a", "b"])
def test_latent_fusion(model: ReCoFuse, tag: str) -> None:
    tensors = {name.removeprefix(f"{tag}."): value for name, value in recorded("tim").items()}
    fusion, vis, ir = model.fusion, tensors["vis"], tensors["ir"]
    assert_agrees(fusion.vis_attention(vis, ir), tensors["cross_vis"])
    assert_agrees(fusion.ir_attention(ir, vis), tensors["cross_ir"])
    assert_agrees(fusion(vis, ir, tensors["t"]), tensors["out"])
    assert_agrees(model.final_fusion(Pair(vis, ir)), tensors["out_t0"])


def test_conv_block_attention(model: ReCoFuse) -> None:
    tensors = recorded("tim")
    assert_agrees(model.fusion.ir_branch_attention(tensors["cbam.x"]), tensors["cbam.y"])


# --- diffusion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "schedule", "num_steps", "eps"),
    [
        ("cosine100", "cosine", 100, 0.005),
        ("cosine10", "cosine", 10, 0.005),
        ("linear100", "linear", 100, 0.005),
        ("cosine100_eps01", "cosine", 100, 0.01),
    ],
)
def test_schedule(tag: str, schedule: ScheduleName, num_steps: int, eps: float) -> None:
    tensors = {name.removeprefix(f"{tag}."): value for name, value in recorded("schedule").items()}
    sde = MeanRevertingSDE(SDEConfig(num_steps, 50.0, schedule, eps))
    assert sde.dt == pytest.approx(float(tensors["dt"]), rel=1e-5)
    assert sde.lam == pytest.approx(float(tensors["max_sigma"]), rel=1e-6)
    assert_agrees(torch.from_numpy(sde.theta).float(), tensors["thetas"])
    assert_agrees(torch.from_numpy(sde.theta_bar).float(), tensors["thetas_cumsum"])
    assert_agrees(torch.from_numpy(sde.sigma).float(), tensors["sigmas"])
    assert_agrees(torch.from_numpy(sde.sigma_bar).float(), tensors["sigma_bars"])
    assert_agrees(torch.from_numpy(sde.posterior_std[1:]).float(), tensors["posterior_std"])


@pytest.mark.parametrize("t", [1, 2, 50, 100])
def test_sde_steps(t: int) -> None:
    tensors = recorded("sde_steps")
    sde = MeanRevertingSDE(SDEConfig())
    x, mu, x0, noise = (tensors[name] for name in ("x", "mu", "x0", "noise_pred"))
    at_t = {name.removeprefix(f"t{t}."): value for name, value in tensors.items() if name.startswith(f"t{t}.")}
    draw = torch.cat([at_t["noise_vis"], at_t["noise_ir"]])
    clean = sde.clean_from_noise(x, mu, noise, t)
    rounded = 1e-3 if t == 2 else MODULE  # there the published code's float32 keeps four digits of 1 - alpha**2
    assert_agrees(sde.score(noise, t), at_t["score"])
    assert_agrees(sde.reverse_mean(x, mu, noise, t), at_t["reverse_sde_step_mean"])
    assert_agrees(sde.reverse_step(x, mu, noise, t, draw), at_t["reverse_sde_step"])
    assert_agrees(sde.reverse_ode_step(x, mu, noise, t), at_t["reverse_ode_step"])
    assert_agrees(sde.optimum_step(x, x0, mu, t), at_t["reverse_optimum_step"], rounded)
    assert_agrees(clean, at_t["x0_from_noise"])
    assert_agrees(sde.optimum_step(x, clean, mu, t), at_t["posterior_mean"], rounded)
    assert float(sde.posterior_std[t]) == pytest.approx(float(at_t["posterior_std"]), rel=1e-4, abs=1e-9)
    shared_draw = torch.cat([at_t["noise_vis"]] * 2)
    assert_agrees(sde.posterior_step(x, clean, mu, t, shared_draw), at_t["posterior_step"], rounded)
    assert_agrees(sde.marginal(x0, mu, t)[0], at_t["mu_bar"])
    assert_agrees(sde.noise_of(x, x0, mu, t), at_t["real_noise"])


def test_noisy_states_of_training() -> None:
    tensors = recorded("sde_steps")
    sde = MeanRevertingSDE(SDEConfig())
    for modality, rows in (("vis", slice(0, 2)), ("ir", slice(2, 4))):
        mean, std = sde.marginal(tensors["x0"][rows], tensors["mu"][rows], tensors["train.t"])
        assert_agrees(mean + std * tensors[f"train.noise_{modality}"], tensors[f"train.state_{modality}"])


# --- training ---------------------------------------------------------------------------------------------------------


def test_losses() -> None:
    tensors = recorded("losses")
    fused = tensors["fused"].clone().requires_grad_()
    terms = fusion_loss(fused, tensors["vis"], tensors["ir"])
    for term, name in ((terms.intensity, "intensity"), (terms.gradient, "gradient"), (terms.colour, "color")):
        assert float(term.detach()) == pytest.approx(float(tensors[name]), rel=1e-5)
    assert float(terms.total.detach()) == pytest.approx(float(tensors["total"]), rel=1e-5)
    (gradient,) = torch.autograd.grad(terms.total, fused)
    assert_agrees(gradient, tensors["fused_grad"])
    assert float(matching_loss(tensors["vis"], tensors["ir"])) == pytest.approx(float(tensors["matching_l1"]), rel=1e-6)


def published_parameters(model: ReCoFuse) -> Tensors:
    """The model's own parameters, not copies, by the names of weights.safetensors."""
    letters = {"generator": "G", "fusion": "F", "autoencoder": "L"}
    parameters = dict(model.named_parameters())
    return {f"{letters[p.file]}.{p.theirs}": parameters[p.ours] for p in official_names(model.config)}


def under(tensors: Tensors, prefix: str) -> Tensors:
    found = {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
    assert found
    return found


def assert_gradients_agree(parameters: Tensors, expected: Tensors) -> None:
    for name, value in expected.items():
        gradient = parameters[name].grad
        assert gradient is not None
        assert_agrees(gradient, value, CHAIN)


def assert_updates_agree(parameters: Tensors, expected: Tensors, num_updates: int) -> None:
    """Lion moves every entry by the learning rate; where the gradient is nearly zero its sign is chance."""
    for name, value in expected.items():
        difference = (parameters[name].detach() - value).abs()
        assert float(difference.max()) <= num_updates * 2.01 * LEARNING_RATE
        assert float((difference > LEARNING_RATE / 10).float().mean()) < 0.01


def test_training_iteration(checkpoint: Path) -> None:
    tensors = recorded("train_step")
    model = load_pretrained(checkpoint)
    assert isinstance(model.autoencoder, PaperAutoencoder)
    model.autoencoder.requires_grad_(False)
    parameters = published_parameters(model)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    branch_optimizer = Lion(model.denoiser.parameters(), lr=LEARNING_RATE)
    fusion_optimizer = Lion(model.fusion.parameters(), lr=LEARNING_RATE)

    mu, vis_skips, ir_skips = encode_pair(model, Pair(tensors["img.vis_lq"], tensors["img.ir_lq"]))
    clean, _, _ = encode_pair(model, Pair(tensors["img.vis_hq"], tensors["img.ir_hq"]))
    for pair, quality in ((mu, "lq"), (clean, "hq")):
        assert_agrees(pair.vis, tensors[f"latent.vis_{quality}"])
        assert_agrees(pair.ir, tensors[f"latent.ir_{quality}"])

    noise = Pair(tensors["noise_vis"], tensors["noise_ir"])
    vis_loss, ir_loss = restoration_loss(model, clean, mu, tensors["t"], noise)
    assert float(vis_loss.detach()) == pytest.approx(float(tensors["loss_vis"]), rel=1e-4)
    assert float(ir_loss.detach()) == pytest.approx(float(tensors["loss_ir"]), rel=1e-4)
    (vis_loss + ir_loss).backward()  # type: ignore[no-untyped-call]
    assert_gradients_agree(parameters, under(tensors, "grad"))
    assert_gradients_agree(parameters, under(tensors, "grad_restore"))
    branch_optimizer.step()
    fusion_optimizer.step()
    assert_updates_agree(parameters, under(tensors, "after_restore"), 1)
    assert all(not torch.equal(before[name], parameters[name]) for name in under(tensors, "after_restore"))

    with torch.no_grad():
        decoded = [
            model.autoencoder.decode(latent, skips, (48, 64))
            for latent, skips in zip(clean, (vis_skips, ir_skips), strict=True)
        ]
    assert_agrees(decoded[0], tensors["ref_vis"])
    assert_agrees(decoded[1], tensors["ref_ir"])
    fusion_optimizer.zero_grad()
    terms, image = final_fusion_loss(model, clean, (vis_skips, ir_skips), Pair(*decoded))
    assert_agrees(model.final_fusion(clean), tensors["fuse_latent"], CHAIN)
    assert_agrees(image, tensors["fuse_image"], CHAIN)
    for term, name in (
        (terms.total, ""),
        (terms.intensity, "_int"),
        (terms.gradient, "_grad"),
        (terms.colour, "_color"),
    ):
        assert float(term.detach()) == pytest.approx(float(tensors[f"loss_fuse{name}"]), rel=1e-4)
    terms.total.backward()  # type: ignore[no-untyped-call]
    assert_gradients_agree(parameters, under(tensors, "grad_fuse"))
    fusion_optimizer.step()
    assert_updates_agree(parameters, under(tensors, "after_fuse"), 2)


def test_restoration_targets(model: ReCoFuse) -> None:
    """What the restoration loss compares, piece by piece: states, fused state, predictions, means and optima."""
    tensors = recorded("train_step")
    t, sde = tensors["t"], model.sde
    mu = Pair(tensors["latent.vis_lq"], tensors["latent.ir_lq"])
    state = Pair(tensors["state_vis"], tensors["state_ir"])
    prediction = model.predict(state, mu, t)
    assert_agrees(prediction.start.vis, tensors["fused_state"])
    for index, modality in enumerate(("vis", "ir")):
        clean = tensors[f"latent.{modality}_hq"]
        mean, std = sde.marginal(clean, mu[index], t)
        assert_agrees(mean + std * tensors[f"noise_{modality}"], state[index])
        noise = prediction.output[index]
        assert_agrees(noise, tensors[f"pred_{modality}"])
        assert_agrees(sde.reverse_mean(prediction.start[index], mu[index], noise, t), tensors[f"expect_{modality}"])
        assert_agrees(sde.optimum_step(state[index], clean, mu[index], t), tensors[f"optimum_{modality}"])


# --- the whole chain --------------------------------------------------------------------------------------------------


def network_input(image: Tensor) -> Tensor:
    """(H, W, 3) or (H, W) bytes to (1, 3, H + 50, W + 50) in [0, 1]."""
    rgb = image.flip(-1).permute(2, 0, 1) if image.ndim == 3 else image.expand(3, -1, -1)
    return F.pad(rgb[None].float() / 255, (0, OFFICIAL_PADDING, 0, OFFICIAL_PADDING), "replicate")


def to_bytes(image: Tensor, like: Tensor) -> Tensor:
    """(1, 3, h, w) RGB to (H, W, 3) BGR bytes, the padding cropped. Integers wide enough for differences."""
    cropped = image[0, :, : like.shape[0], : like.shape[1]]
    return (cropped.clamp(0, 1) * 255).round().to(torch.int16).flip(0).permute(1, 2, 0)


def assert_one_level_apart(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert int((actual - expected.to(torch.int16)).abs().max()) <= 1


@pytest.fixture(scope="module", params=[10, 100])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ReCoFuse, Tensors]:
    num_steps: int = request.param
    model = load_pretrained(convert(tmp_path_factory.mktemp(f"chain{num_steps}"), num_steps)).requires_grad_(False)
    assert model.sde.num_steps == num_steps
    tensors = recorded("end_to_end")
    shared = {name: value for name, value in tensors.items() if not name.startswith("T")}
    return model, shared | under(tensors, f"T{num_steps}")


def playback(noise: Tensor) -> NoiseSource:
    draws: Iterator[Tensor] = iter(noise)
    return lambda: Pair(next(draws), next(draws))


def test_inputs(chain: tuple[ReCoFuse, Tensors]) -> None:
    _, tensors = chain
    assert torch.equal(network_input(tensors["vis_bgr_u8"]), tensors["vis_lq"])
    assert torch.equal(network_input(tensors["ir_u8"]), tensors["ir_lq"])


def test_coupled_chain(chain: tuple[ReCoFuse, Tensors]) -> None:
    model, tensors = chain
    num_steps, decode = model.sde.num_steps, model.autoencoder.decode
    size = (tensors["vis_lq"].shape[-2], tensors["vis_lq"].shape[-1])
    vis_mu, vis_skips = model.autoencoder.encode(tensors["vis_lq"])
    ir_mu, ir_skips = model.autoencoder.encode(tensors["ir_lq"])
    mu, draw = Pair(vis_mu, ir_mu), playback(tensors["noise"])
    assert_agrees(mu.vis, tensors["latent_vis_lq"])
    assert_agrees(mu.ir, tensors["latent_ir_lq"])
    initial = draw()
    start = Pair(*(model.sde.noise_state(m, n) for m, n in zip(mu, initial, strict=True)))
    assert_agrees(start.vis, tensors["x_T_vis"])
    assert_agrees(start.ir, tensors["x_T_ir"])

    checked: list[int] = []

    def predict(state: Pair, mu: Pair, t: int) -> Prediction:
        prediction = model.predict(state, mu, t)
        if f"step{t}.fused_state" in tensors:
            assert_agrees(prediction.start.vis, tensors[f"step{t}.fused_state"], CHAIN)
        return prediction

    def on_step(end: int, state: Pair) -> None:
        if f"step{end + 1}.next_vis" in tensors:
            assert_agrees(state.vis, tensors[f"step{end + 1}.next_vis"], CHAIN)
            assert_agrees(state.ir, tensors[f"step{end + 1}.next_ir"], CHAIN)
            checked.append(end + 1)

    clean = euler(predict, model.sde, start, mu, draw, range(num_steps, 0, -1), on_step)
    assert len(checked) == {10: 10, 100: 7}[num_steps]
    assert_agrees(clean.vis, tensors["x_0_vis"], CHAIN)
    assert_agrees(clean.ir, tensors["x_0_ir"], CHAIN)
    latent = model.final_fusion(clean)
    assert_agrees(latent, tensors["fused_latent"], CHAIN)
    images = {
        "fused": decode(latent, model.autoencoder.fuse_skips(vis_skips, ir_skips), size),
        "vis": decode(clean.vis, vis_skips, size),
        "ir": decode(clean.ir, ir_skips, size),
    }
    for name, image in images.items():
        assert_agrees(image, tensors[f"out_{name}"], CHAIN)
        expected = tensors[f"out_{name}_bgr_u8"]
        assert_one_level_apart(to_bytes(image, expected), expected)


def test_fuse_gives_the_published_pictures(chain: tuple[ReCoFuse, Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    """The public call with the recorded noise; it averages the infrared channels, which the published code keeps."""
    model, tensors = chain
    monkeypatch.setattr(model_module, "noise_like", lambda seeds, like: playback(tensors["noise"]))
    steps = model.sde.num_steps  # as published; the default is shorter
    output = model.fuse(tensors["vis_lq"], tensors["ir_lq"][:, :1], sampler="euler", steps=steps)
    assert output.fused is not None
    assert output.vis is not None
    assert output.ir is not None
    for name, image in (("fused", output.fused), ("vis", output.vis)):
        expected = tensors[f"out_{name}_bgr_u8"]
        assert_one_level_apart(to_bytes(image, expected), expected)
    grey = tensors["out_ir"].clamp(0, 1).mean(dim=1, keepdim=True)
    assert float((output.ir - grey).abs().max()) <= 0.5 / 255
