"""Triton's key of a kernel, under which it looks for what has been compiled, in memory and on disk."""

from __future__ import annotations

from threading import RLock
from typing import Any

from triton.runtime.jit import JITCallable

_settled: set[int] = set()  # functions, which live as long as their modules
_lock = RLock()


def settle_key(kernel: Any) -> None:
    """Have Triton hash what a kernel calls before the kernel itself, to be called before it is first compiled. Until
    3.9, a hash depended on which functions had been hashed before, so one process did not find what another had
    compiled. Kernels that are interpreted have none."""
    if not isinstance(kernel, JITCallable):
        return
    with _lock:
        if id(kernel) not in _settled:
            _settled.add(id(kernel))  # at once, since names of attributes may also be its own
            for name in kernel.fn.__code__.co_names:
                settle_key(kernel.fn.__globals__.get(name))
            kernel.cache_key  # noqa: B018  computes it
