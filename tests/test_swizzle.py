"""The scale layout of block-scaled tensor cores: against its formula, back again, and as torch takes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mxkernels.swizzle import swizzle, unswizzle

sides = st.tuples(st.integers(1, 300), st.integers(1, 13))


def random_scale(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    return torch.randint(1, 256, (rows, cols), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (32, 4), (128, 4), (129, 5), (200, 11), (384, 8)])
def test_is_the_formula(rows: int, cols: int) -> None:
    """Byte by byte: the tile, then the place in its 512 bytes; what no scale fills is 0."""
    scale = random_scale(rows, cols)
    tiles_across = (cols + 3) // 4
    expected = [0] * ((rows + 127) // 128 * tiles_across * 512)
    for row in range(rows):
        for col in range(cols):
            tile = row // 128 * tiles_across + col // 4
            expected[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + col % 4] = int(scale[row, col])
    assert swizzle(scale).flatten().tolist() == expected


@given(sides)
def test_round_trip(shape: tuple[int, int]) -> None:
    scale = random_scale(*shape)
    swizzled = swizzle(scale)
    assert swizzled.is_contiguous()
    assert swizzled.shape == ((shape[0] + 127) // 128, (shape[1] + 3) // 4, 512)
    assert torch.equal(unswizzle(swizzled, *shape), scale)
    assert torch.equal(unswizzle(swizzled.flatten(), *shape), scale)


def test_takes_any_strides() -> None:
    scale = random_scale(70, 130)
    assert torch.equal(swizzle(scale.T), swizzle(scale.T.contiguous()))


def test_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="512 elements; 129 x 4 scales have 1024"):
        unswizzle(torch.zeros(512, dtype=torch.uint8), 129, 4)


@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 128), (100, 80, 96), (1, 16, 32)])
def test_torch_takes_it(m: int, n: int, k: int) -> None:
    """What torch checks of a scale before it calls cuBLAS, which needs no GPU."""
    if torch.version.hip:
        pytest.skip("torch for ROCm wants the scales row by row")

    def scale(rows: int) -> torch.Tensor:
        return swizzle(random_scale(rows, k // 32)).flatten().view(torch.float8_e8m0fnu).to("meta")

    a = torch.empty((m, k), dtype=torch.float8_e4m3fn, device="meta")
    b = torch.empty((n, k), dtype=torch.float8_e4m3fn, device="meta")
    recipe, layout = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
    out = F.scaled_mm(a, b.T, scale(m), recipe, scale(n), recipe, layout, layout, output_dtype=torch.bfloat16)
    assert out.shape == (m, n)
