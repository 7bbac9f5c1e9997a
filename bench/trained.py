"""Real tensors that every machine can make: a small byte-level language model, trained for seconds on the source
text of Python's standard library.

    python bench/trained.py OUT.safetensors

Writes bfloat16 tensors of the last step's first hidden layer: `weight` [1024, 512], its input `activation`
[4096, 512] and its output's `gradient` [4096, 1024]. The same machine gives the same tensors.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

CONTEXT, WIDTH, HIDDEN, BATCH, STEPS = 16, 32, 1024, 4096, 60


def text() -> torch.Tensor:
    """A few MB of Python source, as bytes."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8).long()


def train() -> dict[str, torch.Tensor]:
    """Predict each byte from the sixteen before it."""
    torch.manual_seed(0)
    windows = text().unfold(0, CONTEXT + 1, 1)
    first = nn.Linear(CONTEXT * WIDTH, HIDDEN)
    model = nn.Sequential(nn.Embedding(256, WIDTH), nn.Flatten(), first, nn.GELU(), nn.Linear(HIDDEN, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    seen: dict[str, torch.Tensor] = {}
    first.register_forward_hook(lambda _, inputs, __: seen.update(activation=inputs[0].detach()))
    first.register_full_backward_hook(lambda _, __, outputs: seen.update(gradient=outputs[0].detach()))
    for _ in range(STEPS):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1]).backward()
        optimizer.step()
    seen["weight"] = first.weight.detach()
    return {name: tensor.bfloat16().contiguous() for name, tensor in seen.items()}


if __name__ == "__main__":
    save_file(train(), sys.argv[1])
