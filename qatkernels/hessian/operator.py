"""The Hessian of a model's loss over its data, as a symmetric linear map that only ever multiplies."""

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
from ..nn import quantized_modules, quantized_weights
from ..nn.quantized import check_weights
from ..nn.replay import RandomState, check_calibrated
from ._hvp import (
    GradientGraph,
    check_engine,
    check_whole,
    checked_loss,
    forward_product,
    gradient_of,
    scope_of,
    twice_differentiable,
)
from .checkpoint import blocks, checkpointed

ModelLoss = Callable[[Any, Any], Tensor]

#: Relative difference of two evaluations of a loss above which it is called random; far above what the order of a sum
#: does, far below what dropout does.
_SAME = 1e-5


class SymmetricMap(Protocol):
    """What the methods of this package need of a symmetric matrix: its size, and products with vectors."""

    n: int
    dtype: torch.dtype
    device: torch.device

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector ``[n]``, as new tensors."""
        ...


class MatrixMap:
    """A symmetric matrix that is there, as a :class:`SymmetricMap`.

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
    """The Hessian of a mean loss over batches, with respect to parameters in their order, each flattened.

    The model is read as it is: in its mode (``eval()`` turns dropout and noise off) and with its present values, also
    when they change later (by way of ``.data`` only after :meth:`refresh`). Nothing of it is changed: buffers, modes
    and gradients are after every product as before, and so are torch's generators.

    All products are of one function, whatever the mode. In training mode batch norm normalizes by the statistics of
    each batch, through which the derivative goes; buffers have the model's values whenever the loss is evaluated;
    and the dropout and noise of each batch are one draw, the one that evaluating the batches in their order would have
    made when the operator was made.

    Products are computed in ``dtype``. Where the model has another one (bfloat16, say) a copy of it in ``dtype`` is
    made, batches are cast along, and the quantized weights stay what they are: codes are taken in float32 anyway.

    Args:
        model: the model; wrapped in DistributedDataParallel or not.
        loss_fn: ``loss_fn(model, batch)`` gives the loss, a scalar, the same at every call.
        batches: what ``loss_fn`` takes, one after the other; any iterable, read once.
        params: parameters of the model; those that :func:`qatkernels.quantized_weights` lists if None.
        engine: ``"reverse"`` or ``"forward"``, see :func:`qatkernels.hessian.hvp`.
        dtype: float32 or float64; None for float32, or float64 if a parameter is.
        retain: keep the gradient's graph of every batch between products, which makes a product a third cheaper and
            takes the memory of the graphs. Only for engine ``"reverse"``; None for "if there is one batch".
        checkpoint: modules whose insides are run again instead of kept, or True for the outermost elements of the
            model's ModuleLists and Sequentials. Only for engine ``"reverse"``.
        weights: weight of each batch in the mean; equal if None. Give the batch sizes if they differ.
        distributed: average over the processes of torch.distributed, each of which has batches of its own; None for "if
            it is initialised". Every process must then take part in every product.

    Attributes:
        n: number of parameters.
        params: what is differentiated, of the copy where there is one.
        dtype: dtype of vectors and products.
        device: device of vectors and products.
        count: products so far.

    Raises:
        ValueError: if an argument cannot be used, naming it; the model has an activation scale that is not initialized.
            The loss is checked by the first product.
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
        check_whole(self.source.parameters())
        check_calibrated(self.source)
        self.loss_fn, self.engine = loss_fn, engine
        self._given = _parameters(self.source, params)
        self.dtype = _product_dtype(self._given, dtype)
        self.device = self._given[0].device
        self.n = sum(p.numel() for p in self._given)
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches is empty, must hold a batch")
        if engine == "forward":
            retain = False
        self.retain = len(self.batches) == 1 if retain is None else retain
        self._checkpoint = checkpoint if isinstance(checkpoint, bool) else list(checkpoint)
        available = dist.is_available() and dist.is_initialized()
        if distributed and not available:
            raise ValueError("distributed is True, but torch.distributed is not initialised")
        self.distributed = available if distributed is None else distributed
        self._weights = self._normalised(weights)
        self.count = 0
        self._graphs: list[GradientGraph | None] = [None] * len(self.batches)
        #: Where each batch draws from; that of a later batch is known when the one before it has been evaluated.
        self._random: list[RandomState | None] = [self._random_state(), *[None] * len(self.batches)]
        self._tried = False
        self.refresh()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self.n, self.n

    def refresh(self) -> None:
        """Forget what was computed from earlier values of the model."""
        self._graphs = [None] * len(self.batches)
        others = [p for p in self._given if p.dtype != self.dtype]
        if not others:
            self.model, self.params = self.source, self._given
        else:
            names = {id(p): name for name, p in self.source.named_parameters()}
            self.model = copy.deepcopy(self.source).to(self.dtype)
            copies = dict(self.model.named_parameters())
            self.params = [copies[names[id(p)]] for p in self._given]
        if self._checkpoint is True:
            self._blocks = blocks(self.model)
        else:
            ours = dict(zip(self.source.modules(), self.model.modules(), strict=True))
            self._blocks = [ours[m] for m in self._checkpoint or ()]
        self._scope = scope_of(self.model)
        self._stamp = self._state()

    def _state(self) -> tuple[Any, ...]:
        """Return what tells whether the loss is another function than before."""
        modules, layers = self.source.modules(), quantized_modules(self.source).values()
        return (
            [(id(t), t._version) for t in (*self.source.parameters(), *self.source.buffers())],
            [module.training for module in modules],
            [(layer.quantizer.noise_std, layer.quantizer.scale_noise_std) for layer in layers],
        )

    def _random_state(self) -> RandomState:
        return RandomState(self.source.parameters())

    def _normalised(self, weights: Sequence[float] | None) -> list[float]:
        given = [1.0] * len(self.batches) if weights is None else [float(w) for w in weights]
        if len(given) != len(self.batches) or not all(0 <= w < math.inf for w in given):
            raise ValueError(
                f"weights is {weights}, must hold a finite weight >= 0 for each of {len(self.batches)} batches"
            )
        total = torch.tensor(sum(given), dtype=torch.float64, device=self.device)
        if self.distributed:
            dist.all_reduce(total)
        if total == 0:
            raise ValueError("weights are all 0, one must be positive")
        return [w / float(total) for w in given]

    def _loss(self, index: int) -> Tensor:
        batch = self.batches[index]
        if self.model is not self.source:
            batch = tree_map(self._cast, batch)
        start = self._random[index]
        assert start is not None, "batches are evaluated in their order"
        with start.replayed(), checkpointed(self._blocks):
            loss = self.loss_fn(self.model, batch)
            if self._random[index + 1] is None:
                self._random[index + 1] = self._random_state()
        return loss

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
        if self._tried:
            return
        self._tried = True
        with self._scope(), twice_differentiable(), torch.no_grad():
            again = float(self._loss(index))
        if abs(again - float(loss)) > _SAME * (abs(again) + abs(float(loss))):
            warnings.warn(
                f"the loss changes from call to call ({float(loss):.6g}, then {again:.6g}) although buffers and "
                "torch's random numbers are the same, so it has no one Hessian: loss_fn must not draw batches or "
                "random numbers of its own, nor count its calls",
                stacklevel=5,
            )

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([p.numel() for p in self.params])
        # Scales are float32 in a float64 model, too.
        return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, self.params, strict=True)]

    def _batch_products(self, index: int, vectors: Sequence[Tensor]) -> list[list[Tensor]]:
        if self.engine == "forward":
            found = []
            for v in vectors:
                with self._scope():
                    loss, _, product = forward_product(lambda: self._loss(index), self.params, self._split(v))
                self._warn_if_random(index, loss)
                found.append(product)
            return found
        graph = self._graph(index)
        last = len(vectors) - 1
        return [graph.product(self._split(v), keep=self.retain or i < last) for i, v in enumerate(vectors)]

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the Hessian times each vector.

        Args:
            vectors: tensors ``[n]`` of the operator's dtype and device.

        Raises:
            ValueError: if the loss is no scalar or does not depend on the parameters, or a vector does not fit.
        """
        for v in vectors:
            if v.shape != (self.n,) or v.dtype != self.dtype or v.device != self.device:
                raise ValueError(
                    f"the vector is {v.dtype} of shape {tuple(v.shape)} on {v.device}, "
                    f"must be {self.dtype} of shape ({self.n},) on {self.device}"
                )
        if self._state() != self._stamp:
            self.refresh()
        results = self._mean(lambda index: self._batch_products(index, vectors), len(vectors))
        self.count += len(vectors)
        return results

    def _mean(self, of_batch: Callable[[int], list[list[Tensor]]], count: int) -> list[Tensor]:
        """Return weighted means over batches and processes, each flattened."""
        results: list[Tensor] = []
        for index, weight in enumerate(self._weights):
            flat = [torch.cat([t.reshape(-1).to(self.dtype) for t in parts]) for parts in of_batch(index)]
            if weight != 1:
                torch._foreach_mul_(flat, weight)
            if results:
                torch._foreach_add_(results, flat)
            else:
                results = flat
        if self.distributed:
            for result in results[:count]:
                dist.all_reduce(result)
        return results

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss, ``[n]``."""
        if self._state() != self._stamp:
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
        """Return the Hessian times a vector ``[n]``, or ``[n, 1]`` as scipy has it; NumPy in, NumPy out."""
        if isinstance(v, np.ndarray):
            product = self.products([self._from_numpy(v.reshape(-1))])[0]
            return product.cpu().numpy().astype(v.dtype if v.dtype.kind == "f" else np.float64).reshape(v.shape)
        return self.products([v.reshape(-1)])[0].reshape(v.shape)

    def matmat(self, v: Any) -> Any:
        """Return the Hessian times a matrix ``[n, k]``, one pass over the batches for all columns."""
        if isinstance(v, np.ndarray):
            columns = [self._from_numpy(np.ascontiguousarray(v[:, i])) for i in range(v.shape[1])]
            product = torch.stack(self.products(columns), 1)
            return product.cpu().numpy().astype(v.dtype if v.dtype.kind == "f" else np.float64)
        return torch.stack(self.products([column.contiguous() for column in v.unbind(1)]), 1)

    def _from_numpy(self, v: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(v).to(self.device, self.dtype)

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.linalg.LinearOperator``, for ``eigsh``, ``cg`` and the like; needs scipy."""
        from scipy.sparse.linalg import LinearOperator

        dtype = np.float64 if self.dtype == torch.float64 else np.float32
        return LinearOperator(
            self.shape, matvec=self.matvec, rmatvec=self.matvec, matmat=self.matmat, rmatmat=self.matmat, dtype=dtype
        )


def _parameters(model: nn.Module, params: Sequence[Tensor] | None) -> list[Tensor]:
    if params is None:
        check_weights(quantized_modules(model), "params must name what it is computed from, or leave it out")
        found: list[Tensor] = list(quantized_weights(model))
        if not found:
            raise ValueError(
                "the model has no quantized layer: quantize_model() makes some, or give params "
                "(list(model.parameters()), say)"
            )
        return found
    given = list(params)
    if not given or not all(isinstance(p, Tensor) for p in given):
        raise ValueError("params must be one or more parameters of the model")
    own = {id(p) for p in model.parameters()}
    if strangers := [i for i, p in enumerate(given) if id(p) not in own]:
        raise ValueError(f"params{strangers[:5]} are no parameters of the model")
    if len({id(p) for p in given}) != len(given):
        raise ValueError("params holds a parameter twice")
    if len({p.device for p in given}) > 1:
        raise ValueError(f"params are on {sorted({str(p.device) for p in given})}, must be on one device")
    return given


def _product_dtype(params: Sequence[Tensor], dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}, must be torch.float32 or torch.float64: 16 bits hold no second derivative")
    return dtype
