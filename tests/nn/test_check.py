import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from qatkernels import QuantConfig, check, pack_model, quantize_model
from qatkernels.nn import calibrate


class Net(nn.Module):
    """Two layers, batch norm and dropout; subclasses go wrong in one way each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.drop, self.down = (
            nn.Linear(16, 32),
            nn.BatchNorm1d(32),
            nn.Dropout(0.5),
            nn.Linear(32, 4),
        )

    def forward(self, x):
        return self.down(self.drop(F.relu(self.norm(self.up(x)))))


class ReadsTheWeight(Net):
    def forward(self, x):
        return F.linear(F.relu(self.up(x)), self.down.weight)


class NeverCalls(Net):
    def forward(self, x):
        return self.up(x)


class CutsTheGraph(Net):
    def forward(self, x):
        with torch.no_grad():
            y = self.up(x)
        return self.down(y)


class RescalesForEvaluation(Net):
    """As RWKV does: weights are divided in eval mode and multiplied back in training mode, in the forward."""

    rescaled = False

    def forward(self, x):
        if self.rescaled == self.training:
            with torch.no_grad():
                self.up.weight.mul_(2 if self.training else 0.5)
            self.rescaled = not self.training
        return super().forward(x)


def made(net=Net, **config):
    return quantize_model(net(), QuantConfig(**{"bits": 4, **config}))


def problems(report):
    return {layer.name: layer.problems for layer in report.layers if layer.problems}


x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
def test_a_good_model_has_no_problem_and_is_left_as_it_was(training):
    model = made().train(training)
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    report = check(model, x)
    assert report.ok, str(report)
    assert [layer.calls for layer in report.layers] == [2, 2]
    assert all(layer.scale_grad > 0 and 0.99 < layer.scale_ratio < 1.01 for layer in report.layers)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_table_has_every_layer_and_every_problem():
    model = made(ReadsTheWeight)
    text = str(check(model, x))
    lines = text.splitlines()
    assert lines[0].split()[0] == "layer"
    assert lines[1].startswith("up ")
    assert lines[2].startswith("down ")
    assert "problem: down is never called" in text
    assert lines[-1] == "2 layers checked, 1 problem found"


@pytest.mark.parametrize(
    ("net", "layer", "message"),
    [
        (ReadsTheWeight, "down", "reads its weight itself and bypasses quantization"),
        (NeverCalls, "down", "is never called"),
        (CutsTheGraph, "up", "gets? no gradient"),
    ],
)
def test_layers_that_are_bypassed(net, layer, message):
    found = problems(check(made(net), x))
    assert list(found) == [layer]
    assert pytest.importorskip("re").search(message, found[layer][0])


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_the_model_changes_in_place(training):
    model = made(RescalesForEvaluation).train(training)
    model(x)
    before = copy.deepcopy(model.state_dict())
    found = problems(check(model, x))
    assert list(found) == ["up"]
    assert "changes in place" in found["up"][0]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_scales_that_do_not_fit():
    model = made()
    with torch.no_grad():
        model.up.weight.mul_(10)  # what merging an adapter or loading other weights does, only more
        model.down.scale[1] = -1.0
        model.down.scale[2] = torch.inf
    found = problems(check(model, x))
    assert "0.1 times as large as its weights ask for" in found["up"][0]
    assert "1 scales that are not finite" in found["down"][0]
    assert "1 of 4 scales at the floor" in found["down"][1]
    model.up.reset_scale()
    model.down.reset_scale()
    assert check(model, x).ok


@pytest.mark.parametrize(
    ("apply", "how"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "pruned by torch.nn.utils.prune"),
        (parametrizations.weight_norm, "parametrized by weight_norm"),
    ],
)
def test_reparametrizations_on_top(apply, how):
    model = made()
    apply(model.up)
    found = problems(check(model, x))
    assert list(found) == ["up"]
    assert how in found["up"][0]


def test_adapters_on_top_are_noted():
    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.a, self.b = base_layer, nn.Linear(16, 2, bias=False), nn.Linear(2, 32, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.b(self.a(x))

    model = made()
    model.up = Adapter(model.up)
    report = check(model, x)
    assert report.ok
    assert [layer.name for layer in report.layers if layer.notes] == ["up.base_layer"]


def test_a_model_without_a_parameter_that_trains_is_checked_all_the_same():
    """After PEFT's merge_and_unload: the base is frozen, and its weights have moved under their scales."""
    model = made().requires_grad_(False)
    report = check(model, x)
    assert report.ok
    assert report.notes == ["no parameter of the model requires grad, so the backward was left out"]
    model.up.weight.mul_(10)
    assert "has scales 0.1 times as large as its weights ask for" in str(check(model, x))


def test_activation_scales_that_wait_for_a_batch_go_on_waiting():
    model = made(act_bits=8, act_scheme="lsq", out_bits=8)
    before = copy.deepcopy(model.state_dict())
    report = check(model, x)
    assert report.ok
    assert "4 activation scales have not been initialized (up.act)" in report.notes[0]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(RuntimeError, match="has not been initialized"):
        model.eval()(x)
    calibrate(model, x)
    assert not check(model, x).notes


def test_packed_models():
    model = pack_model(made().eval())
    assert check(model, x).ok
    report = check(pack_model(made(NeverCalls).eval()), x)
    assert problems(report) == {"down": ["is never called by the forward of these inputs"]}


def test_what_it_needs():
    with pytest.raises(ValueError, match="call quantize_model first"):
        check(Net(), x)

    class Counts(Net):
        def forward(self, x):
            return {"count": super().forward(x).argmax()}

    with pytest.raises(ValueError, match="give loss_fn"):
        check(made(Counts), x)
    assert (
        check(made(Counts), x, loss_fn=lambda out: out["count"] * 0.0 + torch.zeros((), requires_grad=True)) is not None
    )


def test_losses_of_outputs():
    class WithLoss(Net):
        def forward(self, x, labels=None):
            logits = super().forward(x)
            return type("Output", (dict,), {"loss": F.cross_entropy(logits, labels)})(logits=logits)

    assert check(made(WithLoss), x, labels=torch.zeros(8, dtype=torch.long)).ok
    assert check(made(), x, loss_fn=lambda y: y.sum()).ok
