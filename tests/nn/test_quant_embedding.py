"""Quantized embeddings, and output layers that are tied to them."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkernels as qk
from qatkernels.methods import SQuAT, WinQ
from qatkernels.nn import LearnedActivation, PackedEmbedding, PackedLinear, QuantConfig, QuantEmbedding, QuantLinear
from qatkernels.testing.compare import assert_same_bits

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Tied(nn.Module):
    """An embedding with a padding row, a layer, and a head that is tied to the embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(12, 16, padding_idx=0)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)).relu())


def embedding(config, padding_idx=None, dtype=torch.float32):
    layer = QuantEmbedding(12, 16, padding_idx, config=config, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_()
        layer.scale.mul_(0.7)  # so that some weights are clamped
        if layer.zero_point is not None:
            layer.zero_point.add_(0.3)
    return layer


class TestLayer:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("ids", [IDS, IDS.int(), IDS[0, 0], IDS[:, :0]], ids=["2d", "int32", "scalar", "empty"])
    def test_rows_are_those_of_the_whole_weight(self, config, dtype, ids):
        layer = embedding(config, dtype=dtype)
        assert_same_bits(layer(ids), F.embedding(ids, layer.quantized_weight()))
        assert_same_bits(PackedEmbedding.from_quantized(layer)(ids), layer(ids))

    @pytest.mark.parametrize("padding_idx", [None, 5, -7])
    def test_gradients(self, config, padding_idx):
        layer = embedding(config, padding_idx, torch.float64)
        found = dict(layer.named_parameters())
        upstream = torch.randn(*IDS.shape, 16, dtype=torch.float64)
        rows = F.embedding(IDS, layer.quantized_weight(), layer.padding_idx)
        wanted = torch.autograd.grad((rows * upstream).sum(), found.values())
        got = torch.autograd.grad((layer(IDS) * upstream).sum(), found.values())
        for name, ours, theirs in zip(found, got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
            assert theirs.abs().sum() > 0
        if padding_idx is not None and not config.per_tensor:
            assert not any(g[5].abs().sum() for g in got)

    def test_second_derivatives(self, config):
        layer = embedding(config, dtype=torch.float64)
        parameters, along = list(layer.parameters()), torch.randn(12, 16, dtype=torch.float64)

        def product(rows):
            gradient = torch.autograd.grad((rows**4).sum(), parameters, create_graph=True)
            return torch.autograd.grad((gradient[0] * along).sum() + gradient[1].square().sum(), parameters)

        ours, theirs = product(layer(IDS)), product(F.embedding(IDS, layer.quantized_weight()))
        torch.testing.assert_close(ours, theirs)

    def test_a_frozen_weight_has_frozen_scales(self):
        plain = nn.Embedding(12, 16).requires_grad_(False)
        layer = QuantEmbedding.from_embedding(plain, QuantConfig(4))
        assert layer.weight is plain.weight
        assert not layer.scale.requires_grad

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_norm": 1.0}, "embedding has max_norm=1.0, which changes rows in place"),
            ({"sparse": True}, "has sparse=True, but gradients pass .* give sparse=False"),
            ({"scale_grad_by_freq": True}, "has scale_grad_by_freq=True, .* give scale_grad_by_freq=False"),
        ],
        ids=["max_norm", "sparse", "scale_grad_by_freq"],
    )
    def test_settings_that_cannot_be_kept(self, settings, message):
        plain = nn.Embedding(12, 16, **settings)
        with pytest.raises(ValueError, match=message):
            QuantEmbedding.from_embedding(plain, QuantConfig(4))
        model = nn.Sequential(plain, nn.Linear(16, 16))
        with pytest.raises(ValueError, match=f"0 cannot be quantized: .*{message}"):
            qk.quantize_model(model, QuantConfig(4), embeddings=True)
        assert [type(m) for m in model] == [nn.Embedding, nn.Linear]

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (QuantConfig(4, act_bits=8), "act_bits is 8, must be None for an embedding"),
            (QuantConfig(4, out_bits=8), "out_bits is 8, must be None for an embedding"),
            (QuantConfig(4, scale_init="activation"), "scale_init is 'activation', .*: give 'mse'"),
            (QuantConfig(4, group_size=5), "group_size"),
        ],
        ids=["act_bits", "out_bits", "activation", "group_size"],
    )
    def test_configurations_that_do_not_fit(self, config, message):
        with pytest.raises(ValueError, match=message):
            QuantEmbedding(12, 16, config=config)
        layer = QuantEmbedding(12, 16, config=QuantConfig(4))
        with pytest.raises(ValueError, match=message):
            layer.requantize(config)
        assert layer.config == QuantConfig(4)
        with pytest.raises(ValueError, match=message):
            qk.quantize_model(Tied(), QuantConfig(2), embeddings=config)

    def test_noise_is_the_same_for_every_occurrence_of_a_token(self):
        layer = embedding(QuantConfig(4)).train()
        layer.quantizer.set_noise(0.1, 0.0)
        rows = layer(torch.tensor([3, 3, 7]))
        assert_same_bits(rows[0], rows[1])
        assert not torch.equal(rows, layer.eval()(torch.tensor([3, 3, 7])))

    def test_a_perturbation_reaches_the_rows(self):
        layer = embedding(QuantConfig(4))
        added = torch.randn(12, 16)
        with layer.quantizer.modified(add=added):
            assert_same_bits(layer(IDS), F.embedding(IDS, layer.quantized_weight() + added))

    def test_autocast_and_casts(self):
        layer = embedding(QuantConfig(4))
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(layer(IDS), layer.eval()(IDS).clone())
        packed = PackedEmbedding.from_quantized(layer)
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(IDS).dtype == nn.Embedding(12, 16)(IDS).dtype
        assert packed.bfloat16()(IDS).dtype == torch.bfloat16

    def test_compiled(self):
        layer = embedding(QuantConfig(4, group_size=8), 0)
        for module in (layer, PackedEmbedding.from_quantized(layer)):
            compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
            assert_same_bits(compiled(IDS), module(IDS))

    def test_new_parameters(self):
        layer = embedding(QuantConfig(4))
        layer.reset_parameters()
        fresh = QuantEmbedding.from_embedding(nn.Embedding.from_pretrained(layer.weight.detach()), QuantConfig(4))
        assert_same_bits(layer.scale, fresh.scale)
        assert "12, 16, bits=4, scheme=lsq" in repr(layer)

    def test_an_embedding_has_nothing_but_a_weight(self):
        weight = PackedEmbedding.from_quantized(embedding(QuantConfig(4))).weight
        learned = LearnedActivation(16, QuantConfig(4).grid)
        for given in ({"bias": torch.zeros(12)}, {"act": learned}, {"act_bits": 8}, {"out_act": learned}):
            with pytest.raises(ValueError, match=f"{next(iter(given))} is given, must be None for an embedding"):
                PackedEmbedding(weight, **given)


class TestSelection:
    def configs(self, model, config=None, **settings):
        qk.quantize_model(model, config or QuantConfig(2), warn_below=0, **settings)
        return {name: layer.config for name, layer in qk.quantized_modules(model).items()}

    def test_not_unless_asked(self):
        model = Tied()
        for settings in ({}, {"exclude": ()}):
            assert "embed" not in self.configs(copy.deepcopy(model), **settings)
        assert "embed: embedding: in full precision unless asked for (embeddings=True)" in str(
            qk.quantization_report(model)
        )

    @pytest.mark.parametrize(
        ("config", "wanted"),
        [
            (QuantConfig(2), QuantConfig(4)),
            (QuantConfig(1.58, "ternary", group_size=8), QuantConfig(4, group_size=8)),
            (QuantConfig(8, "affine", scale_init="range"), QuantConfig(8, "affine", scale_init="range")),
            (QuantConfig(3, act_bits=8, act_scheme="lsq", act_signed=False), QuantConfig(4)),
            (QuantConfig(2, out_bits=8), QuantConfig(4)),
            (QuantConfig(2, scale_init="activation"), QuantConfig(4, scale_init="mse")),
            ({"*": QuantConfig(2)}, QuantConfig(4)),
        ],
        ids=str,
    )
    def test_at_least_four_bits_and_the_head_follows(self, config, wanted):
        model = Tied()
        found = self.configs(model, config, embeddings=True)
        assert found["embed"] == found["head"] == wanted
        assert model.embed.weight is model.head.weight
        assert model.embed.scale is model.head.scale
        assert model.embed.zero_point is model.head.zero_point
        assert qk.quantization_report(model).share == pytest.approx(1, abs=0.05)

    def test_a_configuration_of_their_own(self):
        found = self.configs(Tied(tied=False), embeddings=QuantConfig(3, group_size=4))
        assert found == {"embed": QuantConfig(3, group_size=4), "body": QuantConfig(2), "head": QuantConfig(2)}

    def test_named_in_a_mapping(self):
        eight = QuantConfig(2, group_size=8)
        found = self.configs(Tied(), {"embed": eight, "*": QuantConfig(2)})
        assert found == {"embed": eight, "body": QuantConfig(2), "head": eight}
        assert self.configs(Tied(), {"embed": None, "*": QuantConfig(2)}, embeddings=True) == {"body": QuantConfig(2)}
        found = self.configs(Tied(), {"embed": eight, "head": None, "*": QuantConfig(2)})
        assert found == {"embed": eight, "body": QuantConfig(2)}
        with pytest.raises(ValueError, match=r"head is to be quantized to 8 bits.* shares its weight with embed"):
            self.configs(Tied(), {"embed": eight, "head": QuantConfig(8), "*": QuantConfig(2)})

    @pytest.mark.parametrize(
        ("settings", "wanted"),
        [
            ({"exclude": "head"}, ["embed", "body"]),
            ({"exclude": "emb*"}, ["body"]),
            ({"include": "body"}, ["embed", "body", "head"]),
            ({"filter_fn": lambda module, name: name != "embed"}, ["body"]),
            ({"filter_fn": lambda module, name: name != "head"}, ["embed", "body"]),
        ],
    )
    def test_patterns(self, settings, wanted):
        assert list(self.configs(Tied(), embeddings=True, **settings)) == wanted

    def test_what_a_model_names(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens, self.positions = nn.Embedding(12, 16), nn.Embedding(8, 16)
                self.body = nn.Linear(16, 16)

            def get_input_embeddings(self):
                return self.tokens

        assert list(self.configs(Model(), embeddings=True)) == ["tokens", "body"]
        found = self.configs(Model(), {"positions": QuantConfig(8), "*": QuantConfig(2)}, embeddings=True)
        assert {name: config.bits for name, config in found.items()} == {"tokens": 4, "positions": 8, "body": 2}

    def test_subclasses_are_left_and_named(self):
        class Scaled(nn.Embedding):
            pass

        model = nn.Sequential(Scaled(12, 16), nn.Linear(16, 16))
        with pytest.warns(UserWarning, match=r"0: is a .*Scaled, must be exactly torch.nn.Embedding"):
            qk.quantize_model(model, QuantConfig(2), embeddings=True)
        assert type(model[0]) is Scaled

    def test_the_warning_counts_them(self):
        model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 16))
        with pytest.warns(UserWarning, match=r"0: embedding: in full precision unless asked for \(embeddings=True\)"):
            qk.quantize_model(copy.deepcopy(model), QuantConfig(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            qk.quantize_model(model, QuantConfig(2), embeddings=True)

    def test_a_model_of_an_embedding(self):
        layer = qk.quantize_model(nn.Embedding(12, 16), QuantConfig(2), embeddings=True)
        assert isinstance(layer, QuantEmbedding)
        assert isinstance(qk.pack_model(layer), PackedEmbedding)

    def test_messages(self):
        with pytest.raises(ValueError, match="embeddings is 4, must be True, False or a QuantConfig"):
            self.configs(Tied(), embeddings=4)
        with pytest.raises(ValueError, match=r"no nn.Linear matches \['embed'\].*give embeddings=True"):
            self.configs(Tied(), include=("embed", "body"))

    def test_requantized(self):
        model = Tied()
        self.configs(model, embeddings=True)
        with pytest.raises(ValueError, match="embed is quantized already"):
            self.configs(model, embeddings=QuantConfig(8))
        found = self.configs(model, QuantConfig(3), requantize=True, exclude=())  # says nothing of embeddings
        assert found == {"embed": QuantConfig(4), "body": QuantConfig(3), "head": QuantConfig(4)}
        found = self.configs(model, QuantConfig(3), requantize=True, embeddings=QuantConfig(8))
        assert found == {"embed": QuantConfig(8), "body": QuantConfig(3), "head": QuantConfig(8)}
        assert model.embed.scale is model.head.scale


def trained(method=None, **settings):
    """Return a model after 20 steps, and its losses."""
    torch.manual_seed(0)
    model = qk.quantize_model(Tied(), QuantConfig(2, **settings), embeddings=True)
    optimizer = torch.optim.AdamW(qk.param_groups(model, lr=1e-2, weight_decay=0.0))
    applied = None if method is None else method(model, optimizer)
    losses = []

    def closure():
        loss = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.zero_grad()
        losses.append((closure() if applied is None else applied.gradient(closure)).item())
        optimizer.step()
        if applied is not None:
            applied.after_step()
    return model, losses


class TestWholeModels:
    @pytest.mark.parametrize("scheme", ["paretoq", "affine"])
    def test_ties_hold_in_training_and_packing(self, scheme, tmp_path):
        model, losses = trained(scheme=scheme)
        assert losses[-1] < losses[0] / 2
        assert model.embed.weight is model.head.weight
        assert qk.check(model, IDS).ok
        model.eval()
        wanted, values = model(IDS), model.head.quantized_weight()
        plain = qk.to_plain(copy.deepcopy(model))
        assert plain.embed.weight is plain.head.weight
        assert type(plain.embed) is nn.Embedding
        assert plain.embed.padding_idx == 0
        assert_same_bits(plain.embed.weight, values)
        whole = qk.nn.model_bytes(model)
        qk.pack_model(model)
        assert isinstance(model.embed, PackedEmbedding)
        assert isinstance(model.head, PackedLinear)
        assert model.embed.weight is model.head.weight
        assert qk.nn.model_bytes(model) < whole / 2
        torch.testing.assert_close(model(IDS), wanted)
        assert qk.check(model, IDS).ok
        assert qk.quantization_report(model).share > 0.9
        qk.save_packed(model, tmp_path / "packed.safetensors")
        loaded = qk.load_packed(tmp_path / "packed.safetensors", lambda _: Tied())
        assert_same_bits(loaded(IDS), model(IDS))
        assert loaded.embed.weight is loaded.head.weight
        assert loaded.embed.padding_idx == 0
        assert qk.to_plain(loaded).embed.weight is loaded.head.weight

    def test_state_dicts(self):
        model, _ = trained()
        other = qk.quantize_model(Tied(), QuantConfig(2), embeddings=True)
        other.load_state_dict(model.state_dict())
        assert_same_bits(other(IDS), model(IDS))
        other = qk.quantize_model(Tied(), QuantConfig(2), embeddings=QuantConfig(8))
        with pytest.raises(RuntimeError, match=r"embed.scale is of bits=4, scheme=lsq, must be of bits=8"):
            other.load_state_dict(model.state_dict())
        qk.load_weights(other, model.state_dict())
        assert_same_bits(other.embed.weight, model.embed.weight)

    def test_methods(self):
        _, losses = trained(lambda model, optimizer: WinQ(model, reset_every=5, reset_weight=0.5, noise_std=0.01))
        assert losses[-1] < losses[0]
        _, losses = trained(lambda model, optimizer: SQuAT(model, optimizer))
        assert losses[-1] < losses[0]

    def test_an_embedding_decays_as_little_as_before(self):
        model = qk.quantize_model(Tied(), QuantConfig(2), embeddings=True)
        groups = qk.param_groups(model, lr=1e-3, weight_decay=0.1)
        names = {id(p): group["name"] for group in groups for p in group["params"]}
        assert names[id(model.embed.weight)] == "others"
        assert names[id(model.embed.scale)] == "scales"

    def test_a_head_left_in_full_precision(self):
        model = qk.quantize_model(Tied(), QuantConfig(2), embeddings=True, exclude="head").eval()
        wanted = model(IDS)
        assert type(model.head) is nn.Linear
        torch.testing.assert_close(qk.to_plain(copy.deepcopy(model))(IDS), wanted)
        torch.testing.assert_close(qk.pack_model(model)(IDS), wanted)
        assert isinstance(model.head, nn.Linear)
        assert not isinstance(model.head, QuantLinear)
