"""How the vectors of a matrix lie in the processes: whole in each of them, or each process with a share of them.

Krylov methods need little of a vector that lies in shares: sums over the processes of what each computed from its own
share (products and norms), and random numbers that are those of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .operator import SymmetricMap
    from .sharded import Layout

#: From a count to as many random numbers, the next ones of a generator.
Draw = Callable[[int], Tensor]

#: Numbers that are drawn at once. torch fills normal numbers in groups of 16 and draws the last 16 once more if the
#: count is no multiple. So pieces of a multiple of 16 hold the numbers of one long draw, if the last has at least 16.
_GROUP = 16
_PIECE = 2**20


class Vectors:
    """Vectors that are whole in this process.

    Args:
        n: number of elements.

    Attributes:
        n: number of elements.
        length: number of those elements that this process holds.
    """

    def __init__(self, n: int) -> None:
        self.n = self.length = n

    def total(self, sums: Tensor) -> Tensor:
        """Return sums over whole vectors, in place, from sums over the elements of this process."""
        return sums

    def norm(self, v: Tensor) -> float:
        """Return the l2 norm of a vector, in float64."""
        return float(torch.linalg.vector_norm(v, dtype=torch.float64))

    def drawn(self, draw: Draw) -> Tensor:
        """Return a vector of random numbers, on the CPU."""
        return draw(self.n)

    def split(self, v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor like each parameter from a vector."""
        parts = v.split([p.numel() for p in like])
        # Scales stay float32 in a float64 model.
        return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, like, strict=True)]

    def join(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return a vector from one tensor like each parameter."""
        return torch.cat([t.reshape(-1).to(dtype) for t in tensors])


class ShardedVectors(Vectors):
    """Vectors of which every process holds the elements of its shards, in the order of the parameters.

    Where several processes hold the same shard, each has a part of it. So every element is in one process.

    Args:
        layouts: how each parameter lies in the processes.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = list(layouts)
        self._lengths = [layout.share_length for layout in self.layouts]
        self.n, self.length = sum(layout.shape.numel() for layout in self.layouts), sum(self._lengths)

    def total(self, sums: Tensor) -> Tensor:
        """Return sums over whole vectors, in place, from sums over the elements of this process."""
        device = self.layouts[0].device
        there = sums.to(device)  # the basis may be on the CPU, where the group cannot reduce
        dist.all_reduce(there)
        return sums if there is sums else sums.copy_(there)

    def norm(self, v: Tensor) -> float:
        """Return the l2 norm of a vector, in float64."""
        square = torch.linalg.vector_norm(v, dtype=torch.float64).square()
        return math.sqrt(float(self.total(square)))

    def drawn(self, draw: Draw) -> Tensor:
        """Return this process's elements of a vector of random numbers, on the CPU: the numbers of one process.

        Every process draws all numbers, as much as one parameter at a time, and keeps its own.
        """
        numbers = _Stream(self.n, draw)
        parts = [layout.share(layout.cut(numbers.take(layout.shape.numel()).view(layout.shape))).clone()
                 for layout in self.layouts]  # fmt: skip
        return torch.cat(parts)

    def split(self, v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor like each shard from this process's elements of a vector. All processes must call this."""
        parts = zip(self.layouts, v.split(self._lengths), like, strict=True)
        return [layout.spread(part).view(p.shape).to(p.dtype) for layout, part, p in parts]

    def join(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return this process's elements of a vector from one tensor like each shard."""
        return torch.cat([layout.share(t).to(dtype) for layout, t in zip(self.layouts, tensors, strict=True)])


class _Stream:
    """The numbers of one long draw, in pieces.

    Args:
        left: how many there are.
        draw: draws the next ones.
    """

    def __init__(self, left: int, draw: Draw) -> None:
        self.left, self.draw = left, draw
        self.drawn = torch.empty(0)

    def take(self, count: int) -> Tensor:
        """Return the next numbers."""
        parts = []
        while count > 0:
            if not self.drawn.numel():
                size = self.left if self.left < _PIECE + _GROUP else _PIECE
                self.drawn, self.left = self.draw(size), self.left - size
            parts.append(self.drawn[:count])
            self.drawn = self.drawn[count:]
            count -= parts[-1].numel()
        return torch.cat(parts) if parts else torch.empty(0)


def vectors_of(op: SymmetricMap) -> Vectors:
    """Return how the vectors of a matrix lie in the processes: whole, unless the matrix says otherwise."""
    found: Vectors | None = getattr(op, "vectors", None)
    return Vectors(op.n) if found is None else found
