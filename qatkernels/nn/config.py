"""What a quantized layer is quantized to, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..arguments import is_integer, is_real
from ..dtypes import dtype_name
from ..grids import Grid, affine, lsq, make_grid
from ..options import nearest

ACT_SCHEMES = ("dynamic", "lsq", "lsq+")
#: Initial scales that are searched (:mod:`qatkernels.nn.scale_search`).
SEARCHES = ("mse", "activation")
SCALE_INITS = ("max", "mean", "lsq", "range", *SEARCHES)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Named as torchao's ``ZeroPointDomain`` is. Zero points are in units of codes here, ``"float"`` ones too.
ZERO_POINT_DOMAINS = ("float", "int")


@dataclass(frozen=True)
class QuantConfig:
    """Quantization of one linear layer. Every field is honoured, or refused when the configuration is built.

    Attributes:
        bits: bit width of the weight; 1.58 for ternary.
        scheme: ``"paretoq"`` (binary, ternary, seq or lsq by bit width; Liu et al., 2025) or a key of ``grid.SCHEMES``.
        group_size: input features that share a scale; one scale per output feature if None.
        per_tensor: one scale for the whole weight.
        scale_init: how scales begin: a method of :meth:`Grid.init_scale` (``"max"``, ``"mean"``, ``"lsq"`` or
            ``"range"``, which is for affine); the scheme's own if None; ``"mse"``, a search for the smallest error of
            the weights; or ``"activation"``, a search for the smallest error of the layer's output, which needs
            :func:`calibrate` after quantizing (until then scales are the scheme's own). docs/algorithms.md has the
            formulas.
        scale_dtype: what scales will be stored in, for exports that lose nothing. A forward then rounds the spacing of
            the codes (``scale / grid.steps``) to this dtype. The parameter stays float32, and gradients pass straight
            through. GGUF and most runtimes store float16. A name such as ``"float16"`` is taken too.
        zero_point_domain: what zero points (of scheme ``"affine"``) will be stored as. ``"float"``: any number, which
            no format but this library's own holds. ``"int"``: integers. A forward then rounds them, and clamps them to
            the codes (0 to 15 at 4 bits), since files have no others. The parameter stays float32, and gradients pass
            straight through both.
        act_bits: bit width of the activations, 2 to 8; None leaves them alone.
        act_scheme: ``"dynamic"`` (symmetric, one scale per token, taken from the token), ``"lsq"`` (one learned scale;
            Esser et al., 2020) or ``"lsq+"`` (learned scale and zero point; Bhalgat et al., 2020).
        act_signed: False makes the ``"lsq"`` grid unsigned, for activations that are never negative.
        out_bits: bit width of the layer's output, 2 to 8; None leaves it alone. It is quantized after the bias, to
            signed integers times one learned scale, as ``act_scheme="lsq"`` quantizes the input. Accelerators that pass
            integers from layer to layer store outputs so (docs/formats.md). Embeddings do not take it.

    Raises:
        ValueError: if a field has a value that cannot be used, naming it.
    """

    bits: float = 2
    scheme: str = "paretoq"
    group_size: int | None = None
    per_tensor: bool = False
    scale_init: str | None = None
    scale_dtype: torch.dtype = torch.float32
    zero_point_domain: str = "float"
    act_bits: int | None = None
    act_scheme: str = "dynamic"
    act_signed: bool = True
    out_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("per_tensor", "act_signed"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be True or False")
        if not isinstance(self.scheme, str):
            raise ValueError(f"scheme is {self.scheme!r}, must be a string")
        if not is_real(self.bits):
            raise ValueError(f"bits is {self.bits!r}, must be a number")
        grid = self.grid  # refuses an unknown scheme, and a bit width that it does not have
        if self.group_size is not None:
            if not is_integer(self.group_size) or self.group_size < 1:
                raise ValueError(f"group_size is {self.group_size!r}, must be a positive integer or None")
            if self.per_tensor:
                raise ValueError(f"group_size is {self.group_size} with per_tensor=True, give one of them")
        if self.scale_init is not None and self.scale_init not in SCALE_INITS:
            hint = nearest(self.scale_init, SCALE_INITS) if isinstance(self.scale_init, str) else ""
            raise ValueError(f"scale_init is {self.scale_init!r}, must be None or one of {SCALE_INITS}{hint}")
        if self.scale_init == "range" and not grid.has_zero_point:
            raise ValueError(f"scale_init is 'range' with scheme {grid.scheme!r}, it is for scheme 'affine'")
        dtype = next((d for d in SCALE_DTYPES if self.scale_dtype in (d, dtype_name(d))), None)
        if dtype is None:
            raise ValueError(f"scale_dtype is {self.scale_dtype!r}, must be one of {SCALE_DTYPES}")
        object.__setattr__(self, "scale_dtype", dtype)
        if self.zero_point_domain not in ZERO_POINT_DOMAINS:
            raise ValueError(f"zero_point_domain is {self.zero_point_domain!r}, must be one of {ZERO_POINT_DOMAINS}")
        if self.zero_point_domain == "int" and not grid.has_zero_point:
            raise ValueError(f"zero_point_domain is 'int' with scheme {grid.scheme!r}, it is for scheme 'affine'")
        self._check_activation()

    def _check_activation(self) -> None:
        if self.act_scheme not in ACT_SCHEMES:
            raise ValueError(f"act_scheme is {self.act_scheme!r}, must be one of {ACT_SCHEMES}")
        if self.act_bits is None and self.act_scheme != "dynamic":
            raise ValueError(f"act_scheme is {self.act_scheme!r} with act_bits=None, give act_bits 2 to 8")
        if not self.act_signed and self.act_scheme != "lsq":
            raise ValueError(f"act_signed is False with act_scheme {self.act_scheme!r}, it is for act_scheme 'lsq'")
        for name in ("act_bits", "out_bits"):
            bits = getattr(self, name)
            if bits is not None and not (is_integer(bits) and 2 <= bits <= 8):
                raise ValueError(f"{name} is {bits!r}, must be None or an integer from 2 to 8")

    def __str__(self) -> str:
        """Return the configuration in a few words; ``repr`` has every field."""
        parts = [f"{self.bits:g} bits", self.scheme]
        if self.group_size is not None:
            parts.append(f"groups of {self.group_size}")
        if self.per_tensor:
            parts.append("per tensor")
        if self.scale_init is not None:
            parts.append(f"scales by {self.scale_init}")
        if self.scale_dtype != torch.float32:
            parts.append(f"{dtype_name(self.scale_dtype)} scales")
        if self.zero_point_domain == "int":
            parts.append("integer zero points")
        if self.act_bits is not None:
            parts.append(
                f"{'' if self.act_signed else 'unsigned '}activations of {self.act_bits} bits ({self.act_scheme})"
            )
        if self.out_bits is not None:
            parts.append(f"outputs of {self.out_bits} bits")
        return ", ".join(parts)

    @property
    def grid(self) -> Grid:
        """Grid of the weight."""
        return make_grid(self.scheme, self.bits)

    @property
    def act_grid(self) -> Grid | None:
        """Grid of the activations where their scale is learned."""
        if self.act_bits is None or self.act_scheme == "dynamic":
            return None
        return lsq(self.act_bits) if self.act_scheme == "lsq" and self.act_signed else affine(self.act_bits)

    @property
    def out_grid(self) -> Grid | None:
        """Grid of the output; None where it is left alone."""
        return None if self.out_bits is None else lsq(self.out_bits)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self) | {"scale_dtype": dtype_name(self.scale_dtype)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """Build a configuration from :meth:`to_dict`'s result; missing fields take their defaults.

        Raises:
            ValueError: if a key is no field, or its value cannot be used.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown fields {unknown}, must be among {known}")
        return cls(**values)


def without_inputs(config: QuantConfig) -> QuantConfig:
    """Return a configuration whose scales are searched for the weights alone where it searches for inputs."""
    return replace(config, scale_init="mse") if config.scale_init == "activation" else config
