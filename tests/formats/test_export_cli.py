"""`qatkernels export`: from a saved folder to a file of another runtime."""

import pytest
import torch

import qatkernels as qk
from qatkernels import cli
from qatkernels.integrations.transformers import QatConfig  # noqa: F401 - registers the quantizer

from .test_gguf import build, byte_level, values

gguf = pytest.importorskip("gguf")


@pytest.fixture
def folder(tmp_path):
    """A packed model and its tokenizer, as save_pretrained leaves them."""
    from tokenizers import pre_tokenizers

    tokenizer = byte_level([pre_tokenizers.Digits(individual_digits=True)])
    model = build("llama", 2, None)
    model.resize_token_embeddings(len(tokenizer))
    qk.pack_model(model).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_becomes_a_file(folder, tmp_path, capsys):
    assert cli.main(["export", str(folder), str(tmp_path / "model.gguf"), "--to", "gguf"]) == 0
    assert "14 layers as Q2_K (2.62 bits a weight), exact" in capsys.readouterr().out
    found = values(tmp_path / "model.gguf")["blk.0.ffn_down.weight"]
    wanted = qk.quantized_modules(build("llama", 2, None))["model.layers.0.mlp.down_proj"].quantized_weight()
    assert torch.equal(torch.from_numpy(found), wanted)
    assert "tokenizer.ggml.merges" in gguf.GGUFReader(tmp_path / "model.gguf").fields


@pytest.mark.parametrize("to", ["compressed-tensors", "mlx"])
def test_folders(folder, tmp_path, capsys, to):
    if to == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    assert cli.main(["export", str(folder), str(tmp_path / "out"), "--to", to]) == 0
    assert " layers as " in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_format_without_tokenizers(folder, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    assert cli.main(["export", str(folder), str(tmp_path / "model.onnx"), "--to", "onnx"]) == 0
    assert "14 layers as MatMulNBits" in capsys.readouterr().out
    arguments = ["export", str(folder), str(tmp_path / "x"), "--to", "onnx", "--tokenizer", str(folder)]
    assert cli.main(arguments) == 2
    assert "tokenizer is not an option of to='onnx'" in capsys.readouterr().err


def test_errors_are_one_line(folder, tmp_path, capsys):
    assert cli.main(["export", str(folder), str(tmp_path / "x"), "--to", "onyx"]) == 2
    assert capsys.readouterr().err.startswith("qatkernels: to is 'onyx', must be one of")  # before anything is loaded
    assert cli.main(["export", str(folder), str(tmp_path / "x"), "--to", "compressed-tensors", "--convert"]) == 2
    assert "convert is not an option of to='compressed-tensors'" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "nothing"), str(tmp_path / "x")]) == 2
    assert "nothing" in capsys.readouterr().err
    build("llama", 4, 32, scale_dtype=torch.float32).save_pretrained(tmp_path / "wide")
    assert cli.main(["export", str(tmp_path / "wide"), str(tmp_path / "x.gguf")]) == 2
    assert "scale_dtype=torch.float16" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "wide"), str(tmp_path / "x.gguf"), "--convert"]) == 0
    assert "off by up to" in capsys.readouterr().out
