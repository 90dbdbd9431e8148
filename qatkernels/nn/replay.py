"""Run a model without side effects on it, with the random numbers of an earlier run.

A forward in training mode writes to the model: batch norm updates its running statistics, spectral norm its vectors.
It also draws from torch's generators (dropout, and the seeds of WinQ's noise). A pass that only inspects the model, or
repeats a pass of the same batch, must do neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops import PackedWeight
from .activation import LearnedActivation


class RandomState:
    """The state of torch's generators: of the CPU, of the devices of some tensors, and of the current CUDA device.

    Args:
        tensors: the generators of their devices are included.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._cpu = torch.get_rng_state()
        devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # otherwise nothing has been drawn there
            devices.add(torch.device("cuda", torch.cuda.current_device()))
        self._devices = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Rewind the generators to this state within the context, and set them back afterwards."""
        now = RandomState(torch.empty(0, device=device) for device in self._devices)
        self.restore()
        try:
            yield
        finally:
            now.restore()


@contextmanager
def untouched(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Run a model within the context and leave its buffers, modes and ``requires_grad`` as they are, errors included.

    The model gets copies of its buffers, so the originals are never written to and every context starts from the same
    values. A copy that autograd saved keeps what the forward wrote to it, which a buffer set back in place would not.

    Parameters are not copied, and neither are packed weights, which nothing writes to. Plain attributes of modules are
    not restored.

    Args:
        model: the model; may be wrapped (DDP, FSDP2, torch.compile).
        gradients: whether to restore ``.grad`` too; it is None within the context.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    parameters = list(model.parameters())
    asked = [parameter.requires_grad for parameter in parameters]
    grads = [parameter.grad for parameter in parameters] if gradients else []
    # By module and not by name: a shared buffer has one name in named_buffers().
    buffers = [(m, dict(m._buffers)) for m in modules if m._buffers and not isinstance(m, PackedWeight)]
    copies = {id(b): _copy(b) for _, own in buffers for b in own.values() if b is not None}
    # Autocast caches casts of parameters until its outermost context ends, even if the parameters have changed.
    torch.clear_autocast_cache()
    try:
        for module, own in buffers:
            module._buffers.update({name: None if b is None else copies[id(b)] for name, b in own.items()})
        for parameter in parameters if gradients else ():
            parameter.grad = None
        yield
    finally:
        for module, own in buffers:
            module._buffers.clear()
            module._buffers.update(own)
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        for parameter, before in zip(parameters, asked, strict=True):
            if parameter.requires_grad != before:
                parameter.requires_grad_(before)
        for parameter, grad in zip(parameters, grads, strict=False):
            parameter.grad = grad
        torch.clear_autocast_cache()


def _copy(buffer: Tensor) -> Tensor:
    if not buffer.requires_grad:
        return buffer.detach().clone()
    with torch.enable_grad():  # the copy of a buffer with a gradient stays differentiable
        return buffer.clone()


def check_calibrated(model: nn.Module) -> None:
    """Raise ValueError if a forward would set an activation scale from its first batch, which changes the model."""
    waiting = [n for n, m in model.named_modules() if isinstance(m, LearnedActivation) and not m.ready]
    if waiting:
        raise ValueError(
            f"{len(waiting)} activation scales have not been initialized ({waiting[0]}), the next forward would set "
            "them: call calibrate(model, batch) first"
        )
