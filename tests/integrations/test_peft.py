"""LoRA of peft over packed layers: a frozen base of few bits, and adapters in full precision."""

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.testing.compare import assert_same_bits

peft = pytest.importorskip("peft")

X = torch.linspace(-1, 1, 64).view(4, 16)


def packed_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    return qk.pack_model(qk.quantize_model(model, qk.QuantConfig(4)).eval())


@pytest.mark.parametrize("targets", [["0", "2"], "all-linear"], ids=str)
def test_adapters_train_and_the_base_stays(targets):
    base = packed_model()
    wanted = base(X).detach()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    layers = [base[0], base[2]]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets))
    assert [m.base_layer for m in model.modules() if hasattr(m, "base_layer")] == layers
    assert_same_bits(model(X), wanted)  # an adapter starts as zero
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.shape[0] == 2 or p.shape[1] == 2 for p in trained)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(10):
        loss = (model(X) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert len(before) == sum(1 for name in model.state_dict() if ".base_layer." in name)
    for i in (0, 2):
        for name, tensor in base[i].base_layer.state_dict().items():
            assert_same_bits(tensor, before[f"{i}.{name}"])


def test_adapters_take_the_dtype_of_the_base():
    model = peft.get_peft_model(
        packed_model(torch.bfloat16), peft.LoraConfig(r=2, target_modules=["0"]), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert model(X.bfloat16()).dtype == torch.bfloat16


def trained_a_little(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_merging_an_adapter_into_codes_says_why_not_and_what_to_do():
    model = peft.get_peft_model(packed_model(), peft.LoraConfig(r=2, target_modules=["0"]))
    for safe in (False, True):
        with pytest.raises(
            (AttributeError, TypeError), match=r"'0' is packed codes.*to_plain\(model\) before the merge"
        ):
            model.merge_and_unload(safe_merge=safe)
    wanted = trained_a_little(model)(X)
    merged = qk.to_plain(model).merge_and_unload()
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(X), wanted)
    assert isinstance(qk.quantize_model(merged, qk.QuantConfig(4))[0], qk.QuantLinear)


def quantized_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).requires_grad_(False)
    return qk.quantize_model(model, qk.QuantConfig(4))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_over_a_frozen_quantized_layer(dora):
    base = quantized_model()
    state = {name: t.clone() for name, t in base.state_dict().items()}
    wanted, layer = base(X), base[0]
    config = peft.LoraConfig(r=2, target_modules="all-linear", use_dora=dora)
    model = peft.get_peft_model(base, config)
    # DoRA multiplies the base's output by a ratio of norms that begins as 1, to rounding.
    torch.testing.assert_close(model(X), wanted, **({} if dora else {"rtol": 0, "atol": 0}))
    trained_a_little(model)
    assert not torch.allclose(model(X), wanted)
    for name, tensor in state.items():
        if name.startswith("0."):
            assert_same_bits(layer.state_dict()[name.removeprefix("0.")], tensor)
    merged = model.merge_and_unload()
    assert merged[0] is layer  # quantized, with the adapter in its master weight, and the scales that it had
    assert not torch.equal(layer.weight, state["0.weight"])
    assert_same_bits(layer.scale, state["0.scale"])


def test_dora_over_packed_layers_says_why_not():
    """It divides by the norms of the rows of W + B·A in every forward, for which it needs W."""
    with pytest.raises(TypeError, match=r"should be of type nn.Parameter, got .*PackedWeight"):
        peft.get_peft_model(packed_model(), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))


def test_what_libraries_read_of_a_packed_layer():
    """Libraries look for nn.Linear, and read device, dtype and shape of the weight."""
    layer = packed_model(torch.bfloat16)[0]
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (16, 16)
    weight = layer.weight
    assert (weight.device.type, weight.dtype, tuple(weight.shape)) == ("cpu", torch.bfloat16, (16, 16))
    assert (weight.numel(), weight.ndim, weight.dim(), weight.size(0)) == (256, 2, 2, 16)
    assert not weight.requires_grad
    for use in (lambda: weight.T, lambda: weight.data, lambda: weight @ X.T, lambda: nn.functional.linear(X, weight)):
        with pytest.raises((AttributeError, TypeError), match="the weight of '0' is packed codes"):
            use()
