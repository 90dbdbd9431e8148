"""Products with packed weights by tiles: those of AMX, and loops that do the same on other machines."""

import os
import subprocess
import sys

import pytest
import torch

import qatkernels as qk
from qatkernels.backends import IMPLS, extension
from qatkernels.testing.compare import assert_same_bits, assert_within, run_out
from qatkernels.testing.products import Case, activations, replaced, scaled_weight
from tests.isas import TILED, using

pytestmark = pytest.mark.skipif(not TILED, reason="no ISA of this machine and build has tiles")

#: Groups that are multiples of a step of tiles, of half a step, and neither; 768 is cut where codes are decoded.
GROUPS = [None, 768, 128, 64, 32, 16, 24]
GRIDS = [qk.grids.binary(), qk.grids.ternary(), *map(qk.grids.lsq, (3, 4, 5, 6, 7)), qk.grids.affine(8)]
#: Tokens: the fewest of tiles by kind of activations, a tile, two of them, and more; none of the rest divides evenly.
TOKENS = (3, 4, 7, 8, 12, 16, 19, 32, 33, 70)


def product(name, args):
    with using(name):
        return run_out("lowbit_linear", IMPLS["lowbit_linear_out"]["cpp"], args)[0]


def calls(grid, group, dtype, act_bits):
    weight = scaled_weight(grid, (45, 1536), group, zero="any" if grid.has_zero_point else None)
    for tokens in TOKENS:
        x = activations((tokens, 1536), dtype)
        yield f"{tokens} tokens", Case("", weight, x, act_bits=act_bits).call("lowbit_linear")


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
def test_integers(grid, group, name):
    isa, others = name.partition("+")[0], 0
    for dtype, act_bits in ((torch.float32, 8), (torch.float32, None), (torch.float16, None)):
        for title, (args, expected, bound) in calls(grid, group, dtype, act_bits):
            actual = product(name, args)
            assert_within(actual, expected, bound, title)
            # Loops add the same integers as AMX.
            assert_same_bits(actual, product(f"{isa}+portable", args), title)
            # Without tiles scales are applied elsewhere, and sums are rounded differently. So tiles were used.
            others += not torch.equal(actual, product(isa, args))
    assert others > 0 or group in (16, 24)  # neither is whole half tiles of int8


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.scheme}{g.bits}")
def test_bfloat16(grid, group, name):
    for title, (args, expected, bound) in calls(grid, group, torch.bfloat16, None):
        assert_within(product(name, args), expected, bound, title)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("grid", [qk.grids.binary(), qk.grids.lsq(4)], ids=lambda g: f"{g.scheme}{g.bits}")
def test_an_outlier_of_bfloat16_hides_nothing(grid, name):
    """Whatever the number of tokens, bfloat16 activations are not turned into integers, as float32 ones are."""
    if not name.startswith("avx512_bf16"):
        pytest.skip("products without tiles turn them into integers on this ISA")
    weight = scaled_weight(grid, (9, 64), 32)
    scale = weight.scale.clone()
    scale[:, 0] = 1e-5
    weight = replaced(weight, scale=scale)
    for tokens in range(1, 17):
        x = activations((tokens, 64), torch.bfloat16)
        x[:, 0] = 2.0**20
        args, expected, bound = Case("", weight, x).call("lowbit_linear")
        assert_within(product(name, args), expected, bound, f"{tokens} tokens")


@pytest.mark.parametrize("name", TILED)
def test_more_columns_than_a_sum_of_integers_holds(name):
    cols = 140_032
    weight = scaled_weight(qk.grids.lsq(8), (3, cols), None)
    weight = replaced(weight, packed=torch.zeros_like(weight.packed))  # the lowest code, -128, everywhere
    x = torch.full((9, cols), 3.0)  # which become 127
    args, expected, bound = Case("", weight, x, act_bits=8).call("lowbit_linear")
    assert_within(product(name, args), expected, bound)


def test_names():
    with pytest.raises(ValueError, match="tiles is 'mmx', must be 'none', 'portable' or 'amx'"):
        extension().use_tiles("mmx")


def tiles_with(value):
    code = "from qatkernels.backends import extension; print(extension().build_info()['tiles'])"
    environment = {**os.environ, "QATKERNELS_AMX": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr


def test_the_environment_turns_amx_off():
    best = "amx" if any(name.endswith("+amx") for name in TILED) else "none"
    assert [tiles_with(value) for value in ("", "1", "0")] == [best, best, "none"]
    assert "QATKERNELS_AMX is 'off', must be 0" in tiles_with("off")
