"""What a measurement was taken with: versions, sources, device, command and date."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__, gpu

_PACKAGE = Path(__file__).parent


def environment(device: torch.device) -> dict[str, Any]:
    """The record that heads every result, as JSON values; what cannot be found out is None."""
    record: dict[str, Any] = {
        "mxkernels": __version__,
        **revision(),
        "sources": digest(_PACKAGE),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "architecture": gpu.architecture(device),
        "driver": driver_version(),
        "sm_count": None,
        "l2_bytes": None,
        "memory_bytes": None,
        "cpu_threads": torch.get_num_threads(),
        "command": shlex.join(sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["sm_count"] = properties.multi_processor_count
        record["l2_bytes"] = properties.L2_cache_size
        record["memory_bytes"] = properties.total_memory
    return record


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def triton_version() -> str | None:
    """Without importing it."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """NVIDIA's driver, as its own tool tells it."""
    answer = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer[0] if answer else None


def revision() -> dict[str, Any]:
    """`commit`, which this package is of, and `dirty`, whether tracked files differ from it; None where that cannot
    be known. A copy without its own history holds the commit in a file `REVISION` beside the package."""
    said = _PACKAGE.parent / "REVISION"
    if said.exists():
        return {"commit": said.read_text("utf-8").strip(), "dirty": None}
    answer = _run("git", "-C", str(_PACKAGE), "rev-parse", "HEAD", "--show-prefix")
    if answer is None or answer[1:] != [f"{_PACKAGE.name}/"]:  # perhaps installed inside another project's
        return {"commit": None, "dirty": None}
    status = _run("git", "-C", str(_PACKAGE), "status", "--porcelain", "--untracked-files=no")
    return {"commit": answer[0], "dirty": bool(status)}


def digest(*folders: Path) -> str:
    """Of the Python files in the folders: what tells code apart where there is no commit."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            found.update(f"{path.relative_to(folder.parent).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _run(*command: str) -> list[str] | None:
    """The lines that a command prints; None if there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None
