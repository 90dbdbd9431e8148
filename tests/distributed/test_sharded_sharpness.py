"""Sharpness of models that FSDP2 has sharded is that of one process."""

import pytest
import torch.distributed as dist

from qatkernels.hessian import gradient_norm_ratio, sharpness
from qatkernels.testing.compare import assert_same_bits
from tests.sharded import BATCHES, loss_of, make, shard, trained

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def sharp(model, loss):
    """Return sharpness in all its forms."""
    found = [sharpness(model, loss, 0.1, norm=n, target=t) for n in ("l2", "asam") for t in ("latent", "quantized")]
    found.append(sharpness(model, loss, 0.1, params=trained(model)))
    return [*(value for row in found for value in row), gradient_norm_ratio(loss, trained(model), model=model)]


def sharp_shards(rank, scales):
    model = shard(make(), scales, cast=False)
    before = {n: p.to_local().clone() for n, p in model.named_parameters()}
    model(BATCHES[0])  # the root's parameters stay gathered after this
    model.set_requires_gradient_sync(False)
    found = sharp(model, lambda: loss_of(model, BATCHES[rank]))
    for name, p in model.named_parameters():
        assert_same_bits(p.to_local(), before[name])
        assert p.grad is None
    with pytest.raises(ValueError, match="model is None or whole, must be the model of params that are sharded"):
        gradient_norm_ratio(lambda: loss_of(model, BATCHES[rank]), trained(model))
    return found


@pytest.mark.parametrize("scales", [False, True], ids=["fsdp", "shard_scales"])
def test_sharpness(pair, scales):
    model = make()
    wanted = sharp(model, lambda: (loss_of(model, BATCHES[0]) + loss_of(model, BATCHES[1])) / 2)
    for found in pair.run(sharp_shards, scales):
        assert found == pytest.approx(wanted, rel=1e-4, abs=2e-6)


def sharp_in_bfloat16(rank):
    model = shard(make(), scales=True)
    losses = [float(loss_of(model, batch).detach()) for batch in BATCHES[:2]]
    found = sharpness(model, lambda: loss_of(model, BATCHES[rank]), 0.1, target="quantized")
    assert found.loss == pytest.approx(sum(losses) / 2, abs=1e-12)  # the loss that FSDP2 computes in bfloat16
    still = sharpness(model, lambda: loss_of(model, BATCHES[rank]), 0.0, target="quantized")
    assert still.value == 0
    assert still.gradient_norm == found.gradient_norm > 0
    return found.perturbation_norm


def test_sharpness_in_mixed_precision(pair):
    assert pair.run(sharp_in_bfloat16) == pytest.approx([0.1] * 2)
