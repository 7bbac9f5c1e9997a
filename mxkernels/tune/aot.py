"""Compile a launch for a GPU that is not here, and read what the compiler made of it."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from .kernel_key import settle_key

_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}

# Since 3.7 the JIT lists them, empty, and so they are part of the key under which it looks for what is compiled.
_CONSTANTS_HAVE_ATTRIBUTES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its target, its texts by stage (`ttgir`, `ptx`, `amdgcn` …) and its binary."""

    architecture: str
    texts: dict[str, Any]
    shared_bytes: int

    @cached_property
    def assembly(self) -> str:
        """PTX, or AMD's assembly."""
        return self.texts["ptx"] if "ptx" in self.texts else self.texts["amdgcn"]

    @cached_property
    def sass(self) -> list[str]:
        """The machine instructions (opcode first), without padding; NVIDIA only."""
        text = self._tool("cuobjdump", "-sass")
        lines = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][^;]*);", text)
        while lines and lines[-1].startswith(("NOP", "BRA")):
            lines.pop()
        return lines

    @cached_property
    def instructions(self) -> int:
        """How many machine instructions, of 16 bytes each, the code has, with those that pad it; NVIDIA only. To list
        them takes as long as compiling."""
        binary: bytes = self.texts["cubin"]
        (table,) = struct.unpack_from("<Q", binary, 0x28)  # of an ELF file's sections
        size, count, names = struct.unpack_from("<HHH", binary, 0x3A)
        # name, type, flags, address, offset, size
        sections = [struct.unpack_from("<IIQQQQ", binary, table + number * size) for number in range(count)]
        start = sections[names][4]
        return sum(each[5] for each in sections if binary.startswith(b".text.", start + each[0])) // 16

    @cached_property
    def spilled_bytes(self) -> int:
        """Bytes of local memory a thread: what the registers did not hold."""
        if "ptx" not in self.texts:
            return int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", self.assembly)[1])  # type: ignore[index]
        return int(re.search(r"STACK:(\d+)", self._usage)[1])  # type: ignore[index]

    @cached_property
    def registers(self) -> int:
        """Registers a thread."""
        if "ptx" not in self.texts:
            return int(re.search(r"\.vgpr_count:\s*(\d+)", self.assembly)[1])  # type: ignore[index]
        return int(re.search(r"REG:(\d+)", self._usage)[1])  # type: ignore[index]

    @cached_property
    def _usage(self) -> str:
        return self._tool("cuobjdump", "-res-usage")

    def _tool(self, name: str, *flags: str) -> str:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.texts["cubin"])
            file.flush()
            command = [str(tool), *flags, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_launch(launch: Any, architecture: str) -> Compiled:
    """Compile an `ops.launch.Launch` as the JIT would on `architecture` (`"sm_90"`, `"gfx950"` …).

    Its tensors may be on the meta device, those of descriptors too: only dtypes, strides and alignment matter.
    """
    settle_key(launch.kernel)
    signature, constants = {}, {}
    attributes: dict[tuple[int], list[Any]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        known = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or known:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            if _CONSTANTS_HAVE_ATTRIBUTES:
                attributes[(index,)] = []
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_NAMES[value.dtype]}"
            attributes[(index,)] = _divisibility(value.data_ptr())
        elif hasattr(value, "block_shape"):
            signature[parameter.name] = _descriptor_type(value)
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not parameter.do_not_specialize:
                attributes[(index,)] = _divisibility(value)
    source_type = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = source_type(launch.kernel, signature, constants, attributes)
    options = {**launch.options, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=target(architecture), options=options)
    return Compiled(architecture, compiled.asm, compiled.metadata.shared)


def _divisibility(value: int) -> list[Any]:
    return [["tt.divisibility", 16]] if value % 16 == 0 else []


def _descriptor_type(descriptor: Any) -> str:
    """Triton's name for the type of a descriptor of its own, or of Gluon, which has a layout."""
    layout = f",{descriptor.layout!r}" if hasattr(descriptor, "layout") else ""
    return f"tensordesc<{_NAMES[descriptor.base.dtype]}{list(descriptor.block_shape)}{layout}>"


def target(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)
