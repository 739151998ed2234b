"""PEFT's adapters on top of weight norm: they train and are saved as on top of plain layers; what
would write to the computed weight is one error that names fold."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from . import small_models
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


@all_cases
def test_adapters_train_as_on_torchs_weight_norm(adapter, target):
    base = net()(x())
    model, twin = adapted(net(), adapter, target), adapted(net("torch"), adapter, target)
    frozen = state(model)
    outputs = train(model)
    close(outputs[0], base)
    assert not torch.allclose(outputs[-1], base, atol=1e-2)
    for a, b in zip(outputs, train(twin), strict=True):
        close(a, b)
    for key, t in model.state_dict().items():
        if "original" in key or key.endswith("head.weight"):
            assert torch.equal(t, frozen[key]), key


@all_cases
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_an_error_that_changes_nothing(adapter, target, safe):
    model = trained(adapter, target)
    want, before = model(x()), state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=FOLD):
            merge(safe_merge=safe)
        assert_unchanged(model, before)
        assert torch.equal(model(x()), want)


@all_cases
def test_folded_layers_merge(adapter, target):
    model = trained(adapter, target)
    want = model(x())
    assert len(wnkernel.fold(model)) == 3
    close(model(x()), want)
    model.merge_adapter()
    close(model(x()), want)
    model.unmerge_adapter()
    close(model(x()), want)
    plain = model.merge_and_unload()
    close(plain(x()), want)
    for layer in (plain.conv, plain.image, plain.fc):  # and weight norm again, to train all of it
        wnkernel.weight_norm(layer)
    close(plain(x()), want)


@all_cases
def test_unloading_gives_the_layers_back(adapter, target):
    base = net()(x())
    model = trained(adapter, target).unload()
    assert isinstance(model.conv, nn.Conv1d)
    close(model(x()), base)


def test_the_error_leaves_what_was_merged_before_it():
    """Layers without weight norm come first in this model. Folding goes on from there."""
    layers = OrderedDict(first=nn.Linear(4, 5), last=wnkernel.weight_norm(nn.Linear(5, 3)))
    config = peft.LoraConfig(target_modules="all-linear")
    model = peft.get_peft_model(nn.Sequential(layers), config)
    x = torch.randn(6, 4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.normal_()
    want = model.eval()(x)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2
    with pytest.raises(RuntimeError, match=FOLD):
        model.merge_and_unload()
    close(model(x), want)
    wnkernel.fold(model)
    close(model.merge_and_unload()(x), want)


INITS = ["pissa", "pissa_niter_2", "olora"]


@pytest.mark.parametrize("init", INITS)
def test_initialisations_that_change_the_weight(init):
    """They take from the weight what they give to the adapter."""
    model = net()
    base, before = model(x()), state(model)
    with pytest.raises(RuntimeError, match=f"^{init[:5]}_init: {FOLD}"):
        adapted(model, "LoRA", "linear", init_lora_weights=init)
    assert_unchanged(model, before)
    wnkernel.fold(model)
    model = adapted(model, "LoRA", "linear", init_lora_weights=init)
    close(model(x()), base)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_initialisations_that_want_data_too(init):
    configs = {"corda": "CordaConfig", "lora_ga": "LoraGAConfig"}
    package = peft.tuners.lora.config
    if not hasattr(package, configs[init]):
        pytest.skip(f"this PEFT has no {configs[init]}")
    options = {f"{init}_config": getattr(package, configs[init])(), "init_lora_weights": init}
    with pytest.raises(RuntimeError, match=f"^{init}_init: {FOLD}"):
        adapted(net(), "LoRA", "linear", **options)


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", "eva", True, False])
def test_other_initialisations_work(init):
    base = net()(x())
    config = peft.LoraConfig(r=4, target_modules=["fc"], init_lora_weights=init)
    model = peft.get_peft_model(net(), config)
    assert torch.allclose(train(model)[0], base, atol=1e-5) == (init is not False)
    close(model.unload()(x()), base)


def test_target_parameters_are_an_error():
    """PEFT stacks a parametrization of its own, and expects one original below."""
    config = peft.LoraConfig(target_modules=[], target_parameters=["fc.weight"])
    with pytest.raises(RuntimeError, match=FOLD):
        peft.get_peft_model(net(), config)


@pytest.mark.parametrize("adapter", ["LoRA", "DoRA", "LoHa"])
def test_adapters_are_saved_and_loaded(adapter, tmp_path):
    model = trained(adapter, modules_to_save=["head"])
    want = model(x())
    model.save_pretrained(tmp_path)
    close(peft.PeftModel.from_pretrained(net(), tmp_path).eval()(x()), want)
    folded = net()
    wnkernel.fold(folded)
    loaded = peft.PeftModel.from_pretrained(folded, tmp_path).eval()
    close(loaded(x()), want)
    close(loaded.merge_and_unload()(x()), want)


def test_modules_to_save_with_weight_norm(tmp_path):
    """PEFT trains a copy of the module, with its g and v, and saves that."""
    model = adapted(net(), "LoRA", "conv1d", modules_to_save=["fc"])
    before = state(model)
    train(model)
    changed = [k for k, t in model.state_dict().items() if not torch.equal(t, before[k])]
    copied = "base_model.model.fc.modules_to_save.default."
    for key in ("bias", "parametrizations.weight.original0", "parametrizations.weight.original1"):
        assert copied + key in changed
    assert all(key.startswith(copied) or "lora" in key for key in changed)
    want = model(x())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    close(loaded(x()), want)
    wnkernel.fold(loaded)
    close(loaded.merge_and_unload()(x()), want)


def test_modules_to_save_survive_merging_without_a_fold():
    """They are swapped, not written to."""
    model = nn.Sequential(nn.Linear(4, 5), wnkernel.weight_norm(nn.Linear(5, 3)))
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    model = peft.get_peft_model(model, config)
    for p in model.parameters():
        nn.init.normal_(p.data)
    x = torch.randn(6, 4)
    want = model(x)
    merged = model.merge_and_unload()
    close(merged(x), want)
    assert "parametrizations.weight.original0" in merged[1].state_dict()


@pytest.mark.parametrize("fuse_first", [False, True])
@pytest.mark.parametrize("adapter", ["LoRA", "DoRA"])
def test_fused_models(adapter, fuse_first):
    model, twin = net(), adapted(net(), adapter)
    if fuse_first:
        wnkernel.fuse(model)
    model = adapted(model, adapter)
    if not fuse_first:
        wnkernel.fuse(model)
    for a, b in zip(train(model), train(twin), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=FOLD):
        model.merge_adapter()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled():
    model = adapted(net(), "LoRA")
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x()).square().sum().backward()
    twin(x()).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(p.grad, q.grad)


def test_the_layers_of_an_adapter_are_plain():
    """PEFT makes them by ``type(layer)(...)``."""
    lora = adapted(net(), "LoRA").base_model.model.conv
    assert type(lora.lora_A["default"]) is nn.Conv1d
    assert list(lora.lora_A["default"].state_dict()) == ["weight"]


def test_a_model_whose_targets_have_no_weight_norm():
    """wav2vec 2.0: the adapters are on the attention, the weight norm on the positions."""
    model = small_models.build("Wav2Vec2Model")
    wnkernel.convert(model)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    want = small_models.run(model, "Wav2Vec2Model")
    merged = model.merge_and_unload()
    close(small_models.run(merged, "Wav2Vec2Model"), want)
    assert len(wnkernel.fold(merged)) == 1


def test_a_vocoder():
    """Adapters on convolutions with weight norm, transposed and dilated ones beside them (PEFT has
    no adapters for the former, and forgets the dilation of the latter)."""
    name = "SpeechT5HifiGan"
    model = small_models.build(name)
    wnkernel.convert(model)
    base = small_models.run(model, name)
    config = peft.LoraConfig(r=4, target_modules=r".*(conv_pre|conv_post|convs2\.\d)")
    model = peft.get_peft_model(model, config).eval()
    close(small_models.run(model, name), base)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(std=0.02)
    want = small_models.run(model, name)
    assert not torch.allclose(want, base, atol=1e-3)
    with pytest.raises(RuntimeError, match=FOLD):
        model.merge_and_unload()
    wnkernel.fold(model)
    close(small_models.run(model.merge_and_unload(), name), want)


@pytest.mark.parametrize("name", ["merge", "get_base_layer", "pissa_init"])
def test_code_of_others_may_ask(name):
    """Only PEFT's own methods are told by their names."""
    layer = wnkernel.weight_norm(nn.Linear(3, 2))
    scope: dict[str, object] = {}
    exec(f"def {name}(layer): return hasattr(layer, 'base_layer')", scope)
    assert scope[name](layer) is False
    layer.base_layer = nn.Linear(3, 2)
    assert scope[name](layer) is True
