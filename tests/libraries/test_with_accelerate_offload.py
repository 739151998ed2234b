"""Accelerate's big-model inference: parameters that are on the meta device but for the moment in
which they are used, because a ``forward`` that is put on every instance fetches them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from .. import small_models
from ..groups import Computed
from ..layers import assert_same_state
from ..vocoders import FORMS, LAYERS, NAME, all_forms, build, spectrogram, vocoder

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    # The maps here name buffers of the root too.
    pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning"),
]

CPU = torch.device("cpu")

LAYER_CLASSES = ["ParametrizedConv1d", "ParametrizedConvTranspose1d"]
"""What parametrize calls the classes of weight-normed layers."""

Offload = Callable[[nn.Module, Path], object]

PARTS = {
    "conv_pre": "disk",
    "upsampler": "cpu",
    "resblocks": "disk",
    "conv_post": "cpu",
    "mean": "cpu",
    "scale": "cpu",
}
"""What is on disk is fetched; what is on the CPU has hooks and stays."""


def to_the_cpu(model: nn.Module, folder: Path, **options: object) -> None:
    accelerate.cpu_offload(model, execution_device=CPU, **options)


def to_disk(model: nn.Module, folder: Path, **options: object) -> None:
    accelerate.disk_offload(model, folder / "disk", execution_device=CPU, **options)


def in_parts(model: nn.Module, folder: Path) -> None:
    accelerate.dispatch_model(model, PARTS, main_device=CPU, offload_dir=folder / "parts")


OFFLOADS: dict[str, Offload] = {
    "cpu": to_the_cpu,
    "cpu, buffers too": lambda m, f: to_the_cpu(m, f, offload_buffers=True),
    "cpu, a layer at a time": lambda m, f: to_the_cpu(m, f, preload_module_classes=LAYER_CLASSES),
    "cpu, all at once": lambda m, f: to_the_cpu(m, f, preload_module_classes=[NAME]),
    "disk": to_disk,
    "dispatched": in_parts,
}

all_offloads = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)


def results(model: nn.Module) -> list[Tensor]:
    """Outputs in three grad modes, one of them twice, and the gradient of the input."""
    x = spectrogram().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    outputs = [y.detach(), x.grad, model(spectrogram()).detach()]
    with torch.no_grad():
        outputs.append(model(spectrogram()))
    with torch.inference_mode():
        outputs.append(model(spectrogram()))
    return outputs


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@all_offloads
@all_forms
def test_outputs_are_those_of_before(tmp_path: Path, offload: Offload, form: str) -> None:
    """Of layers that had the legacy hook before, so that they answer to its names, too."""
    model = vocoder(form, "legacy")
    state = {key: t.clone() for key, t in model.state_dict().items()}
    want = results(model)
    offload(model, tmp_path)
    for _ in range(2):
        assert any(p.is_meta for p in model.parameters())
        assert_equal(results(model), want)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same_state(model.state_dict(), state)
    assert_equal(results(model), want)


@pytest.mark.parametrize("name", ["EncodecModel", "VitsModel", "Wav2Vec2Model"])
@all_forms
def test_other_models(form: str, name: str) -> None:
    """Layers beside an LSTM, models whose parts are called one by one, a weight normed along its
    last dim."""
    model = small_models.build(name)
    wnkernel.convert(model)
    FORMS[form](model)
    with torch.no_grad():
        want = small_models.run(model, name)
        accelerate.cpu_offload(model, execution_device=CPU)
        for _ in range(2):
            assert torch.equal(small_models.run(model, name), want)


@all_forms
def test_a_single_layer(form: str) -> None:
    """The smallest case: its output was uninitialised memory."""
    model = nn.Sequential(wnkernel.weight_norm(nn.Linear(4, 3)))
    FORMS[form](model)
    x = torch.randn(2, 4)
    want = model(x)
    accelerate.cpu_offload(model, execution_device=CPU)
    assert torch.equal(model(x), want)
    assert torch.equal(model[0].weight, model[0].weight)
    assert model[0].weight.device == CPU


@all_forms
def test_without_hooks_a_group_computes_together_again(
    tmp_path: Path, computed: Computed, form: str
) -> None:
    model = vocoder(form)
    to_the_cpu(model, tmp_path)
    model(spectrogram())
    computed.take()
    accelerate.hooks.remove_hook_from_submodules(model)
    model(spectrogram())
    assert computed.take() == (([], LAYERS) if form == "alone" else ([LAYERS], 0))


@all_forms
def test_training_where_nothing_is_offloaded(form: str) -> None:
    """Hooks on every module, parameters that stay: gradients reach them."""
    model, twin = vocoder(form), vocoder(form)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    for module in (model, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module(spectrogram()).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)


@all_forms
def test_offloaded_one_after_the_other(form: str) -> None:
    """``cpu_offload_with_hook``, for pipelines: whole models come and go."""
    model = vocoder(form)
    want = results(model)
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device=CPU)
    for _ in range(2):
        assert_equal(results(model), want)
        hook.offload()


@all_forms
def test_the_parameters_of_an_offloaded_model_are_saved(tmp_path: Path, form: str) -> None:
    model = vocoder(form)
    to_disk(model, tmp_path)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "saved")
    state = safetensors.load_file(tmp_path / "saved" / "model.safetensors")
    want = dict(vocoder().named_parameters())
    assert_same_state({key: state[key] for key in want}, want)


# From a file into a model without memory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with shards, as ``Accelerator.save_model`` writes them."""
    accelerate.Accelerator(cpu=True).save_model(vocoder(), tmp_path / "model", max_shard_size="7KB")
    assert len([*(tmp_path / "model").glob("*.safetensors")]) > 1
    return tmp_path / "model"


@pytest.fixture
def _nothing_to_collect() -> Iterator[None]:
    """Accelerate collects garbage after every file: half a second, if it looks at everything that
    was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


def empty(form: str) -> nn.Module:
    with accelerate.init_empty_weights():
        model = build()
    wnkernel.convert(model)
    assert all(p.is_meta for p in model.parameters())
    FORMS[form](model)
    return model


@pytest.mark.parametrize("device_map", [None, PARTS], ids=["none", "parts"])
@all_forms
@pytest.mark.usefixtures("_nothing_to_collect")
def test_load_checkpoint_and_dispatch(
    tmp_path: Path, checkpoint: Path, form: str, device_map: dict[str, str] | None
) -> None:
    model = empty(form)
    folder = tmp_path / "offloaded"
    model = accelerate.load_checkpoint_and_dispatch(
        model, checkpoint, device_map=device_map, offload_folder=folder
    )
    want = vocoder()
    for _ in range(2):
        assert torch.equal(model(spectrogram()), want(spectrogram()))


@pytest.mark.parametrize("layout", ["legacy", "folded"])
@pytest.mark.usefixtures("_nothing_to_collect")
def test_files_in_other_layouts_are_converted_first(tmp_path: Path, layout: str) -> None:
    """Accelerate goes by names and leaves out those that it does not find: no load hook runs."""
    save_file, load_file = safetensors.save_file, safetensors.load_file
    state = wnkernel.convert_state_dict(vocoder().state_dict(), to=layout)
    save_file(state, tmp_path / "old.safetensors", {"format": "pt"})

    model = empty("alone")
    state = load_file(tmp_path / "old.safetensors")
    state = wnkernel.convert_state_dict(state, to="parametrized", like=model)
    save_file(state, tmp_path / "new.safetensors", {"format": "pt"})
    accelerate.load_checkpoint_and_dispatch(
        model,
        f"{tmp_path}/new.safetensors",
        device_map=PARTS,
        offload_folder=tmp_path / "offloaded",
    )
    with torch.no_grad():
        torch.testing.assert_close(model(spectrogram()), vocoder()(spectrogram()))
