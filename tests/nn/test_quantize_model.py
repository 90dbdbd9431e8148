import copy
import logging
import re
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune

from qatkernels.nn import (
    GroupedQuantLinear,
    QuantConfig,
    QuantLinear,
    calibrate,
    quantize_model,
    quantized_modules,
    quantized_weights,
)
from qatkernels.testing.compare import assert_same_bits


class Tied(nn.Module):
    """An embedding, two blocks, the second of which is used twice, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.embed_proj = nn.Linear(16, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16, bias=False)])
        self.again = self.layers[1]
        self.twin = nn.Linear(16, 16)
        self.twin.weight = self.layers[0].weight
        self.lm_head = nn.Linear(16, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed_proj(self.embed(tokens))
        for layer in (*self.layers, self.again, self.twin):
            x = layer(x).relu()
        return self.lm_head(x)


class TestWhatIsReplaced:
    def test_defaults(self):
        model = Tied()
        assert quantize_model(model, QuantConfig(2)) is model
        assert list(quantized_modules(model)) == ["layers.0", "layers.1", "twin"]
        assert type(model.lm_head) is nn.Linear
        assert type(model.embed_proj) is nn.Linear

    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
            ({"include": "layers.*"}, ["layers.0", "layers.1"]),
            ({"include": ("0", "tw*")}, ["layers.0", "twin"]),
            ({"exclude": ("layers.*", "*embed*", "lm_head")}, ["twin"]),
            ({"exclude": "again"}, ["embed_proj", "layers.0", "twin"]),
            ({"exclude": "again", "include": ("*", "lm_head")}, ["embed_proj", "layers.0", "twin", "lm_head"]),
            ({"exclude": ()}, ["embed_proj", "layers.0", "layers.1", "twin", "lm_head"]),
        ],
        ids=str,
    )
    def test_patterns(self, patterns, expected):
        assert list(quantized_modules(quantize_model(Tied(), QuantConfig(2), **patterns))) == expected

    def test_a_pattern_matches_the_end_of_a_name(self):
        model = nn.ModuleDict({"model": Tied()})
        assert list(quantized_modules(quantize_model(model, QuantConfig(2), include="twin"))) == ["model.twin"]
        assert type(model["model"].lm_head) is nn.Linear

    def test_first_match_of_a_mapping_decides(self):
        rules = {"layers.1": None, "layers.*": QuantConfig(4), "*": QuantConfig(1)}
        model = quantize_model(Tied(), rules)
        bits = {name: module.grid.bits for name, module in quantized_modules(model).items()}
        assert bits == {"layers.0": 4, "twin": 1}

    def test_no_match_in_a_mapping_leaves_full_precision(self):
        assert list(quantized_modules(quantize_model(Tied(), {"twin": QuantConfig(4)}))) == ["twin"]

    def test_the_model_itself(self):
        linear = nn.Linear(16, 8)
        layer = quantize_model(linear, QuantConfig(2))
        assert isinstance(layer, QuantLinear)
        assert layer.weight is linear.weight
        assert list(quantized_modules(layer)) == [""]

    def test_is_logged(self, caplog):
        with caplog.at_level(logging.INFO, "qatkernels"):
            quantize_model(Tied(), QuantConfig(2, group_size=8), include="twin")
        layer, summary = (r.getMessage() for r in caplog.records)
        assert layer == "quantized twin: 2 bits, paretoq, groups of 8"
        assert summary.startswith("quantized 256 of 976 parameters (26.2%)\n")
        assert re.search(r"52\.5% +512  embed_proj, layers\.1: matches no pattern of include", summary)


class TestAgain:
    """Layers that are quantized already."""

    def test_the_same_configuration_changes_nothing(self):
        model = quantize_model(Tied(), QuantConfig(4))
        before = {name: (module, module.scale) for name, module in quantized_modules(model).items()}
        assert quantize_model(model, QuantConfig(4)) is model
        assert {name: (module, module.scale) for name, module in quantized_modules(model).items()} == before

    @pytest.mark.parametrize("options", [{}, {"include": "twin"}])
    def test_another_configuration_is_refused(self, options):
        model = quantize_model(Tied(), QuantConfig(8), include="twin")
        message = (
            "twin is quantized already, to 8 bits, paretoq, and config asks for 2 bits, paretoq: give requantize=True"
        )
        with pytest.raises(ValueError, match=message):
            quantize_model(model, QuantConfig(2), **options)
        assert list(quantized_modules(model)) == ["twin"]
        quantize_model(model, QuantConfig(2), exclude=("twin", "embed*"))
        assert {n: m.grid.bits for n, m in quantized_modules(model).items()} == {"layers.1": 2, "twin": 8} | {
            "layers.0": 2
        }

    def test_requantize(self):
        """From 8 to 4 to 2 bits: as if made at 2 bits from these weights; shared scales stay shared."""
        model = quantize_model(Tied(), QuantConfig(8))
        fresh = quantize_model(Tied(), QuantConfig(2))
        weights = quantized_weights(model)
        for bits in (4, 2):
            quantize_model(model, QuantConfig(bits), requantize=True)
            assert {m.grid.bits for m in quantized_modules(model).values()} == {bits}
        assert all(a is b for a, b in zip(weights, quantized_weights(model), strict=True))
        assert model.twin.scale is model.layers[0].scale
        fresh.load_state_dict(model.state_dict())
        for module in quantized_modules(fresh).values():
            module.reset_scale()
        x = torch.arange(10)[None]
        assert_same_bits(model(x), fresh(x))

    def test_requantize_refuses_before_it_changes_anything(self):
        model = quantize_model(nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4)), QuantConfig(8))
        model.append(nn.Linear(4, 8))
        with pytest.raises(ValueError, match=r"1 cannot be quantized: group_size is 8, .*\(4\)"):
            quantize_model(model, QuantConfig(2, group_size=8), requantize=True)
        assert [m.grid.bits for m in quantized_modules(model).values()] == [8, 8]

    def test_a_layer_that_comes_to_a_quantized_twin_shares_its_scales(self):
        model = quantize_model(Tied(), QuantConfig(2), include="twin")
        scale = model.twin.scale
        quantize_model(model, QuantConfig(2))
        assert model.layers[0].scale is model.twin.scale is scale

    def test_experts_count_too(self):
        model = nn.ModuleDict({"moe": GroupedQuantLinear(2, 8, 4, config=QuantConfig(4)), "up": nn.Linear(8, 8)})
        with pytest.raises(ValueError, match="moe is quantized already, to 4 bits"):
            quantize_model(model, QuantConfig(2))
        quantize_model(model, QuantConfig(2), requantize=True)
        assert model["moe"].grid.bits == model["up"].grid.bits == 2


class TestWhatIsKept:
    def test_shared_modules_and_tied_weights(self):
        model = quantize_model(Tied(), QuantConfig(2), include=("*", "lm_head"), exclude="embed_proj")
        assert model.again is model.layers[1]
        assert model.twin.weight is model.layers[0].weight
        assert model.twin.scale is model.layers[0].scale
        assert model.twin.bias is not model.layers[0].bias
        assert model.lm_head.weight is model.embed.weight
        assert type(model.embed) is nn.Embedding
        assert [id(w) for w in quantized_weights(model)] == [
            id(m.weight) for m in (model.layers[0], model.layers[1], model.lm_head)
        ]
        model(torch.tensor([[1, 2]])).sum().backward()
        assert model.embed.weight.grad.abs().sum() > 0

    def test_ties_with_other_configurations_have_their_own_scales(self):
        model = quantize_model(Tied(), {"twin": QuantConfig(4), "layers.0": QuantConfig(2)})
        assert model.twin.weight is model.layers[0].weight
        assert model.twin.scale is not model.layers[0].scale

    def test_ties_survive_copy_and_state_dict(self):
        model = quantize_model(Tied(), QuantConfig(2))
        other = copy.deepcopy(model)
        assert other.twin.scale is other.layers[0].scale
        other.load_state_dict(model.state_dict())
        assert_same_bits(other(torch.tensor([1])), model(torch.tensor([1])))

    def test_dtype_training_flag_and_requires_grad(self, mlp):
        mlp[0].to(torch.bfloat16).eval()
        mlp[2].requires_grad_(False)
        model = quantize_model(mlp, QuantConfig(2))
        assert (model[0].weight.dtype, model[0].scale.dtype) == (torch.bfloat16, torch.float32)
        assert (model.training, model[0].training, model[2].training) == (True, False, True)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.weight", "0.bias", "0.scale"}

    def test_hooks(self, mlp):
        calls = []
        handle = mlp[0].register_forward_hook(lambda module, *_: calls.append(("forward", module)))
        mlp[0].register_forward_pre_hook(lambda module, args: calls.append(("pre", module)))
        mlp[0].register_full_backward_hook(lambda module, *_: calls.append(("backward", module)))
        model = quantize_model(mlp, QuantConfig(2))
        model(torch.randn(2, 16, requires_grad=True)).sum().backward()
        assert calls == [(kind, model[0]) for kind in ("pre", "forward", "backward")]
        handle.remove()
        calls.clear()
        model(torch.randn(2, 16))
        assert [kind for kind, _ in calls] == ["pre"]

    def test_meta_models_stay_on_meta(self):
        with torch.device("meta"):
            model = Tied()
        assert all(p.is_meta for p in quantize_model(model, QuantConfig(2, act_bits=4, act_scheme="lsq")).parameters())


def compiled():
    linear = nn.Linear(16, 16)
    linear.compile(backend="eager")
    return linear


def forward_replaced():
    linear = nn.Linear(16, 16)
    linear.forward = lambda x: x
    return linear


def tensor_subclass():
    class Sharded(torch.Tensor):
        pass

    linear = nn.Linear(16, 16)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Sharded))
    return linear


REFUSED = {
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(16, 16)), "is parametrized: remove"),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(16, 16)), "has a weight that is computed"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5), "has a weight that is computed"),
    "subclass": (tensor_subclass, "has a Sharded as weight, must be a plain nn.Parameter: quantize before sharding"),
    "complex": (lambda: nn.Linear(16, 16, dtype=torch.complex64), "has a torch.complex64 weight, must be one of"),
    "compiled": (compiled, "has been compiled, which would bypass quantization"),
    "forward": (forward_replaced, "has a forward of its own on the instance"),
    "group": (lambda: nn.Linear(12, 16), "group_size is 8, must be a positive divisor of the input features (12)"),
}


class TestFilter:
    """A function of the module and its name, as torchao has it."""

    def test_decides_among_what_the_patterns_select(self):
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 4), "lm_head": nn.Linear(8, 8)})
        asked = []

        def wide(module, name):
            asked.append((module, name))
            return module.out_features == 8

        linears = dict(model)
        quantize_model(model, QuantConfig(4), filter_fn=wide)
        assert list(quantized_modules(model)) == ["a"]
        assert asked == [(linears["a"], "a"), (linears["b"], "b")]

    def test_what_it_leaves_is_not_warned_of(self, recwarn):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(8, 8))
        quantize_model(model, QuantConfig(4), filter_fn=lambda module, name: name == "1")
        assert not recwarn.list

    def test_is_a_function_that_selects_something(self):
        model = nn.Sequential(nn.Linear(8, 8))
        with pytest.raises(ValueError, match="nothing can be quantized: 0 is left out by filter_fn"):
            quantize_model(model, QuantConfig(4), filter_fn=lambda module, name: False)
        with pytest.raises(ValueError, match="filter_fn is 'a', must be a function of a module and its name"):
            quantize_model(model, QuantConfig(4), filter_fn="a")


class TestRefusals:
    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    @pytest.mark.parametrize("name", REFUSED)
    def test_what_quantization_would_break(self, name):
        build, message = REFUSED[name]
        model = nn.ModuleDict({"good": nn.Linear(16, 16), "bad": build()})
        with pytest.raises(ValueError, match=f"bad cannot be quantized: .*{re.escape(message)}"):
            quantize_model(model, QuantConfig(2, group_size=8))
        assert not quantized_modules(model)
        quantize_model(model, QuantConfig(2, group_size=8), exclude="bad")
        assert list(quantized_modules(model)) == ["good"]

    @pytest.mark.parametrize(
        ("model", "arguments", "message"),
        [
            (nn.ReLU(), {}, "the model has no nn.Linear"),
            (Tied(), {"include": "q_proj"}, "no nn.Linear matches ['q_proj']; the model has embed_proj, "),
            (Tied(), {"include": ("twin", "q_proj")}, "no nn.Linear matches ['q_proj']; "),
            (
                Tied(),
                {"include": "lm_head"},
                "lm_head matches 'lm_head' of the default exclude (give an exclude of your own",
            ),
            (Tied(), {"include": [1]}, "include is [1], must be a pattern or several"),
            (nn.ModuleList(nn.Linear(2, 2) for _ in range(30)), {"include": "x"}, "18, 19 and 10 more"),
        ],
        ids=["no-linear", "typo", "one-typo", "excluded", "no-pattern", "many"],
    )
    def test_patterns_without_effect(self, model, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            quantize_model(model, QuantConfig(2), **arguments)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (4, "config is 4, must be a QuantConfig or a mapping"),
            ({}, "config is {}, must be a QuantConfig or a mapping"),
            ({"*": 4}, "config['*'] is 4, must be a pattern's QuantConfig or None"),
            ({"q_proj": QuantConfig(2), "*": QuantConfig(4)}, "no nn.Linear matches ['q_proj']; "),
            ({"*": None}, "nothing can be quantized: embed_proj, layers.0, layers.1, twin, lm_head has None as"),
        ],
        ids=str,
    )
    def test_configs(self, config, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            quantize_model(Tied(), config)

    def test_subclasses_stay_and_are_named(self):
        class Mine(nn.Linear):
            pass

        model = nn.ModuleDict({"mine": Mine(4, 4), "plain": nn.Linear(4, 4)})
        with pytest.warns(UserWarning, match=r"mine: is a .*Mine, must be exactly"):
            quantize_model(model, QuantConfig(2))
        assert list(quantized_modules(model)) == ["plain"]
        with pytest.raises(ValueError, match=r"nothing can be quantized: .*mine is a "):
            quantize_model(model, QuantConfig(2), include="mine")

    def test_stacked_experts_are_named(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.up = nn.Parameter(torch.zeros(4, 8, 8))
                self.proj = nn.Linear(8, 4)

        with pytest.warns(UserWarning, match=r"moe.up: has shape \(4, 8, 8\): stacked experts\?"):
            quantize_model(nn.ModuleDict({"moe": Experts()}), QuantConfig(2))
        model = nn.ModuleDict({"moe": Experts(), "head": nn.Linear(8, 8)})
        with pytest.warns(UserWarning, match=r"moe.up: has shape .* GroupedQuantLinear.from_stacked"):
            quantize_model(model, QuantConfig(2), include="moe*")
        assert list(quantized_modules(model)) == ["moe.proj"]
        for pattern in ("moe", "*.up"):  # of which only the experts are one
            with pytest.raises(ValueError, match=r"no nn.Linear matches .*; moe.up has shape \(4, 8, 8\)"):
                quantize_model(model, QuantConfig(2), include=["head", pattern])
        alone = Experts()
        del alone.proj
        with pytest.raises(ValueError, match=r"the model has no nn.Linear .*; up has shape"):
            quantize_model(alone, QuantConfig(2))

    @pytest.mark.parametrize(
        ("config", "options"),
        [
            (QuantConfig(2), {"include": "head"}),
            (QuantConfig(2), {"exclude": "moe.up"}),
            (QuantConfig(2), {"exclude": "moe"}),
            ({"moe.up": None, "*": QuantConfig(2)}, {}),
            ({"head": QuantConfig(2)}, {}),
        ],
    )
    def test_stacked_experts_left_on_purpose_are_not(self, config, options):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.up = nn.Parameter(torch.zeros(4, 8, 8))

        model = nn.ModuleDict({"moe": Experts(), "head": nn.Linear(8, 8)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantize_model(model, config, **options)
        assert list(quantized_modules(model)) == ["head"]


class TestTransformer:
    """torch's own transformer: its attention calls no layer, and its fused inference path calls none at all."""

    @pytest.fixture
    def encoder(self):
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    def quantized(self, encoder):
        with pytest.warns(UserWarning, match=r"layers.0.self_attn.in_proj_weight.*: belongs to nn.MultiheadAttention"):
            return quantize_model(encoder, QuantConfig(2))

    def test_attention_is_not_claimed(self, encoder):
        model = self.quantized(encoder)
        assert list(quantized_modules(model)) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
        attention = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
        with pytest.raises(ValueError, match=r"nothing can be quantized: .*attention.out_proj belongs to"):
            quantize_model(attention, QuantConfig(2))
        with pytest.raises(ValueError, match=r"must be exactly torch.nn.Linear"):
            QuantLinear.from_linear(attention["attention"].out_proj, QuantConfig(2))

    @pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("grad", [False, True])
    def test_eval_is_quantized(self, encoder, masked, grad):
        full = copy.deepcopy(encoder).eval()
        model = self.quantized(encoder).eval()
        plain = copy.deepcopy(full)
        for name, module in quantized_modules(model).items():
            plain.set_submodule(name, module.to_linear().eval())
        x = torch.randn(3, 5, 16)
        padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if masked else None
        keep = ~padding if masked else torch.ones(3, 5, dtype=torch.bool)
        with torch.set_grad_enabled(grad):
            y, expected, unquantized = (m(x, src_key_padding_mask=padding)[keep] for m in (model, plain, full))
        torch.testing.assert_close(y, expected)
        assert (y - unquantized).abs().max() > 0.01

    def test_trains(self, encoder):
        model = self.quantized(encoder)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        x, losses = torch.randn(8, 5, 16), []
        for _ in range(20):
            loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    config = QuantConfig(4, "affine", act_bits=4, act_scheme="lsq+")
    model = quantize_model(model, {"0": QuantConfig(2, per_tensor=True), "2": config})
    x, y = torch.randn(8, 16), torch.randn(8, 8)
    calibrate(model, x)
    return model, x, y


def step(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    return model


def compare_with_one_process(rank):
    """In each of two processes: DDP and FSDP2 on half a batch take the step that one process takes on all of it."""
    model, x, y = build()
    expected = step(model, x, y).state_dict()
    half = slice(4 * rank, 4 * rank + 4)
    for wrap in (DistributedDataParallel, fully_shard):
        model, x, y = build()
        step(wrap(model), x[half], y[half])
        for name, value in model.state_dict().items():
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            torch.testing.assert_close(value, expected[name], msg=f"{wrap.__name__}: {name} differs")


def test_two_processes_equal_one(pair):
    pair.run(compare_with_one_process)
