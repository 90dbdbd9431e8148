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


def test_merging_an_adapter_into_codes_says_why_not():
    model = peft.get_peft_model(packed_model(), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises((AttributeError, TypeError), match=r"the weight of '0' is packed codes"):
        model.merge_and_unload()
