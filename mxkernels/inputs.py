"""Real tensors out of files: `FILE` or `FILE:TENSOR`, safetensors, NumPy or PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_MOST_NAMES = 20  # that an error lists


def load_tensor(text: str) -> torch.Tensor:
    """Read the floating-point tensor that `FILE` or `FILE:TENSOR` names, onto the CPU.

    Raises:
        ValueError: one sentence: no such file or tensor, several tensors and none named, a file that cannot be
            read, an integer tensor, one without dimensions or without elements.

    Pickled code is never run: PyTorch files are loaded with `weights_only=True`, NumPy's without pickles.
    """
    path, name = _split(text)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path} is none of the files that can be read: {', '.join(_READERS)}")
    try:
        tensor = read(path, name)
    except _WrongName as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # whatever three formats' readers raise for a file that is not of their kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(f"{path} cannot be read as a {path.suffix} file: {reason}") from None
    label = path if name is None else f"{path}:{name}"
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise ValueError(f"{label} is {tensor.layout} {tensor.dtype}; allowed: a dense floating-point tensor")
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise ValueError(f"{label} has the shape {list(tensor.shape)}; allowed: one dimension or more, none of size 0")
    return tensor.detach()


class _WrongName(ValueError):
    """A tensor's name that the file does not hold, or that is needed and missing."""


def _split(text: str) -> tuple[Path, str | None]:
    """The longest prefix that is a file, and the name behind its colon: both may hold colons themselves."""
    if Path(text).is_file():
        return Path(text), None
    for colon in reversed([place for place, letter in enumerate(text) if letter == ":"]):
        if Path(text[:colon]).is_file():
            return Path(text[:colon]), text[colon + 1 :]
    raise ValueError(f"there is no file {text}; allowed: FILE or FILE:TENSOR")


def _choose(name: str | None, names: Iterable[str]) -> str:
    names = sorted(names)
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        return name
    listed = ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES))
    if not names:
        raise _WrongName("it holds no tensors")
    if name is None:
        raise _WrongName(f"it holds {len(names)} tensors, so name one as FILE:TENSOR: {listed}")
    raise _WrongName(f"it holds no tensor {name!r}; allowed: {listed}")


def _read_safetensors(path: Path, name: str | None) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(_choose(name, file.keys()))


def _read_numpy(path: Path, name: str | None) -> torch.Tensor:
    if name is not None:
        raise _WrongName(f"an array of a .npy file has no name; leave out {':' + name!r}")
    import numpy  # which nothing else here needs

    return torch.from_numpy(numpy.load(path, allow_pickle=False))


def _read_torch(path: Path, name: str | None) -> torch.Tensor:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, torch.Tensor) and name is None:
        return content
    tensors = dict(_named_tensors("", content))
    return tensors[_choose(name, tensors)]


def _named_tensors(prefix: str, content: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors of nested dictionaries, names joined by dots."""
    if isinstance(content, torch.Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _named_tensors(f"{prefix}{key}.", value)


_READERS: dict[str, Callable[[Path, str | None], torch.Tensor]] = {
    ".safetensors": _read_safetensors,
    ".npy": _read_numpy,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
