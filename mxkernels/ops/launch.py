"""A kernel with all that it is launched with, so that it can be run, or compiled for a GPU that is not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """`kernel[(programs,)](**arguments)` with `options` (num_warps …)."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Launch on `device`, whichever is current. No programs, no launch."""
        if self.programs == 0:
            return
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        # Fusing a multiplication with an addition drops a rounding, so it is off wherever bits matter.
        self.kernel[(self.programs,)](**self.arguments, **self.options, enable_fp_fusion=False)
