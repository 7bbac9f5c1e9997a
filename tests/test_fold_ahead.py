"""Folding, and redoing what does not fold, compiled ahead of time by every Triton that there is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

from ahead_of_time_fold import ARCHITECTURES

ROOT = Path(__file__).parents[1]
FETCHED = re.search(r"^TRITONS := (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1].split()


@pytest.mark.parametrize("version", ["installed", *FETCHED])
def test_it_compiles(version: str) -> None:
    path = [str(ROOT)]
    if version != "installed":
        folder = ROOT / ".triton" / version
        if not (folder / "triton").is_dir():
            pytest.skip(f"Triton {version} is not in .triton/{version}; `make test` fetches it")
        path.insert(0, str(folder))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ahead_of_time_fold.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["gpu"] for each in found} == set(ARCHITECTURES)
    assert all(each["triton"] == version for each in found if version != "installed")
    for each in found:
        # a few registers, of loops that Triton versions unroll and order differently
        assert each["spilled_bytes"] <= 32, each
