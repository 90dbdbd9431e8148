"""A state on the way of a quantized model: it says what it is of, and those of earlier versions did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qatkernels import QuantConfig, files, quantize_model
from qatkernels.files import CheckpointError
from qatkernels.trainer import checkpoints
from qatkernels.trainer.parallel import Processes

X = torch.linspace(-1, 1, 48).view(3, 16)


def training(bits: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Linear(16, 8)), QuantConfig(bits, act_bits=8, act_scheme="lsq"))
    return model, torch.optim.AdamW(model.parameters())


def saved(folder: Path) -> tuple[Path, nn.Module]:
    model, optimizer = training(4)
    for _ in range(2):
        model(X).square().mean().backward()
        optimizer.step()
    checkpoints.save(folder, 2, model, optimizer, {"step": 2}, keep=1, group=Processes())
    return checkpoints.newest_first(folder)[0], model


@pytest.mark.parametrize("earlier", [False, True])
def test_is_restored_also_from_an_earlier_version(tmp_path: Path, earlier: bool) -> None:
    path, wanted = saved(tmp_path)
    if earlier:
        tensors, header = files.load(path)
        files.save(path, {n: t for n, t in tensors.items() if not n.endswith("_extra_state")}, header)
    model, optimizer = training(4)
    assert checkpoints.restore(path, model, optimizer, Processes()) == {"step": 2}
    assert torch.equal(model.eval()(X), wanted.eval()(X))


def test_of_other_bits_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit this model.*0\.scale is of bits=4, .*must be of bits=8"):
        checkpoints.restore(path, *training(8), Processes())
