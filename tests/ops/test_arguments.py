"""Wrong types: for each parameter of each public function, a TypeError that names it, its value and what is allowed."""

import inspect

import numpy as np
import pytest
import torch

import qatkernels as qk
from qatkernels import grids, ops

W, SCALE, GRID = torch.randn(4, 8), torch.rand(4) + 0.1, qk.grids.lsq(4)
AFFINE, ZERO = qk.grids.affine(4), torch.ones(4)
PACKED = qk.PackedWeight.from_float(W, SCALE, GRID)
STACK = qk.PackedWeight.from_float(W.view(2, 2, 8), SCALE.view(2, 2), GRID)
OFFSETS = torch.tensor([1, 2], dtype=torch.int32)
CODES = qk.quantize(W, SCALE, AFFINE)
TARGETS = torch.tensor([0, 1, 2, 3])
FAMILY = {"w": W, "scale": SCALE, "grid": AFFINE, "group_size": None, "zero_point": ZERO}

#: A call of every public function that works; a new function needs one.
CALLS = {
    "affine": {"bits": 4}, "binary": {"bits": 1}, "lsq": {"bits": 4}, "paretoq": {"bits": 4}, "seq": {"bits": 2},
    "ternary": {"bits": 1.58}, "make_grid": {"scheme": "lsq", "bits": 4},
    "fake_quantize": {
        **FAMILY, "noise_std": 0.0, "scale_noise_std": 0.0, "seed": 1, "grad_scale": 1.0, "dtype": torch.float32,
        "out": torch.empty(4, 8),
    },
    "quantize": FAMILY,
    "dequantize": {**{k: v for k, v in FAMILY.items() if k != "w"}, "codes": CODES, "dtype": torch.float32},
    "quantization_error": {**FAMILY, "moments": torch.ones(8, dtype=torch.float64)},
    "reset_": {**FAMILY, "w": W.clone(), "quantized_weight": 0.5},
    "fake_quantize_dynamic": {"x": W, "bits": 8},
    "quant_linear_dual": {
        **FAMILY, "x": torch.ones(2, 8), "tangent_x": torch.ones(2, 8), "tangent_w": W, "tangent_scale": SCALE,
        "tangent_zero_point": ZERO, "noise_std": 0.0, "scale_noise_std": 0.0, "seed": 1, "grad_scale": 1.0,
        "transposed": False,
    },
    "pack": {"codes": CODES, "grid": AFFINE},
    "unpack": {"packed": PACKED.packed, "grid": GRID, "cols": 8},
    "lowbit_linear": {"x": W, "weight": PACKED, "bias": torch.ones(4), "offsets": None, "act_bits": 8},
    "grouped_lowbit_linear": {"x": W, "weight": STACK, "offsets": OFFSETS, "act_bits": 8},
    "grouped_linear": {"x": W, "w": torch.ones(2, 3, 8), "offsets": OFFSETS},
    "cross_entropy": {"logits": W, "targets": TARGETS, "ignore_index": -100, "reduction": "mean"},
    "linear_cross_entropy": {
        "hidden": W, "weight": torch.ones(5, 8), "targets": TARGETS, "ignore_index": -100, "reduction": "mean",
        "chunk_tokens": 2,
    },
    "gram_schmidt": {"basis": W, "w": torch.ones(8), "h": torch.ones(4)},
    "normal": {"seed": torch.tensor(1), "numel": 10, "stream": 0},
    "perturb_": {"w": W.clone(), "g": W, "factor": torch.tensor(0.1), "eta": 0.1},
    "perturb_swap_": {"w": W.clone(), "g": W.clone(), "factor": torch.tensor(0.1), "eta": 0.1},
    "perturbation_norms": {"g": W, "w": W, "eta": 0.1},
    "PackedWeight": {
        "packed": PACKED.packed, "scale": PACKED.scale, "zero_point": None, "grid": GRID, "cols": 8,
        "dtype": torch.float32,
    },
    "PackedWeight.from_float": {**FAMILY, "scale_dtype": torch.float32},
    "PackedWeight.dequantize": {"dtype": torch.float32},
    "Grid.init_scale": {"w": W, "group_size": 4, "per_tensor": False, "method": "max"},
    "Grid.init_zero_point": {"w": W, "scale": SCALE, "group_size": None},
    "Grid.grad_scale": {"numel": 12},
}  # fmt: skip
#: Functions without arguments.
UNTYPED = {"empty_cache"}
METHODS = {
    "PackedWeight.from_float": qk.PackedWeight.from_float, "PackedWeight.dequantize": PACKED.dequantize,
    "Grid.init_scale": AFFINE.init_scale, "Grid.init_zero_point": AFFINE.init_zero_point,
    "Grid.grad_scale": AFFINE.grad_scale,
}  # fmt: skip


def public():
    """Return what users call of qatkernels.ops and qatkernels.grids, by name."""
    names = {name: getattr(ops, name) for name in ops.__all__}
    names |= {name: getattr(qk, name) for name in qk.__all__}
    own = ("qatkernels.ops", "qatkernels.grids", "qatkernels.backends")
    names |= {
        name: getattr(qk.grids, name) for name in ("affine", "binary", "lsq", "make_grid", "paretoq", "seq", "ternary")
    }
    found = {n: f for n, f in names.items() if getattr(f, "__module__", "").startswith(own)}
    return {n: f for n, f in (found | METHODS).items() if n not in UNTYPED}


FUNCTIONS = public()


def wrong_values(right, annotation):
    """Values of types that are not allowed where this one is."""
    yield object()
    yield [1, 2]
    if not isinstance(right, str):
        yield "text"
    if not isinstance(right, (bool, str)):
        yield True
    if isinstance(right, (int, str, torch.dtype)) and "float" not in annotation:
        yield 1.5
    if not isinstance(right, (torch.Tensor, type(None))):
        yield torch.ones(2, 3)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_types(name):
    assert name in CALLS, f"add a call of {name} to CALLS of {__file__}"
    function, right = FUNCTIONS[name], CALLS[name]
    parameters = inspect.signature(function).parameters
    assert set(right) == set(parameters), name
    function(**right)
    for parameter, value in right.items():
        for wrong in wrong_values(value, parameters[parameter].annotation):
            if parameter == "seed" and isinstance(wrong, torch.Tensor):
                continue
            with pytest.raises(TypeError, match=rf"^{parameter} is .*must be") as caught:
                function(**{**right, parameter: wrong})
            shown = "a tensor, torch.float32 of shape (2, 3)" if isinstance(wrong, torch.Tensor) else repr(wrong)
            assert shown in str(caught.value)
        if parameters[parameter].default is not None and value is not None:
            with pytest.raises(TypeError, match=rf"^{parameter} is None, must be"):
                function(**{**right, parameter: None})


FIELDS = {
    "scheme": "seventh", "bits": 4, "code_min": -7, "code_max": 7, "steps": 7.0, "offset": 0.0, "clamp": (-1, 1),
    "passes": (-1, 1), "saturated": (-1, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0.0}, ValueError, r"steps is 0\.0, must be positive"),
        ({"steps": -7.0}, ValueError, r"steps is -7\.0, must be positive"),
        ({"steps": float("inf")}, ValueError, "steps is inf, must be finite"),
        ({"offset": float("nan")}, ValueError, "offset is nan, must be finite"),
        ({"clamp": (-1, float("inf"))}, ValueError, r"clamp is \(-1, inf\), must be finite"),
        ({"clamp": (1, -1)}, ValueError, r"clamp is \(1, -1\), must be \(low, high\) with low <= high"),
        ({"passes": (1, -1)}, ValueError, r"passes is \(1, -1\)"),
        ({"clamp": (-2, 2)}, ValueError, "clamp is .*reaches codes -14 to 14 .*code_min and code_max, -7 to 7"),
        ({"code_min": 8}, ValueError, "code_min is 8 and code_max is 7, must ascend"),
        ({"code_min": -129}, ValueError, "code_min is -129"),
        ({"code_max": 128}, ValueError, "code_max is 128"),
        ({"code_min": 0, "code_max": 256}, ValueError, "code_max is 256"),
        ({"by_sign": True}, ValueError, "codes are -7 to 7 with by_sign, must be -1 to 0"),
        ({"qmax": 0}, ValueError, "qmax is 0, must be positive"),
        ({"reach": 0.0}, ValueError, "reach is 0.0, must be positive"),
        ({"code_min": -7.0}, TypeError, r"code_min is -7\.0, must be an integer"),
        ({"clamp": 1}, TypeError, "clamp is 1, must be a tuple of two numbers"),
        ({"clamp": (-1, "1")}, TypeError, r"clamp is .*must be a tuple of two numbers"),
        ({"steps": "7"}, TypeError, "steps is '7', must be a number"),
        ({"has_zero_point": 1}, TypeError, "has_zero_point is 1, must be True or False"),
    ],
)
def test_grids_that_kernels_cannot_take(changes, error, message):
    assert grids.Grid(**FIELDS).levels == 15
    with pytest.raises(error, match=message):
        grids.Grid(**{**FIELDS, **changes})


def test_numpys_numbers_count():
    scale = torch.rand(4, 2)
    expected = qk.fake_quantize(W, scale, GRID, group_size=4, noise_std=0.5, seed=3)
    given = qk.fake_quantize(W, scale, GRID, group_size=np.int64(4), noise_std=np.float32(0.5), seed=np.int32(3))
    assert torch.equal(given, expected)


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1])
def test_seeds_count_modulo_two_to_the_64(seed):
    one, *others = (
        qk.fake_quantize(W, SCALE, GRID, noise_std=0.1, seed=seed + turn * 2**64) for turn in (0, 1, -1, 2**70)
    )
    assert all(torch.equal(one, other) for other in others)
    assert not torch.equal(one, qk.fake_quantize(W, SCALE, GRID, noise_std=0.1, seed=seed + 2**63))


def test_a_seed_of_another_type_is_refused_also_without_noise():
    with pytest.raises(TypeError, match=r"seed is 1\.5, must be an int, an int64 tensor with one element, or None"):
        qk.fake_quantize(W, SCALE, GRID, seed=1.5)
