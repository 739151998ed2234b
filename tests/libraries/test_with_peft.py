"""PEFT's adapters on top of weight norm: they train and are saved as on top of plain layers; what
would write to the computed weight is one error that names fold."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import wnkernel

from .. import small_models
from ..adapters import (
    FOLD,
    adapted,
    all_cases,
    assert_unchanged,
    close,
    net,
    peft,
    state,
    train,
    trained,
    x,
)


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


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", "eva", True, False])
def test_other_initialisations_work(init):
    base = net()(x())
    config = peft.LoraConfig(r=4, target_modules=["fc"], init_lora_weights=init)
    model = peft.get_peft_model(net(), config)
    assert torch.allclose(train(model)[0], base, atol=1e-5) == (init is not False)
    close(model.unload()(x()), base)


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
