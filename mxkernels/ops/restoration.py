"""`PreparedTensor.restore` as an op."""

from __future__ import annotations

import torch

from .. import prepared

_library = torch.library.Library("mxkernels", "FRAGMENT")
_library.define("restore(Tensor codes, Tensor scale, int added, SymInt n, SymInt k) -> Tensor[]")


def _restore_fake(codes: torch.Tensor, scale: torch.Tensor, added: int, n: int, k: int) -> list[torch.Tensor]:
    bytes_a_row, blocks_a_row = prepared.row_sizes(scale, k)
    return [codes.new_empty((n, bytes_a_row)), scale.new_empty((n, blocks_a_row))]


def _restore_cuda(codes: torch.Tensor, scale: torch.Tensor, added: int, n: int, k: int) -> list[torch.Tensor]:
    from . import _relaunches, _remember
    from .restore_kernel import restore_launch, restore_tensors

    bands, groups, rows, blocks = scale.shape
    out_codes = codes.new_empty((bands * rows, groups * codes.shape[-1]))
    out_scale = scale.new_empty((bands * rows, groups * blocks))
    key = ("restore", scale.shape, added, codes.device, codes.data_ptr() % 16, scale.data_ptr() % 16)
    known = _relaunches.get(key)
    if known is None:
        _remember(key, restore_launch(codes, scale, added, out_codes, out_scale).run(codes.device), [])
    else:
        known[0].run(*restore_tensors(codes, scale, out_codes, out_scale).values())
    bytes_a_row, blocks_a_row = prepared.row_sizes(scale, k)
    return [out_codes[:n, :bytes_a_row].contiguous(), out_scale[:n, :blocks_a_row].contiguous()]


_library.impl("restore", prepared.restored, "CPU")
_library.impl("restore", _restore_cuda, "CUDA")
torch.library.register_fake("mxkernels::restore", _restore_fake, lib=_library)
