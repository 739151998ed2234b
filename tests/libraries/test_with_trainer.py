"""transformers' Trainer: a speech model that was converted trains, is saved under torch's names and
resumes, as it does with torch's weight norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from ..small_models import SPEECH, ramp
from ..vocoders import FORMS, all_forms, assert_same_parameters

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs Accelerate, which is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

NAME = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0"


def of_torch() -> nn.Module:
    """A model for speech recognition whose constructor applies weight norm to a convolution."""
    torch.manual_seed(0)
    options = {**SPEECH, "apply_spec_augment": False, "ctc_loss_reduction": "mean"}
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**options))


def converted(form: str) -> nn.Module:
    model = of_torch()
    assert wnkernel.convert(model) == [NAME.replace("parametrizations.weight.original0", "weight")]
    FORMS[form](model)
    return model


def data() -> list[dict[str, Tensor]]:
    return [
        {"input_values": ramp(400) * (1 + k), "labels": torch.tensor([1 + k, 2, 3])}
        for k in range(6)
    ]


def trainer(
    model: nn.Module, folder: Path, cls: type = transformers.Trainer, **options: Any
) -> Any:
    """For three steps."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"learning_rate": 1e-2, "save_strategy": "no", **options},
    )
    return cls(model, arguments, train_dataset=data())


@pytest.mark.parametrize(("form", "bf16"), [*zip(FORMS, (False, True, False), strict=True)])
def test_training(tmp_path: Path, form: str, bf16: bool) -> None:
    """Alone or fused to the last bit, with torch's weight norm up to rounding."""
    models = converted(form), converted("alone"), of_torch()
    for model in models:
        trainer(model, tmp_path, bf16=bf16, optim="sgd").train()
    assert_same_parameters(*models[:2])
    before = dict(of_torch().named_parameters())
    for (key, theirs), p in zip(models[2].named_parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(p, theirs, rtol=1e-4, atol=1e-5)
        assert not (".original" in key and torch.equal(theirs, before[key]))


@all_forms
def test_saved_and_loaded(tmp_path: Path, form: str) -> None:
    """``from_pretrained`` builds the model with torch's weight norm, and finds g and v."""
    model = converted(form)
    t = trainer(model, tmp_path)
    t.train()
    t.save_model(tmp_path / "saved")
    state = safetensors.load_file(tmp_path / "saved" / "model.safetensors")
    assert set(state) == set(of_torch().state_dict())
    assert torch.equal(state[NAME], dict(model.named_parameters())[NAME])

    loaded, info = transformers.Wav2Vec2ForCTC.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info.values())
    assert_same_parameters(loaded, model)
    wnkernel.convert(loaded)
    model.eval()
    x = data()[0]["input_values"][None]
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize(
    ("form", "whose"), [*((form, "ours") for form in FORMS), ("fused, version", "torch's")]
)
def test_resumed_training(tmp_path: Path, form: str, whose: str) -> None:
    model = converted(form) if whose == "ours" else of_torch()
    trainer(model, tmp_path, save_strategy="steps", save_steps=2).train()
    resumed = converted(form)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    if whose == "ours":
        assert_same_parameters(resumed, model)
    for a, b in zip(resumed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Trainer(transformers.Trainer):
    """As docs/recipes.md has it."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(("original0", "weight_g"))]


def test_g_is_kept_out_of_weight_decay(tmp_path: Path) -> None:
    """The Trainer by itself leaves out biases and layer norms only."""
    model = converted("fused, forward")
    g = dict(model.named_parameters())[NAME]
    for cls, decay in ((transformers.Trainer, 0.1), (Trainer, 0.0)):
        optimizer = trainer(model, tmp_path, cls, weight_decay=0.1).create_optimizer()
        (group,) = (
            group for group in optimizer.param_groups if any(p is g for p in group["params"])
        )
        assert group["weight_decay"] == decay
    assert len(optimizer.param_groups) == 2
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [*model.parameters()]
    )
