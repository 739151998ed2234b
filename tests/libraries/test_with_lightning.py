"""Lightning: a vocoder and a GAN under its Trainer, its averages, its checkpoints and its
hyperparameters."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

import wnkernel
from benchmarks.hifigan import Discriminator

from ..groups import REUSE, Computed, Context
from ..vocoders import (
    FORMS,
    LAYERS,
    all_forms,
    assert_same_parameters,
    batch,
    from_both_kinds,
    loss_of,
    of_torch,
    vocoder,
)

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
callbacks = pytest.importorskip(
    "lightning.pytorch.callbacks", reason="this Lightning has no callbacks of PyTorch's"
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


class Trained(lightning.LightningModule):
    net: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return loss_of(self.net(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Vocoder(Trained):
    def __init__(self, form: str = "alone") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = vocoder(form).train()


class OfNet(Trained):
    """With the net itself among the hyperparameters, which are pickled. Lightning leaves out what
    cannot be."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net


class Validated(Vocoder):
    """It keeps the losses of training and validation in the order in which they come."""

    losses = torch.empty(0)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        loss = super().training_step(x, index)
        self.losses = torch.cat([self.losses, loss.detach()[None]])
        return loss

    validation_step = training_step


def data(steps: int = 2) -> DataLoader[Tensor]:
    return DataLoader([batch(step) for step in range(steps)], batch_size=None)


def trainer(folder: Path, epochs: int = 1, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@all_forms
def test_fit(tmp_path: Path, form: str, precision: str) -> None:
    models = Vocoder(form), Vocoder()
    for model in models:
        trainer(tmp_path, precision=precision).fit(model, data())
    assert_same_parameters(*models)
    assert not torch.equal(models[0].net.conv_pre.weight, Vocoder().net.conv_pre.weight)


@pytest.mark.parametrize("whole", ["LightningModule", "net"])
def test_what_is_fused(tmp_path: Path, computed: Computed, whole: str) -> None:
    """The Trainer calls ``training_step``, which is no forward; that of the net is one."""
    model = Vocoder()
    wnkernel.fuse(model if whole == "LightningModule" else model.net)
    trainer(tmp_path).fit(model, data())
    assert computed.take() == ([LAYERS] * 2, 0)


# Checkpoints


@all_forms
def test_a_checkpoint_loads_and_resumes(tmp_path: Path, form: str) -> None:
    model, epochs = Vocoder(form), 2
    keep = callbacks.ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    options = {"enable_checkpointing": True, "callbacks": [keep]}
    trainer(tmp_path, epochs, **options).fit(model, data())
    file = tmp_path / "epoch=1.ckpt"

    loaded = Vocoder.load_from_checkpoint(file)
    assert loaded.hparams.form == form
    assert_same_parameters(loaded, model)
    assert torch.equal(loaded(batch()), model(batch()))

    resumed = Vocoder(form)
    trainer(tmp_path, epochs).fit(resumed, data(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same_parameters(resumed, model)


@from_both_kinds
def test_a_checkpoint_of_torchs_weight_norm(tmp_path: Path, kind: str) -> None:
    theirs = Vocoder()
    theirs.net = of_torch(kind).train()
    before = trainer(tmp_path)
    before.fit(theirs, data())
    before.save_checkpoint(tmp_path / "theirs.ckpt")
    assert_same_parameters(Vocoder.load_from_checkpoint(tmp_path / "theirs.ckpt"), theirs)

    ours = Vocoder("fused, forward")
    trainer(tmp_path, 2).fit(ours, data(), ckpt_path=tmp_path / "theirs.ckpt")
    trainer(tmp_path, 2).fit(theirs, data(), ckpt_path=tmp_path / "theirs.ckpt")
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")
@all_forms
def test_a_net_among_the_hyperparameters(tmp_path: Path, computed: Computed, form: str) -> None:
    model, other = OfNet(vocoder(form).train()), Vocoder(form)
    t = trainer(tmp_path)
    t.fit(model, data())
    trainer(tmp_path).fit(other, data())
    assert_same_parameters(model, other)
    t.save_checkpoint(tmp_path / "model.ckpt")
    loaded = OfNet.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    assert_same_parameters(loaded, model)
    computed.take()
    assert torch.equal(loaded(batch()), model(batch()))
    assert computed.take() == (([], 2 * LAYERS) if form == "alone" else ([LAYERS, LAYERS], 0))


@all_forms
def test_a_copy_of_a_trained_module(tmp_path: Path, form: str) -> None:
    model = Vocoder(form)
    trainer(tmp_path).fit(model, data())
    copied = copy.deepcopy(model)
    want = model(batch())
    trainer(tmp_path).fit(model, data())
    assert torch.equal(copied(batch()), want)
    trainer(tmp_path).fit(copied, data())
    assert torch.equal(copied(batch()), model(batch()))


# Averages of weights


AVERAGES = {
    "SWA": lambda: callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1),
    "EMA": lambda: callbacks.EMAWeightAveraging(decay=0.5),
}


@pytest.mark.parametrize("average", AVERAGES)
@all_forms
def test_averages(tmp_path: Path, form: str, average: str) -> None:
    """The averages are copied into the model in the end, in place."""
    if average == "EMA" and not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging (2.6)")
    models = Vocoder(form), Vocoder()
    for model in models:
        trainer(tmp_path, 2, callbacks=[AVERAGES[average]()]).fit(model, data())
    assert_same_parameters(*models)
    assert torch.equal(models[0](batch()), models[1](batch()))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "alone"])
def test_averages_that_are_validated(tmp_path: Path, form: str) -> None:
    """Averages take the model's place meanwhile, through ``.data``. No mode is misled: an optimizer
    steps before, and training reads weights with gradients, validation without."""
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging (2.6)")
    models = Validated(form), Validated()
    for model in models:
        average = callbacks.EMAWeightAveraging(decay=0.5)
        trainer(tmp_path, 2, callbacks=[average]).fit(model, data(), data())
    assert torch.equal(models[0].losses, models[1].losses)
    assert_same_parameters(*models)


@all_forms
def test_predict(tmp_path: Path, computed: Computed, form: str) -> None:
    """In inference mode; with ``reuse="version"`` once for all batches."""
    model, twin = Vocoder(form), Vocoder()
    got = trainer(tmp_path).predict(model, data(3))
    launches = {"alone": [], "fused, forward": [LAYERS] * 3, "fused, version": [LAYERS]}
    assert computed.take() == (launches[form], 3 * LAYERS if form == "alone" else 0)
    with torch.inference_mode():
        assert all(torch.equal(y, twin(x)) for y, x in zip(got, data(3), strict=True))
    trainer(tmp_path).fit(model, data())  # and it can be trained afterwards
    trainer(tmp_path).fit(twin, data())
    assert_same_parameters(model, twin)


# A GAN: two optimizers, and gradients of one net only


class Gan(lightning.LightningModule):
    automatic_optimization = False

    def __init__(self, reuse: str | None, once: Context = nullcontext) -> None:
        super().__init__()
        self.once = once
        """What surrounds the two uses of the discriminator."""
        self.generator = vocoder().train()
        torch.manual_seed(1)
        self.discriminator = Discriminator(
            wnkernel.weight_norm(conv)
            for conv in (nn.Conv1d(1, 4, 5), nn.Conv1d(4, 8, 5, groups=4), nn.Conv1d(8, 1, 3))
        )
        if reuse is not None:
            wnkernel.fuse(self.generator, reuse=reuse)
            wnkernel.fuse(self.discriminator, reuse=reuse)

    def training_step(self, x: Tensor, index: int) -> None:
        of_generator, of_discriminator = self.optimizers()
        self.toggle_optimizer(of_discriminator)
        fake = self.generator(x).unsqueeze(1)
        real = torch.linspace(-1, 1, fake.numel()).view_as(fake)
        with self.once():
            loss = self.says(real, 1) + self.says(fake.detach(), 0)
        self.step(of_discriminator, loss)

        self.toggle_optimizer(of_generator)
        self.step(of_generator, self.says(self.generator(x).unsqueeze(1), 1))

    def says(self, audio: Tensor, aim: float) -> Tensor:
        return (self.discriminator(audio)[0] - aim).square().mean()

    def step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        nets = self.generator, self.discriminator
        return [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in nets]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("reuse", REUSE)
def test_gan(tmp_path: Path, reuse: str, precision: str) -> None:
    once = parametrize.cached if reuse == "version" else nullcontext
    models = Gan(reuse), Gan(None, once)  # that adds up both gradients of a weight first, too
    for model in models:
        trainer(tmp_path, precision=precision).fit(model, data(3))
    assert_same_parameters(*models)
