"""Blocks that GGUF's own package reads back as the values that were trained, bit for bit."""

import numpy as np
import pytest
import torch

import qatkernels as qk
from qatkernels.formats.gguf_blocks import BLOCKS, as_steps, fitting
from qatkernels.formats.integers import IntegerWeight, UnfitError

gguf = pytest.importorskip("gguf")

SCHEMES = [(b, s) for s in ("lsq", "seq", "affine") for b in (2, 3, 4, 5, 6, 8)] + [(1, "paretoq"), (1.58, "paretoq")]


def quantized(bits, scheme, group_size=None, *, rows=6, cols=512, scale_dtype=torch.float16):
    """Return a layer whose steps are numbers of float16, and whose weights reach every code."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(cols, rows, bias=False))
    qk.quantize_model(layer, qk.QuantConfig(bits, scheme=scheme, group_size=group_size))
    layer = layer[0]
    with torch.no_grad():
        layer.weight.mul_(3)  # beyond the clamp
        layer.scale.copy_((layer.scale / layer.grid.steps).to(scale_dtype).float() * layer.grid.steps)
        if layer.zero_point is not None:
            layer.zero_point.copy_(layer.zero_point.round())
    return layer


def read(name, data, shape):
    """Return the values of blocks, by the package's reader, or for what it lacks by the definition."""
    if name in ("Q1_0", "Q2_0"):
        size, bits = BLOCKS[name].size, int(name[1])
        blocks = data.reshape(shape[0], -1, BLOCKS[name].nbytes)
        d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        q = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").reshape(*d.shape[:2], size, bits)
        q = (q * 2 ** np.arange(bits)).sum(-1).astype(np.float32)
        return (d * (2 * q - 1 if bits == 1 else q - 1)).reshape(shape)
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).reshape(shape)


@pytest.mark.parametrize("group_size", [None, 32, 256], ids=["rows", "groups of 32", "groups of 256"])
@pytest.mark.parametrize(("bits", "scheme"), SCHEMES)
def test_every_type_that_fits_is_exact(bits, scheme, group_size):
    layer = quantized(bits, scheme, group_size)
    weight, wanted = IntegerWeight.of(layer), layer.quantized_weight().detach().numpy()
    np.testing.assert_array_equal(weight.dequantize().numpy(), wanted)
    found, reasons = fitting(weight)
    assert found.keys() | reasons.keys() == BLOCKS.keys()
    for name, data in found.items():
        np.testing.assert_array_equal(read(name, data, wanted.shape), wanted, err_msg=name)


#: The smallest type for rows, and for groups of 32.
SMALLEST = {
    (1, "paretoq"): ("Q1_0", "Q4_0"), (1.58, "paretoq"): ("TQ1_0", "Q4_0"), (2, "lsq"): ("TQ2_0", "Q4_0"),
    (2, "seq"): ("Q2_K", "Q4_0"), (2, "affine"): ("Q2_K", "Q4_0"), (3, "lsq"): ("Q3_K", "Q4_0"),
    (3, "seq"): ("Q4_K", "Q4_0"), (4, "lsq"): ("Q4_K", "Q4_0"), (4, "seq"): ("Q4_K", "Q5_0"),
    (5, "lsq"): ("Q5_K", "Q5_0"), (5, "seq"): ("Q5_K", "Q8_0"), (6, "lsq"): ("Q6_K", "Q8_0"),
    (8, "lsq"): ("Q8_0", "Q8_0"),
}  # fmt: skip


@pytest.mark.parametrize(("bits", "scheme"), SMALLEST)
def test_the_smallest_type(bits, scheme):
    for group_size, name in zip((None, 32), SMALLEST[bits, scheme], strict=True):
        found, _ = fitting(IntegerWeight.of(quantized(bits, scheme, group_size)))
        assert next(iter(found)) == name


def test_packed_gives_the_same_blocks():
    model = torch.nn.Sequential(quantized(3, "lsq", 256))
    wanted = fitting(IntegerWeight.of(model[0]))[0]
    found = fitting(IntegerWeight.of(qk.pack_model(model)[0]))[0]
    assert found.keys() == wanted.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_what_does_not_fit_says_why():
    reasons = fitting(IntegerWeight.of(quantized(4, "lsq", scale_dtype=torch.float32)))[1]
    assert reasons["Q4_0"].startswith("6 of 6 scales are not float16 numbers") or "scales are not" in reasons["Q4_0"]
    assert "its integers are" in reasons["Q2_0"]
    assert reasons["TQ1_0"].startswith("its integers are")
    assert "groups of 32 are not whole blocks of 256" in fitting(IntegerWeight.of(quantized(4, "lsq", 32)))[1]["Q4_K"]
    layer = quantized(4, "affine")
    with torch.no_grad():
        layer.zero_point[0] += 0.5
    with pytest.raises(UnfitError, match="1 of 6 zero points are no integers"):
        IntegerWeight.of(layer)


def test_q8_0_of_full_precision_is_ggufs():
    values = torch.randn(5, 96)
    found = BLOCKS["Q8_0"].encode(as_steps(values))
    wanted = gguf.quants.dequantize(
        gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    )
    error = np.abs(read("Q8_0", found, values.shape) - values.numpy()).max()
    assert error <= 1.01 * np.abs(wanted - values.numpy()).max()
