"""Casts as workloads, folding among them: what they write is known to the byte."""

from __future__ import annotations

from typing import Any

import torch

from ..folded import Outside, Window, window
from ..ops.dequantize_kernel import dequantize_launch
from ..ops.fold_kernel import fold_launch, quantize_fold_launch
from ..ops.launch import Launch
from ..ops.quantize_kernel import quantize_launch
from ..ops.quantize_pair_kernel import quantize_pair_launch
from ..spec import MXSpec
from ..tune import (
    Config,
    Problem,
    dequantize_config,
    fold_config,
    quantize_config,
    quantize_fold_config,
    quantize_pair_config,
)
from ..tune.limits import Limits
from ..tune.model import Work
from .workload import POISON, Draw, Workload, total_bytes, with_offset


class Cast(Workload):
    """A workload whose bytes are known: `outputs` have to be `expected`."""

    def __init__(
        self, problem: Problem, device: torch.device, limits: Limits, source: torch.device, draw: Draw
    ) -> None:
        super().__init__(problem, device, limits, source, draw)
        self.spec = MXSpec.parse(problem.formats)
        self.inputs: list[torch.Tensor] = []
        self.expected: list[torch.Tensor] = []
        self.prepare()
        self.outputs = [torch.empty_like(each) for each in self.expected]
        self.work = Work(total_bytes(self.inputs), total_bytes(self.expected))

    def prepare(self) -> None:
        """Make `inputs` and `expected`."""
        raise NotImplementedError

    def poison(self) -> None:
        for each in self.outputs:
            each.view(torch.uint8).fill_(POISON)

    def difference(self) -> str | None:
        for number, (found, expected) in enumerate(zip(self.outputs, self.expected, strict=True)):
            wrong = (found.view(torch.uint8) != expected.view(torch.uint8)).sum().item()
            if wrong:
                against = "the reference's" if self.source.type == "cpu" else "the default config's"
                return f"{wrong} bytes of output {number} differ from {against}"
        return None


class Quantize(Cast):
    """Also of both orientations."""

    @staticmethod
    def rule(problem: Problem, limits: Limits) -> Config:
        spec, item_bytes = MXSpec.parse(problem.formats), getattr(torch, problem.dtype).itemsize
        rows, cols = problem.shape
        straight = problem.layout == "rows"
        if _is_pair(problem):
            return quantize_pair_config(spec, rows, cols, item_bytes, straight, limits.capabilities)
        return quantize_config(spec, rows, cols, item_bytes, straight, pair=False)

    def prepare(self) -> None:
        rows, cols = self.problem.shape
        shape = (rows, cols) if self.problem.layout == "rows" else (cols, rows)
        plain = self.drawn(*shape, dtype=self.dtype)
        x = plain if self.problem.layout == "rows" else plain.T
        op = torch.ops.mxkernels.quantize_pair if _is_pair(self.problem) else torch.ops.mxkernels.quantize
        seed = self.seed(self.spec)
        self.expected = self.moved(op(x, str(self.spec), seed))
        self.inputs = [x.to(self.device)]
        self.random = None if seed is None else seed.to(self.device)

    def launches(self, config: Any) -> list[Launch]:
        launch = quantize_pair_launch if _is_pair(self.problem) else quantize_launch
        return [launch(self.inputs[0], self.spec, self.random, self.outputs, config, self.capabilities)]


def _is_pair(problem: Problem) -> bool:
    return problem.op == "quantize_pair"


class Dequantize(Cast):
    @staticmethod
    def rule(problem: Problem, limits: Limits) -> Config:
        rows, cols = problem.shape
        return dequantize_config(MXSpec.parse(problem.formats), rows, cols)

    def prepare(self) -> None:
        rows, cols = self.problem.shape
        parts = self.quantized(self.spec, rows, cols)
        codes, scale, offset = with_offset(parts)
        self.expected = self.moved(
            [torch.ops.mxkernels.dequantize(codes, scale, offset, str(self.spec), cols, self.dtype)]
        )
        self.inputs = self.moved(parts)

    def launches(self, config: Any) -> list[Launch]:
        codes, scale, offset = with_offset(self.inputs)
        return [dequantize_launch(codes, scale, offset, self.spec, self.outputs[0], config, self.capabilities)]


class Fold(Cast):
    """Its reference bytes are an input here: another kernel makes them."""

    @staticmethod
    def rule(problem: Problem, limits: Limits) -> Config:
        rows, cols = problem.shape
        return fold_config(MXSpec.parse(problem.formats), rows, cols, problem.layout == "turned")

    def prepare(self) -> None:
        rows, cols = self.problem.shape
        self.turned = self.problem.layout == "turned"
        lines, self.k = (cols, rows) if self.turned else (rows, cols)
        parts = self.quantized(self.spec, rows, cols)
        kind = f"packed {self.problem.layout} {self.spec}"
        codes, scale, reference, *flags = self.moved(torch.ops.mxkernels.fold(*parts, kind, lines, self.k))
        self.inputs = [*self.moved(parts), reference]
        self.expected = [codes, scale, *flags]

    def poison(self) -> None:
        super().poison()
        for flags in self.outputs[2:]:
            flags.zero_()
        _clear_padding(self.outputs[0], self.expected[0], self.k)

    def launches(self, config: Any) -> list[Launch]:
        codes, scale, reference = self.inputs
        folded, folded_scale, *flags = self.outputs
        found, cols = _window(self.spec), self.problem.shape[1]
        folded = folded.view(self.dtype)
        return [
            fold_launch(
                codes, scale, cols, self.spec, self.turned, found, reference, folded, folded_scale, Outside(*flags),
                config, self.capabilities,
            )
        ]  # fmt: skip


class QuantizeFold(Cast):
    @staticmethod
    def rule(problem: Problem, limits: Limits) -> Config:
        item_bytes = getattr(torch, problem.dtype).itemsize
        config = quantize_fold_config(MXSpec.parse(problem.formats), problem.shape[1], item_bytes)
        if config is None:
            raise ValueError(f"{problem}: only elements of 4 bits are quantised and folded by one kernel")
        return config

    def prepare(self) -> None:
        rows, cols = self.problem.shape
        x, seed = self.drawn(rows, cols, dtype=self.dtype), self.seed(self.spec)
        self.expected = self.moved(torch.ops.mxkernels.quantize_fold(x, str(self.spec), seed))
        self.inputs = [x.to(self.device)]
        self.random = None if seed is None else seed.to(self.device)

    def poison(self) -> None:
        super().poison()
        self.outputs[3].zero_()
        _clear_padding(self.outputs[0], self.expected[0], self.problem.shape[1])

    def launches(self, config: Any) -> list[Launch]:
        codes, scale, reference, *flags = self.outputs
        found = _window(self.spec)
        carrier = torch.float8_e4m3fn if found.carrier.name == "e4m3" else torch.float8_e5m2
        codes = codes.view(carrier if self.limits.capabilities.fp8_mma else torch.uint8)
        return [
            quantize_fold_launch(
                self.inputs[0],
                self.spec,
                self.random,
                found,
                reference,
                codes,
                scale,
                Outside(*flags),
                config,
                self.capabilities,
            )
        ]


def _window(spec: MXSpec) -> Window:
    found = window(spec.element)
    if found is None:
        raise ValueError(f"{spec} does not fold; allowed: elements of 4 or 6 bits")
    return found


def _clear_padding(found: torch.Tensor, expected: torch.Tensor, k: int) -> None:
    """What pads folded rows to whole 16 bytes may be anything."""
    found[:, k:] = expected[:, k:]
