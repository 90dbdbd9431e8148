"""Ops that choose between backends as the extension does, with separate names and on any device, for tests."""

import torch

from qatkernels import backends
from qatkernels.ops._op import Op

_LIBRARY = torch.library.Library("qatkernels_choices", "DEF")


def choice(op: Op, op_name: str, stages: list[backends.Stage], device: str = "CPU", registry=backends.REGISTRY):
    """Return an op that passes each call to the first of these stages that takes it.

    Args:
        op: the op.
        op_name: its name, or that of its ``_out`` form.
        stages: as `backends.order` returns them.
        device: ``"CPU"`` or ``"CUDA"``.
        registry: the registry of the stages.
    """
    name = f"choice{len(_LIBRARY._op_defs)}"
    _LIBRARY.define(op.schemas[op_name].replace(f"{op_name}(", f"{name}(", 1))
    named = [backends.named(op, op_name, stage, device, registry) for stage in stages]
    backends.extension().choose("qatkernels_choices", name, device, named)
    return getattr(torch.ops.qatkernels_choices, name)
