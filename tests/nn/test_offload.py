"""Models whose tensors accelerate offloads, and models on the meta device."""

import copy

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.methods import SQuAT, WinQ
from qatkernels.nn import QuantConfig, calibrate
from qatkernels.testing.compare import assert_same_bits

accelerate = pytest.importorskip("accelerate")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.tied, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.head(self.tied(self.first(x).relu()))


X = torch.linspace(-1, 1, 48).view(3, 16)

CONFIGS = {
    "w4": QuantConfig(4),
    "affine": QuantConfig(4, "affine", group_size=8),
    "lsq+": QuantConfig(4, act_bits=8, act_scheme="lsq+", out_bits=8),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request):
    model = qk.quantize_model(Model(), request.param)
    calibrate(model, X)
    return model.eval()


def offload(model, how, folder, buffers):
    if how == "cpu":
        return accelerate.cpu_offload(model, "cpu", offload_buffers=buffers)
    if how == "disk":
        return accelerate.disk_offload(model, folder, "cpu", offload_buffers=buffers)
    places = {"first": "cpu", "tied": "disk", "head": "disk"}
    return accelerate.dispatch_model(model, places, "cpu", offload_dir=folder, offload_buffers=buffers)


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers"])
@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
@pytest.mark.parametrize("packed", [False, True], ids=["quantized", "packed"])
def test_offloaded_models_compute_the_same(model, packed, how, buffers, tmp_path):
    model = qk.pack_model(model) if packed else model
    wanted = model(X).detach()
    offload(model, how, tmp_path, buffers)
    tensors = [*model.head.parameters(), *(model.head.buffers() if buffers else ())]
    assert all(t.is_meta for t in tensors)
    for _ in range(2):
        assert_same_bits(model(X), wanted)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_packing_an_offloaded_model_says_what_to_do(model, how, tmp_path):
    wanted = qk.pack_model(copy.deepcopy(model))(X)
    offload(model, how, tmp_path, False)
    with pytest.raises(ValueError, match=r"first cannot be packed: its weight is offloaded by accelerate.*first$"):
        qk.pack_model(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same_bits(qk.pack_model(model)(X), wanted)


def test_what_would_be_lost_is_refused(tmp_path):
    """Scales and weights that are written to an offloaded layer are gone at its next forward."""
    made = qk.quantize_model(Model(), QuantConfig(4)).eval()
    state, wanted = copy.deepcopy(made.state_dict()), made(X).detach()
    model = offload(made, "disk", tmp_path, False)
    calls = {
        "requantize": lambda: model.first.requantize(QuantConfig(2)),
        "quantize": lambda: qk.quantize_model(model, QuantConfig(2), requantize=True),
        "reset scales": model.first.reset_scale,
        "load": lambda: qk.load_weights(model, state),
        "check": lambda: qk.check(model, X),
        "train": lambda: WinQ(model, reset_every=1, reset_weight=0.5, noise_std=0.0),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError, match=f"offloaded by accelerate, and on the meta device: {what} before"):
            call()
    with pytest.raises(ValueError, match="offloaded by accelerate, and on the meta device: train before"):
        SQuAT(model, torch.optim.SGD(model.parameters(), 0.1)).step(lambda: model(X).sum())
    assert_same_bits(model(X), wanted)


def test_quantizing_an_offloaded_model_is_refused():
    model = accelerate.cpu_offload(Model(), "cpu")
    with pytest.raises(ValueError, match=r"has a forward of its own on the instance.*quantize before wrapping it"):
        qk.quantize_model(model, QuantConfig(4))


@pytest.mark.parametrize("assign", [False, True])
def test_packing_a_model_without_data_and_filling_it(model, assign):
    config, wanted = model.first.config, qk.pack_model(model)
    with torch.device("meta"):
        empty = qk.pack_model(qk.quantize_model(Model(), config))
    assert all(t.is_meta for t in empty.state_dict().values())
    assert empty(X.to("meta")).shape == (3, 4)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(wanted.state_dict(), assign=assign)
    assert_same_bits(empty.eval()(X), wanted(X))
