"""Bytes that two processes exchange in a training step, and the memory of each, for each way to share the work.

A small Llama, quantized to 2 bits with a scale for each row, is trained by two processes over gloo on a CPU. A dispatch
mode sees every collective of a step. Its bytes are those of the whole tensor that is gathered or reduced: of P
processes each sends (P - 1) / P of them, and twice that for an all-reduce. The minimum is every sharded parameter once,
in the dtype in which it travels, and every gradient once; with tensor parallel it is the activations that two
all-reduces in the forward and two in the backward of each block need.

Memory is the most that a step takes, beyond what the process took before it made the model: parameters, gradients,
the moments of Adam, activations.
"""

from __future__ import annotations

import collections
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.memory import in_use, peak
from qatkernels import QuantConfig, quantize_model
from qatkernels.dtensor import local_part
from qatkernels.nn import gather_codes, quantized_weights, shard_scales
from qatkernels.nn.activation import scales_of

from .results import Case, Figures, Results
from .runner import Session, Study

PROCESSES, BITS = 2, 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """A size of the study: the Llama, the windows of each process in a step, and which of ``WAYS``."""

    width: int = 512
    hidden: int = 1408
    depth: int = 8
    heads: int = 8
    vocab: int = 2048
    windows: int = 2
    context: int = 128
    ways: tuple[str, ...] = ()


class Traffic(TorchDispatchMode):
    """Counts the collectives within its context.

    Attributes:
        calls: how many there were, by kind.
        bytes: the bytes of the tensors that they gathered or reduced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op; count it if it is a collective. DTensor goes first, and calls the collectives."""
        if any(issubclass(t, _dtensor()) for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if kind := collective(func):
            self.calls[kind] += 1
            self.bytes[kind] += max(_bytes(value) for value in (*args, out))
        return out


def _dtensor() -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor


#: What the names of ops of torch.distributed have in them, and the kind of collective that it means.
_KINDS = {
    "reduce_scatter": "reduce-scatter", "allgather": "all-gather", "all_gather": "all-gather",
    "allreduce": "all-reduce", "all_reduce": "all-reduce", "broadcast": "broadcast", "alltoall": "all-to-all",
    "all_to_all": "all-to-all",
}  # fmt: skip


def collective(func: Any) -> str | None:
    """Return the kind of collective that an op is, or None if it is no collective."""
    namespace, name = getattr(func, "namespace", ""), str(func)
    if namespace not in ("c10d", "_c10d_functional"):
        return None
    return next((kind for part, kind in _KINDS.items() if part in name), None)


def _bytes(value: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves(value)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class Way:
    """A way to share the work.

    Attributes:
        title: what the table calls it.
        wrap: prepares a model for it, and returns what to call.
        travels: bytes of a parameter in all-gathers, but of a scale; None if parameters do not travel.
        codes: whether quantized weights travel as codes.
        quantized: whether the model is quantized.
        replicated: whether the processes see the same windows.
    """

    title: str
    wrap: Callable[[nn.Module], nn.Module]
    travels: int | None = None
    codes: bool = False
    quantized: bool = True
    replicated: bool = False


def _ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp(model: nn.Module, dtype: torch.dtype | None = None, scales: bool = False, codes: bool = False) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mp_policy": policy}
    if scales:
        options["ignored_params"] = shard_scales(model)
    for block in model.model.layers:  # type: ignore[union-attr]
        fully_shard(block, **options)
    fully_shard(model, **options)
    if codes:
        gather_codes(model)
    return model


def _tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from qatkernels.nn.tensor_parallel import ColwiseParallel, RowwiseParallel

    mesh = init_device_mesh("cpu", (PROCESSES,))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    for block in model.model.layers:  # type: ignore[union-attr]
        plan = {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
        parallelize_module(block, mesh, plan)  # type: ignore[arg-type]
    return model


WAYS = {
    "ddp": Way("DDP", _ddp),
    "fsdp": Way("FSDP2, float32", _fsdp, 4),
    "fsdp-plain": Way("FSDP2, bfloat16, model not quantized", partial(_fsdp, dtype=torch.bfloat16), 2, quantized=False),
    "fsdp-scales": Way("FSDP2, bfloat16, `shard_scales`", partial(_fsdp, dtype=torch.bfloat16, scales=True), 2),
    "fsdp-codes": Way(
        "FSDP2, bfloat16, `shard_scales`, `gather_codes`",
        partial(_fsdp, dtype=torch.bfloat16, scales=True, codes=True),
        2,
        codes=True,
    ),
    "tensor-parallel": Way("tensor parallel, float32", _tensor_parallel, replicated=True),
}
SIZES = {
    "cpu": Size(ways=tuple(WAYS)),
    "smoke": Size(32, 64, 2, 2, 64, 1, 8, ("ddp", "fsdp-scales")),
}


def build(size: Size, quantized: bool) -> nn.Module:
    """Return the model, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=size.hidden, num_hidden_layers=size.depth,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=size.context,
        use_cache=False,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return quantize_model(model, QuantConfig(BITS)) if quantized else model


def minimum(size: Size, way: Way, model: nn.Module) -> dict[str, int]:
    """Return the bytes that a step must exchange, by what they are.

    Args:
        size: of the study.
        way: how the work is shared.
        model: before it is wrapped.
    """
    if way.replicated:
        return {"activations": 4 * size.depth * size.windows * size.context * size.width * 4}
    total, scales = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in scales_of(model))
    gradients = {"gradients": 4 * total}
    if way.travels is None:
        return gradients
    packed = sum(w.numel() for w in quantized_weights(model)) if way.codes else 0
    parameters = way.travels * (total - scales - packed) + packed * BITS // 8 + 4 * scales
    return {"parameters": parameters, **gradients}


def measure(size: Size, way: Way, rank: int) -> Figures:
    """Train a few steps as one of the processes of the default group; return what a step exchanges and takes."""
    _begin(SIZES["smoke"], way, rank)[1]()  # what is imported and started with the first step
    before = in_use(CPU)
    model, step = _begin(size, way, rank)
    for _ in range(2):  # the first makes the moments of Adam, and before the second DDP orders its buckets
        step()
    with Traffic() as traffic:
        step()
    return {
        "collectives": {kind: {"calls": traffic.calls[kind], "bytes": traffic.bytes[kind]} for kind in traffic.calls},
        "minimum": minimum(size, way, build(size, way.quantized)),
        "parameter_bytes": sum(local_part(p).nbytes for p in model.parameters()),
        "peak_bytes": peak(step, CPU, since=before),
    }


def _begin(size: Size, way: Way, rank: int) -> tuple[nn.Module, Callable[[], None]]:
    """Return the model of a process, and what takes a step."""
    model = build(size, way.quantized)
    called = way.wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    draw = torch.Generator().manual_seed(0 if way.replicated else rank)
    tokens = torch.randint(size.vocab, (size.windows, size.context), generator=draw)

    def step() -> None:
        optimizer.zero_grad()
        called(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return model, step


def settings(session: Session) -> dict[str, Any]:
    """Return the size of the model, and of a step."""
    shape = {name: value for name, value in asdict(session.size).items() if name != "ways"}
    return {"processes": PROCESSES, "bits": BITS, **shape}


def cases(session: Session) -> Iterator[Case]:
    """Yield the ways to share the work."""
    for name in session.size.ways:
        yield Case(name, 0, {}, partial(run, session.size, name))


def run(size: Size, name: str) -> Figures:
    """Start the processes, and return what the first one counted and the memory of each."""
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (folder, size, name), nprocs=PROCESSES)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    peaks = [figures.pop("peak_bytes") for figures in found]
    return {**found[0], "peak_bytes": peaks}


def _process(rank: int, folder: str, size: Size, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    found = measure(size, WAYS[name], rank)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    # Skip the interpreter's shutdown: a gloo thread that takes the GIL during it would abort the process.
    os._exit(0)


_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")


def report(results: Results, folder: Path) -> str:
    """Return the table."""
    lines = [
        f"| | {', '.join(_COLLECTIVES[:1])}, MB (calls) | " + " | ".join(_COLLECTIVES[1:])
        + " | all over the minimum | memory of a process, MB |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in results.rows:
        found: Mapping[str, Any] = row["figures"]
        cells = [_cell(found["collectives"].get(kind)) for kind in _COLLECTIVES]
        moved = sum(each["bytes"] for each in found["collectives"].values())
        ratio = moved / sum(found["minimum"].values())
        peaks = [p for p in found["peak_bytes"] if p is not None]
        memory = f"{max(peaks) * 1e-6:.0f}" if peaks else "-"
        lines.append(f"| {WAYS[row['case']].title} | {' | '.join(cells)} | {ratio:.2f} | {memory} |")
    return "\n".join(lines)


def _cell(found: Mapping[str, int] | None) -> str:
    return "-" if found is None else f"{found['bytes'] * 1e-6:.1f} ({found['calls']})"


STUDY = Study("traffic", SIZES, cases, report, settings)
