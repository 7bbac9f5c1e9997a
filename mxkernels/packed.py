"""Linears for serving, which hold their weight in an MX format only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from .modules import replace_linears
from .ops import matmul, quantize
from .ops.plain import autocast_dtype
from .prepared import BAND, GROUP, MAX_ROWS, PreparedTensor, preparable, prepare
from .spec import PRESETS, MXSpec
from .tensor import MXTensor

_PARTS = ("codes", "scale", "offset")


class PackedLinear(nn.Module):
    """`x @ W.T + bias`, as nn.Linear, with W held in an MX format: 4.25 bits an element for e2m1 at 1x32.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear; `dtype` is the bias's. The weight is zeros
            until it is loaded; `from_linear` quantises one, `pack` those of a model.
        spec: of the weight `[out_features, in_features]`, or a preset's name.
        activations: what `x` is quantised to before the product, or a preset's name; None leaves it as it is.

    It equals `matmul(x, W.T, bias=bias, out_dtype=x.dtype)`; with activations, of `quantize(x, activations)`.

    The weight is held once. If its elements have 4 bits and its blocks lie along its rows, that is the order that
    `prepare` gives it, in which a product of up to 64 rows of bfloat16 reads it fastest; it is put back into the
    order of `weight` in each product of more rows. Without quantised activations those decode it to bfloat16; with
    them, both sides go to the FP8 or block-scaled tensor cores, from 128 rows on.

    Its state is that of `weight` in the contract's order, whatever is held: uint8 `weight.codes` and
    `weight.scale`, float16 `weight.offset` if the spec is asymmetric, the spec and the shape as text in uint8
    `weight.spec`, and `bias`. They are plain tensors, for `torch.save` and safetensors alike.

    Raises:
        TypeError, ValueError: names the argument and what is allowed.

    It is for inference: there is no gradient to the weight or the bias, and an `x` that requires one is an error.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset_bits: torch.Tensor | None  # int16, or `.bfloat16()` would convert the offsets
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spec: MXSpec | str = "mxfp4",
        activations: MXSpec | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.spec = _spec_named("spec", spec)
        self.activations = None if activations is None else _spec_named("activations", activations)
        for name in ("codes", "scale", "offset_bits"):
            self.register_buffer(name, None, persistent=False)
        self._hold(_zeros(out_features, in_features, self.spec, device))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None,
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, spec: MXSpec | str = "mxfp4", activations: MXSpec | str | None = None
    ) -> PackedLinear:
        """A linear's weight, quantised; its bias is shared. One on `meta` gives one on `meta`."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; allowed: a torch.nn.Linear")
        packed = cls(
            linear.in_features, linear.out_features, bias=False, device="meta", spec=spec, activations=activations
        )
        if not linear.weight.is_meta:
            packed._hold(quantize(linear.weight, packed.spec))
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return packed

    @property
    def weight(self) -> MXTensor:
        """W, `[out_features, in_features]`. If it was prepared for few rows, it is put in order, which takes a
        pass over it."""
        held = self._held()
        return held.restore() if isinstance(held, PreparedTensor) else held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`, of x's dtype, or autocast's."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("x requires a gradient, and PackedLinear has none; allowed: torch.no_grad(), x.detach()")
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x is {list(x.shape)}; allowed: [..., {self.in_features}]")
        autocast = autocast_dtype(x.device.type)
        if autocast is not None:
            x = x.to(autocast)
        elif self.activations is None and x.dtype not in (torch.bfloat16, torch.float16):
            allowed = "torch.bfloat16, torch.float16 (model.bfloat16(), or torch.autocast)"
            raise TypeError(f"x is {x.dtype}; allowed: {allowed}, or any float with quantised activations")
        left = x if self.activations is None else _activated(x, self.activations)
        return matmul(left, self._held().T, bias=self.bias, out_dtype=x.dtype)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, spec={self.spec}" + ("" if self.activations is None else f", activations={self.activations}")

    def _held(self) -> MXTensor | PreparedTensor:
        """The weight as it is held."""
        shape = (self.out_features, self.in_features)
        if self._added is not None:
            return PreparedTensor(self.codes, self.scale, self._added, self.spec, shape)
        offset = None if self.offset_bits is None else self.offset_bits.view(torch.float16)
        return MXTensor.unchecked(self.codes, self.scale, offset, self.spec, shape)

    def _hold(self, q: MXTensor, in_place: bool = False) -> None:
        """Hold a weight, prepared if that pays. In place, buffers of its shapes are written to, so that a captured
        graph finds it; unless it is prepared with another `added`, which is a constant of captured kernels."""
        added = self._added if in_place else None
        self._added: int | None = None
        parts = {"codes": q.codes, "scale": q.scale, "offset_bits": q.offset}
        if q.offset is not None:
            parts["offset_bits"] = q.offset.view(torch.int16)
        if not q.codes.is_meta and _worth_preparing(self.spec, self.out_features, self.in_features):
            prepared = prepare(q)
            self._added = prepared.added
            parts |= {"codes": prepared.codes, "scale": prepared.scale}
        in_place = in_place and self._added == added
        for name, part in parts.items():
            held = getattr(self, name)
            if in_place and held is not None and part is not None and held.shape == part.shape:
                held.copy_(part)
            else:
                setattr(self, name, part)

    def _description(self) -> str:
        """What loaded state must have been made as."""
        return f"{self.spec} [{self.out_features}, {self.in_features}]"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        q = self.weight
        for name in _PARTS:
            part = getattr(q, name)
            if part is not None:
                destination[f"{prefix}weight.{name}"] = part
        destination[f"{prefix}weight.spec"] = torch.tensor(list(self._description().encode()), dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = f"{prefix}weight."
        weight = {key.removeprefix(start): part for key, part in state_dict.items() if key.startswith(start)}
        others = {key: value for key, value in state_dict.items() if not key.startswith(start)}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

        found = bytes(weight["spec"].tolist()).decode(errors="replace") if "spec" in weight else self._description()
        if found != self._description():
            error_msgs.append(f"{prefix}weight is {found} in the state, and {self._description()} in the model")
            return
        expected = (*_PARTS[: 2 if self.spec.symmetric else 3], "spec")
        missing = [start + name for name in expected if name not in weight]
        missing_keys += missing
        if strict:
            unexpected_keys += [start + name for name in weight if name not in expected]
        if missing:
            return
        try:
            self._load(weight, assign=local_metadata.get("assign_to_params_buffers", False))
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def _load(self, weight: dict[str, torch.Tensor], assign: bool) -> None:
        if self.codes.is_meta and not assign:
            raise ValueError("the model is on meta; allowed: assign=True, or model.to_empty(device=...) before")
        shape = (self.out_features, self.in_features)
        q = MXTensor(weight["codes"], weight["scale"], weight.get("offset"), self.spec, shape)
        self._hold(q if assign else q.to(self.codes.device), in_place=not assign)


def pack(
    model: nn.Module,
    spec: MXSpec | str = "mxfp4",
    skip: str | Collection[str] = (),
    *,
    activations: MXSpec | str | None = None,
) -> nn.Module:
    """Replace the linears of a model by ones that hold their weights in an MX format only: for serving.

    Args:
        model: changed in place: every nn.Linear and MXLinear, not their subclasses, becomes a PackedLinear. The
            memory of a weight is freed as soon as it is quantised. A model on `meta` stays there, to be filled by
            `load_state_dict(state, assign=True)`.
        spec: of the weights, or a preset's name.
        skip: paths of modules that stay as they are, with all that is in them, or patterns of such paths as in
            `fnmatch`: `("lm_head", "*.gate")`.
        activations: what is made of each linear's input before the product, or a preset's name; None leaves it.

    Returns:
        The model; or its replacement, if it is itself a linear.

    Raises:
        TypeError, ValueError: names the argument and what is allowed; a pattern that matches no linear is an error.

    A weight that an embedding shares is packed for the linear and stays for the embedding, which costs memory
    rather than freeing it: `skip` such a linear.
    """
    from .nn import MXLinear  # which knows PackedLinear

    weights = _spec_named("spec", spec)
    inputs = None if activations is None else _spec_named("activations", activations)
    return replace_linears(
        model, lambda linear: PackedLinear.from_linear(linear, weights, inputs), skip, (nn.Linear, MXLinear)
    )


def _spec_named(argument: str, spec: MXSpec | str) -> MXSpec:
    if isinstance(spec, MXSpec):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"{argument} is a {type(spec).__name__}; allowed: an MXSpec, or {', '.join(PRESETS)}")
    if spec not in PRESETS:
        raise ValueError(f"{argument} is {spec!r}; allowed: an MXSpec, or {', '.join(PRESETS)}")
    return PRESETS[spec]


def _zeros(rows: int, cols: int, spec: MXSpec, device: torch.device | str | None) -> MXTensor:
    blocks = spec.scale_shape(rows, cols)
    codes = torch.zeros(rows, spec.packed_cols(cols), dtype=torch.uint8, device=device)
    scale = torch.zeros(blocks, dtype=torch.uint8, device=device)
    offset = None if spec.symmetric else torch.zeros(blocks, dtype=torch.float16, device=device)
    return MXTensor(codes, scale, offset, spec, (rows, cols))


def _worth_preparing(spec: MXSpec, rows: int, cols: int) -> bool:
    """Whether a weight can be prepared, and filling its tiles adds no more than a 64th."""
    if not preparable(spec) or rows * cols == 0:
        return False
    filled = -(-rows // BAND) * BAND * -(-cols // GROUP) * GROUP
    return 64 * (filled - rows * cols) <= rows * cols


def _activated(x: torch.Tensor, spec: MXSpec) -> MXTensor | torch.Tensor:
    """x quantised; in bfloat16 if that holds it and the product will be one of few rows, which take no MXTensor."""
    q = quantize(x, spec)
    exact = spec.symmetric and spec.element.special == "none"
    return q.dequantize() if exact and prod(x.shape[:-1]) <= MAX_ROWS else q
