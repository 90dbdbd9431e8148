"""Under autocast every layer gives the dtype that nn.Linear gives, whatever the dtypes of input and weight."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

import qatkernels as qk
from qatkernels.nn import GroupedQuantLinear, QuantConfig, calibrate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OFFSETS = torch.tensor([2, 4], dtype=torch.int32)
ACTIVATIONS = {
    "none": {}, "dynamic": {"act_bits": 8}, "lsq": {"act_bits": 8, "act_scheme": "lsq"},
    "outputs": {"act_bits": 8, "act_scheme": "lsq", "out_bits": 8},
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("of_input", DTYPES)
@pytest.mark.parametrize("of_weight", DTYPES)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_nn_linear(autocast, of_weight, of_input, activation):
    config = QuantConfig(4, **ACTIVATIONS[activation])
    linear, x = nn.Linear(16, 8).to(of_weight), torch.randn(4, 16)
    layer = qk.quantize_model(copy.deepcopy(linear), config)
    grouped = GroupedQuantLinear.from_stacked(torch.randn(2, 8, 16, dtype=of_weight), config=config)
    calibrate(layer, x.to(of_weight))
    calibrate(grouped, x.to(of_weight), OFFSETS)
    packed, grouped_packed = (qk.pack_model(copy.deepcopy(m)) for m in (layer, grouped))
    x = x.to(of_input)
    with torch.autocast("cpu", autocast):
        wanted = linear(x)
        assert wanted.dtype == autocast
        for y in (layer(x), packed(x)):
            assert y.dtype == autocast
            torch.testing.assert_close(y, wanted, atol=0.3, rtol=0)  # 4 bits
        assert grouped(x, OFFSETS).dtype == autocast
        torch.testing.assert_close(grouped_packed(x, OFFSETS), grouped(x, OFFSETS), atol=0.1, rtol=0.1)
        with forward_ad.dual_level():
            assert layer(forward_ad.make_dual(x, torch.ones_like(x))).dtype == autocast
