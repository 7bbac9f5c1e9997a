"""What decides the bytes: the block, the spec, and the presets that people know by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal, get_args

from .formats import FORMATS, ElementFormat

Rounding = Literal["rtne", "stochastic"]
ScaleRounding = Literal["floor", "ceil", "even", "rceil"]

MAX_BLOCK_SIDE = 128


@dataclass(frozen=True)
class Block:
    """The elements that share one scale: `rows` x `cols`, powers of two from 1 to 128, two elements or more.

    The shape is the axis: `1x32` shares along a row, `32x1` down a column, `4x4` in a tile.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for side in (self.rows, self.cols):
            power_of_two = type(side) is int and side > 0 and side & (side - 1) == 0
            if not power_of_two or side > MAX_BLOCK_SIDE:
                raise ValueError(f"block {self}: each side must be a power of two from 1 to {MAX_BLOCK_SIDE}")
        if self.rows * self.cols < 2:
            raise ValueError(f"block {self}: a block has at least two elements")

    @classmethod
    def parse(cls, text: str) -> Block:
        """Read `"4x4"`. Raises ValueError with the allowed form."""
        rows, separator, cols = text.strip().lower().partition("x")
        if not (separator and rows.isdecimal() and cols.isdecimal()):
            raise ValueError(f"block {text!r}: write rows x columns, such as 1x32, 32x1 or 4x4")
        return cls(int(rows), int(cols))

    @property
    def T(self) -> Block:
        return Block(self.cols, self.rows)

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


@dataclass(frozen=True)
class MXSpec:
    """Everything that decides the bytes of a quantised tensor. The contract is `docs/numerics.md`.

    Args:
        element: an element format, or its name: e2m1, e3m0, int4, e2m3, e3m2, e4m3, e5m2, int8.
        block: a `Block`, `"4x4"` or `(4, 4)`.
        rounding: of the elements, `"rtne"` or `"stochastic"`.
        scale_rounding: `"floor"`, `"ceil"`, `"even"` or `"rceil"`.
        symmetric: False stores an fp16 offset for each block, the middle of its range.

    Raises:
        ValueError: names the argument and the allowed values.
    """

    element: ElementFormat
    block: Block
    rounding: Rounding
    scale_rounding: ScaleRounding
    symmetric: bool

    _text: ClassVar[str]  # each spec's own, but no field: it follows from them

    def __init__(
        self,
        element: ElementFormat | str,
        block: Block | str | Sequence[int] = (1, 32),
        rounding: Rounding = "rtne",
        scale_rounding: ScaleRounding = "even",
        symmetric: bool = True,
    ) -> None:
        if not isinstance(element, ElementFormat):
            element = FORMATS[_allowed("element", element, tuple(FORMATS))]
        if isinstance(block, str):
            block = Block.parse(block)
        elif not isinstance(block, Block):
            if not isinstance(block, Sequence) or len(block) != 2:
                raise ValueError(f"block {block!r}: give rows and columns, such as (1, 32)")
            block = Block(*block)
        if not isinstance(symmetric, bool):
            raise ValueError(f"symmetric is {symmetric!r}; allowed: True, False")
        fields = {
            "element": element,
            "block": block,
            "rounding": _allowed("rounding", rounding, get_args(Rounding)),
            "scale_rounding": _allowed("scale_rounding", scale_rounding, get_args(ScaleRounding)),
            "symmetric": symmetric,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        # Not made when asked for: torch.compile may hold the integers as symbols then, which it cannot format;
        # nor does it call str(block).
        symmetry = "symmetric" if symmetric else "asymmetric"
        text = f"{element.name} {block.rows}x{block.cols} {rounding} {scale_rounding} {symmetry}"
        object.__setattr__(self, "_text", text)

    @classmethod
    @lru_cache
    def parse(cls, text: str) -> MXSpec:
        """The inverse of `str(spec)`: `"e2m1 1x32 rtne even symmetric"`."""
        try:
            element, block, rounding, scale_rounding, symmetry = text.split()
            symmetric = {"symmetric": True, "asymmetric": False}[symmetry]
        except (ValueError, KeyError):
            raise ValueError(f"spec {text!r}: write 'e2m1 1x32 rtne even symmetric' (or 'asymmetric')") from None
        return cls(element, block, rounding, scale_rounding, symmetric)  # type: ignore[arg-type]

    @property
    def T(self) -> MXSpec:
        """The same spec with the block transposed."""
        return replace(self, block=self.block.T)

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def can_saturate(self) -> bool:
        """Whether an element may be rounded beyond the format's `max`."""
        element = self.element
        if self.scale_rounding == "even" and not self.stochastic:
            # the scale goes up where rounding to so many bits would; the largest of these may be beyond `max`
            return (2 - 2.0**-element.scale_mantissa_bits) * 2.0**element.emax > element.max
        if self.scale_rounding == "ceil":
            return 2.0**element.emax > element.max
        return self.scale_rounding != "rceil"

    @property
    def bits_per_element(self) -> float:
        """Stored bits an element, scales and offsets included: 4.25 for e2m1 at 1x32."""
        shared = 8 if self.symmetric else 24
        return self.element.bits + shared / (self.block.rows * self.block.cols)

    def packed_cols(self, cols: int) -> int:
        """Bytes in which a row of `cols` codes is stored."""
        groups = (cols + self.element.group - 1) // self.element.group
        return groups * self.element.group_bytes

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the scales (and offsets) of a matrix of `rows` x `cols`."""
        r, c = self.block.rows, self.block.cols
        return ((rows + r - 1) // r, (cols + c - 1) // c)

    def __str__(self) -> str:
        return self._text


def _allowed(argument: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{argument} is {value!r}; allowed: {', '.join(allowed)}")
    return value


mxfp4 = MXSpec("e2m1")
mxfp6_e2m3 = MXSpec("e2m3")
mxfp6_e3m2 = MXSpec("e3m2")
mxfp8_e4m3 = MXSpec("e4m3", scale_rounding="rceil")
mxfp8_e5m2 = MXSpec("e5m2", scale_rounding="rceil")
mxint8 = MXSpec("int8", scale_rounding="floor")
mxint4 = MXSpec("int4", scale_rounding="ceil")

PRESETS: dict[str, MXSpec] = {
    "mxfp4": mxfp4,
    "mxfp6_e2m3": mxfp6_e2m3,
    "mxfp6_e3m2": mxfp6_e3m2,
    "mxfp8_e4m3": mxfp8_e4m3,
    "mxfp8_e5m2": mxfp8_e5m2,
    "mxint8": mxint8,
    "mxint4": mxint4,
}
