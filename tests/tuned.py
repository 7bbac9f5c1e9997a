"""A GPU that is not there, for the tests of configs: its name and numbers, as torch would tell them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mxkernels import gpu, tune
from mxkernels.tune import events, location, lookup, ranks, source, stamp

DEVICE = torch.device("cuda", 0)
# Of quantising, as PROBLEM is.
H200 = tune.Stamp("NVIDIA H200", "sm_90", 132, stamp.triton_version(), stamp.kernels_hash("quantize"))
H100 = replace(H200, gpu="NVIDIA H100 PCIe", sm_count=114)
GH200 = replace(H200, gpu="NVIDIA GH200", sm_count=130)
A100 = replace(H200, gpu="NVIDIA A100", architecture="sm_80", sm_count=108)
B200 = replace(H200, gpu="NVIDIA B200", architecture="sm_100", sm_count=148)

SPEC = "e2m1 1x32 rtne even symmetric"
PROBLEM = tune.Problem("quantize", SPEC, "bfloat16", "rows", (4096, 4096))
RULE = tune.CastConfig(8, 512, 4)


def cast(number: int) -> tune.CastConfig:
    """Configs that differ, and serve."""
    return tune.CastConfig(1 << number % 5, 32 << number // 5 % 5, 4)


def entry(config: tune.Config) -> tune.Entry:
    return tune.Entry(config, 2.0, 1.0, "2026-11-22")


def found(problem: tune.Problem = PROBLEM, device: torch.device = DEVICE) -> tune.Choice[tune.CastConfig]:
    return tune.find_config(problem, device, lambda: RULE)


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[tune.Stamp], None]:
    """Make the device an H200, in a process whose cache and shipped tables lie in `folder`, and are empty. What
    comes back makes it another GPU."""
    monkeypatch.setenv(location.VARIABLE, str(folder / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(location, "SHIPPED", folder / "shipped")
    monkeypatch.setattr(source, "_warned", set())
    monkeypatch.setattr(ranks, "_shared", None)
    monkeypatch.setattr(ranks, "_world", None)
    monkeypatch.setattr(lookup, "_struck", set())

    def become(stamp: tune.Stamp) -> None:
        *major, minor = stamp.architecture.removeprefix("sm_")
        properties = SimpleNamespace(
            name=stamp.gpu,
            major=int("".join(major)),
            minor=int(minor),
            multi_processor_count=stamp.sm_count,
            shared_memory_per_block_optin=232448,
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        forget()

    become(H200)
    return become


def forget() -> None:
    """As a new process would start."""
    for cached in (gpu.architecture, gpu.device_capabilities, stamp._stamp, lookup._shared_bytes):
        cached.cache_clear()
    events.TABLES_CHANGED.happened()


def keep(problem: tune.Problem, config: tune.Config, gpu: tune.Stamp = H200) -> Path:
    """Store a config for a problem of any op in the cache."""
    return tune.store({problem.key: entry(config)}, gpu.here(problem.op))


def ship(stamp: tune.Stamp, entries: dict[str, tune.Entry]) -> Path:
    """Store entries as if they came with the package."""
    return tune.store(entries, stamp, location.SHIPPED / location.table_name(stamp.gpu))
