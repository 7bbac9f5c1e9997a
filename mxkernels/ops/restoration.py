"""`PreparedTensor.restore` as an op."""

from __future__ import annotations

import torch

from .. import prepared
from .plan import Plan, Tensors, recorded

_library = torch.library.Library("mxkernels", "FRAGMENT")
_library.define("restore(Tensor codes, Tensor scale, int added, SymInt n, SymInt k) -> Tensor[]")


def _restore_fake(codes: torch.Tensor, scale: torch.Tensor, added: int, n: int, k: int) -> list[torch.Tensor]:
    bytes_a_row, blocks_a_row = prepared.row_sizes(scale, k)
    return [codes.new_empty((n, bytes_a_row)), scale.new_empty((n, blocks_a_row))]


def _restore_cuda(codes: torch.Tensor, scale: torch.Tensor, added: int, n: int, k: int) -> list[torch.Tensor]:
    def run(plan: Plan, inputs: Tensors) -> Tensors:
        from .restore_kernel import restore_launch

        bands, groups, rows, blocks = scale.shape
        out_codes = plan.buffer(bands * rows, groups * codes.shape[-1], dtype=codes.dtype)
        out_scale = plan.buffer(bands * rows, groups * blocks, dtype=scale.dtype)
        plan.launch(restore_launch(codes, scale, added, out_codes, out_scale))
        return [out_codes, out_scale]

    out_codes, out_scale = recorded(("restore", added), [codes, scale], run)
    bytes_a_row, blocks_a_row = prepared.row_sizes(scale, k)
    return [out_codes[:n, :bytes_a_row].contiguous(), out_scale[:n, :blocks_a_row].contiguous()]


_library.impl("restore", prepared.restored, "CPU")
_library.impl("restore", _restore_cuda, "CUDA")
torch.library.register_fake("mxkernels::restore", _restore_fake, lib=_library)
