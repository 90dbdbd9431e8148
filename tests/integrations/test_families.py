"""Families of transformers: how much is quantized, training, packing, generation, and what frameworks do with a model."""

import copy

import pytest
import torch

import qatkernels as qk
from qatkernels.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")

import qatkernels.integrations.transformers  # noqa: E402, F401  (from_pretrained knows saved models)

from .families import EXPERTS, FAMILIES  # noqa: E402

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
    assert len(qk.packed_modules(packed)) == len(qk.quantized_modules(model))
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
    expected = logits(model.eval(), name).float()
    packed = qk.pack_model(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        for one in (model, packed):
            difference = (logits(one, name).float() - expected).abs().max()
            assert difference <= 0.05 * expected.abs().max()


@every
def test_compiled(name):
    model = quantized(name).eval()
    for one in (model, qk.pack_model(copy.deepcopy(model))):
        torch._dynamo.reset()
        compiled = torch.compile(one, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, name), logits(one, name), rtol=1e-4, atol=1e-5)


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


def test_what_is_left_of_mamba_is_named():
    reasons = {row.name: row.reason for row in qk.quantization_report(quantized("mamba")).rows}
    mixer = "backbone.layers.0.mixer"
    assert reasons[f"{mixer}.dt_proj.weight"] == "is not called: MambaMixer multiplies by its weight itself"
    assert reasons[f"{mixer}.conv1d.weight"] == "convolution: not supported"
    assert reasons[f"{mixer}.A_log"].startswith("parameter of a module that uses it in a forward of its own")
    with pytest.raises(ValueError, match=r"dt_proj is not called: MambaMixer multiplies by its weight itself"):
        qk.quantize_model(FAMILIES["mamba"].build(), CONFIG, include="*.dt_proj")


def test_what_rwkv_changes_in_place_is_left():
    model = quantized("rwkv", num_hidden_layers=3, rescale_every=2)
    left = {row.name for row in qk.quantization_report(model).rows if "divided in place" in row.reason}
    assert left == {"rwkv.blocks.2.attention.output.weight", "rwkv.blocks.2.feed_forward.value.weight"}
    assert qk.check(model, **FAMILIES["rwkv"].inputs()).ok
