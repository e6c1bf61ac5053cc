"""How weights move: the optimizers, the average that is kept of them, and the learning rate over a stage."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from recofuse_core.training.config import StageConfig


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al., 2023): sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 3e-5,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(momentum.lerp(parameter.grad, 1 - beta1).sign_(), alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - beta2)
        return loss


def build_optimizer(stage: StageConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The stage's optimizer over some parameters."""
    if stage.optimizer == "lion":
        return Lion(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)
    return torch.optim.AdamW(parameters, lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=stage.weight_decay)


class WeightAverage:
    """Exponential moving average of a model's weights with a warm-up of (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's present weights."""
        self.num_updates += 1
        keep = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, tensor in model.state_dict().items():
            self.weights[name].lerp_(tensor, 1 - keep)


def learning_rate(stage: StageConfig, step: int, progress: float) -> float:
    """Rate at a step (from 0) and a progress in [0, 1]: linear warm-up, then a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    ramp = min(1.0, (step + 1) / max(stage.warmup_steps, 1))
    return stage.learning_rate * ramp * (stage.final_ratio + (1 - stage.final_ratio) * cosine)
