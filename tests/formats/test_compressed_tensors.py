"""Folders in compressed-tensors' format: transformers loads them, with equal weights and equal logits."""

import json
import math

import pytest
import torch

import qatkernels as qk
from qatkernels.files import CheckpointError
from qatkernels.formats import UnfitError, export
from qatkernels.nn.activation import ACTS, learned_acts
from tests.formats.tiny import build, logits

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationScheme  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

#: Bits and scheme, and the width that holds them.
WIDTHS = {
    (2, "lsq"): 2, (3, "lsq"): 3, (4, "lsq"): 4, (5, "lsq"): 5, (6, "lsq"): 6, (8, "lsq"): 8, (1.58, "paretoq"): 2,
    (2, "seq"): 3, (1, "paretoq"): 2, (4, "seq"): 5,
}  # fmt: skip


def written(path):
    """Return what config.json says of the quantization, and the tensors."""
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    return settings, load_file(path / "model.safetensors")


def load(path):
    """Return the model that transformers makes of a folder, which must have all that it needs and nothing else."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def check_loaded(model, path):
    """Check that transformers' model computes the same and has the same weights, bit for bit."""
    loaded = load(path)
    assert torch.equal(logits(loaded), logits(model))  # the first forward decompresses
    for name, layer in qk.quantized_modules(model).items():
        assert torch.equal(loaded.get_submodule(name).weight, layer.quantized_weight()), name
    assert loaded.dtype == model.dtype


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("group_size", [None, 32], ids=["rows", "groups of 32"])
@pytest.mark.parametrize(("bits", "scheme"), WIDTHS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_transformers_loads_the_same_model(kind, bits, scheme, group_size, tied, tmp_path):
    model = build(kind, qk.QuantConfig(bits, scheme=scheme, group_size=group_size), tie_word_embeddings=tied)
    report = export(model, tmp_path / "out", to="compressed-tensors")
    assert report.exact
    width = WIDTHS[bits, scheme]
    assert {row.stored_as for row in report.rows} == {
        f"int{width}, {f'groups of {group_size}' if group_size else 'rows'}"
    }
    assert report.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert ("lm_head.weight" in written(tmp_path / "out")[1]) != tied
    check_loaded(model, tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_tensors_are_what_vllm_allocates(group_size, bits, tmp_path):
    """Names, shapes and dtypes of `CompressedTensorsWNA16.create_weights` in vLLM 0.32, and its choice of a scheme."""
    model = build("llama", qk.QuantConfig(bits, scheme="affine", group_size=group_size))
    export(model, tmp_path / "out", to="compressed-tensors")
    settings, tensors = written(tmp_path / "out")
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["format"] == "pack-quantized"
    (group,) = settings["config_groups"].values()
    arguments = group["weights"]
    assert arguments["type"] == "int"
    assert arguments["num_bits"] in range(2, 9)
    assert arguments["strategy"] == ("group" if group_size else "channel")
    assert arguments["group_size"] == group_size  # None for rows: vLLM takes it as -1
    assert not arguments["dynamic"]
    for name, layer in qk.quantized_modules(model).items():
        n, k = layer.weight.shape
        per_row = k // (group_size or k)
        wanted = {
            "weight_packed": (torch.int32, (n, math.ceil(k * bits / 32))),
            "weight_scale": (torch.float32, (n, per_row)),
            "weight_shape": (torch.int64, (2,)),
            "weight_zero_point": (torch.int32, (math.ceil(n * bits / 32), per_row)),
        }
        for part, (dtype, shape) in wanted.items():
            tensor = tensors.pop(f"{name}.{part}")
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), part
    # Every linear layer is a target or ignored: vLLM looks up the parts of the layers that it fuses by name.
    linears = {name for name, m in build().named_modules() if isinstance(m, torch.nn.Linear)}
    assert {*group["targets"], *settings["ignore"]} == linears
    assert settings["ignore"] == ["lm_head"]
    assert tensors.keys() == {
        name for name in build().state_dict() if name.removesuffix(".weight") not in group["targets"]
    }


@pytest.mark.parametrize("group_size", [None, 32], ids=["rows", "groups of 32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_zero_points(bits, group_size, tmp_path):
    """By compressed-tensors' own decompressor: transformers cannot load zero points. Within the integers it can."""
    model = build("llama", qk.QuantConfig(bits, scheme="affine", group_size=group_size))
    report = export(model, tmp_path / "out", to="compressed-tensors")
    assert "14 layers have zero points, with which transformers" in str(report)
    settings, tensors = written(tmp_path / "out")
    (group,) = settings["config_groups"].values()
    assert group["weights"]["num_bits"] == bits
    scheme = QuantizationScheme(**group)
    decompress = BaseCompressor.get_value_from_registry("pack-quantized").decompress
    for name, layer in qk.quantized_modules(model).items():
        parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        assert torch.equal(decompress(parts, scheme)["weight"], layer.quantized_weight())
    if bits < 8:
        report = export(model, tmp_path / "symmetric", to="compressed-tensors", symmetric=True)
        assert report.exact
        assert max(int(row.stored_as[3]) for row in report.rows) == bits + 1
        check_loaded(model, tmp_path / "symmetric")
    else:
        with pytest.raises(UnfitError, match=r"q_proj \(64 x 64\): its integers are -\d+ to \d+, at most 8 bits"):
            export(model, tmp_path / "symmetric", to="compressed-tensors", symmetric=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_keep_their_dtype(dtype, tmp_path):
    model = build("llama", qk.QuantConfig(1.58, group_size=32, scale_dtype=dtype))
    export(model, tmp_path / "out", to="compressed-tensors")
    tensors = written(tmp_path / "out")[1]
    assert {t.dtype for name, t in tensors.items() if name.endswith("_scale")} == {dtype}
    check_loaded(model, tmp_path / "out")


def test_a_model_in_bfloat16(tmp_path):
    """Readers store scales in the model's dtype. A note is given where that dtype cannot represent them."""
    model = qk.pack_model(build("llama", qk.QuantConfig(3, scale_dtype=torch.bfloat16))).bfloat16()
    assert not export(model, tmp_path / "out", to="compressed-tensors").notes
    loaded = load(tmp_path / "out")
    logits(loaded)
    for name, layer in qk.nn.packed_modules(model).items():
        assert torch.equal(loaded.get_submodule(name).weight, layer.weight.dequantize(torch.bfloat16))
    model = qk.pack_model(build("llama", qk.QuantConfig(3))).bfloat16()
    report = export(model, tmp_path / "lost", to="compressed-tensors")
    assert "14 layers have scales that are no bfloat16 numbers" in str(report)


def test_a_group_for_each_configuration(tmp_path):
    config = {"mlp.*": qk.QuantConfig(2, scheme="lsq", group_size=32), "v_proj": None, "*": qk.QuantConfig(4)}
    model = build("qwen2", config)
    export(model, tmp_path / "out", to="compressed-tensors")
    settings = written(tmp_path / "out")[0]
    groups = list(settings["config_groups"].values())
    assert [(g["weights"]["num_bits"], g["weights"]["strategy"]) for g in groups] == [(4, "channel"), (2, "group")]
    assert all("mlp" in target for target in groups[1]["targets"])
    assert settings["ignore"] == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)] + ["lm_head"]
    check_loaded(model, tmp_path / "out")  # with the biases of qwen2


def test_packed_models_give_the_same_files(tmp_path):
    model = build("llama", qk.QuantConfig(3))
    export(model, tmp_path / "trained", to="compressed-tensors")
    export(qk.pack_model(model), tmp_path / "packed", to="compressed-tensors")
    for file in (tmp_path / "trained").iterdir():
        assert file.read_bytes() == (tmp_path / "packed" / file.name).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_head(tied, tmp_path):
    """A head that is tied to the embedding is stored separately, because only one of them is quantized."""
    model = build("llama", qk.QuantConfig(4), tie_word_embeddings=tied)
    qk.quantize_model(model, qk.QuantConfig(8), include="lm_head", exclude=())
    report = export(model, tmp_path / "out", to="compressed-tensors")
    assert ("lm_head and the embedding, which the model ties, are stored apart" in str(report)) == tied
    assert written(tmp_path / "out")[0]["ignore"] == []
    check_loaded(model, tmp_path / "out")


def test_experts_in_full_precision(tmp_path):
    """They are written by expert, as checkpoints have them; a note says that transformers cannot load that."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = build("qwen3_moe", **sizes)
    qk.quantize_model(model, qk.QuantConfig(4), exclude=("experts.*", "router", "lm_head"), warn_below=0)
    report = export(model, tmp_path / "out", to="compressed-tensors")
    assert "takes the experts of a compressed-tensors model to be quantized" in str(report)
    tensors = written(tmp_path / "out")[1]
    wanted = model.model.layers[1].mlp.experts.gate_up_proj[2, :32]
    assert torch.equal(tensors["model.layers.1.mlp.experts.2.gate_proj.weight"], wanted)


def test_bits(tmp_path):
    model = build("llama", qk.QuantConfig(2, scheme="seq"))
    report = export(model, tmp_path / "out", to="compressed-tensors", bits=4)
    assert {row.stored_as for row in report.rows} == {"int4, rows"}
    check_loaded(model, tmp_path / "out")
    with pytest.raises(UnfitError, match=r"q_proj .*integers are -3 to 3, 2 bits hold -2 to 1; give bits=3"):
        export(model, tmp_path / "two", to="compressed-tensors", bits=2)
    with pytest.raises(ValueError, match="bits is 9, must be None or 2 to 8"):
        export(model, tmp_path / "nine", to="compressed-tensors", bits=9)


def test_tokenizer(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    export(build("llama", qk.QuantConfig(4)), tmp_path / "out", to="compressed-tensors", tokenizer=tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("b a").input_ids == [1, 0]


def test_refusals(tmp_path):
    def refused(error, match, model, **options):
        with pytest.raises(error, match=match):
            export(model, tmp_path / "x", to="compressed-tensors", **options)
        assert not list(tmp_path.glob("x*"))

    plain = qk.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), qk.QuantConfig(4))
    refused(ValueError, "the model is Sequential, export to compressed-tensors takes a model of transf", plain)
    refused(ValueError, "no quantized layer, quantize_model makes them", build())
    model = build("llama", qk.QuantConfig(4, act_bits=8))
    refused(UnfitError, "q_proj quantizes its input: .* by 127.5, this library by 127", model)
    refused(UnfitError, "q_proj quantizes its input", qk.pack_model(model))
    model = build("llama", qk.QuantConfig(8, scheme="seq"))
    refused(UnfitError, "integers are -255 to 255, at most 8 bits hold -128 to 127; use a grid with fewer", model)
    model = build("llama", qk.QuantConfig(4, scheme="affine"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.zero_point[0] += 0.5
    refused(UnfitError, r"layers.1.mlp.up_proj \(96 x 64\): 1 of 96 zero points are no integers", model)
    model = build("gpt2", qk.QuantConfig(4))
    refused(UnfitError, "attn.c_attn is a QuantConv1D, and transformers builds Conv1D of that name", model)
    refused(UnfitError, "attn.c_attn is a PackedLinear, and transformers builds Conv1D", qk.pack_model(model))


def test_a_folder_that_holds_something_stays(tmp_path):
    model = build("llama", qk.QuantConfig(4))
    (tmp_path / "out").mkdir()
    export(model, tmp_path / "out", to="compressed-tensors")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(CheckpointError, match="out exists already: give the name of a new folder"):
        export(model, tmp_path / "out", to="compressed-tensors")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ends", ["inputs", "outputs", "inputs and outputs"])
def test_static_activations(ends, bits, packed, tmp_path):
    """One learned scale of a layer's inputs, and one of its outputs: transformers rounds them to the same values."""
    settings = {"act_bits": bits, "act_scheme": "lsq"} if "inputs" in ends else {}
    settings |= {"out_bits": bits} if "outputs" in ends else {}
    model = build("qwen2", qk.QuantConfig(4, "lsq", **settings))  # which has biases
    qk.nn.calibrate(model, torch.arange(24).view(2, 12))
    scales = {}
    with torch.no_grad():
        for name, layer in qk.quantized_modules(model).items():
            for at, act in learned_acts(layer).items():
                act.scale.mul_(0.6 if bits == 4 else 0.1)  # so that some are clamped
                scales[f"{name}.{ACTS[at]}_scale"] = act.scale.clone()
    wanted = logits(model)
    report = export(qk.pack_model(model) if packed else model, tmp_path / "out", to="compressed-tensors")
    described = "".join(f", int{bits} {end}" for end in ends.split(" and "))
    assert {row.stored_as for row in report.rows} == {f"int4, rows{described}"}
    assert ("14 layers quantize their output, which transformers does; vLLM does not" in str(report)) == (
        "outputs" in ends
    )
    settings, tensors = written(tmp_path / "out")
    (group,) = settings["config_groups"].values()
    for end in ("input", "output"):
        said = group[f"{end}_activations"]
        assert (said is not None) == (f"{end}s" in ends)
        assert said is None or (said["num_bits"], said["dynamic"]) == (bits, False)
    assert len(scales) == 14 * len(ends.split(" and "))
    for name, scale in scales.items():
        assert torch.equal(tensors[name], scale)
    assert torch.equal(logits(load(tmp_path / "out")), wanted)
