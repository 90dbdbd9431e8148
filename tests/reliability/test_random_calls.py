"""A short form of the random calls, and whether a result that is off in its last bit is noticed."""

from __future__ import annotations

import pytest
import torch

from qatkernels.backends import IMPLS
from qatkernels.ops._op import OPS

from . import random_calls
from .runner import Campaign


def test_every_op_on_every_isa(capsys: pytest.CaptureFixture[str]) -> None:
    campaign = Campaign("random", seed=14, cases=12)
    random_calls.run(campaign)
    assert campaign.results.keys() == OPS.keys()
    assert not campaign.failures, capsys.readouterr().out


@pytest.mark.parametrize("op", ["fake_quantize", "quantize", "fake_quantize_dynamic", "normal", "lowbit_linear"])
def test_a_wrong_result_is_seen(op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = random_calls.out_impl(op)

    def off(*args: object) -> None:
        right(*args)
        out = args[-1]
        assert isinstance(out, torch.Tensor)
        if out.numel():
            flat = out.view(-1)
            if out.is_floating_point():
                flat[-1] = flat[-1] * 1.5 + 1
            else:
                flat[-1] = flat[-1] ^ 1

    monkeypatch.setitem(IMPLS[f"{op}_out"], "cpp", off)
    campaign = Campaign("random", seed=14, cases=10, only=(op,))
    random_calls.run(campaign)
    assert len(campaign.failures) >= 5
    assert f"python -m tests.reliability random {op} --seed 14 --case" in capsys.readouterr().out
