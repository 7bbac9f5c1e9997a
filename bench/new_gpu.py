"""The recorded measurement of "a new GPU in two minutes": the README's commands, as the owner of one would run them.

    python bench/new_gpu.py new-gpu --results DIR      writes DIR/<gpu>-new-gpu.json, a row for each command

Each command is a process of its own and is timed from its start to its end, with empty caches: Triton has compiled
nothing. No shipped table is looked up, so that this GPU is a new one, and every problem begins with the rule's config.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from recording import empty_caches, record

sys.path.insert(0, str(Path(__file__).parents[1]))

from mxkernels.tune import Stamp, cache_path

COMMANDS = ("tune --budget 3s", "tune --shape llama3-8b --fmt mxfp4 --budget 1s")
# What the command line runs, on a GPU that nobody has tuned for.
UNKNOWN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
from mxkernels.tune import location
location.SHIPPED = Path("none")
from mxkernels.cli import main
main()
"""
GAINED = 1.03


def measure(group: str, device: torch.device) -> list[dict[str, Any]]:
    return [row(command, device) for command in COMMANDS]


def row(command: str, device: torch.device) -> dict[str, Any]:
    """How long a command takes, and what comes of it."""
    print(f"mxkernels {command}", flush=True)
    root = Path(__file__).resolve().parents[1]
    with empty_caches():
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", UNKNOWN, str(root), *shlex.split(command)])
        seconds = time.monotonic() - start
        path = cache_path(Stamp.of(device, "quantize"))
        table = json.loads(path.read_text("utf-8")) if path.exists() else {"sections": []}
    entries = [entry for section in table["sections"] for entry in section["entries"].values()]
    if not entries:
        sys.exit(f"mxkernels {command} stored nothing: it ended with {done.returncode}")
    gains = [entry["before_us"] / entry["after_us"] for entry in entries]
    found = {
        "command": f"mxkernels {command}",
        "exit_status": done.returncode,  # 1, if a problem could not be measured
        "problems": len(entries),
        "seconds": seconds,
        "median_gain": statistics.median(gains),
        "largest_gain": max(gains),
        "gained_3_percent": sum(gain > GAINED for gain in gains),
    }
    print(found, flush=True)
    return found


if __name__ == "__main__":
    record(__doc__, ["new-gpu"], measure)
