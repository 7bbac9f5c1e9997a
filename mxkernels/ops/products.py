"""The launches of matrix products, path by path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .. import gpu
from ..folded import Outside, folded_spec, window
from ..spec import MXSpec
from ..tune import MatmulConfig, Problem, find_config, guarded_matmul_config, quantize_fold_config
from .correction import correction_columns
from .native_operand import native_operand
from .operand import Operand, carrier_dtype, padded
from .paths import carrier_choice, decodes_apart, decoding_choice, native_folds, streaming_choice, streams_weights
from .plan import Plan

if TYPE_CHECKING:
    from .launch import Launch
    from .matmul_wide_kernel import WideOperand


def plan_product(
    plan: Plan, a: Operand, b: Operand, k: int, bias: torch.Tensor | None, dtype: torch.dtype, path: str
) -> torch.Tensor:
    """Run a product, recording it. `path` is one that does not refuse the operands."""
    out = plan.buffer(a.rows, b.rows, dtype=dtype)
    if path == "fp8":
        _plan_fp8(plan, a, b, k, bias, out)
    else:
        _plan_wide(plan, a, b, k, bias, out)
    return out


def _plan_fp8(plan: Plan, a: Operand, b: Operand, k: int, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    folded = [operand if operand.folded else plan_fold(plan, operand.without_offset(), k) for operand in (a, b)]
    addend = everything = None
    if not (a.symmetric and b.symmetric):
        everything = plan.buffer(1, dtype=torch.int32, zero=True)
        addend = _plan_correction(plan, a, b, k, everything)
    a_reference, b_reference = (operand.parts[2] for operand in folded)
    a_codes, b_codes = (operand.parts[0] for operand in folded)
    a_rows, b_rows = (operand.spec.block.rows for operand in folded if operand.spec)
    references = (a_reference, b_reference)
    plan.launch(carrier_launch(a_codes, b_codes, k, references, (a_rows, b_rows), bias, out, addend=addend))
    sides = [wide_operand(part if whole.symmetric else whole, part) for whole, part in zip((a, b), folded, strict=True)]
    plan.launch(guarded_launch(sides, k, bias, out, everything))


def _plan_correction(plan: Plan, a: Operand, b: Operand, k: int, outside: torch.Tensor) -> torch.Tensor:
    """What offsets add to the product of the elements, fp32: see `correction`."""
    from .correction_kernel import correction_launch
    from .matmul_kernel import addend_shape

    carriers = []
    for operand, columns in zip((a, b), correction_columns(a, b, k), strict=True):
        carriers.append(plan.buffer(operand.rows, columns.padded(k), dtype=torch.float32))
        plan.launch(correction_launch(wide_operand(operand), k, columns, carriers[-1], outside))
    addend = plan.buffer(*addend_shape(a.rows, b.rows), dtype=torch.float32)
    plan.launch(carrier_launch(carriers[0], carriers[1], columns.count(k), None, (1, 1), None, addend))
    return addend


def carrier_launch(
    a: torch.Tensor,
    b: torch.Tensor,
    k: int,
    references: tuple[torch.Tensor, torch.Tensor] | None,
    rows_per_reference: tuple[int, int],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    turned: tuple[bool, bool] = (False, False),
    addend: torch.Tensor | None = None,
) -> Launch:
    """The launch of the kernel for carriers that suits the GPU: see `matmul_kernel`."""
    from .matmul_kernel import matmul_launch

    m, n = out.shape
    config = carrier_choice(m, n, k, (a.dtype, b.dtype), out.dtype, out.device, turned).config
    if isinstance(config, MatmulConfig):
        return matmul_launch(a, b, k, references, rows_per_reference, bias, out, config, turned, addend)
    from .matmul_hopper_kernel import hopper_matmul_launch

    return hopper_matmul_launch(a, b, k, references, rows_per_reference, bias, out, config, addend=addend)


def plan_fold(plan: Plan, operand: Operand, k: int) -> Operand:
    """Fold a packed operand: E5M2 or E4M3 codes, `[rows, k]` and more, in rows of whole 16 bytes."""
    assert operand.spec is not None
    after = folded_spec(operand.spec.T if operand.turned else operand.spec)
    assert after is not None
    folded = Operand(make_folded(plan, after, operand.rows, k), operand.rows, after, folded=True)
    fold_into(plan, operand, k, folded)
    return folded


def make_folded(plan: Plan, spec: MXSpec, rows: int, k: int, zero: bool = False) -> list[torch.Tensor]:
    """Buffers for codes, scale, reference, outside, which is `zero` if need be, and the rows that are outside."""
    blocks = spec.scale_shape(rows, k)
    return [
        plan.buffer(rows, padded(k), dtype=carrier_dtype(spec, plan.device)),
        plan.buffer(*blocks, dtype=torch.uint8),
        plan.buffer(blocks[0], dtype=torch.uint8),
        plan.buffer(1, dtype=torch.int32, zero=zero),
        plan.buffer(blocks[0], dtype=torch.uint8),
    ]


def fold_into(plan: Plan, operand: Operand, k: int, folded: Operand) -> None:
    """The launches that fold a packed operand into buffers."""
    from .fold_kernel import fold_launch, reference_launch, reference_spans

    spec = operand.spec
    assert spec is not None
    found = window(spec.element)
    assert found is not None
    codes, scale, reference_bytes, *flags = folded.parts
    outside = Outside(*flags)
    scales = operand.parts[1]
    if operand.turned:  # its lines run down the columns, too few of them to occupy a GPU
        spans = reference_spans(scales.shape[0])
        spanned = plan.buffer(spans, reference_bytes.shape[0], dtype=torch.uint8)
        plan.launch(reference_launch(scales, spanned, 0, True, spans))
        scales = spanned
    plan.launch(reference_launch(scales, reference_bytes, found.top, operand.turned, outside=outside))
    stored_cols = operand.rows if operand.turned else k
    plan.launch(
        fold_launch(
            operand.parts[0], operand.parts[1], stored_cols, spec, operand.turned, found,
            reference_bytes, codes, scale, outside,
        )
    )  # fmt: skip


def _plan_wide(plan: Plan, a: Operand, b: Operand, k: int, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Few rows of activations: decode the weights in registers. Else decode each side to bf16 once, where it
    lies as the tensor cores' loads need it, or else as it is needed."""
    if streams_weights(a, b):
        _plan_streaming(plan, a, b, k, bias, out)
        return
    if not all(decodes_apart(side, k) for side in (a, b)):
        _plan_decoding(plan, a, b, k, bias, out)
        return
    fits_bf16 = a.fits_bf16 and b.fits_bf16
    lost = None if fits_bf16 else plan.buffer(1, dtype=torch.int32, zero=True)
    carriers = [plan_bf16(plan, side, k, lost) for side in (a, b)]
    plan.launch(carrier_launch(carriers[0], carriers[1], k, None, (1, 1), bias, out, (a.turned, b.turned)))
    if lost is not None:
        plan.launch(decoding_launch(a, b, k, bias, out, lost, exact=True))


def _plan_streaming(plan: Plan, a: Operand, b: Operand, k: int, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    from .matmul_small_kernel import matmul_small_launches

    assert b.spec is not None
    config = streaming_choice(a, b, k, out.dtype, plan.device).config
    partial = plan.buffer(config.splits, a.rows, b.rows, dtype=torch.float32)
    for launch in matmul_small_launches(
        a.parts[0], b.parts[0], b.parts[1], b.spec, bias, partial, out, config, added=b.added
    ):
        plan.launch(launch)


def plan_bf16(plan: Plan, operand: Operand, k: int, lost: torch.Tensor | None) -> torch.Tensor:
    """A side decoded to bf16, `[rows, k]` or, if turned, `[k, rows]`."""
    from .dequantize_kernel import dequantize_launch

    if operand.spec is None:
        return operand.parts[0]
    shape = (k, operand.rows) if operand.turned else (operand.rows, k)
    out = plan.buffer(*shape, dtype=torch.bfloat16)
    lost = None if operand.fits_bf16 else lost
    plan.launch(dequantize_launch(operand.parts[0], operand.parts[1], None, operand.spec, out, lost=lost))
    return out


def plan_quantize_fold(plan: Plan, x: torch.Tensor, spec: MXSpec, seed: torch.Tensor | None) -> list[torch.Tensor]:
    """Quantise a matrix and fold it along its rows: by one kernel if these are contiguous and elements have 4 bits.
    Codes, scale, reference, outside and rows, as `make_folded` makes them."""
    from .fold_kernel import quantize_fold_launch
    from .quantize_kernel import quantize_launch

    (rows, k), found, after = x.shape, window(spec.element), folded_spec(spec)
    assert found is not None
    assert after is not None
    rule = quantize_fold_config(spec, k, x.element_size()) if x.stride(1) == 1 else None
    blocks = after.scale_shape(rows, k)
    if rule is None:
        folded = Operand(make_folded(plan, after, rows, k), rows, after, folded=True)
        codes = plan.buffer(rows, spec.packed_cols(k), dtype=torch.uint8)
        scale = plan.buffer(*blocks, dtype=torch.uint8)
        plan.launch(quantize_launch(x, spec, seed, [codes, scale]))
        fold_into(plan, Operand([codes, scale], rows, spec), k, folded)
        return list(folded.parts)
    codes, scale, reference_bytes, *flags = make_folded(plan, after, rows, k, zero=True)
    outside = Outside(*flags)
    problem = Problem.of("quantize_fold", spec, x.dtype, "rows", rows, k)
    config = find_config(problem, plan.device, lambda: rule).config
    plan.launch(quantize_fold_launch(x, spec, seed, found, reference_bytes, codes, scale, outside, config))
    return [codes, scale, reference_bytes, *flags]


def _plan_decoding(plan: Plan, a: Operand, b: Operand, k: int, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """The kernel that takes operands of any kind, in bf16; and again in fp32, if the first says that it lost bits."""
    lost = None if a.fits_bf16 and b.fits_bf16 else plan.buffer(1, dtype=torch.int32, zero=True)
    plan.launch(decoding_launch(a, b, k, bias, out, lost))
    if lost is not None:
        plan.launch(decoding_launch(a, b, k, bias, out, lost, exact=True))


def decoding_launch(
    a: Operand, b: Operand, k: int, bias: torch.Tensor | None, out: torch.Tensor, lost: torch.Tensor | None,
    exact: bool = False,
) -> Launch:  # fmt: skip
    from .matmul_wide_kernel import matmul_wide_launch

    config = decoding_choice(a, b, k, out.dtype, out.device, exact).config
    return matmul_wide_launch((wide_operand(a), wide_operand(b)), k, bias, out, None, lost, exact, config)


def guarded_launch(
    sides: Sequence[WideOperand], k: int, bias: torch.Tensor | None, out: torch.Tensor,
    everything: torch.Tensor | None, lost: torch.Tensor | None = None, exact: bool = False,
) -> Launch:  # fmt: skip
    """What redoes the rows that folding could not serve."""
    from .matmul_wide_kernel import matmul_wide_launch

    config = guarded_matmul_config(exact)
    return matmul_wide_launch((sides[0], sides[1]), k, bias, out, everything, lost, exact, config)


def wide_operand(operand: Operand, folded: Operand | None = None) -> WideOperand:
    """A side as the decoding kernel takes it; `folded`: its folded self, whose flags say which rows it redoes."""
    from .matmul_wide_kernel import WideOperand

    outside, line = None, 1
    if folded is not None:
        assert folded.spec is not None
        outside, line = Outside(*folded.parts[3:]), folded.spec.block.rows
    if operand.spec is None:
        return WideOperand(operand.parts[0], turned=operand.turned, outside=outside, line=line)
    offset = None if operand.spec.symmetric else operand.parts[2]
    return WideOperand(operand.parts[0], operand.parts[1], offset, operand.spec, operand.turned, outside, line)


# --- the native path ---------------------------------------------------------------------------------------


def native_product(
    a: Operand, b: Operand, k: int, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Run a product on block-scaled tensor cores; and again by decoding, where folding could not serve."""
    from .matmul_native_kernel import matmul_native_launch

    capabilities = gpu.device_capabilities(device)
    out = torch.empty((a.rows, b.rows), dtype=dtype, device=device)
    sides, operands = [], []
    for operand, fold in zip((a, b), native_folds(a, b, capabilities), strict=True):
        if fold:
            operand = _fold_now(operand, k)
        elif operand.turned:
            codes, scale = (part.T.contiguous() for part in operand.parts)
            operand = Operand([codes, scale], operand.rows, operand.spec and operand.spec.T)
        assert operand.spec is not None
        codes = operand.parts[0].view(torch.uint8)
        if operand.folded:
            codes = codes[:, :k]
        reference_bytes = operand.parts[2] if operand.folded else None
        sides.append(native_operand(codes, operand.parts[1], operand.spec, k, capabilities.ptx, reference_bytes))
        operands.append(operand)
    matmul_native_launch(sides[0], sides[1], bias, None, out).run(device)
    if any(operand.folded for operand in operands):
        redone = [wide_operand(operand, operand if operand.folded else None) for operand in operands]
        fits_bf16 = all(operand.fits_bf16 for operand in operands)
        lost = None if fits_bf16 else torch.zeros(1, dtype=torch.int32, device=device)
        guarded_launch(redone, k, bias, out, None, lost).run(device)
        if lost is not None:
            guarded_launch(redone, k, bias, out, None, lost, exact=True).run(device)
    return out


def _fold_now(operand: Operand, k: int) -> Operand:
    """Fold a packed operand by the op."""
    parts = torch.ops.mxkernels.fold(*operand.parts, operand.kind, operand.rows, k)
    spec = operand.spec
    assert spec is not None
    after = folded_spec(spec.T if operand.turned else spec)
    assert after is not None
    return Operand([parts[0].view(carrier_dtype(after, parts[0].device)), *parts[1:]], operand.rows, after, folded=True)


def outside_window(a: Operand, b: Operand, k: int) -> str | None:
    """Why operands' exponents do not fit FP8, from looking at them."""
    for name, operand in (("a", a), ("b", b)):
        if int((operand if operand.folded else _fold_now(operand.without_offset(), k)).parts[3]):
            return f"some row of {name} has exponents too far apart for FP8"
    return None
