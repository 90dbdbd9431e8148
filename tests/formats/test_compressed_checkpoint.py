"""Checkpoints of compressed-tensors as the start of training."""

import json

import pytest
import torch

import qatkernels as qk
from qatkernels.files import CheckpointError
from qatkernels.formats import UnfitError, export, load_compressed_tensors
from qatkernels.testing.compare import assert_same_bits
from tests.formats.tiny import IDS, build, logits

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

CONFIGS = {
    **{f"lsq {bits}, rows": qk.QuantConfig(bits, "lsq") for bits in (2, 3, 4, 5, 6, 8)},
    "lsq 4, groups": qk.QuantConfig(4, "lsq", 32),
    "affine 4, rows": qk.QuantConfig(4, "affine"),
    "affine 3, groups": qk.QuantConfig(3, "affine", 32),
    "affine 8, groups": qk.QuantConfig(8, "affine", 32),
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_values_of_the_file(config, kind, tmp_path):
    """Bit for bit; and the model exports to the same file again."""
    model = build(kind, config, tie_word_embeddings=kind == "qwen3")
    export(model, tmp_path / "out", to="compressed-tensors")
    loaded = load_compressed_tensors(tmp_path / "out")
    assert not loaded.training
    assert_same_bits(logits(loaded), logits(model))
    layers = qk.quantized_modules(loaded)
    assert layers.keys() == qk.quantized_modules(model).keys()
    for name, layer in layers.items():
        assert layer.grid.scheme == config.scheme
        assert layer.config.group_size == config.group_size
        assert_same_bits(layer.quantized_weight(), model.get_submodule(name).quantized_weight(), name)
        assert_same_bits(layer.weight.detach(), layer.quantized_weight(), name)  # the masters begin on the grid
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (kind == "qwen3")
    export(loaded, tmp_path / "again", to="compressed-tensors")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_what_transformers_computes_from_a_bfloat16_checkpoint(tmp_path):
    """Scales that bfloat16 holds are read exactly; transformers rounds products to bfloat16, this library does not."""
    model = build("llama", qk.QuantConfig(4, group_size=32, scale_dtype=torch.bfloat16)).bfloat16()
    export(model, tmp_path / "out", to="compressed-tensors")
    loaded = load_compressed_tensors(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    theirs(input_ids=IDS)  # the first forward decompresses
    for name, layer in qk.quantized_modules(loaded).items():
        assert torch.equal(layer.quantized_weight().bfloat16(), theirs.get_submodule(name).weight), name


def test_it_trains(tmp_path):
    export(build("llama", qk.QuantConfig(2, "lsq", 32)), tmp_path / "out", to="compressed-tensors")
    model = load_compressed_tensors(tmp_path / "out").train()
    optimizer = torch.optim.AdamW(qk.param_groups(model, lr=3e-3))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5
    model.eval().save_pretrained(tmp_path / "trained")
    assert qk.check(model, IDS, loss_fn=lambda out: out.logits.square().mean()).ok


def edit(folder, change=None, tensors=None):
    """Change the quantization in config.json, and tensors."""
    described = json.loads((folder / "config.json").read_text())
    if change is not None:
        change(described["quantization_config"])
    (folder / "config.json").write_text(json.dumps(described))
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})


def test_groups_by_pattern_and_class(tmp_path):
    """As llm-compressor writes them."""
    model = build("llama", qk.QuantConfig(4, "lsq", 32))
    export(model, tmp_path / "out", to="compressed-tensors")
    for target in ("Linear", r"re:.*\.layers\..*"):
        edit(tmp_path / "out", lambda q, target=target: q["config_groups"]["group_0"].update(targets=[target]))
        assert_same_bits(logits(load_compressed_tensors(tmp_path / "out")), logits(model))


def test_the_most_specific_group_counts(tmp_path):
    """By name, then by pattern, then by class, as compressed-tensors chooses, and not the first one."""
    model = build("llama", {"*q_proj": qk.QuantConfig(8, "lsq", 32), "*": qk.QuantConfig(4, "lsq", 32)})
    export(model, tmp_path / "out", to="compressed-tensors")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    four, eight = sorted(groups.values(), key=lambda group: group["weights"]["num_bits"])
    names = eight["targets"]
    for specific, general in ((names, r"re:.*"), (names, "Linear"), ([r"re:.*q_proj"], "Linear")):
        found = {"first": four | {"targets": [general]}, "second": eight | {"targets": specific}}
        edit(tmp_path / "out", lambda q, found=found: q.update(config_groups=found))
        assert_same_bits(logits(load_compressed_tensors(tmp_path / "out")), logits(model))


def test_a_quantized_head_that_the_file_ties(tmp_path):
    """Tying would put the embedding in its place."""
    export(build("llama", qk.QuantConfig(4, "lsq", 32)), tmp_path / "out", to="compressed-tensors")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" in tensors
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        tensors[f"lm_head.{part}"] = tensors[f"{Q}.{part}"].clone()
    save_file(tensors, file, {"format": "pt"})
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(described | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"quantizes lm_head, which its config\.json ties to the embedding"):
        load_compressed_tensors(tmp_path / "out")


Q = "model.layers.0.self_attn.q_proj"
REFUSED = {
    "activations": (
        lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 8}), None, UnfitError,
        r"quantizes its input \(8 bits\)",
    ),
    "outputs": (
        lambda q: q["config_groups"]["group_0"].update(output_activations={"num_bits": 8}), None, UnfitError,
        r"quantizes its output \(8 bits\), which is not read",
    ),
    "no group": (lambda q: q.update(config_groups={}), None, UnfitError, "no group of config_groups names it"),
    "float": (
        lambda q: q["config_groups"]["group_0"]["weights"].update(type="float"), None, UnfitError, "4-bit float weight",
    ),
    "another width": (
        lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=3), None, CheckpointError,
        r"weight_packed is torch.int32 of shape .*, must be torch.int32 of shape .* for 3 bits",
    ),
    "another order": (
        None, lambda t: t.update({f"{Q}.weight_g_idx": torch.arange(64) % 2}), UnfitError, "inputs in another order",
    ),
    "scales missing": (None, lambda t: t.pop(f"{Q}.weight_scale"), CheckpointError, "without weight_scale"),
    "a norm missing": (None, lambda t: t.pop("model.norm.weight"), CheckpointError, "has no model.norm.weight"),
    "too much": (None, lambda t: t.update(more=torch.ones(1)), CheckpointError, "has more, which LlamaForCausalLM"),
    "tiny scales": (None, lambda t: t[f"{Q}.weight_scale"].mul_(1e-9), UnfitError, "scales below 1e-05"),
    "no zero points": (
        lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False), None, CheckpointError,
        "has no weight_zero_point",
    ),
    "zero points": (
        None, lambda t: t.update({f"{Q}.weight_zero_point": torch.ones(8, 2, dtype=torch.int32)}), CheckpointError,
        "has weight_zero_point, and its group of config_groups says that it is symmetric",
    ),
    "rotations": (
        lambda q: q.update(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}), None, UnfitError,
        "has a transform_config",
    ),
    "another method": (lambda q: q.update(quant_method="gptq"), None, CheckpointError, "has the quantization 'gptq'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    change, tensors, error, message = REFUSED[case]
    export(build("llama", qk.QuantConfig(4, "lsq", 32)), tmp_path / "out", to="compressed-tensors")
    edit(tmp_path / "out", change, tensors)
    with pytest.raises(error, match=message):
        load_compressed_tensors(tmp_path / "out")
