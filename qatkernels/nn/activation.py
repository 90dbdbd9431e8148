"""Activation quantizers as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._torch_compat import assume_constant_result, is_fake, without_transforms
from ..autocast import compute_dtype
from ..dtensor import is_dtensor, summed
from ..float32_scales import Float32Scales
from ..grids import Grid
from ..ops import fake_quantize, fake_quantize_dynamic


def scales_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the scales and zero points of a model, of weights and of activations."""
    modules = [m for m in model.modules() if isinstance(m, Float32Scales)]
    found = [m._parameters.get(name) for m in modules for name in ("scale", "zero_point")]
    return [parameter for parameter in found if parameter is not None]


#: What a layer's attributes quantize.
ACTS = {"act": "input", "out_act": "output"}


def learned_acts(layer: Any) -> dict[str, LearnedActivation]:
    """Return the learned quantizers of a quantized or packed layer's input and output, by attribute."""
    found = {name: getattr(layer, name, None) for name in ACTS}
    return {name: act for name, act in found.items() if isinstance(act, LearnedActivation)}


def quantized_ends(layer: Any) -> dict[str, Any]:
    """Return what quantizes a layer's input and output, by ``"input"`` and ``"output"``.

    A packed layer's own quantization of tokens (``act_bits``) is there as a number of bits.
    """
    found = {what: getattr(layer, name, None) for name, what in ACTS.items()}
    if found["input"] is None:
        found["input"] = getattr(layer, "act_bits", None)
    return {what: act for what, act in found.items() if act is not None}


#: How often a graph is recompiled to see whether a batch has initialized the scale. After that, the graph that
#: initializes the scale stays in use, which is correct and a little slower.
_LOOKS = 2


class DynamicActivation(nn.Module):
    """Symmetric integers per token, without parameters.

    Args:
        bits: 2 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` fake-quantized; the last dimension shares a scale."""
        return fake_quantize_dynamic(x, self.bits)

    def extra_repr(self) -> str:
        """Describe the quantizer."""
        return f"bits={self.bits}"


class LearnedActivation(Float32Scales):
    """One learned scale for a whole activation tensor (LSQ), and with ``offset`` a learned zero point (LSQ+).

    The tensor is the input of a layer (its attribute ``act``) or its output (``out_act``).

    The first training batch initializes them: ``2 * mean(abs(x)) / sqrt(qmax)`` (Esser et al., 2020), or the range of
    the batch with an offset. If that batch has inf or NaN, scales come from its finite elements, and the next batch
    initializes them again; a loop with a GradScaler skips the step of such a batch. A batch of zeros has no scale
    either, so the next batch initializes again.

    The buffer ``initialized`` is the only record of whether the scale is initialized. So anything that fills the
    tensors of a model (a state dict, an average of weights, DDP's broadcast, torch.distributed.checkpoint) gives an
    initialized layer. Reading a buffer makes the host wait for a GPU; therefore a True is cached for the tensor that it
    was read from, and a False is read again at the next forward. Writing True into the buffer always takes effect, and
    so does another tensor in its place (``torch.func.functional_call``); only :meth:`reset_parameters` and
    ``load_state_dict`` make an initialized layer uninitialized. A compiled graph reads the buffer when it is compiled,
    and is recompiled once after the first batch.

    Several processes would each initialize from their own batch, and their scales would differ: call
    :func:`qatkernels.nn.calibrate` first.

    Args:
        features: size of the last dimension of the tensor; the gradient scale is ``1 / sqrt(features * qmax)``.
        grid: ``lsq(bits)``, or ``affine(bits)`` for unsigned integers.
        offset: learn a zero point, which need not be integral; for affine grids.
        device: where the scale lives.

    Raises:
        ValueError: if ``offset`` is asked for with a grid that has no zero point.
    """

    initialized: Tensor

    def __init__(self, features: int, grid: Grid, *, offset: bool = False, device: Any = None) -> None:
        super().__init__()
        if offset and not grid.has_zero_point:
            raise ValueError(f"offset is True with scheme {grid.scheme!r}, only 'affine' has a zero point")
        self.grid = grid
        self.grad_scale = grid.grad_scale(features)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32, device=device))
        self.zero_point = nn.Parameter(torch.zeros_like(self.scale)) if offset else None
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        self.calibrating = False
        self._known_ready = False
        self._read_from: Tensor | None = None  # the buffer whose True is cached
        # A compiled graph relies on the buffer it has read until one of these two numbers changes.
        self._forgotten, self._looks = 0, _LOOKS

    @property
    def ready(self) -> bool:
        """Whether the scale is initialized. Waits for the device unless a True is cached."""
        if not self._cached:
            self._known_ready = self._read(self._forgotten, self._looks)
            self._read_from = self.initialized if self._known_ready else None
        return self._known_ready

    @property
    def _cached(self) -> bool:
        """Whether a True is cached, and of the buffer that is there now; a compiled graph has one buffer for ever."""
        return self._known_ready and (torch.compiler.is_compiling() or self._read_from is self.initialized)

    @assume_constant_result
    def _read(self, *conditions: int) -> bool:
        """Read the buffer; False where it has no data (meta device, torch.export).

        torch.compile calls this while it compiles, and keeps the answer until one of the conditions changes.
        """
        initialized = without_transforms(self.initialized)  # vmap over models: whether all of them are
        readable = not (initialized.is_meta or is_fake(initialized))
        return readable and bool(initialized.all())

    def _forget(self) -> None:
        """Drop the cached answer and read the buffer again, because its value may have changed."""
        self._known_ready = False
        if not self.ready:
            self._forgotten, self._looks = self._forgotten + 1, _LOOKS

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget the scale; the next training batch initializes it."""
        self.scale.fill_(1.0)
        if self.zero_point is not None:
            self.zero_point.zero_()
        self.initialized.fill_(False)
        self._forget()

    def initialize(self, x: Tensor) -> None:
        """Set the scale, and the zero point if there is one, from a batch of activations.

        Raises:
            ValueError: if ``x`` has no elements.
        """
        self.reset_parameters()
        self._initialize(x)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        """Set scale and zero point unless they are initialized, without a device sync: compiled graphs run it often."""
        if x.numel() == 0:
            raise ValueError(
                f"x, the activations, has shape {tuple(x.shape)} and no elements, from which an activation scale "
                "cannot be initialized: call calibrate(model, batch) first, with a batch that reaches every layer"
            )
        finite = x.isfinite()
        x = x.where(finite, 0)
        scale = self.grid.init_scale(x, per_tensor=True, method="lsq" if self.zero_point is None else "range")
        if self.zero_point is not None:
            zero_point = self.grid.init_zero_point(x, scale).to(self.zero_point.dtype)
            self.zero_point.copy_(torch.where(self.initialized, self.zero_point, zero_point))
        self.scale.copy_(torch.where(self.initialized, self.scale, scale.to(self.scale.dtype)))
        self.initialized.logical_or_(finite.all() & scale.isfinite() & x.any())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` fake-quantized, in the dtype that the linear layer computes in.

        Raises:
            RuntimeError: if the scale has not been initialized and this forward may not do it: in eval mode, or when
                training runs in several processes.
            ValueError: if it has not been initialized and ``x`` has no elements.
        """
        self.check_scale()
        if is_dtensor(x):  # the output of a row-parallel layer: not its parts are rounded, but their sum
            x = summed(x)
        if not self._cached:
            self._first_batch(x)
        scale, zero_point = self._scales_for(x)
        return fake_quantize(
            x, scale, self.grid, zero_point=zero_point, grad_scale=self.grad_scale, dtype=compute_dtype(x)
        )

    def _first_batch(self, x: Tensor) -> None:
        if torch.compiler.is_compiling():
            if self._read(self._forgotten, self._looks):
                return
            self._looks = max(self._looks - 1, 0)
        elif self.ready:
            return
        if not (self.calibrating or self.training):
            raise RuntimeError(
                "an activation scale has not been initialized: run a batch in training mode, "
                "call calibrate(model, batch), or load a state dict"
            )
        if not self.calibrating and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "activation scales cannot be initialized from the first training batch in several processes, whose "
                "batches differ: call calibrate(model, batch) with the same batch in each, before wrapping the model"
            )
        self._initialize(x)
        if self.calibrating and not torch.compiler.is_compiling() and not self.ready:
            bad = x.numel() - int(x.isfinite().sum())
            what = f"{bad} of {x.numel()} elements that are inf or NaN (or their mean is)" if x.any() else "only zeros"
            raise ValueError(
                f"x, the activations, has {what}, from which an activation scale cannot be calibrated: calibrate "
                "with another batch"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._forget()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._forget()

    @property
    def layout(self) -> str:
        """The grid in words."""
        return f"bits={self.grid.bits}, scheme={self.grid.scheme}, offset={self.zero_point is not None}"

    def extra_repr(self) -> str:
        """Describe the quantizer."""
        return self.layout
