"""GPT-2's layer: [N, K] in memory, [K, N] in a state dict, and the Parameter is the same object."""

import copy
import json

import pytest
import torch
from torch import nn

import qatkernels as qk
from qatkernels.nn import QuantConfig, QuantConv1D, QuantLinear, quantize_model, quantized_modules
from qatkernels.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

CONFIG = transformers.GPT2Config(
    vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
LAYERS = [f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def gpt2():
    return transformers.GPT2LMHeadModel(CONFIG).eval()


def conv(outputs, inputs):
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer


def linear_like(layer):
    linear = nn.Linear(layer.nx, layer.nf)
    linear.weight, linear.bias = nn.Parameter(layer.weight.detach().t().contiguous()), layer.bias
    return linear


@pytest.fixture
def tokens():
    return torch.randint(3, 100, (2, 8))


class TestLayer:
    @pytest.mark.parametrize("shape", [(24, 16), (16, 16)])
    def test_is_the_linear_layer_of_the_transposed_weight(self, config, shape):
        layer = conv(*shape)
        expected = QuantLinear.from_linear(linear_like(layer), config)
        quantized = QuantConv1D.from_conv1d(layer, config)
        x = torch.randn(3, 5, 16)
        assert_same_bits(quantized(x), expected(x))
        for module in (quantized, expected):
            module(x).square().sum().backward()
        for name in ("weight", "bias", "scale"):
            assert_same_bits(getattr(quantized, name).grad, getattr(expected, name).grad)

    def test_at_8_bits_is_near_the_conv(self):
        layer = conv(16, 16)
        full = copy.deepcopy(layer)
        x = torch.randn(4, 16)
        quantized = QuantConv1D.from_conv1d(layer, QuantConfig(8))
        torch.testing.assert_close(quantized(x), full(x), rtol=0.02, atol=2e-3)
        assert not torch.allclose(x @ quantized.weight + quantized.bias, full(x), atol=2e-3)  # the other way round

    def test_the_parameter_and_its_gradient_stay(self):
        layer = conv(24, 16)
        weight, grad = layer.weight, torch.randn(16, 24)
        weight.grad = grad
        quantized = QuantConv1D.from_conv1d(layer, QuantConfig(4))
        assert quantized.weight is weight
        assert weight.shape == (24, 16)
        assert_same_bits(weight.grad, grad.t())

    def test_refusals_leave_it_as_it_was(self):
        layer = conv(24, 12)
        before = layer.weight.detach().clone()
        with pytest.raises(ValueError, match="group_size is 8"):
            QuantConv1D.from_conv1d(layer, QuantConfig(4, group_size=8))
        assert_same_bits(layer.weight, before)
        with pytest.raises(ValueError, match=r"is a torch.nn.modules.linear.Linear"):
            QuantConv1D.from_conv1d(nn.Linear(4, 4), QuantConfig(4))


class TestStateDict:
    @pytest.mark.parametrize("shape", [(24, 16), (16, 16)])
    def test_is_the_convs(self, shape):
        layer = conv(*shape)
        before = copy.deepcopy(layer.state_dict())
        state = QuantConv1D.from_conv1d(layer, QuantConfig(4)).state_dict()
        assert list(state)[:2] == ["weight", "bias"]
        assert_same_bits(state["weight"], before["weight"])
        Conv1D(*shape).load_state_dict({name: state[name] for name in before})

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("shape", [(24, 16), (16, 16)])
    def test_round_trip(self, shape, assign):
        one, two = (QuantConv1D.from_conv1d(conv(*shape), QuantConfig(4)) for _ in range(2))
        two.load_state_dict(one.state_dict(), assign=assign)
        assert_same_bits(two.weight, one.weight)
        assert two.weight.is_contiguous()

    def test_in_place_writes_reach_the_weight(self):
        """What EMA copies and `dcp.load` do."""
        layer = QuantConv1D.from_conv1d(conv(24, 16), QuantConfig(4))
        value = torch.randn(16, 24)
        layer.state_dict()["weight"].copy_(value)
        assert_same_bits(layer.weight, value.t())

    def test_the_other_orientation_is_refused(self):
        layer = QuantConv1D.from_conv1d(conv(24, 16), QuantConfig(4))
        state = layer.state_dict() | {"weight": torch.zeros(24, 16)}
        with pytest.raises(RuntimeError, match=r"weight has shape \(24, 16\), must be \(16, 24\): \[K, N\]"):
            layer.load_state_dict(state)


class TestGPT2:
    def test_is_quantized(self, tokens):
        model = gpt2()
        parameters = {name: id(p) for name, p in model.named_parameters()}
        quantize_model(model, QuantConfig(4))
        assert list(quantized_modules(model)) == LAYERS
        assert {name: id(p) for name, p in model.named_parameters() if not name.endswith(".scale")} == parameters
        assert model.lm_head.weight is model.transformer.wte.weight

    def test_equals_the_same_model_of_linear_layers(self, tokens):
        model, linear = gpt2(), gpt2()
        linear.load_state_dict(model.state_dict())
        for name in LAYERS:
            linear.set_submodule(name, linear_like(linear.get_submodule(name)))
        quantize_model(model, QuantConfig(2))
        quantize_model(linear, QuantConfig(2))
        assert_same_bits(model(tokens).logits, linear(tokens).logits)

    def test_trains(self, tokens):
        model = quantize_model(gpt2(), QuantConfig(4)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(20):
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]

    def test_packs_and_generates(self, tokens, tmp_path):
        model = quantize_model(gpt2(), QuantConfig(4))
        packed = qk.pack_model(copy.deepcopy(model))
        torch.testing.assert_close(packed(tokens).logits, model(tokens).logits)
        generated = [m.generate(tokens, max_new_tokens=8, do_sample=False) for m in (model, packed)]
        assert torch.equal(*generated)
        qk.save_packed(packed, tmp_path / "packed.safetensors")
        loaded = qk.load_packed(tmp_path / "packed.safetensors", lambda config: gpt2())
        assert_same_bits(loaded.eval()(tokens).logits, packed(tokens).logits)

    def test_what_is_saved_is_gpt2_again(self, tokens, tmp_path):
        model = gpt2()
        expected = model(tokens).logits
        quantize_model(model, QuantConfig(4)).save_pretrained(tmp_path)
        described = json.loads((tmp_path / "config.json").read_text())
        del described["quantization_config"]  # which makes from_pretrained quantize again
        (tmp_path / "config.json").write_text(json.dumps(described))
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        assert_same_bits(again(tokens).logits, expected)

    def test_a_checkpoint_of_gpt2_loads(self, tokens):
        model, other = gpt2(), gpt2()
        quantize_model(model, QuantConfig(4))
        found = model.load_state_dict(other.state_dict(), strict=False)
        assert found.missing_keys == [f"{name}.scale" for name in LAYERS]
        for module in quantized_modules(model).values():
            module.reset_scale()
        assert_same_bits(model(tokens).logits, quantize_model(other, QuantConfig(4))(tokens).logits)

    def test_an_error_leaves_every_layer_as_it_was(self, tokens):
        model = gpt2()
        expected = model(tokens).logits
        model.extra = nn.Linear(6, 32)
        with pytest.raises(ValueError, match="extra cannot be quantized: group_size is 32"):
            quantize_model(model, QuantConfig(4, group_size=32))
        assert not quantized_modules(model)
        assert_same_bits(model(tokens).logits, expected)

    def test_shared_weights(self):
        one, two = conv(16, 16), conv(16, 16)
        two.weight = one.weight
        before = one.weight.detach().clone()
        model = quantize_model(nn.ModuleList([one, two]), QuantConfig(4))
        assert model[0].weight is model[1].weight
        assert model[0].scale is model[1].scale
        assert_same_bits(model[1].weight, before.t())

    def test_a_weight_that_another_layer_uses_stays(self):
        one, two, three = conv(16, 16), conv(16, 16), conv(16, 16)
        two.weight = one.weight
        before = one.weight.detach().clone()
        model = nn.ModuleDict({"one": one, "two": two, "three": three})
        with pytest.warns(UserWarning, match="one.*: shares its weight with two, which stays as it is"):
            quantize_model(model, QuantConfig(4), exclude="two")
        assert list(quantized_modules(model)) == ["three"]
        assert_same_bits(one.weight, before)
