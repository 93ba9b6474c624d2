"""What is read out of the machine code of a build."""

import pytest

from build_kernels import unset


@pytest.mark.parametrize(
    ("sass", "expected"),
    [
        # As ptxas 12.8 left the descriptors of gather_latents at 96 channels.
        ("UMOV UR11, 0xc0000010 ;/*0010*/ UIADD3 UR6, UP0, UR16, 0x20, URZ ;", ["UR16"]),
        ("@UP0 ULDC.64 UR8, c[0x0][0x208] ;/*0010*/ @!P0 LDG.E R8, desc[UR8][R10.64] ;", []),
        ("ULDC UR8, c[0x0][0x208] ;/*0010*/ LDG.E R8, desc[UR8][R10.64] ;", ["UR9"]),
        ("UIADD3 UR6, UR7, UR4, URZ ;/*0010*/ UMOV UR7, 0x1 ;/*0020*/ UMOV UR4, 0x1 ;", ["UR4", "UR7"]),
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;", ["UR8", "UR9", "UR10", "UR11"]),
        ("HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;", ["UR10", "UR11"]),
        ("S2UR UR4, SR_CTAID.X ;/*0010*/ UIMAD.WIDE.U32 UR6, UR4, UR4, URZ ;/*0020*/ IMAD R2, R0, UR7, RZ ;", []),
    ],
)
def test_registers_that_nothing_sets(sass, expected):
    assert [found.partition(":")[0] for found in unset(f"/*0000*/ {sass}")] == expected
