"""torch.onnx.export, by both of its exporters; what comes out is run by onnxruntime."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from ..cases import randn, randn_g
from ..exports import batch, folded, model
from ..small_models import MODELS, build, ramp

onnx = pytest.importorskip("onnx", reason="the exporters of torch need onnx")
pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was exported")

pytestmark = pytest.mark.skipif(
    torch.empty(0).device.type != "cpu", reason="onnxruntime, as it is installed, runs on the CPU"
)
both_exporters = pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])


def export(module: nn.Module, x: Tensor, path: Path, dynamo: bool, **options: object) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=torch.jit.TracerWarning, module="wnkernel")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        torch.onnx.export(module, (x,), str(path), dynamo=dynamo, verbose=False, **options)


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def kinds_of_nodes(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@both_exporters
def test_every_kind_of_layer(dynamo, tmp_path):
    m, x = model(), batch()
    export(m, x, tmp_path / "m.onnx", dynamo)
    assert {node.domain for node in onnx.load(tmp_path / "m.onnx").graph.node} <= {"", "ai.onnx"}
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), m(x).detach())


@both_exporters
def test_folded_first(dynamo, tmp_path):
    m, x = model(), batch()
    export(folded(m), x, tmp_path / "m.onnx", dynamo)
    assert kinds_of_nodes(tmp_path / "m.onnx").isdisjoint({"Div", "Sqrt", "ReduceL2", "ReduceSum"})
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), m(x).detach())


def test_torchscript_computes_the_weights_while_it_exports(tmp_path):
    """As of torch's own weight norm, up to opset 17: no backend meets a convolution whose weight is
    computed."""
    m, x = model(), batch()
    m.head.parametrizations.weight[0].eps = 0.0
    export(m, x, tmp_path / "m.onnx", dynamo=False, opset_version=17)
    assert kinds_of_nodes(tmp_path / "m.onnx").isdisjoint({"Div", "Mul", "ReduceL2", "ReduceSum"})
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), m(x).detach())


@both_exporters
@pytest.mark.parametrize("dim", [0, None])
def test_half_weights(dim, dynamo, tmp_path):
    layer = wnkernel.weight_norm(nn.Linear(5, 3), dim=dim).half().eval()
    x = torch.randn(2, 5).half()
    export(layer, x, tmp_path / "m.onnx", dynamo)
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), layer(x).detach())


def test_with_eps_torchscript_computes_the_norms_only(tmp_path):
    layer, x = wnkernel.weight_norm(nn.Linear(5, 3), eps=1e-6).eval(), torch.randn(2, 5)
    export(layer, x, tmp_path / "m.onnx", dynamo=False, opset_version=17)
    kinds = kinds_of_nodes(tmp_path / "m.onnx")
    assert kinds >= {"Clip", "Div", "Mul"}
    assert kinds.isdisjoint({"ReduceL2", "ReduceSum"})
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), layer(x).detach())


def test_long_rows_are_exact(tmp_path):
    """The norms of these would err by 1e-4 if torch took all dimensions at once."""

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(randn((64, 1 << 16)))
            self.g = nn.Parameter(randn_g((64, 1 << 16), None))

        def forward(self, x: Tensor) -> Tensor:
            return x * wnkernel.functional.weight_norm(self.v, self.g, None)

    m, x = Weight(), torch.ones(1)
    export(m, x, tmp_path / "m.onnx", dynamo=False, opset_version=17)
    w = wnkernel.functional.weight_norm(m.v, m.g, None).detach()
    assert ((run(tmp_path / "m.onnx", x) - w).abs().max() / w.abs().max()).item() < 5e-6


def normed(name: str) -> nn.Module:
    m = build(name)
    wnkernel.convert(m)
    return m


@both_exporters
def test_a_hifi_gan(dynamo, tmp_path):
    m, x = normed("SpeechT5HifiGan"), ramp(*MODELS["SpeechT5HifiGan"].input_shape)
    export(m, x, tmp_path / "m.onnx", dynamo)
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), m(x).detach())


@pytest.mark.parametrize(
    ("name", "dynamo"), [("DacModel", False), ("DacModel", True), ("EncodecModel", False)]
)
def test_decoders_of_codecs(name, dynamo, tmp_path):
    """Those of DAC and EnCodec; the latter has an LSTM between its convolutions, and code that
    torch.export does not take."""
    m = normed(name).decoder
    x = ramp(1, 16 if name == "DacModel" else 8, 6)
    export(m, x, tmp_path / "m.onnx", dynamo)
    torch.testing.assert_close(run(tmp_path / "m.onnx", x), m(x).detach())
