"""MXTensors in safetensors files: `name.codes`, `name.scale`, `name.offset`, and the rest as metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from safetensors import safe_open
from safetensors.torch import save_file as _save_safetensors

from .spec import MXSpec
from .tensor import MXTensor

_METADATA_KEY = "mxkernels"


def save_file(tensors: Mapping[str, MXTensor | torch.Tensor], filename: str | os.PathLike[str]) -> None:
    """Write MXTensors and plain tensors, by name, to a safetensors file.

    Raises:
        ValueError: two tensors would be stored under one name (`w.codes` beside an MXTensor `w`).
        RuntimeError: two tensors share memory, such as an MXTensor and its `.T` (safetensors' own error).
    """
    plain: dict[str, torch.Tensor] = {}
    described = {}

    def add(name: str, tensor: torch.Tensor) -> None:
        if name in plain:
            raise ValueError(f"two tensors would be stored as {name!r}; rename one")
        plain[name] = tensor.contiguous()

    for name, tensor in tensors.items():
        if not isinstance(tensor, MXTensor):
            add(name, tensor)
            continue
        stored = tensor.T if tensor.transposed else tensor
        described[name] = {
            "spec": str(stored.spec),
            "shape": list(stored.shape),
            "transposed": tensor.transposed,
        }
        add(f"{name}.codes", stored.codes)
        add(f"{name}.scale", stored.scale)
        if stored.offset is not None:
            add(f"{name}.offset", stored.offset)
    _save_safetensors(plain, filename, metadata={_METADATA_KEY: json.dumps(described)})


def load_file(
    filename: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> dict[str, MXTensor | torch.Tensor]:
    """Read what `save_file` wrote (or any safetensors file), by name, onto `device`.

    Raises:
        ValueError: parts that do not fit their description.
        FileNotFoundError, safetensors.SafetensorError: no such file, or none of this kind.
    """
    with safe_open(os.fspath(filename), framework="pt", device=str(device)) as file:
        described = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
        parts = {name: file.get_tensor(name) for name in file.keys()}
    quantised = {}
    for name, description in described.items():
        try:
            spec, shape, transposed = (description[key] for key in ("spec", "shape", "transposed"))
            spec = MXSpec.parse(spec)
            stored = [
                parts.pop(f"{name}.{part}") for part in ("codes", "scale", "offset")[: 2 if spec.symmetric else 3]
            ]
        except (KeyError, TypeError) as missing:
            raise ValueError(f"{filename}: {name!r} is described, but {missing} is missing") from None
        q = MXTensor(stored[0], stored[1], None if spec.symmetric else stored[2], spec, shape)
        quantised[name] = q.T if transposed else q
    return {**parts, **quantised}
