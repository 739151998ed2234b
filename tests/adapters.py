"""A model with weight norm under PEFT's adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .layers import APPLY

peft = pytest.importorskip("peft", reason="PEFT is not installed (pip install peft)")

TARGETS = {
    "linear": ["fc"],
    "conv1d": ["conv"],
    "conv2d": ["image"],
    "all": ["conv", "image", "fc"],
}
ADAPTERS: dict[str, Callable[..., object]] = {
    "LoRA": lambda **how: peft.LoraConfig(r=3, **how),
    "LoRA with bias": lambda **how: peft.LoraConfig(r=3, lora_bias=True, **how),
    "DoRA": lambda **how: peft.LoraConfig(r=3, use_dora=True, **how),
    "LoHa": lambda **how: peft.LoHaConfig(r=3, **how),
    "LoKr": lambda **how: peft.LoKrConfig(r=3, **how),
    "IA3": lambda **how: peft.IA3Config(feedforward_modules=[], **how),
}
CASES = [
    (adapter, target)
    for adapter in ADAPTERS
    for target in TARGETS
    if adapter != "IA3" or target in ("linear", "conv2d")  # it takes no other layers
]
all_cases = pytest.mark.parametrize(("adapter", "target"), CASES)
FOLD = (
    r"expected a layer with a plain weight, got a Parametrized\w+ with weight norm.*wnkernel\.fold"
)


class Net(nn.Module):
    """Three layers with weight norm, and a head without."""

    def __init__(self, kind: str = "ours") -> None:
        super().__init__()
        self.conv = APPLY[kind](nn.Conv1d(4, 8, 3))
        self.image = APPLY[kind](nn.Conv2d(1, 3, (8, 1)), dim=1)
        self.fc = APPLY[kind](nn.Linear(12, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.image(self.conv(x)[:, None]).flatten(1)).tanh())


def net(kind: str = "ours") -> Net:
    torch.manual_seed(1)
    model = Net(kind)
    with torch.no_grad():  # g is not the norm of v
        for name, p in model.named_parameters():
            if name.endswith("original0"):
                p.mul_(1.5)
    return model


def x() -> Tensor:
    return torch.linspace(-2, 2, 120).sin().view(5, 4, 6)


def adapted(model: nn.Module, adapter: str, target: str = "all", **how: object) -> nn.Module:
    torch.manual_seed(2)
    return peft.get_peft_model(model, ADAPTERS[adapter](target_modules=TARGETS[target], **how))


def train(model: nn.Module, steps: int = 3) -> list[Tensor]:
    """The outputs before every step, and after all of them."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.05)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(model(x()))
        outputs[-1].square().sum().backward()
        optimizer.step()
    return [*outputs, model.eval()(x())]


def trained(adapter: str, target: str = "all", **how: object) -> nn.Module:
    model = adapted(net(), adapter, target, **how)
    train(model)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: t.clone() for key, t in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[key], t) for key, t in before.items())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
