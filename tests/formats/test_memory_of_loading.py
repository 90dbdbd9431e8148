"""Loading a packed model takes the memory of its file: the model is never there in full precision."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.files import CheckpointError
from qatkernels.formats import load_packed, save_packed
from qatkernels.nn import QuantConfig
from qatkernels.testing.compare import assert_same_bits

WIDTH, LAYERS, WORDS = 2048, 10, 4096
SCRIPT = """
import json, sys
import torch
import qatkernels as qk
from tests.formats.test_memory_of_loading import build

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

qk.load_packed(sys.argv[1], build)   # what is imported and allocated once
open("/proc/self/clear_refs", "w").write("5")   # the peak begins anew
before = status("VmRSS")
model = qk.load_packed(sys.argv[2], build)
print(json.dumps([status("VmHWM") - before, model(torch.arange(3)).double().sum().item()]))
"""


def build(config):
    layers = [nn.Linear(config["width"], config["width"]) for _ in range(config["layers"])]
    return nn.Sequential(nn.Embedding(config["words"], config["width"]), *layers)


def saved(path, width, layers, words):
    torch.manual_seed(0)
    config = {"width": width, "layers": layers, "words": words}
    model = qk.pack_model(qk.quantize_model(build(config), QuantConfig(4), warn_below=0).eval())
    save_packed(model, path, config)
    return model


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_is_the_size_of_the_file(tmp_path):
    saved(tmp_path / "small", 8, 1, 8)
    model = saved(tmp_path / "large", WIDTH, LAYERS, WORDS)
    size = (tmp_path / "large").stat().st_size
    whole = 4 * (LAYERS * WIDTH * WIDTH + WORDS * WIDTH)
    assert size < whole / 3.5  # 200 MB in full precision
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "small"), str(tmp_path / "large")],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, total = json.loads(done.stdout)
    assert total == pytest.approx(model(torch.arange(3)).double().sum().item())
    one_layer = WIDTH * WIDTH  # its codes, a byte each, and what the search for the largest takes
    assert peak < size + 2 * one_layer, f"{peak / 1e6:.1f} MB for a file of {size / 1e6:.1f} MB"


class Tied(nn.Module):
    """Ties, a buffer that no file has, a parameter that is frozen, and one in another dtype."""

    def __init__(self, broken=False):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(16).bfloat16()
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
        self.register_buffer("table", torch.arange(16.0), persistent=False)
        self.register_buffer("kept", torch.full((16,), 2.0))
        if broken:
            self.register_buffer("lost", self.frozen.detach() * 2, persistent=False)

    def forward(self, tokens):
        x = self.body(self.embedding(tokens)) + self.frozen + self.table + self.kept
        return self.head(self.norm(x.bfloat16()).float())


def test_what_is_shared_frozen_or_not_in_the_file(tmp_path):
    torch.manual_seed(0)
    model = qk.pack_model(qk.quantize_model(Tied(), QuantConfig(4), include="body").eval())
    save_packed(model, tmp_path / "model")
    assert torch.get_default_device().type == "cpu"
    loaded = load_packed(tmp_path / "model", lambda config: Tied())
    assert loaded.head.weight is loaded.embedding.weight
    assert not loaded.frozen.requires_grad
    assert loaded.norm.weight.dtype == torch.bfloat16
    assert_same_bits(loaded(torch.arange(8)), model(torch.arange(8)))
    assert not nn.Linear(2, 2).weight.is_meta  # modules made later have data again
    loaded(torch.arange(8)).sum().backward()
    assert loaded.embedding.weight.grad is not None
    with pytest.raises(CheckpointError, match="lost is on the meta device and not in the file"):
        load_packed(tmp_path / "model", lambda config: Tied(broken=True))


class Reads(nn.Module):
    """One Parameter of two modules; another whose values are replaced, or looked at."""

    def __init__(self, how):
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.first, self.second = nn.Module(), nn.Module()
        shared = nn.Parameter(torch.randn(16))
        self.first.weight, self.second.weight = shared, shared
        self.gain = nn.Parameter(torch.rand(16) + 0.5)
        if how == "replaces":
            self.gain.data = torch.ones(16)
        if how == "reads" and self.gain.max() > 2:
            raise ValueError("never")

    def forward(self, x):
        return self.body(x) * self.gain + self.first.weight + self.second.weight


@pytest.mark.parametrize("how", ["only registers", "replaces", "reads"])
def test_models_that_share_and_read_parameters(tmp_path, how):
    model = qk.pack_model(qk.quantize_model(Reads(how), QuantConfig(4), include="body", warn_below=0).eval())
    save_packed(model, tmp_path / "model")
    loaded = load_packed(tmp_path / "model", lambda config: Reads(how))
    assert loaded.first.weight is loaded.second.weight
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    x = torch.randn(3, 16)
    assert_same_bits(loaded(x), model(x))


def test_errors_of_build_are_its_own(tmp_path):
    saved(tmp_path / "model", 16, 1, 8)

    def broken(config):
        raise RuntimeError("no such model")

    with pytest.raises(RuntimeError, match="no such model"):
        load_packed(tmp_path / "model", broken)


def test_a_model_without_any_data(tmp_path):
    config = {"width": 16, "layers": 2, "words": 8}
    model = saved(tmp_path / "model", **config)

    def empty(config):
        with torch.device("meta"):
            return build(config)

    assert_same_bits(load_packed(tmp_path / "model", empty)(torch.arange(8)), model(torch.arange(8)))
