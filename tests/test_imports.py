"""Who imports whom, read from the sources; and what an import may not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mxkernels

PACKAGE = Path(mxkernels.__file__).parent

# For each module, or package with its modules, the most that it may import: parts of this package, and Triton.
# What is not listed may import anything. Of two that apply, the longer name counts.
ALLOWED: dict[str, set[str]] = {
    "formats": set(),
    "gpu": set(),
    "spec": {"formats"},
    "tensor": {"formats", "spec"},
    "swizzle": set(),
    "prepared": {"spec", "tensor"},
    "folded": {"formats", "spec", "tensor"},
    "reference": {"formats", "spec", "tensor", "folded"},
    "files": {"formats", "spec", "tensor"},
    "ops.primitives": {"formats", "triton"},
    "ops.elements": {"ops", "triton"},
    "recipes": {"spec"},
    "modules": set(),
    "ops": {
        *("formats", "spec", "tensor", "folded", "prepared", "swizzle", "recipes"),
        *("reference", "gpu", "tune", "ops", "triton"),
    },
    "nn": {"modules", "ops", "packed", "recipes"},
    "packed": {"modules", "ops", "prepared", "spec", "tensor", "nn"},
    "tune": {"formats", "spec", "prepared", "gpu", "tune", "triton"},
}


def module_name(path: Path) -> str:
    """`mxkernels.ops.primitives`; a package by its own name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The full names of what a module imports, wherever in it."""
    path = MODULES[name]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            up = node.level - (path.stem == "__init__")  # levels above the module itself
            above = parts[: len(parts) - up] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from . import gpu` names a module, `from .gpu import capabilities` what is in one
            inner = (f"{base}.{alias.name}" for alias in node.names)
            found |= {candidate if candidate in MODULES else base for candidate in inner}
    return found


def part(name: str) -> str:
    """`mxkernels.ops.launch` to `ops`, `triton.language` to `triton`, `mxkernels` to itself."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "mxkernels" and rest else first


def rule(name: str) -> str | None:
    """The entry of ALLOWED that applies to a module."""
    within = name.removeprefix("mxkernels.")
    return max((key for key in ALLOWED if f"{within}.".startswith(f"{key}.")), key=len, default=None)


PARTS = {part(name) for name in MODULES} | {"triton"}


@pytest.mark.parametrize("name", [name for name in MODULES if rule(name)])
def test_imports_only_what_it_may(name: str) -> None:
    assert {part(other) for other in imports(name)} & PARTS <= ALLOWED[rule(name)]


def test_every_rule_has_a_module() -> None:
    assert {f"mxkernels.{key}" for key in ALLOWED} <= set(MODULES)


def test_the_reader_sees_what_is_known_to_be_there() -> None:
    """Relative, absolute and nested imports, in modules and packages."""
    assert imports("mxkernels.spec") >= {"mxkernels.formats", "dataclasses"}
    assert imports("mxkernels.ops.quantize_kernel") >= {
        "mxkernels.gpu",
        "mxkernels.tune",
        "mxkernels.spec",
        "triton.language",
    }
    assert imports("mxkernels.ops") >= {"mxkernels.reference", "mxkernels.tensor", "mxkernels.ops.quantize_kernel"}


def run(code: str) -> str:
    """The output of a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_works_without_triton() -> None:
    """Where Triton is not installed, the package and its command line import, and CPU tensors are served."""
    code = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import torch, mxkernels as mx, mxkernels.cli

x = torch.arange(64.0).reshape(2, 32)
q, turned = mx.quantize_pair(x, mx.MXSpec("e4m3", "2x2", rounding="stochastic", symmetric=False), seed=1)
print(tuple(q.dequantize().shape), tuple(mx.dequantize(turned).shape))
"""
    assert run(code) == "(2, 32) (32, 2)"


def test_import_does_no_work() -> None:
    """Importing the package loads no Triton and nothing of the command line, and touches no CUDA."""
    code = """
import sys, torch
before = set(sys.modules)
import mxkernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
late = {"triton", "click", "tabulate", "matplotlib", "platformdirs", "filelock"}
print(sorted(new & late), torch.cuda.is_initialized())
"""
    assert run(code) == "[] False"
