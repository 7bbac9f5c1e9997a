"""What a layer asks of its GPU, as constants for a compiler that traces it.

Imported where the first CUDA tensor is seen: the decorator imports torch's compiler.
"""

from __future__ import annotations

import torch

from .. import gpu


@torch.compiler.assume_constant_result
def multiplies_fp8(device: torch.device) -> bool:
    return gpu.device_capabilities(device).fp8_mma


@torch.compiler.assume_constant_result
def needs_folding(device: torch.device) -> bool:
    """Whether MX operands are multiplied as FP8, by tensor cores that know no block scales."""
    capabilities = gpu.device_capabilities(device)
    return capabilities.fp8_mma and not capabilities.block_scaled_mma
