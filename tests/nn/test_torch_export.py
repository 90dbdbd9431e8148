"""torch.export, AOTInductor, torch.jit.trace and torch.fx."""

import pytest
import torch

import qatkernels as qk
from qatkernels.testing.compare import assert_same_bits

CONFIGS = {
    "2": qk.QuantConfig(2),
    "4, groups": qk.QuantConfig(4, group_size=32),
    "affine": qk.QuantConfig(4, "affine"),
    "a8": qk.QuantConfig(4, group_size=32, act_bits=8),
    "a8 learned": qk.QuantConfig(4, act_bits=8, act_scheme="lsq+"),
    "a8 learned, outputs": qk.QuantConfig(4, act_bits=8, act_scheme="lsq", out_bits=8),
}


def make(config, packed):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    model = qk.quantize_model(model, config, exclude=())
    qk.nn.calibrate(model, torch.randn(16, 64))
    return (qk.pack_model(model) if packed else model).eval()


def exported(model):
    shapes = ({0: torch.export.Dim("tokens", min=1, max=64)},)
    return torch.export.export(model, (torch.randn(4, 64),), dynamic_shapes=shapes)


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_export(config, packed, tmp_path):
    """Any number of tokens, also after saving and loading."""
    model = make(config, packed)
    torch.export.save(exported(model), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert ("qatkernels.lowbit_linear.default" in names) == packed
    for tokens in (1, 4, 33):
        x = torch.randn(tokens, 64)
        with torch.no_grad():
            assert_same_bits(program.module()(x), model(x))


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
def test_aot_inductor(packed, tmp_path):
    """A compiled package computes the same, from a file."""
    model = make(CONFIGS["a8"], packed)
    path = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for tokens in (1, 33):
        x = torch.randn(tokens, 64)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_jit_trace(config, packed, tmp_path):
    """A trace computes the same for any number of tokens, also from a file."""
    model = make(config, packed)
    traced = torch.jit.trace(model, torch.randn(4, 64))
    traced.save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    for tokens in (4, 1, 33):
        x = torch.randn(tokens, 64)
        with torch.no_grad():
            assert_same_bits(traced(x), model(x))
            assert_same_bits(loaded(x), model(x))


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
def test_fx_says_what_to_use(packed):
    """Symbolic tracing goes into the layers, unless they are leaves."""
    model = make(CONFIGS["2"], packed)
    with pytest.raises(TypeError, match=r"use torch\.export\.export, or a torch\.fx\.Tracer whose is_leaf_module"):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return type(m).__module__.startswith("qatkernels.") or super().is_leaf_module(m, name)

    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert_same_bits(traced(x), model(x))
