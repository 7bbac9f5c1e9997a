"""Microscaling (MX) formats for training and serving, in Triton. Start at `quantize`; bytes: `docs/numerics.md`."""

from . import nn, ops, recipes, tune
from .files import load_file, save_file
from .folded import FoldedTensor
from .formats import FORMATS, ElementFormat
from .nn import convert
from .ops import dequantize, explain, fold, matmul, quantize, quantize_pair
from .packed import pack
from .prepared import PreparedTensor, prepare
from .spec import (
    PRESETS,
    Block,
    MXSpec,
    mxfp4,
    mxfp6_e2m3,
    mxfp6_e3m2,
    mxfp8_e4m3,
    mxfp8_e5m2,
    mxint4,
    mxint8,
)
from .tensor import MXTensor
from .tuner import autotune

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "PRESETS",
    "Block",
    "ElementFormat",
    "FoldedTensor",
    "MXSpec",
    "MXTensor",
    "PreparedTensor",
    "autotune",
    "convert",
    "dequantize",
    "explain",
    "fold",
    "load_file",
    "matmul",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
    "mxint4",
    "mxint8",
    "nn",
    "ops",
    "pack",
    "prepare",
    "quantize",
    "quantize_pair",
    "recipes",
    "save_file",
    "tune",
]
