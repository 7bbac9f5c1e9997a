"""The native path: the product of MX operands by tensor cores that take their scales. Imports Triton."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import gpu
from ..formats import ElementFormat
from ..tune import MatmulConfig, Problem, find_config
from .launch import Launch
from .matmul_kernel import store_product
from .native_operand import NativeOperand, torch_dtype
from .primitives import ceil_div
from .tiles import grouped_tile


@triton.jit
def matmul_native_kernel(
    a, b, a_scale, b_scale, bias_ptr, guard_ptr, out_ptr, M, N, K,
    A_ELEMENT: tl.constexpr, B_ELEMENT: tl.constexpr, SWIZZLED: tl.constexpr, CONFIG: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    """`out[M, N] = A[M, K] B[N, K]^T` with a scale for each 32 of K. Each program makes tile after tile.

    If SWIZZLED, `a`, `b` and their scales are descriptors, else pointers; `bias_ptr` is None or N values,
    `guard_ptr` None or one int32: if that is 0, nothing is done.
    """
    BLOCK_M: tl.constexpr = CONFIG.block_m
    BLOCK_N: tl.constexpr = CONFIG.block_n
    BLOCK_K: tl.constexpr = CONFIG.block_k
    A_NAME: tl.constexpr = A_ELEMENT.name
    B_NAME: tl.constexpr = B_ELEMENT.name
    tiles_m = ceil_div(M, BLOCK_M)
    tiles_n = ceil_div(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    if guard_ptr is not None:
        tiles = tl.where(tl.load(guard_ptr) == 0, 0, tiles)
    # flatten=True would overlap a tile's end with the next one's start, but Triton 3.6 to 3.9 compile it to a trap.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, CONFIG.group_m)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in tl.range(ceil_div(K, BLOCK_K)):
            a_codes = load_codes(a, tile_m, step, M, K, BLOCK_M, BLOCK_K, A_ELEMENT, SWIZZLED)
            b_codes = load_codes(b, tile_n, step, N, K, BLOCK_N, BLOCK_K, B_ELEMENT, SWIZZLED)
            a_scales = load_scales(a_scale, tile_m, step, M, K, BLOCK_M, BLOCK_K, SWIZZLED)
            b_scales = load_scales(b_scale, tile_n, step, N, K, BLOCK_N, BLOCK_K, SWIZZLED)
            total = tl.dot_scaled(a_codes, a_scales, A_NAME, tl.trans(b_codes), b_scales, B_NAME, total)
        if SWIZZLED and BLOCK_N > 128:
            # By quarters, out of tensor memory, since all at once needs more registers than there are.
            left, right = halves(total)
            for half in tl.static_range(2):
                first, second = halves(right if half else left)
                quarter = tile_n * 4 + half * 2
                store_product(first, tile_m, quarter, bias_ptr, out_ptr, M, N, None, GPU)
                store_product(second, tile_m, quarter + 1, bias_ptr, out_ptr, M, N, None, GPU)
        else:
            store_product(total, tile_m, tile_n, bias_ptr, out_ptr, M, N, None, GPU)


@triton.jit
def halves(x):
    """`[R, 2 C]` to its left and right columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def load_codes(
    source, tile, step, rows, K,
    ROWS: tl.constexpr, COLS: tl.constexpr, ELEMENT: tl.constexpr, SWIZZLED: tl.constexpr,
):  # fmt: skip
    """`[ROWS, COLS]` elements, of e2m1 two to a byte: zeros beyond K, anything beyond `rows`."""
    PACKED: tl.constexpr = 8 // ELEMENT.bits
    BYTES: tl.constexpr = COLS // PACKED
    if SWIZZLED:
        return source.load([tile * ROWS, step * BYTES])
    else:
        ZERO: tl.constexpr = 0 if PACKED == 2 else 0.0
        row_bytes = tl.multiple_of(K // PACKED, 64)
        row = tl.minimum(tile * ROWS + tl.arange(0, ROWS), rows - 1)[:, None]
        byte = step * BYTES + tl.arange(0, BYTES)[None, :]
        return tl.load(source + (row.to(tl.int64) * row_bytes + byte), mask=byte < row_bytes, other=ZERO)


@triton.jit
def load_scales(source, tile, step, rows, K, ROWS: tl.constexpr, COLS: tl.constexpr, SWIZZLED: tl.constexpr):
    """Their scales, `[ROWS, COLS / 32]`. In this form Triton copies swizzled ones to tensor memory as they are."""
    if SWIZZLED:
        DOWN: tl.constexpr = ROWS // 128
        ACROSS: tl.constexpr = COLS // 128
        tiles = source.load([0, tile * DOWN, step * ACROSS, 0, 0])
        tiles = tl.reshape(tiles, [DOWN, ACROSS, 32, 4, 4])
        return tl.reshape(tl.permute(tiles, [0, 3, 2, 1, 4]), [ROWS, COLS // 32])
    else:
        row_scales = tl.multiple_of(K // 32, 4)
        row = tl.minimum(tile * ROWS + tl.arange(0, ROWS), rows - 1)[:, None]
        col = step * (COLS // 32) + tl.arange(0, COLS // 32)[None, :]
        return tl.load(source + (row.to(tl.int64) * row_scales + col), mask=col < row_scales, other=0)


def native_config(a: ElementFormat, b: ElementFormat, swizzled: bool, shared_bytes: int) -> MatmulConfig:
    """For elements on a GPU whose programs have `shared_bytes` of shared memory (asked only if `swizzled`): the
    largest tiles that fit and spill nothing. It has not been measured."""
    block_k = 256 if a.bits == b.bits == 4 else 128
    if not swizzled:
        return MatmulConfig(128, 256, block_k, 8, 2)
    stage = (128 + 256) * (128 + block_k // 32)  # rows of codes and of scales
    if shared_bytes < 4 * stage + 1024:  # and barriers
        return MatmulConfig(128, 128, block_k, 8, 3)
    return MatmulConfig(128, 256, block_k, 8, 4)


def matmul_native_launch(
    a: NativeOperand,
    b: NativeOperand,
    bias: torch.Tensor | None,
    guard: torch.Tensor | None,
    out: torch.Tensor,
    config: MatmulConfig | None = None,
    capabilities: gpu.Capabilities | None = None,
    processors: int | None = None,
) -> Launch:
    """The launch that writes `out` `[M, N]` from a `[M, K]` and b `[N, K]`; a program for each of the GPU's
    `processors`.

    Raises:
        ValueError: the operands' reductions or layouts of scales differ.
    """
    if (a.k, a.swizzled) != (b.k, b.swizzled):
        raise ValueError(f"a is {a.k} long and b {b.k}, swizzled {a.swizzled} and {b.swizzled}; allowed: the same")
    if config is None or processors is None:
        device = torch.cuda.get_device_properties(out.device)
        shared_bytes = getattr(device, "shared_memory_per_block_optin", 0)  # lacking on ROCm, which does not ask
        if config is None:
            layout = "swizzled" if a.swizzled else "plain"
            problem = Problem.of("native", f"{a.element.name} * {b.element.name}", out.dtype, layout, *out.shape, a.k)
            rule = partial(native_config, a.element, b.element, a.swizzled, shared_bytes)
            config = find_config(problem, out.device, rule).config
        processors = processors or device.multi_processor_count
    tiles = triton.cdiv(a.rows, config.block_m) * triton.cdiv(b.rows, config.block_n)
    a_codes, a_scale = _arguments(a, config.block_m, config.block_k)
    b_codes, b_scale = _arguments(b, config.block_n, config.block_k)
    return Launch(
        matmul_native_kernel,
        min(tiles, processors),
        {
            "a": a_codes,
            "b": b_codes,
            "a_scale": a_scale,
            "b_scale": b_scale,
            "bias_ptr": bias,
            "guard_ptr": guard,
            "out_ptr": out,
        },
        {
            "M": a.rows,
            "N": b.rows,
            "K": a.k,
            "A_ELEMENT": a.element,
            "B_ELEMENT": b.element,
            "SWIZZLED": a.swizzled,
            "CONFIG": config,
            "GPU": capabilities or gpu.device_capabilities(out.device),
        },
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def _arguments(operand: NativeOperand, rows: int, cols: int) -> tuple[torch.Tensor | TensorDescriptor, ...]:
    """An operand's codes and scales as the kernel loads `rows` x `cols` elements of it."""
    codes = operand.codes.view(torch_dtype(operand.element))
    if not operand.swizzled:
        return codes, operand.scale
    down, across, _ = operand.scale.shape
    # A tile's 512 bytes in two: a side of what a descriptor loads has at most 256.
    scale = operand.scale.view(1, down, across, 2, 256)
    return (
        TensorDescriptor.from_tensor(codes, [rows, cols * operand.element.bits // 8]),
        TensorDescriptor.from_tensor(scale, [1, rows // 128, cols // 128, 2, 256]),
    )
