"""What of PEFT writes to the weight beneath an adapter, apart from merging, is an error that names
fold where that weight is computed. There is a test for each name in ``WRITERS``."""

from __future__ import annotations

import pytest
from torch import nn

import wnkernel

from ..adapters import FOLD, adapted, assert_unchanged, close, net, peft, state, trained, x

LINEAR = "base_model.model.fc"


def config_of(name: str, **how: object) -> object:
    if not hasattr(peft, name):
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    return getattr(peft, name)(**how)


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


def test_an_initialisation_that_quantizes():
    """PEFT asks for scipy and bitsandbytes only after it has looked at the weight."""
    model = adapted(net(), "LoRA", "linear")
    with pytest.raises(RuntimeError, match=f"^loftq_init: {FOLD}"):
        model.get_submodule(LINEAR).loftq_init("default", peft.LoraConfig())


def test_an_initialisation_that_truncates_the_weight():
    truncating = {"kasa_config": config_of("KasaConfig")}
    model = net()
    before = state(model)
    with pytest.raises(RuntimeError, match=f"^_truncate_base_weight: {FOLD}"):
        adapted(model, "LoRA", "linear", **truncating)
    assert_unchanged(model, before)
    wnkernel.fold(model)
    plain = model.fc.weight.clone()
    model = adapted(model, "LoRA", "linear", **truncating)
    assert not model.get_submodule(LINEAR).base_layer.weight.equal(plain)


def test_target_parameters_are_an_error():
    """PEFT stacks a parametrization of its own, and expects one original below."""
    config = peft.LoraConfig(target_modules=[], target_parameters=["fc.weight"])
    with pytest.raises(RuntimeError, match=FOLD):
        peft.get_peft_model(net(), config)


def test_weight_norm_that_comes_after_merging():
    """What was added to the weight cannot be taken from it again."""
    model = trained("LoRA")
    wnkernel.fold(model)
    model.merge_adapter()
    layer = model.get_submodule(LINEAR)
    want = wnkernel.weight_norm(layer.base_layer).weight
    with pytest.raises(RuntimeError, match=f"^unmerge: {FOLD}"):
        layer.unmerge()
    assert layer.base_layer.weight.equal(want)


def test_a_weight_that_is_set():
    """Adapters of several kinds write by this method of all adapters."""
    layer = adapted(net(), "LoRA", "linear").get_submodule(LINEAR)
    if not hasattr(layer, "set_base_weight"):
        pytest.skip(f"PEFT {peft.__version__} has no set_base_weight")
    before = state(layer)
    with pytest.raises(RuntimeError, match=f"^set_base_weight: {FOLD}"):
        layer.set_base_weight(layer.get_base_weight() * 2)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("config", ["HiraConfig", "MissConfig"])
def test_adapters_that_come_to_the_weight_through_another_method(config):
    model = peft.get_peft_model(net(), config_of(config, r=2, target_modules=["fc"]))
    before = state(model)
    with pytest.raises(RuntimeError, match=f"^merge: {FOLD}"):
        model.merge_adapter()
    assert_unchanged(model, before)
    wnkernel.fold(model)
    model.merge_adapter()


@pytest.mark.parametrize("name", ["merge", "get_base_layer", "pissa_init"])
def test_functions_of_others_that_are_called_so_get_an_answer(name):
    """Only methods that ``get_base_layer`` is called by are told by their names."""
    layer = wnkernel.weight_norm(nn.Linear(3, 2))
    scope: dict[str, object] = {}
    exec(f"def {name}(layer): return hasattr(layer, 'base_layer')", scope)
    assert scope[name](layer) is False
    assert not hasattr(type(layer), "base_layer")
    layer.base_layer = nn.Linear(3, 2)
    assert scope[name](layer) is True


def test_adapters_of_others_may_write_as_they_like():
    """They may know that a weight is to be assigned."""

    class Adapter:
        def __init__(self, layer: nn.Module) -> None:
            self.layer = layer

        def get_base_layer(self) -> nn.Module:
            assert not hasattr(self.layer, "base_layer")
            return self.layer

        def merge(self) -> None:
            layer = self.get_base_layer()
            layer.weight = layer.weight.detach() + 1

    layer = wnkernel.weight_norm(nn.Linear(3, 2))
    want = layer.weight + 1
    Adapter(layer).merge()
    close(layer.weight, want)
