"""The Hessian of a model's loss over batches of data, as a linear map: it is multiplied with vectors, never stored."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._torch_compat import tree_map
from ..dtensor import local_part
from ..nn import quantized_modules, quantized_weights
from ..nn._gather_model import is_sharded, reshard
from ..nn.quantized import check_weights
from ..nn.replay import RandomState, check_calibrated
from ._hvp import (
    GradientGraph,
    check_engine,
    checked_loss,
    forward_product,
    gradient_of,
    scope_of,
    twice_differentiable,
)
from .checkpoint import blocks, checkpointed
from .sharded import ShardedCopy, check_differentiable_twice, resharded
from .vectors import ShardedVectors, Vectors

ModelLoss = Callable[[Any, Any], Tensor]

#: If two evaluations of a loss have a larger relative difference than this, the loss is random. The order of sums
#: changes a loss far less, dropout far more.
_RANDOM_ABOVE = 1e-5


class SymmetricMap(Protocol):
    """The interface of a symmetric matrix in this package: its size, and products with vectors.

    A matrix whose vectors lie in shares in several processes says how in an attribute ``vectors``, as
    :class:`HessianOperator` of a sharded model does. Each process then gives and gets its elements of vectors.
    """

    n: int
    dtype: torch.dtype
    device: torch.device

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector ``[n]``, as new tensors."""
        ...


class MatrixMap:
    """A symmetric matrix that is stored as a tensor, as a :class:`SymmetricMap`.

    Args:
        matrix: ``[n, n]``, float32 or float64.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.n, self.dtype, self.device = matrix.shape[0], matrix.dtype, matrix.device

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector ``[n]``."""
        return [self.matrix @ v for v in vectors]


class HessianOperator:
    """The Hessian of the mean loss over batches. Rows and columns are the elements of ``params``, flattened in order.

    The model is used in its current mode (``eval()`` turns dropout and noise off) and with its current values. When
    values change, products change with them; after a change through ``.data`` call :meth:`refresh`. Products change
    nothing: buffers, modes and gradients of the model, and torch's generators, are restored.

    All products are with the same matrix, in every mode. In training mode batch norm uses the statistics of each batch,
    and the derivative goes through them. Every evaluation of the loss starts from the model's buffers. Dropout and
    noise of a batch are the same in every product: those of evaluating all batches in order at the time when the
    operator was made.

    Products are computed in ``dtype``. If the model has another dtype (such as bfloat16), a copy of the model in
    ``dtype`` is made, and batches are cast. Quantized weights do not change, because codes are computed in float32
    anyway.

    A model that ``fully_shard`` (FSDP2) has sharded stays so: products are those of
    :func:`qatkernels.nn.gather_model`'s copy to the order of sums, but each layer is gathered when it runs, and no more
    than one layer is whole at a time. Every process holds its elements of each vector: those of its shards of
    ``params``, flattened in order. FSDP2's mixed precision is left out: products are of the master weights in
    ``dtype``. All processes must run the same layers in the same order.

    Args:
        model: the model; wrapped in DistributedDataParallel, sharded by ``fully_shard``, or neither.
        loss_fn: ``loss_fn(model, batch)`` returns the loss, a scalar: the same value at every call.
        batches: the batches for ``loss_fn``; any iterable, read once.
        params: parameters of the model; the quantized weights (:func:`qatkernels.quantized_weights`) if None.
        engine: ``"reverse"`` or ``"forward"``, see :func:`qatkernels.hessian.hvp`.
        dtype: float32 or float64; if None, float64 if a parameter is float64, else float32.
        retain: keep the graph of the gradient of every batch between products. A product then takes a third less time,
            and the graphs take memory. Only for engine ``"reverse"``; if None, True if there is one batch.
        checkpoint: modules whose activations are recomputed instead of kept. True means the outermost elements of the
            model's ModuleLists and Sequentials. Only for engine ``"reverse"``.
        weights: weight of each batch in the mean; equal if None. Give the batch sizes if they differ.
        distributed: average over the processes of torch.distributed, where each process has its own batches. Every
            process must then take part in every product. If None, True if torch.distributed is initialised. Must not
            be False if the model is sharded.

    Attributes:
        n: number of elements of the parameters.
        params: the parameters that are differentiated; those of the copy if there is one. Of a sharded model, this
            process's shards.
        vectors: how vectors lie in the processes; ``vectors.length`` elements of each are in this one.
        dtype: dtype of vectors and products.
        device: device of vectors and products.
        count: products so far.

    Raises:
        ValueError: if an argument cannot be used, naming it, an activation scale of the model is not initialized, or
            the model is sharded otherwise than ``fully_shard`` over all processes does. The loss is checked by the
            first product.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: ModelLoss,
        batches: Iterable[Any],
        params: Sequence[Tensor] | None = None,
        *,
        engine: str = "reverse",
        dtype: torch.dtype | None = None,
        retain: bool | None = None,
        checkpoint: bool | Iterable[nn.Module] = False,
        weights: Sequence[float] | None = None,
        distributed: bool | None = None,
    ) -> None:
        check_engine(engine)
        if engine == "forward" and (retain or checkpoint):
            raise ValueError("retain and checkpoint are for engine 'reverse', the engine 'forward' keeps no graph")
        self.source: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.sharded = is_sharded(self.source)
        if self.sharded:
            shards = resharded(self.source, params or ())
            params = None if params is None else shards
        check_calibrated(self.source)
        self.loss_fn, self.engine = loss_fn, engine
        self._source_params = _parameters(self.source, params)
        if self.sharded:
            check_differentiable_twice(self.source, self._source_params, engine, distributed)
        self.dtype = _product_dtype(self._source_params, dtype)
        self.device = self._source_params[0].device
        self.n = sum(p.numel() for p in self._source_params)
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches is empty, must hold a batch")
        self._checkpoint = checkpoint if isinstance(checkpoint, bool) else list(checkpoint)
        available = dist.is_available() and dist.is_initialized()
        if distributed and not available:
            raise ValueError("distributed is True, but torch.distributed is not initialised")
        self.distributed = available if distributed is None else distributed
        self._weights = self._normalised(weights)
        if self.sharded:
            self._run_alike()
        if engine == "forward":
            retain = False
        self.retain = len(self.batches) == 1 if retain is None else retain
        self.count = 0
        self._graphs: list[GradientGraph | None] = [None] * len(self.batches)
        #: Random state before each batch. It is known once the batch before it has been evaluated.
        self._random: list[RandomState | None] = [self._random_state(), *[None] * len(self.batches)]
        self._checked_randomness = False
        self.refresh()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self.n, self.n

    def refresh(self) -> None:
        """Discard everything that was computed from earlier values of the model."""
        self._graphs = [None] * len(self.batches)
        already: list[nn.Module] = []
        self.vectors = Vectors(self.n)
        if self.sharded:
            copied = ShardedCopy(self.source, self._source_params, self.dtype)
            self.model, self.params, already = copied.model, copied.params, copied.layers
            self.vectors = ShardedVectors(copied.layouts)
        elif all(p.dtype == self.dtype for p in self._source_params):
            self.model, self.params = self.source, self._source_params
        else:
            names = {id(p): name for name, p in self.source.named_parameters()}
            self.model = copy.deepcopy(self.source).to(self.dtype)
            copies = dict(self.model.named_parameters())
            self.params = [copies[names[id(p)]] for p in self._source_params]
        if self._checkpoint is True:
            self._blocks = blocks(self.model)
        else:
            counterparts = dict(zip(self.source.modules(), self.model.modules(), strict=True))
            self._blocks = [counterparts[m] for m in self._checkpoint or ()]
        self._blocks = [block for block in self._blocks if block not in already]
        self._scope = scope_of(self.model)
        self._used_state = self._state()

    def _state(self) -> tuple[Any, ...]:
        """Return versions and modes of the model. If they change, the loss is another function."""
        if self.sharded:
            reshard(self.source)  # a root keeps what it has gathered after a forward
        modules, layers = self.source.modules(), quantized_modules(self.source).values()
        tensors = (*self.source.parameters(), *self.source.buffers())
        return (
            [(id(t), t._version, local_part(t.detach())._version) for t in tensors],
            [module.training for module in modules],
            [(q.noise_std, q.scale_noise_std, q.surrogate) for q in (layer.quantizer for layer in layers)],
        )

    def _random_state(self) -> RandomState:
        return RandomState(self.source.parameters())

    def _normalised(self, weights: Sequence[float] | None) -> list[float]:
        """Return the weights of this process's batches. They sum to 1 over all processes."""
        values = [1.0] * len(self.batches) if weights is None else [float(w) for w in weights]
        if len(values) != len(self.batches) or not all(0 <= w < math.inf for w in values):
            raise ValueError(
                f"weights is {weights}, must hold a finite weight >= 0 for each of {len(self.batches)} batches"
            )
        total = torch.tensor(sum(values), dtype=torch.float64, device=self.device)
        if self.distributed:
            dist.all_reduce(total)
        if total == 0:
            raise ValueError("weights are all 0, one must be positive")
        return [w / float(total) for w in values]

    def _run_alike(self) -> None:
        """Let all processes run the model equally often, since it takes all of them to gather a layer.

        A process with fewer batches than another one runs its last batch again, with the weight 0.
        """
        most = torch.tensor(len(self.batches), device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        missing = int(most) - len(self.batches)
        self.batches += self.batches[-1:] * missing
        self._weights += [0.0] * missing

    def _loss(self, index: int) -> Tensor:
        batch = self.batches[index]
        if self.model is not self.source:
            batch = tree_map(self._cast, batch)
        start = self._random[index]
        assert start is not None, "batches must be evaluated in order"
        with start.replayed(), checkpointed(self._blocks):
            loss = self.loss_fn(self.model, batch)
            if self._random[index + 1] is None:
                self._random[index + 1] = self._random_state()
        # Derivatives of a sharded model are summed over the processes while they are computed.
        return loss * self._weights[index] if self.sharded else loss

    def _cast(self, leaf: Any) -> Any:
        return leaf.to(self.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def _graph(self, index: int) -> GradientGraph:
        graph = self._graphs[index]
        if graph is None:
            graph = GradientGraph(lambda: self._loss(index), self.params, self._scope)
            self._warn_if_random(index, graph.loss)
            if self.retain:
                self._graphs[index] = graph
        return graph

    def _warn_if_random(self, index: int, loss: Tensor) -> None:
        """Evaluate the loss a second time, once per operator, and warn if it differs."""
        if self._checked_randomness:
            return
        self._checked_randomness = True
        with self._scope(), twice_differentiable(), torch.no_grad():
            second = float(self._loss(index))
        if abs(second - float(loss)) > _RANDOM_ABOVE * (abs(second) + abs(float(loss))):
            warnings.warn(
                f"the loss changes from call to call ({float(loss):.6g}, then {second:.6g}) although buffers and "
                "torch's random numbers are the same, so its Hessian is not defined: loss_fn must not draw batches or "
                "use random numbers of its own, nor depend on how often it was called",
                stacklevel=5,
            )

    def _split(self, vector: Tensor) -> list[Tensor]:
        return self.vectors.split(vector, self.params)

    def _batch_products(self, index: int, vectors: Sequence[Tensor]) -> list[list[Tensor]]:
        if self.engine == "forward":
            products = []
            for v in vectors:
                with self._scope():
                    loss, _, product = forward_product(lambda: self._loss(index), self.params, self._split(v))
                self._warn_if_random(index, loss)
                products.append(product)
            return products
        graph = self._graph(index)
        last = len(vectors) - 1
        return [graph.product(self._split(v), keep=self.retain or i < last) for i, v in enumerate(vectors)]

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the Hessian times each vector.

        Args:
            vectors: tensors ``[n]`` of the operator's dtype and device; of a sharded model this process's elements,
                ``[vectors.length]``.

        Raises:
            ValueError: if the loss is not a scalar or does not depend on the parameters, or a vector does not fit.
        """
        for v in vectors:
            if v.shape != (self.vectors.length,) or v.dtype != self.dtype or v.device != self.device:
                raise ValueError(
                    f"the vector is {v.dtype} of shape {tuple(v.shape)} on {v.device}, "
                    f"must be {self.dtype} of shape ({self.vectors.length},) on {self.device}"
                )
        if self._state() != self._used_state:
            self.refresh()
        results = self._mean(lambda index: self._batch_products(index, vectors), len(vectors))
        self.count += len(vectors)
        return results

    def _mean(self, of_batch: Callable[[int], list[list[Tensor]]], count: int) -> list[Tensor]:
        """Return weighted means over batches and processes as flat vectors.

        Args:
            of_batch: from the index of a batch to ``count`` results, each with one tensor per parameter.
            count: number of results.
        """
        results: list[Tensor] = []
        for index, weight in enumerate(self._weights):
            flat = [self.vectors.join(parts, self.dtype) for parts in of_batch(index)]
            if weight != 1 and not self.sharded:
                torch._foreach_mul_(flat, weight)
            if results:
                torch._foreach_add_(results, flat)
            else:
                results = flat
        if self.distributed and not self.sharded:
            for result in results[:count]:
                dist.all_reduce(result)
        return results

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss, ``[n]``; of a sharded model this process's elements of it."""
        if self._state() != self._used_state:
            self.refresh()

        def of_batch(index: int) -> list[list[Tensor]]:
            if self.retain:
                return [self._graph(index).gradient]
            with self._scope(), torch.enable_grad():
                loss = checked_loss(self._loss(index), self.params)
            with self._scope():
                return [gradient_of(loss, self.params, create_graph=False)]

        return self._mean(of_batch, 1)[0]

    def matvec(self, v: Any) -> Any:
        """Return the Hessian times a vector ``[n]``, or ``[n, 1]`` as scipy uses. A NumPy array gives a NumPy array."""
        if isinstance(v, np.ndarray):
            product = self.products([self._from_numpy(v.reshape(-1))])[0]
            return product.cpu().numpy().astype(v.dtype if v.dtype.kind == "f" else np.float64).reshape(v.shape)
        return self.products([v.reshape(-1)])[0].reshape(v.shape)

    def matmat(self, v: Any) -> Any:
        """Return the Hessian times a matrix ``[n, k]``. One pass over the batches serves all columns."""
        if isinstance(v, np.ndarray):
            columns = [self._from_numpy(np.ascontiguousarray(v[:, i])) for i in range(v.shape[1])]
            product = torch.stack(self.products(columns), 1)
            return product.cpu().numpy().astype(v.dtype if v.dtype.kind == "f" else np.float64)
        return torch.stack(self.products([column.contiguous() for column in v.unbind(1)]), 1)

    def _from_numpy(self, v: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(v).to(self.device, self.dtype)

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.linalg.LinearOperator``, for ``eigsh``, ``cg`` and others; needs scipy.

        Raises:
            ValueError: if the model is sharded.
        """
        if self.sharded:
            raise ValueError(
                "the model is sharded, must be whole for scipy, whose vectors are: give the operator "
                "qatkernels.nn.gather_model(model), or call qatkernels.hessian's own functions"
            )
        from scipy.sparse.linalg import LinearOperator

        dtype = np.float64 if self.dtype == torch.float64 else np.float32
        return LinearOperator(
            self.shape, matvec=self.matvec, rmatvec=self.matvec, matmat=self.matmat, rmatmat=self.matmat, dtype=dtype
        )


def _parameters(model: nn.Module, params: Sequence[Tensor] | None) -> list[Tensor]:
    if params is None:
        check_weights(quantized_modules(model), "params must name what it is computed from, or leave it out")
        weights: list[Tensor] = list(quantized_weights(model))
        if not weights:
            raise ValueError(
                "the model has no quantized layer: call quantize_model(), or give params "
                "(such as list(model.parameters()))"
            )
        return weights
    params = list(params)
    if not params or not all(isinstance(p, Tensor) for p in params):
        raise ValueError("params must be one or more parameters of the model")
    in_model = {id(p) for p in model.parameters()}
    if others := [i for i, p in enumerate(params) if id(p) not in in_model]:
        raise ValueError(f"params{others[:5]} are not parameters of the model")
    if len({id(p) for p in params}) != len(params):
        raise ValueError("params holds a parameter twice")
    if len({p.device for p in params}) > 1:
        raise ValueError(f"params are on {sorted({str(p.device) for p in params})}, must be on one device")
    return params


def _product_dtype(params: Sequence[Tensor], dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype is {dtype}, must be torch.float32 or torch.float64: 16 bits are not enough for second derivatives"
        )
    return dtype
