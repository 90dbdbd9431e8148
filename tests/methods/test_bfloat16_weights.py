"""Steps of bfloat16 weights that are computed in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qatkernels.methods import Bfloat16Weights
from qatkernels.methods.bfloat16_weights import stochastically_rounded


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make(lr: float = 1e-2, **kwargs: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(64, 64).bfloat16()
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, **kwargs)


def backward(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    model(x).float().square().mean().backward()


def test_random_rounding_is_right_on_average() -> None:
    # A quarter of the way from 1 to the next bfloat16 number, in both signs.
    x = torch.full((100_000,), 1 + 2**-7 / 4)
    for sign in (1, -1):
        y = stochastically_rounded(sign * x)
        assert set(y.tolist()) == {sign * 1.0, sign * (1 + 2**-7)}
        assert (y.abs() > 1).float().mean() == pytest.approx(0.25, abs=0.01)


def test_what_bfloat16_holds_stays() -> None:
    x = torch.tensor([0.0, -0.0, 1.5, -3.0, float("inf"), float("-inf"), float("nan"), 2.0**-133])
    y = stochastically_rounded(x)
    assert torch.equal(y.float().nan_to_num(7), x.nan_to_num(7))
    assert torch.equal(y[:6].signbit(), x[:6].signbit())


def test_nearest_is_the_float32_step_rounded() -> None:
    model, optimizer = make()
    wide = copy.deepcopy(model).float()
    reference = torch.optim.AdamW(wide.parameters(), lr=1e-2, weight_decay=0.0)
    Bfloat16Weights(optimizer, rounding="nearest")
    backward(model, torch.randn(8, 64).bfloat16())
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert p.grad is not None
        q.grad = p.grad.float()
    optimizer.step()
    reference.step()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert p.grad is not None
        assert p.grad.dtype == torch.bfloat16
        assert torch.equal(p, q.bfloat16())
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], reference.state[q]["exp_avg_sq"])


@pytest.mark.parametrize("kwargs", [{}, {"fused": True}, {"foreach": True}])
def test_small_steps_are_lost_by_rounding_to_nearest_alone(kwargs: dict[str, Any]) -> None:
    moved = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(0)
        model, optimizer = make(lr=1e-5, **kwargs)
        Bfloat16Weights(optimizer, rounding=rounding)  # type: ignore[arg-type]
        before = model.weight.detach().float()  # type: ignore[operator, union-attr]
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)  # type: ignore[arg-type, union-attr]
            optimizer.step()
        target = before - 100 * 1e-5
        after = model.weight.detach().float()  # type: ignore[operator, union-attr]
        moved[rounding] = float((after - before).mean() / (target - before).mean())
    assert moved["nearest"] < 0.3
    assert moved["stochastic"] == pytest.approx(1, abs=0.1)


def test_state_is_float32_after_loading() -> None:
    model, optimizer = make()
    Bfloat16Weights(optimizer)
    backward(model, torch.randn(8, 64).bfloat16())
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other, again = make()
    Bfloat16Weights(again)
    weights = copy.deepcopy(other.state_dict())
    again.load_state_dict(saved)
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert q.dtype == torch.bfloat16
        assert torch.equal(again.state[q]["exp_avg"], optimizer.state[p]["exp_avg"])
        assert again.state[q]["exp_avg"].dtype == torch.float32


def test_processes_round_alike_and_a_resumed_run_too() -> None:
    """Neither torch's generator nor what happened before matters: the seed and the number of the step do."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(hash((id(model), step)) % 1000)
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0 + step)
            optimizer.step()

    models = [make(lr=1e-4) for _ in range(3)]
    for model, optimizer in models:
        model.load_state_dict(models[0][0].state_dict())
        Bfloat16Weights(optimizer, seed=3)
    run(*models[0], range(6))
    run(*models[1], range(3))
    models[2][0].load_state_dict(models[1][0].state_dict())
    models[2][1].load_state_dict(copy.deepcopy(models[1][1].state_dict()))
    run(*models[2], range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(models[0][0].parameters(), models[2][0].parameters(), strict=True))
    model, optimizer = make(lr=1e-4)
    model.load_state_dict(models[1][0].state_dict())
    before = [p.clone() for p in models[2][0].parameters()]
    Bfloat16Weights(optimizer, seed=4)
    run(model, optimizer, range(3, 6))
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_failed_step_leaves_bfloat16() -> None:
    model, optimizer = make()
    Bfloat16Weights(optimizer)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert model.weight.dtype == torch.bfloat16
    model.weight.grad = torch.zeros(64, 64, dtype=torch.bfloat16).to_sparse()  # type: ignore[assignment]
    before = model.weight.detach().clone()  # type: ignore[operator, union-attr]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, before)  # type: ignore[arg-type]


def test_under_a_scheduler_and_a_scaler() -> None:
    model, optimizer = make(lr=1.0)
    Bfloat16Weights(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        backward(model, torch.randn(8, 64).bfloat16())
        optimizer.step()
        scheduler.step()
    assert model.weight.dtype == torch.bfloat16
    assert optimizer.param_groups[0]["rounded_steps"] == 2
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_other_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Bfloat16Weights(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[1].weight, before - 0.1)
    assert model[0].weight.dtype == torch.bfloat16


def test_remove() -> None:
    model, optimizer = make(lr=1e-5)
    Bfloat16Weights(optimizer).remove()
    backward(model, torch.randn(8, 64).bfloat16())
    optimizer.step()
    assert optimizer.state[next(model.parameters())]["exp_avg"].dtype == torch.bfloat16


def test_what_is_refused() -> None:
    model, optimizer = make()
    with pytest.raises(ValueError, match="rounding is 'up', must be one of"):
        Bfloat16Weights(optimizer, rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optimizer has parameters of torch.float32, must have some of"):
        Bfloat16Weights(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    Bfloat16Weights(optimizer)
    with pytest.raises(ValueError, match="closure is given"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="closure is given"):
        optimizer.step(closure=lambda: 0.0)
    assert next(model.parameters()).dtype == torch.bfloat16
