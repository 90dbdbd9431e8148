"""Families of transformers: how much is quantized, training, packing, generation, compiling, saving."""

import copy
import subprocess
import sys

import pytest
import torch

import qatkernels as qk
from qatkernels.nn import packed_modules
from qatkernels.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")

from qatkernels.integrations.transformers import QatConfig  # noqa: E402
from tests.integrations.families import EXPERTS, FAMILIES  # noqa: E402

CONFIG = qk.QuantConfig(4, group_size=16)
every = pytest.mark.parametrize("name", FAMILIES)


def quantized(name, **changes):
    """Return a quantized model. BERT's is warned of, because embeddings are most of so small a model."""
    return qk.quantize_model(FAMILIES[name].build(**changes), CONFIG, warn_below=0)


def logits(model, name):
    with torch.no_grad():
        return model(**FAMILIES[name].inputs()).logits


def train(model, name, steps):
    """Train on one batch, and return the losses."""
    optimizer = torch.optim.AdamW(qk.param_groups(model.train(), lr=1e-2))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**FAMILIES[name].inputs()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def generate(model, name):
    return model.generate(**FAMILIES[name].prompt(), max_new_tokens=5, do_sample=False, pad_token_id=0)


@every
def test_share(name):
    report = qk.quantization_report(quantized(name))
    left = [row for row in report.rows if row.status == "full precision"]
    embeddings = sum(row.numel for row in left if row.reason.startswith("embedding")) if name == "bert" else 0
    assert report.quantized / (report.total - embeddings) >= FAMILIES[name].share, report
    assert not [row for row in left if row.reason.startswith("not quantized")]


@every
def test_trains_packs_and_generates(name):
    model = quantized(name)
    losses = train(model, name, 20)
    assert losses[-1] < 0.7 * losses[0]
    packed = qk.pack_model(copy.deepcopy(model))
    assert len(packed_modules(packed)) == len(qk.quantized_modules(model))
    assert not qk.quantized_modules(packed)
    expected = logits(model, name)
    torch.testing.assert_close(logits(packed, name), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    if FAMILIES[name].prompt is not None:
        assert torch.equal(generate(packed, name), generate(model, name))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.checkpointing])
def test_gradient_checkpointing(name):
    gradients = []
    for checkpointing in (False, True):
        model = quantized(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)  # of dropout
        model(**FAMILIES[name].inputs()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        if gradient is None:
            assert gradients[1][key] is None, key
        else:
            torch.testing.assert_close(gradients[1][key], gradient, msg=key)


@every
def test_every_scale_trains(name):
    """No quantized layer is one that the model does not call."""
    model = quantized(name).train()
    model(**FAMILIES[name].inputs()).loss.backward()
    without = [n for n, layer in qk.quantized_modules(model).items() if layer.scale.grad is None]
    assert without == []


@every
def test_autocast(name):
    model = quantized(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**FAMILIES[name].inputs()).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    packed, plain = qk.pack_model(copy.deepcopy(model)), qk.to_plain(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(plain, name).float()  # not those of float32, in which routers may choose other experts
        for one in (model, packed):
            difference = (logits(one, name).float() - expected).abs().max()
            # The plain model itself is up to 0.027 away from float32 (ViT, whose logits are small differences).
            assert difference <= 0.05 * expected.abs().max()


@every
def test_compiled(name):
    """Dynamo follows every model through our layers. What comes after it sees only ops, which have their own tests."""
    model = quantized(name).eval()
    for one in (model, qk.pack_model(copy.deepcopy(model))):
        torch._dynamo.reset()
        compiled = torch.compile(one, backend="eager")
        torch.testing.assert_close(logits(compiled, name), logits(one, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_compiled_by_inductor(name):
    """One graph, without a fall back to Python between layers and experts."""
    model = quantized(name).eval()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, name), logits(model, name), rtol=1e-4, atol=1e-5)


@every
def test_saved_models_load_with_the_same_logits(name, tmp_path):
    model = quantized(name)
    train(model, name, 1)
    for kind in ("trained", "packed"):
        if kind == "packed":
            qk.pack_model(model)
        model.save_pretrained(tmp_path / kind)
        loaded, info = type(model).from_pretrained(tmp_path / kind, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert_same_bits(logits(loaded.eval(), name), logits(model, name))
        assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]


def fake_quantized_copy(model, plain):
    """Return the plain model with the values of the quantized one."""
    with torch.no_grad():
        for name, layer in qk.quantized_modules(model).items():
            owner, _, last = name.rpartition(".")
            value, owner = layer.quantized_weight(), plain.get_submodule(owner)
            held = getattr(owner, last)
            if isinstance(held, torch.nn.Module):
                held.weight.copy_(value)
            else:
                held.copy_(value.mT if owner.is_transposed else value)
    return plain


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("config", [CONFIG, qk.QuantConfig(2), qk.QuantConfig(1.58, per_tensor=True)])
def test_experts_compute_what_the_plain_model_does_of_their_values(name, config):
    """transformers' own loop over experts, with the fake-quantized stacks in place of the Parameters."""
    plain = FAMILIES[name].build()
    for p in plain.parameters():  # routers begin as zeros in some families, and biases in all
        torch.nn.init.normal_(p, std=0.2)
    model = qk.quantize_model(copy.deepcopy(plain), config, warn_below=0)
    plain = fake_quantized_copy(model, plain)
    plain.set_experts_implementation("eager")
    tolerances = {"rtol": 1e-4, "atol": 1e-4}
    for one in (plain, model):
        one.train()(**FAMILIES[name].inputs()).loss.backward()
    torch.testing.assert_close(logits(model.eval(), name), logits(plain.eval(), name), **tolerances)
    wanted = dict(plain.named_parameters())
    for key, parameter in model.named_parameters():
        if key in wanted and key.rpartition(".")[0] not in qk.quantized_modules(model):  # what straight-through leaves
            torch.testing.assert_close(parameter.grad, wanted[key].grad, **tolerances, msg=key)
    torch.testing.assert_close(logits(qk.pack_model(model), name), logits(plain, name), **tolerances)


@pytest.mark.parametrize("pattern", ["*.down_proj", "*.gate_up_proj", "*.q_proj"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_that_are_quantized_in_part(name, pattern):
    plain = FAMILIES[name].build()
    model = qk.quantize_model(copy.deepcopy(plain), CONFIG, include=pattern)
    assert all(n.endswith(pattern[2:]) for n in qk.quantized_modules(model))
    wanted = logits(fake_quantized_copy(model, plain).eval(), name)
    torch.testing.assert_close(logits(model.eval(), name), wanted, rtol=1e-4, atol=1e-5)


def test_other_experts_keep_their_implementation():
    model = FAMILIES["mixtral"].build()
    model.set_experts_implementation("grouped_mm")
    qk.quantize_model(model, CONFIG, exclude="*.layers.1.*", warn_below=0)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert (first.config._experts_implementation, second.config._experts_implementation) == ("qatkernels", "grouped_mm")
    model.set_experts_implementation("eager")  # of a quantized stack there is one implementation
    assert first.config._experts_implementation == "qatkernels"
    assert isinstance(second.gate_up_proj, torch.nn.Parameter)


def test_a_group_size_that_does_not_fit_changes_nothing():
    model = FAMILIES["gpt-oss"].build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"experts.* cannot be quantized: group_size is 24"):
        qk.quantize_model(
            model, {"*.q_proj": CONFIG, "*.gate_up_proj": CONFIG, "*.down_proj": qk.QuantConfig(4, group_size=24)}
        )
    assert before.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert_same_bits(p, before[name], name)


@pytest.mark.parametrize("name", EXPERTS)
def test_stacks_from_a_plain_folder(name, tmp_path):
    """Which has them expert by expert in most families, and transposed in gpt-oss."""
    plain = FAMILIES[name].build()
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.2)
    plain.save_pretrained(tmp_path)
    settings = QatConfig(CONFIG)
    loaded, info = type(plain).from_pretrained(tmp_path, quantization_config=settings, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model = qk.quantize_model(copy.deepcopy(plain), CONFIG, warn_below=0)
    assert qk.quantized_modules(loaded).keys() == qk.quantized_modules(model).keys()
    assert_same_bits(logits(loaded.eval(), name), logits(model.eval(), name))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    qk.load_weights(model, plain.state_dict())
    assert_same_bits(logits(loaded, name), logits(model, name))


def test_packed_experts_in_one_file(tmp_path):
    model = qk.pack_model(quantized("gpt-oss").eval())
    qk.save_packed(model, tmp_path / "model.safetensors")
    loaded = qk.load_packed(tmp_path / "model.safetensors", lambda config: FAMILIES["gpt-oss"].build())
    assert_same_bits(logits(loaded, "gpt-oss"), logits(model, "gpt-oss"))


def test_pickled_experts_run_in_another_process(tmp_path):
    model = quantized("mixtral").eval()
    torch.save(model, tmp_path / "model.pt")
    torch.save(logits(model, "mixtral"), tmp_path / "logits.pt")
    code = (
        "import sys, torch\n"
        "model, wanted = (torch.load(f'{sys.argv[1]}/{n}.pt', weights_only=False) for n in ('model', 'logits'))\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(input_ids=torch.arange(3, 27).view(2, 12)).logits, wanted)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_what_is_left_of_mamba_is_named():
    reasons = {row.name: row.reason for row in qk.quantization_report(quantized("mamba")).rows}
    mixer = "backbone.layers.0.mixer"
    assert reasons[f"{mixer}.dt_proj.weight"] == "is not called: MambaMixer multiplies by its weight itself"
    assert reasons[f"{mixer}.conv1d.weight"] == "convolution: not supported"
    assert reasons[f"{mixer}.A_log"].startswith("parameter of a module that uses it in a forward of its own")
    with pytest.raises(ValueError, match=r"dt_proj is not called: MambaMixer multiplies by its weight itself"):
        qk.quantize_model(FAMILIES["mamba"].build(), CONFIG, include="*.dt_proj")


def test_what_rwkv_changes_in_place_is_left():
    for every, count in ((6, 4), (0, 0)):
        model = quantized("rwkv", rescale_every=every)
        left = [row for row in qk.quantization_report(model).rows if "divided in place" in row.reason]
        assert len(left) == count
        assert qk.check(model, **FAMILIES["rwkv"].inputs()).ok


@every
@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
def test_to_plain(name, packed, tmp_path):
    """The result is a model of transformers alone, in memory and in a folder."""
    plain = FAMILIES[name].build()
    model = qk.quantize_model(copy.deepcopy(plain), CONFIG, warn_below=0)
    train(model, name, 1)
    wanted = logits(model, name)
    if packed:
        qk.pack_model(model)
    assert qk.to_plain(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    tolerances = {"rtol": 1e-4, "atol": 1e-4 * wanted.abs().max().item()}
    torch.testing.assert_close(logits(model, name), wanted, **tolerances)
    model.save_pretrained(tmp_path)
    assert "qatkernels" not in (tmp_path / "config.json").read_text()
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(logits(loaded.eval(), name), wanted, **tolerances)
