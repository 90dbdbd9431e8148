"""The Triton kernels compiled ahead of time for three generations of GPUs; no GPU is needed.

What is compiled is what the launchers launch: a launch is recorded instead of run, its arguments become the signature.
``pytest -s`` prints registers and spills.
"""

import os
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qatkernels as qk
from qatkernels.dtypes import dtype_name
from qatkernels.ops._op import OPS
from qatkernels.testing import checks
from qatkernels.testing.products import Case, activations, scaled_weight
from qatkernels.testing.samples import make

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

pytest.importorskip("bench", reason="not in a checkout")

from bench.kernels.ahead import (  # noqa: E402
    compiled,
    intermediate,
    recorded,
    recorded_launches,
    resources,
    specialized,
)  # fmt: skip
from qatkernels.backends import IMPLS  # noqa: E402

ARCHITECTURES = (80, 90, 100)


def family(op, *args, **kwargs):
    sample = make(*args, **kwargs)
    return op, sample.args(op)


def of_logits(op, dtype, *first):
    """Arguments of an op of cross_entropy.py at [64, 32000]; ``first`` says what comes before the logits."""
    logits, numbers = torch.zeros(64, 32000, dtype=dtype), torch.zeros(64)
    before = [{"tangent": logits, "number": numbers}.get(name) for name in first]
    return op, (
        *before,
        logits,
        *([numbers] if op != "cross_entropy" else []),
        torch.zeros(64, dtype=torch.int64),
        -100,
    )


def grouped(op, tokens, dtype=torch.bfloat16):
    """Arguments of a product of tokens with the weights of eight experts."""
    x, w = torch.zeros(tokens, 1024, dtype=dtype), torch.zeros(8, 1024, 1024, dtype=dtype)
    return op, (x, x if op == "grouped_outer" else w, torch.zeros(8, dtype=torch.int32))


MATRIX, FACTOR = torch.zeros(64, 4096), torch.tensor(0.5)
CASES = {
    "forward-fp32-row": family("fake_quantize", qk.grids.seq(2), (64, 4096)),
    "forward-bf16-row": family("fake_quantize", qk.grids.lsq(4), (64, 4096), torch.bfloat16),
    "forward-binary": family("fake_quantize", qk.grids.binary(), (64, 4096), torch.bfloat16),
    "forward-fp32-to-bf16-group": family(
        "fake_quantize", qk.grids.affine(4), (64, 4096), granularity=128, out_dtype=torch.bfloat16
    ),
    "forward-noise": family("fake_quantize", qk.grids.seq(2), (64, 4096), noise=True),
    "forward-odd-noise": family("fake_quantize", qk.grids.ternary(), (64, 1001), torch.float16, noise=True),
    "backward-fp32-row": family("fake_quantize_backward", qk.grids.seq(2), (64, 4096)),
    "backward-bf16-row": family("fake_quantize_backward", qk.grids.lsq(4), (64, 4096), torch.bfloat16),
    "backward-bf16-long": family("fake_quantize_backward", qk.grids.lsq(4), (4, 65536), torch.bfloat16),
    "backward-group": family("fake_quantize_backward", qk.grids.affine(4), (64, 4096), granularity=32),
    "backward-tensor": family("fake_quantize_backward", qk.grids.lsq(4), (512, 4096), granularity="tensor"),
    "backward-noise": family("fake_quantize_backward", qk.grids.binary(), (64, 4096), noise=True),
    "jvp-fp32-row": family("fake_quantize_jvp", qk.grids.seq(2), (64, 4096)),
    "quantize-fp32-row": family("quantize", qk.grids.lsq(4), (64, 4096)),
    "reset-fp32-row": family("reset_", qk.grids.seq(2), (64, 4096)),
    "reset-bf16-group": family("reset_", qk.grids.affine(4), (64, 4096), torch.bfloat16, 128),
    "perturb-fp32-to-bf16": ("perturb_", (MATRIX.bfloat16(), MATRIX, FACTOR, None)),
    "perturb-swap-asam": ("perturb_swap_", (MATRIX, MATRIX.clone(), FACTOR, 0.01)),
    "norms-asam": ("perturbation_norms", (MATRIX, MATRIX, 0.01)),
    "dynamic-bf16": ("fake_quantize_dynamic", (torch.zeros(64, 4096, dtype=torch.bfloat16), 8)),
    "dual-bf16-row": family("fake_quantize_dual", qk.grids.lsq(4), (64, 4096), torch.bfloat16),
    "cross-entropy-fp32": of_logits("cross_entropy", torch.float32),
    "cross-entropy-bf16": of_logits("cross_entropy", torch.bfloat16),
    "cross-entropy-backward-bf16": of_logits("cross_entropy_backward", torch.bfloat16, "number"),
    "cross-entropy-jvp-fp32": of_logits("cross_entropy_jvp", torch.float32, "tangent"),
    "cross-entropy-hvp-fp32": of_logits("cross_entropy_hvp", torch.float32, "tangent", None, "number"),
    "cross-entropy-dual-bf16": of_logits("cross_entropy_dual", torch.bfloat16, "tangent", "number", "number"),
    "gram-schmidt-fp32": ("gram_schmidt", (torch.zeros(60, 4096), torch.zeros(4096), torch.zeros(60).double())),
    "gram-schmidt-fp32-first": ("gram_schmidt", (torch.zeros(60, 4096), torch.zeros(4096), None)),
    "gram-schmidt-bf16-256": (
        "gram_schmidt", (torch.zeros(256, 4096, dtype=torch.bfloat16), torch.zeros(4096), torch.zeros(256).double())
    ),
    "gram-schmidt-fp64": (
        "gram_schmidt", (torch.zeros(60, 4096).double(), torch.zeros(4096).double(), torch.zeros(60).double())
    ),
    "normal": ("normal", (torch.tensor(3), 65536, 0)),
    "pack": ("pack", (torch.zeros(64, 4096, dtype=torch.int8), -4, 3)),
    "unpack": ("unpack", (torch.zeros(64, 2048, dtype=torch.uint8), -8, 4, 4096)),
}  # fmt: skip
#: Exponentials and logarithms are held to a bound, not to bits.
APPROXIMATE = {case for case in CASES if case.startswith("cross-entropy")}
#: Cases whose rows are aligned: how many weight-sized tensors they read and write, all of it 16 bytes at a time.
WIDE = {
    "forward-fp32-row": (1, 1),
    "forward-bf16-row": (1, 1),
    "backward-fp32-row": (2, 1),
    "backward-bf16-row": (2, 1),
    "backward-bf16-long": (2, 1),
}


def wide_accesses(launch):
    """Return the 16-byte accesses by which a thread of eight warps moves what its program has of one tensor."""
    kernel, arguments = launch[0], launch[1]
    walked = arguments["CHUNK"] // arguments["C"] if "CHUNK" in kernel.arg_names else 1
    return walked * arguments["R"] * arguments["C"] * arguments["w_ptr"].element_size() // 256 // 16


def spelled_out(llir):
    """Return how many scalar fused multiply-adds the calls in LLVM's representation make; divisions do not call."""
    return sum(int(lanes or 1) for lanes in re.findall(r"call [^@\n]*@llvm\.fma\.(?:v(\d+))?f(?:32|64)", llir))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_aot(case, architecture):
    launch, *_ = launches = recorded_launches(*CASES[case])
    for each in launches:
        kernel = compiled(each, architecture)
        registers, stack, local = resources(kernel.asm["cubin"])
        print(f"{case} sm_{architecture}: {registers} registers, {stack} bytes of stack, {local} of local memory")
        assert (stack, local) == (0, 0), "registers are spilled"
    kernel = compiled(launch, architecture)
    ptx = kernel.asm["ptx"]
    if case in APPROXIMATE:
        return
    assert "div.full" not in ptx, "an approximate division"
    assert "sqrt.approx" not in ptx, "an approximate square root"
    fused = sum(int(lanes or 1) for lanes in re.findall(r"fma\.rn\.f(?:32|64)(?:x(\d))?", ptx))
    asked = spelled_out(kernel.asm["llir"])
    assert fused == asked + kernel.asm["llir"].count("fma.rn.f32"), "a fused multiply-add that no kernel asked for"
    assert bool(asked) == ("noise" in case or case == "normal")
    if case in WIDE:
        for access, tensors in zip(("ld", "st"), WIDE[case], strict=True):
            found = re.findall(rf"{access}\.global[\w.:]*\.v4\.b32", ptx)
            assert len(found) == tensors * wide_accesses(launch)


class Recorded(Exception):
    """Ends a check once the launches are known: nothing was computed that it could compare."""


def launches_of(check):
    """Return the launches of a check's first call."""
    found = []

    def record(*args):
        found.extend(recorded(lambda: IMPLS[f"{check.op}_out" if OPS[check.op].outputs else check.op]["triton"](*args)))
        raise Recorded

    with pytest.raises(Recorded):
        check.run(record)
    return found


#: The checks of every op, in the dtypes that they leave out.
CHECKS = [
    check
    for dtype in (torch.float64, torch.float16)
    for part in (checks.family, checks.of_rows, checks.in_place, checks.products, checks.experts)
    for check in part(torch.device("cpu"), dtype, (5, 1500), dtype_name(dtype))
    if "triton" in IMPLS[check.op] and not (check.op == "gram_schmidt" and dtype == torch.float16)  # no such basis
]


@pytest.mark.parametrize("op", sorted({check.op for check in CHECKS}))
def test_types(op):
    """Every kernel that the checks launch in float64 and float16: Triton also compiles what follows a return."""
    seen = set()
    for launch in (launch for check in CHECKS if check.op == op for launch in launches_of(check)):
        kernel, arguments, options = launch
        key = (kernel.__name__, repr(specialized(kernel, arguments)), repr(sorted(options.items())))
        if key not in seen:
            seen.add(key)
            intermediate(launch, 90)
    assert seen


def product(op, grid, tokens, group, dtype=torch.bfloat16, shape=(256, 1024), offsets=None, **kwargs):
    zero = "any" if grid.has_zero_point else None
    weight = scaled_weight(grid, shape, group, torch.bfloat16, zero)
    ends = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    return op, Case("", weight, activations((tokens, shape[-1]), dtype), None, ends, **kwargs).call(op)[0]


#: What a product leads to, and the matrix instruction that it must be made of on each architecture.
WIDE_MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SMALL_MMA = dict.fromkeys(ARCHITECTURES, "mma.sync")
INTEGER_MMA = WIDE_MMA | {100: "mma.sync"}  # Blackwell's fifth generation has no int8 in Triton
PRODUCTS = {
    "few-row": (product("lowbit_linear", qk.grids.seq(2), 1, None), SMALL_MMA),
    "many-3-row": (product("lowbit_linear", qk.grids.lsq(3), 1001, None), WIDE_MMA),
    "many-zero-group": (product("lowbit_linear", qk.grids.affine(4), 1001, 128), WIDE_MMA),
    "many-integers": (product("lowbit_linear", qk.grids.lsq(4), 1001, 128, act_bits=8), INTEGER_MMA),
    "grouped": (
        product("lowbit_linear", qk.grids.binary(), 701, 32, shape=(2, 256, 512), offsets=[300, 600]),
        WIDE_MMA,
    ),
    "many-6-row": (product("lowbit_linear", qk.grids.lsq(6), 1001, None), WIDE_MMA),
    "some-group": (product("lowbit_linear", qk.grids.lsq(4), 64, 128), WIDE_MMA),
    "few-8-row": (product("lowbit_linear", qk.grids.lsq(8), 1, None), SMALL_MMA),
    "few-5-row": (product("lowbit_linear", qk.grids.lsq(5), 16, None), SMALL_MMA),
    "few-zero-row": (product("lowbit_linear", qk.grids.affine(3), 16, None), SMALL_MMA),
    "some-8-row": (product("lowbit_linear", qk.grids.seq(8), 64, None), WIDE_MMA),
    "few-5-group": (product("lowbit_linear", qk.grids.lsq(5), 16, 32), SMALL_MMA),
    "many-fp32": (product("lowbit_linear", qk.grids.lsq(4), 1001, 128, torch.float32), WIDE_MMA),
    "many-fp32-row": (product("lowbit_linear", qk.grids.affine(4), 1001, None, torch.float32), WIDE_MMA),
    "few-fp32": (product("lowbit_linear", qk.grids.seq(2), 3, None, torch.float32), SMALL_MMA),
    "many-element": (product("lowbit_linear", qk.grids.lsq(4), 1001, 8), None),
    "transposed": (product("lowbit_linear_transposed", qk.grids.lsq(4), 1001, 128), WIDE_MMA),
    "transposed-zero": (
        product("lowbit_linear_transposed", qk.grids.affine(4), 1001, 128, shape=(1024, 1024)),
        WIDE_MMA,
    ),
    "transposed-3": (product("lowbit_linear_transposed", qk.grids.lsq(3), 64, None, shape=(1024, 1024)), WIDE_MMA),
    "transposed-fp32": (product("lowbit_linear_transposed", qk.grids.seq(2), 1001, None, torch.float32), WIDE_MMA),
    "transposed-few": (product("lowbit_linear_transposed", qk.grids.binary(), 1, None), SMALL_MMA),
    "transposed-element": (product("lowbit_linear_transposed", qk.grids.lsq(4), 1001, 8), None),
    # One element of output, whose sum programs share.
    "one": (product("lowbit_linear", qk.grids.lsq(4), 1, None, shape=(1, 1024)), SMALL_MMA),
    "one-grouped": (product("lowbit_linear", qk.grids.lsq(4), 1, None, shape=(1, 1, 1024), offsets=[1]), SMALL_MMA),
    "odd-3": (product("lowbit_linear", qk.grids.lsq(3), 1001, None, shape=(256, 1001)), WIDE_MMA),
    "odd-64": (product("lowbit_linear", qk.grids.lsq(4), 64, None, shape=(256, 1001)), WIDE_MMA),
    "odd-fp32": (product("lowbit_linear", qk.grids.lsq(4), 1001, None, torch.float32, shape=(256, 1001)), WIDE_MMA),
    "odd-transposed": (product("lowbit_linear_transposed", qk.grids.lsq(4), 1001, None, shape=(1001, 256)), WIDE_MMA),
    "odd-group": (product("lowbit_linear", qk.grids.lsq(5), 1001, 33, shape=(256, 1023)), None),
    "odd-bytes": (product("lowbit_linear", qk.grids.lsq(3), 1001, None, shape=(256, 1000)), WIDE_MMA),
    "one-transposed": (product("lowbit_linear_transposed", qk.grids.lsq(4), 1, None, shape=(1024, 1)), SMALL_MMA),
    # Sums of few terms, with codes that are loaded as bytes.
    "short": (product("lowbit_linear", qk.grids.lsq(4), 3, None, shape=(64, 9)), SMALL_MMA),
    "short-fp32": (product("lowbit_linear", qk.grids.ternary(), 3, None, torch.float32, shape=(64, 9)), SMALL_MMA),
    "short-group": (product("lowbit_linear", qk.grids.binary(), 3, 16, shape=(64, 64)), None),
    "short-words": (product("lowbit_linear", qk.grids.seq(2), 3, 16, shape=(64, 64)), SMALL_MMA),
    "short-transposed": (
        product("lowbit_linear_transposed", qk.grids.affine(4), 11, None, shape=(3, 7, 33), offsets=[3, 4, 11]),
        SMALL_MMA,
    ),
}


def check_instruction(ptx, instruction):
    """Check that a kernel uses exactly this matrix instruction, or none."""
    assert "tf32" not in ptx, "a product of rounded float32"
    for other in WIDE_MMA.values():
        assert (other in ptx) == (other == instruction), other


def check_terms(ttgir):
    """Check that operands of ``mma.sync`` have as many terms as the threads hold that share a row: four hold all.

    Triton 3.6 also accepts a layout with more. Its products are wrong, because threads then hold the same terms.
    """
    layouts = dict(re.findall(r"^(#mma\d*) = #ttg.nvidia_mma<{versionMajor = (\d)", ttgir, re.MULTILINE))
    operands = r"tensor<\d+x(\d+)x\w+, #ttg.dot_op<{opIdx = 0, parent = (#mma\d*), kWidth = (\d+)}>>"
    for terms, layout, width in re.findall(operands, ttgir):
        assert layouts[layout] != "2" or 4 * int(width) <= int(terms), f"4 x {width} of {terms} terms"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", PRODUCTS)
def test_products(case, architecture, monkeypatch):
    monkeypatch.setattr("qatkernels.backends.triton.lowbit_linear.capability", lambda device: divmod(architecture, 10))
    monkeypatch.setattr("qatkernels.backends.triton.lowbit_linear.library_serves", lambda *args, **kwargs: False)
    call, instruction = PRODUCTS[case]
    launches = recorded_launches(*call)
    assert len([kernel for kernel, *_ in launches if kernel.__name__.startswith("lowbit")]) == 1
    for launch in launches:
        kernel = compiled(launch, architecture)
        registers, stack, local = resources(kernel.asm["cubin"])
        name = launch[0].__name__
        print(
            f"{case} {name} sm_{architecture}: {registers} registers, {stack} + {local} bytes of stack and local memory"
        )
        assert (stack, local) == (0, 0), f"{name} spills registers"
        if name.startswith("lowbit"):
            check_instruction(kernel.asm["ptx"], (instruction or {}).get(architecture))
            check_terms(kernel.asm["ttgir"])


#: Products of many tokens, which the library multiplies: one slice, and rows whose length is a multiple of 16.
LIBRARY = {
    "codes": product("lowbit_linear", qk.grids.lsq(4), 1024, None),
    "codes-3-zero": product("lowbit_linear", qk.grids.affine(3), 1024, None),
    "integers": product("lowbit_linear", qk.grids.lsq(4), 1024, None, act_bits=8),
    "parts": product("lowbit_linear", qk.grids.lsq(4), 2048, 128),
    "parts-zero": product("lowbit_linear", qk.grids.affine(4), 2048, 32),
    "parts-3": product("lowbit_linear", qk.grids.lsq(3), 2048, 64),
    "parts-element": product("lowbit_linear", qk.grids.lsq(5), 256, 8),
    "parts-integers": product("lowbit_linear", qk.grids.lsq(8), 2048, 128, act_bits=8),
    "transposed": product("lowbit_linear_transposed", qk.grids.lsq(4), 256, None, shape=(1024, 512)),
    "transposed-zero": product("lowbit_linear_transposed", qk.grids.affine(8), 256, 64, shape=(1024, 512)),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", LIBRARY)
def test_products_of_the_library(case, architecture):
    """The kernels before and after it access memory 16 bytes at a time, and spill nothing."""
    launches = {launch[0].__name__: launch for launch in recorded_launches(*LIBRARY[case])}
    assert {"operands_kernel", "finish_kernel"} <= set(launches)
    assert not [name for name in launches if name.startswith("lowbit")]
    for name in ("operands_kernel", "finish_kernel"):
        kernel = compiled(launches[name], architecture)
        registers, stack, local = resources(kernel.asm["cubin"])
        print(
            f"{case} {name} sm_{architecture}: {registers} registers, {stack} + {local} bytes of stack and local memory"
        )
        assert (stack, local) == (0, 0), f"{name} spills registers"
        stores = set(re.findall(r"st\.global[\w.:]*", kernel.asm["ptx"]))
        assert {store[-7:] for store in stores} == {".v4.b32"}


class ShapesOfZeros(TorchDispatchMode):
    """Records the shapes of the tensors of zeros that are made."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.zeros.default:
            self.shapes.append(tuple(args[0]))
        return func(*args, **(kwargs or {}))


def test_warm_up_launches_every_configuration_once():
    """It launches with tokens that are zeros: of 256 features forward, of 64 features transposed."""
    from qatkernels.backends.triton.lowbit_linear import warm_up

    with ShapesOfZeros() as made:
        recorded(lambda: warm_up(scaled_weight(qk.grids.lsq(4), (64, 256), 32), act_bits=8))
    assert len(made.shapes) == len(set(made.shapes))
    assert {(tokens, 256) for tokens in (1, 17, 65)} < set(made.shapes)
    assert {(tokens, 64) for tokens in (1, 17)} < set(made.shapes)
    with ShapesOfZeros() as made:
        recorded(lambda: warm_up(scaled_weight(qk.grids.lsq(4), (2, 64, 256), 32)))
    assert {(tokens, 256) for tokens in (1, 33, 129)} < set(made.shapes)


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("experts", [None, 1, 4])
def test_the_number_of_tokens_is_not_compiled(experts, act_bits, monkeypatch):
    """What `warm_up` compiles is all that any number of tokens needs."""
    from qatkernels.backends.triton import _library
    from qatkernels.backends.triton.lowbit_linear import warm_up

    def keys(launches):
        return {
            (kernel.__name__, repr(specialized(kernel, arguments)), repr(sorted(options.items())))
            for kernel, arguments, options in launches
        }

    # Slices of 512 at 500 tokens and of 256 at 1500: the last shape has one, then two of which the last is odd.
    monkeypatch.setattr(_library, "SLICE_RESULTS", 256 * 1000)
    monkeypatch.setattr(_library, "LEAST_SLICE_BYTES", 1)
    shapes = ((1, 1024, None), (256, 1024, None), (1024, 1, None), (256, 1024, 128), (264, 1032, None))
    for rows, cols, group in shapes if experts is None else shapes[:-1]:
        weight = scaled_weight(qk.grids.lsq(4), (rows, cols) if experts is None else (experts, rows, cols), group)
        warm = keys(recorded(lambda w=weight: warm_up(w, act_bits=act_bits)))
        for tokens in (1, 2, 15, 16, 17, 255, 256, 512, 1024, 1500):
            ends = None if experts is None else torch.full((experts,), tokens, dtype=torch.int32)
            x = torch.zeros(tokens, cols, dtype=torch.bfloat16)
            for op in ("lowbit_linear", "lowbit_linear_transposed"):
                call = Case("", weight, x, None, ends, act_bits).call(op)[0]
                missing = keys(recorded_launches(op, call)) - warm
                assert not missing, f"{op} of {tokens} tokens with {rows}x{cols}: {missing}"


#: Products by expert, as above. float64 has an instruction of its own before Blackwell.
DOUBLE_MMA = {80: "mma.sync", 90: "mma.sync"}
EXPERTS = {
    "few": (grouped("grouped_linear", 64), SMALL_MMA),
    "some": (grouped("grouped_linear", 1024), WIDE_MMA),
    "many": (grouped("grouped_linear", 4096), WIDE_MMA),
    "transposed-few": (grouped("grouped_linear_transposed", 64), SMALL_MMA),
    "transposed-fp16": (grouped("grouped_linear_transposed", 4096, torch.float16), WIDE_MMA),
    "outer": (grouped("grouped_outer", 1024), WIDE_MMA),
    "outer-fp16": (grouped("grouped_outer", 64, torch.float16), WIDE_MMA),
} | {
    f"{op}-{dtype_name(dtype)}": (grouped(op, 1024, dtype), instruction)
    for op in ("grouped_linear", "grouped_linear_transposed", "grouped_outer")
    for dtype, instruction in ((torch.float32, None), (torch.float64, DOUBLE_MMA))
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", EXPERTS)
def test_experts(case, architecture):
    call, instruction = EXPERTS[case]
    (launch,) = recorded_launches(*call)
    kernel = compiled(launch, architecture)
    registers, stack, local = resources(kernel.asm["cubin"])
    print(f"{case} sm_{architecture}: {registers} registers, {stack} + {local} bytes of stack and local memory")
    assert (stack, local) == (0, 0), "registers are spilled"
    check_instruction(kernel.asm["ptx"], (instruction or {}).get(architecture))
