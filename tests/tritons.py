"""Processes with the Tritons that there are: the installed one, and those that `make test` fetches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Besides the installed one: the oldest supported and the newest.
FETCHED = re.search(r"^TRITONS := (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1].split()


def run_with(version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with that Triton (`"installed"`: the one that is); skips the test where it has not been fetched."""
    path = [str(ROOT)]
    if version != "installed":
        folder = ROOT / ".triton" / version
        if not (folder / "triton").is_dir():
            pytest.skip(f"Triton {version} is not in .triton/{version}; `make test` fetches it")
        path.insert(0, str(folder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("TRITON_INTERPRET", None)  # which is for the tests' own process
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def compiled(version: str, script: str, *arguments: str) -> str:
    """What a script of tests/ that compiles ahead of time prints, if it succeeds."""
    done = run_with(version, str(ROOT / "tests" / script), *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
