"""The machine code of the Triton kernels is counted right, and the docs hold what the results say."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="not in a checkout")

from bench.kernels import sass, table  # noqa: E402
from bench.markdown import block  # noqa: E402

TEXT = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;    /* 0x00000a00ff017b82 */
        /*0020*/                   FFMA R8, R4, R5, R8 ;               /* 0x00000a00ff017b82 */
        /*0030*/               @P1 BRA 0x20 ;                          /* 0x00000a00ff017b82 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR6][R2.64], P0 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   I2FP.F32.U32 R9, R9 ;
        /*0070*/                   I2F.U8 R9, R9 ;
        /*0080*/              @!P2 BRA 0x10 ;                          /* 0x00000a00ff017b82 */
        /*0090*/              @!P2 BRA 0x40 ;                          /* 0x00000a00ff017b82 */
        /*00a0*/                   LDG.E.U8 R4, desc[UR6][R2.64] ;
        /*00b0*/                   STG.E.64 desc[UR6][R2.64], R4 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
        /*00e0*/                   NOP;
"""


def test_instructions_are_counted():
    code = sass.parsed(TEXT)
    assert [i.address for i in code] == list(range(0, 0xD0, 0x10))
    found = sass.counts(code)
    assert found["instructions"] == 13
    assert found["loads"] == {"1": 1, "16": 1}
    assert found["copies"] == {"16": 1}
    assert found["stores"] == {"8": 1}
    assert (found["matrix"], found["fma"], found["branch"]) == (1, 1, 3)


def test_the_loop_is_the_innermost_with_the_products():
    code = sass.parsed(TEXT)
    assert [[body[0].address, body[-1].address] for body in sass.loops(code)] == [[0x20, 0x30], [0x40, 0x90]]
    assert sass.hot(code)[0].name.startswith("LDGSTS")
    assert sass.hot(code[:3]) == code[:3]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(32, 0, 8, 8), (33, 0, 8, 6), (64, 0, 8, 4), (128, 0, 8, 2), (129, 0, 8, 1), (255, 0, 4, 2), (16, 0, 1, 32),
     (32, 113 * 1024, 4, 2), (32, 114 * 1024, 4, 1), (40, 0, 4, 12)],
)  # fmt: skip
def test_resident_blocks(registers, shared, warps, blocks):
    """As the occupancy calculator has them for compute capability 9.0."""
    assert sass.resident(registers, shared, warps, 90) == blocks


def test_the_docs_hold_what_the_results_say():
    """`python -m bench.kernels docs` makes them."""
    assert block(table.BEGIN, table.END, table.render(table.RESULTS)) in table.DOCS.read_text()


def test_a_case_is_measured():
    pytest.importorskip("triton")
    from bench.kernels.__main__ import measured

    found = measured("product, 4 bits, 1 tokens")
    assert found["kernel"] == "lowbit_linear_kernel"
    assert found["stack"] == 0
    assert found["loop"]["matrix"] > 0
    assert found["all"]["instructions"] > found["loop"]["instructions"]
