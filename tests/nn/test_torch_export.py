"""torch.export and AOTInductor: programs that run without the modules of this library."""

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
