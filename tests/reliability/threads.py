"""Eight Python threads call all CPU kernels and the memory pool at once. Each result must have one thread's bits.

ThreadSanitizer (`sanitizers thread`) also detects a race that changes no bit.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import torch
from torch import Tensor

import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.ops._op import OPS, as_tuple
from qatkernels.testing.products import activations, grouped_cases
from qatkernels.testing.samples import make, weights

from .random_calls import Drawn
from .runner import Campaign

THREADS = 8
#: How often each thread runs through all calls.
CASES = 5


def calls(seed: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Return calls of every op that has a compiled kernel. Two results come from blocks of the pool."""
    drawn = Drawn(random.Random(seed))
    made: list[tuple[str, tuple[Any, ...]]] = []
    for sample in (
        make(qk.grids.affine(4), (513, 520), noise=True),
        make(qk.grids.seq(2), (33, 64), torch.bfloat16, 16),
    ):
        made += [(op, sample.args(op)) for op in ("fake_quantize", "fake_quantize_backward", "fake_quantize_jvp",
                                                  "fake_quantize_dual", "quantize", "quantization_error",
                                                  "reset_")]  # fmt: skip
        constants = list(sample.grid.constants)
        codes = OPS["quantize"].reference(*sample.args("quantize"))
        made.append(("dequantize", (codes, sample.scale, sample.zero_point, constants, torch.float32)))
    made += [
        ("fake_quantize_dynamic", (weights((9, 300), torch.float32), 8)),
        ("normal", (torch.tensor(seed), 3001, 0)),
    ]
    made += [("pack", (drawn.whole(-4, 3, 30, 77).to(torch.int8), -4, 3))]
    made += [("unpack", (torch.ops.qatkernels.pack(drawn.whole(-4, 3, 30, 77).to(torch.int8), -4, 3), -4, 3, 77))]
    made += [(op, drawn.logits(op)) for op in OPS if op.startswith("cross_entropy")]
    made += [("gram_schmidt", (torch.randn(5, 900), torch.randn(900), torch.randn(5).double()))]
    small = make(qk.grids.lsq(4), (40, 64))
    x = torch.randn(7, 64)
    made += [("quant_linear_dual", (x, x + 1, *small.tangents(), *small.point, False))]
    made += [("quant_linear_backward", (torch.randn(7, 40), x, *small.point))]
    factor, w = torch.tensor(0.5), weights((30, 50), torch.float32)
    made += [(op, (w, w + 1, factor, 0.01)) for op in ("perturb_", "perturb_swap_")]
    made += [("perturbation_norms", (w, w + 1, 0.01))]
    for weight, tokens, act_bits in (
        (drawn.weight(qk.grids.lsq(4), 64, 256), 3, 8),
        (drawn.weight(qk.grids.ternary(), 33, 192), 20, None),
    ):
        grid = [list(weight.grid.constants), weight.grid.code_min, weight.bits]
        tensors = (weight.packed, weight.scale, weight.zero_point)
        made.append(
            (
                "lowbit_linear",
                (activations((tokens, weight.cols), torch.float32), *tensors, None, None, *grid, act_bits),
            )
        )
        g = activations((tokens, weight.shape[0]), torch.float32)
        made.append(("lowbit_linear_transposed", (g, *tensors, None, *grid, weight.cols)))
    case = next(grouped_cases(qk.grids.lsq(3), torch.float32))
    made.append(("lowbit_linear", case.call("lowbit_linear")[0]))
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    xs, gs, ws = torch.randn(9, 6), torch.randn(9, 5), torch.randn(3, 5, 6)
    made += [
        ("grouped_linear", (xs, ws, ends)),
        ("grouped_linear_transposed", (gs, ws, ends)),
        ("grouped_outer", (gs, xs, ends)),
    ]
    return made


def outcome(op: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Return the bits of everything that a call returns or changes."""
    args = tuple(a.clone() if isinstance(a, Tensor) and op.endswith("_") else a for a in args)
    given = as_tuple(getattr(torch.ops.qatkernels, op)(*args))
    found = given or tuple(a for a in args if isinstance(a, Tensor))
    return [t.contiguous().view(-1).view(torch.uint8).clone() if t.numel() else t for t in found]


def run(campaign: Campaign) -> None:
    """Run the only case of this part."""
    campaign.each(["threads"], lambda name: together(campaign))


def together(campaign: Campaign) -> dict[str, Any]:
    """Start the threads, and compare each result with that of a single thread."""
    torch.set_num_threads(1)  # the threads of this test are Python's, not torch's
    torch.manual_seed(campaign.seed)
    todo = calls(campaign.seed)
    served = {op for op in OPS if "cpp" in IMPLS[op]}
    if missing := served - {op for op, _ in todo}:
        raise RuntimeError(f"{min(missing)} is in no thread's calls: add one")
    wanted = [outcome(op, args) for op, args in todo]
    rounds, began = campaign.cases or CASES, time.monotonic()
    start, made, lock = threading.Barrier(THREADS), [0] * THREADS, threading.Lock()
    keep: list[Any] = []  # results that one thread allocates and another one frees

    def work(number: int) -> None:
        order = campaign.draw("threads", number)
        start.wait()
        for turn in range(rounds):
            for i in order.sample(range(len(todo)), len(todo)):
                op, args = todo[i]
                found = outcome(op, args)
                made[number] += 1
                with lock:
                    keep.append(torch.ops.qatkernels.fake_quantize(*todo[0][1]))
                    dropped = keep.pop(order.randrange(len(keep))) if len(keep) > 4 else None
                del dropped
                if any(not torch.equal(a, b) for a, b in zip(found, wanted[i], strict=True)):
                    with lock:
                        campaign.fail("threads", turn, f"{op} has other bits among {THREADS} threads than alone")
            if number == 0:
                qk.empty_cache()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if sum(made) != THREADS * rounds * len(todo):
        campaign.fail(
            "threads", 0, f"{sum(made)} of {THREADS * rounds * len(todo)} calls were made: a thread ended early"
        )
    seconds = round(time.monotonic() - began, 1)
    return {"threads": THREADS, "ops": len(served), "calls": sum(made), "seconds": seconds}
