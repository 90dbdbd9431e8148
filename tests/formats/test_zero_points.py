"""A model trained with integer zero points leaves in every format that stores them, as it was trained."""

import pytest
import torch

import qatkernels as qk
from qatkernels.formats import UnfitError, export, load_compressed_tensors
from qatkernels.testing.compare import assert_same_bits
from tests.formats.tiny import IDS, build, logits

pytest.importorskip("compressed_tensors")
pytest.importorskip("transformers")


def trained(domain):
    """Train a tiny Llama for 20 steps, in which zero points move by several codes."""
    config = qk.QuantConfig(4, "affine", 32, scale_dtype=torch.float16, zero_point_domain=domain)
    model = build("llama", config, num_hidden_layers=1).train()
    optimizer = torch.optim.AdamW(qk.param_groups(model, lr=1e-3, scale_lr=1e-4))
    zero_points = [layer.zero_point for layer in qk.quantized_modules(model).values()]
    before = [zero_point.detach().clone() for zero_point in zero_points]
    of_zero_points = torch.optim.AdamW(zero_points, lr=0.3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        of_zero_points.step()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for zero_point, old in zip(zero_points, before, strict=True):
        assert not torch.equal(zero_point.detach(), zero_point.detach().round())
        assert not torch.equal(zero_point.detach().round(), old)
    return model.eval()


def test_exports_of_a_trained_model(tmp_path):
    pytest.importorskip("onnx")
    model = trained("int")
    zero_points = torch.cat([layer.zero_point.flatten() for layer in qk.quantized_modules(model).values()])
    assert not torch.equal(zero_points, zero_points.clamp(0, 15))  # some are beyond the codes
    report = export(model, tmp_path / "folder", to="compressed-tensors")
    assert report.exact
    assert {row.stored_as for row in report.rows} == {"int4, groups of 32, zero points"}
    loaded = load_compressed_tensors(tmp_path / "folder")
    assert_same_bits(logits(loaded), logits(model))
    assert {layer.config.zero_point_domain for layer in qk.quantized_modules(loaded).values()} == {"int"}
    for to, stored_as in (
        ("mlx", "affine, 4 bits in groups of 32"),
        ("onnx", "MatMulNBits, 4 bits in blocks of 32, zero points"),
    ):
        report = export(model, tmp_path / to, to=to)
        assert report.exact, to
        assert {row.stored_as for row in report.rows} == {stored_as}


def test_float_zero_points_are_refused(tmp_path):
    with pytest.raises(UnfitError, match=r"zero points are no integers .*zero_point_domain='int'"):
        export(trained("float"), tmp_path / "folder", to="compressed-tensors")
