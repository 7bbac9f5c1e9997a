"""What the recorded measurements share: a command that measures one group of cases and writes its rows."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from mxkernels import report
from mxkernels.environment import device_name, environment
from mxkernels.tune.location import VARIABLE


def record(
    description: str | None, groups: Iterable[str], measure: Callable[[str, torch.device], list[dict[str, Any]]]
) -> None:
    """Parse `GROUP --results DIR`, and write what `measure` makes of the group to DIR/<gpu>-<GROUP>.json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=groups)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU, and these are a GPU's measurements")
    device = torch.device("cuda", torch.cuda.current_device())
    write(measure(arguments.group, device), arguments.group, arguments.results, device)


def place(group: str, results: Path, device: torch.device) -> Path:
    """RESULTS/<gpu>-<GROUP>.json."""
    return results / f"{device_name(device).lower().replace(' ', '-')}-{group}.json"


def write(rows: list[dict[str, Any]], group: str, results: Path, device: torch.device) -> None:
    """Write a group's rows, headed by the environment, to its place: as a whole, whenever it is ended."""
    path = place(group, results, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(report.render("json", environment(device), rows), encoding="utf-8")
    os.replace(temporary, path)
    print(f"wrote {path}")


@contextmanager
def empty_caches() -> Iterator[None]:
    """Inside, this process and those that it starts have a cache of configs and one of kernels of their own."""
    names = ("TRITON_CACHE_DIR", VARIABLE)
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        os.environ.update({name: f"{directory}/{name}" for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
