"""The one list of named shapes, which tests, tuner and benchmark share.

A weight is `[out features, in features]` as `torch.nn.Linear` holds it, with the projections that models
compute together stored as one (queries, keys and values; gate and up). Sizes are those of the published
configurations.
"""

from __future__ import annotations

Shape = tuple[int, ...]

SHAPES: dict[str, dict[str, Shape]] = {
    "llama3-8b": {
        "qkv": (6144, 4096),
        "output": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "llama3-70b": {
        "qkv": (10240, 8192),
        "output": (8192, 8192),
        "gate_up": (57344, 8192),
        "down": (8192, 28672),
    },
    "llama3-405b": {
        "qkv": (18432, 16384),
        "output": (16384, 16384),
        "gate_up": (106496, 16384),
        "down": (16384, 53248),
    },
    "qwen3-32b": {
        "qkv": (10240, 5120),
        "output": (5120, 8192),
        "gate_up": (51200, 5120),
        "down": (5120, 25600),
    },
    "gpt-oss": {  # 20b and 120b alike; the last two are one expert's
        "qkv": (5120, 2880),
        "output": (2880, 4096),
        "expert_gate_up": (5760, 2880),
        "expert_down": (2880, 2880),
    },
    "activations": {  # 8192 tokens at the inputs of llama3's layers
        "llama3-8b hidden": (8192, 4096),
        "llama3-8b inner": (8192, 14336),
        "llama3-70b hidden": (8192, 8192),
        "llama3-70b inner": (8192, 28672),
    },
}

# By device type: several times any L2 on a GPU; seconds through the reference on a CPU.
DEFAULT_SHAPE: dict[str, Shape] = {"cuda": (16384, 16384), "cpu": (512, 512)}

# For products: the rows of activations, from decoding to training, and the weights [out, in] that they meet.
ROWS: dict[str, tuple[int, ...]] = {"cuda": (1, 16, 64, 256, 1024, 4096, 8192), "cpu": (16, 64)}
DEFAULT_WEIGHT: dict[str, Shape] = {"cuda": (8192, 8192), "cpu": (256, 256)}
