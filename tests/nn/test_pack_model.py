"""Packing whole models, their file, and the errors for files that cannot be loaded."""

import copy
import json
import pickle
import random
import struct

import pytest
import torch
from safetensors.torch import save as to_bytes
from torch import nn

import qatkernels as qk
from qatkernels import CheckpointError, files
from qatkernels.dtypes import dtype_name
from qatkernels.nn import PACKERS, QuantConfig, QuantLinear, calibrate, model_bytes, packed_modules
from qatkernels.testing.compare import assert_same_bits


class Model(nn.Module):
    """An embedding, tied and shared layers, a norm, an excluded head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.again = self.first
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.to(dtype)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.second(torch.relu(self.first(x)))
        return self.lm_head(self.norm(x + self.again(x)))


TOKENS = torch.tensor([[1, 2, 3, 10], [4, 0, 9, 9]])


def quantized(config, dtype=torch.float32):
    model = qk.quantize_model(Model(dtype), config, exclude=("lm_head",))
    calibrate(model, TOKENS)
    return model.eval()


def build(config):
    return Model()


def test_outputs(config):
    model = quantized(config)
    wanted = model(TOKENS)
    packed = qk.pack_model(copy.deepcopy(model))
    assert sorted(packed_modules(packed)) == ["first", "second"]
    assert type(packed.lm_head) is nn.Linear
    assert packed.again is packed.first
    assert not any(isinstance(m, QuantLinear) for m in packed.modules())
    torch.testing.assert_close(packed(TOKENS), wanted, rtol=1e-5, atol=1e-5)


def test_tied_weights_are_packed_once_and_stay_tied():
    packed = qk.pack_model(quantized(QuantConfig(4)))
    assert packed.first.weight is packed.second.weight
    assert packed.lm_head.weight is packed.embedding.weight
    for other in (copy.deepcopy(packed), packed.bfloat16(), pickle.loads(pickle.dumps(packed)), packed.to("meta")):
        assert other.first.weight.packed is other.second.weight.packed
        assert other.first.bias is not other.second.bias
    # A weight tied with other scales is another packed weight.
    model = quantized(QuantConfig(4))
    model.second.scale = nn.Parameter(model.first.scale * 2)
    packed = qk.pack_model(model)
    assert packed.first.weight is not packed.second.weight


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_bytes(bits, scale_dtype, tmp_path):
    """Codes, scales and the rest, in memory; a header more on the disk."""
    packed = qk.pack_model(quantized(QuantConfig(bits, group_size=8)), scale_dtype=scale_dtype)
    stored = 2 if bits == 1.58 else bits
    codes, scales = 16 * (16 * stored // 8), 16 * 2 * scale_dtype.itemsize
    rest = 4 * (11 * 16 + 2 * 16 + 2 * 16)  # embedding and head, two biases, norm
    assert packed.first.weight.nbytes == codes + scales
    assert model_bytes(packed) == codes + scales + rest
    qk.save_packed(packed, tmp_path / "model")
    content = (tmp_path / "model").read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    assert len(content) == 8 + header + codes + scales + rest


def test_a_layer_alone_and_a_model_without():
    layer = QuantLinear(8, 4, config=QuantConfig(2))
    assert isinstance(qk.pack_model(layer), qk.PackedLinear)
    with pytest.raises(ValueError, match="no quantized layer"):
        qk.pack_model(nn.Sequential(nn.Linear(8, 4)))


def test_a_layer_that_cannot_be_packed_is_named_and_nothing_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = qk.quantize_model(model, QuantConfig(4))
    with torch.no_grad():
        model[1].scale.fill_(1e6)
    before = list(model)
    with pytest.raises(ValueError, match=r"1 cannot be packed: scale is up to 1000000.0, must be finite in .*float16"):
        qk.pack_model(model, scale_dtype=torch.float16)
    assert all(a is b for a, b in zip(model, before, strict=True))


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
def test_weights_of_a_training_that_diverged(bits):
    model = qk.quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), QuantConfig(bits))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    before = list(model)
    with pytest.raises(ValueError, match="1 cannot be packed: w has NaN in 1 of 64 elements"):
        qk.pack_model(model)
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_another_kind_of_layer_is_an_entry(monkeypatch):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.grid, self.group_size, self.zero_point, self.act, self.bias = qk.grids.lsq(4), None, None, None, None
            self.weight = nn.Parameter(torch.randn(3, 8, 16))
            self.scale = nn.Parameter(self.grid.init_scale(self.weight))

    class Special(Other):
        pass

    monkeypatch.setitem(PACKERS, Other, qk.GroupedPackedLinear.from_quantized)
    model = nn.Sequential(Other(), Special(), QuantLinear(16, 8, config=QuantConfig(2)))
    packed = qk.pack_model(model)
    assert [type(m) for m in packed] == [qk.GroupedPackedLinear, qk.GroupedPackedLinear, qk.PackedLinear]


def test_transformer_encoder():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0), 1, enable_nested_tensor=False
    )
    with pytest.warns(UserWarning, match="left in full precision"):
        model = qk.quantize_model(encoder, QuantConfig(4)).eval()
    x = torch.randn(2, 5, 16)
    wanted = model(x)
    with torch.no_grad():
        torch.testing.assert_close(qk.pack_model(model)(x), wanted, rtol=1e-5, atol=1e-5)


ACTS = (
    {}, {"act_bits": 8}, {"act_bits": 4, "act_scheme": "lsq+"}, {"act_bits": 8, "act_scheme": "lsq"},
    {"act_bits": 8, "out_bits": 8},
)  # fmt: skip


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_file_round_trip(config, act, dtype, tmp_path):
    model = quantized(QuantConfig(**{**config.to_dict(), **act}), dtype)
    packed = qk.pack_model(model, scale_dtype=torch.float16)
    path = tmp_path / "deep" / "model.safetensors"
    qk.save_packed(packed, path, {"name": "x", "sizes": [1, 2]})
    seen = []
    loaded = qk.load_packed(path, lambda config: seen.append(config) or Model())
    assert seen == [{"name": "x", "sizes": [1, 2]}]
    assert not loaded.training
    assert_same_bits(loaded(TOKENS), packed(TOKENS))
    assert loaded.first.weight is loaded.second.weight
    assert loaded.again is loaded.first
    assert loaded.lm_head.weight is loaded.embedding.weight
    assert model_bytes(loaded) == model_bytes(packed)
    assert repr(loaded) == repr(packed)
    qk.save_packed(loaded, tmp_path / "again", {"name": "x", "sizes": [1, 2]})
    (tensors, header), (wanted, wanted_header) = files.load(tmp_path / "again"), files.load(path)
    assert header == wanted_header
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert_same_bits(tensor, wanted[name])


def test_a_tied_bias_and_a_layer_alone(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    packed = qk.pack_model(qk.quantize_model(model, QuantConfig(3)))
    qk.save_packed(packed, tmp_path / "x")
    loaded = qk.load_packed(tmp_path / "x", lambda _: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert loaded[0].bias is loaded[1].bias
    assert loaded[0].weight is not loaded[1].weight
    alone = qk.pack_model(QuantLinear(8, 4, config=QuantConfig(2)))
    qk.save_packed(alone, tmp_path / "y")
    x = torch.randn(2, 8)
    assert_same_bits(qk.load_packed(tmp_path / "y", lambda _: nn.Linear(8, 4))(x), alone(x))


def test_what_cannot_be_saved(tmp_path):
    packed = qk.pack_model(quantized(QuantConfig(2)))
    for model, config, message in (
        (nn.Linear(2, 2), None, "no packed layer"),
        (packed, {"x": object()}, "must be JSON-able"),
        (packed, {"x": {1, 2}}, "must be JSON-able"),
    ):
        with pytest.raises(ValueError, match=message):
            qk.save_packed(model, tmp_path / "x", config)
    packed.first.act = nn.ReLU()
    with pytest.raises(ValueError, match=r"first\.act is a ReLU"):
        qk.save_packed(packed, tmp_path / "x")
    packed.first.act, packed.first.out_act = None, nn.ReLU()
    with pytest.raises(ValueError, match=r"first\.out_act is a ReLU"):
        qk.save_packed(packed, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file, its content, and the outputs of the model in it."""
    torch.manual_seed(0)
    packed = qk.pack_model(quantized(QuantConfig(2, act_bits=8, act_scheme="lsq", out_bits=8)))
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    qk.save_packed(packed, path, {"name": "x"})
    return path, path.read_bytes(), packed(TOKENS)


def load_or_error(path, content):
    """Return what a changed file loads as, or the error, which must name the file."""
    path.write_bytes(content)
    try:
        return qk.load_packed(path, build)(TOKENS)
    except CheckpointError as error:
        caught = error
    assert str(path) in str(caught)
    assert "\n" not in str(caught)
    return caught


def test_any_flipped_byte_is_noticed_or_harmless(saved, tmp_path):
    """Only a change in the padding of the header may go unnoticed."""
    _, content, wanted = saved
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    places = {*range(40), *(draw.randrange(len(content)) for _ in range(500))}
    noticed = 0
    for place in sorted(places):
        changed = bytearray(content)
        changed[place] ^= draw.randrange(1, 256)
        result = load_or_error(tmp_path / "x", bytes(changed))
        if isinstance(result, CheckpointError):
            noticed += 1
        else:
            assert_same_bits(result, wanted, f"seed {seed}, byte {place}")
    assert noticed > 0.95 * len(places), seed


def test_a_file_cut_short_is_named(saved, tmp_path):
    _, content, _ = saved
    draw = random.Random(1)
    for length in {0, 1, 7, 8, 9, len(content) - 1, *(draw.randrange(len(content)) for _ in range(100))}:
        assert isinstance(load_or_error(tmp_path / "x", content[:length]), CheckpointError), length
    assert isinstance(load_or_error(tmp_path / "x", content + b"\0"), CheckpointError)


def test_foreign_files(saved, tmp_path):
    from safetensors.torch import save

    for content, message in (
        (b"", "is damaged"),
        (b"some text, longer than the first eight bytes", "is damaged"),
        (pickle.dumps({"a": 1}) * 10, "is damaged"),
        (save({"weight": torch.zeros(3)}), "is not a file of qatkernels"),
        (save({"weight": torch.zeros(3)}, {"header": "{}"}), "is not a file of qatkernels"),
        (save({"weight": torch.zeros(3)}, {"header": "{}", "sha256": "0"}), "its digest does not match"),
    ):
        assert message in str(load_or_error(tmp_path / "x", content))
    files.save(tmp_path / "train", {"weight": torch.zeros(3)}, {"step": 3})
    for path, message in (
        (tmp_path / "train", "is not a packed model: its format is None"),
        (tmp_path / "missing", "cannot be read"),
        (tmp_path, "cannot be read|is damaged"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            qk.load_packed(path, build)
        assert str(path) in str(caught.value)


def _changed(header, *keys, to):
    """Return a copy of a header with one entry replaced, or deleted where it becomes None."""
    header = copy.deepcopy(header)
    place = header
    for key in keys[:-1]:
        place = place[key]
    if to is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = to
    return header


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("version", 2), "is version 2 of the format, this qatkernels reads 1"),
        (("version", None), "is version None"),
        (("format", "gguf"), "its format is 'gguf'"),
        (("layers", None), "there is no 'layers'"),
        (("version", True), "is version True"),
        (("version", 1.0), "is version 1.0"),
        (("layers", 7), "layers is 7, must be a list of objects"),
        (("layers", [3]), "layers is .3., must be a list of objects"),
        (("layers", []), "does not fit this model: .*first.weight"),
        (("layers", 0, "scheme", "magic"), "scheme is 'magic'"),
        (("layers", 0, "bits", 4), "packed is torch.uint8"),
        (("layers", 0, "bits", "2"), "bits is '2'"),
        (("layers", 0, "cols", 12), "packed is torch.uint8"),
        (("layers", 0, "cols", 10**18), "packed is torch.uint8"),
        (("layers", 0, "cols", -3), "cols is -3, must be an integer of at least 0"),
        (("layers", 0, "cols", "16"), r"layers\[0\].cols is '16', must be an integer"),
        (("layers", 0, "cols", 16.0), "cols is 16.0, must be an integer"),
        (("layers", 0, "cols", None), "there is no 'cols'"),
        (("layers", 0, "bits", True), "bits is True, must be a number"),
        (("layers", 0, "scheme", 2), "scheme is 2, must be a string"),
        (("layers", 0, "kind", "conv"), "kind is 'conv', must be one of"),
        (("layers", 0, "kind", ["linear"]), "kind is .'linear'., must be one of"),
        (("layers", 0, "kind", "grouped_linear"), "must have 3 dimensions"),
        (("layers", 0, "act_bits", 99), "act_bits is 99"),
        (("layers", 0, "act_bits", 8.0), "act_bits is 8.0, must be null or 2 to 8"),
        (("layers", 0, "act_bits", True), "act_bits is True, must be null or 2 to 8"),
        (("layers", 0, "bias", "no"), "bias is 'no', must be 'trains' or 'frozen'"),
        (("layers", 0, "zero_point", True), "there is no 'first.weight.zero_point'"),
        (("layers", 0, "zero_point", False), "zero_point is False, must be true"),
        (("layers", 0, "weight", "nowhere."), "there is no 'nowhere.packed'"),
        (("layers", 0, "names", ["nowhere"]), "has no attribute `nowhere`"),
        (("layers", 0, "names", ["norm.weight"]), "is not an nn.Module"),
        (("layers", 0, "names", ["embedding"]), r"embedding has shape \(16, 16\) in the file and \(11, 16\)"),
        (("layers", 0, "names", []), "does not fit"),
        (("layers", 0, "act", {"scheme": "lsq", "bits": 8, "offset": True}), "offset is True"),
        (("layers", 0, "act", {}), "there is no 'scheme'"),
        (("layers", 0, "out_act", {}), "there is no 'scheme'"),
        (("layers", 0, "out_act", 8), r"layers\[0\].out_act is 8, must be an object"),
        (("layers", 0, "out_act", {"scheme": "lsq", "bits": "8", "offset": False}), "out_act.bits is '8'"),
        (("layers", 0, "act", {"scheme": "lsq", "bits": 8, "offset": 0}), "offset is 0, must be true or false"),
        (("aliases", {"second.bias": "gone"}), "there is no 'gone'"),
        (("aliases", {}), "Missing key"),
        (("aliases", []), "aliases is .., must be an object of names"),
        (("config", 3), "config is 3, must be an object"),
        (("config", None), "there is no 'config'"),
    ],
    ids=str,
)
def test_a_header_that_does_not_fit(saved, tmp_path, change, message):
    """Written with a digest that matches, as another program or version might."""
    tensors, header = files.load(saved[0])
    files.save(tmp_path / "x", tensors, _changed(header, *change[:-1], to=change[-1]))
    with pytest.raises(CheckpointError, match=message) as caught:
        qk.load_packed(tmp_path / "x", build)
    assert str(tmp_path / "x") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("first.weight.packed", lambda t: t[:5], "packed is torch.uint8 of shape"),
        ("first.weight.packed", lambda t: t.to(torch.int8), "packed is torch.int8"),
        ("first.weight.scale", lambda t: t.double(), "scale is torch.float64"),
        ("first.weight.scale", lambda t: t * torch.nan, "is not finite"),
        ("first.weight.scale", lambda t: t[:, :0], "scale has 0 columns"),
        ("first.weight.zero_point", lambda t: torch.zeros(16, 1), "zero_point is given, but scheme"),
        ("first.bias", lambda t: t[:3], "bias has shape"),
        ("first.bias", lambda t: t.to(torch.uint8), "the bias of first is torch.uint8, must be one of"),
        ("first.bias", lambda t: t.to(torch.complex64), "the bias of first is torch.complex64, must be one of"),
        ("first.bias", lambda t: t.to(torch.float8_e4m3fn), "the bias of first is torch.float8_e4m3fn, must be one of"),
        ("first.bias", lambda t: None, "there is no 'first.bias'"),
        ("norm.weight", lambda t: t[:3], "size mismatch for norm.weight"),
        ("norm.weight", lambda t: t.to(torch.uint8), "norm.weight is torch.uint8, must be one of"),
        ("norm.weight", lambda t: t.to(torch.complex64), "norm.weight is torch.complex64, must be one of"),
        ("stranger", lambda t: torch.zeros(3), "Unexpected key"),
        ("embedding.weight", lambda t: None, "there is no 'embedding.weight'"),
        ("norm.bias", lambda t: None, "Missing key"),
    ],
)
def test_tensors_that_do_not_fit(saved, tmp_path, name, change, message):
    tensors, header = files.load(saved[0])
    tensors[name] = change(tensors.get(name))
    files.save(tmp_path / "x", {n: t for n, t in tensors.items() if t is not None}, header)
    with pytest.raises(CheckpointError, match=message) as caught:
        qk.load_packed(tmp_path / "x", build)
    assert str(tmp_path / "x") in str(caught.value)


def rewritten(path, **changes):
    """Write a file anew with a digest that matches, with fields of the first layer changed, or deleted where None."""
    tensors, header = files.load(path)
    for key, value in changes.items():
        header = _changed(header, "layers", 0, key, to=value)
    files.save(path, tensors, header)


def test_what_a_frozen_bias_is(tmp_path):
    packed = qk.pack_model(qk.quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), QuantConfig(4)))
    packed[0].bias.requires_grad_(False)
    qk.save_packed(packed, tmp_path / "x")
    loaded = qk.load_packed(tmp_path / "x", lambda _: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert [layer.bias.requires_grad for layer in loaded] == [False, True]


def test_a_bias_that_the_file_or_the_model_has_alone(saved, tmp_path):
    path = tmp_path / "x"
    tensors, header = files.load(saved[0])
    del tensors["first.bias"]
    del header["layers"][0]["bias"], header["aliases"]["again.bias"]
    files.save(path, tensors, header)
    with pytest.raises(CheckpointError, match="first has a bias in the model only"):
        qk.load_packed(path, build)
    packed = qk.pack_model(QuantLinear(8, 4, config=QuantConfig(2)))
    qk.save_packed(packed, path)
    with pytest.raises(CheckpointError, match="the layer has a bias in the file only"):
        qk.load_packed(path, lambda _: nn.Linear(8, 4, bias=False))


def test_files_of_before_do_not_name_bias_and_zero_point(tmp_path):
    packed, path = qk.pack_model(QuantLinear(8, 4, config=QuantConfig(4, "affine"))), tmp_path / "x"
    qk.save_packed(packed, path)
    rewritten(path, bias=None, zero_point=None)
    x = torch.randn(2, 8)
    assert_same_bits(qk.load_packed(path, lambda _: nn.Linear(8, 4))(x), packed(x))


def test_codes_and_zero_points_that_a_grid_does_not_have(tmp_path):
    path = tmp_path / "x"
    qk.save_packed(qk.pack_model(QuantLinear(8, 4, config=QuantConfig(1.58))), path)
    tensors, header = files.load(path)
    tensors["weight.packed"][1, 0] = 0b11
    files.save(path, tensors, header)
    with pytest.raises(CheckpointError, match=r"weight\.packed has a code 2, must be -1 to 1"):
        qk.load_packed(path, lambda _: nn.Linear(8, 4))
    qk.save_packed(qk.pack_model(QuantLinear(8, 4, config=QuantConfig(4, "affine"))), path)
    tensors, header = files.load(path)
    del tensors["weight.zero_point"]
    files.save(path, tensors, header)
    with pytest.raises(CheckpointError, match=r"there is no 'weight\.zero_point'"):
        qk.load_packed(path, lambda _: nn.Linear(8, 4))


def test_another_model_and_a_header_that_is_no_object(saved, tmp_path):
    with pytest.raises(CheckpointError, match="does not fit this model"):
        qk.load_packed(saved[0], lambda _: nn.Linear(2, 2))
    empty = qk.load_packed(saved[0], lambda _: Model().to("meta"))  # takes everything from the file
    assert not any(t.is_meta for t in empty.state_dict().values())
    for text in (json.dumps([1]), "{", "[" * 100_000):
        digest = files.digest({}, text)
        files.write(tmp_path / "x", to_bytes({}, {"header": text, "sha256": digest}))
        with pytest.raises(CheckpointError, match=r"is damaged|must be a JSON object"):
            qk.load_packed(tmp_path / "x", build)


def test_an_error_of_the_callers_function_is_the_callers(saved):
    """The error is raised unchanged, so that a debugger stops at the mistake; the file is not blamed."""
    for build, error in (
        (lambda config: config.nothing, AttributeError),
        (lambda config: config["nothing"], KeyError),
        (lambda config: int("x"), ValueError),
        (lambda config: Model(1, 2, 3), TypeError),
        (lambda config: torch.ones(2) @ torch.ones(3), RuntimeError),
    ):
        with pytest.raises(error) as caught:
            qk.load_packed(saved[0], build)
        assert not isinstance(caught.value, CheckpointError)
        assert str(saved[0]) not in str(caught.value)
    with pytest.raises(TypeError, match="build returned None, must return the model as it was before quantization"):
        qk.load_packed(saved[0], lambda config: None)


def test_a_failed_write_leaves_the_old_file(saved, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(saved[1])
    packed = qk.pack_model(quantized(QuantConfig(4)))
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        qk.save_packed(packed, path)
    assert path.read_bytes() == saved[1]
    monkeypatch.undo()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder cannot be written: Is a directory"):
        qk.save_packed(packed, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "model"]


def test_compile_kernels_has_nothing_to_do_on_a_cpu():
    """tests/test_backend_from_outside.py has a backend with something to compile."""
    model = qk.pack_model(qk.quantize_model(Model(), QuantConfig(bits=4), exclude=["lm_head"]))
    assert qk.compile_kernels(model) == 0, "nothing to compile on a CPU"
    with pytest.raises(ValueError, match="no packed layer, pack_model makes them"):
        qk.compile_kernels(nn.Linear(2, 2))
