"""A small GPT with Llama's blocks, as anyone would write it in PyTorch: nothing in this file knows about MX."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256  # bytes
_ROPE_BASE = 10000.0
_HIDDEN_MULTIPLE = 256


@dataclass(frozen=True)
class Size:
    """A model, and the batch and learning rate that suit it.

    Attributes:
        context: bytes that the model sees at a time.
        batch: sequences in a step.
        lr: the highest learning rate of the schedule.
    """

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    lr: float

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width is {self.width}; allowed for {self.heads} heads: multiples of {2 * self.heads}")

    @property
    def hidden(self) -> int:
        """Of an MLP: 8/3 of the width, rounded up to what matrix units like."""
        return -(-8 * self.width // (3 * _HIDDEN_MULTIPLE)) * _HIDDEN_MULTIPLE


SIZES = {
    "1m": Size(layers=4, width=128, heads=4, context=128, batch=8, lr=3e-3),
    "10m": Size(layers=6, width=384, heads=6, context=256, batch=32, lr=2e-3),
    "55m": Size(layers=8, width=768, heads=12, context=512, batch=128, lr=1e-3),
    "130m": Size(layers=10, width=1024, heads=16, context=1024, batch=64, lr=8e-4),
    "350m": Size(layers=12, width=1536, heads=12, context=1024, batch=48, lr=6e-4),
    "1b": Size(layers=20, width=2048, heads=16, context=2048, batch=24, lr=4e-4),
}


class GPT(nn.Module):
    """Logits of the next byte, `[batch, length, 256]`, from bytes `[batch, length]`; length is at most the context.

    The residual stream is bfloat16, whatever the weights are.
    """

    turns: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.width)
        self.lm_head = nn.Linear(size.width, VOCABULARY, bias=False)
        turns = rotations(size.context, size.width // size.heads)
        self.register_buffer("turns", turns, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # what adds to the residual stream starts smaller, the deeper the model is
                shrink = (2 * size.layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * shrink)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).bfloat16()
        turns = self.turns[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, turns)
        return self.lm_head(self.norm(x))


class Block(nn.Module):
    """Attention and an MLP, each added to what comes in."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(size.width), Attention(size.width, size.heads)
        self.mlp_norm, self.mlp = RMSNorm(size.width), MLP(size.width, size.hidden)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal attention of several heads with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [batch, head, length, …]
        y = functional.scaled_dot_product_attention(rotate(q, turns), rotate(k, turns), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)  # the gate and what it gates, in one product
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(functional.silu(gate) * up)


class RMSNorm(nn.RMSNorm):
    """In its input's dtype (the sum is fp32 inside), where autocast would have it write fp32."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotations(length: int, width: int) -> Tensor:
    """Cosine and sine of each position's angles, `[2, length, width]`, the same for both halves of a head."""
    frequencies = _ROPE_BASE ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()]).bfloat16()


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + half]) of `[…, length, width]` by their position's angles."""
    first, second = x.chunk(2, -1)
    return x * turns[0] + torch.cat([-second, first], -1) * turns[1]
