"""Text to train on, as bytes: a file, or what every machine has that runs this."""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 0.05  # of the text, at its end
VALIDATION_BATCHES = 4  # of sequences spread evenly over what is held out


class Text:
    """Bytes to train on and bytes held out, on a device.

    Attributes:
        facts: size and digest of both, for the log.
    """

    def __init__(self, content: bytes, device: torch.device) -> None:
        self.facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        held_out = int(HELD_OUT * len(content))
        whole = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
        self.train, self.held_out = whole.split([len(content) - held_out, held_out])

    def batches(self, size: int, context: int, steps: int, seed: int) -> Tensor:
        """Where the sequences of each step start, `[steps, size]`: drawn at once, so that any step can be the next."""
        self._check(context)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(self.train) - context, (steps, size), generator=generator).to(self.train.device)

    def validation(self, size: int, context: int) -> Tensor:
        """Where the sequences start that every validation sees, `[batches, size]`."""
        starts = torch.linspace(0, len(self.held_out) - context - 1, VALIDATION_BATCHES * size, dtype=torch.float64)
        return starts.long().view(VALIDATION_BATCHES, size).to(self.held_out.device)

    def _check(self, context: int) -> None:
        if len(self.held_out) <= context:
            least = int((context + 1) / HELD_OUT) + 1
            raise ValueError(
                f"the text has {self.facts['bytes']} bytes; allowed for a context of {context}: {least} or more"
            )


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The sequences that start there, and each one's next bytes: both `[batch, length]`."""
    found = text[starts[:, None] + torch.arange(length + 1, device=text.device)].long()
    return found[:, :-1], found[:, 1:]


def read_text(path: Path | None = None) -> bytes:
    """A file; or the sources and documents of this Python and its PyTorch, in an order that only their names decide
    and that mixes them, so that the end is of the same kind as the rest."""
    if path is not None:
        return path.read_bytes()
    files: dict[str, Path] = {}
    for root in (Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent):
        for pattern in ("*.py", "*.txt", "*.rst", "*.md"):
            files |= {path.relative_to(root.parent).as_posix(): path for path in root.rglob(pattern)}
    # other packages, which on many systems lie within the standard library, differ from machine to machine
    names = (name for name in files if "/site-packages/" not in name and "/dist-packages/" not in name)
    return b"".join(
        files[name].read_bytes() for name in sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))
    )
