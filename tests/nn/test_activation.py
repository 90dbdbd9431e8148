import copy
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qatkernels.grids import affine, lsq
from qatkernels.nn import (
    LearnedActivation,
    QuantConfig,
    QuantLinear,
    calibrate,
    load_weights,
    quantize_model,
)
from qatkernels.testing.compare import assert_same_bits


def test_lsq_starts_from_the_mean_magnitude_of_the_first_batch():
    act, x = LearnedActivation(16, lsq(4)), torch.randn(3, 5, 16)
    act(x)
    torch.testing.assert_close(act.scale.detach(), (2 * x.abs().mean() / 7**0.5).view(1))
    assert act.initialized
    before = act.scale.clone()
    act(10 * x)
    assert_same_bits(act.scale, before)


def test_offset_starts_from_the_range_of_the_first_batch():
    act, x = LearnedActivation(16, affine(4), offset=True), torch.randn(3, 5, 16).clamp_min(-0.2)
    y = act(x)
    scale = (x.max() - x.min()) / 15
    torch.testing.assert_close(act.scale.detach(), scale.view(1))
    torch.testing.assert_close(act.zero_point.detach(), (-x.min() / scale).round().view(1))
    assert (y - x).abs().max() <= 1.01 * scale


@pytest.mark.parametrize("kind", ["signed", "unsigned", "offset"])
def test_gradients_equal_the_formula(kind):
    grid, features = (lsq(3) if kind == "signed" else affine(3)), 16
    act = LearnedActivation(features, grid, offset=kind == "offset")
    x = torch.randn(4, features)
    act(x)
    with torch.no_grad():
        act.scale.mul_(0.5)
        if kind == "offset":
            act.zero_point.add_(0.3)  # learned, so not integral
    x.requires_grad_()
    g = torch.linspace(-1, 1, x.numel()).view(x.shape)
    y = act(x)
    (y * g).sum().backward()

    low, high = (-4.0, 3.0) if kind == "signed" else (0.0, 7.0)
    s = act.scale.detach()
    z = act.zero_point.detach() if kind == "offset" else torch.zeros(1)
    r = x.detach() / s
    k = (r + z).clamp(low, high).round()
    inside = (r + z >= low) & (r + z <= high)
    gamma = 1 / (features * high) ** 0.5
    torch.testing.assert_close(y.detach(), (k - z) * s)
    torch.testing.assert_close(x.grad, torch.where(inside, g, 0.0))
    ds = torch.where(inside, k - z - r, (r + z).clamp(low, high) - z)
    torch.testing.assert_close(act.scale.grad, (g * ds).sum().view(1) * gamma)
    if kind == "offset":
        torch.testing.assert_close(act.zero_point.grad, (g * torch.where(inside, 0.0, -s)).sum().view(1) * gamma)
    assert 0 < inside.sum() < inside.numel()


def test_follows_autocast_and_keeps_float32_scales():
    act, x = LearnedActivation(16, lsq(8)), torch.randn(2, 16)
    wide = act(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(act(x), wide.bfloat16())
    before = act.scale.clone()
    assert_same_bits(act.bfloat16().scale, before)
    assert act(x.bfloat16()).dtype == torch.bfloat16


def test_eval_before_any_batch_is_an_error():
    layer = QuantLinear(16, 12, config=QuantConfig(4, act_bits=4, act_scheme="lsq")).eval()
    with pytest.raises(RuntimeError, match="has not been initialized: run a batch in training mode, call calibrate"):
        layer(torch.randn(2, 16))
    calibrate(layer, torch.randn(2, 16))
    assert layer(torch.randn(2, 16)).isfinite().all()


def test_state_dict_says_whether_the_scale_is_initialized():
    config = QuantConfig(4, act_bits=4, act_scheme="lsq")
    trained, fresh = QuantLinear(16, 12, config=config), QuantLinear(16, 12, config=config)
    trained(torch.randn(2, 16))
    assert trained.act.ready
    trained.load_state_dict(fresh.state_dict())  # of a layer that has seen nothing
    assert not trained.act.ready
    trained(torch.randn(2, 16))
    fresh.load_state_dict(trained.state_dict())
    assert fresh.eval()(torch.randn(2, 16)).isfinite().all()


LEARNED = [QuantConfig(4, act_bits=8, act_scheme=scheme) for scheme in ("lsq", "lsq+")]


def averaged(trained, folder):
    fresh = copy.deepcopy(trained)
    fresh.act.reset_parameters()
    average = AveragedModel(fresh, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(trained)
    return average.module


def read_in_place(trained, folder):
    dcp.save(trained.state_dict(), checkpoint_id=folder)
    fresh = QuantLinear(16, 12, config=trained.config)
    dcp.load(fresh.state_dict(), checkpoint_id=folder)
    return fresh


def written_in_place(trained, folder):
    fresh = QuantLinear(16, 12, config=trained.config)
    for name, tensor in fresh.state_dict().items():
        tensor.data.copy_(trained.state_dict()[name])  # which no version counter sees
    return fresh


def loaded(trained, folder):
    fresh = QuantLinear(16, 12, config=trained.config)
    fresh.load_state_dict(trained.state_dict())
    return fresh


def emptied_and_loaded(trained, folder):
    fresh = copy.deepcopy(trained).to("meta").to_empty(device="cpu")
    fresh.load_state_dict(trained.state_dict())
    return fresh


def assigned(trained, folder):
    fresh = QuantLinear(16, 12, config=trained.config, device="meta")
    fresh.load_state_dict(trained.state_dict(), assign=True)
    return fresh


#: Ways in which the tensors of a calibrated layer get into another one.
WAYS = {
    "ema": averaged,
    "dcp": read_in_place,
    "data": written_in_place,
    "load": loaded,
    "empty": emptied_and_loaded,
    "assign": assigned,
    "deepcopy": lambda trained, folder: copy.deepcopy(trained),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("config", LEARNED, ids=["lsq", "lsq+"])
def test_however_the_tensors_arrive_the_layer_is_calibrated(config, way, compiled, tmp_path):
    trained, x = QuantLinear(16, 12, config=config), torch.randn(3, 16)
    trained(x)
    other = way(trained, tmp_path)
    expected = trained.eval()(x)
    torch._dynamo.reset()
    run = torch.compile(other, fullgraph=True, backend="aot_eager") if compiled else other
    assert_same_bits(run.train()(x), expected)
    assert_same_bits(run.eval()(x), expected)
    run.train()(100 * x)
    assert_same_bits(other.act.scale, trained.act.scale)


@pytest.mark.parametrize("config", LEARNED, ids=["lsq", "lsq+"])
def test_the_state_of_functional_call_is_not_that_of_the_layer(config):
    """A call with the tensors of another layer says nothing of the layer's own, in either direction."""
    trained, fresh = (QuantLinear(16, 12, config=config) for _ in range(2))
    x = torch.randn(3, 16)
    trained(x)
    expected, empty = trained.eval()(x), copy.deepcopy(fresh.state_dict())
    assert_same_bits(functional_call(fresh.eval(), trained.state_dict(), (x,)), expected)
    with pytest.raises(RuntimeError, match="an activation scale has not been initialized"):
        fresh(x)
    with pytest.raises(RuntimeError, match="an activation scale has not been initialized"):
        functional_call(trained, empty, (x,))
    assert_same_bits(trained(x), expected)


def test_an_ensemble_of_calibrated_models(mlp):
    models = [quantize_model(copy.deepcopy(mlp), LEARNED[0]) for _ in range(3)]
    for factor, model in enumerate(models, 1):
        calibrate(model, factor * torch.randn(3, 16))
        model.eval()
    x = torch.randn(3, 16)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def call(parameters, buffers):
        return functional_call(skeleton, (parameters, buffers), (x,))

    together = vmap(call)(*stack_module_state(models))
    for y, model in zip(together, models, strict=True):
        torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize("config", LEARNED, ids=["lsq", "lsq+"])
def test_a_compiled_layer_that_loads_an_uninitialized_state_initializes_again(config):
    torch._dynamo.reset()
    layer, x = QuantLinear(16, 12, config=config), torch.randn(3, 16)
    fresh = copy.deepcopy(layer.state_dict())
    layer.act.scale.data.fill_(0.1)
    layer.act.initialized.fill_(True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    assert layer.act.scale.item() == pytest.approx(0.1)
    for factor in (1, 10):
        layer.load_state_dict(fresh)
        twin = copy.deepcopy(layer)
        assert_same_bits(compiled(factor * x), twin(factor * x))
        assert_same_bits(layer.act.scale, twin.act.scale)
        assert layer.act.initialized


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("config", LEARNED, ids=["lsq", "lsq+"])
def test_a_first_batch_that_is_not_finite_does_not_count(config, bad, compiled):
    torch._dynamo.reset()
    layer, twin = (QuantLinear(16, 12, config=config) for _ in range(2))
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(5, 16)
    spoiled = x.clone()
    spoiled[0, 3] = bad
    for _ in range(4):
        assert run(spoiled)[1:].isfinite().all()  # with a scale from the finite elements
        assert not layer.act.initialized
    for factor in (1, 10, 100):
        run(factor * x)
        twin(factor * x)
        assert layer.act.initialized
        assert_same_bits(layer.act.scale, twin.act.scale)
    run(spoiled)
    assert_same_bits(layer.act.scale, twin.act.scale)
    if twin.act.zero_point is not None:
        assert_same_bits(layer.act.zero_point, twin.act.zero_point)


@pytest.mark.parametrize("config", LEARNED, ids=["lsq", "lsq+"])
def test_a_first_batch_of_zeros_does_not_count(config):
    layer, twin = (QuantLinear(16, 12, config=config) for _ in range(2))
    zeros, x = torch.zeros(5, 16), torch.randn(5, 16)
    layer(zeros)
    assert not layer.act.initialized
    with pytest.raises(ValueError, match="x, the activations, has only zeros, from which an activation scale cannot"):
        calibrate(layer, zeros)
    layer(x)
    twin(x)
    assert layer.act.initialized
    assert_same_bits(layer.act.scale, twin.act.scale)


def test_compiles_twice_and_never_again():
    torch._dynamo.reset()
    layer = QuantLinear(16, 12, config=LEARNED[0])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(4):
        compiled(torch.randn(3, 16))
    assert counter.frame_count == 2


def test_an_empty_first_batch_is_an_error_about_the_input():
    layer = QuantLinear(16, 12, config=LEARNED[0])
    with pytest.raises(ValueError, match=r"x, the activations, has shape \(0, 16\) and no elements"):
        layer(torch.randn(0, 16))
    layer(torch.randn(2, 16))
    assert layer(torch.randn(0, 16)).shape == (0, 12)


def test_calibrate_refuses_a_batch_that_is_not_finite():
    layer, x = QuantLinear(16, 12, config=LEARNED[0]), torch.randn(2, 16)
    x[0, :3] = torch.nan
    with pytest.raises(ValueError, match="x, the activations, has 3 of 32 elements that are inf or NaN"):
        calibrate(layer, x)
    assert not layer.act.ready


def test_initialize_sets_the_scale_again():
    act, x = LearnedActivation(16, lsq(4)), torch.randn(3, 16)
    act.initialize(10 * x)
    act.initialize(x)
    torch.testing.assert_close(act.scale.detach(), (2 * x.abs().mean() / 7**0.5).view(1))
    assert act.ready


def calibrated_on_one(rank):
    model, x = QuantLinear(16, 12, config=LEARNED[0]), torch.randn(3, 16)
    if rank == 0:
        calibrate(model, x)
    replicas = DistributedDataParallel(model)
    assert replicas(x).isfinite().all()
    scale = 2 * x.abs().mean() / 127**0.5
    torch.testing.assert_close(model.act.scale.detach(), scale.view(1))


def refused_when_sharded(rank):
    for config in (QuantConfig(4), LEARNED[0]):
        layer = QuantLinear(16, 12, config=config)
        calibrate(layer, torch.randn(3, 16))
        cast = fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with pytest.raises(RuntimeError, match=r"scale is torch.bfloat16.*leave param_dtype out.*torch\.autocast"):
            cast(torch.randn(3, 16))
    model = fully_shard(QuantLinear(16, 12, config=QuantConfig(4)))
    state = QuantLinear(16, 12, config=QuantConfig(4)).state_dict()
    for call, message in (
        (lambda: model.requantize(QuantConfig(2)), "the weight is sharded.*requantize before fully_shard"),
        (lambda: load_weights(model, state), "the model is sharded.*load the weights before fully_shard"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_broadcast_by_ddp_calibrates_every_process(pair):
    pair.run(calibrated_on_one)


def test_sharded_models_are_refused(pair):
    pair.run(refused_when_sharded)


def test_calibrate_initializes_once_and_says_what_it_missed(mlp):
    model = quantize_model(mlp, QuantConfig(4, act_bits=4, act_scheme="lsq")).eval()
    calibrate(model, torch.randn(3, 16))
    before = [model[i].act.scale.clone() for i in (0, 2)]
    calibrate(model, 10 * torch.randn(3, 16))
    assert [model[i].act.scale.item() for i in (0, 2)] == [b.item() for b in before]

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = (QuantLinear(16, 4, config=model[0].config) for _ in range(2))

        def forward(self, x):
            return self.used(x)

    with pytest.raises(RuntimeError, match=re.escape("the batch did not reach 1 of 2 activation quantizers")):
        calibrate(Half(), torch.randn(3, 16))


def test_several_processes_may_not_each_use_their_own_batch(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    layer = QuantLinear(16, 12, config=QuantConfig(4, act_bits=4, act_scheme="lsq"))
    with pytest.raises(RuntimeError, match="call calibrate\\(model, batch\\) with the same batch in each"):
        layer(torch.randn(2, 16))
    calibrate(layer, torch.randn(2, 16))
    assert layer(torch.randn(2, 16)).isfinite().all()


def test_offset_needs_an_affine_grid():
    with pytest.raises(ValueError, match="offset is True with scheme 'lsq', only 'affine' has a zero point"):
        LearnedActivation(16, lsq(4), offset=True)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["dynamic", "lsq", "lsq+"])
def test_never_waits_for_the_device(scheme):
    layer = QuantLinear(64, 32, config=QuantConfig(4, act_bits=4, act_scheme=scheme), device="cuda")
    layer.quantizer.set_noise(0.001, 0.0)
    x = torch.randn(8, 64, device="cuda")
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
