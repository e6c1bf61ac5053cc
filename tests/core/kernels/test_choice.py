"""Kernels are used where they agree and win, and eager elsewhere."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from recofuse_core.errors import ConfigError
from recofuse_core.finishing import Finish
from recofuse_core.kernels import choice
from recofuse_core.kernels.choice import Form, Trial, places, relative_rms, seen_calls, tried, use_kernels, use_winners
from recofuse_core.model import ReCoFuse
from recofuse_core.networks import LatentFusion, Rows
from recofuse_core.precision import frozen_copy
from recofuse_core.runtime import Runtime
from recofuse_core.stacked import StackedBlock
from tests.core.kernels.blocks import drawn
from tests.core.tiny import tiny_model

SIZE = (32, 32)


def stacked_model() -> ReCoFuse:
    return frozen_copy(tiny_model(), torch.float32, stacked=True)


def test_every_block_that_runs_has_a_replacement() -> None:
    forms = [place.form for place in places(stacked_model())]
    assert forms.count(Form("stacked block", 8)) == 2
    assert forms.count(Form("stacked block", 16)) == 2
    assert forms.count(Form("stacked block", 32)) == 1
    assert forms.count(Form("block", 8)) == forms.count(Form("block", 16)) == 2  # of the autoencoder, none of a branch
    assert forms.count(Form("fusion", 16)) == forms.count(Form("beginning", 48)) == forms.count(Form("end", 3)) == 1


def test_on_a_cpu_torch_runs_the_blocks() -> None:
    assert Runtime(tiny_model()).kernels == "eager"
    with pytest.raises(ConfigError, match="kernels must be auto, eager or triton, got 'cuda'"):
        Runtime(tiny_model(), kernels="cuda")  # type: ignore[arg-type]


def test_without_triton_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="Triton is not installed"):
        use_kernels(stacked_model(), "triton")


def test_a_cpu_runs_them_interpreted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    monkeypatch.setattr(choice, "_is_interpreted", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU"):
        use_kernels(stacked_model(), "triton")


@torch.inference_mode()
def test_a_trial_sees_what_comes_to_the_blocks() -> None:
    calls = seen_calls(stacked_model(), (1, 2), SIZE)
    assert set(calls) == {place.form for place in places(stacked_model())}
    for form, (block, inputs) in calls.items():
        assert len(inputs) == 2
        batches = [arguments[0].shape[1 if isinstance(block, StackedBlock) else 0] for arguments in inputs]
        assert batches == [1, 2], form
        assert vars(block).keys().isdisjoint({"forward", "fuse"})


class Doubled(nn.Module):
    """Adds what a block adds, off by some part of it, or fails."""

    def __init__(self, block: nn.Module, off: float) -> None:
        super().__init__()
        self.block, self.off = block, off

    def forward(self, x: Tensor, *modulation: object) -> Tensor:
        if self.off < 0:
            raise RuntimeError("no C compiler")
        added = choice._image(choice._entry(self.block)(x, *modulation)) - x
        return x + (1 + self.off) * added


class DoubledFusion(Doubled):
    """The same of the fusion module, which a model calls otherwise."""

    fuse = Doubled.forward

    def conditioning(self, timesteps: Tensor) -> object:
        return self.block.conditioning(timesteps)  # type: ignore[operator]


class DoubledFinish(Doubled):
    """The same of the end of a run."""

    def forward(self, decoded: Tensor, *wishes: object) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.off < 0:
            raise RuntimeError("no C compiler")
        image, is_finite = self.block(decoded, *wishes)
        return image if self.off == 0 else (1 + self.off) * image, is_finite


class DoubledRows(Doubled):
    """The same of the beginning of a run."""

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        if self.off < 0:
            raise RuntimeError("no C compiler")
        rows: Tensor = self.block(image, dtype)
        return (1 + self.off) * rows


def doubled(block: nn.Module, off: float) -> nn.Module:
    if isinstance(block, Rows):
        return DoubledRows(block, off)
    if isinstance(block, Finish):
        return DoubledFinish(block, off)
    return (DoubledFusion if isinstance(block, LatentFusion) else Doubled)(block, off)


@pytest.mark.parametrize(
    ("off", "times", "kernels", "said"),
    [
        (0.0, [2.0, 1.0], "triton: 1 fusion of 16, 1 end of 3, 1 beginning of 48, 2 block of 8", "kernels tried"),
        (0.0, [1.0, 2.0], "eager", "kernels tried"),  # slower
        (0.01, [2.0, 1.0], "eager", "kernels tried"),  # wrong
        (-1.0, [2.0, 1.0], "eager", "kernels cannot be used"),
    ],
    ids=["wins", "slower", "wrong", "broken"],
)
def test_what_agrees_and_wins_is_used(
    off: float,
    times: list[float],
    kernels: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(choice, "_replacement", lambda block: doubled(block, off))
    model = stacked_model()
    turns = 0

    def time_ms(call: Callable[[], choice.Result]) -> float:
        nonlocal turns
        turns += 1
        return times[(turns - 1) % 2]

    with caplog.at_level(logging.INFO, logger=choice.__name__):
        told = use_winners(model, time_ms=time_ms, batches=(1, 2), size=SIZE)
    assert told.startswith(kernels)
    assert said in caplog.messages
    assert caplog.messages[-1] == "kernels chosen"
    replaced = sum(isinstance(module, Doubled) for module in model.modules())
    assert replaced == (0 if kernels == "eager" else len(list(places(stacked_model()))))


def test_a_lost_device_ends_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(block: nn.Module) -> nn.Module:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(choice, "_replacement", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        use_winners(stacked_model(), batches=(1,), size=SIZE)


def test_disagreement_is_measured_by_what_a_block_adds() -> None:
    given, added = 100 * drawn(3, 50), drawn(3, 50, seed=1)
    assert relative_rms(given + 1.1 * added, given + added, given) == pytest.approx(0.1, rel=1e-3)
    assert relative_rms(given / 0, given + added, given) == float("inf")
    trial = Trial(Form("block", 8), float("inf"), 1e-4, 2.0, 1.0)
    assert not trial.is_won


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["compact", "paper"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_card_agrees_with_eager(preset: str, dtype: torch.dtype) -> None:
    """Every form of block of a preset, at the usual size, with the sums of a card and not of an interpreter."""
    from recofuse_core.arithmetic import full_float32
    from recofuse_core.checkpoint import load_pretrained
    from recofuse_core.model import PRESETS, build_model

    torch.manual_seed(0)
    model = load_pretrained("compact") if preset == "compact" else build_model(PRESETS[preset]).eval()
    for name, parameter in model.named_parameters():
        if preset == "paper" and name.endswith(("beta", "gamma")):
            parameter.data.fill_(0.5)  # a fresh block is the identity
    with full_float32():
        frozen = frozen_copy(model.cuda(), dtype, stacked=True)
        for form, (block, inputs) in seen_calls(frozen, (1, 8), choice.TRIAL_SIZE).items():
            trial = tried(form, block, inputs, time_ms=choice.graph_ms)
            assert trial.error <= trial.tolerance, trial
            assert min(trial.eager_ms, trial.fused_ms) > 0
