"""ONNX files: ONNX Runtime multiplies with the trained values, and whole models compute the same logits."""

import numpy as np
import pytest
import torch

import qatkernels as qk
from qatkernels.formats import UnfitError, export
from qatkernels.formats.integers import IntegerWeight
from qatkernels.formats.onnx import Stored, _NBits
from tests.formats.test_mlx import SCHEMES, quantized, unit
from tests.formats.tiny import IDS, build, logits

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

#: Width and zero points that each scheme gets by itself, and at 4 bits (None: does not fit).
SMALLEST = {
    (1, "paretoq"): ((2, "default"), (4, "default")), (1.58, "paretoq"): ((2, "default"), (4, "default")),
    (2, "lsq"): ((2, "default"), (4, "default")), (3, "lsq"): ((4, "default"), (4, "default")),
    (4, "lsq"): ((4, "default"), (4, "default")), (5, "lsq"): ((8, "default"), None),
    (6, "lsq"): ((8, "default"), None), (8, "lsq"): ((8, "default"), None),
    (2, "seq"): ((2, "float"), (4, "default")), (3, "seq"): ((4, "default"), (4, "default")),
    (4, "seq"): ((4, "float"), (4, "float")), (5, "seq"): ((8, "default"), None), (6, "seq"): ((8, "default"), None),
    (8, "seq"): (None, None), (2, "affine"): ((2, "int"), (4, "default")),
    (3, "affine"): ((4, "default"), (4, "default")), (4, "affine"): ((4, "int"), (4, "int")),
    (5, "affine"): ((8, "default"), None),
    (6, "affine"): ((8, "default"), None), (8, "affine"): ((8, "int"), None),
}  # fmt: skip


def session(source):
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def product(layer, x):
    """Return the product of ONNX Runtime with one operator that has the tensors of a layer."""
    from onnx import TensorProto, helper, numpy_helper

    tensors = {"b": layer.b, "scales": layer.scales} | ({} if layer.zeros is None else {"zeros": layer.zeros})
    attributes = {"K": layer.cols, "N": layer.rows, "bits": layer.stored.bits, "block_size": layer.stored.block}
    node = helper.make_node("MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", **attributes)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in "xy"]
    parts = [numpy_helper.from_array(t.numpy(), name) for name, t in tensors.items()]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], parts)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return session(made.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("cols", [384, 80])
@pytest.mark.parametrize("group_size", [None, 16, 64], ids=["rows", "groups of 16", "groups of 64"])
@pytest.mark.parametrize(("bits", "scheme"), SCHEMES)
def test_onnx_runtime_has_the_trained_values(bits, scheme, group_size, cols):
    """Bit for bit, or with float zero points nearly so: the rows of an identity matrix pick single values."""
    if group_size == 64 and cols == 80:
        cols = 64
    layer = quantized(bits, scheme, group_size, cols)
    weight, wanted = IntegerWeight.of(layer), layer.quantized_weight().detach().numpy()
    for width, expected in zip((None, 4), SMALLEST[bits, scheme], strict=True):
        if expected is None:
            with pytest.raises(UnfitError, match=r"its integers are -?\d+ to \d+, \d+ levels with a spacing of"):
                Stored.of(weight, width)
            continue
        made = _NBits(weight, Stored.of(weight, width), layer, 0)
        assert (made.stored.bits, made.stored.zeros) == expected
        values = product(made, np.eye(cols, dtype=np.float32)).T
        # With float zero points ONNX Runtime computes q * scale - zero point * scale, which rounds thrice, as MLX does.
        units = 2 if made.stored.zeros == "float" else 0
        assert (np.abs(values - wanted) <= units * unit(weight)).all()
        assert made.error == np.abs(values - wanted).max() / np.abs(wanted).max()
        x = np.random.RandomState(0).randn(5, cols).astype(np.float32)
        np.testing.assert_allclose(product(made, x), x @ wanted.T, rtol=0, atol=1e-5)


MODELS = {
    "llama, seq in rows, packed": ("llama", qk.QuantConfig(2, scheme="seq"), True, {}),
    "qwen3, lsq in groups": ("qwen3", qk.QuantConfig(4, group_size=32), False, {"tie_word_embeddings": True}),
    "gpt2, which has Conv1D and biases": ("gpt2", qk.QuantConfig(3, scheme="lsq"), True, {}),
}


@pytest.mark.parametrize("case", MODELS)
def test_whole_models(case, tmp_path):
    kind, config, packs, settings = MODELS[case]
    model = build(kind, config, **settings)
    wanted = logits(model)
    model = qk.pack_model(model) if packs else model.train()
    before = dict(model.named_modules())
    report = export(model, tmp_path / "model.onnx", to="onnx")
    assert report.exact == (config.grid.scheme != "seq")
    assert ("14 layers have float zero points" in str(report)) == (config.grid.scheme == "seq")
    assert report.nbytes == (tmp_path / "model.onnx").stat().st_size
    assert dict(model.named_modules()) == before  # the layers are back, and the mode
    assert model.training != packs
    run = session(tmp_path / "model.onnx")
    for part in (IDS, IDS[:1, :4]):  # any batch, any length
        found = torch.from_numpy(run.run(None, {"input_ids": part.numpy()})[0])
        expected = wanted[: len(part), : part.shape[1]]
        assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == len(report.rows)


@pytest.mark.parametrize("act_scheme", ["dynamic", "lsq", "lsq+"])
@pytest.mark.parametrize("packs", [False, True], ids=["trained", "packed"])
def test_quantized_inputs(packs, act_scheme, tmp_path):
    torch.manual_seed(0)
    config = qk.QuantConfig(4, act_bits=8, act_scheme=act_scheme)
    model = qk.quantize_model(torch.nn.Sequential(torch.nn.Linear(80, 24)), config)
    x = torch.randn(7, 80) + 0.3
    if act_scheme != "dynamic":
        qk.nn.calibrate(model, x)
    wanted = model.eval()(x)
    model = qk.pack_model(model) if packs else model
    shapes = ({0: torch.export.Dim("n")},)
    export(model, tmp_path / "model.onnx", to="onnx", inputs=(x,), dynamic_shapes=shapes)
    run = session(tmp_path / "model.onnx")
    x = torch.cat([x, torch.zeros(1, 80)])
    found = run.run(None, {run.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found[:7], wanted.detach().numpy(), rtol=0, atol=2e-6)
    assert np.isfinite(found).all()


def test_a_model_that_is_one_layer(tmp_path):
    layer, x = quantized(4, "lsq", None), torch.randn(3, 384)
    report = export(layer, tmp_path / "model.onnx", to="onnx", inputs=(x,), bits=8, accuracy_level=4)
    assert [(row.name, row.stored_as) for row in report.rows] == [("", "MatMulNBits, 8 bits in blocks of 128")]
    (node,) = onnx.load(tmp_path / "model.onnx").graph.node
    assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4


class WithTable(torch.nn.Module):
    """A quantized layer beside a parameter that has 2 GiB for torch, and takes four bytes of memory."""

    def __init__(self):
        super().__init__()
        self.layer = quantized(4, "lsq", None)
        self.table = torch.nn.Parameter(torch.zeros(1).expand(2**29))

    def forward(self, x):
        return self.layer(x) + self.table[0]


def test_refusals(tmp_path):
    def refused(error, match, model, **options):
        before = dict(model.named_modules())
        with pytest.raises(error, match=match):
            export(model, tmp_path / "x.onnx", to="onnx", **options)
        assert dict(model.named_modules()) == before
        assert not list(tmp_path.iterdir())

    refused(ValueError, "bits is 3, must be None or one of", build(), bits=3)
    refused(ValueError, "accuracy_level is 5, must be 0 to 4", build(), accuracy_level=5)
    refused(ValueError, "no quantized layer", build())
    model = torch.nn.Sequential(quantized(4, "lsq", None))
    refused(ValueError, "inputs is None and the model is Sequential, give a tuple of example inputs", model)
    inputs = (torch.randn(3, 384),)
    refused(ValueError, "the weights take .* bytes, a file of ONNX ends at 2 GiB", WithTable(), inputs=inputs)
    model = torch.nn.Sequential(quantized(4, "lsq", 24))
    refused(UnfitError, r"0 \(24 x 384\): groups of 24 are not whole blocks of 16, 32", model, inputs=())
    model = qk.pack_model(build("llama", qk.QuantConfig(4))).bfloat16()
    refused(ValueError, "embed_tokens.weight is torch.bfloat16, must be float32: export model.float", model)
    fresh = torch.nn.Sequential(qk.QuantLinear(32, 32, config=qk.QuantConfig(4, out_bits=8)))
    refused(ValueError, "the scale of 0's output has not been initialized", fresh, inputs=(torch.randn(3, 32),))
    experts = torch.nn.Sequential(qk.GroupedQuantLinear(2, 32, 32, config=qk.QuantConfig(4)))
    refused(UnfitError, "0 is a GroupedQuantLinear, a stack of experts", experts)


QDQ = {
    "binary": qk.QuantConfig(1), "ternary": qk.QuantConfig(1.58), "seq 2": qk.QuantConfig(2),
    "lsq 8": qk.QuantConfig(8),
    "lsq 4, groups": qk.QuantConfig(4, "lsq", 16), "affine 8, groups": qk.QuantConfig(8, "affine", 16),
}  # fmt: skip


@pytest.mark.parametrize("config", QDQ.values(), ids=QDQ)
def test_standard_operators(config, tmp_path):
    """DequantizeLinear gives the trained values bit for bit."""
    layer = quantized(config.bits, config.scheme, config.group_size, 80)
    report = export(layer, tmp_path / "x.onnx", to="onnx", inputs=(torch.eye(80),), qdq=True)
    assert report.exact
    graph = onnx.load(tmp_path / "x.onnx").graph
    assert "DequantizeLinear" in {node.op_type for node in graph.node}
    assert not {node.domain for node in graph.node} - {""}
    run = session(str(tmp_path / "x.onnx"))
    found = torch.from_numpy(run.run(None, {run.get_inputs()[0].name: np.eye(80, dtype=np.float32)})[0]).T
    bias = 0 if layer.bias is None else layer.bias.detach()[:, None]
    assert torch.equal(found, layer.quantized_weight().detach() + bias)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("act_scheme", "signed"), [("dynamic", True), ("lsq", True), ("lsq", False), ("lsq+", True)],
)  # fmt: skip
def test_standard_operators_for_inputs(bits, act_scheme, signed, tmp_path):
    torch.manual_seed(0)
    config = qk.QuantConfig(4, act_bits=bits, act_scheme=act_scheme, act_signed=signed)
    model = qk.quantize_model(torch.nn.Sequential(torch.nn.Linear(80, 24)), config)
    x = torch.randn(64, 80) + 0.3
    if act_scheme != "dynamic":
        qk.nn.calibrate(model, x)
        model[0].act.scale.data.mul_(0.5)  # so that values are beyond the ends
        if model[0].act.zero_point is not None:
            model[0].act.zero_point.data.round_()
    wanted = model.eval()(x).detach().numpy()
    export(model, tmp_path / "x.onnx", to="onnx", inputs=(x,), qdq=True)
    run = session(str(tmp_path / "x.onnx"))
    np.testing.assert_allclose(run.run(None, {run.get_inputs()[0].name: x.numpy()})[0], wanted, rtol=0, atol=3e-6)
    types = [node.op_type for node in onnx.load(tmp_path / "x.onnx").graph.node]
    assert ("QuantizeLinear" in types) == (act_scheme != "dynamic")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [None, 8], ids=["outputs", "inputs and outputs"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("qdq", [False, True])
@pytest.mark.parametrize("packs", [False, True], ids=["trained", "packed"])
def test_quantized_outputs(packs, qdq, bits, inputs, bias, tmp_path):
    torch.manual_seed(0)
    config = qk.QuantConfig(4, act_bits=inputs, act_scheme="lsq" if inputs else "dynamic", out_bits=bits)
    model = qk.quantize_model(torch.nn.Sequential(torch.nn.Linear(80, 24, bias=bias)), config)
    x = torch.randn(64, 80) + 0.3
    qk.nn.calibrate(model, x)
    with torch.no_grad():
        scale = model[0].out_act.scale.mul_(0.5 if bits == 4 else 0.1).clone()  # so that values are beyond the ends
    wanted = model.eval()(x).detach()
    assert wanted.unique().numel() > 8
    model = qk.pack_model(model) if packs else model
    export(model, tmp_path / "x.onnx", to="onnx", inputs=(x,), qdq=qdq)
    run = session(str(tmp_path / "x.onnx"))
    found = torch.from_numpy(run.run(None, {run.get_inputs()[0].name: x.numpy()})[0])
    codes = (found / scale).round()
    torch.testing.assert_close(found, codes * scale, rtol=1e-6, atol=1e-7)  # whole codes, within their ends
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    off = (codes - (wanted / scale).round()).abs()
    assert off.max() <= 1  # sums in another order, of a value near a tie
    assert (off > 0).float().mean() < 0.01
    nodes = onnx.load(tmp_path / "x.onnx").graph.node
    assert (nodes[-1].op_type == "DequantizeLinear") == qdq


def test_standard_operators_in_a_whole_model(tmp_path):
    model = build("llama", qk.QuantConfig(2, group_size=32, act_bits=8))
    wanted = logits(model)
    export(model, tmp_path / "model.onnx", to="onnx", qdq=True)
    found = torch.from_numpy(session(str(tmp_path / "model.onnx")).run(None, {"input_ids": IDS.numpy()})[0])
    assert (found - wanted).abs().max() < 1e-2 * wanted.abs().max()  # an input near a tie may get another code
    with pytest.raises(ValueError, match="qdq=True goes with neither bits nor accuracy_level"):
        export(model, tmp_path / "x.onnx", to="onnx", qdq=True, bits=4)
    with pytest.raises(UnfitError, match="its integers are -255 to 255, DequantizeLinear takes"):
        export(quantized(8, "seq", None), tmp_path / "x.onnx", to="onnx", inputs=(torch.eye(384),), qdq=True)
