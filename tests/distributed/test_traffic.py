"""The bytes that studies/traffic.py counts are those that a way to share the work has to exchange."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

#: Parameters of the model of the size "smoke": embedding and head, linear layers, their scales, norms.
ENDS, WEIGHTS, SCALES, NORMS = 2 * 64 * 32, 2 * (4 * 32 * 32 + 3 * 32 * 64), 2 * (5 * 32 + 2 * 64), 5 * 32
#: Outside of the blocks, where FSDP2 gathers once in a step and not twice.
ROOT = ENDS + 32
TOTAL = ENDS + WEIGHTS + SCALES + NORMS
HIDDEN = 8 * 32  # tokens of a step, times the width


def measured(rank, name):
    from studies.traffic import SIZES, WAYS, measure

    return measure(SIZES["smoke"], WAYS[name], rank)


def bytes_of(figures):
    return {kind: found["bytes"] for kind, found in figures["collectives"].items()}


WANTED = {
    "ddp": (
        {"broadcast": 2 * 8 * 4, "all-reduce": 4 * TOTAL},
        {"gradients": 4 * TOTAL},
    ),  # and angles, which are buffers
    "fsdp": (
        {"all-gather": 4 * (2 * TOTAL - ROOT), "reduce-scatter": 4 * TOTAL},
        {"parameters": 4 * TOTAL, "gradients": 4 * TOTAL},
    ),
    "fsdp-plain": (
        {"all-gather": 2 * (2 * (TOTAL - SCALES) - ROOT), "reduce-scatter": 4 * (TOTAL - SCALES)},
        {"parameters": 2 * (TOTAL - SCALES), "gradients": 4 * (TOTAL - SCALES)},
    ),
    "fsdp-scales": (
        {"all-gather": 2 * (2 * (TOTAL - SCALES) - ROOT) + 4 * SCALES, "reduce-scatter": 4 * TOTAL},
        {"parameters": 2 * (TOTAL - SCALES) + 4 * SCALES, "gradients": 4 * TOTAL},
    ),
    "fsdp-codes": (
        {
            "all-gather": 2 * (2 * (TOTAL - SCALES - WEIGHTS) - ROOT) + 2 * (WEIGHTS // 4 + 4 * SCALES),
            "reduce-scatter": 4 * (TOTAL - SCALES),
        },
        {"parameters": 2 * (TOTAL - SCALES - WEIGHTS) + WEIGHTS // 4 + 4 * SCALES, "gradients": 4 * TOTAL},
    ),
    # In each block, two sums in the forward; in the backward one for each of q, k, v, gate and up, and the gradients
    # of the scales of o and down.
    "tensor-parallel": ({"all-reduce": 2 * (7 * HIDDEN + 2 * 32) * 4}, {"activations": 2 * 4 * HIDDEN * 4}),
}


@pytest.mark.parametrize("name", WANTED)
def test_bytes(pair, name):
    pytest.importorskip("transformers")
    for found in pair.run(measured, name):
        assert (bytes_of(found), found["minimum"]) == WANTED[name]
        assert found["peak_bytes"] is None or found["peak_bytes"] >= 0


def counted(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    from studies.traffic import Traffic

    mesh = init_device_mesh("cpu", (2,))
    with Traffic() as traffic:
        dist.all_reduce(torch.ones(3))
        dist.broadcast(torch.ones(5), 0)
        dist.all_gather([torch.ones(2), torch.ones(2)], torch.ones(2))
        part = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
        part.redistribute(placements=[Replicate()]).to_local().sum()
        part.redistribute(placements=[Shard(0)]).redistribute(placements=[Replicate()]).to_local().sum()
        torch.ones(100).sum()
        dist.barrier()
    return traffic.calls, traffic.bytes


def test_each_collective(pair):
    calls = Counter({"all-reduce": 2, "broadcast": 1, "all-gather": 2, "reduce-scatter": 1})
    sizes = Counter({"all-reduce": 12 + 32, "broadcast": 20, "all-gather": 16 + 32, "reduce-scatter": 32})
    assert pair.run(counted) == [(calls, sizes)] * 2
