"""Which layers are quantized: heads, adapters, wrapped and compiled models, copies of nn.Linear, stacked experts."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from qatkernels.nn import (
    GroupedQuantLinear,
    QuantConfig,
    QuantConv1D,
    QuantLinear,
    pack_model,
    quantization_report,
    quantize_model,
    quantized_modules,
)
from qatkernels.testing.compare import assert_same_bits


def quantized(model, config=None, **options):
    """The names of what is quantized, without a warning about shares."""
    return list(quantized_modules(quantize_model(model, config or QuantConfig(4), warn_below=0, **options)))


class TestHeads:
    """What makes logits stays in full precision, under any name."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(10, 16)
            self.body = nn.Linear(16, 16)
            self.out = nn.Linear(16, 10, bias=False)
            self.out.weight = self.tokens.weight

    @pytest.mark.parametrize("options", [{}, {"exclude": "x"}, {"include": "*"}, {"include": ("o*", "body")}], ids=str)
    def test_tied_to_an_embedding(self, options):
        assert quantized(self.Tied(), **options) == ["body"]

    @pytest.mark.parametrize("options", [{"exclude": ()}, {"include": ("out", "body")}], ids=str)
    def test_tied_and_wanted_all_the_same(self, options):
        model = self.Tied()
        assert quantized(model, **options) == ["body", "out"]
        assert model.out.weight is model.tokens.weight

    def test_tied_and_named_in_a_mapping(self):
        assert quantized(self.Tied(), {"out": QuantConfig(8), "*": QuantConfig(2)}) == ["body", "out"]

    def test_nothing_but_a_tied_head(self):
        with pytest.raises(ValueError, match="out is tied to the embedding tokens: name it in include"):
            quantize_model(self.Tied(), QuantConfig(4), include="o*")

    def test_the_heads_that_a_model_names(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.out = nn.Linear(16, 16), nn.Linear(16, 10)

            def get_output_embeddings(self):
                return self.out

        assert quantized(Model()) == ["body"]
        assert quantized(nn.ModuleDict({"inner": Model()})) == ["inner.body"]
        assert "out: makes the logits (Model.get_output_embeddings)" in str(quantization_report(Model()))

    @pytest.mark.parametrize(
        "name",
        [
            "lm_head",
            "generator_lm_head",
            "classifier",
            "score",
            "qa_outputs",
            "pooler",
            "embed_out",
            "seq_relationship",
            "logits_proj",
            "enc_score_head",
            "class_predictor",
            "itm_head",
        ],
    )
    def test_heads_by_name(self, name):
        assert quantized(nn.ModuleDict({"body": nn.Linear(16, 16), name: nn.Linear(16, 2)})) == ["body"]

    def test_heads_of_several_layers(self):
        head = nn.ModuleDict({"dense": nn.Linear(16, 16), "out_proj": nn.Linear(16, 2)})
        assert quantized(nn.ModuleDict({"body": nn.Linear(16, 16), "classifier": head})) == ["body"]

    def test_a_classifier_of_layers_without_names_is_the_model(self):
        """VGG and AlexNet keep most of their weights there."""
        model = nn.ModuleDict({"classifier": nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))})
        assert quantized(model) == ["classifier.0", "classifier.2"]

    def test_transformers(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        model = transformers.BertForSequenceClassification(config)
        names = quantized(model)
        assert names
        assert all(name.startswith("bert.encoder.layer.0.") for name in names)
        assert not [n for n in quantized(transformers.BertForMaskedLM(config)) if "decoder" in n]


class TestAdapters:
    """PEFT: the base layer is quantized, what was added is not."""

    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.classifier = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.classifier(self.b(self.a(x).relu()))

    PREFIX = "base_model.model."

    @pytest.mark.parametrize("exclude", [None, ("classifier",), ()], ids=str)
    @pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
    def test_lora(self, peft, options, exclude):
        model = peft.get_peft_model(self.Net(), peft.LoraConfig(r=4, target_modules=["a"], **options))
        expected = [f"{self.PREFIX}{n}" for n in ("a.base_layer", "b", *(["classifier"] if exclude == () else []))]
        assert quantized(model, **({} if exclude is None else {"exclude": exclude})) == expected
        assert "belongs to an adapter (PEFT's " in str(quantization_report(model))
        model(torch.randn(4, 16)).sum().backward()
        assert model.get_submodule(f"{self.PREFIX}a.lora_A.default").weight.grad is not None

    def test_a_pattern_knows_the_layer_under_the_adapter(self, peft):
        model = peft.get_peft_model(self.Net(), peft.LoraConfig(r=4, target_modules=["a", "classifier"]))
        assert quantized(model, include=("a", "b")) == [f"{self.PREFIX}a.base_layer", f"{self.PREFIX}b"]
        model = peft.get_peft_model(self.Net(), peft.LoraConfig(r=4, target_modules=["a", "classifier"]))
        assert quantized(model) == [f"{self.PREFIX}a.base_layer", f"{self.PREFIX}b"]

    def test_modules_to_save(self, peft):
        config = peft.LoraConfig(r=4, target_modules=["a"], modules_to_save=["b", "classifier"])
        model = peft.get_peft_model(self.Net(), config)
        assert quantized(model) == [f"{self.PREFIX}a.base_layer", f"{self.PREFIX}b.original_module"]

    def test_an_adapter_cannot_be_asked_for(self, peft):
        model = peft.get_peft_model(self.Net(), peft.LoraConfig(r=4, target_modules=["a"]))
        with pytest.raises(ValueError, match=r"lora_A\.default belongs to an adapter"):
            quantize_model(model, QuantConfig(4), include="lora_A.default", exclude=())

    def test_layers_of_that_name_without_peft(self):
        names = {"up": nn.Linear(16, 16), "lora_a": nn.Linear(16, 2), "lora_B": nn.ModuleDict({"x": nn.Linear(2, 16)})}
        assert quantized(nn.ModuleDict(names)) == ["up"]

    def test_merging_into_conv1d(self, peft):
        """PEFT notes that the base keeps [K, N]: once it is [N, K] the note would transpose what is merged."""
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        net = self.Net()
        net.a = conv1d(16, 16)
        config = peft.LoraConfig(r=4, target_modules=["a"], fan_in_fan_out=True, init_lora_weights=False)
        model = peft.get_peft_model(net, config)
        quantized(model, QuantConfig(8))
        layer = model.get_submodule(f"{self.PREFIX}a")
        assert type(layer.base_layer) is QuantConv1D
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        merged = layer.base_layer.weight.detach() + layer.scaling["default"] * b @ a
        layer.merge()
        torch.testing.assert_close(layer.base_layer.weight, merged)


class TestCopiesOfLinear:
    def test_falcon(self):
        falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
        layer = falcon.FalconLinear(16, 8)
        expected, x = QuantLinear.from_linear(nn.Linear(16, 8), QuantConfig(4)), torch.randn(3, 16)
        expected.load_state_dict(layer.state_dict(), strict=False)
        expected.reset_scale()
        model = quantize_model(nn.ModuleDict({"x": layer}), QuantConfig(4))
        assert type(model["x"]) is QuantLinear
        assert_same_bits(model["x"](x), expected(x))

    def test_what_is_derived_from_a_copy_is_another_class(self):
        falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")

        class Mine(falcon.FalconLinear):
            pass

        with pytest.raises(ValueError, match=r"nothing can be quantized: x is a .*Mine, must be exactly"):
            quantize_model(nn.ModuleDict({"x": Mine(4, 4)}), QuantConfig(4))


class TestCompiled:
    def test_a_compiled_model_is_compiled_again(self):
        x = torch.randn(4, 16)
        for compiled in (lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m):
            plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
            model = compiled(plain)
            before = model(x)
            quantize_model(model, QuantConfig(2))
            assert_same_bits(model(x), nn.Sequential.forward(plain, x))
            assert not torch.equal(model(x), before)

    def test_a_compiled_layer_is_refused(self):
        """The wrapper calls the layer that it was given, whatever takes the layer's place."""
        model = nn.Sequential(torch.compile(nn.Linear(16, 16), backend="eager"), nn.Linear(16, 16))
        with pytest.raises(ValueError, match=r"0 cannot be quantized: it has been compiled \(torch.compile\)"):
            quantize_model(model, QuantConfig(2))
        assert not quantized_modules(model)
        assert quantized(model, exclude="0") == ["1"]
        with pytest.raises(ValueError, match="the model cannot be quantized: it has been compiled"):
            quantize_model(torch.compile(nn.Linear(4, 4), backend="eager"), QuantConfig(2))


def check_wrapped(rank):
    """Whatever is wrapped already is refused, from inside too."""
    warnings.simplefilter("ignore")

    def build():
        return nn.Sequential(nn.Sequential(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 16))

    cpu = torch.device("cpu")
    ddp = DistributedDataParallel(build())
    fsdp = [FullyShardedDataParallel(build(), use_orig_params=o, device_id=cpu) for o in (False, True)]
    partly = build()
    partly[0] = DistributedDataParallel(partly[0])
    replicated = replicate(build())
    models = {
        "the model is wrapped in DistributedDataParallel": [ddp, ddp.module, ddp.module[0], partly[0].module],
        "the model holds a module that is wrapped in DistributedDataParallel": [partly, nn.ModuleList([ddp])],
        "the model is wrapped in FullyShardedDataParallel": [*fsdp, *(f.module for f in fsdp)],
        "the model is wrapped in FSDPModule": [fully_shard(build())],
        "the model is wrapped in D": [replicated, replicated[0]],
    }
    for message, wrapped in models.items():
        for model in wrapped:
            with pytest.raises(ValueError, match=f"{re.escape(message)}.*Quantize first, then wrap"):
                quantize_model(model, QuantConfig(2))
            assert not quantized_modules(model)
    trained = DistributedDataParallel(quantize_model(build(), QuantConfig(4)))
    with pytest.raises(ValueError, match=r"the model is wrapped in DistributedDataParallel.*Quantize first, then wrap"):
        trained.module[2].requantize(QuantConfig(2))
    assert trained.module[2].config == QuantConfig(4)
    inner = ddp.module
    del ddp, models, wrapped, model
    assert quantized(inner) == ["0.0", "2"]  # nothing wraps it any more
    assert quantized(build()) == ["0.0", "2"]


def test_wrapped_models_are_refused(pair):
    pair.run(check_wrapped)


class TestStacks:
    """Experts of either orientation are recognized, and never taken along the wrong axis."""

    def test_from_stacked_asks_where_the_shape_does_not_tell(self):
        weight, config = nn.Parameter(torch.randn(2, 16, 16)), QuantConfig(8)
        with pytest.raises(
            ValueError, match=r"transposed is None with a weight of shape \(2, 16, 16\), which fits both"
        ):
            GroupedQuantLinear.from_stacked(weight, config=config)
        x, offsets = torch.randn(4, 16), torch.tensor([1, 4], dtype=torch.int32)
        layers = {t: GroupedQuantLinear.from_stacked(weight, config=config, transposed=t) for t in (False, True)}
        assert layers[False].weight is weight
        for transposed, layer in layers.items():
            w = weight if transposed else weight.transpose(1, 2)
            torch.testing.assert_close(layer(x, offsets), torch.cat([x[:1] @ w[0], x[1:] @ w[1]]), rtol=0.05, atol=0.1)

    @pytest.mark.parametrize("trains", [False, True])
    def test_transposed(self, trains):
        weight = nn.Parameter(torch.randn(2, 16, 12), requires_grad=trains)  # [E, K, N]
        bias = nn.Parameter(torch.randn(2, 12))
        layer = GroupedQuantLinear.from_stacked(weight, bias, config=QuantConfig(8), transposed=True)
        assert (layer.in_features, layer.out_features) == (16, 12)
        assert layer.weight.requires_grad == layer.scale.requires_grad == trains
        assert_same_bits(layer.weight, weight.detach().transpose(1, 2))
        with pytest.raises(ValueError, match=r"bias has shape \(2, 12\), must be \(2, 16\)"):
            GroupedQuantLinear.from_stacked(weight, bias, config=QuantConfig(8))

    def test_llama4(self):
        """Whose experts transformers does not look up in its registry."""
        transformers = pytest.importorskip("transformers")
        config = transformers.Llama4TextConfig(
            vocab_size=96, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4, pad_token_id=0,
        )  # fmt: skip
        model = transformers.Llama4ForCausalLM(config)
        with pytest.warns(UserWarning, match=r"experts.down_proj: .* kept as \[E, K, N\].*transposed=True"):
            quantize_model(model, QuantConfig(4))
        experts = model.model.layers[0].feed_forward.experts
        nn.init.normal_(experts.down_proj)
        layer = GroupedQuantLinear.from_stacked(experts.down_proj, config=QuantConfig(8), transposed=True)
        x, offsets = torch.randn(8, 64), torch.tensor([2, 4, 6, 8], dtype=torch.int32)
        expected = torch.cat([x[2 * i : 2 * i + 2] @ experts.down_proj[i] for i in range(4)])
        torch.testing.assert_close(layer(x, offsets), expected, rtol=0.05, atol=0.5)


class TestReport:
    def test_a_convolutional_network(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
        with pytest.warns(
            UserWarning, match=r"quantized 80 of 330 parameters \(24.2%\); left in full precision:"
        ) as said:
            quantize_model(model, QuantConfig(2))
        assert len(said) == 1
        lines = str(said[0].message).splitlines()
        assert re.fullmatch(" +67.9% +224  0, 0.bias: convolution: not supported", lines[1])
        assert "warn_below=0" in lines[-1]
        report = quantization_report(model)
        assert (report.total, report.quantized) == (330, 80)
        assert [(r.name, r.numel) for r in report.rows if r.status == "quantized"] == [("4.weight", 80)]
        assert report.rows[-2].config == QuantConfig(2)
        assert "24.2%             80  4: quantized: 2 bits, paretoq" in str(report)

    def test_recurrent_layers_and_embeddings(self):
        model = nn.ModuleDict({"e": nn.Embedding(500, 16), "r": nn.LSTM(16, 16), "h": nn.Linear(16, 10)})
        with pytest.warns(UserWarning, match=r"quantized 160 of .*1\.\d%\)") as said:
            quantize_model(model, QuantConfig(2))
        for line in (
            "  e: embedding: in full precision unless asked",
            "r.weight_ih_l0, .*: recurrent layer: not supported",
        ):
            assert re.search(line, str(said[0].message))

    @pytest.mark.parametrize(
        "options",
        [
            {"include": "4"},
            {"exclude": ("0", "1")},
            {"warn_below": 0},
            {"warn_below": 0.2},
        ],
        ids=str,
    )
    def test_what_the_caller_left_is_not_warned_of(self, options):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantize_model(model, QuantConfig(2), **options)

    def test_more_than_half_is_not_warned_of(self, recwarn):
        quantize_model(nn.Sequential(nn.Embedding(15, 16), nn.Linear(16, 16)), QuantConfig(2))
        assert not recwarn.list

    @pytest.mark.parametrize("share", [-1, 2, "half"])
    def test_warn_below_is_a_share(self, share):
        with pytest.raises(ValueError, match=f"warn_below is {share!r}, must be a share from 0 to 1"):
            quantize_model(nn.Linear(4, 4), QuantConfig(2), warn_below=share)

    def test_nothing_to_quantize_says_what_there_is(self):
        with pytest.raises(
            ValueError, match=r"the model has no nn.Linear or Conv1D.*\n +100.0% +224  0, 0.bias: convol"
        ):
            quantize_model(nn.Sequential(nn.Conv2d(3, 8, 3)), QuantConfig(2))

    def test_counts_each_parameter_once_and_no_scale(self):
        model = TestHeads.Tied()
        total = sum(p.numel() for p in model.parameters())
        quantize_model(model, QuantConfig(4, "affine", act_bits=8, act_scheme="lsq"), warn_below=0)
        report = quantization_report(model)
        assert report.total == total == sum(row.numel for row in report.rows)
        assert [row.name for row in report.rows] == ["tokens.weight", "body.weight", "body.bias"]

    def test_a_packed_model(self):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[1].weight = model[0].weight
        before = quantization_report(quantize_model(model, QuantConfig(4)))
        report = quantization_report(pack_model(model))
        assert (report.total, report.quantized) == (before.total, before.quantized) == (288, 256)
        assert report.rows[-1].status == "packed"

    def test_a_model_in_full_precision(self):
        report = quantization_report(nn.ModuleDict({"up": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)}))
        assert report.share == 0
        assert "up: not quantized, or left out" in str(report)
        assert "lm_head: matches 'lm_head' of the default exclude" in str(report)

    def test_lazy_and_meta(self):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 4))
        model.append(nn.LazyLinear(4))
        assert quantization_report(model).total == 20
        with pytest.warns(UserWarning, match="1.*: not initialized yet"):
            quantize_model(model, QuantConfig(4))
