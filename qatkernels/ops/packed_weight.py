"""The packed weight, which layers, files and kernels share, and the product with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._torch_compat import tree_leaves
from ..arguments import (
    check_dtype,
    check_integers,
    check_optional_integers,
    check_optional_tensors,
    check_tensors,
    wrong_type,
)
from ..autocast import autocast_dtype
from ..dtensor import is_dtensor, splits_columns
from ..dtypes import dtype_name
from ..float32_scales import Float32Scales
from ..grids import Grid, check_grid
from ._fake_quantize import check_layout
from ._lowbit_linear import FORWARD
from ._quantize import dequantize, quantize
from ._sharded_product import sharded_product
from .dynamic import fake_quantize_dynamic
from .packing import SCALES, pack, readable, row_bytes, store_scale, unpack


class PackedWeight(Float32Scales):
    """A weight ``[..., N, K]`` as packed codes, with the scales, zero points and grid to dequantize them.

    It is a module whose tensors are buffers. So it is moved, copied and saved with its model, and casts of the model do
    not change its bits. Layers that share a weight share this object, so they stay tied when the model moves. (If each
    layer had its own buffers, torch would move them one by one, and untie them.)

    It is not a tensor. A model that uses ``layer.weight`` in an operation, instead of calling the layer, gets an error
    that names the layer and says what to do. It has the attributes that libraries read from a weight: ``shape``,
    ``dtype``, ``device``, ``numel()``, ``size()``, ``dim()``, ``nbytes``, and ``requires_grad``, which is False.
    docs/architecture.md explains why it is not a subclass of Tensor.

    Packed bytes do not tell which codes they are. So the state dict also has the layout of the codes, and loading
    another layout, or tensors of another dtype, is an error.

    Args:
        packed: uint8 ``[..., N, ceil(K * bits / 8)]``, as :func:`qatkernels.pack` returns.
        scale: float32, bfloat16 or float16 ``[..., N, K / group_size]``; one column if there is one scale per row.
        zero_point: float32 with the shape of ``scale``, or None.
        grid: the grid of the codes.
        cols: K.
        dtype: dtype of the weight in full precision.

    Attributes:
        bits: bits of a stored code.
        constants: the constants of the grid, as a list for the ops.
        dtype: dtype of the weight in full precision; casts of the model change it.
        layer: name of the layer in its model, for error messages; an empty string if unknown.

    Raises:
        TypeError: if an argument has another type, naming it.
        ValueError: if a shape or dtype does not fit.
    """

    uncast: ClassVar[tuple[str, ...]] = ("packed", "scale", "zero_point")
    refusal: ClassVar[str] = "the codes of {}packed are {}, must be {}"
    layout_required: ClassVar[bool] = True

    packed: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        grid: Grid,
        cols: int,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_tensors(packed=packed, scale=scale)
        check_optional_tensors(zero_point=zero_point)
        check_grid(grid)
        check_integers(cols=cols)
        check_dtype(dtype)
        _check_parts(packed, scale, zero_point, grid, cols)
        super().__init__()
        self.grid, self.cols, self.dtype, self.layer = grid, cols, dtype, ""
        # Every call reads these, and building the list would take as long as a small product.
        self.bits, self.constants = grid.storage_bits, list(grid.constants)
        for name, tensor in (("packed", packed), ("scale", scale), ("zero_point", zero_point)):
            self.register_buffer(name, tensor)

    @classmethod
    @torch.inference_mode(False)  # loading into a buffer that was made in inference mode is an error
    @torch.no_grad()
    def from_float(
        cls,
        w: Tensor,
        scale: Tensor,
        grid: Grid,
        group_size: int | None = None,
        *,
        zero_point: Tensor | None = None,
        scale_dtype: torch.dtype = torch.float32,
    ) -> PackedWeight:
        """Quantize and pack a weight. With float32 scales, :meth:`dequantize` equals `fake_quantize` bit for bit.

        Args:
            w: weight ``[..., N, K]``.
            scale: as for :func:`qatkernels.fake_quantize`.
            grid: the quantization grid.
            group_size: as for :func:`qatkernels.fake_quantize`.
            zero_point: as for :func:`qatkernels.fake_quantize`.
            scale_dtype: dtype to store scales in. Codes are computed with the scales before that cast.

        Raises:
            TypeError: if an argument has another type, naming it.
            ValueError: if shapes do not fit, ``w`` has NaN, a zero point is not finite, or a scale is not finite in
                ``scale_dtype``.
            RuntimeError: if a dtype or device does not fit.
        """
        check_tensors(w=w)
        check_dtype(scale_dtype, name="scale_dtype")
        if w.ndim < 2:
            raise ValueError(f"w has shape {tuple(w.shape)}, must have at least two dimensions")
        check_layout(w, scale, grid, group_size, zero_point)
        if readable(w) and w.isnan().any():
            raise ValueError(f"w has NaN in {int(w.isnan().sum())} of {w.numel()} elements, must have none")
        if zero_point is not None and readable(zero_point) and not zero_point.isfinite().all():
            element = zero_point[~zero_point.isfinite()][0].item()
            raise ValueError(f"zero_point has an element {element}, must be finite")
        codes = quantize(w, scale, grid, group_size=group_size, zero_point=zero_point)

        def by_row(t: Tensor) -> Tensor:
            t = t.detach().float()
            if group_size is not None:
                return t.contiguous()
            return t.reshape(t.shape + (1,) * (w.ndim - t.ndim)).expand(*w.shape[:-1], 1).contiguous()

        zero = None if zero_point is None else by_row(zero_point)
        return cls(pack(codes, grid), store_scale(by_row(scale), scale_dtype), zero, grid, w.shape[-1], dtype=w.dtype)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return torch.Size((*self.packed.shape[:-1], self.cols))

    @property
    def group_size(self) -> int:
        """Number of inputs that share a scale; K if there is one scale per row."""
        return self.cols // self.scale.shape[-1]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(t.nbytes for t in self._buffers.values() if t is not None)

    @property
    def requires_grad(self) -> bool:
        """False: codes do not train."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            raise ValueError(
                "requires_grad is True, must be False: codes do not train. Train quantized layers, then pack"
            )

    @property
    def ndim(self) -> int:
        """Dimensions of the weight."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the dimensions of the weight."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape of the weight, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of weights."""
        return self.shape.numel()

    def to(self, *args: Any, **kwargs: Any) -> PackedWeight:
        """Return a copy of the weight on another device; arguments are those of ``nn.Module.to``.

        Like a tensor, this object does not move itself. When a model moves, its packed weights move in place.
        """
        new = PackedWeight(self.packed, self.scale, self.zero_point, self.grid, self.cols, dtype=self.dtype)
        new.layer = self.layer
        return super(PackedWeight, new).to(*args, **kwargs)

    def codes(self) -> Tensor:
        """Return the integer codes ``[..., N, K]``."""
        self._refuse_sharded()
        return unpack(self.packed, self.grid, self.cols)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[..., N, K]`` in a floating point dtype."""
        check_dtype(dtype)
        self._refuse_sharded()
        return dequantize(
            self.codes(), self.scale.float(), self.grid, group_size=self.group_size if self.cols else None,
            zero_point=self.zero_point, dtype=dtype,
        )  # fmt: skip

    def _refuse_sharded(self) -> None:
        if is_dtensor(self.packed):
            raise ValueError("the codes are sharded: call qatkernels.nn.gather_model(model), whose weights are whole")

    @property
    def value(self) -> PackedWeight:
        """This object. In earlier versions the weight of a layer was another object, which held this one."""
        warnings.warn("layer.weight.value is now layer.weight", DeprecationWarning, stacklevel=2)
        return self

    def rows(self, index: Tensor) -> Tensor:
        """Return rows ``[..., K]`` of a weight ``[N, K]``, unpacking only these, in :attr:`dtype`.

        They equal the same rows of ``dequantize(self.dtype)`` bit for bit.

        Args:
            index: numbers of rows, int32 or int64 ``[...]``.

        Raises:
            IndexError: if a row does not exist.
        """
        check_tensors(index=index)
        packed, scale, zero_point = (
            None if t is None else torch.nn.functional.embedding(index, t)
            for t in (self.packed, self.scale, self.zero_point)
        )
        assert packed is not None
        assert scale is not None
        return dequantize(
            unpack(packed, self.grid, self.cols), scale.float(), self.grid,
            group_size=self.group_size if self.cols else None, zero_point=zero_point, dtype=self.dtype,
        )  # fmt: skip

    def forward(
        self, x: Tensor, bias: Tensor | None = None, offsets: Tensor | None = None, act_bits: int | None = None,
        *, lookup: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return :func:`lowbit_linear` of ``x``; under autocast in its dtype, as for a linear layer.

        With ``lookup``, return the :meth:`rows` whose numbers ``x`` holds. Layers call this method and not the others,
        because libraries for offloading load the tensors of a module before its forward.
        """
        if lookup:
            return self.rows(x)
        dtype = autocast_dtype(x)
        if dtype is None:
            return lowbit_linear(x, self, bias, offsets=offsets, act_bits=act_bits)
        if act_bits is None:  # with act_bits x is quantized before any cast, as in training
            x = x.to(dtype)
        return lowbit_linear(x, self, bias, offsets=offsets, act_bits=act_bits).to(dtype)

    def extra_repr(self) -> str:
        """Describe the weight."""
        per = "row" if self.scale.shape[-1] == 1 else f"{self.group_size}"
        scales = f"{dtype_name(self.scale.dtype)} scale per {per}"
        grid = f"bits={self.grid.bits}, scheme={self.grid.scheme}"
        return f"{'x'.join(map(str, self.shape))}, {grid}, {scales}, {self.nbytes} bytes"

    @property
    def layout(self) -> str:
        """The layout of the codes."""
        return f"{self.grid.scheme}, {self.grid.bits} bits, {self.cols} columns"

    def _problems(self, state_dict: Any, prefix: str) -> list[str]:
        problems = super()._problems(state_dict, prefix)
        for name in self.uncast:
            buffer, stored = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(buffer, Tensor) and isinstance(stored, Tensor) and stored.dtype != buffer.dtype:
                problems.append(f"{prefix}{name} is {stored.dtype}, must be {buffer.dtype}")
        return problems

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return super()._apply(fn, recurse)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise TypeError: this is not a tensor, so torch's functions cannot use it."""
        weight = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        raise TypeError(weight._refusal(f"torch's {getattr(func, '__name__', func)}"))

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError; for an attribute that every tensor has, the message says what to do."""
        if not name.startswith("_") and name not in self._buffers and hasattr(Tensor, name):
            raise AttributeError(self._refusal(f".{name}"))
        return super().__getattr__(name)

    def _refusal(self, what: str) -> str:
        """Return the error message for ``what``, an operation that needs a tensor."""
        layer = repr(self.layer) if self.layer else "this layer"
        if what == ".data":  # PEFT's merge writes to it, and hardly anything else does
            return (
                f"the weight of {layer} is packed codes, which .data cannot change: to merge an adapter, call "
                "qatkernels.to_plain(model) before the merge, and quantize_model after it. For anything else: Exclude "
                f"{layer} in quantize_model, so that it stays in full precision"
            )
        if what == ".is_leaf":  # torch's RowwiseParallel asks this of a weight that it is to shard
            return (
                f"the weight of {layer} is packed codes, which have no .is_leaf. If torch's RowwiseParallel asked, use "
                f"the one of qatkernels.nn.tensor_parallel. Otherwise exclude {layer} in quantize_model, so that it "
                "stays in full precision"
            )
        return (
            f"the weight of {layer} is packed codes, which {what} cannot use: the model reads the weight of the layer "
            f"itself instead of calling the layer. Exclude {layer} in quantize_model, so that it stays in full "
            "precision, or give the model layer.weight.dequantize()"
        )


def _refusing(symbol: str) -> Any:
    def refuse(self: PackedWeight, *_: object) -> Any:
        """Refuse to be computed with as if this were a tensor."""
        raise TypeError(self._refusal(f"the operator {symbol}"))

    return refuse


# Not len() and iter(): a module that has them looks like a container to libraries, and bool() calls len().
_ARITHMETIC = {"matmul": "@", "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "pow": "**"}
_REFLECTED = {f"r{name}": symbol for name, symbol in _ARITHMETIC.items()}
_OTHERS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "neg": "-", "abs": "abs()", "getitem": "[]", "setitem": "[]"}
for _name, _symbol in (_ARITHMETIC | _REFLECTED | _OTHERS).items():
    setattr(PackedWeight, f"__{_name}__", _refusing(_symbol))


def _check_parts(packed: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, cols: int) -> None:
    """Raise ValueError unless the parts of a packed weight fit each other."""
    if cols < 0:
        raise ValueError(f"cols is {cols}, must be at least 0")
    bits = grid.storage_bits
    expected = (*scale.shape[:-1], row_bytes(cols, bits))
    if packed.dtype != torch.uint8 or packed.ndim < 2 or tuple(packed.shape) != expected:
        raise ValueError(
            f"packed is {packed.dtype} of shape {tuple(packed.shape)}, must be torch.uint8 of shape {expected} for "
            f"{cols} columns at {bits} bits and a scale of shape {tuple(scale.shape)}"
        )
    if scale.dtype not in SCALES:
        raise ValueError(f"scale is {scale.dtype}, must be one of {SCALES}")
    if scale.shape[-1] < 1 or cols % scale.shape[-1]:
        raise ValueError(f"scale has {scale.shape[-1]} columns, must divide the {cols} columns of the weight")
    z = zero_point
    if z is not None and (z.shape != scale.shape or z.dtype != torch.float32):
        raise ValueError(
            f"zero_point is {z.dtype} of shape {tuple(z.shape)}, must be torch.float32 of shape "
            f"{tuple(scale.shape)} like scale"
        )
    if z is not None and not grid.has_zero_point:
        raise ValueError(f"zero_point is given, but scheme {grid.scheme!r} has none, only 'affine' has")


def lowbit_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    act_bits: int | None = None,
) -> Tensor:
    """Return ``x @ weight.T + bias`` for a packed weight.

    With ``offsets`` the weight is a stack, and each token is multiplied with the weight of its expert (see
    :func:`grouped_lowbit_linear`).

    Args:
        x: activations ``[..., K]``, float32, bfloat16, float16 or float64; ``[T, K]`` with ``offsets``.
        weight: packed weight ``[N, K]``; ``[E, N, K]`` with ``offsets``.
        bias: ``[N]``, floating point, or None; None with ``offsets``.
        offsets: None, or int32 ``[E]`` on the device of x: the end of each expert's tokens.
        act_bits: None for no quantization of x. With 2 to 8, each token is first quantized to symmetric integers with
            the scale ``max(abs(x)) / (2**(act_bits - 1) - 1)``, and products are summed as integers.

    Returns:
        ``[..., N]`` in the dtype of x, summed in float32. Differentiable in x and bias, to any order, in both modes.

    Raises:
        TypeError: if ``weight`` is not a PackedWeight, or another argument has another type, naming it.
        ValueError: if offsets descend or exceed the number of tokens.
        RuntimeError: if a shape, dtype or device does not fit, naming the argument.
    """
    # A quick test for the most frequent call, because the checks of all arguments take longer.
    types_fit = (
        isinstance(x, Tensor) and isinstance(weight, PackedWeight) and (bias is None or isinstance(bias, Tensor))
    )
    if not types_fit or offsets is not None or act_bits is not None:
        _check_types(x, weight, bias, offsets, act_bits)
    cols = weight.cols
    if x.ndim and x.shape[-1] != cols:  # the op takes K from x, and row bytes do not determine K exactly
        raise RuntimeError(f"x has shape {tuple(x.shape)}, its last dimension must be {cols} like the weight's")
    buffers = weight._buffers  # reading attributes of a module would take as long as the choice of a kernel
    packed, scale, zero_point = buffers["packed"], buffers["scale"], buffers["zero_point"]
    if is_dtensor(packed):
        if act_bits is not None and splits_columns(packed):  # tokens have a scale each: they are quantized whole
            x, act_bits = fake_quantize_dynamic(x, act_bits), None
        product = partial(_product, weight, offsets, act_bits)
        return sharded_product(x, (packed, scale, zero_point), bias, product)  # type: ignore[arg-type]
    y: Tensor = FORWARD.call(
        x, packed, scale, zero_point, bias, offsets, weight.constants, weight.grid.code_min, weight.bits, act_bits
    )
    return y


def _product(
    weight: PackedWeight, offsets: Tensor | None, act_bits: int | None, x: Tensor, packed: Tensor, scale: Tensor,
    zero_point: Tensor | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the product with a part of a weight."""
    y: Tensor = FORWARD.call(
        x, packed, scale, zero_point, bias, offsets, weight.constants, weight.grid.code_min, weight.bits, act_bits
    )
    return y


def _check_types(x: Any, weight: Any, bias: Any, offsets: Any, act_bits: Any) -> None:
    check_tensors(x=x)
    check_optional_tensors(bias=bias, offsets=offsets)
    check_optional_integers(act_bits=act_bits)
    if not isinstance(weight, PackedWeight):
        raise wrong_type("weight", weight, "a PackedWeight, which PackedWeight.from_float makes")


def grouped_lowbit_linear(x: Tensor, weight: PackedWeight, offsets: Tensor, *, act_bits: int | None = None) -> Tensor:
    """Return each token times the packed weight of its expert, for tokens that are sorted by expert, in one launch.

    Args:
        x: tokens ``[T, K]``, sorted by expert.
        weight: packed weights ``[E, N, K]``.
        offsets: int32 ``[E]`` on the device of x: the end of each expert's tokens, ascending, as for
            ``torch._grouped_mm``. An expert may have no token. On a CPU, offsets that descend or exceed T are an error.
            On a GPU the result is then undefined, because checking them would need a sync.
        act_bits: as for :func:`lowbit_linear`.

    Returns:
        ``[T, N]`` in the dtype of x. Tokens at or beyond ``offsets[-1]`` give 0. Differentiable in x.

    Raises:
        TypeError: if ``weight`` is not a PackedWeight, or another argument has another type, naming it.
        ValueError: if offsets descend or exceed T.
        RuntimeError: if a shape, dtype or device does not fit, naming the argument.
    """
    check_tensors(offsets=offsets)
    return lowbit_linear(x, weight, offsets=offsets, act_bits=act_bits)
