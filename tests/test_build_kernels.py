"""What is read out of a build, its machine code and what that was made of."""

import pytest

from build_kernels import overwritten, unset


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


LOOP = """
    %x = ttg.local_alloc : () -> !ttg.memdesc<{places}x64x16xbf16, #shared, #smem, mutable>
    %w = ttg.local_alloc : () -> !ttg.memdesc<3x64x64xbf16, #shared, #smem, mutable>
    %x_1 = ttg.memdesc_index %x[%c0_i32] : !ttg.memdesc<{places}x64x16xbf16> -> !ttg.memdesc<64x16xbf16>
    %y:2 = scf.for %i = %c0_i32 to %c192_i32 step %c64_i32 iter_args(%a = %zeros) -> (tensor<64x16xf32>) {{
      %x_2 = ttg.memdesc_index %x[%i] : !ttg.memdesc<{places}x64x16xbf16> -> !ttg.memdesc<64x16xbf16>
      %w_1 = ttg.memdesc_index %w[%i] : !ttg.memdesc<3x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %b = ttng.warp_group_dot %w_1, %x_2, %a {{inputPrecision = 0 : i32, isAsync = true}} : tensor<64x16xf32, #mma>
      %c = ttng.warp_group_dot_wait %b {{pendings = {under_way} : i32}} : tensor<64x16xf32, #mma>
      %d = ttg.async_copy_global_to_local %ptrs, %x_1 mask %mask : tensor<64x16x!tt.ptr<bf16>> -> <64x16xbf16>
      scf.yield %c : tensor<64x16xf32>
    }}
"""


@pytest.mark.parametrize(("places", "under_way", "found"), [(1, 0, 0), (1, 1, 1), (2, 1, 0), (2, 2, 1)])
def test_buffers_that_are_filled_while_they_are_read(places, under_way, found):
    # As Triton 3.6 left the backward of gather_latents where images have several blocks: two runs were not equal.
    expected = [f"%x: {places} of it, {under_way} of 1 products under way"] * found
    assert overwritten(LOOP.format(places=places, under_way=under_way)) == expected
