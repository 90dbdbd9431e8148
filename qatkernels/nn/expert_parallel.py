"""Expert parallelism: each process has some of the experts of a mixture.

    from qatkernels.nn.expert_parallel import ExpertParallel

    torch.distributed.tensor.parallel.parallelize_module(model, mesh, {"layers.*.mlp.experts": ExpertParallel()})

This module is not imported by `qatkernels.nn`, because torch.distributed.tensor takes most of a second to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ParallelStyle

from ..dtensor import local_part
from ..ops import PackedWeight
from .experts import calls_layers
from .grouped_quant_linear import expert_of_tokens
from .tensor_parallel import EXPERTS, GROUPED, shard, shard_parameters

#: Inputs of a module of experts, and what turns its output for these into its output for all tokens of the process.
Dispatched = tuple[tuple[Any, ...], Callable[[Tensor], Tensor]]


class ExpertParallel(ParallelStyle):
    """Give each process of a mesh some of the experts, with their scales, biases or codes, and the tokens of these.

    It takes a module of experts: stacked layers (:class:`GroupedQuantLinear`, :class:`GroupedPackedLinear`), one of
    them or a module that calls several, with ``forward(x, offsets)``; or the experts of a model of transformers, with
    ``forward(hidden_states, top_k_index, top_k_weights)``. Inputs are passed by position. The router is not in it.

    Losses are those of one process to the order of sums, and codes the same bit for bit. The gradients of an expert,
    and of learned scales of inputs and outputs, are sums over the tokens of all processes.

    Args:
        input_layouts: ``Replicate()``: every process has all tokens, and gets the outputs of all. An all-reduce adds
            the outputs of the processes; nothing waits for the device. ``Shard(0)``: each process has tokens of its
            own, and gets their outputs. An all-to-all sends tokens to their experts and another one brings the outputs
            back; the host waits for the numbers of tokens. None means ``Replicate()``.

    Raises:
        ValueError: if ``input_layouts`` is another one; by ``parallelize_module``, if processes would split an expert,
            the module has parameters that belong to no stack of experts, or its stacks are not quantized.
    """

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = Replicate() if input_layouts is None else input_layouts
        if self.input_layouts not in (Replicate(), Shard(0)):
            raise ValueError(f"input_layouts is {input_layouts}, must be Replicate() or Shard(0)")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        route = _Route(_count(module, device_mesh), device_mesh, exchanged=self.input_layouts == Shard(0))
        after: Any = route.after  # torch declares that it returns nothing
        return distribute_module(module, device_mesh, _partition, route.before, after)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(input_layouts={self.input_layouts})"


def _count(module: nn.Module, mesh: DeviceMesh) -> int:
    """Return the number of experts of a module.

    Raises:
        ValueError: if it cannot be split.
    """
    layers = [m for m in module.modules() if isinstance(m, GROUPED)]
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no stack of experts of this library, must be a GroupedQuantLinear or a "
            "module that calls some: call quantize_model first, or give the name of the module of experts"
        )
    counts = {layer.weight.shape[0] for layer in layers}
    if len(counts) != 1 or (count := counts.pop()) % mesh.size():
        raise ValueError(
            f"{type(module).__name__} has {' and '.join(map(str, counts)) or count} experts, must have the same number "
            f"in each of {mesh.size()} processes"
        )
    known = {id(p) for m in layers for p in m.parameters()}
    known |= {id(stack) for m in module.modules() if calls_layers(m) for stack in m._parameters.values()}
    strange = [name for name, p in module.named_parameters() if id(p) not in known]
    if strange:
        raise ValueError(
            f"{type(module).__name__} has parameters that belong to no stack of experts ({', '.join(strange)}), whose "
            "gradients would be those of some of the tokens: give ExpertParallel to a module that has none"
        )
    return count


def _partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard what a module has along the experts; torch calls this for each module and replicates what is left."""
    if isinstance(module, (*GROUPED, PackedWeight)):
        shard(module, mesh, EXPERTS)
    elif calls_layers(module):
        shard_parameters(module, mesh, dict.fromkeys(module._parameters, 0))


class _Route:
    """The way of tokens to the experts of one module and back.

    Args:
        experts: number of experts, in all processes.
        mesh: the processes.
        exchanged: whether each process has tokens of its own.
    """

    def __init__(self, experts: int, mesh: DeviceMesh, *, exchanged: bool) -> None:
        self.experts, self.here = experts, experts // mesh.size()
        self.first = mesh.get_local_rank() * self.here
        self.mesh, self.exchanged = mesh, exchanged
        self._undo: Callable[[Tensor], Tensor] | None = None

    def before(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        """Return the inputs with which a module computes its experts; a hook before its forward."""
        if len(inputs) not in (2, 3):
            raise ValueError(
                f"{type(module).__name__} was called with {len(inputs)} positional arguments, must be called with 2 "
                "(x, offsets) or 3 (hidden_states, top_k_index, top_k_weights)"
            )
        tensors = map(local_part, inputs)
        by_expert = len(inputs) == 2
        if self.exchanged:
            found = self._exchange(*tensors) if by_expert else self._exchange_chosen(*tensors)
        else:
            found = self._select(*tensors) if by_expert else self._select_chosen(*tensors)
        inputs, self._undo = found
        return inputs

    def after(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        """Return the output for the tokens of this process; a hook after the forward."""
        undo, self._undo = self._undo, None
        assert undo is not None
        return undo(output)

    def _shared(self, x: Tensor) -> Tensor:
        """Return a tensor that is the same in every process; its gradient is the sum over the processes."""
        same = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return same.to_local(grad_placements=[Partial()])

    def _sum(self, y: Tensor) -> Tensor:
        """Return the sum over the processes."""
        return DTensor.from_local(y, self.mesh, [Partial()], run_check=False).redistribute(
            placements=[Replicate()]
        ).to_local()  # fmt: skip

    def _select(self, x: Tensor, offsets: Tensor) -> Dispatched:
        """Move the tokens of the experts that are here to the front; those behind them are unassigned."""
        ends = F.pad(offsets, (1, 0))
        start, ours = ends[self.first], ends[self.first + 1 : self.first + self.here + 1]
        ours = (ours - start).int()
        place = torch.arange(len(x), device=x.device)
        order = (place + start) % max(len(x), 1)

        def undo(y: Tensor) -> Tensor:
            y = y.where((place < ours[-1])[:, None], 0)
            return self._sum(torch.empty_like(y).index_copy(0, order, y))

        return (self._shared(x).index_select(0, order), ours), undo

    def _select_chosen(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Dispatched:
        """Number the experts that are here from 0, and give all others the number after the last."""
        ours = (chosen >= self.first) & (chosen < self.first + self.here)
        number = torch.where(ours, chosen - self.first, self.here)
        return (self._shared(x), number, self._shared(weights).masked_fill(~ours, 0)), self._sum

    def _exchange(self, x: Tensor, offsets: Tensor) -> Dispatched:
        """Send each token to the process that has its expert."""
        group = self.mesh.get_group()
        count = offsets.diff(prepend=offsets.new_zeros(1)).long()
        received = torch.empty_like(count)
        dist.all_to_all_single(received, count, group=group)
        received = received.view(-1, self.here)  # of each process, for each expert
        sent_sizes, sizes = torch.stack([count.view(-1, self.here).sum(1), received.sum(1)]).tolist()
        sent = x[: sum(sent_sizes)]
        rows = _Exchange.apply(sent, sizes, sent_sizes, group)
        expert = torch.arange(self.here, device=x.device).repeat(len(received)).repeat_interleave(received.flatten())
        order = expert.argsort(stable=True)

        def undo(y: Tensor) -> Tensor:
            y = torch.empty_like(y).index_copy(0, order, y)
            back = _Exchange.apply(y, sent_sizes, sizes, group)
            return F.pad(back, (0, 0, 0, len(x) - len(sent)))

        return (rows.index_select(0, order), received.sum(0).cumsum(0).int()), undo

    def _exchange_chosen(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Dispatched:
        """Send each token to the processes that have its experts; the sender weights and adds what comes back."""
        expert, order = chosen.reshape(-1).sort(stable=True)
        each = torch.arange(self.experts, device=x.device, dtype=expert.dtype)
        offsets = torch.searchsorted(expert, each, right=True).int()
        (rows, ours), back = self._exchange(x.index_select(0, order // chosen.shape[-1]), offsets)
        number = expert_of_tokens(ours, len(rows))[:, None]

        def undo(y: Tensor) -> Tensor:
            y = back(y) * weights.reshape(-1)[order, None]
            by_token = torch.empty_like(y).index_copy(0, order, y).view(*chosen.shape, -1)
            return by_token.sum(dim=1).to(x.dtype)

        return (rows, number, rows.new_ones(len(rows), 1)), undo


class _Exchange(torch.autograd.Function):
    """Rows to and from each process; the gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, sizes: list[int], sent_sizes: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = (sent_sizes, sizes), group
        received = sent.new_empty(sum(sizes), sent.shape[1])
        dist.all_to_all_single(received, sent.contiguous(), sizes, sent_sizes, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Exchange.apply(grad, *ctx.sizes, ctx.group), None, None, None
